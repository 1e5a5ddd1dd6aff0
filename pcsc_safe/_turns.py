"""Whose turn it is on a context.

libpcsclite lets one thread at a time use a context, and a thread that has to wait for it does so holding the lock of
the whole process: one thread that waits for events then freezes every other, SCardCancel included.  So the calls on a
context take turns here.  A wait for events gives way to any other call and to a fork, and goes on afterwards with the
time that was left, without its caller noticing; an SCardCancel of the application's own still arrives, once.

Invariant: at most one thread is in the native library with a context, not counting SCardCancel and SCardIsValidContext,
which libpcsclite answers without that context's lock.  A child gets new turns; nobody who waited is there any more.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Optional

from . import _gate, _native

__all__ = ["Turn", "await_change", "cancel"]

CANCELLED: int = _native.public["SCARD_E_CANCELLED"]
TIMED_OUT: int = _native.public["SCARD_E_TIMEOUT"]
INFINITE: int = _native.public["INFINITE"]
_CHANGED: int = _native.public["SCARD_STATE_CHANGED"]
_NEW_READERS = "\\\\?pnp?\\notification"  # pcsc-lite: a change in the list of readers
_SLICE = 100  # ms; how long one of several waits on a context has it
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.05  # s


class Turn:
    """The turn on one context.

    :ivar lock: held by the thread whose turn it is.
    :ivar waits: the waits for events on this context, as their callers see it.
    :ivar current: the one among them that is in the native library, or about to be.
    """

    __slots__ = ("_wanted", "current", "lock", "waits")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waits: list[Wait] = []
        self.current: Optional[Wait] = None
        self._wanted: list[None] = []  # one for each thread in take(); append and pop are atomic

    @property
    def wanted(self) -> bool:
        """Whether somebody is waiting for the turn who does not wait for events."""
        return bool(self._wanted)

    def take(self) -> None:
        """Get the turn, as soon as the call that has it ends; a wait for events is interrupted."""
        self._wanted.append(None)
        try:
            pause = _FIRST_PAUSE
            while not self.lock.acquire(timeout=pause):
                current = self.current
                if current is not None:
                    with _gate.run("SCardCancel"):
                        current.interrupt()
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            self._wanted.pop()


class Wait:
    """One SCardGetStatusChange, over all its interruptions.

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
        "cancelled",
    )

    def __init__(self, native: Callable[..., Any], real: int, timeout: int, states: list[Any]) -> None:
        self._native = native
        self._real = real
        self._states = states
        self._deadline = None if timeout == INFINITE else time.monotonic() + timeout / 1000
        self._interrupted = False
        self._interrupting: list[None] = []  # one for each thread in interrupt(); append and pop are atomic
        self._seen: Optional[list[int]] = None
        self._readers = self._list_readers()
        self.cancelled = False

    def interrupt(self) -> None:
        """Have it leave the native library, for now."""
        self._interrupting.append(None)
        try:
            _native.functions["SCardCancel"](self._real)
        finally:
            # Before the other: who is cancelled must at any moment find one of them.
            self._interrupted = True
            self._interrupting.pop()

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
        interrupted = bool(self._interrupting) or self._interrupted
        self._interrupted = False
        if result[0] == CANCELLED and interrupted and not self.cancelled:
            self._seen = _counters(result[1])
            return None
        if result[0] == TIMED_OUT and self._left() > 0:
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
        if result[0] != TIMED_OUT:
            return result
        counters = _counters(result[1])
        changed = [before != now for before, now in zip(seen or [], counters)]
        if self._readers is not None and self._readers != self._list_readers():
            changed = [name.lower() == _NEW_READERS or was for (name, *_), was in zip(self._states, changed)]
        if not any(changed):
            return None
        states = [
            (name, state | _CHANGED if was else state, atr) for (name, state, atr), was in zip(result[1], changed)
        ]
        return [_native.SUCCESS, states]

    def _list_readers(self) -> Optional[list[str]]:
        """The readers, if this wait is for changes of their list; libpcsclite counts them anew at each entry."""
        try:
            if not any(name.lower() == _NEW_READERS for name, *_ in self._states):
                return None
        except (AttributeError, TypeError, ValueError):
            return None  # not what SCardGetStatusChange takes; pyscard has its own words for it
        readers: list[str] = _native.functions["SCardListReaders"](self._real, [])[1]
        return readers


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
    turn.take()
    try:
        with _gate.run(function):
            if not alive():
                return None
            wait = Wait(_native.functions[function], real, timeout, states)
        turn.waits.append(wait)
    finally:
        turn.lock.release()
    try:
        while True:
            with turn.lock:
                turn.current = wait
                try:
                    # Looked at after current was set: who wants the turn sets the one and looks at the other.
                    if not turn.wanted:
                        with _gate.run(function, wait):
                            if wait.cancelled:
                                return cancelled
                            result = wait.step(alone=len(turn.waits) == 1) if alive() else None
                        if result is not None or not alive():
                            return result
                finally:
                    turn.current = None
            time.sleep(_FIRST_PAUSE)  # whoever wants the turn has it now
    finally:
        turn.waits.remove(wait)


def cancel(turn: Turn, real: int) -> Any:
    """SCardCancel: ends every wait for events on the context, also one that has given way just now.

    :return: pyscard's answer.
    """
    waits = list(turn.waits)
    for wait in waits:
        wait.cancelled = True
    function = "SCardCancel"
    if not waits:
        with _gate.run(function):
            return _native.functions[function](real)
    pause = _FIRST_PAUSE
    while turn.current in waits:
        with _gate.run(function):
            _native.functions[function](real)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return _native.SUCCESS
