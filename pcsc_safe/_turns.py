"""Whose turn it is on a context.

libpcsclite lets one thread at a time use a context, and a thread that has to wait for it does so holding the lock of
the whole process: one thread that waits for events then freezes every other, SCardCancel included.  So the calls on a
context take turns here.  A wait for events gives way to any other call and to a fork, and goes on afterwards with the
time that was left, without its caller noticing; an SCardCancel of the application's own still arrives, once.

A wait holds no lock while it waits; who has the turn evicts it.

A call that waits for the end of another process's transaction has its turn meanwhile, and that process may be waiting
for the end of one of ours.  libpcsclite makes such a call again and again, and between two tries it sleeps without its
lock; so while this process is in a transaction, other calls pass a sleeping one (:func:`place`).

Invariant: at most one thread is in the native library with a context and has its turn; beside it are only those that
passed one that slept, perhaps a little longer than that one, and SCardCancel and SCardIsValidContext, which libpcsclite
answers without that context's lock.  A child gets new turns; nobody who waited is there any more.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any, Callable, Optional

from . import _gate, _native
from ._pyscard import SUCCESS, constant

__all__ = [
    "BESIDE",
    "CANCELLED",
    "CHANGED",
    "INFINITE",
    "RETRIED",
    "TIMED_OUT",
    "NoTurn",
    "Turn",
    "await_change",
    "cancel",
    "is_for_new_readers",
    "place",
]

RETRIED = frozenset(("SCardBeginTransaction", "SCardReconnect", "SCardStatus", "SCardTransmit"))
"""What libpcsclite makes again and again while another handle has the reader in a transaction (winscard_clnt.c)."""

CANCELLED: int = constant("SCARD_E_CANCELLED")
TIMED_OUT: int = constant("SCARD_E_TIMEOUT")
INFINITE: int = constant("INFINITE")
CHANGED: int = constant("SCARD_STATE_CHANGED")
_NEW_READERS = "\\\\?pnp?\\notification"  # pcsc-lite: a change in the list of readers
_SLICE = 100  # ms; how long one of several waits on a context has it
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02  # s
_BETWEEN_SLICES = 0.003  # s; longer than who waits for the turn pauses
_LOOK_AFTER = 0.01  # s; whether who has the turn sleeps
_LONG = 0.5  # s; what is in a call for so long is thought to sleep where that can't be seen

BESIDE: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
"""The place of a call that passes one that sleeps; nothing is held there."""


class Turn:
    """The turn on one context.

    :ivar lock: held by the thread whose turn it is; not by one that waits for events.
    :ivar waits: the waits for events on this context, as their callers see it.
    :ivar current: the one among them that is in the native library, or about to be; set with the lock held.
    :ivar is_given: the context is about to be another process's, so no wait enters; whoever sets it holds the lock, and
        then looks whether one is inside.
    :ivar passing: the threads that have passed it, by number; beside them no wait for events enters, for whose end they
        would wait with the lock of the whole process.
    :ivar retrying: the thread that has the turn for a call that libpcsclite may make again and again, or 0.
    :ivar cancels: how often the application has called SCardCancel.
    :ivar outlasting: the threads whose waits go on although pcscd was gone meanwhile.
    """

    __slots__ = ("cancels", "current", "is_given", "lock", "outlasting", "passing", "retrying", "waits")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waits: list[Wait] = []
        self.current: Optional[Wait] = None
        self.is_given = False
        self.passing: set[int] = set()
        self.retrying = 0
        self.cancels = 0
        self.outlasting: list[int] = []

    def evict(self) -> None:
        """Have the wait for events leave the native library; it can't come back while the caller holds the lock."""
        pause = _FIRST_PAUSE
        while True:
            current = self.current
            # One of this very thread's is below us: we are in a signal handler or a finalizer. And at interpreter exit
            # the thread of a wait may be one that never runs again.
            if current is None or current.thread == threading.get_ident() or sys.is_finalizing():
                return
            _gate.enter("SCardCancel", current.interrupt)
            if self.current is current:  # cancelled before it had begun
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)


class NoTurn(Turn):
    """At interpreter exit: threads that hold a turn may never run again, so nobody waits for one."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        self.lock = contextlib.nullcontext()  # type: ignore[assignment]  # it is entered and left, no more


def place(turn: Turn) -> tuple[contextlib.AbstractContextManager[Any], bool]:
    """Where a call is made that may be beside one that sleeps.

    What is entered is no context manager written in Python: a signal handler that raises would leave the turn held.

    :return: the turn's lock, or what holds nothing; and whether that lock is held already, to be released once inside.
    """
    # Who has the turn already is in a signal handler or a finalizer, and gets it once more.
    if isinstance(turn, NoTurn) or turn.lock._is_owned():  # type: ignore[attr-defined]  # as threading.Condition asks it
        return turn.lock, False
    try:
        held = turn.lock.acquire(blocking=False)
        while not held:
            if _sleeps(turn.retrying):
                return BESIDE, False
            held = turn.lock.acquire(timeout=_LOOK_AFTER)
        return turn.lock, True
    except BaseException:  # a signal handler's, and the lock may be ours by now
        if turn.lock._is_owned():  # type: ignore[attr-defined]
            turn.lock.release()
        raise


def _sleeps(ident: int) -> bool:
    """Whether a thread sleeps in the native library, as libpcsclite does between two tries."""
    entry = _gate.inside.get(ident)
    if entry is None or entry[0] not in RETRIED:
        return False
    # One that threading doesn't know, as C code's, has none.
    native_id = next((thread.native_id for thread in threading.enumerate() if thread.ident == ident), None)
    try:
        with open(f"/proc/self/task/{native_id}/wchan", encoding="ascii") as file:
            where = file.read()
    except OSError:
        where = "0"
    # "0" says that it runs, or that this kernel doesn't tell.
    return "nanosleep" in where if where != "0" else time.monotonic() - entry[1] > _LONG


class Wait:
    """One SCardGetStatusChange, over all its interruptions.

    :ivar thread: that of its caller.
    :ivar cancelled: the application called SCardCancel meanwhile.
    """

    __slots__ = (
        "_deadline",
        "_interrupted",
        "_interrupting",
        "_native",
        "_readers",
        "_real",
        "_seen",
        "_states",
        "_turn",
        "cancelled",
        "thread",
    )

    def __init__(self, turn: Turn, native: Callable[..., Any], real: int, timeout: int, states: list[Any]) -> None:
        self.thread = threading.get_ident()
        self._turn = turn
        self._native = native
        self._real = real
        self._states = states
        self._deadline = None if timeout == INFINITE else time.monotonic() + timeout / 1000
        self._interrupted = False
        self._interrupting: list[None] = []  # one for each thread in interrupt(); append and pop are atomic
        self._seen: Optional[list[int]] = None
        self._readers = self._list_readers()
        self.cancelled = False

    def interrupt(self) -> Any:
        """SCardCancel, if this wait is in the native library.

        :return: pyscard's answer; None if there was nothing to cancel.
        """
        self._interrupting.append(None)
        try:
            # Looked at after the other was set, and settle() does it the other way round: no cancel outlives its wait.
            if self._turn.current is not self:
                return None
            self._interrupted = True
            return _native.functions["SCardCancel"](self._real)
        finally:
            self._interrupting.pop()

    def settle(self, before: Optional[Wait]) -> None:
        """Leave, when nobody is about to cancel this wait any more; the next one must not be hit.

        :param before: the wait of this very thread in the middle of which this one was made, by a signal handler.
        """
        if self._turn.current is self:
            self._turn.current = before
        while self._interrupting:
            time.sleep(_FIRST_PAUSE)
        self._interrupted = False

    def step(self, alone: bool) -> Any:
        """Wait in the native library, for as long as nobody interrupts.

        :param alone: no other wait is on this context; else this one is short.
        :return: the answer, or None to go on with later.
        """
        if self._seen is not None:
            missed = self._missed()
            if missed is not None:
                return missed
        left = self._left()
        result = self._native(self._real, left if alone else min(left, _SLICE), self._states)
        gives_way = result[0] == CANCELLED and self._interrupted and not self.cancelled
        if gives_way or (result[0] == TIMED_OUT and self._left() > 0):
            self._seen = _counters(result[1])
            return None
        return result

    def _left(self) -> int:
        """What is left of the timeout, in ms."""
        if self._deadline is None:
            return INFINITE
        return max(0, round((self._deadline - time.monotonic()) * 1000))

    def _missed(self) -> Any:
        """The event that came while this wait was interrupted, or None.

        libpcsclite itself finds a state that differs from the one that the application knows.  A card that was taken
        out and put back differs in its event counter only, and new readers in nothing.
        """
        seen, self._seen = self._seen, None
        result = self._native(self._real, 0, self._states)
        while result[0] == CANCELLED and not self.cancelled:  # by who wants the turn
            result = self._native(self._real, 0, self._states)
        if result[0] != TIMED_OUT:
            return result
        counters = _counters(result[1])
        changed = [before != now for before, now in zip(seen or [], counters)]
        if self._readers is not None and self._readers != self._list_readers():
            changed = [is_for_new_readers(name) or was for (name, *_), was in zip(self._states, changed)]
        if not any(changed):
            return None
        states = [(name, state | CHANGED if was else state, atr) for (name, state, atr), was in zip(result[1], changed)]
        return [SUCCESS, states]

    def _list_readers(self) -> Optional[list[str]]:
        """The readers, if this wait is for changes of their list; libpcsclite counts them anew at each entry."""
        try:
            if not any(is_for_new_readers(name) for name, *_ in self._states):
                return None
        except (AttributeError, TypeError, ValueError):
            return None  # not what SCardGetStatusChange takes; pyscard has its own words for it
        readers: list[str] = _native.functions["SCardListReaders"](self._real, [])[1]
        return readers


def is_for_new_readers(name: str) -> bool:
    """Whether it is not a reader, but stands for their list."""
    return name.lower() == _NEW_READERS


def _counters(states: list[Any]) -> list[int]:
    """The event counters that libpcsclite keeps in the upper half of each state."""
    return [state >> 16 for _, state, _ in states]


def await_change(turn: Turn, alive: Callable[[], bool], real: int, timeout: int, states: Any, cancelled: Any) -> Any:
    """SCardGetStatusChange that gives way to other calls and to forks.

    :param turn: that on the context; not held by the caller.
    :param alive: whether the context is still this process's; asked last before the native library is entered.
    :param real: the native context.
    :param timeout: in ms, more than 0.
    :param states: as the application gave them.
    :param cancelled: the answer to a wait that the application cancelled before it could begin.
    :return: pyscard's answer, or None if the context is not alive.
    """
    function = "SCardGetStatusChange"
    native = _native.functions[function]
    with turn.lock:
        if turn.current is not None:
            turn.evict()
        wait = _gate.enter(function, lambda: Wait(turn, native, real, timeout, states) if alive() else None)
    if wait is None:
        return None

    def step() -> Any:
        if wait.cancelled:
            return cancelled
        is_free = not turn.is_given and not turn.passing
        return wait.step(alone=len(turn.waits) == 1) if alive() and is_free else None

    try:
        turn.waits.append(wait)
        while alive():
            before = None
            try:
                with turn.lock:
                    before = turn.current
                    mine = before is None or before.thread == wait.thread
                    if mine:
                        turn.current = wait
                result = _gate.enter(function, step, wait=wait) if mine else None
            finally:
                wait.settle(before)
            if result is not None and alive():  # else a signal handler has forked since, and this is the child
                return result
            if len(turn.waits) > 1 or turn.passing:
                time.sleep(_BETWEEN_SLICES if mine else _FIRST_PAUSE)
        return None
    finally:
        if wait in turn.waits:
            turn.waits.remove(wait)


def cancel(turn: Turn, real: int, thread: Optional[int] = None) -> Any:
    """SCardCancel: ends every wait for events on the context, also one that has given way just now.

    :param thread: only the waits of this thread.
    :return: pyscard's answer.
    """
    function, waits = "SCardCancel", [wait for wait in turn.waits if thread in (None, wait.thread)]
    for wait in waits:
        wait.cancelled = True
    if not waits and thread is None:
        return _gate.enter(function, _native.functions[function], real)
    pause = _FIRST_PAUSE
    while True:
        current = turn.current
        if current is None or current not in waits or current.thread == threading.get_ident():
            return SUCCESS
        _gate.enter(function, current.interrupt)
        if turn.current is current:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
