"""Finds out which of this process's file descriptors are connections to pcscd, whichever library opened them.

libpcsclite has one Unix socket to pcscd for each context, and doesn't report its number.  The native gateway finds the
sockets of our contexts with this module.  By default the sockets of other libraries in this process, such as a PKCS#11
module, are left alone.  With ``guard_native=True`` a forked child must not have them either.

At a fork the child hands every connection to pcscd that it has inherited to :mod:`descriptors`, which replaces it by a
dead socket.  Everything that this needs was imported before.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import attrgetter, eq, methodcaller
from typing import Any, Callable, Optional

from . import descriptors, process
from .descriptors import Descriptor
from .failures import is_ours
from .one_step import Operation, consumer
from .settings import when_changed

__all__ = [
    "ARE_INHERITED",
    "FORGET_LATEST",
    "ConnectionFinder",
    "connections",
    "guard_all",
    "is_hung_up",
    "open_numbers",
    "prepare",
    "shut_down",
    "unguarded_sockets",
]

ARE_INHERITED = process.FORKS and sys.platform != "darwin"  # macOS' PC/SC talks over Mach ports
_FDS = "/proc/self/fd"
_SOCKET_NAME = "pcscd.comm"

_socket: Any = None
_Borrowed: Any = None  # a socket that never closes its descriptor, whenever and however it is left
_paths: set[str] = set()


def prepare() -> None:
    """Import what looking at descriptors requires, so that a child need not import anything."""
    global _socket, _Borrowed
    import _socket as module  # the socket module may have been patched (gevent)

    # Its finalizer is a function of C: no signal handler can raise in it.
    _Borrowed = type("Borrowed", (module.socket,), {"__slots__": (), "__del__": module.socket.detach})
    _socket = module
    _remember_path()


class ConnectionFinder:
    """Finds out which connection libpcsclite opens in SCardEstablishContext.

    Its socket gets the lowest free number.  Looking at that number before and after, in the same step of C and without
    another call of this package in between, identifies the socket, unless another thread of the application opens or
    closes files at the same time.  A thorough look lists all numbers, and identifies the socket in that case, too,
    unless libpcsclite has opened another one since.

    :cvar latest: the object for the last connection that was opened; None if another function opened it.
    """

    latest: Optional[ConnectionFinder] = None

    def __init__(self) -> None:
        self._next: list[int] = []  # the lowest free number, before
        self._status: list[os.stat_result] = []  # of what has it afterwards
        self._listed: list[list[str]] = []  # all numbers, before and after

    def operations(self, thoroughly: bool) -> tuple[Sequence[Operation], Sequence[Operation]]:
        """What to do before SCardEstablishContext and after it."""
        if not ARE_INHERITED:
            return (), ()
        begin: Operation = (setattr, ConnectionFinder, "latest", self)
        spare = descriptors.any_open()
        if spare is None:
            return [begin], []
        # Not a file that has the number by now: closing its duplicate would release the application's locks on it.
        is_intact = map(eq, map(attrgetter("st_dev", "st_ino"), map(os.fstat, (spare.number,))), (spare[1:],))
        look: list[Operation] = [
            begin,
            (self._next.extend, map(os.dup, compress((spare.number,), is_intact))),
            (consumer.extend, map(os.close, self._next)),
        ]
        if not thoroughly:
            return look, [(self._status.extend, map(os.fstat, self._next))]
        listing: list[Operation] = [(self._listed.extend, map(os.listdir, (_FDS,))) for _ in range(2)]
        return [*look, listing[0]], [listing[1]]

    def connection(self) -> Optional[Descriptor]:
        """The connection, or None if it is not known."""
        if self._status:
            status = self._status[0]
            expected = Descriptor(self._next[0], status.st_dev, status.st_ino)
            peer = _peer(expected.number)
            # Guarded or not: another thread may be noting the same.
            return expected if peer is not None and _is_pcscd(peer) and expected.is_intact() else None
        if not self._listed:
            return None
        now = set(self._listed[1]) if len(self._listed) > 1 else _possible_numbers()
        found = unguarded_sockets((now - set(self._listed[0])) | set(map(str, self._next)))
        likely = [descriptor for is_likely, descriptor in found if is_likely]
        # Another one that was opened after this one may have a number that was listed.
        return likely[0] if len(likely) == 1 and ConnectionFinder.latest is self else None


FORGET_LATEST: Operation = (setattr, ConnectionFinder, "latest", None)
"""Comes, in the same step, before any other call in which libpcsclite opens a connection to pcscd."""


def shut_down(connection: Optional[Descriptor], *, both_directions: bool) -> None:
    """Shut a connection to pcscd down, and leave the descriptor to libpcsclite.

    Every read from it, now and later, returns end of file, so it can't be too early to end a call in this way.

    :param both_directions: also end reading, and don't leave this to pcscd, which may not respond.  pcscd 2.5 continues
        to send events to the number of a client that it could not respond to: the next client with that number reads
        one as the response to its call.
    """
    if connection is not None and connection.is_intact():
        how = _socket.SHUT_RDWR if both_directions else _socket.SHUT_WR
        _call_on_socket(connection.number, methodcaller("shutdown", how))


def is_hung_up(connection: Optional[Descriptor]) -> bool:
    """Whether pcscd has closed its end of a connection."""
    if connection is None or not connection.is_intact():
        return False
    return b"" in _call_on_socket(connection.number, methodcaller("recv", 1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT))


def _call_on_socket(number: int, method: Callable[[Any], Any]) -> list[Any]:
    """The result of a method of the socket with this number; nothing if there is no such socket, or no result.

    :param method: a C function that takes a socket.
    """
    # SOCK_NONBLOCK, whatever the socket is: after socket.setdefaulttimeout(), Python would otherwise make the socket
    # non-blocking, also for its owner and for the owner's parent.
    kind = _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK
    try:
        return [method(_Borrowed(_socket.AF_UNIX, kind, 0, number))]
    except OSError as error:
        if not is_ours(error):
            raise
        return []


def guard_all(on: bool) -> None:
    """Set whether children that are forked from now on lose all of this process's connections to pcscd."""
    if on:
        prepare()
        descriptors.prepare()
    descriptors.find_others = _inherited if on else tuple


def connections() -> list[Descriptor]:
    """The connections that other libraries have opened, as far as they are known."""
    return [connection for likely, connection in unguarded_sockets(open_numbers()) if likely]


def open_numbers() -> set[str]:
    """The open descriptors, by their names; also the one with which they were listed."""
    if not ARE_INHERITED:
        return set()
    try:
        return set(os.listdir(_FDS))
    except OSError as error:  # no /proc, or no descriptor left to read it with
        if not is_ours(error):
            raise
        return _possible_numbers()


def _possible_numbers() -> set[str]:
    return set(map(str, descriptors.possible_numbers()))


def unguarded_sockets(numbers: Iterable[str]) -> list[tuple[bool, Descriptor]]:
    """The connected Unix sockets among these that are not ours, each with whether it leads to pcscd."""
    found = []
    for number in map(int, numbers):
        try:
            status = os.fstat(number)
        except OSError as error:
            if not is_ours(error):
                raise
            continue
        if not stat.S_ISSOCK(status.st_mode):
            continue
        descriptor = Descriptor(number, status.st_dev, status.st_ino)
        if descriptor in descriptors.guarded:
            continue
        peer = _peer(number)
        if peer is not None:
            found.append((_is_pcscd(peer), descriptor))
    return found


def _peer(number: int) -> Optional[str]:
    """The path that a Unix socket is connected to; None for any other descriptor."""
    peer = next(iter(_call_on_socket(number, methodcaller("getpeername"))), None)
    return peer if isinstance(peer, str) and peer else None


def _is_pcscd(peer: str) -> bool:
    # The name is enough: the path that pcscd was bound to need not be ours (containers, symbolic links).
    if peer.rpartition("/")[2] == _SOCKET_NAME:
        return True
    _remember_path()
    return peer in _paths


def _remember_path() -> None:
    # libpcsclite continues to use the path that it saw first, so none is forgotten when the variable changes.
    path = os.environ.get("PCSCLITE_CSOCK_NAME")
    if path and path not in _paths:
        _paths.update((path, os.path.realpath(path)))


def _inherited() -> list[Descriptor]:
    """In a forked child: the connections that it has inherited."""
    found = connections()
    if found and not process.ran_hook():
        # It may have run for long, and have connections of its own; but none that its parent has too.
        parents = _files_of(os.getppid())
        found = [connection for connection in found if (connection.device, connection.inode) in parents]
    return found


def _files_of(pid: int) -> set[tuple[int, int]]:
    """Device and inode of every descriptor of another process; empty if this user may not see them."""
    files = set()
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            status = os.stat(f"/proc/{pid}/fd/{number}")
            files.add((status.st_dev, status.st_ino))
    except OSError as error:
        if not is_ours(error):
            raise
    return files


when_changed(lambda settings: guard_all(settings.guard_native))
