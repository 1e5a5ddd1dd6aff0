"""The transactions of this process, by reader.

pcscd lets a call on a reader wait for the end of a transaction that another handle has there, inside the call.  Where
that handle is this process's own, its end may need the turn that the waiting call has; so such a call waits here,
before it takes a turn.  A child has no transactions: those that it inherited are its parent's.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import sleep
from typing import Any, Callable

from . import _process
from ._handles import Card, Record
from ._pyscard import constant

__all__ = ["WAITING", "began", "continued", "ended", "holders", "in_the_way", "wait"]

# pcscd's or libpcsclite's loops that wait for the end of a transaction inside the call.
WAITING = frozenset(
    ("SCardBeginTransaction", "SCardConnect", "SCardDisconnect", "SCardReconnect", "SCardStatus", "SCardTransmit")
)
_LEAVE_CARD: int = constant("SCARD_LEAVE_CARD")
_EXCLUSIVE: int = constant("SCARD_SHARE_EXCLUSIVE")
_POLL = 0.002  # s
_CHECKS_EVERY = 50

holders: dict[str, Card] = {}
"""The card that is in a transaction, by its reader's name."""


def began(card: Card) -> None:
    """One more is open on this card."""
    card.transactions += 1
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


def in_the_way(name: str, record: Record, arguments: Sequence[Any]) -> Any:
    """The card whose transaction a call would wait for, or None.

    :param name: of the function, one of :data:`WAITING`.
    :param record: what the call is on.
    :param arguments: those behind the handle; the first one of SCardConnect is the reader.
    """
    if name == "SCardDisconnect" and arguments[0] == _LEAVE_CARD:
        return None  # it leaves the others' session alone, too
    reader = record.reader if isinstance(record, Card) else arguments[0]
    holder = holders.get(reader) if isinstance(reader, str) else None
    if holder is None or holder is record:
        return None
    if holder.released or not holder.transactions or holder.owner is not _process.here:
        holders.pop(reader, None)
        return None
    if name == "SCardConnect" and holder.share_mode == _EXCLUSIVE:
        return None  # pcscd refuses it at once
    return holder


def wait(name: str, record: Record, arguments: Sequence[Any], status: Callable[[Any], Any]) -> None:
    """Wait until no transaction of this process is in the way of a call; without a turn.

    :param name: of the function, and so on: see :func:`in_the_way`.
    :param status: SCardStatus, to see now and then whether the transaction still is: pcscd may be gone, or the card.
    """
    polls = 0
    while (holder := in_the_way(name, record, arguments)) is not None:
        sleep(_POLL)
        polls += 1
        if polls % _CHECKS_EVERY == 0 and status(holder.safe)[0] != 0:
            ended(holder, holder.transactions)


def _begin(epoch: _process.Epoch) -> None:
    holders.clear()


_process.at_fork(at_begin=_begin)
