"""``pcsc_safe.reconnecting()``: the loop that every program with a card needs, whether it forks or not.

It takes a function and calls it again after a reset.  It is not a context manager, because a ``with`` block can't run
twice.  The card's record says whether the session was lost; the function's result or exception may not say it.

At a fork nothing happens here.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, TypeVar, Union

from ..errors import ReconnectError, join_pyscard
from . import handles, library, log, process
from .calls import Kind
from .handles import Card

__all__ = ["reconnecting"]

_Result = TypeVar("_Result")
_Card = TypeVar("_Card")


def reconnecting(
    card: _Card,
    work: Callable[[_Card], _Result],
    on_reset: Optional[Callable[[_Card], object]] = None,
    *,
    attempts: int = 3,
) -> _Result:
    """Call a function that uses a card; if the card was reset, connect again and call it again.

    For example:

        answer = pcsc_safe.reconnecting(card, lambda card: SCardTransmit(card, protocol, apdu), on_reset=verify_pin)

    A PC/SC call returns SCARD_W_RESET_CARD when another application has reset the card, and in a forked child when it
    can't continue the session of its parent.  If that happens in ``work``, ``reconnecting`` calls SCardReconnect with
    SCARD_LEAVE_CARD, and the share mode and protocol of the connection, then ``on_reset``, then ``work`` again.  It
    does the same if the card is reset during ``on_reset``.  ``work`` may ignore the return code, or raise an exception.
    If an Exception ends ``work`` after a reset, ``reconnecting`` drops it, even if a signal handler has raised it.  So
    a handler that should end ``work`` must raise another BaseException, such as KeyboardInterrupt.

    A card that was pulled out and put back counts as reset, and so does another card that was put in instead: identify
    the card in ``on_reset`` before it sends a PIN.

    ``work`` may have been carried out in part before it is called again: let it begin its own transaction, and don't
    use it for commands that must not be sent twice, such as one that changes a counter.  One thread at a time may use
    the card.

    :param card: the handle that SCardConnect of :mod:`pcsc_safe.scard` returned, or, after :func:`pcsc_safe.install`,
        a connected CardConnection of pyscard.
    :param work: takes ``card``.
    :param on_reset: takes ``card``, and restores what a reset undoes: it selects the applet and verifies the PIN.
        An exception of ``on_reset`` is raised here, so that a wrong PIN is sent once, unless the card was reset again.
    :param attempts: how often ``work`` is called, at most.
    :return: what ``work`` returned.
    :raises ValueError: ``attempts`` is less than 1.
    :raises ReconnectError: ``card`` is not a card, or is not connected; SCardReconnect failed, for example because the
        card was pulled out; or the card was reset during each attempt.
    """
    if attempts < 1:
        raise ValueError(f"attempts must be 1 or more, not {attempts}")
    _record_of(card)
    failure: Optional[Exception] = None
    for attempt in range(attempts):
        failure = None
        try:
            if attempt:
                _reconnect(card)
                if on_reset is not None:
                    on_reset(card)
            result = work(card)
        except ReconnectError:
            raise
        except Exception as error:
            if not _is_lost(card, getattr(error, "hresult", None)):
                raise
            failure = error
        else:
            if not _is_lost(card, result):
                return result
    raise _error(
        f"the card in {_record_of(card).reader!r} was reset in each of {attempts} attempts",
        "use a transaction, or SCARD_SHARE_EXCLUSIVE, if another application resets it",
        _constant("SCARD_W_RESET_CARD"),
    ) from failure


class _Plain(NamedTuple):
    """Stands for a card on Windows, which has no fork and therefore no record."""

    safe: int
    reader: str = "its reader"
    share_mode: int = 2  # SCARD_SHARE_SHARED
    protocol: int = 3  # SCARD_PROTOCOL_ANY


def _find(card: Any) -> Union[Card, _Plain, None]:
    """The record of a handle, or of the handle in a pyscard connection."""
    while hasattr(card, "component"):  # a CardConnectionDecorator
        card = card.component
    handle = getattr(card, "hcard", card)
    if not process.FORKS:
        return _Plain(handle) if isinstance(handle, int) else None
    record = handles.find(Kind.CARD, handle)
    return record if isinstance(record, Card) and not record.released else None


def _record_of(card: Any) -> Union[Card, _Plain]:
    record = _find(card)
    if record is None:
        raise _error(
            f"{card!r} is not a card that this process is connected to through pcsc_safe",
            "pass what SCardConnect of pcsc_safe.scard returned, or a pyscard connection after install() and connect()",
            _constant("SCARD_E_INVALID_HANDLE"),
        )
    return record


def _is_lost(card: Any, outcome: Any) -> bool:
    """Whether the card must be connected again.

    :param outcome: what ``work`` returned, or the code of what it raised; without a record nothing else is known.
    """
    record = _find(card)
    if isinstance(record, Card):
        return record.is_lost()
    code = outcome[0] if isinstance(outcome, (list, tuple)) and outcome else outcome
    return record is not None and bool(code == _constant("SCARD_W_RESET_CARD"))


_INSERT = "put the card in the reader and try again"
_REMEDIES = {
    "SCARD_E_SHARING_VIOLATION": "an exclusive connection excludes all others: disconnect the other process, or, if it "
    "is the parent, use pcsc_safe.handover() or policy 'share'",
    "SCARD_E_NO_SMARTCARD": _INSERT,
    "SCARD_W_REMOVED_CARD": _INSERT,
}
"""What to do if SCardReconnect returns one of these codes."""


def _reconnect(card: Any) -> None:
    from .router import public  # needs the gateways, which exist if there is a card

    record = _record_of(card)
    arguments = record.share_mode, record.protocol, public["SCARD_LEAVE_CARD"]
    hresult, _ = public["SCardReconnect"](record.safe, *arguments)
    if hresult != public["SCARD_S_SUCCESS"]:
        raise _error(
            f"the card in {record.reader!r} can't be connected again: {public['SCardGetErrorMessage'](hresult)}",
            next((remedy for name, remedy in _REMEDIES.items() if _constant(name) == hresult), "see the return code"),
            hresult,
        )
    log.info("reconnected", "process %(pid)d has connected again to the card in %(reader)s", reader=record.reader)


def _error(problem: str, remedy: str, hresult: int) -> ReconnectError:
    join_pyscard()
    return ReconnectError(problem, remedy=remedy, pid=process.current().pid, hresult=hresult)


def _constant(name: str) -> int:
    return int(library.public.get(name, -1))  # without PC/SC's names there is no card
