"""The commands quantize, inspect and verify as a user meets them: status, one line, files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kbit
from kbit.cli.main import main
from kbit.cli.quantize import quantize
from kbit.quantize.progress import Bar, Lines
from tests.kbit.checkpoint.build import llama_config, llama_tensors, write_llama


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_llama(tmp_path / "my model")


def _run(*arguments: str) -> int:
    """Exit status of a command."""
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_quantize_inspect_verify(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("quantize", str(model), "--bits", "3", "--block", "32") == 0
    out = capsys.readouterr().out
    assert str(model.parent / "my model-nf3-b32") in out
    assert "15 tensors quantized (nf3-b32; rtn), 5 kept as they were (5 norm" in out
    assert "bits per parameter" in out
    assert "peak memory" in out

    assert _run("inspect", "my model-nf3-b32", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    tensors = llama_tensors(llama_config())
    assert report["parameters"] == sum(w.size for w in tensors.values())
    assert report["bytes"] == sum(tensor["bytes"] for tensor in report["tensors"])
    assert report["bits_per_param"] == 8 * report["bytes"] / report["parameters"]
    found = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert found.keys() == tensors.keys()
    up = found["model.layers.0.mlp.up_proj.weight"]
    # 80 rows of 48 columns: two units of 32 codes in 3 bits, two scales of 2 bytes
    assert up["bytes"] == 80 * (2 * 12 + 2 * 2)
    assert (up["shape"], up["spec"], up["dtype"]) == ([80, 48], "nf3-b32", None)
    norm = found["model.norm.weight"]
    assert (norm["bytes"], norm["spec"], norm["dtype"]) == (96, None, "BF16")

    assert _run("inspect", "my model-nf3-b32") == 0
    table = capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj.weight" in table
    assert "80 x 48" in table
    assert f"total: 20 tensors, {report['parameters']:,} parameters, {report['bytes']:,}" in table

    assert _run("verify", "my model-nf3-b32") == 0
    assert "20 tensors" in capsys.readouterr().out


def test_inspect_of_a_plain_checkpoint(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("inspect", str(model), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bits_per_param"] == 16
    assert {tensor["spec"] for tensor in report["tensors"]} == {None}
    assert _run("inspect", str(model)) == 0
    assert "BF16: 20 tensors" in capsys.readouterr().out


def test_json_of_quantize(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("quantize", str(model), "--json", "-o", "out") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["path"] == str(model.parent / "out")
    assert result["kept_roles"] == {"norm": 5}
    assert _run("inspect", "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    for key in ("bytes", "parameters", "bits_per_param"):
        assert report[key] == result[key]


BAD_COMMANDS: list[tuple[str, str]] = [
    ("quantize nowhere/at-all.gguf", "nowhere/at-all.gguf"),
    ("quantize empty", "no config.json"),
    ("quantize model --bits 9", "bits is 9"),
    ("quantize model --bits 1", "bits is 1"),
    ("quantize model --block many", "--block is 'many'"),
    ("quantize model --block 0", "--block is '0'"),
    ("quantize model --block 48", "block is 48"),
    ("quantize model --dtype zf", "unknown data type 'zf'"),
    ("quantize model --recipe nothing.toml", "rule 1 matches nothing"),
    ("quantize model --recipe gone.toml", "cannot be read"),
    ("quantize model -o there", "exists already"),
    ("quantize model -o file/out", "cannot be written"),
    ("quantize model -o /proc/out", "cannot be written"),
    ("quantize model --threads 0", "threads is 0"),
    ("quantize nan", "NaN"),
    ("quantize cut", "truncated"),
    ("inspect empty", "no config.json"),
    ("inspect cut", "truncated"),
    ("inspect future", "format version 7"),
    ("verify gone", "no such directory"),
    ("verify model", "no checksums"),
    ("verify flipped", "fails its checksum"),
    ("verify cut", "truncated"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("place")
    write_llama(base / "model")
    kbit.quantize(base / "model", base / "there")
    (base / "empty").mkdir()
    (base / "file").write_text("")
    (base / "nothing.toml").write_text("[[rules]]\ntensors = 'h.*'\nspec = 'keep'")
    for name in ("nan", "cut"):
        shutil.copytree(base / "model", base / name)
    for name in ("flipped", "future"):
        shutil.copytree(base / "there", base / name)
    raw = (base / "model" / "model.safetensors").read_bytes()
    (base / "cut" / "model.safetensors").write_bytes(raw[:-1])
    (base / "nan" / "model.safetensors").write_bytes(raw[:-2] + b"\xff\x7f")
    raw = (base / "flipped" / "model.safetensors").read_bytes()
    (base / "flipped" / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 4]))
    text = (base / "future" / "config.json").read_text()
    text = text.replace('"format_version": 1', '"format_version": 7')
    (base / "future" / "config.json").write_text(text)
    return base


@pytest.mark.parametrize(("command", "reason"), BAD_COMMANDS)
def test_bad_commands_end_in_one_line_and_status_2(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    reason: str,
) -> None:
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert _run(*command.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert reason in told.err
    assert told.err.count("\n") == 1
    assert "something went wrong inside" not in told.err
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_the_commands_import_nothing_heavy() -> None:
    """Help and refusals must not wait for torch; inspect and quantize never load it."""
    code = (
        "import sys, kbit.cli.quantize, kbit.cli.inspect, kbit.cli.verify\n"
        "assert not {'numpy', 'torch', 'rich.progress', 'kbit.quantize'} & set(sys.modules)\n"
        "import kbit.quantize.api, kbit.checkpoint.verify\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_option_says_its_default() -> None:
    import typer

    app = typer.Typer()
    app.command()(quantize)
    for option in typer.main.get_command(app).params:
        if option.param_type_name == "option" and option.name != "help":
            told = getattr(option, "show_default", None)
            flag = getattr(option, "is_flag", False)
            assert told or flag or option.default is not None, option.name


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(sys.stderr, every_s=0.0)
    lines.start(2_000_000, 0, "quantizing")
    lines.advance(1_000_000)
    lines.advance(1_000_000)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in told] == ["quantizing: 50%", "quantizing: 100%"]
    assert "MB/s" in told[0]
    assert "s left" in told[0]


def test_the_bar_shows_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(sys.stderr)
    bar.start(2_000_000, 500_000, "quantizing")
    bar.note("a [sentence]")
    bar.advance(1_500_000)
    assert bar._progress.finished
    bar.close()
    assert "a [sentence]" in capsys.readouterr().err
