"""What the page of findings says is what was fitted."""

import json
from pathlib import Path

import pytest

from kbit.errors import KbitError
from kbit_scaling.findings import fill, plain
from kbit_scaling.summary import summarize

from .test_analysis import records

BOOKS = Path(__file__).parents[2] / "scaling/studies/books"


def test_committed_findings_agree_with_the_committed_fits() -> None:
    fits = json.loads((BOOKS / "fits.json").read_text())
    text = (BOOKS / "FINDINGS.md").read_text()
    assert fill(text, fits) == text


def test_places_are_filled_from_the_fits() -> None:
    summary = summarize(records(0.02), laws=["kumar", "free"], replicates=4)
    fits = json.loads(json.dumps(summary.as_json()))
    places = (
        "gamma = <!-- =estimate t divergence int-b64 kumar gamma --><!-- / -->, missed by "
        "<!-- =off t divergence int-b64 kumar -->\nold<!-- / -->\n"
        "<!-- =laws --><!-- / --><!-- =worth t types --><!-- / --><!-- =best t --><!-- / -->"
        "<!-- =cost t int-b64 m --><!-- / --> nf saves <!-- =saved t types nf-b64 4 --><!-- / -->"
    )
    filled = fill(places, fits)
    assert fill(filled, fits) == filled
    text = plain(filled)
    assert "gamma = 0.6" in text
    assert "missed by x1.0" in text
    assert "| held out | H2 kumar | free |" in text
    assert "| `nf-b64` | +0.5" in text
    assert "nf saves +0.5" in text
    assert "<!--" not in text


def test_what_the_fits_lack_is_named() -> None:
    with pytest.raises(
        KbitError, match=r"'best wiki', which the fits lack .* known names: estimate"
    ):
        fill("<!-- =best wiki --><!-- / -->", {"best_width": {}})
