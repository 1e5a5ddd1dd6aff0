"""The calls that are inside the native library, and the gate that a fork closes before it.

libpcsclite has locks of its own.  A child that was forked while another thread held one hangs in its first call, for
ever; so a fork waits until nobody is inside (it is *quiet*), at most for :data:`quiesce_timeout`, and keeps newcomers
out meanwhile.  Threads that wait for events are cancelled, again and again until they are out: a cancel that comes
before the wait has begun is lost.  :mod:`_turns` sends them back in afterwards.

Invariant: a thread is in :data:`inside` while it is in the native library, and only then.  The child judges by its copy
of that table whether its fork was quiet, so a fork that ran no hook is judged too.  An unquiet child never enters the
native library.  Nothing here stays closed or held in a child: it gets a new gate.
"""

import threading
import time
from _thread import _count as _count_threads  # of Python's threads, without the main one
from _thread import interrupt_main
from typing import NamedTuple, Optional, Protocol

from . import _process

__all__ = ["InFlight", "Unquiet", "closers", "inside", "leave", "run", "through", "wake"]


class Interruptible(Protocol):
    """A wait for events, as a fork sees it."""

    def interrupt(self) -> None:
        """Have it leave the native library, for now."""


InFlight = tuple[str, float, Optional[Interruptible]]
"""A call that is inside: PC/SC's name, ``time.monotonic()`` when it began, and what to interrupt if it is a wait."""


class Unquiet(NamedTuple):
    """Why a process cannot use the native library: who was inside when it was forked.

    :ivar function: PC/SC's name of the call.
    :ivar thread: the name of the thread, or its number where the name could not be had.
    :ivar seconds: how long it had been inside.
    """

    function: str
    thread: str
    seconds: float


quiesce_timeout = 1.0
"""How long a fork waits, in seconds; set by :func:`pcsc_safe.configure`."""

inside: dict[int, InFlight] = {}
"""Who is inside, by the thread's identifier."""

closers: dict[int, bool] = {}
"""The threads that are about to fork. While there are any, nobody else may enter."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02
_changed = threading.Condition()
_waiting: list[None] = []  # one for each thread that is kept out
_thread_names: dict[int, str] = {}
_interrupted: set[int] = set()


def through(ident: int, entry: InFlight) -> None:
    """Enter, as soon as no fork is pending; for a thread that has entered itself in :data:`inside` and found it closed.

    A thread that is itself forking passes: it may be in another library's hook, and it can't be inside at the fork.
    """
    while closers and ident not in closers:
        with _changed:
            inside.pop(ident, None)
            _changed.notify_all()
            _waiting.append(None)
            try:
                while closers:
                    _changed.wait()
            finally:
                _waiting.pop()
        inside[ident] = entry


def leave(ident: int, before: Optional[InFlight]) -> None:
    """Leave.

    :param before: what the thread was in when it entered: a finalizer may make a call in the middle of another.
    """
    if before is None:
        inside.pop(ident, None)
    else:
        inside[ident] = before
    if closers:
        wake()


def wake() -> None:
    """Have a pending fork look again whether it is quiet."""
    with _changed:
        _changed.notify_all()


class run:  # noqa: N801  # a function in all but that it is a context manager
    """``with run("SCardConnect"):`` marks the block as being inside the native library."""

    __slots__ = ("_before", "_entry", "_ident")

    def __init__(self, function: str, wait: Optional[Interruptible] = None) -> None:
        self._entry = (function, time.monotonic(), wait)

    def __enter__(self) -> None:
        self._ident = threading.get_ident()
        self._before = inside.get(self._ident)
        inside[self._ident] = self._entry
        if closers:
            through(self._ident, self._entry)

    def __exit__(self, *error: object) -> None:
        leave(self._ident, self._before)


def _others(ident: int) -> list[InFlight]:
    return [entry for thread, entry in list(inside.items()) if thread != ident]


def _before_fork() -> None:
    if inside or _count_threads():
        _close()


def _close() -> None:
    if not _process.sentinel[0]:
        return  # a child that never used PC/SC: whoever is in the table was inside in its parent
    ident = threading.get_ident()
    closers[ident] = True
    if not _others(ident):
        return
    try:
        _quiesce(ident, time.monotonic() + quiesce_timeout)
    except KeyboardInterrupt:
        # A hook can't raise. The fork goes on at once, and the interrupt comes after it.
        _interrupted.add(ident)
    if _others(ident):
        _thread_names.update({thread.ident or 0: thread.name for thread in threading.enumerate()})


def _quiesce(ident: int, deadline: float) -> None:
    """Wait until nobody else is inside, or time is up."""
    interrupter = None
    try:
        while _others(ident) and time.monotonic() < deadline:
            if interrupter is None and any(wait for _, _, wait in _others(ident)):
                interrupter = _Interrupter(ident)
                interrupter.start()
            with _changed:
                if _others(ident):
                    _changed.wait(min(_LONGEST_PAUSE, max(0.0, deadline - time.monotonic())))
    finally:
        if interrupter is not None:
            interrupter.stop()


class _Interrupter(threading.Thread):
    """Interrupts the waits for events.

    In a thread of its own, since SCardCancel asks pcscd, which may not answer, and a fork waits no longer than it says.
    """

    def __init__(self, forking: int) -> None:
        super().__init__(name="pcsc_safe interrupter", daemon=True)
        self._forking = forking
        self._stopped = False

    def run(self) -> None:
        """Interrupt whoever waits, until stopped."""
        pause = _FIRST_PAUSE
        while True:
            for _, _, wait in _others(self._forking):
                if wait is None:
                    continue
                with _changed:
                    if self._stopped:
                        return
                    inside[threading.get_ident()] = ("SCardCancel", time.monotonic(), None)
                try:
                    wait.interrupt()
                finally:
                    leave(threading.get_ident(), None)
            with _changed:
                _changed.wait(pause)
                if self._stopped:
                    return
            pause = min(2 * pause, _LONGEST_PAUSE)

    def stop(self) -> None:
        """Begin no other SCardCancel."""
        with _changed:
            self._stopped = True
            _changed.notify_all()


def _open() -> None:
    ident = threading.get_ident()
    closers.pop(ident, None)
    if _waiting:
        wake()
    if ident in _interrupted:
        _interrupted.discard(ident)
        interrupt_main()


def _after_fork_in_child() -> None:
    if inside:
        inside.pop(threading.get_ident(), None)  # the fork was made in the middle of a call, by a finalizer


def _begin(epoch: _process.Epoch) -> None:
    """Judge whether the fork was quiet, and make a new gate."""
    global _changed
    ident = threading.get_ident()
    others = [(thread, entry) for thread, entry in inside.items() if thread != ident]
    if others:
        thread, (function, since, _) = others[0]
        epoch.unquiet = Unquiet(function, _thread_names.get(thread, str(thread)), time.monotonic() - since)
    for table in (inside, closers, _interrupted, _thread_names, _waiting):
        table.clear()
    _changed = threading.Condition()


_process.around_fork(_before_fork, _open, closers)
_process.at_fork(in_child=_after_fork_in_child, at_begin=_begin)
