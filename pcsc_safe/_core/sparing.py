"""Whether a call may reset or power off a card that another process of the family uses.

By default pyscard powers a card off when it disconnects, and resets it when it reconnects.  In a family of processes
this ends the session of every other process that is connected: the PIN has to be verified again.  So pyscard's defaults
leave such a card alone, whichever process connected first, and whether before or after the fork.  A reset that the
application asks for is done, and logged once.  At a fork nothing changes here.
"""

from __future__ import annotations

from typing import Any, Callable

from . import handles, log, observer, process
from .calls import ByDefault, Call, Kind
from .follow_ups import INVALID_VALUE, REFUSED_CODES
from .handles import Card
from .reestablish import LEAVE_CARD
from .settings import settings

__all__ = ["make_route"]


def make_route(call: Call, direct: Callable[..., Any]) -> Callable[..., Any]:
    """The function that the application calls; its last argument says what happens to the card.

    :param direct: makes the call with the arguments that it gets.
    """

    def route(handle: Any, *arguments: Any) -> Any:
        *most, wanted = arguments
        if wanted == LEAVE_CARD:
            return direct(handle, *most, wanted)
        card, here = handles.find(Kind.CARD, handle), process.current()  # first: it may be what makes the card ours
        if not isinstance(card, Card) or not isinstance(wanted, int) or card.owner is not here:
            return direct(handle, *most, wanted)
        session, was_open = card.session, card.session.is_open
        if call.name == "SCardDisconnect":
            session.end()  # first: of several processes that disconnect at the same time, one finds no other
        wanted = _disposition(call.name, card, wanted)
        if wanted != LEAVE_CARD:
            session.end()  # before the call: from now on no other process may continue the session
        try:
            result = direct(handle, *most, wanted)
        except BaseException:
            # A signal handler has raised before the native call; a broker may have made the call.
            is_connected = card.native is not None and card.session is session and not card.released
            if call.name == "SCardDisconnect" and was_open and is_connected:
                session.begin(in_transaction=card.transactions > 0)
            raise
        is_same = card.session is session and card.owner is process.current() and not card.released
        if is_same and was_open and not session.is_open and _is_refused(call, result):
            session.begin(in_transaction=card.transactions > 0)
        return result

    return route


def _is_refused(call: Call, result: Any) -> bool:
    """Whether the result of a call with a disposition says that the card was not touched."""
    hresult = result if call.failed is None else result[0]
    # SCardReconnect resets the card before it looks whether the card can be exclusive.
    return hresult == INVALID_VALUE or (hresult in REFUSED_CODES and call.name != "SCardReconnect")


def _disposition(function: str, card: Card, wanted: int) -> int:
    """What a call should do to a card that this process is connected to.

    :param function: PC/SC's name of the call.
    :param wanted: SCARD_*_CARD, from the application or by default.
    """
    session = card.session
    # What processes with one connection ask for, the broker does when the last of them disconnects.
    is_last_asked = session.is_joint and function == "SCardDisconnect"
    if wanted == LEAVE_CARD or not settings().spare_cards:
        return int(wanted)
    if not (session.is_used_apart() if is_last_asked else session.is_used_by_others()):
        return int(wanted)
    if isinstance(wanted, ByDefault):
        return LEAVE_CARD
    here = process.current()
    if card.warned_of_end is not here:
        card.warned_of_end = here
        observer.record("interferes", function=function, context=card.context.key)
        log.warning(
            "interference",
            "process %(pid)d resets or powers off the card in %(reader)s, which its parent, a child or a sibling uses "
            "too, because the application passes this disposition to %(function)s: pass SCARD_LEAVE_CARD to leave the "
            "card alone",
            function=function,
            reader=card.reader,
        )
    return int(wanted)
