"""The report in a real Chromium: on a phone, on a desk and on paper.

The browser is the system's own (`apt-get install chromium`): playwright drives it.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kbit_scaling import report
from kbit_scaling.summary import summarize

from .test_analysis import records

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
COMMITTED = Path(__file__).parents[2] / "scaling/studies/books/report.html"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
DESK = {"viewport": {"width": 1280, "height": 900}}
A4_WIDTH = 718  # CSS pixels between margins of 1 cm


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    names = ("chromium", "google-chrome", "chromium-browser")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs a Chromium to open the page in, such as Debian's package chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page made now, and the one that is committed."""
    summary = summarize(records(0.02), laws=["kumar"], groups=["int-b64"], replicates=2)
    made = tmp_path_factory.mktemp("page") / "report.html"
    report.write(made, report.page(summary, title="T", question="Q?", commands=["kbit sweep"]))
    return {"made": made, "committed": COMMITTED}


def overflow(page: "sync_api.Page") -> int:
    """Pixels that the page is wider than its window."""
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    return int(page.evaluate(wide))


@pytest.mark.parametrize("which", ["made", "committed"])
@pytest.mark.parametrize("screen", [PHONE, DESK], ids=["phone", "desk"])
def test_page_fits_the_screen_and_answers_to_pointer_and_click(
    browser: "sync_api.Browser", pages: dict[str, Path], which: str, screen: dict[str, object]
) -> None:
    page = browser.new_page(**screen)
    page.set_default_timeout(120_000)  # a machine may be busy
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    page.goto(pages[which].as_uri())
    assert overflow(page) <= 0
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert overflow(page) <= 0
    chart = page.locator("figure.chart").first
    chart.locator("circle").first.hover(force=True)
    tip = chart.locator(".tip")
    assert tip.is_visible()
    assert "bit" in tip.inner_text()
    box = tip.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= screen["viewport"]["width"]  # type: ignore[index]
    lines = chart.locator("g.series:visible").count()
    chart.locator(".legend button").first.click()
    assert chart.locator("g.series:visible").count() == lines - 1
    # letters of at least 9 pixels, however small the chart
    text = chart.locator("svg text").first
    size = text.evaluate("t => t.getScreenCTM().a * parseFloat(getComputedStyle(t).fontSize)")
    assert size >= 9
    assert faults == []
    page.close()


def test_page_prints(browser: "sync_api.Browser", pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": A4_WIDTH, "height": 1000})
    page.goto(pages["committed"].as_uri())
    page.emulate_media(media="print")
    assert overflow(page) <= 0
    pdf = page.pdf(format="A4", margin=dict.fromkeys(("top", "bottom", "left", "right"), "1cm"))
    assert pdf.startswith(b"%PDF")
    assert 3 < len(re.findall(rb"/Type\s*/Page\b", pdf)) < 60
    page.close()
