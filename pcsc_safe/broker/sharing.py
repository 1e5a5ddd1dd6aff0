"""Sessions that several clients of a broker have: which clients, and whose transaction is open.

PC/SC sees these clients as one application with one handle.  So this module does what PC/SC does between applications:
a transaction of one client makes the others wait until the transaction or the client ends.  A session ends when the
last client that has it releases it.

Nothing here forks: this runs in brokers.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Callable, Optional

from .._core import handles, library, router

if TYPE_CHECKING:
    from .served import Client

__all__ = ["Handle", "call_on_card", "drop", "end", "leave", "share"]

_CHECK_INTERVAL = 1.0  # s; whether the client that waits is still there
_REFUSED = frozenset(("SCardControl", "SCardEndTransaction"))  # PC/SC doesn't wait in these
_LEAVE, _RESET = library.constant("SCARD_LEAVE_CARD"), library.constant("SCARD_RESET_CARD")
# pcscd's or libpcsclite's loops that wait for the end of a transaction inside the call.
_WAITING = frozenset(
    ("SCardBeginTransaction", "SCardConnect", "SCardDisconnect", "SCardReconnect", "SCardStatus", "SCardTransmit")
)
_EXCLUSIVE = library.constant("SCARD_SHARE_EXCLUSIVE")


class Handle(int):
    """A context or card in a broker.  It is not a proxy, because nothing is inherited there.

    :ivar holders: the clients that have it; empty while only one client has ever had it.
    :ivar transaction: whose transaction is open on this card.
    :ivar transactions_ended: how many transactions of this card have ended.
    :ivar free: a condition; held while a transaction of this card begins or ends, and during every call on a shared
        card; notified when a transaction has ended.
    """

    _self_record: handles.Record
    holders: set[Client]
    transaction: Optional[Client]
    transactions_ended: int
    free: threading.Condition

    def __new__(cls, record: handles.Record) -> Handle:
        """The handle for ``record``."""
        handle = super().__new__(cls, record.number)
        handle._self_record = record
        handle.holders = set()
        handle.transaction = None
        handle.transactions_ended = 0
        handle.free = threading.Condition()
        return handle

    @property
    def record(self) -> handles.Record:
        """The record that it stands for."""
        return self._self_record


_holders_lock = threading.Lock()


def share(giver: Client, taker: Client, number: int, *, keeps: bool) -> bool:
    """Give a context or a card to a client that has not ended, without waiting for any call.

    :param giver: the client that has it.
    :param taker: the client that gets it.
    :param number: of the handle.
    :param keeps: whether the giver keeps it, too; if not, its transaction is transferred with it.
    :return: whether the giver had it, and the other client has not ended.
    """
    with _holders_lock:
        handle = giver.handles.get(number)
        if handle is None or taker.has_ended:
            return False
        taker.handles[number] = handle
        if keeps:
            handle.holders.update((giver, taker))
        else:
            giver.handles.pop(number, None)
            if handle.holders:
                handle.holders.discard(giver)
                handle.holders.add(taker)
            if handle.transaction is giver:
                handle.transaction = taker
    if not keeps and isinstance(handle.record, handles.Context):
        for card in list(handle.record.cards):  # also those that the giver has connected to since
            share(giver, taker, card, keeps=False)
    return True


def end(client: Client) -> None:
    """Note that a client has ended; from now on :func:`share` gives it nothing."""
    with _holders_lock:
        client.has_ended = True


def call_on_card(client: Client, name: str, handle: Handle, function: Callable[..., Any], arguments: Any) -> Any:
    """A call on a card that is, or may become, shared; made when no other client's transaction is open.

    :return: the result; None if PC/SC would not wait, and the other client's transaction is a sharing violation.
    """
    with handle.free:
        while handle.transaction not in (None, client):
            if name in _REFUSED or client.has_ended:
                return None
            if name not in _WAITING:
                break
            handle.free.wait(_CHECK_INTERVAL)
        if client.has_ended:
            return None
        result = function(handle, *arguments)
        _update_transaction(client, handle)
        if int(handle) not in client.handles:  # another thread has dropped it
            _end_transaction(client, handle)
        return result


def _update_transaction(client: Client, handle: Handle) -> None:
    """Note whose transaction is open after a call of this client; called with the handle's lock."""
    record = handle.record
    if isinstance(record, handles.Card) and record.transactions:
        handle.transaction = handle.transaction or client
    elif handle.transaction is not None:
        handle.transaction = None
        handle.transactions_ended += 1
        handle.free.notify_all()


def _end_transaction(client: Client, handle: Handle) -> None:
    """End this client's transaction on a shared card; called with the handle's lock."""
    if handle.transaction is client:
        while isinstance(handle.record, handles.Card) and handle.record.transactions:
            if router.public["SCardEndTransaction"](handle, _LEAVE) != library.SUCCESS:
                break
        _update_transaction(client, handle)


def drop(client: Client, handle: Handle) -> Optional[list[tuple[Handle, bool]]]:
    """Note that a client no longer has a context, with its cards, or a card; never waits for a call.

    :return: None if no other client has it, so that the session must be ended; otherwise the arguments for
        :func:`leave`.
    """
    dropped = [handle]
    if isinstance(handle.record, handles.Context):
        mine = [other for other in list(client.handles.values()) if other.record.context is handle.record]
        dropped += [other for other in mine if other is not handle]
    with _holders_lock:
        for each in dropped:
            client.handles.pop(int(each), None)
            each.holders.discard(client)
        if not handle.holders:  # then the cards and the transaction end with the session
            return None
        return [(each, not each.holders) for each in dropped if not each.holders or each.transaction is client]


def leave(client: Client, card: Handle, is_last: bool) -> None:
    """End what a client had in a session that other clients continue; waits for a call that is in progress on the card.

    :param card: one that the client has dropped.
    :param is_last: whether no other client has it: it is disconnected.  Otherwise the client's transaction ends.
    """
    if is_last:
        router.public["SCardDisconnect"](card, _disposition(card.record))
    elif card.transaction is client:
        # Only then, because the thread that has the lock may wait for a transaction that this client has elsewhere.  If
        # the client begins a transaction at this moment, the thread that begins it also ends it.
        with card.free:
            _end_transaction(client, card)


def _disposition(record: handles.Record) -> int:
    """The disposition that pcscd uses for the card of an application that has ended."""
    is_locked = isinstance(record, handles.Card) and (record.transactions or record.share_mode == _EXCLUSIVE)
    return _RESET if is_locked else _LEAVE
