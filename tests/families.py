"""Families of processes that share a session, for tests of policy ``share``.

Each test has its own family: a forked child (the head) with a broker for all its descendants.  The members make the
calls that the test requests, one after the other, so that the test knows what each is doing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Optional

import forking
import pytest
from brokers import Client, Link, until
from calling import HeldCard
from conftest import ECHO, IS_VERIFIED, Session

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core.calls import CALLS, Kind
from pcsc_safe.errors import PcscSafeError
from pcsc_safe.testing import EchoCard, VirtualPcsc
from pcsc_safe.testing._install import Missing, look

OK, VIOLATION, INVALID = safe.SCARD_S_SUCCESS, safe.SCARD_E_SHARING_VIOLATION, safe.SCARD_E_INVALID_HANDLE
LEAVE, RESET, UNPOWER = safe.SCARD_LEAVE_CARD, safe.SCARD_RESET_CARD, safe.SCARD_UNPOWER_CARD
EXCLUSIVE, SHARED, T1 = safe.SCARD_SHARE_EXCLUSIVE, safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_T1
ECHOED, VERIFIED = [OK, [1, 2, 3, 0x90, 0x00]], [OK, [1, 0x90, 0x00]]
TRANSMIT = ("SCardTransmit", safe.SCARD_PCI_T1, ECHO)
IS_PIN_THERE = ("SCardTransmit", safe.SCARD_PCI_T1, IS_VERIFIED)
BEGIN, END = ("SCardBeginTransaction",), ("SCardEndTransaction", LEAVE)
RECONNECT = ("SCardReconnect", SHARED, T1, LEAVE)
A_WHILE = 0.1  # s; a call that doesn't wait would have returned


class PairsCard(HeldCard):
    """A HeldCard that detects interference: after INS 50 with one P1, INS 51 with another P1 returns 6985."""

    opened_by = 0

    def apdu(self, command: bytes) -> bytes:
        if command[1] == 0x50:
            self.opened_by = command[2]
        elif command[1] != 0x51:
            return super().apdu(command)
        return b"\x90\x00" if self.opened_by == command[2] else b"\x69\x85"


@pytest.fixture(scope="module")
def module_stack() -> Iterator[VirtualPcsc]:
    """A stack with a PairsCard; the third reader is another device.  Only one module's tests have contexts there."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(4, [PairsCard(), EchoCard(), EchoCard(), EchoCard()]) as stack:
        yield stack


@pytest.fixture
def stack(module_stack: VirtualPcsc) -> Iterator[VirtualPcsc]:
    """The same stack; at the end of the test no process has a context there, so no session has outlived its holders."""
    yield module_stack
    card = card_of(module_stack)
    card.go.set()
    module_stack.wait_for_clients(0)
    until(lambda: is_free(module_stack), "pcscd has noticed")
    card.go.clear()
    card.reached.clear()


@contextlib.contextmanager
def another(stack: VirtualPcsc, share_mode: int) -> Iterator[int]:
    """Another application that connects; yields the return code."""
    context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1]
    hresult, card, _ = safe.SCardConnect(context, stack.readers[0].name, share_mode, T1)
    try:
        yield hresult
    finally:
        if hresult == OK:
            safe.SCardDisconnect(card, UNPOWER)
        safe.SCardReleaseContext(context)


def is_free(stack: VirtualPcsc, share_mode: int = EXCLUSIVE) -> bool:
    """Whether another application can connect; if not, the card is held, and no other code is permitted."""
    with another(stack, share_mode) as hresult:
        assert hresult in (OK, VIOLATION)
        return hresult == OK


def card_of(stack: VirtualPcsc) -> Any:
    """The PairsCard of such a stack."""
    return stack.readers[0].card


def sharing(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for the head of a family."""

    def head(*arguments: Any) -> Any:
        pcsc_safe.configure(broker="always", policy="share")
        return function(*arguments)

    return head


def called(session: Session, name: str, *arguments: Any) -> Any:
    """The result of a call on the session's context or card, or the name of the error."""
    handle = session.context if CALLS[name].takes is Kind.CONTEXT else session.card
    try:
        return getattr(safe, name)(handle, *arguments)
    except PcscSafeError as error:
        return type(error).__name__


def exchanges(session: Session, number: int, count: int) -> Any:
    """How many of so many responses were not to this process's commands; and whether the PIN is verified."""
    data = [[number, i >> 8, i & 0xFF] for i in range(count)]
    wrong = sum(session.transmit([0x80, 1, 0, 0, 3, *each]) != [OK, [*each, 0x90, 0x00]] for each in data)
    return wrong, session.transmit(IS_VERIFIED)


def _obeys(link: Link, session: Optional[Session]) -> None:
    session = session or Session()
    while (asked := link.hear()) is not None:
        link.say(called(session, *asked))


class Member(Client):
    """A forked child that makes the requested calls; it dies by SIGKILL unless it is asked to end.

    :param session: the inherited session; None: the member opens its own.
    """

    def __init__(self, session: Optional[Session], fork: Callable[[], int] = forking.fork) -> None:
        super().__init__(_obeys, session, fork=fork)

    def calls(self, *asked: Any) -> Any:
        """The result of a call."""
        self.say(asked)
        return self.hear()

    def is_silent(self) -> bool:
        """Whether the member sends nothing for a while."""
        return not self._connection.poll(A_WHILE)

    def ends(self) -> None:
        """Make the member end."""
        self.say(None)
        self.result()
