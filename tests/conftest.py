"""Fixtures for every suite."""

import signal
import threading
from pathlib import Path

import pytest

# a shell that starts the tests in the background leaves Ctrl-C ignored, and every command that a
# test interrupts would inherit that
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    and threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of texts and small models beside the checkout; a user's clone has none."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared (texts and small models), which is absent")
    return SHARED
