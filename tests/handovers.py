"""A session that can't be opened a second time, its handover, and which process has it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from calling import establish
from conftest import ECHO, IS_VERIFIED, Session
from forking import fork

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe.errors import ForkedHandleError

OK, LEAVE = safe.SCARD_S_SUCCESS, safe.SCARD_LEAVE_CARD
INVALID, RESET = safe.SCARD_E_INVALID_HANDLE, safe.SCARD_W_RESET_CARD
HELD_BY_ANOTHER = safe.SCARD_E_SHARING_VIOLATION
NOTHING = "nothing is handed over: "
BROKER = {"native": "on-fork", "broker": "always"}
NATIVE = pytest.param(
    "native", marks=[pytest.mark.native, pytest.mark.not_on_macos("a forked process has no native contexts")]
)
through_both = pytest.mark.parametrize("through", [NATIVE, "broker"])


def opened(through: str = "native", **settings: Any) -> Session:
    """A new session of this process, in a transaction and with exclusive access."""
    pcsc_safe.configure(broker=BROKER[through], **settings)
    session = Session(safe.SCARD_SHARE_EXCLUSIVE)
    assert safe.SCardBeginTransaction(session.card) == OK
    return session


def state(session: Session) -> list[Any]:
    """What this process can do with the session."""
    return [
        safe.SCardIsValidContext(session.context),
        safe.SCardListReaders(session.context, [])[0],
        session.transmit(IS_VERIFIED),
        session.transmit(ECHO),
        safe.SCardEndTransaction(session.card, LEAVE),
        safe.SCardBeginTransaction(session.card),
    ]


ALL = [OK, OK, [OK, [1, 0x90, 0x00]], [OK, [1, 2, 3, 0x90, 0x00]], OK, OK]


def attempt(use: Callable[[], Any]) -> Any:
    try:
        return use()
    except ForkedHandleError:
        return "raised"


def has(session: Session) -> Any:
    """Whether this process has the whole session; under policy ``raise``."""
    answers = attempt(lambda: state(session))
    return answers == ALL or (answers != "raised" and answers)


def handing_over(*contexts: Any) -> int:
    with pcsc_safe.handover(*contexts):
        return fork()


def is_free(reader: str) -> bool:
    """Whether another application can connect to the card."""
    context = establish()
    hresult, card, _ = safe.SCardConnect(context, reader, safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_T1)
    if hresult == OK:
        safe.SCardDisconnect(card, LEAVE)
    safe.SCardReleaseContext(context)
    return bool(hresult == OK)
