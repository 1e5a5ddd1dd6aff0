"""What can disturb a fork or a call: a signal handler that raises, and a limit of processes or threads."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest


@contextlib.contextmanager
def no_new_process() -> Iterator[None]:
    """A user that has reached RLIMIT_NPROC; root has no limit, so root becomes another user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    privileged = os.geteuid() == 0
    if privileged:
        os.setresuid(54321, 54321, 0)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
        if privileged:
            os.setresuid(0, 0, 0)


@contextlib.contextmanager
def no_new_thread() -> Iterator[None]:
    """Python can start no thread, because no address space has room for its stack."""
    before = threading.stack_size(1 << 60)
    try:
        yield
    finally:
        threading.stack_size(before)


before_3_10 = pytest.mark.skipif(
    sys.version_info < (3, 10),
    reason="CPython 3.9 runs signal handlers between any two bytecodes, also between a with block and its own exit",
)


def as_of_c(function: Any) -> Any:
    """A function that replaces a C function of pcsc_safe, and like it has no frame of its own in a traceback.

    pcsc_safe would take a frame of a test for a signal handler's.
    """
    return FunctionType(function.__code__, {**function.__globals__, "__name__": "pcsc_safe"})


def signalled_while_it_starts(module: Any) -> list[subprocess.Popen[bytes]]:
    """Have this process get SIGTERM when the module has started a process, and Popen hasn't returned.

    :param module: uses nothing else of subprocess.
    :return: gets the process that it starts.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start_and_signal(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*arguments, **more))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    module.subprocess = SimpleNamespace(Popen=start_and_signal)
    return started


class RaisesInside:
    """A trace function that raises at the start of a line of a function, or of what it calls.

    :ivar left: the number of lines before; negative if it has raised.
    :param skipped: the names of functions whose lines don't count.
    """

    def __init__(self, function: Any, left: int, skipped: tuple[str, ...] = ()) -> None:
        self.left = left
        self._code, self._skipped = function.__code__, skipped
        self._frame: Any = None

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if frame.f_code is self._code and event == "call":
            self._frame = frame
        if self._frame is None or frame.f_code.co_name in self._skipped:
            return None
        if event == "return" and frame is self._frame:
            self._frame = None
            sys.settrace(None)
        elif event == "line":
            self.left -= 1
            if self.left == -1:
                raise Alarm
        return self


class Alarm(Exception):  # noqa: N818  # not an error
    """What an application's signal handler raises."""


def raise_alarm(*_: Any) -> None:
    raise Alarm
