"""Forks of which no hook of Python's is told: by C code, and past libc."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
import time
from collections.abc import Iterator

SIGCHLD = 17
SYS_CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine())


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No other thread asks for the interpreter lock: a child in which no hook ran would wait for that thread."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        time.sleep(0.005)  # those that have asked get it
        yield
    finally:
        sys.setswitchinterval(interval)


def c_fork() -> int:
    """fork(2) from C: no at-fork hook of Python runs."""
    with undisturbed():
        return int(ctypes.PyDLL(None).fork())


def raw_clone() -> int:
    """clone(2) itself, as a program does that goes past libc: not even pthread_atfork handlers run."""
    with undisturbed():
        return int(ctypes.PyDLL(None).syscall(SYS_CLONE, SIGCHLD, 0, 0, 0, 0))
