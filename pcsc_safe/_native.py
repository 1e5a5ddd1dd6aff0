"""PC/SC in this process: the only importer of ``smartcard.scard``, and the keeper of libpcsclite's descriptors.

libpcsclite talks to pcscd over one Unix socket a context.  A forked child inherits it, and with it the power to read
its parent's answers and to keep its parent's locks alive; so in the child each is replaced by a dead socket, at the
fork.  It is replaced only where the descriptor still is that socket: an application may have closed it, and the number
may be a database connection's by now.
"""

import contextlib
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

__all__ = [
    "Descriptor",
    "establish",
    "exit_without_turns",
    "forget",
    "functions",
    "prepare",
    "public",
    "raw",
    "release_dead",
]

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


# The C functions and not pyscard's wrappers of them: a wrapper looks its own up anew, and would find a retrofit there.
raw: dict[str, Callable[..., Any]] = {name: getattr(_scard, name) for name in public if name in CALLS}
"""The functions of pyscard, by PC/SC's name; they take real handles."""

functions: dict[str, Callable[..., Any]] = {
    name: _silenced(CALLS[name], native) if CALLS[name].discloses else native for name, native in raw.items()
}
"""The functions of the native gateway: those of pyscard, but for what a failed call discloses."""


_ATTEMPTS_TO_FIND_ONE = 20
_establishing = threading.RLock()


def establish(scope: Any, keep: Callable[[int, Optional[Descriptor], _process.Epoch], Any]) -> Any:
    """SCardEstablishContext.

    :param scope: SCARD_SCOPE_*.
    :param keep: called with the context, the descriptor of its connection (None on macOS, where PC/SC has none) and the
        epoch in which it was established, before any other thread can fork: a connection that nobody knows of would
        live on in the child.
    :return: pyscard's answer, with what ``keep`` returned in the place of the context.
    """
    # libpcsclite serialises this call too; ours also covers the look at the descriptors, so that two don't mix.
    with _establishing:
        return _gate.enter("SCardEstablishContext", _establish, scope, keep)


def _establish(scope: Any, keep: Callable[[int, Optional[Descriptor], _process.Epoch], Any]) -> Any:
    owner = _process.current()
    before = _open_numbers()
    result = functions["SCardEstablishContext"](scope)
    if result[0] == SUCCESS:
        connection = _new_connection(before)
        forked = _process.current() is not owner  # in a signal handler since, and this is the child
        if connection is not None:
            _connected[connection.number] = connection
            if forked:
                _disarm()
                forget(connection)
        result[1] = keep(result[1], connection, owner)
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
    return max(found)[1] if found else None


_connected: dict[int, Descriptor] = {}
"""The connections of this process's contexts, by number."""


def _open_numbers() -> set[str]:
    """The open descriptors, by their names; without the one that it takes to look."""
    try:
        listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # no /proc, or no descriptor left to read it with
        return {str(number) for number in range(1024)}
    try:
        return set(os.listdir(listing)) - {str(listing)}
    finally:
        os.close(listing)


def _connections(numbers: Iterable[str]) -> list[tuple[bool, Descriptor]]:
    """The connected Unix sockets among these that we don't know; with each, whether it leads to pcscd."""
    found = []
    for number in map(int, numbers):
        try:
            status = os.fstat(number)
        except OSError:
            continue
        descriptor = Descriptor(number, status.st_dev, status.st_ino)
        if not stat.S_ISSOCK(status.st_mode) or _connected.get(number) == descriptor:
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


def forget(connection: Optional[Descriptor]) -> None:
    """The context of this connection is released, or was never this process's."""
    if connection is not None and _connected.get(connection.number) == connection:
        del _connected[connection.number]


# What a forked child does with its parent's connections.

_socket: Any = None
_dead: Optional[Descriptor] = None
_dead_ones: set[tuple[int, int]] = set()


def prepare() -> None:
    """Import and open what a fork takes, so that nothing need be imported in a child or at interpreter exit."""
    global _socket
    import socket

    _socket = socket
    if _process.FORKS and hasattr(socket, "AF_UNIX") and (_dead is None or not _dead.is_intact()):
        _make_dead_socket()


def _make_dead_socket() -> Descriptor:
    """A socket that was never connected: it can neither send nor receive."""
    global _dead
    number = int(_socket.socket(_socket.AF_UNIX).detach())
    status = os.fstat(number)
    _dead = Descriptor(number, status.st_dev, status.st_ino)
    _dead_ones.add((status.st_dev, status.st_ino))
    return _dead


def _disarm() -> None:
    """Put a dead socket in the place of each inherited connection; runs at the fork, in the child."""
    if not _connected:
        return
    dead = _dead if _dead is not None and _dead.is_intact() else None
    for connection in list(_connected.values()):
        number, device, inode = connection
        try:
            status = os.fstat(number)
        except OSError:
            continue
        if status.st_ino != inode or status.st_dev != device:
            continue  # somebody else's by now
        if dead is not None:
            os.dup2(dead.number, number, inheritable=False)
            continue
        try:
            dead = _make_dead_socket()
            os.dup2(dead.number, number, inheritable=False)
        except OSError:
            # No descriptor is free. The inherited one has to go anyway; it may become the dead socket itself.
            os.close(number)
            with contextlib.suppress(OSError):
                dead = _make_dead_socket()


def release_dead(real: int, inherited: Optional[Descriptor]) -> bool:
    """Free what libpcsclite keeps for an inherited context, and its descriptor.

    Without this a chain of forks would gather one dead descriptor a generation.  libpcsclite closes the number it
    knows, so it may only be asked while the dead socket is there.

    :param real: the inherited native context.
    :param inherited: its connection, as the owner recorded it.
    :return: whether libpcsclite has forgotten the context and its cards.
    """
    if inherited is None:
        return False
    try:
        status = os.fstat(inherited.number)
    except OSError:
        return False
    if (status.st_dev, status.st_ino) not in _dead_ones:
        return False
    _gate.enter("SCardReleaseContext", functions["SCardReleaseContext"], real)
    return True


def exit_without_turns() -> None:
    """At interpreter exit: a thread that establishes may never run again."""
    global _establishing
    _establishing = contextlib.nullcontext()  # type: ignore[assignment]  # it is entered and left, no more


def _begin(epoch: _process.Epoch) -> None:
    global _establishing
    _establishing = threading.RLock()
    _connected.clear()


_process.at_fork(in_child=_disarm, at_begin=_begin)
