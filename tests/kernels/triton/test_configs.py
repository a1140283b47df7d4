"""Which configuration is chosen, and what may be in a table."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from kbit_kernels import QuantSpec
from kbit_kernels.errors import KbitError
from kbit_kernels.triton import available, configs
from kbit_kernels.triton.configs import Config

SPEC = QuantSpec("int", 4)
ARGUMENTS = ("sm_100", 148)  # a class without shipped entries


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.fused_for.cache_clear()
    configs.choose_for.cache_clear()
    yield configs.tuned_path()
    configs.fused_for.cache_clear()
    configs.choose_for.cache_clear()


@pytest.mark.parametrize("gpu", configs.SHIPPED_CLASSES)
def test_the_rule_fits_every_shape(gpu: str) -> None:
    sms = configs.SHIPPED_CLASSES[gpu]
    for n, k in [*configs.SHIPPED_SHAPES, (1, 32), (576, 1536), (49152, 576), (128256, 4096)]:
        for rows in (1, 2, 8, 9, 16, 17, 64, 100):
            config = configs.heuristic(SPEC, rows, n, k, gpu, sms)
            tiles = -(-k // configs.COLUMNS)
            assert config.rows_x >= min(rows, 32)
            assert config.warps_k * config.split <= max(tiles, config.warps_n)
            most = 16 if config.stages else configs.MAX_WARPS
            assert config.warps_n * config.warps_k <= most
            for value in (config.bands, config.warps_n, config.warps_k, config.split):
                assert value.bit_count() == 1


def test_one_to_eight_rows_share_a_configuration() -> None:
    found = {configs.heuristic(SPEC, rows, 8192, 8192, *ARGUMENTS) for rows in range(1, 9)}
    assert len(found) == 1


def test_tuning_goes_before_the_rule(cache: Path) -> None:
    config, source = configs.choose_for(SPEC, 3, 8192, 8192, *ARGUMENTS)
    assert source == "rule"
    better = Config(8, 2, 1, 4, 2)
    assert better != config
    key = configs.entry_keys(SPEC, 3, 8192, 8192)[0]
    configs.write(cache, "sm_100", {key: configs.as_entry(better, "tuned")})
    assert configs.choose_for(SPEC, 1, 8192, 8192, *ARGUMENTS) == (better, "tuned")
    assert configs.choose_for(SPEC, 1, 4096, 4096, *ARGUMENTS)[1] == "rule"
    assert configs.choose_for(SPEC, 1, 8192, 8192, "sm_80", 108)[1] == "rule"


def test_types_take_the_entries_of_int_unless_they_have_their_own(cache: Path) -> None:
    other, own = QuantSpec("uint", 4), Config(8, 1, 1, 4, 1)
    [key] = configs.entry_keys(SPEC, 3, 8192, 8192)
    configs.write(cache, "sm_100", {key: configs.as_entry(Config(8, 1, 1, 2, 2), "tuned")})
    assert configs.choose_for(other, 3, 8192, 8192, *ARGUMENTS)[0] == Config(8, 1, 1, 2, 2)
    first, second = configs.entry_keys(other, 3, 8192, 8192)
    assert second == key
    configs.write(cache, "sm_100", {first: configs.as_entry(own, "tuned")})
    assert configs.choose_for(other, 3, 8192, 8192, *ARGUMENTS)[0] == own
    assert configs.choose_for(SPEC, 3, 8192, 8192, *ARGUMENTS)[0] == Config(8, 1, 1, 2, 2)
    assert configs.entry_keys(QuantSpec("nf", 4), 1, 8, 32)[0] == "table4-m8-8x32"


def test_a_tuned_entry_that_a_table_has_no_room_for(cache: Path) -> None:
    big = Config(32, 2, 4, 2, 2)
    key = configs.entry_keys(SPEC, 32, 8192, 8192)[0]
    configs.write(cache, "sm_100", {key: configs.as_entry(big, "tuned")})
    assert configs.choose_for(SPEC, 32, 8192, 8192, *ARGUMENTS) == (big, "tuned")
    assert configs.choose_for(QuantSpec("nf", 4), 32, 8192, 8192, *ARGUMENTS)[1] == "rule"


@pytest.mark.parametrize("gpu", configs.SHIPPED_CLASSES)
def test_the_rule_fits_in_shared_memory(gpu: str) -> None:
    sms = configs.SHIPPED_CLASSES[gpu]
    for bits in range(2, 9):
        for spec in (QuantSpec(name, bits) for name in ("int", "uint", "fp", "nf")):
            for n, k in configs.SHIPPED_SHAPES:
                for rows in configs.ROW_BUCKETS:
                    config = configs.heuristic(spec, rows, n, k, gpu, sms)
                    assert configs.fits(config, spec)


def test_a_second_search_keeps_the_first(cache: Path) -> None:
    entry = configs.as_entry(Config(8, 1, 1, 4, 1), "tuned")
    configs.write(cache, "sm_100", {"k4-m8-1x32": entry})
    configs.write(cache, "sm_100", {"k3-m8-1x32": entry})
    configs.write(cache, "sm_80", {"k4-m8-1x32": entry})
    classes = json.loads(cache.read_text())["classes"]
    assert set(classes["sm_100"]["entries"]) == {"k4-m8-1x32", "k3-m8-1x32"}
    assert set(classes) == {"sm_80", "sm_100"}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_many_rows_go_to_cublas(cache: Path) -> None:
    assert configs.choose_for(SPEC, 129, 8192, 8192, *ARGUMENTS)[0] is None
    assert configs.choose_for(SPEC, 128, 8192, 8192, *ARGUMENTS)[0] is not None
    configs.write(cache, "sm_100", {}, cross_over_rows=40)
    assert configs.choose_for(SPEC, 41, 8192, 8192, *ARGUMENTS) == (
        None,
        "tuned: above the cross-over",
    )


def test_a_measured_cross_over_goes_before_the_shipped_one(cache: Path) -> None:
    configs.write(cache, "sm_100", {}, cross_over_rows=256)
    assert configs.choose_for(SPEC, 200, 8192, 8192, *ARGUMENTS)[0] is not None
    assert configs.choose_for(SPEC, 257, 8192, 8192, *ARGUMENTS)[0] is None
    assert configs.choose_for(SPEC, 129, 8192, 8192, "sm_80", 108)[0] is None


def test_what_is_tried_goes_before_everything(cache: Path) -> None:
    import torch

    cpu, config = torch.device("cpu"), Config(8, 1, 2, 2, 4)
    chosen = configs.choose(SPEC, 200, 8192, 8192, cpu)
    with configs.trying({(8192, 8192): config}):
        assert configs.choose(SPEC, 200, 8192, 8192, cpu) == config
        assert configs.choose(SPEC, 200, 4096, 8192, cpu) is None
    assert configs.choose(SPEC, 200, 8192, 8192, cpu) == chosen


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"classes": {"sm_100": {"entries": {"k4-m8-1x32": {"rows_x": 8}}}}}']
)
def test_a_damaged_table_is_named(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    with pytest.raises(KbitError, match=r"triton-configs\.json: is no table"):
        configs.choose_for(SPEC, 3, 8192, 8192, *ARGUMENTS)


def test_shipped_table_names_known_classes() -> None:
    table = json.loads(configs.SHIPPED.read_text())
    assert set(table["classes"]) == set(configs.SHIPPED_CLASSES)


def test_availability_has_a_reason() -> None:
    usable, reason = available()
    assert reason
    import torch

    assert usable <= torch.cuda.is_available()


def test_every_shipped_entry_can_be_launched() -> None:
    for gpu, found in json.loads(configs.SHIPPED.read_text())["classes"].items():
        for key, entry in found["entries"].items():
            config = Config.of(entry)
            bits, rows, n, k = map(int, re.findall(r"\d+", key))
            assert config.rows_x <= configs.bucket(rows)
            assert config.rows_x == configs.bucket(rows) or rows > configs.LINEAR_ROWS
            decoding = re.match("[a-z]+", key)[0]
            name = {"k": "int", "table": "nf"}.get(decoding, decoding)
            assert configs.fits(config, QuantSpec(name, bits)), key
            # a table may leave no room, and then the rule's fits
            spec = QuantSpec("nf", bits)
            chosen, _ = configs.fused_for(spec, rows, n, k, gpu, configs.SHIPPED_CLASSES[gpu])
            assert configs.fits(chosen, spec), key
