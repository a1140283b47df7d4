"""A conversation over a pipe, and in a terminal with Ctrl-C."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kbit
from kbit.cli.chat import Conversation
from tests.kbit.cli.conftest import Ran
from tests.kbit.speaker import write_model

Run = Callable[..., Ran]
DEADLINE_S = 120  # only reached when something hangs
PATIENCE_S = 3  # with a key that has no effect
DEFAULTS = {"repetition_penalty": 1.1}  # of the command, which Model.chat does not share


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_conversation_keeps_its_history(run: Run, speaker: Path) -> None:
    model = kbit.load(speaker)
    first = model.chat([user("the day")], **DEFAULTS, max_tokens=6)
    talk = [user("the day"), {"role": "assistant", "content": first.text}, user("and?")]
    second = model.chat(talk, **DEFAULTS, max_tokens=6)
    told = run("chat", speaker, "--max-tokens", 6, stdin=b"the day\n\nand?\n")
    assert told.status == 0
    assert told.out == f"{first.text}\n{second.text}\n"
    fresh = model.chat([user("and?")], **DEFAULTS, max_tokens=6)
    assert fresh.text != second.text
    told = run(
        "chat", speaker, "--max-tokens", 6, stdin=b"the day\n/reset\nand?\n/exit\nnot said\n"
    )
    assert told.out == f"{first.text}\n{fresh.text}\n"
    assert "starts anew" in told.err


def test_system_and_help(run: Run, speaker: Path) -> None:
    model = kbit.load(speaker)
    system = {"role": "system", "content": "Be kind."}
    kind = model.chat([system, user("the day")], **DEFAULTS, max_tokens=6)
    assert kind.text != model.chat([user("the day")], **DEFAULTS, max_tokens=6).text
    told = run("chat", speaker, "--max-tokens", 6, "--system", "Be kind.", stdin=b"the day\n")
    assert told.out == kind.text + "\n"
    lines = b"/system\n/system Be kind.\n/system\nthe day\n/help\n/nope\n"
    told = run("chat", speaker, "--max-tokens", 6, stdin=lines)
    assert told.out == kind.text + "\n"
    assert "none of yours" in told.err
    assert "(system message: Be kind.)" in told.err
    assert "/reset" in told.err
    assert "/nope is no command" in told.err


def test_a_full_context_forgets_the_oldest_turns(speaker: Path) -> None:
    talk = Conversation(kbit.load(speaker), None, max_tokens=8, ignore_eos=True)
    for turn in range(12):
        said = "".join(talk.say(f"the clocks {turn}"))
        assert talk.messages[-1]["content"] == said
    assert len(talk.messages) < 24
    assert talk.messages[0]["role"] == "user"
    assert any("forgotten" in note for note in talk.notes())
    before = list(talk.messages)
    with pytest.raises(kbit.KbitError, match="context holds 96"):
        list(talk.say("the clocks " * 90))
    assert talk.messages == before


def test_without_a_chat_template(run: Run, speaker: Path, tmp_path: Path) -> None:
    for file in speaker.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    told = run("chat", tmp_path, stdin=b"hello\n")
    assert told.status == 2
    assert "has no chat template" in told.err
    assert told.err.count("\n") == 1


class Terminal:
    """`kbit` in a pseudo-terminal, as a person sits before it."""

    def __init__(self, *arguments: object) -> None:
        self._fd, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kbit.cli.main", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_until(self, wanted: str) -> None:
        """Ctrl-C until `wanted` comes: one between a prompt and readline's wait for a key has no
        effect, neither here nor for a person, who presses it again."""
        for _ in range(DEADLINE_S // PATIENCE_S):
            self.interrupt()
            while select.select([self._fd], [], [], PATIENCE_S)[0]:
                self.read_more()
                if wanted in self.seen:
                    self.read_until(wanted)
                    return
        pytest.fail(f"Ctrl-C has no effect; seen: {self.seen[-500:]!r}")

    def read_more(self) -> None:
        ready, _, _ = select.select([self._fd], [], [], DEADLINE_S)
        assert ready, f"nothing comes any more; seen: {self.seen[-500:]!r}"
        try:
            data = os.read(self._fd, 4096)
        except OSError:
            data = b""
        assert data, f"it ended; seen: {self.seen[-500:]!r}"
        self.seen += data.decode("utf-8", "replace")

    def read_until(self, wanted: str) -> str:
        """Everything up to `wanted`; what follows is kept for the next call."""
        while wanted not in self.seen:
            self.read_more()
        cut = self.seen.index(wanted) + len(wanted)
        found, self.seen = self.seen[:cut], self.seen[cut:]
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._fd)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for an answer that takes a while."""
    return write_model(tmp_path_factory.mktemp("talker"), context=50_000)


ENDLESS = ("--max-tokens", 40_000, "--logit-bias", "1=-1000")  # 1 is the end of sequence


def test_ctrl_c_stops_the_answer_and_not_the_program(talker: Path) -> None:
    terminal = Terminal("chat", talker, *ENDLESS)
    try:
        terminal.read_until("> ")
        terminal.type("the day\n")
        terminal.read_until("the day")  # the terminal's echo
        while len(terminal.seen.strip()) < 20:
            terminal.read_more()
        terminal.interrupt()
        terminal.read_until("(stopped)")
        terminal.read_until("> ")
        terminal.interrupt_until("(Ctrl-D or /exit leaves)")
        terminal.read_until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(DEADLINE_S) == 0
    finally:
        terminal.close()


def test_ctrl_c_ends_generate_with_a_sentence(talker: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "kbit.cli.main",
            "generate",
            talker,
            "-p",
            "the",
            *map(str, ENDLESS),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert told.decode() == "kbit: interrupted\n"
