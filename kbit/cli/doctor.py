"""`kbit doctor`: what is installed here, what will run, and why the rest won't."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli import options

if TYPE_CHECKING:
    from kbit.models import Decoder

PACKAGES = (
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "gguf",
    "torch",
    "triton",
)
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_vbmi",
    "avx512vbmi",
    "gfni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)
# The plainest decoder there is: an executor that can't run it can't run here at all.
PLAIN_LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="Say what would run this model.", show_default="a plain Llama"),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show versions, CPU features, GPU, and which backends are used, or why not."""
    report = examine(model)
    print(json.dumps(report) if as_json else _text(report))


def examine(model: str | None = None) -> dict[str, Any]:
    """The report as JSON values."""
    from importlib.metadata import PackageNotFoundError, version

    from kbit import __version__
    from kbit.hub import cache_directory

    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    executors = {device: _executors(model, device) for device in ("cpu", "cuda")}
    gpu = _gpu()
    return {
        "kbit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": _cpu(),
        "gpu": gpu,
        "tuning": _tuning(gpu),
        "kernels": _kernels(),
        "model": model,
        "executors": executors,
        "cache": str(cache_directory()),
    }


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": name,
        "threads": usable,
        "features": [f for f in FEATURES if f in flags],
        "memory_bytes": memory,
    }


def _gpu() -> dict[str, Any]:
    """name, memory_bytes and capability (sm_90, gfx942), or why there is none."""
    if find_spec("torch") is None:
        return {"available": False, "reason": "torch is not installed (pip install 'kbit[gpu]')"}
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no CUDA device is seen" if built else f"torch {torch.__version__} is a CPU build"
        return {"available": False, "reason": reason}
    from kbit_kernels.triton.configs import gpu_class

    properties = torch.cuda.get_device_properties(0)
    return {
        "available": True,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": gpu_class(torch.device("cuda", 0))[0],
    }


def _tuning(gpu: dict[str, Any]) -> dict[str, int] | None:
    """The tables of kernel configurations: path -> entries for this GPU; None without a GPU."""
    from kbit_kernels.triton.configs import sources

    return sources(gpu["capability"]) if gpu["available"] else None


def _kernels() -> list[dict[str, Any]]:
    """The backends of kbit_kernels: whether each is used, and why or why not."""
    import kbit_kernels.triton
    from kbit_kernels.ops import backends

    found = {**backends(), "triton": kbit_kernels.triton.available()}
    return [{"name": n, "available": able, "reason": why} for n, (able, why) in found.items()]


def _executors(model: str | None, device: str) -> list[dict[str, Any]]:
    """The executors for one device, best first; the first available one is what auto takes."""
    from kbit.engine.executor import backend_support

    support = backend_support(_decoder(model), device)
    chosen = next((name for name, (able, _) in support.items() if able), None)
    return [
        {"name": n, "available": able, "used": n == chosen, "reason": why}
        for n, (able, why) in support.items()
    ]


def _decoder(model: str | None) -> Decoder:
    from kbit.models import describe

    if model is None:
        return describe(PLAIN_LLAMA)
    from kbit.checkpoint.reader import open_checkpoint
    from kbit.hub import resolve
    from kbit.models import describe_checkpoint

    return describe_checkpoint(open_checkpoint(resolve(model)))


def _text(report: dict[str, Any]) -> str:
    cpu, gpu = report["cpu"], report["gpu"]
    packages = ", ".join(f"{n} {v or 'absent'}" for n, v in report["packages"].items())
    card = gpu.get("reason")
    if gpu["available"]:
        card = f"{gpu['name']}, {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
    lines = [
        f"kbit      {report['kbit']}, Python {report['python']}, {report['platform']}",
        f"packages  {packages}",
        f"CPU       {cpu['name']}, {cpu['threads']} threads, {cpu['memory_bytes'] / 2**30:.1f} GiB",
        f"          {' '.join(cpu['features']) or 'none of the features that kbit looks for'}",
        f"GPU       {card}",
        *_tuning_lines(report["tuning"]),
        f"cache     {report['cache']}",
        "",
        "kernels (quantize, dequantize, linear)",
    ]
    for kernel in report["kernels"]:
        lines.append(_line(kernel["name"], "available" if kernel["available"] else "-", kernel))
    of = f" of {report['model']}" if report["model"] else ""
    for device, executors in report["executors"].items():
        lines += ["", f"executors{of} on {device}"]
        for e in executors:
            state = "used" if e["used"] else "available" if e["available"] else "-"
            lines.append(_line(e["name"], state, e))
    if not any(e["used"] for e in report["executors"]["cpu"]):
        lines += [
            "",
            f"nothing here can run a model; {sys.executable} -m pip install 'kbit[torch]'",
        ]
    return "\n".join(lines)


def _tuning_lines(tables: dict[str, int] | None) -> list[str]:
    if tables is None:
        return []
    found = "; ".join(f"{path}: {entries} for this GPU" for path, entries in tables.items())
    return [f"tuning    {found}; else a rule (kbit tune searches better ones)"]


def _line(name: str, state: str, entry: dict[str, Any]) -> str:
    return f"  {name:<10} {state:<10} {entry['reason']}"
