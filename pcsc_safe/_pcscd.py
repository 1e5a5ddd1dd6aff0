"""Which of this process's descriptors are connections to pcscd, whoever opened them.

libpcsclite talks to pcscd over one Unix socket a context, and doesn't say which.  :mod:`_native` looks for those of our
contexts here.  Those of others in this process, a PKCS#11 module's for instance, are nobody's business by default;
with ``guard_native=True`` a forked child must not have them either.

At a fork that is what happens: in the child every connection to pcscd that came over the fork is handed to
:mod:`_descriptors`, for a dead socket to take its place.  Everything that takes has been imported before.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from typing import Any, Optional

from . import _descriptors, _process
from ._descriptors import Descriptor

__all__ = ["connections", "guard_all", "open_numbers", "prepare", "strangers"]

_ARE_INHERITED = _process.FORKS and sys.platform != "darwin"  # macOS' PC/SC talks over Mach ports
_SOCKET_NAME = "pcscd.comm"
_MOST_NUMBERS = 65536  # to look at where they can't be listed

_socket: Any = None
_paths: set[str] = set()


def prepare() -> None:
    """Import what the look at the descriptors takes, so that nothing need be imported in a child."""
    global _socket
    import socket

    _socket = socket
    _learn_path()


def guard_all(on: bool) -> None:
    """Whether children that are forked from now on are to have none of this process's connections to pcscd."""
    if on:
        prepare()
        _descriptors.prepare()
    _descriptors.others = _inherited if on else tuple


def connections() -> list[Descriptor]:
    """Those that were opened by somebody else, as far as they can be told."""
    return [connection for likely, connection in strangers(open_numbers()) if likely]


def open_numbers() -> set[str]:
    """The open descriptors, by their names; without the one that it takes to look."""
    if not _ARE_INHERITED:
        return set()
    try:
        listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # no /proc, or no descriptor left to read it with
        return _possible_numbers()
    try:
        return set(os.listdir(listing)) - {str(listing)}  # which takes another one
    except OSError:
        return _possible_numbers()
    finally:
        os.close(listing)


def _possible_numbers() -> set[str]:
    limit = os.sysconf("SC_OPEN_MAX")  # negative if there is none
    return {str(number) for number in range(limit if 0 < limit < _MOST_NUMBERS else _MOST_NUMBERS)}


def strangers(numbers: Iterable[str]) -> list[tuple[bool, Descriptor]]:
    """The connected Unix sockets among these that we don't know; with each, whether it leads to pcscd."""
    found = []
    for number in map(int, numbers):
        try:
            status = os.fstat(number)
        except OSError:
            continue
        if not stat.S_ISSOCK(status.st_mode):
            continue
        descriptor = Descriptor(number, status.st_dev, status.st_ino)
        if _descriptors.guarded.get(number) == descriptor:
            continue
        peer = _peer(number)
        if peer is not None:
            found.append((_is_pcscd(peer), descriptor))
    return found


def _peer(number: int) -> Optional[str]:
    """The path that a Unix socket is connected to; None for any other descriptor."""
    try:
        # As one that doesn't block, whatever it is: after socket.setdefaulttimeout() Python would else make it one, for
        # its owner and for the owner's parent as well.
        connection = _socket.SocketType(_socket.AF_UNIX, _socket.SOCK_NONBLOCK, 0, number)
    except OSError:
        return None
    try:
        peer = connection.getpeername()
    except OSError:
        return None
    finally:
        connection.detach()
    return peer if isinstance(peer, str) and peer else None


def _is_pcscd(peer: str) -> bool:
    # The name is enough: the path that pcscd was bound to need not be ours (containers, symbolic links).
    if os.path.basename(peer) == _SOCKET_NAME:
        return True
    _learn_path()
    return peer in _paths


def _learn_path() -> None:
    # libpcsclite goes on with the path that it saw first, so none is forgotten when the variable changes.
    path = os.environ.get("PCSCLITE_CSOCK_NAME")
    if path and path not in _paths:
        _paths.update((path, os.path.realpath(path)))


def _inherited() -> list[Descriptor]:
    """In a forked child: the connections that it has from its parent."""
    found = connections()
    if found and not _process.ran_hook():
        # It may have run for long, and have connections of its own; but none that its parent has too.
        parents = _files_of(os.getppid())
        found = [connection for connection in found if (connection.device, connection.inode) in parents]
    return found


def _files_of(pid: int) -> set[tuple[int, int]]:
    """Device and inode of every descriptor of another process; of none, if we may not see them."""
    files = set()
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            status = os.stat(f"/proc/{pid}/fd/{number}")
            files.add((status.st_dev, status.st_ino))
    except OSError:
        pass
    return files
