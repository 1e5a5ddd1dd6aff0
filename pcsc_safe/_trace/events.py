"""Records what happens to PC/SC in a family of processes, for ``python -m pcsc_safe run --report | --timeline``.

Each process has a separate record: files of slots in a directory, mapped into memory.  Writing is assigning to memory.
So it costs no system call and takes no lock, works in an at-fork hook and after ``chroot`` and ``setuid``, and what was
written stays, however the process ends.  A counter assigns the slots, so no two threads get the same one.  No file
descriptor is kept, because the number could stand for another file by the time it is used.

Without a directory in the environment nothing is written and nothing is mapped.

At a fork the child begins a new record, and never writes to its parent's again.
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
from _thread import get_native_id
from collections.abc import Iterator, Sequence
from functools import partial
from time import monotonic, monotonic_ns
from typing import Any, Callable, Optional

from .._core import observer, process
from .._core.failures import is_ours
from .._core.observer import VARIABLE

__all__ = [
    "NO_SPAN",
    "SLOT",
    "SPAN",
    "SPAN_TAG",
    "VARIABLE",
    "Activity",
    "forget",
    "is_on",
    "pid_space",
    "process_started",
    "record",
]

SLOT = 256  # bytes
SPAN_TAG = b"S"
SPAN = struct.Struct("=c7s8sddd")
"""A slot that holds a span: tag, activity, key, when it began and ended (s; 0: not yet), and how often it was done."""

_TEXT = struct.Struct(f"{SLOT}s")
_DOUBLE = 8  # bytes
_END_AT = SPAN.size - 2 * _DOUBLE
_SLOTS = 128  # a file
_MOST_FILES = 1024  # 32 MB a process
_FINENESS = 1 / 512  # of the time since the start: what is closer together is one span
_LONGEST_WORD = 12  # where not all fit
_PROT_READ_WRITE, _MAP_SHARED = 3, 1
_MAP_POPULATE = 0x8000 if sys.platform.startswith("linux") else 0

_directory = os.environ.get(VARIABLE) or None
_origin = monotonic()


def is_on() -> bool:
    """Whether there is a record."""
    return _directory is not None


class _Record:
    """The record of one process.

    :param parent: the name of the record of the process that forked or started it; "" if that isn't known.
    :ivar name: the PID and the time; two processes can have one PID, one after the other.
    """

    def __init__(self, pid: int, parent: str, how: str, program: str, parent_pid: int) -> None:
        self.name = f"{pid}-{monotonic_ns()}"
        self._files: dict[int, Any] = {}
        self._slots = itertools.count()
        self._is_lost = False
        self.write(
            "process",
            {"pid": pid, "ppid": parent_pid, "parent": parent, "how": how, "program": program, "space": pid_space()},
        )

    def write(self, kind: str, fields: dict[str, Any]) -> None:
        """Fill one slot."""
        line = _line(kind, fields).encode()
        if len(line) > SLOT:
            short = {name: value[:_LONGEST_WORD] if isinstance(value, str) else value for name, value in fields.items()}
            line = _line(kind, short).encode()
        file, offset = self.slot()
        _TEXT.pack_into(file, offset, line)

    def slot(self) -> tuple[Any, int]:
        """A free slot: the memory that it is in, and its offset there."""
        number, index = divmod(next(self._slots), _SLOTS)
        file = self._files.get(number)
        if file is None:  # two threads that come here map the same file
            file = self._files.setdefault(number, self._map(number))
        return file, index * SLOT

    def _map(self, number: int) -> Any:
        if not self._is_lost and number < _MOST_FILES:
            try:
                return _mapped(f"{_directory}/{self.name}.{number}", SLOT * _SLOTS)
            except OSError as error:
                if not is_ours(error):
                    raise
        self._is_lost = True
        if number:
            last = _line("incomplete", {}).encode()
            _TEXT.pack_into(self._files.get(number - 1, _discarded), (_SLOTS - 1) * SLOT, last)
        return _discarded


def _line(kind: str, fields: dict[str, Any]) -> str:
    return ascii((monotonic_ns(), kind, get_native_id(), fields))


def _mapped(path: str, size: int) -> Any:
    # Not the mmap module, which keeps a descriptor.
    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)  # or a full disk would be a SIGBUS
        else:
            os.ftruncate(file, size)
        address = _mmap(None, size, _PROT_READ_WRITE, _MAP_SHARED | _MAP_POPULATE, file, 0)
    finally:
        os.close(file)
    if address in (None, _MAP_FAILED):
        raise OSError("mmap")
    return memoryview((_ctypes.c_char * size).from_address(address)).cast("B")


def pid_space() -> int:
    """The PID namespace of this process; the watcher can't use a PID of another namespace."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


_mine: Optional[_Record] = None
_latest: Optional[_Record] = None
"""The record of this process; if it has none, of the nearest ancestor that has one."""


def record(kind: str, **fields: Any) -> None:
    """Record that something happened in this process.

    It never fails: a process that can't write, in a chroot or as another user, records nothing.

    :param kind: what happened, in a word.
    :param fields: more facts: words and numbers, and the keys of records as they are.
    """
    if _mine is not None:
        _mine.write(kind, fields)


def process_started(pid: int, how: str, program: str) -> None:
    """Begin the record of a process that this one has started, and that keeps none itself."""
    if _mine is not None:
        _Record(pid, _mine.name, how, program, os.getpid())


class Activity:
    """Something that is done many times, on contexts or cards; what is close in time is recorded as one span.

    :param name: at most 7 letters.
    :ivar spans: by key, the current span: the file, and the offset of its end there, followed by the count; the
        next count; and when the span ends.
    """

    def __init__(self, name: str) -> None:
        self._name = name.encode()
        self.spans: dict[bytes, tuple[Any, int, Iterator[float], float]] = {}
        _activities.append(self)

    def add(self, key: bytes, start: float, end: float) -> Callable[[float], None]:
        """Record that it was done once.

        :param key: of the object that it was done on.
        :param start: when it began, by monotonic().
        :param end: when it ended; 0 if it continues until :meth:`end`.
        :return: a function that records when it ended; other threads may do it on the same object.
        """
        file, at, count, limit = self.spans.get(key, NO_SPAN)
        if (end or start) < limit:
            file[at], file[at + 1] = end, next(count)
            return partial(_end, _mine, file, at)
        file, offset = _mine.slot() if _mine is not None else (_discarded, 0)
        SPAN.pack_into(file, offset, SPAN_TAG, self._name, key, start, end, 1)
        limit = start + (start - _origin) * _FINENESS
        file, at = file.cast("d"), (offset + _END_AT) // _DOUBLE
        self.spans[key] = file, at, itertools.count(2.0), limit
        return partial(_end, _mine, file, at)

    def end(self, key: bytes, end: float) -> None:
        """Record the end of what was in progress, and can be in progress once."""
        file, at, _, _ = self.spans.get(key, NO_SPAN)
        if file is not None:
            file[at] = end


def _end(mine: Optional[_Record], file: Any, at: int, end: float) -> None:
    # A signal handler may have forked in the middle, and returned in the child.
    if mine is _mine and process.sentinel[0]:
        file[at] = end


NO_SPAN: tuple[Any, int, Any, float] = (None, 0, None, 0.0)


def forget(key: bytes) -> None:
    """Forget an object: nothing will be done on it any more."""
    for activity in _activities:
        activity.spans.pop(key, None)


_activities: list[Activity] = []


def _in_child() -> None:
    # In the hook, so that a child that never uses PC/SC has a record, too.
    global _mine, _latest
    _mine = None  # a signal handler may raise below; what the child then records must not go to its parent's record
    for activity in _activities:
        activity.spans.clear()
    if _latest is not None:
        how = "fork" if process.ran_hook() else "C fork"
        _mine = _latest = _Record(os.getpid(), _latest.name, how, "", os.getppid())


def _program(words: Sequence[str]) -> str:
    """What a command line runs, without its arguments: they may be secret."""
    first = os.path.basename(words[0] if words else sys.executable or "")
    if "--multiprocessing-fork" in words:
        return f"{first} (multiprocessing)"
    if not first.lower().startswith(_PYTHONS):  # another program, with Python in it: its options are unknown here
        return first
    return " ".join([first, *_what_python_runs(iter(words[1:]))])


def _what_python_runs(rest: Iterator[str]) -> Sequence[str]:
    import re  # used once, and only where there is a record

    # Python's options: those without an argument, then one with an argument, then the rest of the word.
    options = re.compile("-[bBdEhiIOPqRsStuvVx?]*([cmWX]?)(.*)", re.DOTALL)
    for word in rest:
        found = options.fullmatch(word)
        if found is None or word == "-":
            return [os.path.basename(word)]
        option, argument = found.groups()
        if option == "c":
            return ["-c"]
        if option == "m":
            return ["-m", argument or next(rest, "")]
        if not option and argument:
            break  # an unknown option: the next word may be its argument
        if option and not argument:
            next(rest, None)
    return []


_PYTHONS = ("python", "pypy")


def _command_line() -> Sequence[str]:
    words: Sequence[str] = getattr(sys, "orig_argv", ())  # since Python 3.10
    if not words:
        try:
            with open("/proc/self/cmdline", "rb") as file:
                words = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
        except OSError:
            pass
    return words


def _start_recording() -> None:
    global _ctypes, _mmap, _MAP_FAILED, _discarded, _mine, _latest
    import ctypes as _ctypes

    _mmap = _ctypes.CDLL(None).mmap
    _mmap.restype = _ctypes.c_void_p
    _mmap.argtypes = [_ctypes.c_void_p, _ctypes.c_size_t, *[_ctypes.c_int] * 3, _ctypes.c_long]
    _MAP_FAILED = _ctypes.c_void_p(-1).value
    _discarded = memoryview(bytearray(SLOT * _SLOTS))
    process.at_fork(in_child=_in_child)
    observer.record, observer.process_started = record, process_started
    _mine = _latest = _Record(os.getpid(), "", "start", _program(_command_line()), os.getppid())


_ctypes: Any = None
_mmap: Any = None
_MAP_FAILED: Any = None
_discarded: Any = None
if is_on():
    try:
        _start_recording()
    except Exception:  # a Python without ctypes, or another libc: the program continues without a record
        _directory = None
