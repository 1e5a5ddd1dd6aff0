"""What a call changes in the records of contexts and cards, which are kept as PC/SC keeps its handles.

A function here may be called twice for one call.  At a fork nothing changes here.
"""

from __future__ import annotations

from typing import Any, Optional

from . import handles, observer, recovery, reestablish
from .calls import CALLS, Call, FollowUp, Kind
from .handles import Card, Record
from .library import SUCCESS, constant
from .reestablish import INVALID_HANDLE, LEAVE_CARD
from .sessions import Session

__all__ = ["FOLLOW_UPS", "INVALID_VALUE", "REFUSED_CODES", "note_failure", "noted"]

INVALID_VALUE = constant("SCARD_E_INVALID_VALUE")
REFUSED_CODES = (INVALID_VALUE, constant("SCARD_E_SHARING_VIOLATION"))
"""The codes of a call that has not touched the card."""


def _after_release_context(context: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    # libpcsclite drops its context whatever pcscd answers.
    context.forget()
    return SUCCESS if result in recovery.SERVICE_LOST_CODES and recovery.recovers(context) else result


def _after_disconnect(card: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    # In a broker an earlier call may have disconnected it, if a signal handler raised before its result arrived.
    is_in_broker = isinstance(card, Card) and card.native is None and card.context not in handles.given
    if result == SUCCESS or (result == INVALID_HANDLE and is_in_broker):
        card.forget()  # natively, card_calls has done this, before it released the native context
    return result


def _after_reconnect(card: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    hresult, protocol = result
    if hresult == SUCCESS and isinstance(card, Card):
        share_mode, preferred, initialization = arguments
        if initialization != LEAVE_CARD or share_mode != card.share_mode or not card.session.is_open:
            former, session = card.session, reestablish.new_session(card.context, card.reader, share_mode)
            session.set_in_transaction(card.transactions > 0)  # a transaction outlasts a reset
            card.session = session
            former.end()
        card.share_mode, card.protocol = share_mode, protocol or preferred
    return result


def _after_begin_transaction(card: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    if result == SUCCESS and isinstance(card, Card):
        card.session.set_in_transaction(card.transactions > 0)
    return result


def _after_end_transaction(card: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    if isinstance(card, Card) and result not in REFUSED_CODES:
        # Any other failure means that the transaction has ended with the session, the card or pcscd.
        if result != SUCCESS:
            card.transactions = 0
        if result == SUCCESS and not card.session.is_open:  # the card was reset
            card.session = reestablish.new_session(card.context, card.reader, card.share_mode)
        card.session.set_in_transaction(card.transactions > 0)
    return result


def note_failure(function: str, session: Optional[Session], hresult: int) -> None:
    """Note what a code says about the session with a card, or about pcscd.

    :param session: of the card before the call, because another thread may have connected again since; None for a
        context.
    """
    if hresult in _SESSION_ENDED_CODES and session is not None:
        session.end()
    if hresult == recovery.NO_SERVICE:
        recovery.warn_of_no_service(function)


_SESSION_ENDED_CODES = tuple(
    constant(f"SCARD_W_{name}") for name in ("RESET_CARD", "REMOVED_CARD", "UNPOWERED_CARD", "UNRESPONSIVE_CARD")
)
"""The codes that say that the session has ended; SCardReconnect begins another session."""

_FUNCTIONS: dict[str, FollowUp] = {
    "SCardReleaseContext": _after_release_context,
    "SCardDisconnect": _after_disconnect,
    "SCardReconnect": _after_reconnect,
    "SCardBeginTransaction": _after_begin_transaction,
    "SCardEndTransaction": _after_end_transaction,
}


FOLLOW_UPS: dict[str, Optional[FollowUp]] = {
    name: observer.wrap_follow_up(name, _FUNCTIONS.get(name)) for name in CALLS
}
"""For each function, what is called after it, recording included."""


def noted(call: Call) -> Optional[FollowUp]:
    """What follows a call on a card that changes its record, and must follow even if a signal handler raises."""
    return FOLLOW_UPS[call.name] if call.takes is Kind.CARD and call.name in _FUNCTIONS else None
