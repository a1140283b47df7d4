"""Which configuration runs a product: the user's tuning, the shipped table, then a rule.

`configs.json` has one part per class of GPU; `kbit tune` writes the same form to the cache
directory. The name of an entry says for which decoding, bits, rows of x and shape it was found.
Types without entries of their own take those of `int`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbit_kernels.errors import KbitError
from kbit_kernels.spec import QuantSpec
from kbit_kernels.triton.layout import COLUMNS, ROWS, kind_of, scheme_of

if TYPE_CHECKING:
    import torch

SHIPPED = Path(__file__).with_name("configs.json")
ROW_BUCKETS = (8, 16, 32, 64, 128)  # rows of x that one program can hold
LINEAR_ROWS = 32  # of them by kernels.linear_kernel
MAX_WARPS = 8  # of linear_kernel
GEMM_CLASSES = ("sm_90",)  # whose tensor cores take x from shared memory, as gemm.py is made for
CROSS_OVER_ROWS = 128  # above it others' fused kernels lose to cuBLAS; kbit tune measures it
# of gemm_kernel beside its sums, where weights wait in registers, if more than usual (see fits)
AHEAD_REGISTERS = {
    ("int", 8): 128,
    ("uint", 8): 120,
    ("fp", 8): 120,
    ("uint", 3): 120,
    ("fp", 5): 120,
}
WARPS_PER_SM = 24  # enough loads in flight to cover the memory's latency


@dataclass(frozen=True)
class Config:
    """How one product is cut up.

    Attributes:
        rows_x: rows of x a program holds, 8 to 128; more rows are more programs.
        bands: bands of 16 weight rows a warp holds; 1 for gemm_kernel.
        warps_n: warps beside each other over weight rows.
        warps_k: warps that share weight rows and take turns over the columns; 1 for gemm_kernel.
        split: programs that share an output and split the columns.
        overlap: begins, from sm_90 on, while the kernel before still runs, as far as it does not
            need its results. Pays where the other kernel leaves room on every multiprocessor.
        stages: 0: kernels.linear_kernel. Else gemm.gemm_kernel, with so many tiles of weights and x
            on their way through shared memory.
        arranged: x is brought into the order of gemm_kernel by a kernel of its own before.
        registers: how many a lane may have at most, so that more programs fit a multiprocessor; 0:
            as many as the compiler likes.
        ahead: of gemm_kernel: the next tile of weights waits in registers, only x in shared memory.
    """

    rows_x: int
    bands: int
    warps_n: int
    warps_k: int
    split: int
    overlap: bool = False
    stages: int = 0
    arranged: bool = False
    registers: int = 0
    ahead: bool = False

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Config":
        """The configuration of a table's entry, which may say more."""
        return cls(
            int(entry["rows_x"]),
            int(entry["bands"]),
            int(entry["warps_n"]),
            int(entry["warps_k"]),
            int(entry["split"]),
            bool(entry.get("overlap", False)),
            int(entry.get("stages", 0)),
            bool(entry.get("arranged", False)),
            int(entry.get("registers", 0)),
            bool(entry.get("ahead", False)),
        )


def bucket(rows: int) -> int:
    """Rows of x that a program for `rows` holds."""
    return next((size for size in ROW_BUCKETS if rows <= size), ROW_BUCKETS[-1])


def power_of_two(value: int) -> int:
    """The largest power of two up to `value` (at least 1)."""
    return 1 << (max(value, 1).bit_length() - 1)


def fits(config: Config, spec: QuantSpec) -> bool:
    """Whether `spec` can be launched so. A program gets 48 KB of shared memory unless Triton asks
    for more, which it does for what it counts itself; it does not count the 32 KB of table that
    inline PTX declares. The rest holds what warps exchange at the end: with triton 3.6 the fp32
    sums of all of them, with 3.9 less. gemm_kernel's tiles are more than 48 KB, or beside
    no table."""
    warps = config.warps_n * config.warps_k
    kind = scheme_of(spec).kind
    table = (32 << 10) if kind == "table" else 0
    if config.stages:
        # one buffer of weights less: they are read before the next ones are asked for
        weights = 0 if config.ahead else (config.stages - 1) * 2 * warps * spec.bits
        tiles = COLUMNS * (config.stages * 2 * config.rows_x + weights)
        # as compiled: half a register a row of x for the sums, 96 for the rest, more where codes of
        # 3, 5 and 7 bits are looked up, or many bits wait; beyond, lanes spill
        rest = 120 if table and spec.bits in (3, 5, 7) else 96
        if config.ahead:
            usual = 120 if table else 96 + max(0, 4 * (spec.bits - 5))
            rest = AHEAD_REGISTERS.get((kind, spec.bits), usual)
        registers = config.rows_x // 2 + rest <= (64 << 10) // (32 * warps)
        one_each = config.bands == config.warps_k == 1
        granted = tiles > (48 << 10) or not table
        return one_each and registers and granted and tiles <= (224 << 10) - table
    exchanged = warps * ROWS * config.bands * config.rows_x * 4
    return config.rows_x <= LINEAR_ROWS and (not table or exchanged <= 16 << 10)


# gemm_kernel as an H100 liked best, by the rows of x that a program holds: warps, stages, programs
# a multiprocessor; where weights wait in registers the first that fits
AHEAD = {16: [(8, 6, 2)], 32: [(16, 4, 1), (8, 4, 2)], 64: [(4, 3, 2)]}
NOT_AHEAD = {32: [(8, 3, 2)], 64: [(8, 3, 1)]}  # lookups leave no registers for it


def _gemm(rows: int, n: int, k: int, sms: int, cut: tuple[int, int, int], ahead: bool) -> Config:
    """gemm_kernel's configuration with a cut of AHEAD or NOT_AHEAD."""
    rows_x, (warps, stages, per_sm) = min(bucket(rows), 64), cut
    programs = -(-n // (ROWS * warps)) * -(-rows // rows_x)
    split = power_of_two(min(-(-k // COLUMNS) // 2, sms * per_sm // programs, 8))
    arranged = rows > LINEAR_ROWS
    return Config(rows_x, 1, warps, 1, split, True, stages, arranged, ahead=ahead)


def heuristic(spec: QuantSpec, rows: int, n: int, k: int, gpu: str, sms: int) -> Config:
    """A configuration without measurements: enough warps to keep `sms` multiprocessors loading."""
    rows_x = bucket(rows)
    ahead = scheme_of(spec).kind != "table"
    cuts = (AHEAD if ahead else NOT_AHEAD).get(min(rows_x, 64), [])
    if cuts and gpu in GEMM_CLASSES:
        found = (_gemm(rows, n, k, sms, cut, ahead) for cut in cuts)
        return next(config for config in found if fits(config, spec))
    tiles = -(-k // COLUMNS)
    bands_total = -(-n // ROWS)
    # AMD's matrix instructions have at least 16 columns
    rows_x = min(max(rows_x, 16 if gpu.startswith("gfx") else 8), LINEAR_ROWS)
    wanted = sms * WARPS_PER_SM
    # where fewer warps a band are enough, more bands at once meet better than more columns
    most = MAX_WARPS // 2 if bands_total * MAX_WARPS // 2 >= wanted else MAX_WARPS
    if rows_x == LINEAR_ROWS:
        most = 4  # sums of so many rows take registers: 37 instead of 46 us on an H100 at 4 bits
    warps_k = min(most, power_of_two(tiles))
    split = min(power_of_two(tiles // warps_k), power_of_two(wanted // (bands_total * warps_k)))
    return Config(rows_x, 1, 1, warps_k, max(1, min(split, 8)))


# multiprocessors of the chip that each class is shipped for
SHIPPED_CLASSES = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
}
SHIPPED_SHAPES = ((4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336), (28672, 8192))


def shipped_configs(gpu: str, spec: QuantSpec) -> set[Config]:
    """Every configuration that `spec` can get from the shipped table, for any shape in it, or from
    the rule, for the shapes above."""
    best = {}
    for decoding in reversed(_decodings(spec)):
        for key, entry in _read(SHIPPED)["classes"][gpu]["entries"].items():
            name, _, place = key.partition("-")
            if name == decoding:
                best[place] = Config.of(entry)
    found = set(best.values())
    for n, k in SHIPPED_SHAPES:
        for rows in ROW_BUCKETS:
            found.add(heuristic(spec, rows, n, k, gpu, SHIPPED_CLASSES[gpu]))
    return {config for config in found if fits(config, spec)}


@lru_cache(maxsize=64)
def _read(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
        for found in loaded["classes"].values():
            for entry in found["entries"].values():
                Config.of(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KbitError(
            f"{path}: is no table of kernel configurations ({error!r}); delete it, or write it "
            "anew with kbit tune"
        ) from None
    return loaded


def tuned_path() -> Path:
    """Where `kbit tune` keeps what it found."""
    import os

    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "kbit" / "triton-configs.json"


def sources(gpu: str) -> dict[str, int]:
    """Path of each table that is looked into, best first -> its configurations for class `gpu`."""
    none: dict[str, Any] = {"entries": {}}
    return {
        str(path): len(_read(path)["classes"].get(gpu, none)["entries"]) if path.exists() else 0
        for path in (tuned_path(), SHIPPED)
    }


def _decodings(spec: QuantSpec) -> tuple[str, ...]:
    """Whose entries `spec` takes, best first: k4 (`int`'s), uint4, fp6, table8 and the like."""
    kind, shared = kind_of(spec), f"k{spec.bits}"
    return (shared,) if kind == "int" else (f"{kind}{spec.bits}", shared)


def entry_keys(spec: QuantSpec, rows: int, n: int, k: int) -> list[str]:
    """Names of the entries for a product, best first: how codes are decoded and their bits, bucket
    of rows, shape; blocks of all sizes share entries."""
    return [f"{decoding}-m{bucket(rows)}-{n}x{k}" for decoding in _decodings(spec)]


def write(path: Path, gpu: str, entries: dict[str, dict[str, Any]], **about: Any) -> None:
    """Merge `entries` of class `gpu` into the table at `path`, aside and renamed into place."""
    empty: dict[str, Any] = {"version": 1, "classes": {}}
    table = _read(path) if path.exists() else empty
    found = table["classes"].setdefault(gpu, {"entries": {}})
    found.update(about)
    found["entries"].update(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    aside.replace(path)
    _read.cache_clear()
    fused_for.cache_clear()
    choose_for.cache_clear()


def as_entry(config: Config, source: str) -> dict[str, Any]:
    """The JSON of a configuration, without what it does not do."""
    return {**{name: value for name, value in asdict(config).items() if value}, "source": source}


@lru_cache(maxsize=16)
def gpu_class(device: "torch.device") -> tuple[str, int]:
    """(name of the class such as `sm_90`, number of multiprocessors)."""
    if device.type == "cpu":
        return "interpreter", 1
    import torch

    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def _tables(gpu: str) -> list[tuple[dict[str, Any], str]]:
    """What is known of class `gpu`, the user's tuning first, and where it comes from."""
    tables = []
    for path, source in ((tuned_path(), "tuned"), (SHIPPED, "shipped")):
        if path.exists() and gpu in (classes := _read(path)["classes"]):
            tables.append((classes[gpu], source))
    return tables


@lru_cache(maxsize=4096)
def fused_for(spec: QuantSpec, rows: int, n: int, k: int, gpu: str, sms: int) -> tuple[Config, str]:
    """The configuration of the fused product, and where it comes from."""
    for table, source in _tables(gpu):
        for key in entry_keys(spec, rows, n, k):
            if key in table["entries"]:
                config = Config.of(table["entries"][key])
                if fits(config, spec):
                    return config, source
    return heuristic(spec, rows, n, k, gpu, sms), "rule"


@lru_cache(maxsize=4096)
def choose_for(
    spec: QuantSpec, rows: int, n: int, k: int, gpu: str, sms: int
) -> tuple[Config | None, str]:
    """The configuration (None: dequantize and call cuBLAS) and where it comes from."""
    limits = [(t["cross_over_rows"], s) for t, s in _tables(gpu) if "cross_over_rows" in t]
    limit, source = limits[0] if limits else (CROSS_OVER_ROWS, "rule")
    if rows > limit:
        return None, f"{source}: above the cross-over"
    return fused_for(spec, rows, n, k, gpu, sms)


_tried: dict[tuple[int, int], Config] = {}  # by the shape of the weights


@contextmanager
def trying(table: dict[tuple[int, int], Config]) -> Iterator[None]:
    """Within, products with weights of the shapes in `table` run as it says, for any rows of x."""
    _tried.update(table)
    try:
        yield
    finally:
        _tried.clear()


def choose(spec: QuantSpec, rows: int, n: int, k: int, device: "torch.device") -> Config | None:
    """The configuration for `rows` of x and weights `[n, k]` on `device`; None: dequantize."""
    if (n, k) in _tried:
        return _tried[n, k]
    gpu, sms = gpu_class(device)
    return choose_for(spec, rows, n, k, gpu, sms)[0]
