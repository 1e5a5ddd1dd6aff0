"""Shows the other processes of a fork family which sessions with cards continue, and which readers are in use.

A process that is connected to a card, shared, locks one byte of a file that it had before it forked, and the next byte
while it is in a transaction.  These locks (fcntl(2)) belong to the process: a child doesn't inherit them, and they end
with the process, however it ends.  So a child that inherits a card can check whether its owner still has the session
that the child knows.  No PID is compared, and a fork costs nothing.

Each process that is connected to a card also has a lock on a byte of the reader, which several processes can have at
the same time.  So a process can check whether another one uses the card.  Processes that have the same connection, in a
broker, lock another byte of the reader: the broker knows which of them is the last one.

The file is empty.  Each session has bytes at a random offset, so no offset is used twice.

Invariant: if anything is missing (the file descriptor was closed, or the system has no such locks) a session counts as
ended.  A child closes nothing here: at a fork nothing changes.
"""

from __future__ import annotations

import os
import struct
import weakref
from typing import Any, Optional

from . import descriptors, failures, process
from .failures import is_ours

__all__ = ["Session", "descriptor", "prepare"]

_CONNECTED, _IN_TRANSACTION = range(2)  # bytes of a session
_LARGEST = 1 << 60
_READERS = 1 << 62  # the readers' bytes begin here

is_on = True
"""Whether other processes can see this process's sessions; a broker has no children."""

_pcscd: Optional[str] = None
_file: Optional[descriptors.Descriptor] = None
_fcntl: Any = None
_layout: Any = None
_mine: dict[int, dict[weakref.ref[Session], None]] = {}
"""The sessions that this process has, by the byte of the reader.  A session that a signal handler loses disappears."""


def prepare() -> None:
    """Import and open what sessions require, in the process that establishes the first context of its family."""
    global _file, _fcntl, _layout, _pcscd
    if not process.FORKS or not is_on:
        return
    import fcntl  # a process that exits imports nothing

    if _fcntl is None:
        _pcscd = os.environ.get("PCSCLITE_CSOCK_NAME")  # libpcsclite, too, reads it once, at the first context
    _fcntl, _layout = fcntl, _LinuxLayout if hasattr(fcntl, "F_NOTIFY") else _BsdLayout
    if _file is None or not _file.is_intact():
        with failures.suppress(OSError):  # also what tempfile raises
            _file = descriptors.of(_empty_file())


class _LinuxLayout:
    """``struct flock`` of fcntl.h: type, whence, start, length, PID."""

    _FIELDS = struct.Struct("@hhqqi0q")

    @classmethod
    def pack(cls, kind: int, start: int) -> bytes:
        """A lock of one byte."""
        return cls._FIELDS.pack(kind, os.SEEK_SET, start, 1, 0)

    @classmethod
    def kind(cls, packed: bytes) -> int:
        """F_UNLCK, or the kind of a conflicting lock."""
        return int(cls._FIELDS.unpack(packed)[0])


class _BsdLayout:
    """The same on macOS and the BSDs: start, length, PID, type, whence."""

    _FIELDS = struct.Struct("@qqihh0q")

    @classmethod
    def pack(cls, kind: int, start: int) -> bytes:
        """A lock of one byte."""
        return cls._FIELDS.pack(start, 1, 0, kind, os.SEEK_SET)

    @classmethod
    def kind(cls, packed: bytes) -> int:
        """F_UNLCK, or the kind of a conflicting lock."""
        return int(cls._FIELDS.unpack(packed)[3])


def _empty_file() -> int:
    if hasattr(os, "memfd_create"):
        with failures.suppress(OSError):  # a seccomp filter's
            return int(os.memfd_create("pcsc_safe"))
    import tempfile

    number, path = tempfile.mkstemp("", "pcsc_safe")
    os.unlink(path)
    return number


def descriptor() -> Optional[int]:
    """The number of the file's descriptor; if it is closed, sessions count as ended."""
    return _file.number if _file is not None and _file.is_intact() else None


class Session:
    """A session with a card.

    :ivar reader: the reader's name.
    :ivar pcscd: the socket of its pcscd, if the environment names one: readers of two pcscds can have the same name.
    :ivar events: how often a card was inserted or removed in the reader before it began; None if that is not known.
    :ivar is_shared: whether the card is connected shared; other processes can continue only a shared session.
    :ivar is_open: whether this process has it.
    :ivar is_joint: whether other processes have the same connection, through a broker.
    """

    __slots__ = (
        "__weakref__",
        "_byte_of_reader",
        "_file",
        "_number",
        "events",
        "is_joint",
        "is_open",
        "is_shared",
        "pcscd",
        "reader",
    )

    def __init__(
        self,
        reader: Any,
        *,
        shared: bool,
        events: Optional[int] = None,
        joint: bool = False,
        in_transaction: bool = False,
    ) -> None:
        if descriptor() is None:
            prepare()
        self._number = int.from_bytes(os.urandom(8), "big") % _LARGEST * 2
        self.reader = reader if isinstance(reader, str) else ""  # otherwise pyscard refuses it
        self.pcscd = _pcscd
        # A fork keeps the seed of hash().
        self._byte_of_reader = _READERS + hash((self.pcscd, self.reader)) % _LARGEST * 2
        self.events = events
        self.is_open, self.is_shared, self.is_joint = True, shared, joint
        self.begin(in_transaction=in_transaction)

    def begin(self, *, in_transaction: bool = False) -> None:
        """Note that this process has it; after :meth:`end`, that it has not ended."""
        self.is_open, self._file = True, _file
        if in_transaction:
            self._lock(self._number + _IN_TRANSACTION)
        if self.is_shared:
            self._lock(self._number + _CONNECTED)
        self._enter()

    def end(self) -> None:
        """Note that this process no longer has it; does nothing in a process that never had it."""
        self.is_open = False
        self._unlock(self._number + _CONNECTED)
        self._unlock(self._number + _IN_TRANSACTION)
        self._leave(self._byte_of_reader + self.is_joint)

    def join(self) -> None:
        """Note that other processes have the same connection, through a broker."""
        if not self.is_joint:
            self.is_joint = True
            if self.is_open:
                self._enter()
            self._leave(self._byte_of_reader)

    def show_use(self) -> None:
        """Show that this process uses the card; in a child that gets the session, before the child's first call."""
        self._lock(self._byte_of_reader + self.is_joint, shared_lock=True)

    def _enter(self) -> None:
        mine = _mine.setdefault(self._byte_of_reader + self.is_joint, {})
        mine[weakref.ref(self, mine.pop)] = None
        self.show_use()

    def _leave(self, byte: int) -> None:
        mine = _mine.setdefault(byte, {})  # the one to which another thread adds a session
        mine.pop(weakref.ref(self), None)
        if not mine:
            self._unlock(byte)
            if mine:  # another thread has just begun one
                self._lock(byte, shared_lock=True)

    def taken_over(self, in_transaction: bool) -> Session:
        """In a child that it was handed over to, or that shares it: the session, as this process's own."""
        return Session(
            self.reader,
            shared=self.is_shared,
            events=self.events,
            joint=self.is_joint,
            in_transaction=in_transaction,
        )

    def set_in_transaction(self, is_in: bool) -> None:
        """Note the beginning or the end of a transaction."""
        if is_in:
            self._lock(self._number + _IN_TRANSACTION)
        else:
            self._unlock(self._number + _IN_TRANSACTION)

    def is_visible(self) -> bool:
        """Whether this process still has the descriptor of the file in which another process has locked its bytes."""
        return self._file is _file and descriptor() is not None

    def is_alive(self) -> bool:
        """Whether another process has it, shared."""
        return self._is_locked(self._number + _CONNECTED)

    def can_continue(self) -> bool:
        """Whether another process has it, shared, and is not in a transaction."""
        return self.is_alive() and not self.is_in_transaction()

    def is_in_transaction(self) -> bool:
        """Whether another process has it, and is in a transaction."""
        return self._is_locked(self._number + _IN_TRANSACTION)

    def is_used_by_others(self) -> bool:
        """Whether another process of the family is connected to the card in this reader."""
        return self.is_used_apart() or self._is_locked(self._byte_of_reader + True)

    def is_used_apart(self) -> bool:
        """The same, without processes that have one connection through a broker."""
        return self._is_locked(self._byte_of_reader)

    def _lock(self, byte: int, *, shared_lock: bool = False) -> None:
        self._lock_command("F_SETLK", "F_RDLCK" if shared_lock else "F_WRLCK", byte)

    def _unlock(self, byte: int) -> None:
        self._lock_command("F_SETLK", "F_UNLCK", byte)

    def _is_locked(self, byte: int) -> bool:
        found = self._lock_command("F_GETLK", "F_WRLCK", byte)
        return found is not None and _layout.kind(found) != _fcntl.F_UNLCK

    def _lock_command(self, command: str, kind: str, byte: int) -> Any:
        number = descriptor()
        if number is None:
            return None
        wanted = _layout.pack(getattr(_fcntl, kind), byte)
        try:
            return _fcntl.fcntl(number, getattr(_fcntl, command), wanted)
        except OSError as error:
            if not is_ours(error):
                raise
            return None


process.clear_at_begin(_mine)
