"""The main job on a small install: no torch, triton or transformers can be imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kbit_kernels import cpu
from tests.kbit.speaker import write_model

# None in sys.modules makes an import fail as if the package were not installed
SMALL = """
import sys
for package in ("torch", "triton", "transformers", "matplotlib", "scipy", "bitsandbytes"):
    sys.modules[package] = None
from kbit.cli.main import main
main(sys.argv[1:])
"""


def kbit(*arguments: object, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", SMALL, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not cpu.available()[0], reason="the native library is not built")
def test_quantize_inspect_generate_chat_and_eval(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model with a space")
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 20)
    out = tmp_path / "four bits"

    kbit("quantize", model, "--bits", 4, "-o", out)
    kbit("verify", out)
    assert json.loads(kbit("inspect", out, "--json"))["bits_per_param"] < 16
    told = json.loads(kbit("generate", out, "-p", "It was", "--max-tokens", 8, "--json"))
    assert told["backend"] == "native"
    assert told["samples"][0]["tokens"] > 0
    assert kbit("chat", out, "--max-tokens", 4, stdin="hello\n").strip()
    scores = json.loads(kbit("eval", out, "--text", text, "--against", model, "--json"))
    assert scores["kl_mean"] > 0
    assert scores["perplexity"] > 1
    assert "pip install 'kbit[torch]'" in kbit("doctor")


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SMALL, "generate", model, "-p", "a", "--backend", "torch"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "kbit[torch]" in done.stderr
    assert done.stderr.count("\n") == 1
