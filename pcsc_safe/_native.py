"""PC/SC in this process: the only importer of ``smartcard.scard``, and the keeper of libpcsclite's descriptors.

libpcsclite talks to pcscd over one Unix socket a context.  A forked child inherits it, and with it the power to read
its parent's answers and to keep its parent's locks alive; so in the child each is replaced by a dead socket, at the
fork.  It is replaced only where the descriptor still is that socket: an application may have closed it, and the number
may be a database connection's by now.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import types
from collections.abc import Iterable
from typing import Any, Callable, NamedTuple, Optional

import smartcard.scard as _smartcard_scard
from smartcard.scard import _scard

from . import _gate, _process
from ._calls import CALLS, Call

__all__ = ["Descriptor", "establish", "functions", "neutralise", "prepare", "public", "release_dead"]

_socket: Any = None


def prepare() -> None:
    """Import what a fork takes, so that nothing need be imported in a child or at interpreter exit."""
    global _socket
    import socket

    _socket = socket


SUCCESS: int = _smartcard_scard.SCARD_S_SUCCESS

public: dict[str, Any] = {
    name: value
    for name, value in vars(_smartcard_scard).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
}
"""Every public name of the installed ``smartcard.scard``, with its value."""


class Descriptor(NamedTuple):
    """A descriptor together with what it stood for when it was recorded."""

    number: int
    device: int
    inode: int

    def is_intact(self) -> bool:
        """Whether the number still stands for the same file."""
        try:
            now = os.fstat(self.number)
        except OSError:
            return False
        return now.st_ino == self.inode and now.st_dev == self.device


def _silenced(call: Call, native: Callable[..., Any]) -> Callable[..., Any]:
    """``native``, but a failed call answers nothing that pyscard did not get from PC/SC (hazard 11)."""

    def silenced(*arguments: Any) -> Any:
        result = native(*arguments)
        return result if result[0] == SUCCESS else call.failure(result[0])

    return silenced


def _bound(name: str) -> Callable[..., Any]:
    # The C function and not pyscard's wrapper of it: the wrapper looks it up anew, and would find our retrofit there.
    call = CALLS.get(name)
    native: Callable[..., Any] = getattr(_scard, name)
    return _silenced(call, native) if call is not None and call.discloses else native


functions: dict[str, Callable[..., Any]] = {name: _bound(name) for name in public if name in CALLS}
"""The functions of the native gateway, by PC/SC's name; they take real handles."""


_ATTEMPTS_TO_FIND_ONE = 20
_establishing = threading.RLock()


def _renew_lock(epoch: _process.Epoch) -> None:
    global _establishing
    _establishing = threading.RLock()


_process.at_fork(_renew_lock)


def establish(scope: Any, keep: Callable[[int, Optional[Descriptor]], Any]) -> Any:
    """SCardEstablishContext.

    :param scope: SCARD_SCOPE_*.
    :param keep: called with the context and the descriptor of its connection (None on macOS, where PC/SC has none),
        before any other thread can fork: a connection that nobody knows of would live on in the child.
    :return: pyscard's answer, with what ``keep`` returned in the place of the context.
    """
    # libpcsclite serialises this call too; ours also covers the look at the descriptors, so that two don't mix.
    with _establishing, _gate.run("SCardEstablishContext"):
        before = _open_numbers()
        result = functions["SCardEstablishContext"](scope)
        if result[0] == SUCCESS:
            result[1] = keep(result[1], _new_connection(before))
        return result


def _new_connection(before: set[str]) -> Optional[Descriptor]:
    """The connection to pcscd that was not there before."""
    if not hasattr(_socket, "AF_UNIX") or sys.platform == "darwin":
        return None  # macOS' PC/SC talks over Mach ports, which a fork does not inherit
    found: list[tuple[bool, Descriptor]] = []
    for _ in range(_ATTEMPTS_TO_FIND_ONE):
        now = _open_numbers()
        found = _connections(now - before) or _connections(now)  # the latter: the number was in use, and freed since
        # Another thread's SCardCancel has a connection of its own, for a moment.
        if sum(likely for likely, _ in found) == 1 or len(found) == 1:
            break
    if not found:
        return None
    new = max(found)[1]
    _known[new.number] = new
    return new


_known: dict[int, Descriptor] = {}
"""The connections found so far, by number; a closed one stays until its number is found again."""


def _open_numbers() -> set[str]:
    """The open descriptors, by their names; opening none but to look."""
    try:
        return set(os.listdir("/proc/self/fd"))
    except OSError:  # no /proc, or no descriptor left to read it with
        return {str(number) for number in range(1024)}


def _connections(numbers: Iterable[str]) -> list[tuple[bool, Descriptor]]:
    """The connected Unix sockets among these that we don't know; with each, whether it leads to pcscd."""
    found = []
    for number in map(int, numbers):
        try:
            status = os.fstat(number)
        except OSError:
            continue
        descriptor = Descriptor(number, status.st_dev, status.st_ino)
        if not stat.S_ISSOCK(status.st_mode) or _known.get(number) == descriptor:
            continue
        peer = _peer(descriptor)
        if peer is not None:
            found.append((_is_pcscd(peer), descriptor))
    return found


def _is_pcscd(peer: str) -> bool:
    # Only the last part: the path that pcscd was bound to need not be ours (containers, symbolic links).
    return os.path.basename(peer) == os.path.basename(os.environ.get("PCSCLITE_CSOCK_NAME") or "pcscd.comm")


def _peer(descriptor: Descriptor) -> Optional[str]:
    """The path that a Unix socket is connected to; None for any other descriptor."""
    try:
        connection = _socket.socket(fileno=descriptor.number)
    except OSError:
        return None
    try:
        peer = connection.getpeername() if connection.family == _socket.AF_UNIX else None
    except OSError:
        return None
    finally:
        connection.detach()
    return peer if isinstance(peer, str) and peer else None


def neutralise(inherited: list[Descriptor]) -> list[Optional[Descriptor]]:
    """Put a dead socket in the place of each inherited connection; runs at the fork, in the child.

    :param inherited: the connections of contexts that this process does not own.
    :return: for each the dead socket that is there now; None where the number was somebody else's already.
    """
    theirs = [descriptor if descriptor.is_intact() else None for descriptor in inherited]
    first = next((descriptor for descriptor in theirs if descriptor is not None), None)
    if first is None:
        return [None] * len(inherited)
    dead = _dead_socket(first.number)
    try:
        status = os.fstat(dead)
        return [_replaced(descriptor, dead, status) for descriptor in theirs]
    finally:
        if dead != first.number:
            os.close(dead)


def _dead_socket(expendable: int) -> int:
    """A socket that was never connected: it can neither send nor receive."""
    try:
        return int(_socket.socket(_socket.AF_UNIX).detach())
    except OSError:
        # No descriptor is free. The inherited one has to go anyway, and makes room.
        os.close(expendable)
        return int(_socket.socket(_socket.AF_UNIX).detach())


def _replaced(descriptor: Optional[Descriptor], dead: int, status: os.stat_result) -> Optional[Descriptor]:
    if descriptor is None:
        return None
    if descriptor.number != dead:
        os.dup2(dead, descriptor.number, inheritable=False)
    return Descriptor(descriptor.number, status.st_dev, status.st_ino)


def release_dead(real: int, dead: Optional[Descriptor]) -> None:
    """Free what libpcsclite keeps for an inherited context, and its descriptor.

    Without this a chain of forks would gather one dead descriptor a generation.  libpcsclite closes the number it
    knows, so it may only be asked while the dead socket is there.

    :param real: the inherited native context.
    :param dead: what :func:`neutralise` put in the place of its connection.
    """
    if dead is not None and dead.is_intact():
        with _gate.run("SCardReleaseContext"):
            functions["SCardReleaseContext"](real)
