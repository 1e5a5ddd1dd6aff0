"""A broker dies, can't start, or meets pcscd's end: clear codes and errors, nothing hangs, nothing is leaked."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from brokers import ENOUGH, Client, Link, broker, brokers, by_broker, descriptors, until, watched, zombies
from conftest import ECHO, IS_VERIFIED, Session
from forking import in_child
from test_inherited import TABLE, Row
from test_threads import HELD, Calling, HeldCard

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._calls import CALLS
from pcsc_safe.errors import BrokerError
from pcsc_safe.testing import EchoCard, VirtualPcsc
from pcsc_safe.testing._install import Missing, look

OK = safe.SCARD_S_SUCCESS
LOST = safe.SCARD_F_COMM_ERROR
RESET = safe.SCARD_W_RESET_CARD
ECHOED = [OK, [1, 2, 3, 0x90, 0x00]]
READER = "Virtual PCD 0 00 00"


@pytest.fixture(scope="module")
def stack() -> Iterator[VirtualPcsc]:
    """A stack whose first card can be held."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(4, [HeldCard(), EchoCard(), EchoCard()]) as stack:
        yield stack


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is dead."""
    with watched(pid) as watch:
        os.kill(pid, signal.SIGKILL)
        assert watch.ends(ENOUGH)


# The broker is killed.


@pytest.mark.parametrize("cards", ["reset", "reconnect"])
def test_after_its_death_the_next_use_starts_another(stack: VirtualPcsc, cards: str) -> None:
    """Contexts are established anew there; a card is SCARD_W_RESET_CARD until SCardReconnect, or goes on."""

    def child() -> Any:
        pcsc_safe.configure(cards=cards)
        session, other = Session(), Session()
        number, first = int(session.context), broker()
        kill(first)
        answers = [
            safe.SCardListReaders(session.context, [])[0],
            session.transmit(IS_VERIFIED),
            safe.SCardReconnect(session.card, safe.SCARD_SHARE_SHARED, session.protocol, safe.SCARD_LEAVE_CARD)[0],
            session.transmit(IS_VERIFIED),
            safe.SCardIsValidContext(session.context),
            safe.SCardDisconnect(other.card, safe.SCARD_LEAVE_CARD),
            safe.SCardReleaseContext(other.context),
        ]
        again = broker() != first, zombies(), number == session.context
        session.close()
        return answers, again

    (listed, at_first, reconnected, then, valid, *cleanup), again = in_child(by_broker(child))
    assert (listed, reconnected, valid, cleanup) == (OK, OK, OK, [OK, OK])
    if cards == "reset":
        assert at_first == [RESET, []]
    else:
        assert at_first[0] == OK
    assert then[0] == OK
    assert again == (True, [], True)


def test_in_a_transaction_a_card_does_not_go_on(stack: VirtualPcsc) -> None:
    """With cards='reconnect' either: what was to be one transaction would be torn in two."""

    def child() -> Any:
        pcsc_safe.configure(cards="reconnect")
        session = Session()
        assert safe.SCardBeginTransaction(session.card) == OK
        kill(broker())
        answers = session.transmit(ECHO), safe.SCardEndTransaction(session.card, safe.SCARD_LEAVE_CARD)
        safe.SCardReleaseContext(session.context)
        return answers

    assert in_child(by_broker(child)) == ([RESET, []], OK)


def under_way(call: Callable[..., Any], *arguments: Any) -> Any:
    """The answer to a call that the broker has got, and not answered, when it is killed."""
    pid = broker()
    os.kill(pid, signal.SIGSTOP)
    calling = Calling(call, *arguments)
    until(lambda: calling.waits, "it waits for the answer")
    kill(pid)
    return calling.answer()


@pytest.mark.parametrize("row", [row for row in TABLE if hasattr(safe, row.name)], ids=lambda row: row.name)
def test_a_call_under_way_is_a_communication_error(stack: VirtualPcsc, row: Row) -> None:
    """Every function answers SCARD_F_COMM_ERROR in its own shape, and is not made again: it may have been carried out."""

    def child() -> Any:
        session = Session()
        answer = under_way(getattr(safe, row.name), getattr(session, row.handle), *row.arguments)
        return answer, brokers(), zombies(), [session.transmit(ECHO)[0], safe.SCardReleaseContext(session.context)]

    assert in_child(by_broker(child)) == (CALLS[row.name].failure(LOST, row.arguments), [], [], [RESET, OK])


def test_an_apdu_under_way_is_sent_once(stack: VirtualPcsc) -> None:
    """The card has got it, and does not get it again."""
    card = stack.readers[0].card
    assert isinstance(card, HeldCard)

    def child(link: Link) -> Any:
        session = Session()
        exchange = Calling(session.transmit, HELD)
        wait = Calling(safe.SCardGetStatusChange, establish(), safe.INFINITE, [(stack.readers[1].name, 0x22)])
        until(lambda: wait.waits, "it waits")
        link.say(broker())
        link.hear()
        return exchange.answer(), wait.answer(), session.transmit(ECHO)[0]

    with Client(by_broker(child)) as client:
        pid = client.hear()
        assert card.reached.wait(ENOUGH)
        apdus = card.apdus
        kill(pid)
        card.go.set()
        client.say("it is dead")
        exchange, wait, then = client.result()
    assert exchange == [LOST, []]
    assert wait == [LOST, [(stack.readers[1].name, 0, [])]]
    assert then == RESET
    assert card.apdus == apdus + 1


def establish() -> Any:
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    assert hresult == OK
    return context


def test_establishing_under_way(stack: VirtualPcsc) -> None:
    """SCardEstablishContext, too; and the next one is right."""

    def child() -> Any:
        establish()
        return under_way(safe.SCardEstablishContext, safe.SCARD_SCOPE_SYSTEM), bool(establish())

    assert in_child(by_broker(child)) == ([LOST, 0], True)


def test_killed_again_and_again_under_load(stack: VirtualPcsc) -> None:
    """Four threads call, each in its own way, while brokers are killed at any moment: codes of PC/SC, and no leak."""

    def uses(number: int, over: threading.Event) -> set[Any]:
        seen = set()
        while not over.is_set():
            try:
                hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
                seen.add(hresult)
                if hresult == OK:
                    hresult, card, _ = safe.SCardConnect(context, stack.readers[number % 3].name, 2, 3)
                    seen.add(hresult)
                    for _ in range(number):
                        seen.add(safe.SCardListReaders(context, [])[0])
                    if hresult == OK:
                        hresult, answer = safe.SCardTransmit(card, 2, ECHO)
                        seen.add(hresult)
                        assert answer == ([] if hresult else ECHOED[1])
                    seen.add(safe.SCardReleaseContext(context))
            except BrokerError as error:
                seen.add(str(error))
        return seen

    def child() -> Any:
        establish()
        before = len(descriptors(os.getpid()))
        over = threading.Event()
        threads = [Calling(uses, number, over) for number in range(4)]
        killed = 0
        until_ = time.monotonic() + 3
        while time.monotonic() < until_:
            for pid in brokers():
                time.sleep(0.001 * (killed % 97))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            time.sleep(0.1)
        over.set()
        seen = set().union(*[thread.answer() for thread in threads])
        establish()
        return seen, killed, len(descriptors(os.getpid())) - before, zombies(), len(brokers())

    seen, killed, leaked, dead, alive = in_child(by_broker(child))
    print(killed, leaked)
    assert seen - {OK, LOST, RESET} == set()
    assert killed > 5
    assert (dead, alive) == ([], 1)
    assert leaked <= 8  # connections that are kept for the next calls
