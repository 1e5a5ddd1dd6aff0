"""One call: unwrap the handle, decide, call the gateway, wrap the result.

In the process that owns a handle a call goes straight to the native function.  Everything else takes the slow path:
plain integers, handles that are not ours, and, after a fork, inherited handles.  An inherited handle is recognised by
the epoch of its record, never by a flag that would have to be reset at the fork.
"""

from __future__ import annotations

from time import monotonic
from typing import Any, Callable, Optional

from ..errors import BrokerError, ForkedHandleError, ForkUnsafeError
from ..policy import Role
from . import (
    first_call,
    follow_ups,
    gateways,
    handles,
    inherited,
    library,
    new_handles,
    observer,
    process,
    reader_states,
    readiness,
    recovery,
    reestablish,
    sparing,
    transfer,
)
from .calls import CALLS, NO_HANDLE, STALE, TRANSACTIONS_BEGUN, Call, FollowUp, Gateway, Kind, LostError
from .failures import is_ours
from .follow_ups import FOLLOW_UPS
from .handles import Card, Context, Record
from .library import SUCCESS
from .reestablish import INVALID_HANDLE
from .settings import when_changed

__all__ = ["public"]


def _repeat_after_loss(
    call: Call, route: Callable[..., Any], handle: Any, arguments: tuple[Any, ...], lost: LostError
) -> Any:
    handles.mark_gateway_lost(lost.gateway)
    if lost.in_progress:
        return call.failure(reestablish.COMM_ERROR, arguments)
    return _route_slowly(call, route, handle, arguments)


_NEEDS_NO_GATEWAY = (Role.VALIDITY, Role.CLEANUP, Role.CANCEL)
_C_INFINITE = 0xFFFFFFFF  # winscard.h's; pyscard's is 0x7FFFFFFF
_Native = Callable[[Any, "tuple[Any, ...]"], Any]


def _caller(call: Call) -> _Native:
    """The function that makes a call on a record of this process in its native library."""
    return _connect_natively if call.name == "SCardConnect" else gateways.native.caller(call, follow_ups.noted(call))


def _connect_natively(context: Any, arguments: tuple[Any, ...]) -> Any:
    return new_handles.connect(gateways.native, context, arguments)


def _make_direct_route(call: Call, make: Optional[_Native] = None) -> Callable[..., Any]:
    """In the owner: make the call and note the outcome, in as few steps as possible.

    :param make: makes the call in this process's native library; :func:`_caller` by default.
    """
    registry, make = handles.registry(call.takes), make or _caller(call)
    after = FOLLOW_UPS[call.name] if follow_ups.noted(call) is None else None  # not twice
    discloses, is_bare = call.discloses, call.failed is None
    sentinel, native = process.sentinel, gateways.native
    repeatable = recovery.REPEATABLE_CODES[call.name]

    def route(handle: Any, *arguments: Any) -> Any:
        try:
            record = registry.get(handle)
        except TypeError as error:  # unhashable, so no handle; pyscard has its own words for it
            if not is_ours(error):
                raise
            record = None
        if record is None or record.safe is not handle or not sentinel[0] or record.owner is not process.here:
            return _route_slowly(call, route, handle, arguments)
        if record.context.gateway is not native:
            try:
                return _through_broker(call, route, record, handle, arguments)
            except LostError as lost:
                return _repeat_after_loss(call, route, handle, arguments, lost)
        real, session = record.real, record.session
        result = make(record, arguments)
        if result is STALE:
            return _route_slowly(call, route, handle, arguments)
        hresult = result if is_bare else result[0]
        if hresult != SUCCESS:
            if hresult in repeatable and recovery.note_loss(record, real, hresult):
                return recovery.repeat(call, lambda: _route_slowly(call, route, handle, arguments), arguments)
            follow_ups.note_failure(call.name, session, hresult)
            if discloses:
                return call.failure(hresult)
        return after(record, arguments, result) if after else result

    return route


def _through_broker(
    call: Call, route: Callable[..., Any], record: Record, handle: Any, arguments: tuple[Any, ...]
) -> Any:
    """A call on a handle that this process has in a broker."""
    name, after = call.name, FOLLOW_UPS[call.name]
    while True:
        settled, session = handles.settled, record.session
        reached: tuple[Gateway, Any] = handles.reach(record) or (gateways.native, None)
        gateway, real = reached
        result: Any = STALE if gateway is gateways.native else _send(name, gateway, record, real, arguments, after)
        if result is STALE:
            return _route_slowly(call, route, handle, arguments)  # another thread has re-established the context
        hresult = result if call.failed is None else result[0]
        if hresult == SUCCESS:
            return result
        if hresult != INVALID_HANDLE:
            break
        transfer.wait_while_given(record.context)
        if recovery.was_replaced(record, real) and not recovery.recovers(record):
            return _route_slowly(call, route, handle, arguments)  # handed over before this call came there
        if handles.settled is settled:
            break  # otherwise a fork that failed had given it away
    follow_ups.note_failure(name, session, hresult)
    is_lost = hresult in recovery.REPEATABLE_CODES[name] and recovery.note_loss(record, real, hresult)
    if hresult == INVALID_HANDLE and recovery.was_lost_since(record, real):
        is_lost = name != "SCardGetStatusChange"
        result = call.failure(recovery.NO_SERVICE, arguments)
    if is_lost:
        return recovery.repeat(call, lambda: _route_slowly(call, route, handle, arguments), arguments)
    return after(record, arguments, result) if after else result


def _send(
    name: str,
    gateway: Gateway,
    record: Record,
    real: Any,
    arguments: tuple[Any, ...],
    after: Optional[FollowUp] = None,
) -> Any:
    """The result of a call through a broker.

    :param after: follows the call if it succeeds.
    """
    if name == "SCardConnect" and isinstance(record, Context):
        return new_handles.connect(gateway, record, arguments)
    make = gateway.functions[name]
    try:
        return _send_and_note(name, make, record, real, arguments, after) if after else make(real, *arguments)
    except LostError as lost:
        if lost.in_progress and name == "SCardReleaseContext":
            record.forget()  # like libpcsclite, whatever the call returns
        raise


def _send_and_note(
    name: str, make: Callable[..., Any], record: Record, real: Any, arguments: tuple[Any, ...], after: FollowUp
) -> Any:
    """A call that changes the record; it is changed, too, if a signal handler raises after the call."""
    made: list[Any] = []
    counted: list[bool] = []

    def note(is_final: bool) -> None:
        for result in made:
            hresult = result if CALLS[name].failed is None else result[0]
            if hresult == SUCCESS or (is_final and hresult != INVALID_HANDLE):
                if isinstance(record, Card) and not counted:
                    begun = TRANSACTIONS_BEGUN.get(name, 0) if hresult == SUCCESS else 0
                    count = max(0, record.transactions + begun)
                    record.transactions, counted[:] = count, (True,)  # nothing comes between
                after(record, arguments, result)

    try:
        result = make(real, *arguments, made=made)
        note(is_final=False)
        return result
    except BaseException as error:
        if not made and name == "SCardEndTransaction" and not isinstance(error, (LostError, BrokerError)):
            made.append(SUCCESS)  # the broker ends it, unless the request was not sent; ending it again does no harm
        note(is_final=True)  # perhaps again, which changes nothing more
        raise


def _make_validity_route(call: Call) -> Callable[..., Any]:
    """SCardIsValidContext: always returns a code; in the owner of a native context, it only looks at the registry."""
    sentinel, contexts_by_handle, native = process.sentinel, handles.contexts, gateways.native

    def route(handle: Any) -> Any:
        try:
            context = contexts_by_handle.get(handle)
        except TypeError as error:
            if not is_ours(error):
                raise
            context = None
        is_own = context is not None and context.safe is handle and sentinel[0] and context.owner is process.here
        if context is not None and is_own and context.gateway is native:
            return SUCCESS
        try:
            return look(handle)
        except (ForkedHandleError, ForkUnsafeError, BrokerError) as error:
            if not is_ours(error):
                raise
            # Not lost: the broker can't be asked, for example because no descriptor is free.
            return SUCCESS if context is not None and is_own and context.owner is process.here else INVALID_HANDLE

    look = _make_direct_route(call, lambda context, arguments: SUCCESS)
    return route


def _make_cancel_route(call: Call) -> Callable[..., Any]:
    direct = _make_direct_route(call)

    def route(handle: Any) -> Any:
        record = handles.find(Kind.CONTEXT, handle)
        if not isinstance(record, Context):
            return direct(handle)
        return recovery.cancel(record, lambda: direct(handle))

    return route


def _make_wait_route(call: Call) -> Callable[..., Any]:
    direct = _make_direct_route(call)
    wait = _make_wait(call, direct)

    def route(handle: Any, timeout: Any, states: Any) -> Any:
        record = handles.find(Kind.CONTEXT, handle)
        if not isinstance(record, Context) or not isinstance(timeout, int) or not 0 <= timeout <= _C_INFINITE:
            return direct(handle, timeout, states)
        timeout = min(int(timeout), reader_states.INFINITE)
        began, cancels, real = monotonic(), record.cancels, record.real
        result = wait(handle, timeout, states)
        if result[0] == recovery.NO_SERVICE:
            recovery.warn_of_no_service(call.name)
        # Another thread that replaces the context releases the one before, and this ends the waits on it in a broker.
        is_replaced = result[0] == reader_states.CANCELLED and recovery.was_replaced(record, real)
        if (is_replaced or result[0] in recovery.SERVICE_LOST_CODES) and recovery.recovers(record):
            list_readers = public["SCardListReaders"]
            return recovery.continue_wait(call, wait, list_readers, record, timeout, states, began, cancels)
        return result

    return route


def _make_wait(call: Call, direct: Callable[..., Any]) -> Callable[..., Any]:
    """A wait for events with valid arguments; ends with the PC/SC context that it began on."""

    def wait(handle: Any, timeout: int, states: Any) -> Any:
        if not timeout:
            return direct(handle, timeout, states)
        context = _owned(handle)
        if context is None:
            return _route_slowly(call, wait, handle, (timeout, states))
        real, began = context.real, monotonic()
        result = gateways.native.await_change(
            context,
            # Also compares real, because another thread may have re-established the context since.
            lambda: bool(process.sentinel[0]) and context.owner is process.here and context.real is real,
            timeout,
            states,
            call.failure(reader_states.CANCELLED, (timeout, states)),
        )
        if result is not STALE:
            return result
        if recovery.was_lost_since(context, real):
            return call.failure(recovery.NO_SERVICE, (timeout, states))
        if timeout != reader_states.INFINITE:
            timeout = max(1, timeout - round((monotonic() - began) * 1000))
        return _route_slowly(call, wait, handle, (timeout, states))

    return wait


def _owned(handle: Any) -> Optional[Context]:
    """The context that ``handle`` stands for, if this process owns it in its native library."""
    record = handles.find(Kind.CONTEXT, handle) if process.sentinel[0] else None
    if not isinstance(record, Context) or record.released or record.owner is not process.here:
        return None
    return record if record.gateway is gateways.native else None


def _route_slowly(call: Call, route: Callable[..., Any], handle: Any, arguments: tuple[Any, ...]) -> Any:
    """For plain integers, handles that are not ours, inherited handles, and handles in a broker."""
    return reestablish.retry_in_new_broker(call, lambda: _route_slowly_once(call, route, handle, arguments), arguments)


def _route_slowly_once(call: Call, route: Callable[..., Any], handle: Any, arguments: tuple[Any, ...]) -> Any:
    assert call.takes is not None
    here = first_call.current_epoch()
    record = handles.find(call.takes, handle)
    if record is None:
        if call.role in _NEEDS_NO_GATEWAY and isinstance(handle, int) and not reestablish.has_gateway():
            return INVALID_HANDLE  # nothing is behind it here
        through = reestablish.gateway(call.name, None)
        return through.enter(call.name, handle, *arguments)
    released = record.released or record.context.released
    if record.owner is here and (released or record.kind is not call.takes):
        through = record.context.gateway
        try:
            return through.enter(call.name, NO_HANDLE, *arguments)
        except LostError:
            return call.failure(INVALID_HANDLE, arguments)
    if record.kind is not call.takes or released:
        return call.failure(INVALID_HANDLE, arguments)
    if record.owner is not here:
        result = inherited.apply_policy(call, record, arguments)
        if result is not None:
            return result
        if record.released or record.context.released:
            return call.failure(INVALID_HANDLE, arguments)
    through = record.context.gateway
    if through is not gateways.native:
        return _through_broker(call, route, record, handle, arguments)
    registered: Any = handles.registry(record.kind).get(record.number)
    if registered is not record:
        # pcscd was restarted, and has since used the number for another handle.
        if record.kind is Kind.CONTEXT:
            return _caller(call)(record, arguments)
        return through.enter(call.name, record.real, *arguments)
    return route(record.safe, *arguments)


# The names of the drop-in.

_ROUTES: dict[str, Callable[[Call], Callable[..., Any]]] = {
    "SCardEstablishContext": lambda call: new_handles.establish,
    "SCardGetStatusChange": _make_wait_route,
    "SCardIsValidContext": _make_validity_route,
    "SCardCancel": _make_cancel_route,
    **dict.fromkeys(
        ("SCardDisconnect", "SCardReconnect", "SCardEndTransaction"),
        lambda call: sparing.make_route(call, _make_direct_route(call)),
    ),
}


def _exported(name: str, value: Any) -> Any:
    call = CALLS.get(name)
    if call is None or not process.FORKS or (call.takes is None and name != "SCardEstablishContext"):
        return value
    route = _ROUTES.get(name, _make_direct_route)(call)
    return library.with_signature(observer.wrap_call(call, route), library.signatures[name])


public: dict[str, Any] = {name: _exported(name, value) for name, value in library.public.items()}
"""Every public name of the installed ``smartcard.scard``; the functions that take or return a handle are ours."""

when_changed(readiness.prepare_for)
