"""The transactions of this process, by reader.

pcscd lets a call on a reader wait for the end of a transaction that another handle has there, inside the call.  Where
that handle is this process's own, its end may need the turn that the waiting call has; so such a call waits here,
before it takes a turn.  A child has no transactions: those that it inherited are its parent's.

Where the handle is another process's, SCardConnect waits inside pcscd, and its context takes no other call meanwhile,
not even the end of its own transaction; two processes that do so to each other's readers wait for ever, and pcscd with
them, even when they are dead.  An application that connects in the middle of another thread's transaction has that on
raw pyscard too; the connections that a child gets unasked wait for the end of such transactions first.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from time import monotonic, sleep
from typing import Any, Callable, Optional, TypeVar

from . import _process
from ._handles import Card, Record
from ._pyscard import constant

__all__ = ["WAITING", "began", "connect_in_turn", "continued", "ended", "holders", "in_the_way", "wait"]

_Result = TypeVar("_Result")

# pcscd's or libpcsclite's loops that wait for the end of a transaction inside the call.
WAITING = frozenset(
    ("SCardBeginTransaction", "SCardConnect", "SCardDisconnect", "SCardReconnect", "SCardStatus", "SCardTransmit")
)
_LEAVE_CARD: int = constant("SCARD_LEAVE_CARD")
_EXCLUSIVE: int = constant("SCARD_SHARE_EXCLUSIVE")
_POLL = 0.002  # s
_CHECKS_EVERY = 50
_PATIENCE = 5.0  # s; with another thread's transaction, whose end may depend on the one that waits

holders: dict[str, Card] = {}
"""The card that is in a transaction, by its reader's name."""


def began(card: Card) -> None:
    """One more is open on this card."""
    card.transactions += 1
    card.transacting = get_ident()
    holders[card.reader] = card


def ended(card: Card, how_many: int) -> None:
    """So many less are open on this card."""
    card.transactions = max(0, card.transactions - how_many)
    if not card.transactions and holders.get(card.reader) is card:
        holders.pop(card.reader, None)


def continued(card: Card) -> None:
    """The transaction of a card that was handed over to this process is this process's now."""
    if card.transactions:
        holders[card.reader] = card


def in_the_way(name: str, record: Record, arguments: Sequence[Any]) -> Optional[Card]:
    """The card whose transaction a call would wait for, or None.

    :param name: of the function, one of :data:`WAITING`.
    :param record: what the call is on.
    :param arguments: those behind the handle; the first one of SCardConnect is the reader.
    """
    if name == "SCardDisconnect" and arguments[0] == _LEAVE_CARD:
        return None  # it leaves the others' session alone, too
    reader = record.reader if isinstance(record, Card) else arguments[0]
    holder = _holder(reader) if isinstance(reader, str) else None
    if holder is record:
        return None
    if name == "SCardConnect" and holder is not None and holder.share_mode == _EXCLUSIVE:
        return None  # pcscd refuses it at once
    return holder


def _holder(reader: str) -> Optional[Card]:
    holder = holders.get(reader)
    if holder is None or (not holder.released and holder.transactions and holder.owner is _process.here):
        return holder
    holders.pop(reader, None)
    return None


def wait(name: str, record: Record, arguments: Sequence[Any], status: Callable[[Any], Any]) -> None:
    """Wait until no transaction of this process is in the way of a call; without a turn.

    :param name: of the function, and so on: see :func:`in_the_way`.
    :param status: SCardStatus, to see now and then whether the transaction still is: pcscd may be gone, or the card.
    """
    _await_end(lambda: in_the_way(name, record, arguments), status)


def connect_in_turn(name: str, card: Card, status: Callable[[Any], Any], connect: Callable[[], _Result]) -> _Result:
    """``connect()`` with the turn on the context of a card, when it won't wait with a transaction behind it.

    :param name: of the function that the connection is for, one of :data:`WAITING`.
    :param status: as for :func:`wait`.
    """
    deadline = monotonic() + _PATIENCE
    while True:
        wait(name, card, (), status)
        _await_end(lambda: _of_another_thread(card, deadline), status)
        with card.context.turn.lock:
            card.context.turn.evict()
            # One may have begun until the turn was ours.
            if in_the_way(name, card, ()) is None and _of_another_thread(card, deadline) is None:
                return connect()


def _of_another_thread(card: Card, deadline: float) -> Optional[Card]:
    """The card on the same context whose transaction another thread of this process has begun; None in the end."""
    if monotonic() < deadline:
        for reader in list(holders):
            holder = _holder(reader)
            if holder is not None and holder.context is card.context and holder.transacting != get_ident():
                return holder
    return None


def _await_end(find: Callable[[], Optional[Card]], status: Callable[[Any], Any]) -> None:
    polls = 0
    while (holder := find()) is not None:
        sleep(_POLL)
        polls += 1
        if polls % _CHECKS_EVERY == 0 and status(holder.safe)[0] != 0:
            ended(holder, holder.transactions)


def _begin(epoch: _process.Epoch) -> None:
    holders.clear()


_process.at_fork(at_begin=_begin)
