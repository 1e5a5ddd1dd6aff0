"""The release of native contexts: at once, or as soon as no thread is in them.

SCardReleaseContext marks the PC/SC context as released, and its native contexts as due, in one step of C.  Then it
releases those that are free.  A thread that is in one of the others releases it after its call, however the call ends.
If a signal handler interrupts that, the next call of any thread does it.

A forked child forgets what is due when its epoch begins: its parent releases it.
"""

from __future__ import annotations

from operator import not_
from typing import Any, Callable

from .._core import descriptors, in_flight, process
from .._core.in_flight import GIVEN, OPEN, PAUSE, RELEASED, WOKEN, attempt, closed_for, wait_until_open
from .._core.one_step import call_each, consumer
from .._core.unpatched import get_ident, monotonic, sleep
from .native_context import NativeContext, wait_while_given
from .pyscard import raw

__all__ = ["awaiting_release", "mark_released", "release_native", "release_waiting", "release_when_open"]

_Natives = dict[NativeContext, Any]
_WAKE_TIMEOUT = 1.0  # s; that another thread has to end a wait there

awaiting_release: dict[NativeContext, bool] = {}
"""Native contexts to be released when no thread is in them; each with whether this is so even if a card is there."""


def mark_released(owned: Any, is_current: Callable[[], bool], established: Callable[[], list[NativeContext]]) -> bool:
    """Mark a PC/SC context as released, and its native contexts as due, in one step.

    No thread can connect there afterwards, and a fork sees it either as it was before, or released.

    :param is_current: whether it is not released, and this process owns it, with these native contexts.
    :param established: its native contexts.
    :return: False if ``is_current`` does.
    """
    while is_current():
        gate = wait_until_open(get_ident())
        due = established()
        if any(context.state == GIVEN for context in due):
            wait_while_given(owned)
            continue
        mark = call_each([(setattr, owned, "released", True), (awaiting_release.update, dict.fromkeys(due, True))])
        # From this look to the end of extend() no other code runs, of this thread or of any other.
        if process.sentinel[0] and owned.owner is process.here and not owned.released and not gate:
            consumer.extend(mark)
            return True
    return False


def release_native(context: NativeContext, natives: _Natives, *, without_cards: bool = True) -> list[Any]:
    """Release a native context, if no thread is in it.

    :param natives: from which it is removed.
    :param without_cards: not if it has a card.
    :return: as of :func:`in_flight.attempt`.
    """
    ident = get_ident()
    # At interpreter exit places are not locked, and a thread that is inside may be there for long.
    if any(call[1] != ident for call in list(context.calls)):
        return []  # it is released with what is surplus next
    return attempt(
        context,
        context,
        "SCardReleaseContext",
        (raw["SCardReleaseContext"], context.handle),
        (setattr, context, "state", RELEASED),
        (natives.pop, context, None),
        (in_flight.places.pop, context, None),
        (descriptors.guarded.pop, context.descriptor, None),
        latest_state=WOKEN,
        needed=map(not_, [context.wakers, context.cards] if without_cards else [context.wakers]),
    )


def release_when_open(context: NativeContext, natives: _Natives) -> list[Any]:
    """Release a native context that nobody needs, when no thread is about to fork; not if a thread is in it."""
    deadline = monotonic() + _WAKE_TIMEOUT
    while not (made := release_native(context, natives, without_cards=False)):
        if context.calls or context.state not in (OPEN, WOKEN) or not context.is_ours() or monotonic() > deadline:
            break  # the thread that is there releases it, or the next call of this process
        if closed_for(get_ident()):
            wait_until_open(get_ident())
            deadline = monotonic() + _WAKE_TIMEOUT
        else:
            sleep(PAUSE)
    return made


def _end_waits(context: NativeContext) -> None:
    """End the waits for events there, unless SCardReleaseContext itself has ended them."""
    for *_, wait in list(context.calls):
        if wait is not None:
            context.cards.clear()
            wait.cancelled = True
            context.wake(wait)


def release_waiting() -> None:
    """Release the native contexts that are no longer needed, and that no thread is in."""
    for context, even_with_cards in list(awaiting_release.items()):
        if context.state != RELEASED and even_with_cards:
            _end_waits(context)
            release_when_open(context, {})
        elif context.state != RELEASED:
            release_native(context, {})
        if context.state == RELEASED or not context.is_ours():
            awaiting_release.pop(context, None)


process.clear_at_begin(awaiting_release)
