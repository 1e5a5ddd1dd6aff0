"""The broker or pcscd is killed: calls return PC/SC's codes, nothing hangs or leaks, and the next use works."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from brokers import (
    ENOUGH,
    Client,
    ComesInBetweenError,
    Link,
    broker,
    brokers,
    by_broker,
    children,
    descriptors,
    held_card,
    stack_to_hold,
    stopped,
    until,
    watched,
)
from calling import HELD, Calling
from conftest import ECHO, IS_VERIFIED, Session
from forking import in_child
from inherited_calls import TABLE, Row
from interrupts import Alarm
from lives import AGAIN, USES, outcome

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import gate, handles, reestablish, router
from pcsc_safe._core.calls import CALLS, NO_HANDLE, Kind
from pcsc_safe.broker import client, family, served, wire
from pcsc_safe.broker.client import Broker
from pcsc_safe.broker.connection import Connection
from pcsc_safe.errors import BrokerError
from pcsc_safe.testing import VirtualPcsc

pytestmark = pytest.mark.native  # each client here chooses its own way to PC/SC

OK = safe.SCARD_S_SUCCESS
LOST = safe.SCARD_F_COMM_ERROR
RESET = safe.SCARD_W_RESET_CARD
INVALID = safe.SCARD_E_INVALID_HANDLE
ECHOED = [OK, [1, 2, 3, 0x90, 0x00]]
READER = "Virtual PCD 0 00 00"


@pytest.fixture(scope="module")
def stack() -> Iterator[VirtualPcsc]:
    """The stack for tests that leave pcscd unchanged."""
    with stack_to_hold() as stack:
        yield stack


def kill(pid: int) -> None:
    """Send SIGKILL, and wait for the end of the process."""
    with watched(pid) as watch:
        os.kill(pid, signal.SIGKILL)
        assert watch.ends(ENOUGH)


# The broker is killed.


@pytest.mark.parametrize("cards", ["reset", "reconnect"])
def test_after_its_death_the_next_use_starts_another(stack: VirtualPcsc, cards: str) -> None:
    """Another broker re-establishes contexts. A card needs SCardReconnect, or is reconnected if ``cards`` says so."""

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
        again = broker() != first, children() == brokers(), number == session.context
        session.close()
        return answers, again

    (listed, at_first, reconnected, then, valid, *cleanup), again = in_child(by_broker(child))
    assert (listed, reconnected, valid, cleanup) == (OK, OK, OK, [OK, OK])
    if cards == "reset":
        assert at_first == [RESET, []]
    else:
        assert at_first[0] == OK
    assert then[0] == OK
    assert again == (True, True, True)


@pytest.mark.parametrize("how", ["killed", "closed"])
@pytest.mark.parametrize("policy", ["auto", "share"])
def test_what_the_log_says(stack: VirtualPcsc, caplog: pytest.LogCaptureFixture, policy: str, how: str) -> None:
    """One line says why the sessions are lost and what helps. It is true if the broker lives, and under ``share``."""

    def loses_it(session: Session, number: int) -> Any:
        caplog.clear()
        if how == "killed":
            kill(number)
        for file in family.files_to_preserve() if how == "closed" else ():
            os.close(file)
        with contextlib.suppress(BrokerError):
            session.transmit(ECHO)
        lines = [record for record in caplog.records if getattr(record, "pcsc_event", "") == "broker-lost"]
        return os.getpid(), [line.getMessage() for line in lines], Session().transmit(ECHO)

    def parent() -> Any:
        pcsc_safe.configure(broker="always", policy=policy)
        session, number = Session(), broker()
        return number, in_child(loses_it, session, number), number in brokers()

    number, (pid, lines, then), lives = in_child(parent)
    assert lines == [
        f"process {pid} has lost its sessions in broker {number}, because the broker has ended, or the file "
        "descriptors of the connection to it were closed: pcsc_safe re-establishes the contexts, but under policy "
        "'share' you must establish new ones; a program that closes all file descriptors must keep those of "
        "pcsc_safe.files_to_preserve()"
    ]
    assert (then, lives) == (ECHOED, how == "closed")


def test_in_a_transaction_a_card_does_not_go_on(stack: VirtualPcsc) -> None:
    """A card in a transaction returns SCARD_W_RESET_CARD even with cards='reconnect', which would split it in two."""

    def child() -> Any:
        pcsc_safe.configure(cards="reconnect")
        session = Session()
        assert safe.SCardBeginTransaction(session.card) == OK
        kill(broker())
        answers = session.transmit(ECHO), safe.SCardEndTransaction(session.card, safe.SCARD_LEAVE_CARD)
        safe.SCardReleaseContext(session.context)
        return answers

    assert in_child(by_broker(child)) == ([RESET, []], OK)


def test_a_released_handle_of_a_dead_broker(stack: VirtualPcsc) -> None:
    """A handle that was released before the broker died is invalid, as any other released handle."""

    def child() -> Any:
        session, other = Session(), Session()
        session.close()
        kill(broker())
        answers = [
            session.transmit(ECHO),
            safe.SCardDisconnect(session.card, safe.SCARD_LEAVE_CARD),
            safe.SCardReleaseContext(session.context),
        ]
        other.close()
        return answers

    assert in_child(by_broker(child)) == [[INVALID, []], INVALID, INVALID]


def test_two_threads_make_the_first_contact(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection that keeps a client alive is the one that its process takes for it, whichever arrives first."""
    is_opened, go_on = threading.Event(), threading.Event()
    open_connection = Broker._open_connection

    def opens_first_and_is_recorded_last(self: Broker, *arguments: Any) -> Any:
        connection = open_connection(self, *arguments)
        if not is_opened.is_set():
            is_opened.set()
            assert go_on.wait(ENOUGH)
        return connection

    def child() -> Any:
        monkeypatch.setattr(Broker, "_open_connection", opens_first_and_is_recorded_last)
        first = Calling(safe.SCardEstablishContext, safe.SCARD_SCOPE_SYSTEM)
        assert is_opened.wait(ENOUGH)
        session = Session()
        go_on.set()
        hresult, context = first.answer()
        mine = [hresult, *(safe.SCardReleaseContext(context) for _ in range(2))]
        of_process = family.existing()
        while of_process is not None and of_process._idle:
            of_process._idle.pop().close()
        time.sleep(0.1)  # the broker would release the sessions of a client that has ended
        return mine, session.transmit(ECHO)

    assert in_child(by_broker(child)) == ([OK, OK, INVALID], ECHOED)


def test_a_handler_that_raises_at_the_first_contact(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker stays, and the next call works."""
    open_connection = Broker._open_connection

    def child() -> Any:
        def is_interrupted(self: Broker, *arguments: Any) -> Any:
            open_connection(self, *arguments)
            monkeypatch.undo()
            raise ComesInBetweenError

        monkeypatch.setattr(Broker, "_open_connection", is_interrupted)
        with pytest.raises(ComesInBetweenError):
            establish()
        first = brokers()
        return Session().transmit(ECHO), brokers() == first

    assert in_child(by_broker(child)) == (ECHOED, True)


def test_a_handler_between_the_choice_of_a_connection_and_its_use(
    stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that interrupts another one doesn't take its connection away, however long that was idle."""
    get_connection = Broker._get_connection

    def child() -> Any:
        session = Session()
        nested: list[Any] = []

        def is_interrupted(self: Broker) -> Any:
            connection = get_connection(self)
            monkeypatch.undo()
            nested.append(session.transmit(ECHO))
            return connection

        time.sleep(1.1)
        monkeypatch.setattr(Broker, "_get_connection", is_interrupted)
        return session.transmit(ECHO), nested

    assert in_child(by_broker(child)) == (ECHOED, [ECHOED])


@pytest.mark.parametrize("rest", [["End", "Begin", "Undo", "End"], ["Begin", "End", "Undo", "End"]], ids="-".join)
def test_undo_ends_only_the_transaction_that_the_call_began(stack: VirtualPcsc, rest: list[str]) -> None:
    """Also if another thread has ended that transaction first, and has begun the next one."""

    def child() -> Any:
        card = Session().card
        own = family.existing()
        assert own is not None
        first, second = own._get_connection(), own._get_connection()
        frames = {
            "Begin": client._frame_of(wire.NUMBERS["SCardBeginTransaction"], (handles.find(Kind.CARD, card).real,)),
            "End": client._frame_of(wire.NUMBERS["SCardEndTransaction"], (handles.find(Kind.CARD, card).real, 0)),
            "Undo": wire.encode(wire.Undo()),
        }

        def ask(name: str, connection: Connection) -> Any:
            connection.send(frames[name])
            return client._result_of(wire.decode(connection.receive()))

        assert ask("Begin", first) == OK
        return [ask(name, first if name == "Undo" else second) for name in rest]

    *_, last = in_child(by_broker(child))
    assert last == (OK if rest[0] == "End" else safe.SCARD_E_NOT_TRANSACTED)


def test_numbers_that_are_not_the_clients(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker passes no number to libpcsclite that its client doesn't have: it could be one that is being released."""
    passed: list[Any] = []
    monkeypatch.setitem(router.public, "SCardReleaseContext", lambda handle: passed.append(handle) or 0)
    client = served.Client(bytes(16), cast("served.Connection", None))
    call = CALLS["SCardReleaseContext"]
    for number in (7, -1, 0xFFFFFFFF, (1 << 32) + 7, 0, 1 << 63):
        served.Connection._call(cast("served.Connection", None), client, call, (number,))
    assert passed == [NO_HANDLE] * 4 + [0, 1 << 63]


def under_way(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call that the broker has received, but not answered, when it is killed."""
    with stopped(broker()):
        calling = Calling(call, *arguments)
        until(lambda: calling.waits, "it waits for the answer")
    return calling.answer()


@pytest.mark.parametrize("row", [row for row in TABLE if hasattr(safe, row.name)], ids=lambda row: row.name)
def test_a_call_under_way_is_a_communication_error(stack: VirtualPcsc, row: Row) -> None:
    """Every function returns SCARD_F_COMM_ERROR in its form, and is not repeated: it may have been carried out."""

    def child() -> Any:
        session = Session()
        answer = under_way(getattr(safe, row.name), getattr(session, row.handle), *row.arguments)
        return (
            answer,
            brokers(),
            children() == brokers(),
            [session.transmit(ECHO)[0], safe.SCardReleaseContext(session.context)],
        )

    then = [INVALID, INVALID] if row.name == "SCardReleaseContext" else [RESET, OK]
    assert in_child(by_broker(child)) == (CALLS[row.name].failure(LOST, row.arguments), [], True, then)


def test_another_thread_has_re_established_the_context(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCardConnect is made in the new broker: nothing was sent to the one that has ended."""
    new_session = reestablish.new_session

    def meanwhile(context: Any, reader: str, share_mode: int) -> Any:
        monkeypatch.setattr(reestablish, "new_session", new_session)
        session = new_session(context, reader, share_mode)
        kill(broker())
        assert safe.SCardListReaders(context.safe, [])[0] == OK
        return session

    def child() -> Any:
        context = establish()
        monkeypatch.setattr(reestablish, "new_session", meanwhile)
        hresult, card, _ = safe.SCardConnect(context, READER, safe.SCARD_SHARE_SHARED, 3)
        return hresult, safe.SCardStatus(card)[0]

    assert in_child(by_broker(child)) == (OK, OK)


def test_a_number_that_is_nothing_starts_no_broker(stack: VirtualPcsc) -> None:
    """A child that has no broker yet says itself that the number is invalid."""

    def child() -> Any:
        checks = (safe.SCardIsValidContext, safe.SCardReleaseContext, safe.SCardCancel)
        return {check(12345) for check in checks} | {safe.SCardDisconnect(12345, safe.SCARD_LEAVE_CARD)}, brokers()

    assert in_child(by_broker(child)) == ({INVALID}, [])


def test_an_apdu_under_way_is_sent_once(stack: VirtualPcsc) -> None:
    """The card has received the APDU, and doesn't receive it again."""
    card = held_card(stack)

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
    """SCardEstablishContext in flight returns SCARD_F_COMM_ERROR too. The next one succeeds."""

    def child() -> Any:
        establish()
        return under_way(safe.SCardEstablishContext, safe.SCARD_SCOPE_SYSTEM), bool(establish())

    assert in_child(by_broker(child)) == ([LOST, 0], True)


def test_killed_again_and_again_under_load(stack: VirtualPcsc) -> None:
    """Four threads make calls while brokers are killed at any moment: they get PC/SC's codes, and nothing leaks."""

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
        while killed < 12:
            until(brokers, "there is a broker")
            time.sleep(0.02 * killed)  # as it starts, and then each time later
            for pid in brokers():
                with contextlib.suppress(ProcessLookupError):  # the one before, which has been waited for meanwhile
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        over.set()
        seen = set().union(*[thread.answer() for thread in threads])
        establish()
        return seen, len(descriptors(os.getpid())) - before, children() == brokers(), len(brokers())

    seen, leaked, no_zombies, alive = in_child(by_broker(child))
    at_its_start = ("signal 9 ended it", "ended as soon as they had started")
    assert [text for text in seen - {OK, LOST, RESET} if not any(part in str(text) for part in at_its_start)] == []
    assert (no_zombies, alive) == (True, 1)
    assert leaked <= 8  # connections kept for the next calls


def test_it_dies_in_a_transaction(stack: VirtualPcsc) -> None:
    """With ``cards="reconnect"`` the calls after the end of the lost transaction succeed."""

    def child() -> Any:
        pcsc_safe.configure(cards="reconnect")
        session = Session()
        assert safe.SCardBeginTransaction(session.card) == OK
        for pid in brokers():
            os.kill(pid, signal.SIGKILL)
        until(lambda: not brokers(), "it has ended")
        for _ in range(2):  # the first one may return SCARD_F_COMM_ERROR
            lost = session.transmit(ECHO)[0]
        return lost, safe.SCardEndTransaction(session.card, safe.SCARD_LEAVE_CARD), session.transmit(ECHO)

    assert in_child(by_broker(child)) == (RESET, OK, ECHOED)


def test_validity_while_brokers_die(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCardIsValidContext returns a code although no new broker lives. Other functions raise BrokerError."""

    def child() -> Any:
        context = establish()
        for pid in brokers():
            os.kill(pid, signal.SIGKILL)
        until(lambda: not brokers(), "it has ended")
        monkeypatch.setattr(reestablish, "_ATTEMPTS", 0)  # as if that many had ended
        with contextlib.suppress(BrokerError):  # it may also return SCARD_F_COMM_ERROR, if the broker is just ending
            safe.SCardListReaders(context, [])
        with pytest.raises(BrokerError, match="ended as soon as they had started"):
            safe.SCardListReaders(context, [])
        return safe.SCardIsValidContext(context)

    assert in_child(by_broker(child)) == INVALID


# pcscd ends.


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        (["kill", "start"], ["establish", "connect", "wait", "transmit", "wait", *USES, *AGAIN]),
        (["kill"], ["establish", "connect", "wait", *USES, "establish"]),
        (["restart"], ["establish", "connect", "begin", "wait", *USES, *AGAIN]),
        (["restart"], ["establish", "wait", "valid", "list", "list", "release", *AGAIN]),
    ],
    ids=lambda value: "-".join(value) if "wait" not in value else "",
)
def test_pcscd_dies_behind_it(
    pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch, changes: list[str], steps: list[str]
) -> None:
    """If pcscd is killed or restarted, the codes are those of raw pyscard, and the broker continues."""
    make = [getattr(pcsc_stack, change) for change in changes]
    monkeypatch.setenv("PCSC_SAFE_BROKER", "on-fork")
    native = outcome(pcsc_stack, "smartcard.scard", make, steps)
    if not pcsc_stack.pid:
        pcsc_stack.start()
    monkeypatch.setenv("PCSC_SAFE_BROKER", "always")
    assert outcome(pcsc_stack, "pcsc_safe.scard", make, steps) == native


def test_a_wait_ends_when_pcscd_dies_behind_it(pcsc_stack: VirtualPcsc) -> None:
    """A wait for events returns the same code as natively. The same broker establishes the next context."""
    name = pcsc_stack.readers[0].name

    def waits(link: Link) -> Any:
        context = establish()
        known = [(name, safe.SCardGetStatusChange(context, 0, [(name, 0)])[1][0][1])]
        waiter = Calling(safe.SCardGetStatusChange, context, safe.INFINITE, known)
        until(lambda: waiter.waits, "it waits")
        link.say(brokers())
        ended = waiter.answer()[0]
        link.hear()
        return ended, safe.SCardListReaders(establish(), [])[0], brokers()

    def told(function: Any) -> Any:
        with Client(function) as client:
            before = client.hear()
            pcsc_stack.kill()
            pcsc_stack.start()
            client.say("it is up again")
            *answers, after = client.result()
        assert after == before
        return answers

    native = told(waits)
    assert native[0] != OK
    assert told(by_broker(waits)) == native


# A signal handler raises in the client.


def interrupted(connection: Connection) -> bytes:
    raise Alarm


def test_an_interrupted_disconnection(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker may have powered the card off, so no other process may take the session for a living one."""

    def child() -> Any:
        session = Session()
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "receive", interrupted)
            with contextlib.suppress(Alarm):
                safe.SCardDisconnect(session.card, safe.SCARD_UNPOWER_CARD)
        return session.card._self_record.session.is_open

    assert in_child(by_broker(child)) is False


def test_an_interrupted_end_of_a_transaction(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker ends the transaction although a handler has raised before the broker could read the request."""

    def child() -> Any:
        session, other = Session(), Session()
        begun = safe.SCardBeginTransaction(session.card)
        with monkeypatch.context() as patch, stopped(broker(), then=signal.SIGCONT):
            patch.setattr(Connection, "receive", interrupted)
            with contextlib.suppress(Alarm):
                safe.SCardEndTransaction(session.card, safe.SCARD_LEAVE_CARD)
        return begun, safe.SCardBeginTransaction(other.card)  # which would wait for ever

    assert in_child(by_broker(child)) == (OK, OK)


def test_a_broker_that_a_handler_loses(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of a broker if a handler raises as soon as it is started."""
    call_inside = gate.call_inside

    def started(*arguments: Any) -> None:
        call_inside(*arguments)
        raise Alarm

    def child() -> Any:
        family.prepare()
        before = descriptors(os.getpid())
        with monkeypatch.context() as patch:
            patch.setattr(gate, "call_inside", started)
            with contextlib.suppress(Alarm):
                family.get()
        return descriptors(os.getpid()) == before, family.existing(), Session().transmit(ECHO)

    assert in_child(by_broker(child)) == (True, None, ECHOED)


def test_a_closed_connection_is_not_replaced_in_the_child(stack: VirtualPcsc) -> None:
    """The application has closed a connection to the broker, and its number is another file's: this file stays."""

    def child(number: int) -> str:
        return os.readlink(f"/proc/self/fd/{number}")

    def parent() -> Any:
        pcsc_safe.configure(broker="always", policy="share")
        Session()
        mine = family.existing()
        assert mine is not None
        assert mine._presence is not None
        number = mine._presence.connection.descriptor.number
        with open(os.devnull) as file:
            os.dup2(file.fileno(), number)
        return in_child(child, number)

    assert in_child(parent) == os.devnull
