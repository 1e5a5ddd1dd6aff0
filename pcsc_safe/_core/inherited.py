"""What a call gets on a context or card that another process owns.

:func:`apply_policy` is the only place where a verdict of :mod:`policy` becomes a return code, an exception, or a
context that belongs to this process; :mod:`reestablish` makes that context.  Cleanup never reaches the owner's session,
under every policy.  At a fork nothing changes here.
"""

from __future__ import annotations

from typing import Any, Optional

from ..errors import BrokerError, ForkedHandleError, PcscSafeError, join_pyscard
from ..policy import Cards, Policy, Verdict, decide
from . import failures, gateways, handles, log, observer, one_step, process
from .calls import CALLS, KEEP_FILES, LOST_REASON, Call, LostError
from .handles import Card, Context, Record
from .library import SUCCESS
from .reestablish import (
    INVALID_HANDLE,
    LEAVE_CARD,
    RESET_CARD,
    SHARE_EXCLUSIVE,
    connect,
    release_dead,
    replace,
    replace_context,
    settings_of,
)
from .settings import settings

__all__ = ["adopt", "apply_policy"]


def apply_policy(call: Call, record: Record, arguments: tuple[Any, ...]) -> Any:
    """The result of a call on an object that this process inherited.

    :param call: the function.
    :param record: of an object that another process owns.
    :param arguments: those after the handle.
    :return: the result; None if this process now owns the record, so that the call can be made.
    :raises ForkedHandleError: policy ``raise``, or policy ``share`` and the session is not shared.
    :raises ForkUnsafeError: this process cannot use PC/SC, and may not use a broker.
    :raises BrokerError: this process needs a broker, and can't have one.
    :raises LostError: the broker died during the call.
    """
    verdict = decide(
        settings_of(record),
        call.role,
        card=isinstance(record, Card),
        in_transaction=isinstance(record, Card) and record.transactions > 0,
    )
    if verdict is Verdict.FORGET:
        return _forget(call, record)
    if verdict is Verdict.SUCCEED:
        return SUCCESS
    if verdict is Verdict.RAISE:
        raise _forked_handle(call.name, record)
    if verdict is Verdict.INVALID:
        return call.failure(INVALID_HANDLE, arguments)
    if verdict is Verdict.RESET:
        return _return_reset(call, record, arguments)
    if verdict is Verdict.CONTINUE:
        return _continue_session(call, record, arguments)
    if verdict is Verdict.JOIN:
        return _join(call, record, arguments)
    if verdict is Verdict.RECONNECT:
        return _reconnect(call, record, arguments)
    hresult = replace(call, record)
    return None if hresult == SUCCESS else call.failure(hresult, arguments)


def _return_reset(call: Call, record: Record, arguments: tuple[Any, ...]) -> Any:
    if record.owner.noticed_by is process.SERVICE_LOST:  # while no pcscd runs, the call returns the code for this
        hresult = replace(call, record.context)
        if hresult != SUCCESS:
            return call.failure(hresult, arguments)
    _warn_of_reset(call, record)
    return call.failure(RESET_CARD, arguments)


def _continue_session(call: Call, card: Record, arguments: tuple[Any, ...]) -> Any:
    """Connect again, if this continues the session that this process inherited."""
    assert isinstance(card, Card)
    session = card.session
    if not session.can_continue():
        return _return_reset(call, card, arguments)
    hresult = replace(call, card, continuing=session)
    if hresult == RESET_CARD:
        return _return_reset(call, card, arguments)
    return None if hresult == SUCCESS else call.failure(hresult, arguments)


def adopt(context: Context) -> None:
    """Replace an inherited context, and the connections to its cards, by this process's own.

    This happens before they are handed over.  What can't be established stays as it is, and so does what this process
    itself has handed over or lost.
    """
    if context.owner.noticed_by in (process.HANDED_OVER, process.LOST, process.SERVICE_LOST):
        return
    reconnects = settings_of(context)._replace(cards=Cards.RECONNECT)
    status = CALLS["SCardStatus"]
    for card in list(context.cards.values()):
        verdict = decide(reconnects, status.role, card=True, in_transaction=card.transactions > 0)
        # Not if this process itself has a transaction on the card in this reader, for which the connection would wait.
        is_free = not any(
            other.transactions and other.owner is process.here and other.reader == card.reader
            for other in list(handles.cards.values())
        )
        is_free = is_free and not card.session.is_in_transaction()
        if verdict is Verdict.CONNECT and is_free and not card.released:
            try:
                with failures.suppress(PcscSafeError):
                    replace(status, card)
            except LostError as lost:
                handles.mark_gateway_lost(lost.gateway)


def _forget(call: Call, record: Record) -> Optional[int]:
    """Forget this process's copy, and nothing else.

    :return: SCARD_S_SUCCESS; None if another thread has made this process the owner of the record.
    """
    former_owner = record.owner
    if former_owner is process.current():
        return None
    if call.name == "SCardEndTransaction":
        is_own = former_owner.noticed_by in (process.LOST, process.SERVICE_LOST)
        if is_own and former_owner.parent is process.current():
            return SUCCESS if handles.update(record, former_owner, transactions=0) else None
        return SUCCESS  # the record remembers the transaction of another process
    if not handles.update(record, former_owner, released=True):
        return None
    if isinstance(record, Context) and release_dead(former_owner, record.real, record.gateway):
        record.forget()
    else:
        record.mark_released()
    return SUCCESS


def _join(call: Call, record: Record, arguments: tuple[Any, ...]) -> Any:
    """Join a session of the owner that this process did not get at the fork."""
    context = record.context
    if context.owner.noticed_by is process.LOST:
        raise _lost_share(call.name, record)
    broker = gateways.brokers.get()

    def join_owner() -> bool:
        here, former_owner = process.current(), context.owner
        if record.owner is here:
            return True
        cards = list(context.cards.values())
        theirs = gateways.brokers.as_broker(context.gateway)
        if theirs is None or context.real not in broker.inherit(
            theirs.key, [context.real, *(card.real for card in cards)], keeps=True
        ):
            return False
        handles.update(context, former_owner, gateway=broker)
        for card in cards:
            session = card.session.taken_over(False)
            session.join()
            if not handles.update(card, card.owner, transactions=0, session=session, owner=here):
                session.end()
        if handles.update(context, former_owner, owner=here):
            observer.record("got", context=context.key, how="share")
        return True

    if one_step.call_in_turn(context.turn, join_owner):
        return None
    raise _forked_handle(call.name, record)


def _lost_share(function: str, record: Record) -> BrokerError:
    here = process.current()
    return BrokerError(
        f"process {here.pid} has lost the session of this {_kind_in_words(record)}: {LOST_REASON}",
        remedy=f"establish a new context; {KEEP_FILES}",
        function=function,
        pid=here.pid,
        established_at=record.established_at,
    )


def _kind_in_words(record: Record) -> str:
    return "PC/SC context" if isinstance(record, Context) else "card handle's PC/SC context"


def _reconnect(call: Call, card: Record, arguments: tuple[Any, ...]) -> Any:
    """SCardReconnect on an inherited handle: connect this process to the card."""
    assert isinstance(card, Card)
    hresult = replace_context(call.name, card.context)
    if hresult != SUCCESS:
        return call.failure(hresult)
    share_mode, protocols, initialization = arguments
    # A child to which this process has handed the session over may not have run its hook yet.
    is_given = card.owner.noticed_by is process.HANDED_OVER
    if settings().spare_cards and (is_given or card.session.is_used_by_others()):
        initialization = LEAVE_CARD  # the card itself was not reset
    connected = connect(card, share_mode, protocols, initialization)
    if connected is None:
        return None
    return list(connected) if connected[0] == SUCCESS else call.failure(connected[0])


def _forked_handle(function: str, record: Record) -> ForkedHandleError:
    join_pyscard()
    here, owner = process.current(), record.owner
    if owner.noticed_by is process.HANDED_OVER:
        state = f"({record.established_at}) was handed over by process {owner.pid} to its child"
        state += "" if owner.pid == here.pid else f", and this is process {here.pid}"
    else:
        relation = "forked child" if here.parent is owner else "forked descendant"
        state = (
            f"was established by process {owner.pid} ({record.established_at}) and this is its {relation} {here.pid}"
        )
    remedy = "establish a context in this process, or use policy 'auto'"
    if record.context.settings(settings()).policy is Policy.SHARE:
        remedy = (
            "set broker='always' before the parent establishes the context, and keep the context open in the parent"
        )
    return ForkedHandleError(
        f"this {_kind_in_words(record)} {state}",
        remedy=remedy,
        function=function,
        owner_pid=owner.pid,
        pid=here.pid,
        established_at=record.established_at,
        hresult=INVALID_HANDLE,
    )


def _warn_of_reset(call: Call, card: Record) -> None:
    assert isinstance(card, Card)
    here = process.current()
    if card.warned == (here, card.owner):
        return
    card.warned = here, card.owner
    log.warning(
        "reset",
        "%(function)s returns SCARD_W_RESET_CARD to process %(pid)d for the card in %(reader)s, because %(why)s: "
        "%(remedy)s",
        function=call.name,
        reader=card.reader,
        owner_pid=card.owner.pid,
        why=_reset_reason(card),
        remedy=_reset_remedy(card),
    )


def _reset_reason(card: Card) -> str:
    """The reason for SCARD_W_RESET_CARD although nobody has reset the card."""
    owner = f"process {card.owner.pid}, from which it was forked,"
    if card.owner.noticed_by is process.SERVICE_LOST:
        return "pcscd was restarted"
    if card.owner.noticed_by is process.LOST:
        return LOST_REASON
    if card.owner.noticed_by is process.HANDED_OVER:
        return f"process {card.owner.pid} has handed this session over to its child"
    if settings_of(card).cards is Cards.RESET:
        return f"the session is that of process {card.owner.pid}, from which it was forked (cards='reset')"
    if settings_of(card).cards is Cards.RECONNECT:
        return f"{owner} was in a transaction when it forked (SCardReconnect waits for its end)"
    if card.share_mode == SHARE_EXCLUSIVE:
        return f"{owner} held the card exclusively when it forked"
    if not card.session.is_visible():
        return (
            f"the file descriptor with which it checks whether {owner} still has its session is not open ({KEEP_FILES})"
        )
    if card.session.is_in_transaction():
        return f"{owner} is in a transaction (SCardReconnect waits for its end)"
    if card.session.is_alive():
        return f"the card was removed, or pcscd was restarted or replaced, after {owner} connected"
    return (
        f"{owner} has ended its session, has closed a file descriptor of pcsc_safe.files_to_preserve(), or is not "
        "connected in shared mode (SCardReconnect fails while it holds the card exclusively)"
    )


def _reset_remedy(card: Card) -> str:
    is_lost = card.owner.noticed_by in (process.LOST, process.SERVICE_LOST)
    if card.share_mode == SHARE_EXCLUSIVE and not is_lost:
        return (
            "use pcsc_safe.handover() or policy 'share', or call SCardReconnect when the other process has "
            "disconnected from the card"
        )
    remedy = "call SCardReconnect (pcsc_safe.reconnecting() does)"
    return remedy if card.transactions else f"{remedy}, or configure cards='reconnect'"
