"""`kbit tune` around the search, which needs a GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

import kbit_kernels.triton
from kbit_kernels.triton import tune
from kbit_kernels.triton.configs import Config
from tests.kbit.cli.conftest import Ran

Run = Callable[..., Ran]
FOUND = tune.Found("k4-m8-64x256", Config(8, 1, 1, 4, 1), 2.5, 3.5)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kbit_kernels.triton, "available", lambda: (True, "a card"))
    monkeypatch.setattr(tune, "tune_cross_over", lambda specs, shapes, progress: 96)


def test_what_is_found_is_told(run: Run, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(specs: object, shapes: object, rows: object, progress: tune.Progress) -> Iterator:
        progress(0.5, 1, "half")
        yield FOUND

    monkeypatch.setattr(tune, "tune", search)
    told = run("tune", "--bits", 4, "--shapes", "64x256", "--rows", 1)
    assert told.status == 0
    assert "k4-m8-64x256: 2.5 us (rule: 3.5 us)" in told.out
    assert "up to 96 tokens" in told.out
    assert told.out.splitlines()[-1].endswith("triton-configs.json.")


def test_an_interruption_says_where_the_rest_is(
    run: Run, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(*arguments: object) -> Iterator:
        yield FOUND
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "tune", search)
    told = run("tune", "--bits", "4,3")
    assert told.status == 2
    assert "k4-m8-64x256" in told.out
    assert "so far is in" in told.out
    assert told.err.strip() == "kbit: interrupted"


@pytest.mark.parametrize(
    ("option", "text"),
    [("--bits", "4,"), ("--rows", "0"), ("--rows", "-1"), ("--shapes", "0x64"), ("--shapes", "8")],
)
def test_wrong_numbers_are_named(run: Run, gpu: None, option: str, text: str) -> None:
    told = run("tune", f"{option}={text}")
    assert told.status == 2
    assert option in told.err
