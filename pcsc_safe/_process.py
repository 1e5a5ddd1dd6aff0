"""Which process this is, and how a fork is noticed.

Every process of a fork family lives in an epoch of its own: an object, compared by identity, since PIDs are reused and
a child in a new PID namespace can have its parent's.  Three layers notice that a new one has begun:

1. the at-fork hook of CPython, which every ``os.fork()`` runs;
2. on Linux, a page that the kernel wipes in a forked child (MADV_WIPEONFORK): it also sees a fork made by C code, and a
   child with the same PID;
3. elsewhere, ``os.getpid()``.

Invariant: ``sentinel[0]`` is true only in the process that :data:`here` describes, so one subscript (33 ns) is all that
a call pays for detection.  At a fork the hook, or the first caller of :func:`current`, begins a new epoch and runs the
callbacks of :func:`at_fork`, which may assign and close, nothing else.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, Callable, Optional, Protocol

__all__ = ["Epoch", "at_fork", "current", "here", "sentinel"]

FORKS = hasattr(os, "register_at_fork")
_MADV_WIPEONFORK = 18  # linux/mman.h, since Linux 4.14
_NO_SUCH_ADVICE = 0x7FFF


class Epoch:
    """The life of one process between the fork that made it and those it makes.

    :ivar pid: the PID it had when the epoch began.
    :ivar number: how many forks lie between it and the process that imported pcsc_safe.
    :ivar noticed_by: the layer that noticed its beginning: ``import``, ``hook``, ``page`` or ``pid``.
    :ivar parent: the epoch that it was forked from.
    :ivar unquiet: who was inside the native library when it, or an ancestor, was forked; None after a quiet fork.
    """

    __slots__ = ("_lock", "_successors", "noticed_by", "number", "parent", "pid", "unquiet")

    def __init__(self, parent: Optional[Epoch], noticed_by: str) -> None:
        self.pid = os.getpid()
        self.number: int = parent.number + 1 if parent else 0
        self.noticed_by = noticed_by
        self.parent = parent
        self.unquiet: Any = parent.unquiet if parent else None
        self._lock = threading.Lock()
        self._successors: dict[tuple[int, int], Epoch] = {}

    def __repr__(self) -> str:
        return f"<Epoch {self.number} of process {self.pid}, noticed by {self.noticed_by}>"

    def successor(self, noticed_by: str) -> Epoch:
        """The one epoch that follows this one in this very process, whichever thread asks first."""
        # dict.setdefault is atomic, so no lock is needed that a fork could have caught held.
        return self._successors.setdefault(_process_key(), Epoch(self, noticed_by))


def _process_key() -> tuple[int, int]:
    """What tells this process from every ancestor that could have left its own epoch half begun."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return os.getpid(), namespace


class _Sentinel(Protocol):
    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class _PidSentinel:
    """Layer 3, where no page is wiped."""

    def __getitem__(self, index: int, /) -> int:
        return os.getpid() == here.pid

    def __setitem__(self, index: int, value: int, /) -> None:
        pass


def _wiped_page() -> Optional[_Sentinel]:
    """Layer 2: a page that reads 0 in a forked child, or None where there is no such thing."""
    if not sys.platform.startswith("linux"):
        return None
    import mmap

    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_MADV_WIPEONFORK)
    except (OSError, ValueError):
        return None
    try:
        page.madvise(_NO_SUCH_ADVICE)
    except (OSError, ValueError):
        return page
    return None  # an emulator that accepts any advice, and so follows none


here = Epoch(None, "import")
_page = _wiped_page()
sentinel: _Sentinel = _page or _PidSentinel()
sentinel[0] = 1
_callbacks: list[Callable[[Epoch], None]] = []
_before: list[Callable[[], None]] = []
_in_parent: list[Callable[[], None]] = []


def at_fork(
    in_child: Callable[[Epoch], None],
    *,
    before: Optional[Callable[[], None]] = None,
    in_parent: Optional[Callable[[], None]] = None,
) -> None:
    """Have ``in_child(epoch)`` run in every new process, before anything else of ours does.

    It runs in the at-fork hook, or, after a fork that ran none, before the first call; :data:`here` is then still the
    epoch that was forked from.  It may assign and close, nothing else: most children exec at once.

    :param in_child: called with the epoch that begins.
    :param before: called in the parent before a fork that runs hooks.
    :param in_parent: called there after it, also if it failed.
    """
    _callbacks.append(in_child)
    if before is not None:
        _before.append(before)
    if in_parent is not None:
        _in_parent.append(in_parent)


def current() -> Epoch:
    """The epoch of this process; notices a fork that ran no hook."""
    if not sentinel[0]:
        _begin_unhooked()
    return here


def _begin_unhooked() -> None:
    left = here
    epoch = left.successor("page" if _page else "pid")
    # Made in this process by the line above, so nobody can have held this lock at the fork.
    with epoch._lock:
        if here is left:
            _begin(epoch)


def _begin_hooked() -> None:
    _begin(Epoch(here, "hook"))


def _begin(epoch: Epoch) -> None:
    global here
    for callback in _callbacks:
        callback(epoch)
    here = epoch
    sentinel[0] = 1


def _run(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()


if FORKS:
    os.register_at_fork(
        before=lambda: _run(_before), after_in_parent=lambda: _run(_in_parent), after_in_child=_begin_hooked
    )
