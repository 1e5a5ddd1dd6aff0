"""The file descriptors that a forked child must not use, and the dead socket that replaces them there.

A child inherits its parent's connections to pcscd and to a broker.  Over them it could read its parent's replies, and
its copies would keep the parent's cards locked.  So the child replaces each connection with a dead socket at the fork.
It does this only if the number still stands for that connection: an application may have closed the connection, and may
now have a database connection with this number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Callable, NamedTuple, Optional

from . import failures, process
from .failures import is_ours
from .unpatched import get_ident

__all__ = [
    "Descriptor",
    "any_open",
    "find_others",
    "guard",
    "guarded",
    "is_dead",
    "kept_by_child",
    "of",
    "possible_numbers",
    "prepare",
    "replace_guarded",
    "replace_with_dead",
    "unguard",
]


class Descriptor(NamedTuple):
    """A descriptor together with what it stood for when it was recorded."""

    number: int
    device: int
    inode: int

    def is_intact(self) -> bool:
        """Whether the number still stands for the same file."""
        return _identity(self.number) == self[1:]


def _identity(number: int) -> Optional[tuple[int, int]]:
    """The device and the inode that a number stands for; None if it is not open."""
    try:
        status = os.fstat(number)
    except OSError as error:
        if not is_ours(error):
            raise
        return None
    return status.st_dev, status.st_ino


def of(number: int) -> Descriptor:
    """An open descriptor, as it is now.

    :raises OSError: it is not open.
    """
    status = os.fstat(number)
    return Descriptor(number, status.st_dev, status.st_ino)


_MOST_NUMBERS = 65536


def possible_numbers() -> range:
    """The numbers to try where the open descriptors can't be listed; the limit can be a thousand million."""
    if sys.platform == "win32":
        return range(0)
    limit = os.sysconf("SC_OPEN_MAX")  # negative if there is none
    return range(limit if 0 < limit < _MOST_NUMBERS else _MOST_NUMBERS)


guarded: dict[Descriptor, None] = {}
"""The connections of this process that a forked child must not use."""

kept_by_child: dict[int, set[int]] = {}
"""The numbers that the child keeps, by the thread that is about to fork it."""


find_others: Callable[[], Sequence[Descriptor]] = tuple
"""Finds, in a forked child, further connections that it must not have; set for ``guard_native``."""


def guard(connection: Descriptor) -> None:
    """Keep children that are forked from now on from using this connection."""
    guarded[connection] = None


def unguard(connection: Optional[Descriptor]) -> None:
    """Note that a connection is closed, or never belonged to this process."""
    if connection is not None:
        guarded.pop(connection, None)


_socket: Any = None
_dead_socket: Optional[Descriptor] = None
_dead_sockets: set[Optional[tuple[int, int]]] = set()


def prepare() -> None:
    """Import and open what a fork requires, so that nothing need be imported in a child or at interpreter exit."""
    global _socket
    import _socket as socket  # the module that Python's own is made of: eventlet and gevent patch that one

    _socket = socket
    if process.FORKS and hasattr(socket, "AF_UNIX") and _intact_dead_socket() is None:
        _make_dead_socket()


def _make_dead_socket() -> Descriptor:
    """A socket that was never connected: it can neither send nor receive."""
    global _dead_socket
    _dead_socket = of(int(_socket.socket(_socket.AF_UNIX).detach()))
    _dead_sockets.add(_dead_socket[1:])
    return _dead_socket


def _intact_dead_socket() -> Optional[Descriptor]:
    return _dead_socket if _dead_socket is not None and _dead_socket.is_intact() else None


def any_open() -> Optional[Descriptor]:
    """An open descriptor, to be duplicated; None if the application has closed it, and none is free."""
    try:
        return _intact_dead_socket() or _make_dead_socket()
    except OSError as error:
        if not is_ours(error):
            raise
        return None


def is_dead(number: int) -> bool:
    """Whether a dead socket has replaced this descriptor."""
    return _identity(number) in _dead_sockets


def replace_guarded() -> None:
    """In the child: replace each guarded connection by a dead socket."""
    kept = kept_by_child.get(get_ident(), ())
    inherited = [connection for connection in list(guarded) if connection.number not in kept]
    if not process.sentinel[0]:  # otherwise a signal handler's call has done this, and some are the child's own
        replace_with_dead(inherited)


def _at_fork() -> None:
    replace_guarded()
    if find_others is not tuple:
        replace_with_dead(find_others())  # none that is kept: those are guarded


def replace_with_dead(connections: Iterable[Optional[Descriptor]]) -> None:
    """Replace each of these that is still intact by a dead socket."""
    dead = _intact_dead_socket()
    for connection in connections:
        if connection is None or not connection.is_intact():
            continue  # somebody else's by now
        number = connection.number
        try:
            dead = dead or _make_dead_socket()
            os.dup2(dead.number, number, inheritable=False)
        except OSError as error:
            if not is_ours(error):
                raise
            # No descriptor is free. The inherited one has to go anyway; it may become the dead socket itself.
            os.close(number)
            with failures.suppress(OSError):
                dead = _make_dead_socket()


process.at_fork(in_child=_at_fork)
process.clear_at_begin(guarded, kept_by_child)
