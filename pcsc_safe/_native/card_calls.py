"""The path of a call on a card, in as few steps as possible.

A card has a native context to itself.  One step of C takes the context, records the call, makes it, and releases the
context.  If another thread's call is using the context, the same step begins by waiting for it.
At a fork nothing changes here: the child doesn't own its record of the card.
"""

from __future__ import annotations

from functools import partial
from itertools import chain, starmap, takewhile
from operator import add, attrgetter, is_, mul, not_
from typing import Any, Callable, Optional

from .._core import in_flight, process
from .._core.calls import STALE, TRANSACTIONS_BEGUN, FollowUp
from .._core.in_flight import GIVEN, RELEASED, WOKEN, attempt
from .._core.library import SUCCESS
from .._core.one_step import Operation, call_each, consumer, is_not_false
from .._core.unpatched import get_ident, monotonic
from .contexts import native_contexts_of
from .native_context import NativeContext, wait_while_given
from .pyscard import raw
from .releasing import awaiting_release, release_waiting

__all__ = ["card_call"]

_Arguments = tuple[Any, ...]
_Prepare = Callable[[Any, Any, _Arguments], Operation]
_native, _transactions = attrgetter("native"), attrgetter("transactions")


def card_call(function: str, follow_up: Optional[FollowUp]) -> Callable[[Any, _Arguments], Any]:
    """The function that makes a call on a card that this process owns.

    :param function: PC/SC's name.
    :param follow_up: see :meth:`pcsc_safe._core.gateways.NativeGateway.caller`.
    :return: takes the card's record and the arguments after the handle; returns pyscard's result, or :data:`STALE`.
    """
    if follow_up is None:
        return partial(_call, function, raw[function], None)
    return partial(_call_and_note, function, raw[function], follow_up)


def _call_and_note(function: str, native: Any, follow_up: FollowUp, card: Any, arguments: _Arguments) -> Any:
    """Make a call that changes the card's record; it is changed, too, if a signal handler raises after the call."""
    made: list[Any] = []
    note = partial(_note, function, follow_up, card, arguments)
    try:
        result = _call(function, native, partial(_noted, function, made), card, arguments)
        for result in made:
            note(result)
        return result
    except BaseException:
        for result in made:
            note(result)  # perhaps again, which changes nothing more
        raise


def _noted(function: str, made: list[Any], native: Any, card: Any, arguments: _Arguments) -> Operation:
    """The operation that makes a call, adds its result to ``made``, and counts the transactions, which is done once."""
    call = map(made.extend, (starmap(native, ((card.real, *arguments),)),))
    begun = map(mul, map(not_, made), (TRANSACTIONS_BEGUN.get(function, 0),))
    count = map(max, (0,), map(add, map(_transactions, (card,)), begun))
    return consumer.extend, chain(call, map(setattr, (card,), ("transactions",), count))


def _note(function: str, follow_up: FollowUp, card: Any, arguments: _Arguments, result: Any) -> None:
    if function == "SCardDisconnect" and result == SUCCESS:
        card.forget()  # first: another thread that finds the card must find its native context
        place = card.native
        if place is not None:
            place.forget_card(card.real)
        native_contexts_of(card.context).release_idle()
    if not card.released:
        follow_up(card, arguments, result)


def _call(function: str, native: Any, prepare: Optional[_Prepare], card: Any, arguments: _Arguments) -> Any:
    sentinel, closers = process.sentinel, in_flight.closers
    try:
        while True:
            place = card.native
            if place is None:  # as in native_contexts_of()
                return STALE
            if place.waiting:
                place.yield_to_waiters()
            entry = (function, get_ident(), monotonic(), None)
            operation = (native, card.real, *arguments) if prepare is None else prepare(native, card, arguments)
            steps = acquire, enter, leave, release = place.steps
            operations = ((acquire, True, 0), (enter, entry), operation, (leave, entry), (release,))
            whole = takewhile(is_not_false, call_each(operations))
            made: list[Any] = []
            try:
                # From the first of these looks to the call of extend() no other code runs, of this thread or of any
                # other.  Python 3.10 can run some at a jump, so no condition is within another one.
                if (
                    sentinel[0]
                    and card.owner is process.here
                    and card.native is place
                    and place.steps is steps
                    and not (place.state or closers)
                ):
                    made.extend(whole)
            finally:
                try:  # as in in_flight.attempt()
                    if entry in place.calls:
                        try:
                            leave(entry)
                        finally:
                            release()
                finally:
                    results = made[2:3]
            if results:
                place.began = entry[2]
            else:
                results = _call_in_turn(function, card, place, operation)
            if results:
                return results[0]
    finally:
        if awaiting_release:
            release_waiting()


def _call_in_turn(function: str, card: Any, place: NativeContext, operation: Operation) -> list[Any]:
    """Make a call that couldn't be made immediately.

    :return: its result or :data:`STALE` in a list, which is empty if the call must be attempted again.
    """
    if card.owner is not process.current() or place.state in (WOKEN, RELEASED):
        return [STALE]
    if place.state == GIVEN:
        wait_while_given(card.context)
        return []
    is_its = map(is_, map(_native, (card,)), (place,))
    made = attempt(place, card, function, (monotonic,), operation, in_turn=True, needed=is_its)
    if made:
        place.began = made[0]
    return made[1:]
