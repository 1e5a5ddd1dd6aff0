"""Each function that takes a handle, and what it returns in a child, for each policy."""

from __future__ import annotations

from typing import Any, NamedTuple

from conftest import ECHO

from pcsc_safe import scard as safe

OK = safe.SCARD_S_SUCCESS
INVALID = safe.SCARD_E_INVALID_HANDLE
RESET = safe.SCARD_W_RESET_CARD
UNSUPPORTED = safe.SCARD_E_UNSUPPORTED_FEATURE
READER = "Virtual PCD 0 00 00"
RAISES = "ForkedHandleError"
ATR = [0x3B, 0x80, 0x80, 0x01, 0x01]


class Row(NamedTuple):
    """A function and what it returns in a child.

    :ivar own: with ``auto`` and ``reestablish``; for a card function also with ``cards='reset'``.
    :ivar again: the same, but with ``cards='reconnect'``.
    """

    name: str
    handle: str
    arguments: list[Any]
    own: Any
    raising: Any
    invalid: Any
    again: Any = None


def context(name: str, arguments: list[Any], own: Any, invalid: Any) -> Row:
    return Row(name, "context", arguments, own, RAISES, invalid, own)


def card(name: str, arguments: list[Any], own: Any, invalid: Any, again: Any) -> Row:
    return Row(name, "card", arguments, own, RAISES, invalid, again)


def cleanup(name: str, handle: str, arguments: list[Any]) -> Row:
    return Row(name, handle, arguments, OK, OK, OK, OK)


TABLE = [
    cleanup("SCardReleaseContext", "context", []),
    cleanup("SCardDisconnect", "card", [safe.SCARD_UNPOWER_CARD]),
    cleanup("SCardEndTransaction", "card", [safe.SCARD_RESET_CARD]),
    cleanup("SCardCancel", "context", []),
    Row("SCardIsValidContext", "context", [], OK, INVALID, INVALID, OK),
    context("SCardListReaders", [[]], [OK, [READER, "Virtual PCD 0 00 01"]], [INVALID, []]),
    context("SCardListReaderGroups", [], [OK, ["SCard$DefaultReaders"]], [INVALID, []]),
    context("SCardGetStatusChange", [0, []], [OK, []], [INVALID, []]),
    context("SCardConnect", [READER, safe.SCARD_SHARE_SHARED, 3], [OK, "handle", 2], [INVALID, 0, 0]),
    context("SCardAddReaderToGroup", ["a", "b"], UNSUPPORTED, INVALID),
    context("SCardForgetReader", ["a"], UNSUPPORTED, INVALID),
    context("SCardForgetReaderGroup", ["a"], UNSUPPORTED, INVALID),
    context("SCardIntroduceReader", ["a", "b"], UNSUPPORTED, INVALID),
    context("SCardIntroduceReaderGroup", ["a"], UNSUPPORTED, INVALID),
    context("SCardRemoveReaderFromGroup", ["a", "b"], UNSUPPORTED, INVALID),
    card("SCardReconnect", [safe.SCARD_SHARE_SHARED, 3, safe.SCARD_LEAVE_CARD], [OK, 2], [INVALID, 0], [OK, 2]),
    card("SCardBeginTransaction", [], RESET, INVALID, OK),
    card("SCardStatus", [], [RESET, "", 0, 0, []], [INVALID, "", 0, 0, []], [OK, READER, "state", 2, ATR]),
    card("SCardTransmit", [2, ECHO], [RESET, []], [INVALID, []], [OK, [1, 2, 3, 0x90, 0x00]]),
    card("SCardControl", [42, [1]], [RESET, []], [INVALID, []], [UNSUPPORTED, []]),
    card("SCardGetAttrib", [1], [RESET, []], [INVALID, []], [UNSUPPORTED, []]),
    card("SCardSetAttrib", [1, [1]], RESET, INVALID, safe.SCARD_E_NOT_TRANSACTED),
]
