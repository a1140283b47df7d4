"""Processes beside this one that end when they should: with it, and at once on Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool for as long as the block runs; an exception ends its processes in the middle of their
    work (a plain shutdown would first work off what is queued)."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, context, _begin)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all: only the parent speaks
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:  # a worker whose parent was killed would wait for ever
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
