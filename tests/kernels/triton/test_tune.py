"""The search of configurations, with prices instead of times."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from kbit_kernels import QuantSpec
from kbit_kernels.triton import configs, tune
from kbit_kernels.triton.configs import Config

INT4 = QuantSpec("int", 4)


def price(config: Config) -> float:
    return 10.0 + config.warps_n - config.warps_k - 0.5 * config.overlap


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are saved; what is to be timed is its configuration."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def medians_us(timed: Mapping[str, Config], rounds: int = 15) -> dict[str, float]:
        return {name: price(config) for name, config in timed.items()}

    monkeypatch.setattr(tune, "Timed", lambda calls, device: calls[0].args[2])
    monkeypatch.setattr(tune, "medians_us", medians_us)
    return configs.tuned_path()


def test_an_interrupted_search_keeps_what_it_found(table: Path) -> None:
    told: list[tuple[float, int, str]] = []
    search = tune.tune(
        [INT4], [(64, 1024)], [1, 8, 16], lambda *what: told.append(what), device="cpu"
    )
    found = next(search)
    search.close()
    entries = json.loads(table.read_text())["classes"]["interpreter"]["entries"]
    assert list(entries) == [found.key] == ["k4-m8-64x1024"]
    assert Config.of(entries[found.key]) == found.config
    assert found.us == price(found.config) <= found.rule_us
    # 1 and 8 rows are one entry; a step for every candidate
    assert {total for _, total, _ in told} == {2}
    parts = [done for done, _, _ in told]
    assert len(parts) > 3
    assert parts == sorted(parts)
    assert 0 == parts[0] <= parts[-1] < 1


@pytest.mark.parametrize(("gpu", "able"), [("sm_90", True), ("sm_80", False)])
def test_the_best_are_tried_with_overlap(
    table: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, able: bool
) -> None:
    monkeypatch.setattr(tune, "gpu_class", lambda device: (gpu, configs.SHIPPED_CLASSES[gpu]))
    flags = {"launch_pdl": True} if able else {}
    monkeypatch.setattr(tune, "overlapping", lambda device, early: flags)
    (found,) = tune.tune([INT4], [(4096, 4096)], [1], device="cpu")
    assert found.config.overlap == able
    everything = tune.candidates(INT4, 8, 4096, 4096, gpu, configs.SHIPPED_CLASSES[gpu])
    assert found.us == min(map(price, everything)) - 0.5 * able


def test_compiling_side_by_side_counts_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "COMPILERS", 1)
    configs = [Config(8, 1, 1, 4, split) for split in (1, 2, 4)]
    # a card or none: what can't be compiled is told where it is timed
    with tune.compilers("cuda") as compile_all:
        assert list(compile_all(INT4, 256, configs)) == [1, 2, 3]
    with tune.compilers("cpu") as compile_all:
        assert list(compile_all(INT4, 256, configs)) == []


def test_eight_warps_are_also_tried_with_few_registers() -> None:
    found = tune.candidates(INT4, 1, 8192, 8192, "sm_90", 132)
    few = [config for config in found if config.registers]
    assert few
    assert {config.warps_n * config.warps_k for config in few} == {configs.MAX_WARPS}
    assert not any(c.registers for c in tune.candidates(INT4, 16, 8192, 8192, "sm_90", 132))


def test_the_cross_over_is_the_median(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter((64, 1024, 128))
    monkeypatch.setattr(tune, "cross_over_rows", lambda spec, shape, device: next(measured))
    specs = [QuantSpec("int", bits) for bits in (2, 3, 4)]
    assert tune.tune_cross_over(specs, [(64, 256)], device="cpu") == 128
    assert json.loads(table.read_text())["classes"]["interpreter"]["cross_over_rows"] == 128
