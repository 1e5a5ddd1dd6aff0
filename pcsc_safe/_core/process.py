"""Which process this is, and how a fork is detected.

Every process of a fork family has an epoch: an object that is compared by identity, because PIDs are reused and a child
in a new PID namespace can have its parent's PID.  Three layers detect that a new epoch has begun:

1. the at-fork hook of CPython, which every ``os.fork()`` runs;
2. on Linux, a page that the kernel wipes in a forked child (MADV_WIPEONFORK).  It also detects a fork made by C code,
   and a child with the same PID;
3. elsewhere, ``os.getpid()``.

The page is the first of four with an advice (``_MARK``) that no other library gives, so that /proc/PID/smaps shows that
a process has pcsc_safe in it.  The advice has no effect on so few pages.  It costs no file descriptor, forked children
inherit it, and it ends with an exec.

Invariant: ``sentinel[0]`` is true only in the process that :data:`here` describes, so a call pays one subscript (33 ns)
for detection.  At a fork the hook only closes what must not stay open.  The new epoch begins with the child's first
call, with or without a hook.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from itertools import starmap
from operator import eq, itemgetter
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol

from .failures import is_ours
from .one_step import call_in_turn, in_one_step
from .unpatched import RLock, get_ident

__all__ = [
    "HANDED_OVER",
    "LOST",
    "QUIESCE",
    "SERVICE_LOST",
    "TRANSFER",
    "WARN",
    "Epoch",
    "after_fork_in_parent",
    "at_fork",
    "before_fork",
    "clear_at_begin",
    "current",
    "forked_by",
    "here",
    "is_here",
    "locks_to_release",
    "process_key",
    "raise_later",
    "ran_hook",
    "sentinel",
]

FORKS = hasattr(os, "register_at_fork")
_MADV_WIPEONFORK = 18  # linux/mman.h, since Linux 4.14
_NO_SUCH_ADVICE = 0x7FFF
_MADV_RANDOM, _MADV_SEQUENTIAL = 1, 2
_MARK = (_MADV_RANDOM, _MADV_SEQUENTIAL, _MADV_RANDOM, _MADV_SEQUENTIAL)  # what the doctor looks for, page by page


_in_child: dict[Callable[[], None], None] = {}
_at_begin: list[Callable[[Epoch], None]] = []
_at_begin_last: list[Callable[[Epoch], None]] = []
_left_in_hook: dict[Callable[[], None], None] = {}  # what the hook of this process has not done yet

LOST = "loss"
"""``noticed_by`` of an epoch that belongs to no process: the owner of what this process had, and has lost."""

SERVICE_LOST = "service"
"""The same, if pcscd has ended, and not a broker."""

HANDED_OVER = "handover"
"""``noticed_by`` of the epoch that stands, in this process, for the child that it has handed over to."""


class Epoch:
    """The life of one process between the fork that made it and those it makes.

    :ivar pid: the PID when the epoch began.
    :ivar number: the number of forks between this process and the process that imported pcsc_safe.
    :ivar noticed_by: the layer that detected its beginning: ``import``, ``hook``, ``page`` or ``pid``.
    :ivar parent: the epoch that it was forked from, or an older ancestor's if the processes between never used PC/SC.
    :ivar unquiet: the call that was inside when this process, or an ancestor, was forked; None after quiet forks.
    """

    __slots__ = ("_left", "_left_in_child", "_successors", "_turn", "noticed_by", "number", "parent", "pid", "unquiet")

    def __init__(self, parent: Optional[Epoch], noticed_by: str, forks: int = 0) -> None:
        self.pid = os.getpid()
        self.number: int = parent.number + forks if parent else 0
        self.noticed_by = noticed_by
        self.parent = parent
        self.unquiet: Any = parent.unquiet if parent else None
        self._turn = RLock()
        self._left_in_child = _left_in_hook if noticed_by == "hook" else dict.fromkeys(_in_child)
        self._left = dict.fromkeys((*_at_begin, *_at_begin_last))
        self._successors: dict[tuple[int, int], Epoch] = {}

    def __repr__(self) -> str:
        return f"<Epoch {self.number} of process {self.pid}, noticed by {self.noticed_by}>"

    def successor(self, noticed_by: str, forks: int) -> Epoch:
        """The one epoch that follows this one in this process, whichever thread asks first."""
        # dict.setdefault is atomic, so no lock is needed that a fork could have caught held.
        return self._successors.setdefault(process_key(), Epoch(self, noticed_by, forks))


def process_key() -> tuple[int, int]:
    """A key that differs from that of every ancestor that could have left its own epoch half begun."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError as error:
        if not is_ours(error):
            raise
        namespace = 0
    return os.getpid(), namespace


if TYPE_CHECKING:  # not at run time, where a Protocol takes each program its part of a millisecond

    class _Sentinel(Protocol):
        """Two values: whether :data:`here` describes this process, and whether it ran the at-fork hook."""

        def __getitem__(self, index: int, /) -> int: ...

        def __setitem__(self, index: int, value: int, /) -> None: ...


class _PidSentinel:
    """Layer 3, for systems that can't wipe a page.

    :ivar set_by: the PID of the process that set each value; 0 if none has.
    """

    def __init__(self) -> None:
        self.set_by = [0, 0]

    def __getitem__(self, index: int, /) -> int:
        return self.set_by[index] == os.getpid()

    def __setitem__(self, index: int, value: int, /) -> None:
        self.set_by[index] = os.getpid() if value else 0


def _wiped_page() -> Optional[_Sentinel]:
    """Layer 2: a page that reads 0 in a forked child, or None if the system can't do that."""
    if not sys.platform.startswith("linux"):
        return None
    import mmap

    try:
        page = mmap.mmap(-1, len(_MARK) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_MADV_WIPEONFORK, 0, mmap.PAGESIZE)
        for number, advice in enumerate(_MARK):
            page.madvise(advice, number * mmap.PAGESIZE, mmap.PAGESIZE)
    except (OSError, ValueError) as error:
        if not is_ours(error):
            raise
        return None
    try:
        page.madvise(_NO_SUCH_ADVICE)
    except (OSError, ValueError) as error:
        if not is_ours(error):
            raise
        return page
    return None  # an emulator that accepts any advice without following it


_HERE, _HOOKED = 0, 1
here = Epoch(None, "import")
_page = _wiped_page()
sentinel: _Sentinel = _page or _PidSentinel()
sentinel[_HERE] = 1


def is_here() -> Iterator[Any]:
    """An iterator of C functions, whose item says whether :data:`here` describes this process then."""
    if isinstance(sentinel, _PidSentinel):
        return map(eq, starmap(os.getpid, ((),)), (sentinel.set_by[_HERE],))
    return map(itemgetter(_HERE), (sentinel,))


_hooks_run = 0  # since here began
forked_by = 0
"""In a child that ran a hook and whose epoch has not begun: the thread that forked."""

locks_to_release: dict[object, Any] = {}
"""Locks to release in a child: the main thread waits for them, and their holder doesn't exist in the child."""

raise_later: Optional[Callable[[int, BaseException], None]] = None
"""Raises an exception in a thread, after its fork; set by :mod:`gate`."""

_before: dict[int, Optional[Callable[[], None]]] = {}
_ATTEMPTS = 3


QUIESCE, TRANSFER, WARN = range(3)
"""The order in which a parent does what it does before a fork."""


def before_fork(turn: int, function: Optional[Callable[[], None]]) -> None:
    """Set a function that is called in the parent before every fork that runs hooks.

    It should do as little as possible, and should not be set if it has nothing to do: each page of memory that is
    written to after a fork costs a page fault, 2 us or more, and Python writes to every object that it uses.

    :param turn: when it is called: QUIESCE, TRANSFER or WARN.
    :param function: replaces the one that had this turn; None for no function.
    """
    _before[turn] = function


def after_fork_in_parent(function: Callable[[], None]) -> None:
    """Add a function that is called in the parent after every fork that runs hooks, even if the fork failed.

    An exception of a signal handler can interrupt a function in Python, but not a C function.
    """
    if sys.platform != "win32" and FORKS:
        os.register_at_fork(after_in_parent=function)


def at_fork(
    *,
    in_child: Optional[Callable[[], None]] = None,
    at_begin: Optional[Callable[[Epoch], None]] = None,
    at_begin_last: Optional[Callable[[Epoch], None]] = None,
) -> None:
    """Add functions that are called in every forked child.

    :param in_child: called by the hook, or, after a fork that ran no hook, at the first use of PC/SC.  It should do
        little more than close file descriptors: most children exec immediately.  (The recorder, which runs only if
        asked for, also begins the child's record.)  It is called again if a signal handler raises in it.
    :param at_begin: called at the first use of PC/SC, with the epoch that begins; :data:`here` is then still the
        parent's epoch.  It may replace locks and tables, and must not wait for a lock.  It is called again if a signal
        handler raises in it; and if a handler uses PC/SC in the middle of it, the epoch has begun when it continues.
    :param at_begin_last: the same, but called after all others, including those that are added later.
    """
    if in_child is not None:
        _in_child[in_child] = None
    if at_begin is not None:
        _at_begin.append(at_begin)
    if at_begin_last is not None:
        _at_begin_last.append(at_begin_last)


def clear_at_begin(*tables: Any) -> None:
    """Clear tables of the parent in a child, when the child first uses PC/SC."""

    def clear(epoch: Epoch) -> None:
        for table in tables:
            # Not if the call of a signal handler has begun the epoch in the middle of this: it is the child's by now.
            if here is not epoch:
                table.clear()

    at_fork(at_begin=clear)


def current() -> Epoch:
    """The epoch of this process, which begins with the first call of this function."""
    if not sentinel[_HERE]:
        former = here
        epoch = former.successor("hook" if sentinel[_HOOKED] else "page" if _page else "pid", max(1, _hooks_run))
        # The line above has created this lock in this process, so no thread can have held it at the fork.
        call_in_turn(epoch._turn, lambda: _begin(epoch) if here is former else None)
    return here


def ran_hook() -> bool:
    """Whether this process was forked by a fork that ran Python's hooks."""
    return bool(sentinel[_HOOKED])


def _begin(epoch: Epoch) -> None:
    global _hooks_run, forked_by
    _call(epoch._left_in_child)
    _call(epoch._left, epoch)
    _left_in_hook.clear()
    _hooks_run = forked_by = 0
    # In one step, because a signal handler in between would begin another epoch.
    set_by: Any = sentinel.set_by if isinstance(sentinel, _PidSentinel) else sentinel
    value = 1 if set_by is sentinel else epoch.pid
    in_one_step((globals().__setitem__, "here", epoch), (set_by.__setitem__, _HERE, value))


def _call(left: dict[Callable[..., None], None], *arguments: Any) -> None:
    """Call each of these, and remove it when it has returned, so that what is interrupted is called again."""
    for function in list(left):
        if function in left:  # a signal handler or finalizer that runs in the middle also comes here, and does the rest
            function(*arguments)
            left.pop(function, None)


def _note_fork() -> None:
    global _hooks_run, forked_by
    sentinel[_HERE] = 0
    sentinel[_HOOKED] = 1
    if not _hooks_run:  # its process had used PC/SC itself
        forked_by = get_ident()
        for lock in list(locks_to_release.values()):
            if lock.locked():  # this process's copy, which no other process uses
                lock.release()
    _hooks_run += 1  # last, because this function can be called again


def _hook_in_child() -> None:
    """Do what is left, whatever signal handlers raise; otherwise a session could be left without an owner."""
    raised: list[BaseException] = []
    while _left_in_hook and len(raised) < _ATTEMPTS:
        try:
            _call(_left_in_hook)
        except BaseException as error:
            raised.append(error)
    if raised:
        raise raised[-1]


def _hook_before(turn: int) -> None:
    try:
        function = _before.get(turn)
        if function is not None:
            function()
    except BaseException as error:
        # An exception of a signal handler, such as KeyboardInterrupt.  A hook can't raise it, so the process forks, and
        # the exception is raised after the fork.
        if raise_later is None:
            raise
        raise_later(get_ident(), error)


if sys.platform != "win32" and FORKS:
    for _turn in (WARN, TRANSFER, QUIESCE):  # Python calls the last one first, whatever the others raise
        os.register_at_fork(before=partial(_hook_before, _turn))
    for _function in (
        _left_in_hook.clear,  # C functions, which nothing can interrupt
        partial(_left_in_hook.setdefault, _note_fork),
        partial(_left_in_hook.update, _in_child),
        _hook_in_child,
        _hook_in_child,  # in case that a signal handler raises before its first line, or in the middle of its except
    ):
        os.register_at_fork(after_in_child=_function)
