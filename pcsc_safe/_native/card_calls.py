"""The path of a call on a card, in as few steps as possible.

A card has a native context to itself.  One step of C takes the context, records the call, makes it, and gives the
context back.  At a fork nothing changes here: the child doesn't own its record of the card.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any, Callable

from .._core import gate, in_flight, one_step, process, readiness
from .._core.calls import STALE
from .._core.in_flight import GIVEN, RELEASED, WOKEN
from .._core.library import SUCCESS
from .._core.unpatched import count_threads, get_ident, monotonic
from .contexts import behind, discard, doomed, sweep
from .native_context import NativeContext, wait_until_given
from .pyscard import raw

__all__ = ["card_call"]


def card_call(function: str) -> Callable[[Any, tuple[Any, ...]], Any]:
    """The function that makes a call on a card that this process owns.

    :param function: PC/SC's name.
    :return: takes the card's record and the arguments after the handle; returns pyscard's result, or :data:`STALE`.
    """
    native, sentinel, closers = raw[function], process.sentinel, in_flight.closers
    unbinds = function == "SCardDisconnect"
    is_not_false, called = one_step.is_not_false, one_step.called

    def call(card: Any, arguments: tuple[Any, ...]) -> Any:
        if not readiness.is_ready and count_threads():
            readiness.prepare()
        may_pass = False
        while True:
            place = card.native
            if place is None:  # as in behind()
                return STALE
            if place.waiting:
                place.give_way()
            entry = (function, get_ident(), monotonic(), None)
            steps: list[Any] = []
            operation = (native, card.real, *arguments)
            operations = ((place.acquire, False), (place.enter, entry), operation, (place.release,), (place.leave,))
            chain = takewhile(is_not_false, called(operations))
            # As in in_flight.attempt().
            try:
                if (
                    (may_pass or not closers)
                    and not place.state
                    and sentinel[0]
                    and card.owner is process.here
                    and card.native is place
                ):
                    steps.extend(chain)
            except BaseException:
                if steps and steps[-1] is not entry:
                    try:
                        place.leave()
                    finally:
                        place.release()
                raise
            if steps:
                break
            if card.owner is not process.current() or place.state in (WOKEN, RELEASED):
                return STALE
            may_pass = _wait_for_card(place, may_pass)
        place.began = entry[2]
        if unbinds and steps[2] == SUCCESS:
            discard(place.cards, card.real)
            behind(card.context).tidy()
        if doomed:
            sweep()
        return steps[2]

    return call


def _wait_for_card(place: NativeContext, may_pass: bool) -> bool:
    if place.state != GIVEN:
        return gate.wait_for(place, may_pass)
    wait_until_given([place])
    return may_pass
