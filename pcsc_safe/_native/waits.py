"""SCardGetStatusChange: a wait for events, which can consist of several native calls.

A wait has a native context to itself.  A fork ends the native call.  The wait continues in the parent, on another
native context and with the rest of its timeout.  The caller gets the same result as from one native call: an event
between two native calls is reported, too.  SCardCancel ends the whole wait, once.

A child has none of its parent's waits.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

from .._core.calls import STALE
from .._core.failures import is_ours
from .._core.in_flight import client_has_hung_up
from .._core.library import SUCCESS
from .._core.reader_states import CANCELLED, CHANGED, INFINITE, TIMED_OUT, UNKNOWN, is_for_new_readers
from .._core.unpatched import get_ident, monotonic
from . import interruptible
from .contexts import NativeContexts, native_contexts_of

__all__ = ["await_change"]

_STATE = 0xFFFF  # the lower half of a reader's state; the upper one counts its events


class Wait:
    """One SCardGetStatusChange, over all its native calls.

    :ivar context: the PC/SC context.
    :ivar thread: the caller's thread.
    :ivar cancelled: whether the application called SCardCancel, or released the context.
    :ivar was_ended: whether a fork, or another thread, requested the end of its native call.
    """

    def __init__(self, context: Any, contexts: NativeContexts, timeout: int, states: Any) -> None:
        self.thread = get_ident()
        self.cancelled = self.was_ended = False
        self.context = context
        self._contexts: NativeContexts = contexts
        self._states = states
        self._deadline = None if timeout == INFINITE else monotonic() + timeout / 1000
        self._counters_before: Optional[list[Optional[int]]] = None
        self._readers: Optional[list[str]] = None

    def has_spare(self, native: Any) -> bool:
        """Whether there is another native context on which the wait can continue."""
        # If these are no longer those of the PC/SC context, it continues on others.
        is_current = self._contexts.is_current(self.context)
        return not is_current or self._contexts.ensure_spare(self.context, native) == SUCCESS

    def begin(self) -> None:
        """Note the readers, if this wait is for changes of their list; libpcsclite counts them again at each call."""
        self._readers = self._list_readers()

    def step(self) -> Any:
        """Wait in the native library, until there is an event or the native call is ended.

        :return: the result; None to continue; :data:`STALE` if this process no longer owns the context.
        """
        # Also before a wait in another thread, which is not needed for an event that has already happened.
        if self._counters_before is not None or interruptible.is_wanted(self._remaining()):
            event = self._find_missed_event()
            if event is not None:
                return event if event is STALE or event[0] != SUCCESS else self._confirm(event)
        self.was_ended = False
        result = self._contexts.wait(self.context, self, self._remaining(), self._states)
        if result is STALE:
            return None if self.cancelled else STALE
        hresult = result[0]
        if hresult == SUCCESS:
            return self._confirm(result)
        if hresult == TIMED_OUT and not self._remaining():
            return result
        if self.cancelled:
            return [CANCELLED, result[1]]
        if self.was_ended or hresult == TIMED_OUT:
            self._counters_before = _counters(result[1])
            return None
        return result

    def _confirm(self, result: Any) -> Any:
        """An event, after a second look if it says that there is no such reader.

        pcsc-lite 2.5 has one list of readers for the whole process.  Its content is wrong for a moment when another
        thread has misread an event as a part of it.

        :return: the event; None to continue, if there was none.
        """
        if not any(state & UNKNOWN for _, state, _ in result[1]):
            return result
        now = self._contexts.call(self.context, "SCardGetStatusChange", 0, self._states)
        if now is STALE or now[0] == SUCCESS:
            return now
        return None if now[0] == TIMED_OUT else result  # otherwise there is really no such reader

    def _remaining(self) -> int:
        """The rest of the timeout, in ms."""
        if self._deadline is None:
            return INFINITE
        remaining: float = self._deadline - monotonic()
        return max(0, round(remaining * 1000))

    def _find_missed_event(self) -> Any:
        """The event that happened while this wait was interrupted, or None.

        libpcsclite itself detects a state that differs from the one that the application knows.  If a card was removed
        and inserted again, only the event counter differs; if there is a new reader, nothing differs.
        """
        seen, self._counters_before = self._counters_before, None
        result = self._contexts.call(self.context, "SCardGetStatusChange", 0, self._states)
        if result is STALE or result[0] != TIMED_OUT:
            return result
        counters = _counters(result[1])
        changed = [None not in (before, now) and before != now for before, now in zip(seen or counters, counters)]
        if self._readers is not None and self._readers != self._list_readers():
            changed = [is_for_new_readers(name) or was for (name, *_), was in zip(self._states, changed)]
        if not any(changed):
            return None
        states = [(name, state | CHANGED if was else state, atr) for (name, state, atr), was in zip(result[1], changed)]
        return [SUCCESS, states]

    def _list_readers(self) -> Optional[list[str]]:
        try:
            if not any(is_for_new_readers(name) for name, *_ in self._states):
                return None
        except (AttributeError, TypeError, ValueError) as error:
            if not is_ours(error):
                raise
            return None  # invalid arguments, for which pyscard raises an error
        result = self._contexts.call(self.context, "SCardListReaders", [])
        return None if result is STALE else result[1]


def _counters(states: list[Any]) -> list[Optional[int]]:
    """The event counters that libpcsclite keeps in the upper half of each state; None if it has not looked yet."""
    return [state >> 16 if state & _STATE else None for _, state, _ in states]


def await_change(context: Any, is_owned: Callable[[], bool], timeout: int, states: Any, cancelled: Any) -> Any:
    """SCardGetStatusChange.

    :param context: the PC/SC context, of this process.
    :param is_owned: whether this process still owns it.
    :param timeout: in ms, more than 0.
    :param states: as the application passed them.
    :param cancelled: the result of a wait that the application cancelled before it could begin.
    :return: pyscard's result, or :data:`STALE`.
    """
    contexts = native_contexts_of(context)
    wait = Wait(context, contexts, timeout, states)
    try:
        contexts.waits[wait] = None
        if client_has_hung_up.get()():  # cancelled before it could begin
            return cancelled
        wait.begin()
        while True:
            result = wait.step()
            if not is_owned():
                return STALE
            if result is not None:
                return result
            if wait.cancelled:
                return cancelled
    finally:
        contexts.waits.pop(wait, None)
