"""Two calls of the C library that Python does not offer.

Invariant: on a system that lacks one of them, its function returns False, and does not raise.

At a fork: nothing.
"""

from __future__ import annotations

import ctypes
import socket
from functools import cache


def signal_thread(pid: int, thread: int, number: int) -> bool:
    """Send a signal to one thread of a process: tgkill(2), in glibc since 2.30.

    :return: whether it was sent.
    """
    tgkill = getattr(_library(), "tgkill", None)
    return tgkill is not None and tgkill(pid, thread, number) == 0


def abort_connection(connection: socket.socket) -> bool:
    """End a TCP connection with a reset, however many copies of the descriptor other processes have.

    connect(2) with AF_UNSPEC does it; Linux refuses it while a thread waits in recv() there.

    :return: whether it was done.
    """
    # an address of family 0, which is AF_UNSPEC
    nowhere = bytes(16)
    return bool(_library().connect(connection.fileno(), nowhere, len(nowhere)) == 0)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
