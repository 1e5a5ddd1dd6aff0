"""What can disturb a fork or a call: a signal handler that raises, and a user that can't start another process."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from types import FunctionType
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


before_3_10 = pytest.mark.skipif(
    sys.version_info < (3, 10),
    reason="CPython 3.9 runs signal handlers between any two bytecodes, also between a with block and its own exit",
)


def as_of_c(function: Any) -> Any:
    """A function that replaces a C function of pcsc_safe, and like it has no frame of its own in a traceback.

    pcsc_safe would take a frame of a test for a signal handler's.
    """
    return FunctionType(function.__code__, {**function.__globals__, "__name__": "pcsc_safe"})


class Alarm(Exception):  # noqa: N818  # not an error
    """What an application's signal handler raises."""


def raise_alarm(*_: Any) -> None:
    raise Alarm
