"""What compiled kernels would cost on GPUs that are not here, read from their machine code.

    python benchmarks/static_gpu.py [--chips sm_90,sm_80] [--widths 2,4] [--rows 1,16,64] [--plain]

For every chip, width and data type: lane-instructions per weight in the main loop, registers,
spills, the bound on resident warps, and the time of an 8192 x 8192 product predicted from bytes at
the chip's memory bandwidth and from its issue slots. Nothing here is a measurement. Results are
merged into results/static-gpu.json. --plain counts the decoders in plain Triton instead of PTX,
whose tables are read from global memory: what inline PTX is for.
"""

import argparse
import json
import time
import warnings
from dataclasses import asdict
from typing import Any

from kbit_kernels import QuantSpec
from kbit_kernels.tensor import expected_parts
from record import RESULTS, environment

N = K = 8192
# multiprocessors, boost clock GHz, memory TB/s, warps and KB of shared memory per multiprocessor;
# vendors' data sheets (for sm_90 the copy bandwidth that was measured on an H100, peers.md)
CHIPS = {
    "sm_80": ("A100", 108, 1.41, 1.94, 64, 164),
    "sm_86": ("A10/RTX 30", 84, 1.70, 0.76, 48, 100),
    "sm_89": ("RTX 4090", 128, 2.52, 1.01, 48, 100),
    "sm_90": ("H100", 132, 1.76, 3.00, 64, 228),
    "sm_100": ("B200", 148, 1.85, 8.00, 64, 228),
    "sm_120": ("RTX 5090", 170, 2.41, 1.79, 48, 100),
    "gfx942": ("MI300X", 304, 2.10, 5.30, 32, 64),
}
DTYPES = ("int", "uint", "fp", "nf")
GOALS = {2: 2.0, 3: 3.0, 4: 2.5, 5: 3.0, 6: 3.0, 7: 3.0, 8: 2.5}


def resident_warps(binary: Any, warps: int, limit: int, shared_bytes: int) -> int:
    """Warps that fit on a multiprocessor by registers (allocated in eights), memory and number."""
    per_program = -(-binary.registers // 8) * 8 * 32 * warps
    by_memory = shared_bytes // max(binary.launch_bytes, 1024)
    return min(65536 // per_program, by_memory, limit // warps) * warps


def measure(chip: str, spec: QuantSpec, rows: int, plain: bool) -> dict[str, Any]:
    """Compile one configuration and predict its time."""
    from kbit_kernels.triton import compiled, configs
    from kbit_kernels.triton.layout import scheme_of

    _, sms, clock_ghz, bandwidth_tb_s, limit, shared_kb = CHIPS[chip]
    sms_shipped = configs.SHIPPED_CLASSES[chip]
    config = configs.heuristic(spec, rows, N, K, chip, sms_shipped)
    binary = compiled.compile_linear(spec, chip, config, use_ptx=False if plain else None)
    stored = sum(
        dtype.itemsize * int(shape[0]) * (int(shape[1]) if len(shape) > 1 else 1)
        for dtype, shape in expected_parts(spec, (N, K)).values()
    )
    activations = 2 * rows * (N + K)
    row: dict[str, Any] = {
        "chip": chip,
        "spec": str(spec),
        "rows": rows,
        "decoder": "plain" if plain or chip in compiled.AMD else "ptx",
        "config": asdict(config),
        "registers": binary.registers,
        "spill_bytes": binary.spill_bytes,
        "weight_loads_128": binary.wide_loads,
        "weight_loads_narrower": binary.narrow_loads,
        "tensor_core": binary.tensor_core,
        "bytes_us": (stored + activations) / bandwidth_tb_s / 1e6,
    }
    if chip in compiled.NVIDIA:
        per_weight = compiled.instructions_per_weight(binary, config)
        passes = -(-rows // config.rows_x)
        # four schedulers issue one instruction for 32 lanes each clock
        slots = sms * 4 * 32 * clock_ghz * 1e9
        row |= {
            "instructions_per_weight": round(per_weight, 3),
            "loop": binary.loop,
            "exchanges": binary.exchanges,
            "resident_warps": resident_warps(
                binary, config.warps_n * config.warps_k, limit, shared_kb << 10
            ),
            "issue_us": passes * per_weight * N * K / slots * 1e6,
        }
        scheme = scheme_of(spec)
        if scheme.kind == "table" and not plain:
            # every lane reads its own bank: one clock for 32 lookups
            lookups = passes * N * K / scheme.unit
            row["lookup_us"] = lookups / (sms * 32 * clock_ghz * 1e9) * 1e6
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| chip | spec | M | decoder | instr/weight | registers | warps/SM | spills | bytes us |"
        " issue us | lookup us |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["chip"],
            row["spec"],
            row["rows"],
            row["decoder"],
            f"{row['instructions_per_weight']:.2f}" if "instructions_per_weight" in row else "",
            row["registers"],
            row.get("resident_warps", ""),
            row["spill_bytes"],
            f"{row['bytes_us']:.1f}",
            f"{row['issue_us']:.1f}" if "issue_us" in row else "",
            f"{row['lookup_us']:.1f}" if "lookup_us" in row else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compile, print, merge into the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--widths", default="2,3,4,5,6,7,8")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--rows", default="1")
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

    path = RESULTS / "static-gpu.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    for row in known:
        row.setdefault("decoder", "ptx" if row["chip"].startswith("sm") else "plain")
    found = {(row["chip"], row["spec"], row["rows"], row["decoder"]): row for row in known}
    started = time.monotonic()
    for chip in options.chips.split(","):
        for rows in map(int, options.rows.split(",")):
            for bits in map(int, options.widths.split(",")):
                for name in options.dtypes.split(","):
                    spec = QuantSpec(name, bits)
                    row = measure(chip, spec, rows, options.plain)
                    found[chip, str(spec), rows, row["decoder"]] = row
                    print(table([row]).splitlines()[-1], flush=True)
    order = sorted(found.values(), key=lambda r: (list(CHIPS).index(r["chip"]), r["rows"]))
    result = {
        "what": "compiled machine code, not measured",
        "shape": [N, K],
        "goals_sm_90_rows_1_int": GOALS,
        "environment": environment(),
        "rows": order,
    }
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(path)
    path.with_suffix(".md").write_text(table(order) + "\n")
    print(f"{len(found)} rows, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
