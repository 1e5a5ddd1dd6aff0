"""Forks that run none of Python's at-fork hooks: fork(2) from C code, and clone(2) without libc."""

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
    """Let no other thread wait for the GIL: a child in which no hook ran would wait for that thread."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        time.sleep(0.005)  # the threads that wait get it
        yield
    finally:
        sys.setswitchinterval(interval)


def c_fork() -> int:
    """fork(2) from C: no at-fork hook of Python runs."""
    with undisturbed():
        return int(ctypes.PyDLL(None).fork())


def raw_clone() -> int:
    """clone(2) itself, for a program that bypasses libc: not even pthread_atfork handlers run."""
    with undisturbed():
        return int(ctypes.PyDLL(None).syscall(SYS_CLONE, SIGCHLD, 0, 0, 0, 0))
