"""One call: unwrap, decide, gateway, wrap.

In the process that owns a handle a call goes straight to the native function.  Everything else takes the slow path:
plain integers, handles that are not ours, and, after a fork, what was inherited.  Whatever a process inherits is told
apart by the epoch of its record, never by a flag that somebody would have to reset at the fork.
"""

from __future__ import annotations

from _thread import get_ident
from time import monotonic, sleep
from typing import Any, Callable, Optional

from . import (
    _bequest,
    _descriptors,
    _events,
    _gate,
    _handles,
    _inherited,
    _log,
    _native,
    _pcscd,
    _process,
    _pyscard,
    _recorded,
    _recovery,
    _transactions,
    _turns,
)
from ._calls import CALLS, Call, Gateway, Kind, LostError
from ._handles import Card, Context, Record
from ._inherited import INVALID_HANDLE
from ._pyscard import SUCCESS, constant
from ._settings import settings
from .broker import _mine

__all__ = ["public"]


# What follows a native call: keeps the records as PC/SC keeps its handles.


def _connected(context: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    hresult, real, protocol = result
    if hresult != SUCCESS or not isinstance(context, Context):
        return result
    reader, share_mode, preferred = arguments
    card = Card(real, context, reader, share_mode, protocol or preferred)
    return [hresult, _handles.register(card), protocol]


def _released(context: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    # libpcsclite drops its context whatever pcscd answers.
    context.forget()
    return SUCCESS if result in _recovery.GONE and _recovery.recovers(context) else result


def _disconnected(card: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    if result == SUCCESS:
        card.forget()
    return result


def _reconnected(card: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    hresult, protocol = result
    if hresult == SUCCESS and isinstance(card, Card):
        card.share_mode, preferred, _ = arguments
        card.protocol = protocol or preferred
    return result


def _began(card: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    if result == SUCCESS and isinstance(card, Card):
        _transactions.began(card)
    return result


def _ended(card: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    if isinstance(card, Card):
        # Any other failure says that the transaction went with the session, the card or pcscd.
        refused = result in _REFUSED
        _transactions.ended(card, 1 if result == SUCCESS else 0 if refused else card.transactions)
    return result


_REFUSED = tuple(constant(name) for name in ("SCARD_E_INVALID_VALUE", "SCARD_E_SHARING_VIOLATION"))
_After = Callable[[Record, "tuple[Any, ...]", Any], Any]

_AFTER: dict[str, _After] = {
    "SCardConnect": _connected,
    "SCardReleaseContext": _released,
    "SCardDisconnect": _disconnected,
    "SCardReconnect": _reconnected,
    "SCardBeginTransaction": _began,
    "SCardEndTransaction": _ended,
}


def _after(name: str) -> Optional[_After]:
    return _recorded.followed(name, _AFTER.get(name))


# The way of a call.


_is_prepared = False


def _prepare() -> None:
    """Import what PC/SC takes, so that nothing need be imported in a child."""
    global _is_prepared
    for module in (_log, _descriptors, _pcscd, _handles, _mine, _bequest):
        module.prepare()
    _is_prepared = True


def _establish(scope: Any) -> Any:
    here = _notice()
    settings()
    if not _is_prepared and here.unquiet is not None and here.unquiet.function == _gate.IMPORTS:
        raise _inherited.unsafe("SCardEstablishContext", None)
    _gate.enter(_gate.IMPORTS, _prepare)

    def keep(real: int, descriptor: Any, owner: _process.Epoch, gateway: Gateway) -> Any:
        return _handles.register(Context(real, scope, descriptor, owner, gateway))

    call = CALLS["SCardEstablishContext"]
    return _persistently(call, lambda: _inherited.gateway(call.name, None).establish(scope, keep), ())


_ATTEMPTS = 3
COMM_ERROR = constant("SCARD_F_COMM_ERROR")


def _persistently(call: Call, attempt: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
    """What ``attempt`` answers, although a broker may be lost meanwhile.

    A call that was under way then may have been carried out, so it is not made again: it answers SCARD_F_COMM_ERROR,
    as libpcsclite does when pcscd is lost.  Any other is made again, of a new broker.
    """
    for _ in range(_ATTEMPTS):
        try:
            return attempt()
        except LostError as lost:
            _handles.disown(lost.gateway)
            if lost.under_way:
                return call.failure(COMM_ERROR, arguments)
    raise _mine.died_too_often()


def _after_loss(call: Call, route: Callable[..., Any], handle: Any, arguments: tuple[Any, ...], lost: LostError) -> Any:
    _handles.disown(lost.gateway)
    if lost.under_way:
        return call.failure(COMM_ERROR, arguments)
    return _route_slowly(call, route, handle, arguments)


def _routed(call: Call) -> Callable[..., Any]:
    """The function that takes the application's call."""
    special: dict[str, Callable[[Call], Callable[..., Any]]] = {
        "SCardEstablishContext": lambda call: _establish,
        "SCardGetStatusChange": _routed_wait,
        "SCardCancel": _routed_cancel,
        "SCardIsValidContext": _routed_without_turn,
    }
    return special.get(call.name, _routed_in_turn)(call)


_GIVES_WAY = 0.0005  # s
_C_INFINITE = 0xFFFFFFFF  # winscard.h's; pyscard's is 0x7FFFFFFF
_NEVER_PASS = ("SCardReleaseContext",)  # it frees what a call that sleeps has in use


def _routed_in_turn(call: Call) -> Callable[..., Any]:
    """In the owner: get the turn, enter the native library, note the outcome; in as few steps as there are."""
    name, native, after, discloses = call.name, _native.raw[call.name], _after(call.name), call.discloses
    registry: dict[Any, Any] = _handles.contexts if call.takes is Kind.CONTEXT else _handles.cards
    process, sentinel, inside, closers = _process, _process.sentinel, _gate.inside, _gate.closers
    here_itself, is_card = _native.gateway, call.takes is Kind.CARD
    polls, holders = name in _transactions.WAITING, _transactions.holders
    is_bare, unheard = call.failed is None, _recovery.UNHEARD[name]
    is_retried, passes = name in _turns.RETRIED, name not in _NEVER_PASS

    def route(handle: Any, *arguments: Any) -> Any:
        try:
            record = registry.get(handle)
        except TypeError:  # unhashable, so no handle; pyscard has its own words for it
            record = None
        if record is None or record.safe is not handle or not sentinel[0] or record.owner is not process.here:
            return _route_slowly(call, route, handle, arguments)
        context = record.context
        if context.gateway is not here_itself:
            try:
                return _through_broker(call, route, record, handle, arguments)
            except LostError as lost:
                return _after_loss(call, route, handle, arguments, lost)
        if closers:
            _gate.wait_until_open(get_ident())
        if polls and holders and not (is_card and holders.get(record.reader) is record):
            _transactions.wait(name, record, arguments, public["SCardStatus"])
        turn = context.turn
        if turn.waits and turn.current is None:
            sleep(_GIVES_WAY)  # a wait for events wants to go on; beside a busy thread it never could
        is_gone = False
        place, is_held = turn.lock, False
        if holders and passes:
            # Others may wait for the end of a transaction of ours, which is not to wait for the end of theirs.
            place, is_held = _turns.place(turn)
        is_beside = place is _turns.BESIDE
        with place:
            if is_held:
                turn.lock.release()
            if turn.current is not None:
                turn.evict()
            ident = get_ident()
            before = inside.get(ident)
            retries = is_retried and not is_beside and not record.transactions
            retrying = turn.retrying
            try:
                inside[ident] = (name, monotonic(), None)
                if retries:
                    turn.retrying = ident
                if is_beside:
                    turn.passing.add(ident)
                in_the_way = closers and ident not in closers
                if polls and holders and not in_the_way and not (is_card and holders.get(record.reader) is record):
                    in_the_way = _transactions.in_the_way(name, record, arguments) is not None
                # Looked at after `passing` was set; a wait for events does it the other way round.
                if is_beside and not in_the_way:
                    in_the_way = not turn.retrying or turn.current is not None
                # Nothing between this look and the native call can run other code: a fork in a handler is seen.
                if not in_the_way and sentinel[0] and record.owner is process.here:
                    real = record.real
                    result = native(real, *arguments)
                    hresult = result if is_bare else result[0]
                    is_gone = hresult != SUCCESS and hresult in unheard and _recovery.noticed(record, real, hresult)
                    if not is_gone:
                        if discloses and hresult != SUCCESS:
                            return call.failure(hresult)
                        return after(record, arguments, result) if after else result
            finally:
                if retries:
                    turn.retrying = retrying  # this thread, if this is a signal handler
                if is_beside:
                    turn.passing.discard(ident)
                if before is None:
                    inside.pop(ident, None)
                else:
                    inside[ident] = before
        if is_gone:
            return _recovery.again(call, lambda: _route_slowly(call, route, handle, arguments), arguments)
        return _route_slowly(call, route, handle, arguments)

    return route


def _through_broker(
    call: Call, route: Callable[..., Any], record: Record, handle: Any, arguments: tuple[Any, ...]
) -> Any:
    """A call on what this process has in a broker."""
    real, after = record.real, _after(call.name)
    result = record.context.gateway.functions[call.name](real, *arguments)
    hresult = result if call.failed is None else result[0]
    is_gone = hresult in _recovery.UNHEARD[call.name] and _recovery.noticed(record, real, hresult)
    if hresult == INVALID_HANDLE and _recovery.lost_meanwhile(record, real):
        is_gone = call.name != "SCardGetStatusChange"
        result = call.failure(_recovery.NO_SERVICE, arguments)
    if is_gone:
        return _recovery.again(call, lambda: _route_slowly(call, route, handle, arguments), arguments)
    if call.name == "SCardConnect" and record.real != real:
        return call.failure(COMM_ERROR)  # another thread has noticed since that what it is through is lost
    return after(record, arguments, result) if after else result


def _routed_without_turn(call: Call) -> Callable[..., Any]:
    """For what libpcsclite answers at once, whatever else the context is used for."""
    name, native = call.name, _native.functions[call.name]
    process, sentinel, inside, closers = _process, _process.sentinel, _gate.inside, _gate.closers
    contexts, here_itself = _handles.contexts, _native.gateway

    def route(handle: Any) -> Any:
        try:
            context = contexts.get(handle)
        except TypeError:
            context = None
        if context is None or context.safe is not handle or not sentinel[0] or context.owner is not process.here:
            return _route_slowly(call, route, handle, ())
        if context.gateway is not here_itself:
            return _route_slowly(call, route, handle, ())
        ident = get_ident()
        before = inside.get(ident)
        try:
            inside[ident] = entry = (name, monotonic(), None)
            if closers:
                _gate.through(ident, entry)
            if sentinel[0] and context.owner is process.here:
                real = context.real
                result = native(real)
                if result == SUCCESS or context.real == real:
                    return result
        finally:
            if before is None:
                inside.pop(ident, None)
            else:
                inside[ident] = before
        return _route_slowly(call, route, handle, ())

    return route


def _routed_cancel(call: Call) -> Callable[..., Any]:
    def once(handle: Any) -> Any:
        context = _owned(handle)
        if context is None:
            return _route_slowly(call, once, handle, ())
        return _turns.cancel(context.turn, context.real)

    def route(handle: Any) -> Any:
        record = _handles.find(Kind.CONTEXT, handle)
        if not isinstance(record, Context):
            return once(handle)
        return _recovery.cancel(record, lambda: once(handle))

    return route


def _routed_wait(call: Call) -> Callable[..., Any]:
    in_turn = _routed_in_turn(call)

    def route(handle: Any, timeout: Any, states: Any) -> Any:
        record = _handles.find(Kind.CONTEXT, handle)
        if not isinstance(record, Context) or type(timeout) is not int or not 0 <= timeout <= _C_INFINITE:
            return in_turn(handle, timeout, states)
        timeout = min(timeout, _turns.INFINITE)
        began, cancels = monotonic(), record.turn.cancels
        answer = wait(handle, timeout, states)
        if answer[0] in _recovery.GONE and _recovery.recovers(record):
            list_readers = public["SCardListReaders"]
            return _recovery.outlast(call, wait, list_readers, record, timeout, states, began, cancels)
        return answer

    def wait(handle: Any, timeout: int, states: Any) -> Any:
        if not timeout:
            return in_turn(handle, timeout, states)
        context = _owned(handle)
        if context is None:
            return _route_slowly(call, wait, handle, (timeout, states))
        real = context.real
        answer = _turns.await_change(
            context.turn,
            # The real handle too: another thread may have lost the context since, and established it anew.
            lambda: bool(_process.sentinel[0]) and context.owner is _process.here and context.real == real,
            real,
            timeout,
            states,
            call.failure(_turns.CANCELLED, (timeout, states)),
        )
        if answer is not None:
            return answer
        if _recovery.lost_meanwhile(context, real):
            return call.failure(_recovery.NO_SERVICE, (timeout, states))
        return _route_slowly(call, wait, handle, (timeout, states))

    return route


def _owned(handle: Any) -> Optional[Context]:
    """The context that ``handle`` stands for, if this process owns it, in its own native library."""
    record = _handles.find(Kind.CONTEXT, handle) if _process.sentinel[0] else None
    if not isinstance(record, Context) or record.released or record.owner is not _process.here:
        return None
    return record if record.gateway is _native.gateway else None


def _route_slowly(call: Call, route: Callable[..., Any], handle: Any, arguments: tuple[Any, ...]) -> Any:
    """For plain integers, what is no handle of ours, what was inherited, and what is reached through a broker."""
    return _persistently(call, lambda: _routed_slowly(call, route, handle, arguments), arguments)


def _routed_slowly(call: Call, route: Callable[..., Any], handle: Any, arguments: tuple[Any, ...]) -> Any:
    assert call.takes is not None
    here = _notice()
    record = _handles.find(call.takes, handle)
    if record is None or (record.owner is here and (record.released or record.kind is not call.takes)):
        through = _inherited.gateway(call.name, None) if record is None else record.context.gateway
        real = handle if record is None else record.real
        return through.enter(call.name, through.functions[call.name], real, *arguments)
    if record.kind is not call.takes or record.released:
        return call.failure(INVALID_HANDLE, arguments)
    if record.owner is not here:
        answer = _inherited.answer(call, record, arguments)
        if answer is not None:
            return answer
    through = record.context.gateway
    if through is not _native.gateway:
        return _through_broker(call, route, record, handle, arguments)
    if (_handles.contexts if record.kind is Kind.CONTEXT else _handles.cards).get(record.number) is not record:
        # pcscd was restarted, and has given the number to somebody else since.
        return through.enter(call.name, through.functions[call.name], record.real, *arguments)
    return route(record.safe, *arguments)


_announced: Optional[_process.Epoch] = None


def _notice() -> _process.Epoch:
    """The epoch of this process; says once how its beginning was noticed."""
    global _announced
    here = _process.current()
    if here is not _announced:
        _announced = here
        if here.parent is not None and _handles.contexts:
            _events.record("fork", parent=here.parent.pid)
            _log.debug("process %d was forked from %d, noticed by %s", here.pid, here.parent.pid, here.noticed_by)
            if here.unquiet is not None:
                function, thread, _ = here.unquiet
                _log.warning(
                    "process %d can't use PC/SC: it was forked while thread %s was inside %s",
                    here.pid,
                    thread,
                    function,
                )
    return here


# The names of the drop-in.


def _exported(name: str, value: Any) -> Any:
    call = CALLS.get(name)
    if call is None or not _process.FORKS or (call.takes is None and name != "SCardEstablishContext"):
        return value
    return _pyscard.shaped(_recorded.recorded(call, _routed(call)), _pyscard.signatures[name])


public: dict[str, Any] = {name: _exported(name, value) for name, value in _pyscard.public.items()}
"""Every public name of the installed ``smartcard.scard``; the functions that take or give a handle are ours."""
