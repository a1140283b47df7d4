"""The main job on a small install: no torch, triton or transformers can be imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kbit_kernels import cpu
from tests.kbit.checkpoint.gguf_build import tiny_model, write_gguf
from tests.kbit.speaker import write_model

# None in sys.modules makes an import fail as if the package were not installed
SMALL = """
import sys
for package in ("torch", "triton", "transformers", "matplotlib", "scipy", "bitsandbytes"):
    sys.modules[package] = None
from kbit.cli.main import main
"""
MAIN = "main(sys.argv[1:])"
NO_LIBRARY = """
from pathlib import Path
from kbit_kernels.cpu import library
library.LIBRARY = Path("nowhere") / "_native.so"
"""


def call(code: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def kbit(*arguments: object, stdin: str = "") -> str:
    done = call(SMALL + MAIN, *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not cpu.available()[0], reason="the native library is not built")
def test_quantize_inspect_generate_chat_and_eval(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model with a space")
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 20)
    out = tmp_path / "four bits"

    pulled = tmp_path / "pulled"
    write_gguf(tmp_path / "a.gguf", tiny_model("llama"))
    kbit("pull", tmp_path / "a.gguf", "-o", pulled, "--cache-dir", tmp_path / "cache")
    assert (pulled / "model.safetensors").exists()
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


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("generate", "MODEL", "-p", "a", "--backend", "torch"), "kbit[torch]"),
        (("generate", "MODEL", "-p", "a", "--device", "cuda"), "kbit[torch]"),
        (("eval", "MODEL", "--text", "TEXT", "--backend", "torch"), "kbit[torch]"),
        (("tune",), "kbit[gpu]"),
        (("fit", "STUDY"), "kbit[study]"),
        (("plot", "STUDY"), "kbit[study]"),
        (("report", "STUDY"), "kbit[study]"),
        (
            ("family", "train", "--preset", "pocket", "--text", "TEXT", "--out", "OUT"),
            "kbit[torch]",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_missing_extra_is_named(tmp_path: Path, command: tuple[str, ...], extra: str) -> None:
    text, study = tmp_path / "text.txt", tmp_path / "study.toml"
    text.write_text("It was a bright cold day in April. " * 20)
    study.write_text("")
    places = {"TEXT": text, "STUDY": study, "OUT": tmp_path / "out"}
    if "MODEL" in command:
        places["MODEL"] = write_model(tmp_path / "model")
    done = call(SMALL + MAIN, *(places.get(word, word) for word in command))
    assert done.returncode == 2, done.stdout
    assert extra in done.stderr
    assert done.stderr.count("\n") == 1


def test_doctor_says_what_a_missing_library_costs(tmp_path: Path) -> None:
    done = call(SMALL + NO_LIBRARY + MAIN, "doctor")
    assert done.returncode == 0, done.stderr
    assert "the native CPU library is not built" in done.stdout
    assert "many times slower" in done.stdout
    assert "nothing here can run a model" in done.stdout
    model = write_model(tmp_path / "model")
    done = call(SMALL + NO_LIBRARY + MAIN, "generate", model, "-p", "a")
    assert done.returncode == 2
    assert "the native CPU library is not built" in done.stderr
    assert done.stderr.count("\n") == 1
