"""The only way in which the tests fork, and the only way in which they run a program.

A child gets its own session and a watchdog that dumps its stacks, and ends with ``os._exit``.  A program is killed
together with every process that it started.  Both return a whole result: what the function returned, or how it failed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

TIMEOUT = 30


class ChildFailedError(AssertionError):
    """A forked child raised, hung, or died, and did not return."""


@contextlib.contextmanager
def forks_with_threads() -> Iterator[None]:
    """Python 3.12 warns about a fork with threads; the virtual cards of the tests are such threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        yield


def fork() -> int:
    """``os.fork()``, without the warning."""
    with forks_with_threads():
        return os.fork()


def in_child(function: Callable[..., Any], *arguments: Any, fork: Callable[[], int] = fork) -> Any:
    """Call ``function(*arguments)`` in a forked child.

    :param fork: how to fork.
    :return: what the function returned.
    :raises ChildFailedError: it raised, died, or took longer than 30 s; its traceback is in the text or on stderr.
    """
    return wait_for(start(function, *arguments, fork=fork))


def start(function: Callable[..., Any], *arguments: Any, fork: Callable[[], int] = fork) -> tuple[int, int]:
    """Start ``function(*arguments)`` in a forked child, for :func:`wait_for`."""
    read_end, write_end = os.pipe()
    pid = fork()
    if pid == 0:
        _be_a_child(write_end, function, arguments)
    os.close(write_end)
    return pid, read_end


def _be_a_child(write_end: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    status = 70
    try:
        with contextlib.suppress(OSError):
            os.setsid()
        # Not dump_traceback_later: its thread holds a lock, which would stay locked in a grandchild.
        faulthandler.register(signal.SIGALRM, file=sys.__stderr__, all_threads=True, chain=True)
        signal.alarm(TIMEOUT)
        try:
            outcome = (True, function(*arguments))
        except BaseException:
            outcome = (False, traceback.format_exc())
        with open(write_end, "wb", closefd=False) as pipe:
            pickle.dump(outcome, pipe)
        status = 0
    finally:
        os._exit(status)


def wait_for(child: tuple[int, int]) -> Any:
    """The result of what :func:`start` started."""
    pid, read_end = child
    with open(read_end, "rb") as pipe:
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not data:
        raise ChildFailedError(f"the child said nothing and ended with status {status}")
    returned, value = pickle.loads(data)
    if not returned:
        raise ChildFailedError(value)
    assert status == 0
    return value


def in_program(
    function: Callable[..., Any],
    *arguments: str,
    env: Optional[dict[str, str]] = None,
    timeout: float = 2 * TIMEOUT,
    prefix: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Call ``function(*arguments)`` as the main function of a new Python program, without pytest or other threads.

    :param function: of a test module; the program imports it.
    :param prefix: a command that runs the program.
    """
    file = Path(sys.modules[function.__module__].__file__ or "").resolve()
    command = [*prefix, sys.executable, "-X", "faulthandler", __file__, str(file), function.__name__, *arguments]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        output, errors = process.communicate(timeout=5)
        raise ChildFailedError(f"{function.__name__} did not end in {timeout} s:\n{output}\n{errors}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


if __name__ == "__main__":
    path, name = sys.argv[1:3]
    sys.path[:0] = [str(Path(path).parent), str(Path(__file__).parent)]
    runpy.run_path(path)[name](*sys.argv[3:])
