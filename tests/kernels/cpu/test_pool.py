"""The pool of threads where the system gives fewer than are asked for."""

import subprocess
import sys

SHORT_OF_MEMORY = """
import resource
from kbit_kernels import KbitError
from kbit_kernels.cpu.library import Pool

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    Pool(5000)
except KbitError as error:
    print(error)
print(Pool(3).threads)
"""


def test_fewer_threads_than_asked_for_is_an_error_that_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=True
    )
    refused, threads = done.stdout.splitlines()
    assert refused.startswith("only ")
    assert refused.endswith(" of 5000 threads could be started; ask for fewer")
    assert threads == "3"
    assert done.stderr == ""
