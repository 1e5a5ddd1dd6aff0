"""The descriptors of this process, and whether one is a dead socket."""

from __future__ import annotations

import contextlib
import os
import socket


def descriptors() -> dict[int, str]:
    """What each descriptor of this process refers to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def is_dead(number: int) -> bool:
    """Whether a socket can neither send nor receive."""
    duplicate = socket.socket(fileno=os.dup(number))
    with duplicate:
        try:
            duplicate.getpeername()
        except OSError:
            return True
        return False
