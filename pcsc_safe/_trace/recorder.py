"""Records the calls of an application when they return; see :mod:`events`.

A function is wrapped only if there is a record, so without one a call costs nothing more.  Times, handles' keys, reader
names and share modes are recorded; no data, and no lengths of data.

At a fork nothing changes here: a call goes to the record of the process in which it returns.  A wait is recorded when
it begins, too.
"""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import Any, Callable, Optional

from .._core import handles, observer, process
from .._core.calls import Call, Kind
from .._core.handles import Card, Context
from .._core.library import SUCCESS, constant
from . import events

__all__ = ["begin"]

_MODES = {
    constant("SCARD_SHARE_SHARED"): "shared",
    constant("SCARD_SHARE_EXCLUSIVE"): "exclusive",
    constant("SCARD_SHARE_DIRECT"): "direct",
}
_Route = Callable[..., Any]
_FollowUp = Callable[[Any, "tuple[Any, ...]", Any], Any]


def begin() -> None:
    """Record contexts, cards and calls from now on; called before the core makes its functions."""
    observer.established, observer.connected = established, connected
    observer.wrap_call, observer.wrap_follow_up = wrap_call, wrap_follow_up


def wrap_call(call: Call, route: _Route) -> _Route:
    """A function that calls ``route`` and records it; ``route`` itself if there is nothing to record."""
    wrap = _WRAPPERS.get(call.name) if events.is_on() else None
    return wrap(call, route) if wrap is not None else route


def established(kind: str, context: Context, **more: Any) -> None:
    """Record that this process owns a context.

    :param kind: ``established`` or ``reestablished``.
    :param more: other fields.
    """
    events.record(
        kind,
        context=context.key,
        at=context.established_at.rpartition("/")[2],
        through=getattr(context.gateway, "helper_pid", 0),
        **more,
    )


def connected(kind: str, card: Card) -> None:
    """Record that this process owns a connection to a card.

    :param kind: ``connected`` or ``reconnected``.
    """
    events.record(
        kind,
        card=card.key,
        context=card.context.key,
        reader=str(card.reader),
        mode=_MODES.get(card.share_mode, "unknown"),
    )


def _wrap_new(report: Callable[[Any], None], call: Call, route: _Route) -> _Route:
    """A function that calls ``route``, which makes a context or a connection to a card, and reports it."""

    def make(*arguments: Any) -> Any:
        result = route(*arguments)
        record = getattr(result[1], "_self_record", None) if result[0] == SUCCESS else None
        if record is not None:
            report(record)
        return result

    return make


def _wrap_reconnect(call: Call, route: _Route) -> _Route:
    def reconnect(handle: Any, *arguments: Any) -> Any:
        result = route(handle, *arguments)
        record = handles.cards.get(handle) if result[0] == SUCCESS else None
        if record is not None:
            connected("reconnected", record)
        return result

    return reconnect


def _wrap_end(call: Call, route: _Route) -> _Route:
    assert call.takes is not None
    kind, word = call.takes, {"SCardReleaseContext": "released", "SCardDisconnect": "disconnected"}[call.name]

    def end(handle: Any, *arguments: Any) -> Any:
        record = handles.find(kind, handle)
        result = route(handle, *arguments)
        if result == SUCCESS and record is not None:
            events.record(word, key=record.key)
            events.forget(record.key)
        return result

    return end


# What follows a call that the router has made itself; as cheap as can be, and so no wrapper.


def wrap_follow_up(name: str, after: Optional[_FollowUp]) -> Optional[_FollowUp]:
    """A function that calls ``after`` and records; ``after`` itself if there is nothing to record.

    :param name: of the function after which it is called.
    """
    follow = _FOLLOW_UPS.get(name) if events.is_on() else None
    return follow(after) if follow is not None else after


def _after_exchange(after: Optional[_FollowUp]) -> _FollowUp:
    spans = exchanges.spans

    def exchanged(card: Any, arguments: tuple[Any, ...], result: Any) -> Any:
        if result[0] == SUCCESS:
            end = monotonic()
            file, at, count, limit = spans.get(card.key, events.NO_SPAN)
            if end < limit:
                file[at] = end  # not struct.pack_into: after a system call, all that is bigger is slow
                file[at + 1] = next(count)
            else:
                # The native context knows when its call began; for a call through a broker this is unknown.
                exchanges.add(card.key, card.native.began if card.native is not None else end, end)
        return result

    return exchanged


def _after_begin(after: Optional[_FollowUp]) -> _FollowUp:
    assert after is not None
    note = after

    def began(card: Any, arguments: tuple[Any, ...], result: Any) -> Any:
        note(card, arguments, result)
        if result == SUCCESS and card.transactions == 1:
            transactions.add(card.key, monotonic(), 0.0)
        return result

    return began


def _after_end(after: Optional[_FollowUp]) -> _FollowUp:
    assert after is not None
    note = after

    def ended(card: Any, arguments: tuple[Any, ...], result: Any) -> Any:
        was_in = card.transactions
        note(card, arguments, result)
        if (was_in or result == SUCCESS) and not card.transactions:  # it may have been counted before
            transactions.end(card.key, monotonic())
        return result

    return ended


def _wrap_wait(call: Call, route: _Route) -> _Route:
    def wait(handle: Any, timeout: Any, states: Any) -> Any:
        process.current()  # what a child that C code forked records goes to its parent's record until its epoch begins
        record = handles.find(Kind.CONTEXT, handle) if timeout else None
        if record is None:
            return route(handle, timeout, states)
        ended = waits.add(record.key, monotonic(), 0.0)
        try:
            return route(handle, timeout, states)
        finally:
            ended(monotonic())

    return wait


exchanges, transactions, waits = (events.Activity(name) for name in ("apdu", "begun", "wait"))

_WRAPPERS: dict[str, Callable[[Call, _Route], _Route]] = {
    "SCardEstablishContext": partial(_wrap_new, partial(established, "established")),
    "SCardReleaseContext": _wrap_end,
    "SCardConnect": partial(_wrap_new, partial(connected, "connected")),
    "SCardReconnect": _wrap_reconnect,
    "SCardDisconnect": _wrap_end,
    "SCardGetStatusChange": _wrap_wait,
}
_FOLLOW_UPS: dict[str, Callable[[Optional[_FollowUp]], _FollowUp]] = {
    "SCardTransmit": _after_exchange,
    "SCardControl": _after_exchange,
    "SCardBeginTransaction": _after_begin,
    "SCardEndTransaction": _after_end,
}
