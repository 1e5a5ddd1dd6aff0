"""What a call gets on a context or card that another process owns.

:func:`answer` is the one place where a verdict of :mod:`policy` becomes a return code, an exception, or a context of
this process's own.  Cleanup never reaches the owner's session, under every policy.  Locks held here belong to records,
and are new ones after every fork.
"""

from __future__ import annotations

import contextlib
from typing import Any, Optional

from .. import policy
from ..errors import BrokerError, ForkedHandleError, ForkUnsafeError, PcscSafeError, join_pyscard
from ..policy import Cards, Policy, Role, Settings, Verdict, Way, choose_way, decide, native_works_after_fork
from . import gateways, handles, in_flight, log, observer, one_step, process
from .calls import CALLS, STALE, Call, Gateway, Keep
from .handles import Card, Context, Record
from .library import SUCCESS, constant
from .settings import settings

__all__ = ["INVALID_HANDLE", "adopt", "answer", "establish", "gateway", "unsafe"]

INVALID_HANDLE = constant("SCARD_E_INVALID_HANDLE")
RESET_CARD = constant("SCARD_W_RESET_CARD")
LEAVE_CARD = constant("SCARD_LEAVE_CARD")
OUTGROWN = constant("SCARD_E_UNSUPPORTED_FEATURE")
"""What SCardListReaders returns on a new context where libpcsclite has seen a pcscd with more readers than this one.

Since pcsc-lite 2.5 it keeps one array of readers for the whole process, which grows and never shrinks.
"""


def answer(call: Call, record: Record, arguments: tuple[Any, ...]) -> Any:
    """The answer to a call on what this process inherited.

    :param call: the function.
    :param record: live in another process.
    :param arguments: those behind the handle.
    :return: the answer, or None: the record is this process's own now, and the call can be made.
    :raises ForkedHandleError: policy ``raise``.
    :raises ForkUnsafeError: this process cannot use PC/SC, and may not use a broker.
    :raises BrokerError: it needs one, and there is none.
    :raises LostError: the broker died meanwhile.
    """
    verdict = decide(
        _settings_of(record),
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
        if record.owner.noticed_by is process.SERVICE_LOST:  # while there is no pcscd, that is the answer
            hresult = _own(call, record.context)
            if hresult != SUCCESS:
                return call.failure(hresult, arguments)
        _warn_of_reset(call, record)
        return call.failure(RESET_CARD, arguments)
    if verdict is Verdict.JOIN:
        return _join(call, record, arguments)
    if verdict is Verdict.RECONNECT:
        return _reconnect(call, record, arguments)
    hresult = _own(call, record)
    return None if hresult == SUCCESS else call.failure(hresult, arguments)


def adopt(context: Context) -> None:
    """Give this process a context, and connections to its cards, in the place of one that it inherited.

    Before they are handed over, which is to say that somebody counts on them.  What can't be had stays as it is, and so
    does what this process itself has handed over, or lost.
    """
    if context.owner.noticed_by in (process.HANDED_OVER, process.LOST, process.SERVICE_LOST):
        return
    reconnects = _settings_of(context)._replace(cards=Cards.RECONNECT)
    status = CALLS["SCardStatus"]
    for card in list(context.cards.values()):
        verdict = decide(reconnects, status.role, card=True, in_transaction=card.transactions > 0)
        # Nor one that would be waited for: in its reader this process itself has a transaction.
        is_free = not any(
            other.transactions and other.owner is process.here and other.reader == card.reader
            for other in list(handles.cards.values())
        )
        if verdict is Verdict.CONNECT and is_free and not card.released:
            with contextlib.suppress(PcscSafeError):
                _own(status, card)


def _forget(call: Call, record: Record) -> Optional[int]:
    """Drop this process's copy only.

    :return: SCARD_S_SUCCESS; None if another thread has made the record this process's own meanwhile.
    """

    def forget() -> Optional[int]:
        if record.owner is process.current():
            return None
        if call.name == "SCardEndTransaction":
            assert isinstance(record, Card)
            record.transactions = 0
        elif isinstance(record, Context) and _release_dead(record):
            record.forget()
        else:
            record.bury()
        return SUCCESS

    return one_step.exclusively(record.lock, forget)


def _release_dead(context: Context) -> bool:
    """Whether this process's native library knows an inherited context no more."""
    if context.gateway is not gateways.native:
        through = gateways.brokers.as_broker(context.gateway)
        if context.owner.noticed_by is process.SERVICE_LOST and through is not None:
            through.forget(context.real)
        return True
    return _native_works() and bool(context.real.release_dead())


def _forget_released(context: Context) -> None:
    """Forget the cards that nothing knows any more: neither the application nor the native library."""
    for card in list(context.cards.values()):
        if card.released:
            card.forget()


def _native_works() -> bool:
    here = process.current()
    return gateways.native.is_loaded() and (here.parent is None or (here.unquiet is None and native_works_after_fork()))


def _settings_of(record: Record) -> Settings:
    effective, owner = record.context.settings(settings()), record.owner
    # What is lost was not inherited: no fork is to be refused. And there is nothing to share when pcscd is gone.
    lost = owner.noticed_by in (process.LOST, process.SERVICE_LOST) and owner.parent is process.current()
    lost = lost and effective.policy in (Policy.RAISE, Policy.INVALID)
    lost = lost or (owner.noticed_by is process.SERVICE_LOST and effective.policy is Policy.SHARE)
    return effective._replace(policy=Policy.AUTO) if lost else effective


def _own(call: Call, record: Record) -> int:
    """Give this process a context, or a context and a connection to the card, of its own.

    :return: SCARD_S_SUCCESS, or why there is none; the next call tries again.
    """
    context = record.context
    try:
        hresult = one_step.exclusively(context.lock, lambda: _own_context(call, context))
    except (BrokerError, ForkUnsafeError):
        if call.role is Role.VALIDITY:
            return INVALID_HANDLE
        raise
    if isinstance(record, Context) or hresult != SUCCESS:
        return hresult

    def connect() -> int:
        if record.owner is context.owner:
            return SUCCESS
        return _own_connection(record, record.share_mode, record.protocol, LEAVE_CARD)[0]

    # The connection may wait for another process's transaction: with the lock of the card alone.
    return one_step.exclusively(record.lock, connect)


def _own_context(call: Call, context: Context) -> int:
    left = context.owner

    def keep(real: Any, number: int, owner: process.Epoch, gateway: Gateway) -> None:
        former = context.real
        # The owner last: a fork in another thread must find what it is known by, or the context not ours.
        context.real, context.gateway = real, gateway
        context.owner = owner
        gateways.native.leave(former)

    # Again, if a signal handler has forked meanwhile, and this is the child.
    while context.owner is not process.current():
        if _release_dead(context):
            _forget_released(context)
        hresult = int(establish(call.name, context.scope, keep, context)[0])
        if hresult != SUCCESS:
            return hresult
        _tell(context, left)
    return SUCCESS


def _tell(context: Context, left: process.Epoch) -> None:
    """Tell that this process has a context in the place of one whose owner is, to it, another."""
    here = context.owner
    if left.noticed_by is process.SERVICE_LOST:
        log.info("process %d has a new context in the place of one that ended with pcscd", here.pid)
        observer.record("recovered")
        observer.established("established", context)
    else:
        log.info("process %d has a context of its own in the place of process %d's", here.pid, left.pid)
        observer.established("reestablished", context, owner=left.pid)


def _own_connection(card: Card, share_mode: Any, protocols: Any, initialization: Any) -> tuple[int, int]:
    """Give a card of a context that is this process's own a connection of its own."""
    context = card.context

    def keep(real: int, native: Any, protocol: int) -> None:
        card.real, card.native, card.share_mode, card.protocol = real, native, share_mode, protocol or protocols
        card.transactions = 0
        card.owner = context.owner
        observer.connected("connected", card)

    answer = context.gateway.connect(context, (card.reader, share_mode, protocols), keep)
    if answer is STALE:
        return INVALID_HANDLE, 0
    hresult, protocol = answer[0], answer[2]
    if hresult == SUCCESS and initialization != LEAVE_CARD:
        functions, real = context.gateway.functions, card.real
        hresult, protocol = context.gateway.enter(
            "SCardReconnect", functions["SCardReconnect"], real, share_mode, protocols, initialization
        )
    return hresult, protocol


def _join(call: Call, record: Record, arguments: tuple[Any, ...]) -> Any:
    """Take part in a session of the owner that this process did not get at the fork."""
    context = record.context
    if context.owner.noticed_by is process.LOST:
        if call.role is Role.VALIDITY:
            return INVALID_HANDLE
        raise _lost_share(call.name, record)
    broker = gateways.brokers.get()

    def take_part() -> bool:
        if record.owner is process.current():
            return True
        cards = list(context.cards.values())
        theirs = gateways.brokers.as_broker(context.gateway)
        if theirs is not None and context.real in broker.inherit(
            theirs.key, [context.real, *(card.real for card in cards)], keeps=True
        ):
            context.gateway = broker
            for card in cards:
                card.transactions, card.owner = 0, process.current()
            context.owner = process.current()
            observer.record("got", context=context.key, how="share")
            return True
        return False

    if one_step.exclusively(context.lock, take_part):
        return None
    if call.role is Role.VALIDITY:
        return INVALID_HANDLE
    raise _forked_handle(call.name, record)


def _lost_share(function: str, record: Record) -> BrokerError:
    here = process.current()
    return BrokerError(
        f"the session of this {_thing(record)} is lost to process {here.pid}: its broker has died, or the descriptors "
        "that lead to it were closed",
        remedy="establish a context anew; who closes all descriptors has to leave pcsc_safe.files_to_preserve() open",
        function=function,
        pid=here.pid,
        established_at=record.established_at,
    )


def _thing(record: Record) -> str:
    return "PC/SC context" if isinstance(record, Context) else "card handle's PC/SC context"


def _reconnect(call: Call, card: Record, arguments: tuple[Any, ...]) -> Any:
    """SCardReconnect gives an inherited handle a connection of this process's own."""
    assert isinstance(card, Card)
    hresult = one_step.exclusively(card.context.lock, lambda: _own_context(call, card.context))
    if hresult != SUCCESS:
        return call.failure(hresult)

    def connect() -> Any:
        if card.owner is card.context.owner:
            return None
        hresult, protocol = _own_connection(card, *arguments)
        return [hresult, protocol] if hresult == SUCCESS else call.failure(hresult)

    return one_step.exclusively(card.lock, connect)


def _way(context: Optional[Context]) -> Way:
    effective = settings() if context is None else _settings_of(context)
    if not gateways.native.is_loaded():
        return Way.BROKER
    return choose_way(effective, forked=process.current().parent is not None, native_works=_native_works())


def establish(function: str, scope: Any, keep: Keep, context: Optional[Context] = None) -> Any:
    """A new context; see :class:`calls.Gateway`.

    With ``recover`` one that can be used: where this process's native library has outgrown a restarted pcscd, it is a
    broker's.  Arguments and errors as in :func:`gateway`.

    :raises LostError: the broker's has outgrown pcscd; the next one's has not.
    """
    effective = settings() if context is None else _settings_of(context)
    through = gateway(function, context)
    result = through.establish(scope, keep, OUTGROWN if effective.recover else None)
    if result[0] != OUTGROWN:
        return result
    if effective.policy is Policy.REESTABLISH:
        log.warning(
            "process %d can't list readers or wait for events: pcscd had more readers before it was restarted, and "
            "pcsc-lite 2.5 and later can't go back; restart the process, or use policy 'auto', which takes a broker",
            process.current().pid,
        )
        return through.establish(scope, keep)
    log.info("process %d needs a broker: pcscd had more readers before it was restarted", process.current().pid)
    return gateways.brokers.get().establish(scope, keep, OUTGROWN)


def gateway(function: str, context: Optional[Context]) -> Gateway:
    """Through which this process gets a new context.

    :param function: the PC/SC function that was called.
    :param context: the one in whose place the new one is to be, if any.
    :raises ForkUnsafeError: there is none.
    :raises BrokerError: it is a broker, and none can be started.
    """
    way = _way(context)
    if way is Way.NATIVE:
        return gateways.native
    if way is Way.BROKER:
        return gateways.brokers.get()
    raise unsafe(function, context)


def unsafe(function: str, context: Optional[Context]) -> ForkUnsafeError:
    """That there is no way to PC/SC in this process; arguments as in :func:`gateway`."""
    here = process.current()
    remedy = "use policy 'auto', which goes through a broker here, or exec a program of its own"
    if here.unquiet is not None and here.unquiet.function == in_flight.IMPORTS:
        remedy = "establish the first context of the parent before other threads fork"
    elif here.unquiet is not None:
        remedy += "; or fork when no call takes longer than quiesce_timeout"
    return ForkUnsafeError(
        f"PC/SC can't be used in process {here.pid}: {_why_not(here)}",
        remedy=remedy,
        function=function,
        owner_pid=context.owner.pid if context else None,
        pid=here.pid,
        established_at=context.established_at if context else None,
    )


def _why_not(here: process.Epoch) -> str:
    if here.unquiet is None:
        return f"it was forked, and on {policy.PLATFORM} a forked process has none"
    function, thread, seconds = here.unquiet
    return f"it, or an ancestor, was forked while thread {thread} was inside {function}, for {seconds:.1f} s already"


def _forked_handle(function: str, record: Record) -> ForkedHandleError:
    join_pyscard()
    here, owner = process.current(), record.owner
    if owner.noticed_by is process.HANDED_OVER:
        state = f"({record.established_at}) was handed over to a child that process {here.pid} has forked"
    else:
        relation = "forked child" if here.parent is owner else "forked descendant"
        state = (
            f"was established by process {owner.pid} ({record.established_at}) and this is its {relation} {here.pid}"
        )
    remedy = "establish one here, or use policy 'reestablish'"
    if record.context.settings(settings()).policy is policy.Policy.SHARE:
        remedy = "it can be shared if it was established with broker='always', and as long as its owner has it"
    return ForkedHandleError(
        f"this {_thing(record)} {state}",
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
    if card.owner.noticed_by is process.SERVICE_LOST:
        log.warning(
            "%s answers SCARD_W_RESET_CARD because pcscd was restarted, not because of the card: call SCardReconnect, "
            "or configure cards='reconnect'",
            call.name,
        )
        return
    if card.owner.noticed_by is process.LOST:
        log.warning("%s answers SCARD_W_RESET_CARD because the broker of process %d died", call.name, here.pid)
        return
    log.warning(
        "%s answers SCARD_W_RESET_CARD because this process (%d) was forked from the one that connected (%d), not "
        "because of the card: call SCardReconnect here, or configure cards='reconnect'",
        call.name,
        here.pid,
        card.owner.pid,
    )
