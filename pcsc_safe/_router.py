"""One call: unwrap, decide, gateway, wrap.

In the process that owns a handle a call goes straight to the native function.  Everything else takes the slow path:
plain integers, handles that are not ours, and, after a fork, what was inherited.  Whatever a process inherits is told
apart by the epoch of its record, never by a flag that somebody would have to reset at the fork.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

from . import _handles, _inherited, _log, _native, _process
from ._calls import CALLS, Call, Kind
from ._handles import Card, Context, Record
from ._inherited import INVALID_HANDLE, SUCCESS
from ._settings import settings

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
    return result


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
        card.transactions += 1
    return result


def _ended(card: Record, arguments: tuple[Any, ...], result: Any) -> Any:
    if result == SUCCESS and isinstance(card, Card):
        card.transactions = max(0, card.transactions - 1)
    return result


_After = Callable[[Record, "tuple[Any, ...]", Any], Any]

_AFTER: dict[str, _After] = {
    "SCardConnect": _connected,
    "SCardReleaseContext": _released,
    "SCardDisconnect": _disconnected,
    "SCardReconnect": _reconnected,
    "SCardBeginTransaction": _began,
    "SCardEndTransaction": _ended,
}


# The way of a call.


def _establish(scope: Any) -> Any:
    for module in (_log, _native, _handles):
        module.prepare()
    settings()
    _notice()
    _inherited.require_native("SCardEstablishContext", None)
    result, descriptor = _native.establish(scope)
    if result[0] != SUCCESS:
        return result
    return [result[0], _handles.register(Context(result[1], scope, descriptor))]


def _routed(call: Call) -> Callable[..., Any]:
    """The function that takes the application's call, as short a way as there is."""
    if call.name == "SCardEstablishContext":
        return _establish
    native, after = _native.functions[call.name], _AFTER.get(call.name)
    registry: dict[Any, Any] = _handles.contexts if call.takes is Kind.CONTEXT else _handles.cards
    process, sentinel = _process, _process.sentinel

    def route(handle: Any, *arguments: Any) -> Any:
        try:
            record = registry.get(handle)
        except TypeError:  # unhashable, so no handle; pyscard has its own words for it
            record = None
        if record is None or record.safe is not handle or not sentinel[0] or record.owner is not process.here:
            return _route_slowly(call, handle, arguments)
        result = native(record.real, *arguments)
        return after(record, arguments, result) if after else result

    return route


def _route_slowly(call: Call, handle: Any, arguments: tuple[Any, ...]) -> Any:
    assert call.takes is not None
    here = _notice()
    record = _handles.find(call.takes, handle)
    if record is None:
        return _native.functions[call.name](handle, *arguments)
    if record.owner is not here:
        if record.kind is not call.takes or record.released:
            return call.failure(INVALID_HANDLE, arguments)
        answer = _inherited.answer(call, record, arguments)
        if answer is not None:
            return answer
    result = _native.functions[call.name](record.real, *arguments)
    after = _AFTER.get(call.name)
    return after(record, arguments, result) if after and record.kind is call.takes and not record.released else result


_announced: Optional[_process.Epoch] = None


def _notice() -> _process.Epoch:
    """The epoch of this process; says once how its beginning was noticed."""
    global _announced
    here = _process.current()
    if here is not _announced:
        _announced = here
        if here.parent is not None and _handles.contexts:
            _log.debug("process %d was forked from %d, noticed by %s", here.pid, here.parent.pid, here.noticed_by)
    return here


# The names of the drop-in.


def _taking_1(route: Callable[..., Any]) -> Any:
    return lambda a: route(a)


def _taking_2(route: Callable[..., Any]) -> Any:
    return lambda a, b: route(a, b)


def _taking_3(route: Callable[..., Any]) -> Any:
    return lambda a, b, c: route(a, b, c)


def _taking_4(route: Callable[..., Any]) -> Any:
    return lambda a, b, c, d: route(a, b, c, d)


_TAKING = {1: _taking_1, 2: _taking_2, 3: _taking_3, 4: _taking_4}


def _named(route: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """``route`` with the name, parameters and docstring of pyscard's own function.

    So that it takes the same keywords, and Python words a wrong call the same way.
    """
    code = like.__code__
    function: Callable[..., Any] = _TAKING[code.co_argcount](route)
    function.__code__ = function.__code__.replace(
        co_name=like.__name__, co_varnames=code.co_varnames[: code.co_argcount]
    )
    function.__name__ = function.__qualname__ = like.__name__
    function.__module__, function.__doc__ = "pcsc_safe.scard", like.__doc__
    return function


def _exported(name: str, value: Any) -> Any:
    call = CALLS.get(name)
    if call is None or not _process.FORKS or (call.takes is None and name != "SCardEstablishContext"):
        return value
    return _named(_routed(call), value)


public: dict[str, Any] = {name: _exported(name, value) for name, value in _native.public.items()}
"""Every public name of the installed ``smartcard.scard``; the functions that take or give a handle are ours."""
