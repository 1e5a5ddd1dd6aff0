"""Threads on one context: a native context for each call in progress, and first use by many threads.

Only the last part forks.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from calling import (
    CANCELLED,
    CHANGED,
    EMPTY,
    ENOUGH,
    HELD,
    OK,
    PRESENT,
    SHARED,
    TIMED_OUT,
    Calling,
    HeldCard,
    connect,
    establish,
    flags,
    state_of,
    transmit,
    until,
    wait,
    waits_on,
)
from conftest import ECHO, Session
from forking import in_child, start, wait_for

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe.policy import Cards
from pcsc_safe.testing import EchoCard, VirtualPcsc
from pcsc_safe.testing._install import Missing, look


@pytest.fixture
def context(shared_stack: VirtualPcsc) -> Iterator[Any]:
    """Yield a context, which must work afterwards."""
    context = establish()
    yield context
    assert safe.SCardListReaders(context, [])[0] == OK
    assert safe.SCardReleaseContext(context) == OK


@pytest.fixture
def reader(shared_stack: VirtualPcsc) -> str:
    return shared_stack.readers[0].name


# Hazard 7.


def test_a_wait_freezes_nobody(context: Any, pcsc_stack: VirtualPcsc) -> None:
    """Beside an INFINITE wait, calls on its context and on another one, and SCardCancel, return. The wait continues."""
    name = pcsc_stack.readers[0].name
    other = establish()
    waiting = establish()
    waiter = wait(waiting, name)
    on_it = Calling(safe.SCardListReaders, waiting, [])
    assert on_it.answer() == [OK, [reader.name for reader in pcsc_stack.readers]]
    on_another = Calling(lambda: transmit(connect(other, name), ECHO))
    assert on_another.answer() == [OK, [1, 2, 3, 0x90, 0x00]]
    assert Calling(safe.SCardIsValidContext, waiting).answer() == OK
    assert Calling(safe.SCardCancel, other).answer() == OK
    until(lambda: waiter.waits, "the wait goes on")
    pcsc_stack.readers[0].remove()
    assert flags(waiter.answer()) == (OK, [(name, CHANGED | EMPTY, [])])
    again = wait(waiting, name)
    assert Calling(safe.SCardCancel, waiting).answer() == OK
    assert again.answer()[0] == CANCELLED
    assert [safe.SCardReleaseContext(handle) for handle in (waiting, other)] == [OK, OK]


def test_300_calls_through_a_waiting_context(context: Any, reader: str) -> None:
    """300 calls on a context return right results while another thread waits on it. The wait continues."""
    card = connect(context, reader)
    waiter = wait(context, reader)
    for number in range(100):
        data = [number, 255 - number]
        assert transmit(card, [0x80, 1, 0, 0, 2, *data]) == [OK, [*data, 0x90, 0x00]]
        assert safe.SCardListReaders(context, [])[0] == OK
        assert safe.SCardStatus(card)[:2] == [OK, reader]
    until(lambda: waiter.waits, "the wait goes on")
    assert safe.SCardCancel(context) == OK
    assert waiter.answer()[0] == CANCELLED
    safe.SCardDisconnect(card, safe.SCARD_LEAVE_CARD)


@pytest.mark.parametrize("known", ["with its counter", "without"])
def test_two_waits_on_one_context_both_get_the_event(pcsc_stack: VirtualPcsc, known: str) -> None:
    """Each of two waits on one context gets the event, whichever was in the library when it happened."""
    context, slot = establish(), pcsc_stack.readers[0]
    state = None if known == "with its counter" else PRESENT
    for _ in range(5):
        waiters = [wait(context, slot.name, state=state) for _ in range(2)]
        card = slot.remove()
        assert [flags(waiter.answer()) for waiter in waiters] == [(OK, [(slot.name, CHANGED | EMPTY, [])])] * 2
        slot.insert(card)
    safe.SCardReleaseContext(context)


@pytest.mark.parametrize("known", ["with its counter", "without"])
@pytest.mark.parametrize("waiting", [1, 2])
def test_an_event_during_a_long_call_is_lost_to_nobody(held: VirtualPcsc, known: str, waiting: int) -> None:
    """Each wait sees a card that is removed while another thread's call lasts.

    A wait without the counter can't see a card that is back at once.
    """
    context, slot, card = establish(), held.readers[2], held.readers[0].card
    assert isinstance(card, HeldCard)
    connection = connect(context, held.readers[0].name)
    state = None if known == "with its counter" else PRESENT
    waiters = [wait(context, slot.name, state=state) for _ in range(waiting)]
    for waiter in waiters:
        until(lambda waiter=waiter: waits_on(waiter), "they wait")  # type: ignore[misc]
    long_call = Calling(transmit, connection, HELD)
    assert card.reached.wait(ENOUGH)
    removed = slot.remove()
    if state is None:
        slot.insert(removed)
    for waiter in waiters:
        hresult, ((name, seen, _),) = flags(waiter.answer())
        assert (hresult, name, bool(seen & CHANGED)) == (OK, slot.name, True)
    assert long_call.is_alive()
    card.go.set()
    assert long_call.answer() == [OK, [7, 8, 9, 0x90, 0x00]]
    assert safe.SCardReleaseContext(context) == OK


def test_one_cancel_ends_every_wait_on_the_context(context: Any, reader: str) -> None:
    """SCardCancel ends all waits on its context, once. It doesn't affect later waits, nor those on other contexts."""
    other = establish()
    for _ in range(10):
        unconcerned = wait(other, reader)
        waiters = [wait(context, reader) for _ in range(3)]
        assert safe.SCardCancel(context) == OK
        assert [waiter.answer()[0] for waiter in waiters] == [CANCELLED] * 3
        assert wait(context, reader, 50).answer()[0] == TIMED_OUT
        until(lambda waiter=unconcerned: waiter.waits, "it goes on")  # type: ignore[misc]
        assert safe.SCardCancel(other) == OK
        assert unconcerned.answer()[0] == CANCELLED
    safe.SCardReleaseContext(other)


def test_a_cancel_when_nobody_waits_is_lost(context: Any, reader: str) -> None:
    """As in PC/SC, SCardCancel ends current waits, not later ones."""
    for _ in range(5):
        assert safe.SCardCancel(context) == OK
        assert wait(context, reader, 20).answer()[0] == TIMED_OUT


def test_a_finite_wait_ends_on_time(context: Any, reader: str) -> None:
    """A wait beside 50 calls returns SCARD_E_TIMEOUT and the reader's state, and not too early."""
    undisturbed = wait(context, reader, 10).answer()
    waiter = wait(context, reader, 1000)
    for _ in range(50):
        assert safe.SCardListReaders(context, [])[0] == OK
    assert waiter.is_alive()
    assert waiter.answer() == undisturbed
    assert undisturbed[0] == TIMED_OUT
    assert 0.99 <= waiter.seconds < 6


def test_several_finite_waits_end_each_on_its_time(context: Any, reader: str) -> None:
    """Waits with different timeouts on one context each end on time."""
    waiters = [(timeout, wait(context, reader, timeout)) for timeout in (900, 600, 300)]
    for timeout, waiter in waiters:
        assert waiter.answer()[0] == TIMED_OUT
        assert timeout / 1000 - 0.01 <= waiter.seconds < timeout / 1000 + 5


def test_a_wait_for_new_readers_is_not_ended_by_calls(context: Any) -> None:
    """A wait for new readers continues beside calls on its context, like any other wait."""
    waiter = wait(context, "\\\\?PnP?\\Notification", state=0)
    for _ in range(30):
        assert safe.SCardListReaders(context, [])[0] == OK
    until(lambda: waiter.waits, "the wait goes on")
    assert safe.SCardCancel(context) == OK
    assert waiter.answer()[0] == CANCELLED


def test_a_release_ends_the_wait(pcsc_stack: VirtualPcsc) -> None:
    """SCardReleaseContext in another thread ends every wait with an error code, and closes its connection."""
    reader = pcsc_stack.readers[0].name
    for waiting in (1, 3):
        context = establish()
        waiters = [wait(context, reader) for _ in range(waiting)]
        assert Calling(safe.SCardReleaseContext, context).answer() == OK
        answers = {waiter.answer()[0] for waiter in waiters}
        assert answers <= {safe.SCARD_E_INVALID_HANDLE, CANCELLED}
        assert safe.SCardIsValidContext(context) == safe.SCARD_E_INVALID_HANDLE
    pcsc_stack.wait_for_clients(0)


def test_many_threads_on_one_context(context: Any, reader: str) -> None:
    """Eight threads and a waiting one share a context, and every exchange returns its own bytes."""
    cards = [connect(context, reader) for _ in range(4)]
    waiter = wait(context, reader)

    def exchange(number: int) -> set[bool]:
        card, same = cards[number % 4], set()
        for turn in range(40):
            data = [number, turn, number ^ turn]
            same.add(transmit(card, [0x80, 1, 0, 0, 3, *data]) == [OK, [*data, 0x90, 0x00]])
            same.add(safe.SCardIsValidContext(context) == OK)
        return same

    threads = [Calling(exchange, number) for number in range(8)]
    assert [thread.answer() for thread in threads] == [{True}] * 8
    assert safe.SCardCancel(context) == OK
    assert waiter.answer()[0] == CANCELLED
    for card in cards:
        safe.SCardDisconnect(card, safe.SCARD_LEAVE_CARD)


def test_threads_take_turns_on_a_card(context: Any, reader: str) -> None:
    """Two threads that use a card all the time take turns."""
    card, done, stop = connect(context, reader), [0], threading.Event()

    def exchange_all_the_time() -> None:
        while not stop.is_set():
            assert transmit(card, ECHO)[0] == OK
            done[0] += 1

    other = Calling(exchange_all_the_time)
    until(lambda: done[0], "the other thread is at it")
    before, calls = done[0], 300
    for _ in range(calls):
        assert safe.SCardStatus(card)[0] == OK
    theirs = done[0] - before
    stop.set()
    other.answer()
    assert theirs < 4 * calls


def test_many_threads_establish_contexts(shared_stack: VirtualPcsc) -> None:
    """150 threads each establish and release twenty contexts.

    A lock of Python 3.14 is handed over to a thread that waits: none may only look whether it could have it.
    """

    def establish_and_release() -> list[Any]:
        return [safe.SCardReleaseContext(establish()) for _ in range(20)]

    threads = [Calling(establish_and_release) for _ in range(150)]
    assert [thread.answer() for thread in threads] == [[OK] * 20] * 150


@pytest.mark.native
def test_a_handler_does_not_yield_to_what_it_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread yields to other threads that wait, and not to its own wait that a signal handler has interrupted.

    A handler that is called often would otherwise take longer the more of its calls it interrupts.
    """
    from pcsc_safe._core import in_flight

    pauses: list[float] = []
    monkeypatch.setattr(in_flight, "sleep", pauses.append)
    place = in_flight.Place()
    place.waiting[object()] = threading.get_ident()
    place.yield_to_waiters()
    assert not pauses
    Calling(place.yield_to_waiters).answer()
    assert len(pauses) == 1


# Transactions.


def on_the_card(call: str, context: Any, card: Any, reader: str) -> Any:
    """Make one of the calls that wait for the end of another handle's transaction."""
    if call == "SCardTransmit":
        return transmit(card, ECHO)
    if call == "SCardConnect":
        return safe.SCardConnect(context, reader, SHARED, safe.SCARD_PROTOCOL_T1)[0]
    if call == "SCardBeginTransaction":
        return safe.SCardBeginTransaction(card), safe.SCardEndTransaction(card, safe.SCARD_LEAVE_CARD)
    return safe.SCardStatus(card)[:2]


WAITS_FOR_A_TRANSACTION = {
    "SCardTransmit": [OK, [1, 2, 3, 0x90, 0x00]],
    "SCardConnect": OK,
    "SCardBeginTransaction": (OK, OK),
    "SCardStatus": [OK, "Virtual PCD 0 00 00"],
}


@pytest.mark.parametrize(("call", "expected"), WAITS_FOR_A_TRANSACTION.items(), ids=list(WAITS_FOR_A_TRANSACTION))
def test_a_transaction_of_another_handle(context: Any, reader: str, call: str, expected: Any) -> None:
    """A call on a card waits for the end of another handle's transaction on the same context.

    The calls of the transaction itself, above all its end, don't wait.
    """
    first, second = connect(context, reader), connect(context, reader)
    for _ in range(3):
        assert safe.SCardBeginTransaction(first) == OK
        waiting = Calling(on_the_card, call, context, second, reader)
        for _ in range(20):
            assert Calling(transmit, first, ECHO).answer() == [OK, [1, 2, 3, 0x90, 0x00]]
            assert Calling(safe.SCardListReaders, context, []).answer()[0] == OK
        assert waiting.is_alive() or call in ("SCardStatus", "SCardConnect")
        assert Calling(safe.SCardEndTransaction, first, safe.SCARD_LEAVE_CARD).answer() == OK
        assert waiting.answer() == expected
    for card in (first, second):
        assert safe.SCardDisconnect(card, safe.SCARD_LEAVE_CARD) == OK


def test_the_end_of_a_transaction_by_disconnect(context: Any, reader: str) -> None:
    """Waiting calls continue if SCardDisconnect, rather than SCardEndTransaction, ends the transaction."""
    first, second = connect(context, reader), connect(context, reader)
    assert safe.SCardBeginTransaction(first) == OK
    waiting = Calling(transmit, second, ECHO)
    waiting.join(0.05)
    assert waiting.is_alive()
    assert Calling(safe.SCardDisconnect, first, safe.SCARD_LEAVE_CARD).answer() == OK
    assert waiting.answer() == [OK, [1, 2, 3, 0x90, 0x00]]
    safe.SCardDisconnect(second, safe.SCARD_LEAVE_CARD)


def test_leaving_a_card_that_another_handle_has_in_a_transaction(context: Any, reader: str) -> None:
    """SCardDisconnect with SCARD_LEAVE_CARD waits for no transaction, not even for one of its own thread."""
    first, second = connect(context, reader), connect(context, reader)
    assert safe.SCardBeginTransaction(first) == OK
    assert Calling(safe.SCardDisconnect, second, safe.SCARD_LEAVE_CARD).answer() == OK
    assert safe.SCardEndTransaction(first, safe.SCARD_LEAVE_CARD) == OK
    assert safe.SCardDisconnect(first, safe.SCARD_LEAVE_CARD) == OK


def test_pcscd_dies_in_a_transaction(pcsc_stack: VirtualPcsc) -> None:
    """If pcscd dies, a call that waits for another handle's transaction returns a code."""
    session = Session()
    second = connect(session.context, session.reader)
    assert safe.SCardBeginTransaction(session.card) == OK
    waiting = [Calling(on_the_card, call, session.context, second, session.reader) for call in WAITS_FOR_A_TRANSACTION]
    waiting[0].join(0.05)
    assert waiting[0].is_alive()
    pcsc_stack.kill()
    failed = [thread.answer() for thread in waiting]
    assert failed[0][0] != OK
    assert failed[0][1] == []
    assert failed[2][0] != OK
    safe.SCardReleaseContext(session.context)
    pcsc_stack.start()
    session = Session()
    session.assert_untouched()
    session.close()


# Transactions of other processes.


class Pair:
    """A context with a connection to each of two cards; its own pcscd, because a failure may block it."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self.stack = undo.enter_context(VirtualPcsc(2, [EchoCard(), EchoCard()]))
        _, self.context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
        undo.callback(safe.SCardReleaseContext, self.context)
        readers = [reader.name for reader in self.stack.readers]
        self.cards = [safe.SCardConnect(self.context, reader, SHARED, safe.SCARD_PROTOCOL_T1)[1] for reader in readers]


RETRIED = ("SCardBeginTransaction", "SCardReconnect", "SCardStatus", "SCardTransmit")


def retried(call: str, card: Any) -> int:
    """Make one of the calls that libpcsclite repeats while another process has a transaction."""
    if call == "SCardReconnect":
        return int(safe.SCardReconnect(card, SHARED, safe.SCARD_PROTOCOL_T1, safe.SCARD_LEAVE_CARD)[0])
    if call == "SCardTransmit":
        return int(transmit(card, ECHO)[0])
    if call == "SCardStatus":
        return int(safe.SCardStatus(card)[0])
    return int(safe.SCardBeginTransaction(card) or safe.SCardEndTransaction(card, safe.SCARD_LEAVE_CARD))


def ended_by_each_other(stack: VirtualPcsc, call: str, end: Callable[[Any], Any]) -> list[Any]:
    """In two children, one thread waits for the end of the other child's transaction while another ends its own.

    Both threads use one context, so the waiting thread may block the one for which the other child waits.

    :param end: ends the transaction on the given card, in the thread that began it.
    """
    pipes = [os.pipe(), os.pipe()]
    readers = [reader.name for reader in stack.readers]

    def meet(number: int) -> None:
        os.write(pipes[1 - number][1], b"x")
        os.read(pipes[number][0], 1)

    def child(number: int) -> Any:
        context = establish()
        mine, other = (connect(context, reader) for reader in (readers[number], readers[1 - number]))
        has_begun, may_end = threading.Event(), threading.Event()

        def transact() -> Any:
            begun = safe.SCardBeginTransaction(mine)
            has_begun.set()
            assert may_end.wait(ENOUGH)
            return begun, transmit(mine, ECHO)[0], safe.SCardListReaders(context, [])[0], end(mine)

        meet(number)
        transacting = Calling(transact)
        assert has_begun.wait(ENOUGH)
        meet(number)
        waiting = Calling(retried, call, other)
        time.sleep(0.2)
        may_end.set()
        return transacting.answer(), waiting.answer()

    children = [start(child, number) for number in (0, 1)]
    answers = [wait_for(each) for each in children]
    for end_of_pipe in (*pipes[0], *pipes[1]):
        os.close(end_of_pipe)
    return answers


def end(card: Any) -> int:
    """Call SCardEndTransaction."""
    return int(safe.SCardEndTransaction(card, safe.SCARD_LEAVE_CARD))


@pytest.mark.parametrize("policy", ["reestablish", "broker"])
@pytest.mark.parametrize("call", RETRIED)
def test_processes_end_each_others_waits(pcsc_stack: VirtualPcsc, call: str, policy: str) -> None:
    """No process waits for ever, as on raw pyscard."""
    pcsc_safe.configure(policy=policy)
    assert ended_by_each_other(pcsc_stack, call, end) == [((OK, OK, OK, OK), OK)] * 2


def test_a_disconnection_ends_a_wait(pcsc_stack: VirtualPcsc) -> None:
    """SCardDisconnect ends a wait like the end of the transaction."""

    def disconnect(card: Any) -> int:
        return int(safe.SCardDisconnect(card, safe.SCARD_LEAVE_CARD))

    assert ended_by_each_other(pcsc_stack, "SCardTransmit", disconnect) == [((OK, OK, OK, OK), OK)] * 2


def test_an_exchange_in_a_broker_is_passed(pcsc_stack: VirtualPcsc) -> None:
    """In a broker, calls don't wait for a blocked exchange, even if it began before this process's transaction."""
    theirs, mine = (reader.name for reader in pcsc_stack.readers)
    pipes = (hears, tell), (answered, answer) = os.pipe(), os.pipe()

    def other() -> Any:
        card = connect(establish(), theirs)
        os.read(hears, 1)
        begun = safe.SCardBeginTransaction(card)
        os.write(answer, b"x")
        os.read(hears, 1)
        return begun, end(card)

    def child() -> Any:
        pcsc_safe.configure(broker="always")
        contexts = establish(), establish()
        waited, held = connect(contexts[0], theirs), connect(contexts[1], mine)
        os.write(tell, b"x")
        os.read(answered, 1)
        waiting = Calling(transmit, waited, ECHO)
        time.sleep(0.2)
        answers = safe.SCardBeginTransaction(held), safe.SCardListReaders(contexts[0], [])[0], waiting.is_alive()
        os.write(tell, b"x")
        return answers, end(held), waiting.answer()[0]

    holder = start(other)  # this one doesn't use the broker
    assert in_child(child) == ((OK, OK, True), OK, OK)
    assert wait_for(holder) == (OK, OK)
    for each in (*pipes[0], *pipes[1]):
        os.close(each)


@pytest.mark.pcsc(readers=4)
def test_in_a_transaction_other_cards_can_be_used(pcsc_stack: VirtualPcsc) -> None:
    """A thread in a transaction can use other cards although another thread waits on the same context."""
    free = pcsc_stack.readers[2].name

    def end_later(mine: Any) -> int:
        third = connect(mine._self_record.context.safe, free)
        return max(transmit(third, ECHO)[0], retried("SCardBeginTransaction", third), end(mine))

    assert ended_by_each_other(pcsc_stack, "SCardTransmit", end_later) == [((OK, OK, OK, OK), OK)] * 2


def test_a_transaction_does_not_wait_for_another_cards_exchange(held: VirtualPcsc) -> None:
    """The end of a transaction doesn't wait for another thread's exchange with another card."""
    context, another = establish(), establish()
    slow, mine, other = (
        connect(of, held.readers[number].name) for of, number in ((context, 0), (context, 2), (another, 3))
    )
    card = held.readers[0].card
    assert isinstance(card, HeldCard)
    assert [safe.SCardBeginTransaction(each) for each in (mine, other)] == [OK, OK]
    exchange = Calling(transmit, slow, HELD)
    assert card.reached.wait(ENOUGH)
    assert [Calling(end, each).answer() for each in (mine, other)] == [OK, OK]
    assert Calling(safe.SCardListReaders, context, []).answer()[0] == OK
    assert exchange.is_alive()
    card.go.set()
    assert exchange.answer()[0] == OK
    for each in (context, another):
        assert safe.SCardReleaseContext(each) == OK


def got(card: Any) -> int:
    """Get the child's connection for an inherited card, in the way that the settings say."""
    if pcsc_safe.settings().cards is Cards.RECONNECT:
        return int(safe.SCardStatus(card)[0])
    return int(safe.SCardReconnect(card, SHARED, safe.SCARD_PROTOCOL_T1, safe.SCARD_LEAVE_CARD)[0])


@pytest.fixture(params=["reset", "reconnect"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two cards to which a child has to get its own connections."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with contextlib.ExitStack() as undo:
        pcsc_safe.configure(cards=request.param)
        yield Pair(undo)


@pytest.mark.parametrize("policy", ["reestablish", "broker"])
def test_children_in_transactions_do_not_wait_for_each_other(pair: Pair, policy: str) -> None:
    """In each of two children, one thread has a transaction, and another connects the card that the other child has.

    SCardConnect waits in pcscd for the end of a transaction.  If it blocked its context, and the other process waited
    for that context's transaction, both processes and pcscd would wait for ever.
    """
    pcsc_safe.configure(policy=policy)
    have_begun = [os.pipe(), os.pipe()]

    def child(number: int) -> Any:
        mine, other = pair.cards[number], pair.cards[1 - number]
        begun = got(mine), safe.SCardBeginTransaction(mine)
        os.write(have_begun[1 - number][1], b"x")
        os.read(have_begun[number][0], 1)
        connecting = Calling(got, other)
        time.sleep(0.2)
        return begun, safe.SCardEndTransaction(mine, safe.SCARD_LEAVE_CARD), connecting.answer()

    children = [start(child, number) for number in (0, 1)]
    assert [wait_for(each) for each in children] == [((OK, OK), OK, OK)] * 2
    for end in (*have_begun[0], *have_begun[1]):
        os.close(end)


def test_the_thread_of_a_transaction_gets_the_next_card(pair: Pair) -> None:
    """A connection waits neither for its own thread's transaction, nor for one of a thread that waits for it."""
    first, second = pair.cards

    def child(connect: Callable[[], int]) -> Any:
        begun = got(first), safe.SCardBeginTransaction(first)
        return begun, connect(), safe.SCardEndTransaction(first, safe.SCARD_LEAVE_CARD)

    def in_a_thread() -> int:
        connecting = Calling(got, second)
        return int(connecting.answer())

    assert in_child(child, lambda: got(second)) == ((OK, OK), OK, OK)
    assert in_child(child, in_a_thread) == ((OK, OK), OK, OK)


# First use in a child by many threads at once.


def test_many_threads_of_a_child_use_all_functions_first(pcsc_stack: VirtualPcsc) -> None:
    """Whatever 16 threads of a child call first, the context is re-established once and the card connected once.

    With cards='reconnect' every call returns its right result.
    """
    session = Session()
    state = state_of(session.context, session.reader)
    clients = pcsc_stack.clients()

    def child() -> Any:
        pcsc_safe.configure(cards="reconnect")
        first_uses: list[Callable[[], Any]] = [
            lambda: safe.SCardListReaders(session.context, [])[0],
            lambda: safe.SCardIsValidContext(session.context),
            lambda: session.transmit(ECHO),
            lambda: safe.SCardStatus(session.card)[:2],
            lambda: safe.SCardGetStatusChange(session.context, 50, [(session.reader, state)])[0],
            lambda: safe.SCardGetStatusChange(session.context, 0, [(session.reader, state)])[0],
            lambda: safe.SCardListReaderGroups(session.context)[0],
            lambda: safe.SCardReconnect(session.card, SHARED, safe.SCARD_PROTOCOL_T1, safe.SCARD_LEAVE_CARD)[0],
        ]
        barrier = threading.Barrier(16)

        def use(first: Callable[[], Any]) -> Any:
            barrier.wait()
            return first()

        threads = [Calling(use, first) for first in first_uses * 2]
        answers = [thread.answer() for thread in threads]
        until(lambda: pcsc_stack.clients() - clients in (1, 2), "what is surplus is released")
        safe.SCardReleaseContext(session.context)
        return (
            answers[:8] == answers[8:],
            answers[:4],
            set(answers[4:6]) <= {OK, TIMED_OUT},
            answers[6:8],
        )

    # One native context for the card, and an idle one.
    expected = (True, [OK, OK, [OK, [1, 2, 3, 0x90, 0x00]], [OK, session.reader]], True, [OK, OK])
    for _ in range(10):
        assert in_child(child) == expected
        pcsc_stack.wait_for_clients(clients)


@pytest.mark.parametrize("cards", ["reset", "reconnect"])
def test_eight_threads_of_a_child_reconnect_one_card(pcsc_stack: VirtualPcsc, cards: str) -> None:
    """Eight simultaneous SCardReconnect of an inherited card succeed, with one context and one working connection."""
    session = Session()
    clients = pcsc_stack.clients()

    def child() -> Any:
        pcsc_safe.configure(cards=cards)
        barrier = threading.Barrier(8)

        def reconnect() -> Any:
            barrier.wait()
            answer = safe.SCardReconnect(session.card, SHARED, safe.SCARD_PROTOCOL_T1, safe.SCARD_LEAVE_CARD)
            return answer, session.transmit(ECHO)

        threads = [Calling(reconnect) for _ in range(8)]
        answers = [thread.answer() for thread in threads]
        pcsc_stack.wait_for_clients(clients + 1)  # surplus contexts are released
        ended = safe.SCardDisconnect(session.card, safe.SCARD_LEAVE_CARD)
        safe.SCardReleaseContext(session.context)
        return answers, ended

    one = ([OK, safe.SCARD_PROTOCOL_T1], [OK, [1, 2, 3, 0x90, 0x00]])
    for _ in range(10):
        assert in_child(child) == ([one] * 8, OK)
        pcsc_stack.wait_for_clients(clients)


def test_contexts_of_a_child_are_established_side_by_side(pcsc_stack: VirtualPcsc) -> None:
    """Threads of a child that first use different inherited contexts don't wait for each other."""
    contexts = [establish() for _ in range(6)]
    clients = pcsc_stack.clients()

    def child() -> Any:
        threads = [Calling(safe.SCardListReaders, context, []) for context in contexts * 2]
        answers = {thread.answer()[0] for thread in threads}
        pcsc_stack.wait_for_clients(clients + 6)
        return answers

    assert in_child(child) == {OK}
    assert [safe.SCardReleaseContext(context) for context in contexts] == [OK] * 6
