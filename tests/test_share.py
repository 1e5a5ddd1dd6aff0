"""Policy ``share``: what one process of a fork family had, all of them go on with, and nobody else comes between.

Each test is a family of its own: a forked child of the test's, the head, with a broker for all that it forks.  Its
members are told what to call, one call after the other, so that the test knows what each is in the middle of.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import forking
import pytest
from brokers import Client, Link
from conftest import ECHO, IS_VERIFIED, Session
from forking import in_child
from test_detection import c_fork
from test_threads import HELD, Calling, HeldCard

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._calls import CALLS, Kind
from pcsc_safe.errors import PcscSafeError
from pcsc_safe.testing import EchoCard, VirtualPcsc
from pcsc_safe.testing._install import Missing, look

OK = safe.SCARD_S_SUCCESS
VIOLATION = safe.SCARD_E_SHARING_VIOLATION
ECHOED = [OK, [1, 2, 3, 0x90, 0x00]]
VERIFIED, FORGOTTEN = [OK, [1, 0x90, 0x00]], [OK, [0, 0x90, 0x00]]
TRANSMIT = ("SCardTransmit", safe.SCARD_PCI_T1, ECHO)
IS_PIN_THERE = ("SCardTransmit", safe.SCARD_PCI_T1, IS_VERIFIED)
BEGIN, END = ("SCardBeginTransaction",), ("SCardEndTransaction", safe.SCARD_LEAVE_CARD)
EXCLUSIVE, SHARED = safe.SCARD_SHARE_EXCLUSIVE, safe.SCARD_SHARE_SHARED
A_WHILE = 0.1  # s; in which a call would have been answered that doesn't wait
SEED = 5


class PairsCard(HeldCard):
    """A HeldCard that says when somebody came between: INS 50 opens a pair, and INS 51 answers 6985 if it isn't P1's."""

    opened_by = 0

    def apdu(self, command: bytes) -> bytes:
        if command[1] == 0x50:
            self.opened_by = command[2]
        elif command[1] != 0x51:
            return super().apdu(command)
        return b"\x90\x00" if self.opened_by == command[2] else b"\x69\x85"


@pytest.fixture(scope="module")
def module_stack() -> Iterator[VirtualPcsc]:
    """Only this module has contexts there."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(2, [PairsCard(), EchoCard()]) as stack:
        yield stack


@pytest.fixture
def stack(module_stack: VirtualPcsc) -> Iterator[VirtualPcsc]:
    """That stack; when the test is over nobody has a context there, so no session has outlived its holders."""
    yield module_stack
    card_of(module_stack).go.set()
    module_stack.wait_for_clients(0)
    card_of(module_stack).go.clear()
    card_of(module_stack).reached.clear()


def card_of(stack: VirtualPcsc) -> Any:
    return stack.readers[0].card


def sharing(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for the head of a family."""

    def head(*arguments: Any) -> Any:
        pcsc_safe.configure(broker="always", policy="share")
        return function(*arguments)

    return head


def called(session: Session, name: str, *arguments: Any) -> Any:
    """The answer to a call on the session's context or card, or the name of the error."""
    handle = session.context if CALLS[name].takes is Kind.CONTEXT else session.card
    try:
        return getattr(safe, name)(handle, *arguments)
    except PcscSafeError as error:
        return type(error).__name__


def obeys(link: Link, session: Session) -> None:
    """Make the calls that are asked for, until told to end."""
    while (asked := link.hear()) is not None:
        link.say(called(session, *asked))


class Member(Client):
    """A forked child that makes the calls that it is told; ends by SIGKILL unless it is told to."""

    def __init__(self, session: Session, fork: Callable[[], int] = forking.fork) -> None:
        super().__init__(obeys, session, fork=fork)

    def calls(self, *asked: Any) -> Any:
        self.say(asked)
        return self.hear()

    def is_silent(self) -> bool:
        return not self._connection.poll(A_WHILE)

    def ends(self) -> None:
        self.say(None)
        self.result()


def outsider(stack: VirtualPcsc, share_mode: int = EXCLUSIVE) -> int:
    """What another application gets that connects."""
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    assert hresult == OK
    hresult, card, _ = safe.SCardConnect(context, stack.readers[0].name, share_mode, safe.SCARD_PROTOCOL_T1)
    if hresult == OK:
        safe.SCardDisconnect(card, safe.SCARD_LEAVE_CARD)
    safe.SCardReleaseContext(context)
    return int(hresult)


# Transactions.


def test_a_transaction_begun_before_the_fork_is_the_parents(stack: VirtualPcsc) -> None:
    """The child waits for its end, as any other process does."""

    def head() -> Any:
        session = Session()
        assert called(session, *BEGIN) == OK
        with Member(session) as child:
            child.say(TRANSMIT)
            silent = child.is_silent()
            mine = called(session, *TRANSMIT)
            return silent, mine, called(session, *END), child.hear()

    assert in_child(sharing(head)) == (True, ECHOED, OK, ECHOED)


def test_killed_waiting_for_transaction(stack: VirtualPcsc) -> None:
    def head() -> Any:
        session = Session()
        with Member(session) as other, Member(session) as child:
            assert called(session, *BEGIN) == OK
            child.say(BEGIN)
            assert child.is_silent()
            child.kill()
            time.sleep(0.1)
            assert called(session, *END) == OK
            time.sleep(1.2)
            return Calling(called, session, *TRANSMIT).answer(), other.calls(*TRANSMIT)

    assert in_child(sharing(head)) == (ECHOED, ECHOED)


def test_own_card_transaction(stack: VirtualPcsc) -> None:
    def head() -> Any:
        session = Session()

        def child(link):
            _, card, _ = safe.SCardConnect(session.context, session.reader, SHARED, 2)
            link.say(safe.SCardBeginTransaction(card))
            link.hear()

        with Client(child) as c:
            assert c.hear() == OK
            waiting = Calling(called, session, *TRANSMIT)
            time.sleep(0.3)
            assert waiting.is_alive()
            c.kill()
            return waiting.answer()

    assert in_child(sharing(head)) == ECHOED


def test_killed_in_connect(stack: VirtualPcsc) -> None:
    def head() -> Any:
        session = Session()

        with Member(session) as other, Member(session) as child:
            assert called(session, *BEGIN) == OK
            child.say(("SCardConnect", session.reader, SHARED, 2))
            assert child.is_silent()
            child.kill()
            time.sleep(0.2)
            assert called(session, *END) == OK
            time.sleep(0.5)
            return called(session, "SCardReconnect", EXCLUSIVE, 2, 0)

    assert in_child(sharing(head))[0] == OK


def test_fork_during_apdu(stack: VirtualPcsc) -> None:
    def head() -> Any:
        session = Session()

        with Member(session) as child:
            child.say(("SCardTransmit", 2, [0x80, 1, 0, 0, 1, 1]))
            child.hear()
            child.say(("SCardTransmit", 2, HELD))
            time.sleep(0.2)
            t = time.monotonic()
            threading.Timer(3, lambda: link.say(1)).start()
            with Member(session):
                return time.monotonic() - t

    def rel():
        assert card_of(stack).reached.wait(10)
        time.sleep(3)
        card_of(stack).go.set()

    Calling(rel)
    assert in_child(sharing(head)) < 1


def test_closed_at_once(stack: VirtualPcsc) -> None:
    def head() -> Any:
        session = Session()

        def child():
            os.closerange(3, 100)

            out = []
            for i in range(3):
                try:
                    out.append(safe.SCardTransmit(session.card, 2, ECHO))
                except Exception as e:
                    out.append(repr(e))
            return out

        pid = os.fork()
        if not pid:
            print(child(), file=sys.stderr)
            os._exit(0)
        os.waitpid(pid, 0)

    in_child(sharing(head))
    assert 0


def test_c_fork_gets_later_cards(stack: VirtualPcsc) -> None:
    def head() -> Any:
        session = Session()
        with Member(session, fork=c_fork) as child:
            readers = safe.SCardListReaders(session.context, [])[1]
            h, card, _ = safe.SCardConnect(session.context, readers[1], EXCLUSIVE, 2)
            assert h == OK
            child.calls(*TRANSMIT)
            assert safe.SCardDisconnect(card, 0) == OK
            return safe.SCardConnect(session.context, readers[1], EXCLUSIVE, 2)[0]

    assert in_child(sharing(head)) == OK
