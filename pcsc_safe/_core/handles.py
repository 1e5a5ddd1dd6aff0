"""Contexts and cards, their owners, and the registry that finds them by their handles.

A record keeps two handles apart: the *number* that the application has, which never changes, and the *real* handle,
which a re-establishment replaces.  The registry holds every record until it is released, as libpcsclite does.  A forked
child keeps references to all records that it inherited, although this costs memory.  Otherwise a finalizer could send
something over the owner's connection.

Invariant: a record is live in exactly one process, whose epoch is its ``owner``.  In all other processes it is
inherited.  A child's first call replaces the locks of the inherited records, and doesn't change their owners.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
from typing import Any, Callable, Optional, Union

from ..errors import PcscSafeError
from ..policy import Settings
from . import gateways, in_flight, observer, one_step, process, sessions
from .calls import Gateway, Kind
from .unpatched import RLock

__all__ = [
    "Card",
    "Context",
    "cards",
    "contexts",
    "family",
    "find",
    "given",
    "has_proxies",
    "load",
    "mark_gateway_lost",
    "mark_lost",
    "note_settled",
    "reach",
    "register",
    "registry",
    "set_proxies",
    "settled",
    "update",
]

family = os.urandom(16)
"""The same in every process that is forked after pcsc_safe was imported."""


class Context:
    """A PC/SC context.

    :ivar safe: the proxy that the application holds.
    :ivar number: the integer that the proxy stands for; the first real handle.
    :ivar real: its gateway's name for it in the process that owns it: native contexts, or a handle of a broker.
    :ivar owner: the epoch in which it is live.
    :ivar gateway: the gateway through which its owner reaches it.
    :ivar established_at: ``file:line`` in the application.
    :ivar overrides: the settings that this context alone has.
    :ivar cards: the cards connected through it and not yet disconnected, by number.
    :ivar turn: the lock of threads that re-establish it; see :func:`one_step.call_in_turn`.
    :ivar cancels: how often the application has called SCardCancel.
    :ivar continued_waits: the threads whose waits continue over an end of pcscd, by a key for each wait.
    :ivar context: itself, so that a context and a card have the same interface.
    """

    kind = Kind.CONTEXT
    session: None = None  # it has none
    __slots__ = (
        "cancels",
        "cards",
        "context",
        "continued_waits",
        "established_at",
        "gateway",
        "key",
        "number",
        "overrides",
        "owner",
        "real",
        "released",
        "safe",
        "scope",
        "turn",
    )

    def __init__(
        self,
        real: Any,
        number: int,
        scope: int,
        owner: process.Epoch,
        gateway: Gateway,
    ) -> None:
        self.safe: Any = None
        self.real = real
        self.number = number
        self.scope = scope
        self.gateway = gateway
        self.owner = owner
        self.established_at = _caller_location()
        self.overrides: dict[str, Any] = {}
        self.cards: dict[int, Card] = {}
        self.turn = RLock()
        self.cancels = 0
        self.continued_waits: dict[object, int] = {}
        self.context = self
        self.key = os.urandom(8)
        self.released = False

    def settings(self, process: Settings) -> Settings:
        """The settings of the process, with this context's own settings over them."""
        return process._replace(**self.overrides) if self.overrides else process

    def mark_released(self) -> None:
        """Mark it and its cards as released; their numbers stay known, because libpcsclite may still know them."""
        self.released = True
        for card in list(self.cards.values()):
            card.mark_released()

    def forget(self) -> None:
        """Drop it, and its cards, from this process's registry."""
        self.released = True  # first: a card that another thread records from now on is forgotten by that thread
        for card in list(self.cards.values()):
            card.forget()
        _drop(self)


class Card:
    """A connection to a card.

    :ivar context: through which it was connected.
    :ivar native: its native context, in the process that owns it; None if the card is in a broker.
    :ivar reader: the reader's name.
    :ivar share_mode: SCARD_SHARE_* as last asked for.
    :ivar protocol: the SCARD_PROTOCOL_* in use, or the requested one if none is in use (SCARD_SHARE_DIRECT).
    :ivar session: what other processes of the fork family can see of it.
    :ivar transactions: how many transactions are open.
    :ivar turn: the lock of threads that connect it again; see :func:`one_step.call_in_turn`.
    :ivar warned: the epochs of the last loss that was logged: that of the process, and the owner's.
    :ivar warned_of_end: the epoch of the process that has logged that it ends others' sessions with the card.
    """

    kind = Kind.CARD
    __slots__ = (
        "context",
        "key",
        "native",
        "number",
        "owner",
        "protocol",
        "reader",
        "real",
        "released",
        "safe",
        "session",
        "share_mode",
        "transactions",
        "turn",
        "warned",
        "warned_of_end",
    )

    def __init__(
        self,
        real: int,
        native: Any,
        context: Context,
        reader: str,
        share_mode: int,
        protocol: int,
        session: sessions.Session,
    ) -> None:
        self.safe: Any = None
        self.number = self.real = real
        self.native = native
        self.turn = RLock()
        self.context = context
        self.owner = context.owner
        self.reader = reader
        self.share_mode = share_mode
        self.protocol = protocol
        self.session = session
        self.transactions = 0
        self.warned: Optional[tuple[process.Epoch, process.Epoch]] = None
        self.warned_of_end: Optional[process.Epoch] = None
        self.key = os.urandom(8)
        self.released = False

    @property
    def established_at(self) -> str:
        """``file:line`` where its context was established."""
        return self.context.established_at

    def is_lost(self) -> bool:
        """Whether a call of this process has found that its session has ended, and none has connected again since."""
        here = process.current()
        if self.owner is here:
            return not self.released and not self.session.is_open
        return self.warned == (here, self.owner)

    def mark_released(self) -> None:
        """Mark it as released; its number stays known, because libpcsclite may still know it."""
        self.released = True
        self.transactions = 0
        self.session.end()

    def forget(self) -> None:
        """Drop it from this process's registry."""
        self.mark_released()
        _drop(self)
        if self.context.cards.get(self.number) is self:
            self.context.cards.pop(self.number, None)


Record = Union[Context, Card]

# Keyed by the proxy, which hashes and compares as its number: a proxy is found by identity, a plain integer by value.
contexts: dict[Any, Context] = {}
cards: dict[Any, Card] = {}


given: dict[Context, None] = {}
"""The contexts in a broker that a fork is giving to its child."""

settled = object()
"""Another object after each handover, once it is known whether there is a child; contexts leave `given` later."""


def note_settled(contexts: list[Context]) -> None:
    """Note that these contexts are the child's now, or this process's again."""
    global settled
    settled = object()
    for context in contexts:
        given.pop(context, None)


def _drop(record: Record) -> None:
    if registry(record.kind).get(record.number) is record:
        registry(record.kind).pop(record.number, None)


def registry(kind: Optional[Kind]) -> dict[Any, Any]:
    """The records of the handles of a kind, by handle."""
    return cards if kind is Kind.CARD else contexts


_Proxy = Callable[[Any], Any]
_proxies: dict[Kind, _Proxy] = {}


def has_proxies() -> bool:
    """Whether it is known what applications get instead of integers."""
    return bool(_proxies)


def set_proxies(context: _Proxy, card: _Proxy) -> None:
    """Set what applications get instead of integers.

    :param context: makes it from the record of a context.
    :param card: makes it from the record of a card.
    """
    _proxies.update({Kind.CONTEXT: context, Kind.CARD: card})
    atexit.register(in_flight.stop_locking)


def register(record: Record) -> Any:
    """Give the record its proxy and enter it in the registry.

    :return: the proxy, for the application.
    """
    record.safe = _proxies[record.kind](record)
    if isinstance(record, Card):
        record.context.cards[record.number] = record  # first: what a signal handler interrupts goes with its context
    of_its_kind = registry(record.kind)
    of_its_kind.pop(record.number, None)  # keys are kept when a value is replaced, and the key is the proxy
    of_its_kind[record.safe] = record
    return record.safe


def mark_gateway_lost(gateway: Gateway) -> None:
    """Give up what this process had through a gateway that has ended, as if another process owned it."""
    for context in list(contexts.values()):
        if context.gateway is gateway and context.owner is process.current():
            mark_lost(context, context.real, process.LOST)


def reach(record: Record) -> Optional[tuple[Gateway, Any]]:
    """The gateway and the real handle of what this process owns, read so that the two belong together.

    :return: None if another process owns it, or if another thread is replacing it.
    """
    gateway, real = record.context.gateway, record.real
    is_same = record.owner is process.current() and record.real is real and record.context.gateway is gateway
    return (gateway, real) if is_same else None


def update(record: Record, owned_by: process.Epoch, /, **attributes: Any) -> bool:
    """Set attributes of a record in one step, unless it now has another owner, or is released.

    So exactly one of several threads makes this process the owner of a record.

    :param owned_by: the owner that it must still have.
    :return: whether it was done.
    """
    steps = one_step.call_each([(setattr, record, name, value) for name, value in attributes.items()])
    # From this look to the end of extend() no other code runs, of this thread or of any other.
    if record.owner is owned_by and not record.released:
        one_step.consumer.extend(steps)
        return True
    return False


def mark_lost(record: Record, real: Any, how: str) -> None:
    """Give up the context of a record and its cards in one step, as if another process owned them.

    Nothing happens if another thread has done so already.

    :param real: the real handle in the call that detected the loss.
    :param how: LOST or SERVICE_LOST, of :mod:`process`.
    """
    context, here = record.context, process.current()
    lost, behind, is_native = process.Epoch(here, how), context.real, context.gateway is gateways.native
    cards_of_it = list(context.cards.values())
    sessions = [card.session for card in cards_of_it]
    steps = one_step.call_each([(setattr, each, "owner", lost) for each in (context, *cards_of_it)])
    is_same = record.real is real and context.real is behind
    if not is_same or record.owner is not here or context.owner is not here:  # as in update()
        return
    one_step.consumer.extend(steps)
    observer.record("lost", context=context.key)
    for session in sessions:  # and what is behind it: another thread may have replaced them by now
        session.end()
    if is_native:
        behind.cut_connections()


def find(kind: Kind, handle: object) -> Optional[Record]:
    """The record that a handle stands for; a handle is a proxy or a plain integer.

    :param kind: the kind of handle that the called function takes; needed for a plain integer only.
    :return: None for anything that is not a handle of ours.
    """
    record = getattr(handle, "_self_record", None)
    if isinstance(record, (Context, Card)):
        return record
    if not isinstance(handle, int):
        return None
    return registry(kind).get(handle)


def load(from_family: bytes, kind: Kind, key: bytes, description: str) -> Any:
    """The proxy in this process for a handle that was pickled in another process.

    :raises PcscSafeError: this process was not forked from the process that had the handle, or no longer has it.
    """
    if from_family == family:
        for record in list(registry(kind).values()):
            if record.key == key:
                return record.safe
        state = f"is unknown in process {os.getpid()}: it was released, or this process did not inherit it"
    else:
        state = f"is unknown in process {os.getpid()}, which was not forked from that process"
    raise PcscSafeError(
        f"{description} {state}", remedy="a handle is valid only where it was inherited: establish a context here"
    )


def _caller_location() -> str:
    """``file:line`` of the innermost caller outside pcsc_safe and pyscard."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@functools.cache
def _is_library(module: str) -> bool:
    return module.partition(".")[0] in ("pcsc_safe", "smartcard") and not module.startswith("pcsc_safe.testing")


def _begin(epoch: process.Epoch) -> None:
    for context in list(contexts.values()):
        if process.here is epoch:  # a signal handler's call has begun it in the middle of this
            return
        context.turn = RLock()
        context.continued_waits.clear()
        for card in list(context.cards.values()):
            card.turn = RLock()


process.at_fork(at_begin=_begin)
process.clear_at_begin(given)
