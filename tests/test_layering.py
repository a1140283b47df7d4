"""Imports run kbit_scaling -> kbit -> kbit_kernels, never back; torch stays off the CPU path."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "kbit_kernels": ROOT / "kernels" / "kbit_kernels",
    "kbit": ROOT / "kbit",
    "kbit_scaling": ROOT / "scaling" / "kbit_scaling",
}
FORBIDDEN = {"kbit_kernels": {"kbit", "kbit_scaling"}, "kbit": {"kbit_scaling"}}


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_layers(package: str) -> None:
    files = list(SOURCES[package].rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FORBIDDEN[package], path


@pytest.mark.parametrize(
    "module",
    ["kbit", "kbit_kernels", "kbit.models", "kbit.engine.model", "kbit.quantize", "kbit.cli.main"],
)
def test_the_cpu_path_imports_neither_torch_nor_triton(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(*sorted({'torch', 'triton', 'transformers'} & loaded))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
