"""The study's commands from end to end on the tiny family, and how they fail."""

import json
import signal
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from kbit.errors import KbitError
from kbit_scaling import commands, results
from kbit_scaling.family import command

from .conftest import Tiny
from .test_study import write

GRID = '[[grid]]\ndtypes = ["int", "nf"]\nbits = [3, 4, 8]\n'
TASK = '[[tasks]]\nname = "cloze"\npath = "{family}/text.txt"\nlimit = 5\n'


def run(function: object, *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(function)  # type: ignore[type-var]
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def swept(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has been run."""
    folder = tmp_path_factory.mktemp("study")
    study = write(folder, tiny, GRID)
    options = ("--executor", "inline", "--cache", folder / "cache")
    done = run(commands.sweep, study, *options)
    assert done.exit_code == 0, done.output
    assert "14 cells recorded" in done.stdout
    assert "0 recorded, 14 to run" in done.stderr
    assert "reference logits: at most" in done.stderr
    again = run(commands.sweep, study, *options)
    assert "14 recorded, 0 to run" in again.stderr
    return study


def test_fit_prints_laws_and_writes_them(swept: Path, tmp_path: Path) -> None:
    done = run(results.fit, swept, "--replicates", 3, "--laws", "kumar,ouyang", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "H2 kumar" in done.stdout
    laws = json.loads((tmp_path / "fits.json").read_text())["laws"]
    assert [law["target"] for law in laws] == ["loss", "divergence"] * 2
    assert [r["law"] for r in laws[0]["laws"]] == ["kumar", "ouyang"]
    as_json = run(results.fit, swept, "--replicates", 3, "--laws", "kumar,ouyang", "--json")
    assert json.loads(as_json.stdout)["laws"] == laws


def test_plot_report_and_advise(swept: Path, tmp_path: Path) -> None:
    records = swept.parent / "records.jsonl"
    drawn = run(results.plot, records, "--out", tmp_path / "f", "--replicates", 0, "--kind", "png")
    assert drawn.exit_code == 0, drawn.output
    paths = [Path(line) for line in drawn.stdout.splitlines()]
    assert len(paths) > 4
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    page = tmp_path / "report.html"
    told = tmp_path / "findings.txt"
    told.write_text("It is so.\n\nAnd so.")
    made = run(results.report, swept, "--out", page, "--replicates", 0, "--findings", told)
    assert made.exit_code == 0, made.output
    assert "<p>It is so.</p><p>And so.</p>" in page.read_text()
    advice = run(results.advise, swept, "--memory", "1MB", "--overhead", "10kB", "--context", 64)
    assert advice.exit_code == 0, advice.output
    assert "1. tiny-s" in advice.stdout
    assert "second place is" in advice.stdout


def test_plan_says_and_does_nothing(tiny: Tiny, tmp_path: Path) -> None:
    study = write(tmp_path, tiny, GRID)
    done = run(commands.sweep, study, "--plan", "--cache", tmp_path / "cache")
    assert done.exit_code == 0
    assert "14 to run" in done.stderr
    assert not (tmp_path / "records.jsonl").exists()


def test_a_device_that_is_not_there_is_told_before_anything_runs(
    tiny: Tiny, tmp_path: Path
) -> None:
    study = write(tmp_path, tiny, GRID)
    done = run(commands.sweep, study, "--device", "cuda:99", "--cache", tmp_path / "cache")
    assert isinstance(done.exception, KbitError)
    assert str(done.exception).startswith("--device cuda:99: torch ")
    assert not (tmp_path / "records.jsonl").exists()


def test_all_cells_failing_is_an_error(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*unused: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr("kbit_scaling.run._compute", broken)
    study = write(tmp_path, tiny, GRID)
    done = run(commands.sweep, study, "--executor", "inline", "--cache", tmp_path / "cache")
    assert isinstance(done.exception, KbitError)
    assert "all cells failed" in str(done.exception)
    assert "failed 14 x: MemoryError: none left" in done.stderr
    fitted = run(results.fit, study)
    assert "none left" in str(fitted.exception)


def test_a_task_is_one_more_metric(tiny: Tiny, tmp_path: Path) -> None:
    task = TASK.replace("{family}", str(tiny.folder))
    grid = '[[grid]]\nmodels = ["*s0*"]\nbits = [4]\nmetrics = ["cloze"]\n'
    study = write(tmp_path, tiny, task + grid)
    done = run(commands.sweep, study, "--executor", "inline", "--cache", tmp_path / "cache")
    assert "2 cells recorded" in done.stdout, done.output
    for line in (tmp_path / "records.jsonl").read_text().splitlines():
        assert len(json.loads(line)["items"]["correct"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.toml",), "cannot be read"),
        (("none.jsonl",), "no records yet"),
        (("none.csv",), "cannot be read"),
    ],
)
def test_fit_without_records_says_what_to_do(arguments: tuple[str, ...], message: str) -> None:
    assert message in str(run(results.fit, *arguments).exception)


def test_half_a_record_is_named_and_measured_again(swept: Path, tiny: Tiny, tmp_path: Path) -> None:
    study = write(tmp_path, tiny, GRID)
    whole = (swept.parent / "records.jsonl").read_bytes()
    records = tmp_path / "records.jsonl"
    records.write_bytes(whole[:-300])
    fitted = run(results.fit, study, "--replicates", 0, "--laws", "offset")
    assert "ends in half a record, which is left out" in fitted.stderr
    done = run(commands.sweep, study, "--executor", "inline", "--cache", swept.parent / "cache")
    assert "13 recorded, 1 to run" in done.stderr
    assert "ends in half a record" in done.stderr
    assert "14 cells recorded" in done.stdout
    records.write_bytes(b"")
    assert "no records yet" in str(run(results.fit, study).exception)


def test_a_text_that_is_not_there_stops_the_sweep_before_it_records(
    tiny: Tiny, tmp_path: Path
) -> None:
    study = write(tmp_path, tiny, GRID)
    study.write_text(study.read_text().replace("text.txt", "nothing.txt"))
    done = run(commands.sweep, study, "--cache", tmp_path / "cache")
    assert "nothing.txt: the text 'words' cannot be read" in str(done.exception)
    assert not (tmp_path / "records.jsonl").exists()


def test_sigterm_says_so_and_gives_the_status_of_a_shell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        commands._terminated(signal.SIGTERM, None)
    assert ended.value.code == 143
    assert "the same command goes on" in capsys.readouterr().err


def test_bad_options_are_refused(swept: Path) -> None:
    for arguments, message in (
        ((results.plot, swept, "--kind", "bmp"), "svg, png or pdf"),
        ((results.fit, swept, "--laws", "newton"), "known laws"),
        ((results.fit, swept, "--groups", "fp-b32"), "the study has: int-b64, nf-b64"),
        ((commands.sweep, swept, "--path", "shared"), "NAME=DIR"),
        ((results.advise, swept, "--memory", "1kB"), "nothing in the study fits"),
        ((results.advise, swept, "--memory", "1GB", "--text", "x"), "the study has: words"),
    ):
        assert message in str(run(*arguments).exception), message


def test_family_train_from_the_command_line(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} was a number and {i * 7 % 911} too.\n" for i in range(60000)))
    done = CliRunner().invoke(
        command.family,
        ["train", "--out", str(tmp_path / "f"), "--text", str(text), "--sizes", "s0",
         "--tokens", "4096", "--threads", "1"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "tokens-4096" in done.stdout
    assert (tmp_path / "f/s0/tokens-4096/model.safetensors").exists()
