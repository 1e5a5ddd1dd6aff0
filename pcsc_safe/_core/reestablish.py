"""Replaces a context or a connection to a card that belongs to another process by one of this process.

The other process may be the parent, or this process itself before pcscd was restarted.  Several threads may come here
at the same time, and a signal handler in the middle.  They take turns for as long as that works, but nothing depends on
it: one of them puts its result into the record (:func:`handles.update`), and the others release theirs.

At a fork nothing changes here: a child comes here at its first use of an inherited object.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

from .. import policy
from ..errors import ForkUnsafeError
from ..policy import Policy, Settings, Way, choose_way, native_works_after_fork
from . import gateways, handles, in_flight, log, observer, one_step, process, recovery, sessions
from .calls import CALLS, STALE, Call, Gateway, Keep, LostError
from .handles import Card, Context, Record
from .library import SUCCESS, constant
from .sessions import Session
from .settings import settings

__all__ = [
    "COMM_ERROR",
    "INVALID_HANDLE",
    "LEAVE_CARD",
    "RESET_CARD",
    "SHARE_EXCLUSIVE",
    "connect",
    "establish",
    "gateway",
    "has_gateway",
    "new_session",
    "release_dead",
    "replace",
    "replace_context",
    "retry_in_new_broker",
    "settings_of",
    "unsafe_error",
]

COMM_ERROR = constant("SCARD_F_COMM_ERROR")
INVALID_HANDLE = constant("SCARD_E_INVALID_HANDLE")
LEAVE_CARD = constant("SCARD_LEAVE_CARD")
RESET_CARD = constant("SCARD_W_RESET_CARD")
SHARE_EXCLUSIVE = constant("SCARD_SHARE_EXCLUSIVE")
_SHARE_SHARED = constant("SCARD_SHARE_SHARED")
_UNAWARE, _IN_USE = constant("SCARD_STATE_UNAWARE"), constant("SCARD_STATE_INUSE")
_STATES = CALLS["SCardGetStatusChange"]
_EVENTS_AT = 16  # bits; above the state, pcsc-lite counts the events of a reader
_OUTGROWN = constant("SCARD_E_UNSUPPORTED_FEATURE")
"""What SCardListReaders returns on a new context if libpcsclite has seen a pcscd with more readers than this one.

Since pcsc-lite 2.5 it keeps one array of readers for the whole process, which grows and never shrinks.
"""


_CONTINUES = "process %(pid)d continues process %(owner_pid)d's session with the card in %(reader)s"
_REPLACES = "process %(pid)d has a new connection to the card in %(reader)s, which replaces %(former)s"


class _SupersededError(Exception):
    """Another thread has done the same first, or has released the record: release what was established here."""


class _EndedError(Exception):
    """The session that should be continued has ended: release what was established here."""


def replace(call: Call, record: Record, *, continuing: Optional[Session] = None) -> int:
    """Give this process its own context, or its own context and connection to the card.

    :param continuing: do nothing if this session of another process has ended.
    :return: SCARD_S_SUCCESS, or the code of the failure; the next call tries again.
    """
    hresult = replace_context(call.name, record.context)
    if isinstance(record, Context) or hresult != SUCCESS:
        return hresult
    former_owner = record.owner
    connected = connect(record, record.share_mode, record.protocol, LEAVE_CARD, continuing=continuing)
    if connected is None:
        return SUCCESS
    if connected[0] == SUCCESS and former_owner.noticed_by not in (process.LOST, process.SERVICE_LOST):
        log.info(
            "reconnected" if continuing is None else "continued",
            _REPLACES if continuing is None else _CONTINUES,
            owner_pid=former_owner.pid,
            reader=record.reader,
            former=_former_in_words(former_owner),
        )
    return connected[0]


def replace_context(function: str, context: Context) -> int:
    """Give this process its own context.

    :param function: the PC/SC function that was called.
    :return: as for :func:`replace`.
    """

    def replace_until_owned() -> int:
        # Again, if a signal handler has forked and this is the child.
        while context.owner is not process.current() and not context.released:
            hresult = _replace_once(function, context)
            if hresult != SUCCESS:
                return hresult
        return SUCCESS

    return one_step.call_in_turn(context.turn, replace_until_owned)


def _replace_once(function: str, context: Context) -> int:
    former_owner, former, through = context.owner, context.real, context.gateway
    if former_owner is process.current():
        return SUCCESS
    if release_dead(former_owner, former, through):
        _forget_released(context)
    kept: list[Any] = []

    def keep(real: Any, number: int, owner: process.Epoch, gateway: Gateway) -> None:
        kept.append(real)
        if not handles.update(context, former_owner, real=real, gateway=gateway, owner=owner):
            raise _SupersededError

    try:
        result = establish(function, context.scope, keep, context)
    except _SupersededError:
        return SUCCESS
    except BaseException:  # a signal handler's: what was kept has been given back
        if kept and context.real is kept[-1]:
            handles.update(context, context.owner, owner=former_owner)
        raise
    if result[0] == SUCCESS:
        gateways.native.abandon(former)
        _report_replacement(context, former_owner)
    return int(result[0])


def _report_replacement(context: Context, former_owner: process.Epoch) -> None:
    """Log and record that this process has replaced a context that it did not own."""
    if former_owner.noticed_by is process.SERVICE_LOST:
        log.info("recovered", "process %(pid)d has a new context, which replaces one that ended with pcscd")
        observer.record("recovered")
        observer.established("established", context)
    else:
        log.info(
            "reestablished",
            "process %(pid)d has a new context, which replaces %(former)s",
            owner_pid=former_owner.pid,
            established_at=context.established_at,
            former=_former_in_words(former_owner),
        )
        observer.established("reestablished", context, owner=former_owner.pid)


def _former_in_words(owner: process.Epoch) -> str:
    """What was replaced, in words."""
    if owner.noticed_by is process.HANDED_OVER:
        return f"the one that process {owner.pid} has handed over"
    return "the one that was lost with its broker" if owner.noticed_by is process.LOST else f"process {owner.pid}'s"


def connect(
    card: Card, share_mode: Any, protocols: Any, initialization: Any, *, continuing: Optional[Session] = None
) -> Optional[tuple[int, int]]:
    """Connect this process to a card, in a context that this process owns.

    It may wait for another process's transaction.

    :param initialization: SCARD_LEAVE_CARD, or what to do to the card after connecting.
    :param continuing: as for :func:`replace`.
    :return: the code, and the protocol; None if another thread has connected, or has replaced the connection since.
    """
    connected = one_step.call_in_turn(card.turn, lambda: _connect(card, share_mode, protocols, continuing))
    if connected is None or connected[0] != SUCCESS or initialization == LEAVE_CARD:
        return connected
    result = _call(CALLS["SCardReconnect"], card, (share_mode, protocols, initialization))
    return None if result is STALE else (result[0], result[1])


def _call(call: Call, record: Record, arguments: tuple[Any, ...]) -> Any:
    """A call on what this process owns; STALE if another thread is replacing it."""
    reached = handles.reach(record)
    if reached is None:
        return STALE
    through, real = reached
    if through is gateways.native:  # among the calls of other threads, which know this process's record already
        return gateways.native.caller(call)(record, arguments)
    return through.functions[call.name](real, *arguments)


def _connect(card: Card, share_mode: Any, protocols: Any, continuing: Optional[Session]) -> Optional[tuple[int, int]]:
    former_owner, former, context = card.owner, card.session, card.context
    owner = context.owner
    if former_owner is owner:
        return None
    before = _read_reader_state(context, card.reader, share_mode)
    session = _session(card.reader, share_mode, before)

    kept: list[int] = []

    def keep(real: int, native: Any, protocol: int) -> None:
        kept.append(real)
        if continuing is not None and not _continues(continuing, session, before):
            raise _EndedError
        if context.owner is not owner:  # a signal handler has handed it over
            raise _SupersededError
        connection = {"real": real, "native": native, "share_mode": share_mode, "protocol": protocol or protocols}
        if not handles.update(card, former_owner, **connection, session=session, transactions=0, owner=owner):
            raise _SupersededError

    try:
        result = context.gateway.connect(context, (card.reader, share_mode, protocols), keep)
    except _SupersededError:
        return None
    except _EndedError:
        return RESET_CARD, 0
    except BaseException:  # a signal handler's: what was kept has been given back
        if kept and card.real is kept[-1]:
            handles.update(card, card.owner, owner=former_owner, session=former)
        raise
    finally:
        if card.session is not session or card.owner is former_owner:
            session.end()
    if result is STALE:
        return INVALID_HANDLE, 0
    if result[0] == SUCCESS:
        observer.connected("connected", card)
    return result[0], result[2]


def _continues(wanted: Session, session: Session, before: _ReaderState) -> bool:
    """Whether a new connection leads to the same card session as another process's."""
    # In use: otherwise no application is connected, and pcscd was restarted after the owner has used the card.
    is_same = before.in_use and before.events == wanted.events and session.pcscd == wanted.pcscd
    return is_same and wanted.can_continue()


def new_session(context: Context, reader: str, share_mode: Any) -> Session:
    """What other processes of the family can see of a connection that this process is about to make.

    :param context: one that this process owns.
    """
    return _session(reader, share_mode, _read_reader_state(context, reader, share_mode))


def _session(reader: str, share_mode: Any, before: _ReaderState) -> Session:
    return Session(reader, shared=share_mode == _SHARE_SHARED, events=before.events)


class _ReaderState:
    """What pcscd says about a reader before a connection is made.

    :ivar events: how often a card was inserted or removed.
    :ivar in_use: whether an application is connected.
    """

    def __init__(self, events: Optional[int] = None, in_use: bool = False) -> None:
        self.events = events
        self.in_use = in_use


def _read_reader_state(context: Context, reader: str, share_mode: Any) -> _ReaderState:
    if share_mode != _SHARE_SHARED or not isinstance(reader, str) or not sessions.is_on:
        return _ReaderState()
    result = _call(_STATES, context, (0, [(reader, _UNAWARE)]))
    if result is STALE or result[0] != SUCCESS:
        return _ReaderState()
    state = result[1][0][1]
    return _ReaderState(state >> _EVENTS_AT, bool(state & _IN_USE))


def release_dead(owner: process.Epoch, real: Any, gateway: Gateway) -> bool:
    """Free what is left in this process of a context that another process owns.

    :param owner: its owner.
    :param real: its real handle.
    :param gateway: its gateway.
    :return: whether this process's native library has forgotten it.
    """
    if gateway is not gateways.native:
        through = gateways.brokers.as_broker(gateway)
        if owner.noticed_by is process.SERVICE_LOST and through is not None:
            through.forget(real)
        return True
    return _native_works() and bool(real.release_dead())


def _forget_released(context: Context) -> None:
    """Forget the cards that neither the application nor the native library knows any more."""
    for card in list(context.cards.values()):
        if card.released:
            card.forget()


def settings_of(record: Record) -> Settings:
    effective, owner = record.context.settings(settings()), record.owner
    # A lost context was not inherited, so RAISE and INVALID don't apply.  If pcscd has ended, nothing can be shared.
    lost = owner.noticed_by in (process.LOST, process.SERVICE_LOST) and owner.parent is process.current()
    lost = lost and effective.policy in (Policy.RAISE, Policy.INVALID)
    lost = lost or (owner.noticed_by is process.SERVICE_LOST and effective.policy is Policy.SHARE)
    return effective._replace(policy=Policy.AUTO) if lost else effective


def establish(function: str, scope: Any, keep: Keep, context: Optional[Context] = None) -> Any:
    """A new context; see :class:`calls.Gateway`.

    With ``recover`` the context is usable: if this process's native library has seen a pcscd with more readers, the
    context is in a broker.  Arguments and errors as in :func:`gateway`.

    :raises LostError: the native library of the broker has seen more readers, too; that of the next broker has not.
    """
    here = process.current()
    result = _establish(function, scope, keep, context, here)
    if result[0] == SUCCESS:
        return result  # without a call, in which a signal handler could raise: the context would be lost
    if process.current() is not here:
        return establish(function, scope, keep, context)  # a signal handler has forked, and this is the child
    if result[0] == recovery.NO_SERVICE:
        recovery.warn_of_no_service(function)
    return result


def _establish(function: str, scope: Any, keep: Keep, context: Optional[Context], here: process.Epoch) -> Any:
    effective = settings() if context is None else settings_of(context)
    through = gateway(function, context)
    result = through.establish(scope, keep, here, _OUTGROWN if effective.recover else None)
    if result[0] != _OUTGROWN:
        return result
    if effective.policy is Policy.REESTABLISH:
        log.warning(
            "outgrown",
            "process %(pid)d can't list readers or wait for events, because pcscd had more readers before it was "
            "restarted (pcsc-lite 2.5 and later): restart the process, or use policy 'auto', which uses a broker here",
        )
        return through.establish(scope, keep, here)
    log.info("outgrown", "process %(pid)d needs a broker, because pcscd had more readers before it was restarted")
    return gateways.brokers.get().establish(scope, keep, here, _OUTGROWN)


_ATTEMPTS = gateways.BROKER_ATTEMPTS


def retry_in_new_broker(call: Call, attempt: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
    """The result of ``attempt``, even if a broker ends during it.

    A call that was in progress then may have been executed, so it is not repeated: it returns SCARD_F_COMM_ERROR, as
    libpcsclite does when pcscd ends.  Any other call is repeated, in a new broker.
    """
    for _ in range(_ATTEMPTS):
        try:
            return attempt()
        except LostError as lost:
            handles.mark_gateway_lost(lost.gateway)
            if lost.in_progress:
                return call.failure(COMM_ERROR, arguments)
    raise gateways.repeated_death_error()


def gateway(function: str, context: Optional[Context]) -> Gateway:
    """The gateway through which this process gets a new context.

    :param function: the PC/SC function that was called.
    :param context: the context that the new one replaces, if any.
    :raises ForkUnsafeError: there is none.
    :raises BrokerError: it would be a broker, and none can be started.
    """
    way = _way(context)
    if way is Way.NATIVE:
        return gateways.native
    if way is Way.BROKER:
        return gateways.brokers.get()
    raise unsafe_error(function, context)


def has_gateway() -> bool:
    """Whether this process can use PC/SC without starting a broker."""
    way = _way(None)
    return way is Way.NATIVE or (way is Way.BROKER and gateways.brokers.existing() is not None)


def _way(context: Optional[Context]) -> Way:
    effective = settings() if context is None else settings_of(context)
    if not gateways.native.is_loaded():
        return Way.BROKER
    return choose_way(effective, forked=process.current().parent is not None, native_works=_native_works())


def _native_works() -> bool:
    here = process.current()
    return gateways.native.is_loaded() and (here.parent is None or (here.unquiet is None and native_works_after_fork()))


def unsafe_error(function: str, context: Optional[Context]) -> ForkUnsafeError:
    """The error for a process that can't use PC/SC; arguments as in :func:`gateway`."""
    here = process.current()
    remedy = "use policy 'auto', which uses a broker here, or exec a new program"
    if here.unquiet is not None and here.unquiet.function == in_flight.IMPORTS:
        remedy = "establish the parent's first context before other threads fork"
    elif here.unquiet is not None:
        remedy += "; or fork when no call takes longer than quiesce_timeout"
    return ForkUnsafeError(
        f"process {here.pid} can't use PC/SC: {_unsafe_reason(here)}",
        remedy=remedy,
        function=function,
        owner_pid=context.owner.pid if context else None,
        pid=here.pid,
        established_at=context.established_at if context else None,
    )


def _unsafe_reason(here: process.Epoch) -> str:
    if here.unquiet is None:
        return f"it was forked, and on {policy.PLATFORM} PC/SC doesn't work in a forked process"
    who = here.unquiet
    inside = f"thread {who.thread} was inside {who.function} (for {who.seconds:.1f} s)"
    return f"it, or an ancestor, was forked while {inside}"
