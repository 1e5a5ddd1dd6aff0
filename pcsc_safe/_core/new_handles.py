"""New contexts and cards: each is recorded as it is made, and given up if the application doesn't get it.

At a fork nothing changes here; a child's first use of an inherited object is in :mod:`reestablish`.
"""

from __future__ import annotations

from typing import Any

from ..errors import BrokerError
from . import failures, first_call, follow_ups, gateways, handles, process, reestablish
from .calls import CALLS, STALE, Gateway, LostError
from .handles import Card, Context, Record
from .library import SUCCESS
from .reestablish import LEAVE_CARD
from .settings import settings

__all__ = ["connect", "establish"]


def establish(scope: Any) -> Any:
    """SCardEstablishContext.

    :return: pyscard's result, with the proxy of the context.
    """
    settings()  # before anything is imported, because it may raise SettingsError
    first_call.prepare()
    established: list[Context] = []

    def keep(real: Any, number: int, owner: process.Epoch, gateway: Gateway) -> Any:
        established.append(Context(real, number, scope, owner, gateway))
        return handles.register(established[-1])

    call = CALLS["SCardEstablishContext"]
    try:
        return reestablish.retry_in_new_broker(call, lambda: reestablish.establish(call.name, scope, keep), ())
    except BaseException:  # an exception of a signal handler: the application doesn't get the context
        for context in established:
            _undo(context)
        raise


def connect(gateway: Gateway, context: Context, arguments: tuple[Any, ...]) -> Any:
    """SCardConnect.

    :param gateway: that of the context.
    :param arguments: reader, share mode, protocols.
    :return: pyscard's result, with the proxy of the card; or :data:`calls.STALE`.
    :raises LostError: the broker has ended.
    """
    reader, share_mode, preferred = arguments
    # The family can see the session from before the connection is made.
    session = reestablish.new_session(context, reader, share_mode)
    connected: list[Card] = []

    def keep(real: int, native: Any, protocol: int) -> Any:
        connected.append(Card(real, native, context, reader, share_mode, protocol or preferred, session))
        proxy = handles.register(connected[-1])
        if context.released:  # by another thread, since the connection was made
            connected[-1].forget()
        return proxy

    try:
        result = gateway.connect(context, arguments, keep)
        if result is STALE or result[0] != SUCCESS:
            session.end()
        return result
    except BaseException:  # as in establish()
        for card in connected:
            _undo(card)
        session.end()
        raise


def _undo(record: Record) -> None:
    """Give up a new context or card that the application doesn't get, unless its gateway has done so."""
    name, arguments = ("SCardDisconnect", (LEAVE_CARD,)) if isinstance(record, Card) else ("SCardReleaseContext", ())
    try:
        gateway, real = handles.reach(record) or (None, None)
        with failures.suppress(LostError, BrokerError):
            if gateway is gateways.native:
                gateways.native.caller(CALLS[name], follow_ups.noted(CALLS[name]))(record, arguments)
            elif gateway is not None:
                gateway.functions[name](real, *arguments)
    finally:
        record.forget()
