"""Write README's tables from the files under benchmarks/results/.

    python benchmarks/readme.py            rewrite README.md
    python benchmarks/readme.py --check    exit 1 if README.md is not what the results say

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WIDTHS = (8, 7, 6, 5, 4, 3, 2)
TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    TABLES[function.__name__.replace("_", "-")] = function
    return function


def load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return data


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(data: dict[str, Any]) -> str:
    """One line that says where the numbers come from."""
    machine = data["environment"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores; revision {machine['git_revision']},"
        f" {machine['date']}; `{data['command']}`"
    )


@table
def quality() -> str:
    parts = []
    for path in sorted(RESULTS.glob("quality-*.json")):
        data = load(path.stem)
        base = data["unquantized"]
        rows = [
            [
                "unquantized",
                f"{8 * data['source_bytes'] / data['parameters']:.2f}",
                f"{data['source_bytes'] / 1e6:.1f}",
                f"{base['bits_per_byte']:.4f} ± {base['bits_per_byte_stderr']:.4f}",
                "",
                "",
            ]
        ]
        for row in data["rows"]:
            rows.append(
                [
                    f"`{row['spec']}`",
                    f"{row['bits_per_param']:.2f}",
                    f"{row['model_bytes'] / 1e6:.1f}",
                    f"{row['bits_per_byte']:.4f} ± {row['bits_per_byte_stderr']:.4f}",
                    f"{row['kl_mean']:.5f} ± {row['kl_mean_stderr']:.5f}",
                    f"{100 * row['top1_agreement']:.2f} %",
                ]
            )
        header = ["spec", "bits per parameter", "MB", "bits per byte", "KL, nats", "same top-1"]
        tokens = f"{base['tokens']:,} tokens of {data['text']}"
        title = f"**{data['model']}**, {tokens}"
        parts.append(f"{title}\n\n{markdown(header, rows)}\n\n<sub>{source(data)}</sub>")
    return "\n\n".join(parts)


def cpu_machines() -> list[dict[str, Any]]:
    """The results of benchmarks/decode.py and its neighbours, a file a machine."""
    return [load(path.stem) for path in sorted(RESULTS.glob("*-cores.json"))]


@table
def plot() -> str:
    """The pictures that benchmarks/plot.py draws from the same results."""
    return "\n\n".join(
        f"![tokens per second over bits per parameter]({path.relative_to(ROOT).as_posix()})"
        for path in sorted(RESULTS.glob("*-cores.svg"))
    )


KINDS = {"decode": "decode_tokens_per_second", "prompt": "prompt_tokens_per_second"}


def over_llama_cpp(mine: dict[str, Any], rows: list[dict[str, Any]], key: str) -> str:
    """kbit's rate over that of llama.cpp's fastest type of the same or larger size."""
    large = [r for r in rows if r["model_bytes"] >= mine["model_bytes"]]
    best = max(large, key=lambda r: float(r[key]))
    return f"{mine[key]:.0f} / {best[key]:.0f} ({best['type']}) = {mine[key] / best[key]:.1f}"


@table
def beside() -> str:
    """kbit over llama.cpp, a column a width."""
    parts = []
    for results in cpu_machines():
        rows = []
        for name, data in results.items():
            if "prompt" not in data:
                continue
            kbit = {r["bits"]: r for r in data["rows"] if r.get("default")}
            theirs = [r for r in data["rows"] if r["engine"] == "llama.cpp"]
            for kind, key in KINDS.items():
                cells = [over_llama_cpp(kbit[b], theirs, key) if b in kbit else "" for b in WIDTHS]
                rows.append([f"{name}, {kind}", *cells])
                cpu = data["environment"]["cpu"]
        if rows:
            header = [f"{cpu}, tokens/s", *(f"{bits} bits" for bits in WIDTHS)]
            parts.append(markdown(header, rows))
    return "\n\n".join(parts)


@table
def context() -> str:
    """Longer contexts, kbit over llama.cpp with or without flash attention, the faster one."""
    parts = []
    for results in cpu_machines():
        data = results.get("context")
        if data is None:
            continue
        rows = []
        for kind, key in (("prompt", "prompt"), ("decode after it", "decode_after_prompt")):
            cells = []
            for at in dict.fromkeys(row["context"] for row in data["rows"]):
                rates = [r[f"{key}_tokens_per_second"] for r in data["rows"] if r["context"] == at]
                mine, its = rates[0], max(rates[1:])
                cells.append(f"{mine:.0f} / {its:.0f} = {mine / its:.1f}")
            rows.append([kind, *cells])
        contexts = dict.fromkeys(f"{row['context']} tokens" for row in data["rows"])
        title = f"{data['bits']} bits / {data['type']}, tokens/s"
        parts.append(f"{markdown([title, *contexts], rows)}\n\n<sub>{source(data)}</sub>")
    return "\n\n".join(parts)


@table
def speed() -> str:
    parts = []
    for results in cpu_machines():
        for name, data in results.items():
            if "prompt" in data:
                parts.append(_speed_of(name, data))
    return "\n\n".join(parts)


def _speed_of(name: str, data: dict[str, Any]) -> str:
    rows = []
    for row in data["rows"]:
        mark = " (default)" if row.get("default") else ""
        share = f"{100 * row['bandwidth_share']:.0f} %" if "bandwidth_share" in row else ""
        rows.append(
            [
                f"{row['engine']}{mark}",
                row["type"],
                f"{row['bits_per_param']:.2f}" if "bits_per_param" in row else "",
                f"{row['model_bytes'] / 1e6:.0f}" if "model_bytes" in row else "",
                f"{row['decode_tokens_per_second']:.0f}",
                share,
                f"{row['prompt_tokens_per_second']:.0f}",
                f"{row['first_token_seconds']:.2f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
            ]
        )
    header = [
        "engine",
        "type",
        "bits per parameter",
        "MB",
        "decode, tokens/s",
        "of read bandwidth",
        f"prompt of {data['prompt']}, tokens/s",
        "first token, s",
        "peak memory, MB",
    ]
    title = f"{data['environment']['cpu']}: {name}, {data['threads']} threads, medians"
    content = f"{markdown(header, rows)}\n\n<sub>{source(data)}</sub>"
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


@table
def instruction_sets() -> str:
    """kbit over llama.cpp, by instruction set."""
    parts = []
    for results in cpu_machines():
        data = results.get("instruction sets")
        if data is None:
            continue
        rows = []
        for isa in dict.fromkeys(row["isa"] for row in data["rows"]):
            at = [r for r in data["rows"] if r["isa"] == isa]
            theirs = [r for r in at if r["engine"] == "llama.cpp"]
            kbit = [r for r in at if r["engine"] != "llama.cpp"]
            for kind, key in KINDS.items():
                rows.append([f"{isa}, {kind}", *(over_llama_cpp(r, theirs, key) for r in kbit)])
        widths = dict.fromkeys(f"{row['bits']} bits" for row in data["rows"])
        header = ["tokens/s", *widths]
        parts.append(f"{markdown(header, rows)}\n\n<sub>{source(data)}</sub>")
    return "\n\n".join(parts)


@table
def start() -> str:
    parts = []
    for results in cpu_machines():
        if "start" not in results:
            continue
        data = results["start"]
        install = data["install"]
        rows = [
            ["install without torch (limit 200 MB, 60 s)",
             f"{install['bytes'] / 1e6:.0f} MB, {install['seconds']:.0f} s"],
            ["`kbit --help`", f"{data['help_seconds']:.2f} s"],
        ]  # fmt: skip
        for model in data["models"]:
            name = f"{model['model_bytes'] / 1e6:.0f} MB"
            second = model["two_processes"][0]
            rows += [
                [f"first token of a cold process, {name}", f"{model['first_token_seconds']:.2f} s"],
                [f"peak memory above the model's {name}",
                 f"{model['peak_above_model_bytes'] / 1e6:.0f} MB"],
                [f"its weights in each of two processes, {name}",
                 f"{second['Rss'] / 1e6:.0f} MB mapped, {second['Pss'] / 1e6:.0f} MB its share"],
            ]  # fmt: skip
        for row in results.get("quantize", {}).get("rows", []):
            rate = f"{row['input_mb_per_s']:.0f} MB/s of input"
            peak = f"peak {row['peak_bytes'] / 1e6:.0f} MB"
            rows.append([f"`kbit quantize` {row['model']} to `{row['spec']}`", f"{rate}, {peak}"])
        parts.append(f"{markdown(['', ''], rows)}\n\n<sub>{source(data)}</sub>")
    return "\n\n".join(parts)


@table
def gpu() -> str:
    """The results of benchmarks/gpu.py, a file a class of GPU; says so where there is none."""
    parts = []
    for path in sorted(RESULTS.glob("gpu-sm_*.json")):
        data = load(path.stem)
        base = data["baseline"]
        title = f"**{base['gpu']}**, {base['copy_gb_s']:.0f} GB/s of copying; weights 8192 x 8192"
        at = [r for r in data["sweep"] if r["shape"] == [8192, 8192] and "us" in r]
        tables = [by_rows(at), by_type(at)]
        if data.get("decode"):
            tables.append(decoding(data["decode"]))
        parts.append("\n\n".join([title, *tables, f"<sub>{source(data)}</sub>"]))
    if not parts:
        return (
            "No speed stands here, because none has been measured yet: `python benchmarks/gpu.py` "
            "does that, unattended, in one command, and `python benchmarks/readme.py` puts its "
            "table here."
        )
    return "\n\n".join(parts)


def by_rows(at: list[dict[str, Any]]) -> str:
    """Integers and peers over the rows of x."""
    counts = sorted({r["rows"] for r in at})
    names = dict.fromkeys(
        r.get("spec") or r["peer"] for r in at if r.get("spec", "int").startswith("int")
    )
    rows = []
    for name in names:
        of = {r["rows"]: r for r in at if name == (r.get("spec") or r["peer"])}
        share = of.get(1, {}).get("percent_of_copy")
        rows.append(
            [name, f"{of[1]['us']:.1f}" if 1 in of else "",
             "" if share is None else f"{share:.0f} %",
             *(f"{of[m]['x_cublas']:.2f}" if m in of else "" for m in counts)]
        )  # fmt: skip
    header = ["", "us, M = 1", "of copy bandwidth", "x cuBLAS fp16, M = 1", *map(str, counts[1:])]
    return markdown(header, rows)


def by_type(at: list[dict[str, Any]]) -> str:
    """Every data type over the widths, one and 16 rows of x."""
    found = {}
    for row in at:
        match = re.match(r"(int|uint|nf|fp)([2-8])", row.get("spec", ""))
        if match:
            found[row["rows"], match[1], match[2]] = row["us"]
    widths = sorted({bits for _, _, bits in found}, reverse=True)
    rows = [
        [f"`{name}`", str(count), *(f"{found[count, name, bits]:.1f}" for bits in widths)]
        for name in ("int", "uint", "nf", "fp")
        for count in (1, 16)
    ]
    return markdown(["us at bits", "M", *widths], rows)


def decoding(found: list[dict[str, Any]]) -> str:
    """Tokens per second, a column for the executor's loop and one for the captured step."""
    rows = [
        [r["spec"], str(r["batch"]), r["attention"], f"{r['tokens_per_s']:.0f}",
         f"{r['step_tokens_per_s']:.0f}", f"{r['percent_of_byte_roofline']:.0f} %"]
        for r in found
    ]  # fmt: skip
    header = [
        "Llama-3-8B shapes", "batch", "attention", "tokens/s", "in the step",
        "of the byte roofline",
    ]  # fmt: skip
    return markdown(header, rows)


def render(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = render(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            sys.exit("README.md's tables are not those of benchmarks/results; run this script")
    elif before != after:
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
