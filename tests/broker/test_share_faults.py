"""Policy ``share`` with faults: transactions that block, processes and brokers that die, a lack of descriptors."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import forking
import pytest
from brokers import ENOUGH, Client, Link, broker, descriptors, looks_into_brokers, until
from calling import HELD, Calling
from conftest import ECHO, Session
from families import (
    A_WHILE,
    BEGIN,
    ECHOED,
    END,
    EXCLUSIVE,
    INVALID,
    IS_PIN_THERE,
    LEAVE,
    OK,
    RECONNECT,
    RESET,
    SHARED,
    T1,
    TRANSMIT,
    UNPOWER,
    VERIFIED,
    VIOLATION,
    Member,
    called,
    card_of,
    exchanges,
    module_stack,
    sharing,
    stack,
)
from forking import in_child

from pcsc_safe import scard as safe
from pcsc_safe.broker import connection
from pcsc_safe.testing import VirtualPcsc

__all__ = ["module_stack", "stack"]

pytestmark = pytest.mark.native  # each family chooses its own way to PC/SC

DONE = [OK, [0x90, 0x00]]
COMM_ERROR = safe.SCARD_F_COMM_ERROR
SEED = 7


# Transactions.


def test_one_begun_before_the_fork_is_the_parents(stack: VirtualPcsc) -> None:
    """A transaction begun before the fork is the parent's. The child can leave, but must wait for its end."""

    def head() -> Any:
        session = Session()
        assert called(session, *BEGIN) == OK
        with Member(session) as child, Member(session) as leaves:
            left = leaves.calls("SCardDisconnect", RESET)
            refused = child.calls(*END)
            child.say(TRANSMIT)
            silent, mine, ended = child.is_silent(), called(session, *TRANSMIT), called(session, *END)
            return left, refused, silent, mine, ended, child.hear()

    assert in_child(sharing(head)) == (OK, VIOLATION, True, ECHOED, OK, ECHOED)


@pytest.mark.parametrize("how", ["exit", "SIGKILL", "disconnect", "release"])
def test_one_ends_with_its_process(stack: VirtualPcsc, how: str) -> None:
    """A transaction ends with its process, however that ends and however deeply nested. The card is not reset."""

    def head() -> Any:
        session = Session()
        with Member(session) as other, Member(session) as child:
            begun = [child.calls(*BEGIN) for _ in range(3)]
            other.say(IS_PIN_THERE)
            silent = other.is_silent()
            if how in ("exit", "SIGKILL"):
                child.ends() if how == "exit" else child.kill()
            else:
                child.calls(*(["SCardDisconnect", RESET] if how == "disconnect" else ["SCardReleaseContext"]))
            return begun, silent, other.hear(), called(session, *IS_PIN_THERE), called(session, *BEGIN)

    assert in_child(sharing(head)) == ([OK, OK, OK], True, VERIFIED, VERIFIED, OK)


def test_one_on_a_connection_of_ones_own(stack: VirtualPcsc) -> None:
    """A transaction on a separate connection excludes the session. Its process's end ends it, and resets the card."""

    def child(link: Link, session: Session) -> None:
        card = safe.SCardConnect(session.context, session.reader, SHARED, T1)[1]
        link.say(safe.SCardBeginTransaction(card))
        link.hear()

    def head() -> Any:
        session = Session()
        with Client(child, session) as client:
            begun = client.hear()
            waiting = Calling(called, session, *TRANSMIT)
            time.sleep(A_WHILE)
            still = waiting.is_alive()
            client.kill()
            return begun, still, waiting.answer(), called(session, *RECONNECT), called(session, *TRANSMIT)

    assert in_child(sharing(head)) == (OK, True, [safe.SCARD_W_RESET_CARD, []], [OK, T1], ECHOED)


def test_a_fork_waits_for_nobodys_exchange(stack: VirtualPcsc) -> None:
    """While one process is in an exchange and another waits for it, a third can fork immediately."""

    def head(link: Link) -> Any:
        session = Session()
        with Member(session) as busy, Member(session) as waits:
            busy.say(("SCardTransmit", safe.SCARD_PCI_T1, HELD))
            link.say("it is")
            link.hear()
            waits.say(TRANSMIT)
            with Client(lambda link: link.say(safe.SCardIsValidContext(session.context))) as child:
                answers = child.hear(), waits.is_silent(), busy.is_silent()
                link.say("release the card")
                return answers, busy.hear(), waits.hear()

    with Client(sharing(head)) as client:
        client.hear()
        assert card_of(stack).reached.wait(ENOUGH)
        client.say("it is busy")
        client.hear()
        card_of(stack).go.set()
        assert client.result() == ((OK, True, True), [OK, [7, 8, 9, 0x90, 0x00]], ECHOED)


# Processes that die.


@looks_into_brokers
@pytest.mark.parametrize("asked", [BEGIN, ("SCardTransmit", safe.SCARD_PCI_T1, [0x80, 0x50, 99, 0])])
def test_what_the_dead_waited_for_is_not_done(stack: VirtualPcsc, asked: Any) -> None:
    """The requests of a process that was killed while it waited for a transaction are not carried out."""

    def head() -> Any:
        session = Session()
        with Member(session) as other:
            other.calls(*TRANSMIT)
            before = len(descriptors(broker()))
            with Member(session) as child:
                assert called(session, *BEGIN) == OK
                child.say(asked)
                assert child.is_silent()
            until(lambda: len(descriptors(broker())) <= before + 1, "all but the connection that waits is closed")
            time.sleep(A_WHILE)
            ended, mine = called(session, *END), Calling(called, session, *TRANSMIT).answer()
            return ended, mine, other.calls(*BEGIN), other.calls("SCardTransmit", T1, [0x80, 0x51, 99, 0])

    assert in_child(sharing(head)) == (OK, ECHOED, OK, [OK, [0x69, 0x85]])


def test_the_long_call_of_the_dead_delays_only_its_card(stack: VirtualPcsc) -> None:
    """What a killed process had alone is free while the shared card is in its call, in other contexts and in this one.

    Its transaction on the shared card ends after the call.
    """

    def connects(context: Any, reader: str) -> bool:
        return bool(safe.SCardConnect(context, reader, EXCLUSIVE, T1)[0] == OK)

    def child(link: Link, session: Session, held: list[int], others: list[str]) -> None:
        context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1]
        link.say([called(session, *BEGIN), *map(connects, (context, session.context), others)])
        called(session, "SCardTransmit", safe.SCARD_PCI_T1, held)

    def head(link: Link) -> Any:
        session = Session()
        others = safe.SCardListReaders(session.context, [])[1][2:]
        with Client(child, session, HELD, others) as client:
            link.say(client.hear())
            link.hear()
            client.kill()
            until(lambda: connects(session.context, others[0]), "the card of its own context is free")
            until(lambda: connects(session.context, others[1]), "the card of the shared context is free")
            waiting = Calling(called, session, *TRANSMIT)
            link.say("both are free")
            return waiting.answer()

    with Client(sharing(head)) as client:
        assert client.hear() == [OK, True, True]
        assert card_of(stack).reached.wait(ENOUGH)
        client.say("it is held")
        assert client.hear() == "both are free"
        assert not card_of(stack).errors, "the card is no longer held"
        card_of(stack).go.set()
        assert client.result() == ECHOED


def behind_another(stack: VirtualPcsc, head: Callable[[Link, Session], Any]) -> Any:
    """Return what a family's head gets that needs the card while another application has a transaction.

    The transaction ends when the head says so over its link.
    """

    def begins(link: Link) -> Any:
        session = Session()
        link.say("connected")
        link.hear()
        link.say(head(link, session))

    context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1]
    card = safe.SCardConnect(context, stack.readers[0].name, SHARED, T1)[1]
    with Client(sharing(begins)) as client:
        client.hear()
        assert safe.SCardBeginTransaction(card) == OK
        client.say("begun")
        client.hear()
        time.sleep(A_WHILE)
        assert (safe.SCardDisconnect(card, LEAVE), safe.SCardReleaseContext(context)) == (OK, OK)
        return client.hear()


@pytest.mark.parametrize("asked", [BEGIN, ("SCardConnect", None, SHARED, T1)], ids=["transaction", "connection"])
def test_what_the_dead_got_is_taken_back(stack: VirtualPcsc, asked: Any) -> None:
    """A process killed while PC/SC made it wait for another application keeps nothing when the wait ends."""

    def head(link: Link, session: Session) -> Any:
        with Member(session) as child:
            child.say([session.reader if argument is None else argument for argument in asked])
            assert child.is_silent()
        link.say("it is dead")
        answers = called(session, *TRANSMIT), called(session, "SCardDisconnect", LEAVE)
        until(lambda: safe.SCardConnect(session.context, session.reader, EXCLUSIVE, T1)[0] == OK, "all is free")
        return answers

    assert behind_another(stack, head) == (ECHOED, OK)


@pytest.mark.parametrize("asked", ["before it comes", "then"])
def test_what_is_begun_during_a_fork_is_the_parents(stack: VirtualPcsc, asked: str) -> None:
    """A transaction that another thread waits for during a fork is the parent's: the child waits for its end."""

    def head(link: Link, session: Session) -> Any:
        begins = Calling(called, session, *BEGIN)
        time.sleep(A_WHILE)
        with Member(session) as child:
            if asked != "then":
                child.say(TRANSMIT)
                assert child.is_silent()
            link.say("it waits")
            begun = begins.answer()
            if asked == "then":
                child.say(TRANSMIT)
            return begun, child.is_silent(), called(session, *TRANSMIT), called(session, *END), child.hear()

    assert behind_another(stack, head) == (OK, True, ECHOED, OK, ECHOED)


def test_what_is_begun_for_the_dead_ends(stack: VirtualPcsc) -> None:
    """If a process is killed after a fork, the transaction that it waited for blocks nobody."""

    def child(link: Link, session: Session, parent: int) -> None:
        os.kill(parent, signal.SIGKILL)
        until(lambda: os.getppid() != parent, "its parent is gone")
        link.say("it is dead")
        time.sleep(5 * A_WHILE)  # the transaction begins now
        link.say(Calling(called, session, *TRANSMIT).answer())

    def head(link: Link, session: Session) -> Any:
        begins = Calling(called, session, *BEGIN)
        time.sleep(A_WHILE)
        forking.start(child, link, session, os.getpid())
        return begins.answer()

    assert behind_another(stack, head) == ECHOED


def test_who_has_left_begins_nothing(stack: VirtualPcsc) -> None:
    """A process that disconnects while its other thread waits for a transaction doesn't get the transaction."""

    def leaves(link: Link, session: Session) -> None:
        begins = Calling(called, session, *BEGIN)
        time.sleep(A_WHILE)
        link.say(called(session, "SCardDisconnect", LEAVE))
        begins.answer()
        link.hear()

    def head(link: Link, session: Session) -> Any:
        with Client(leaves, session) as child:
            left = child.hear()
            link.say("it waits")
            return left, Calling(called, session, *TRANSMIT).answer()

    assert behind_another(stack, head) == (OK, ECHOED)


def dies_asking(session: Session, *asked: Any) -> None:
    """Die directly after sending the request."""

    def send(self: Any, frame: bytes) -> None:
        self._send(frame, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    called(session, *TRANSMIT)
    connection.Connection.send = send  # type: ignore[method-assign]
    called(session, *asked)


@looks_into_brokers
def test_children_leave_nothing_in_the_broker(stack: VirtualPcsc) -> None:
    """A hundred children that end in all ways leave no descriptor and no thread, in the broker and in the parent."""

    def head() -> Any:
        session = Session()
        name = safe.SCardListReaders(session.context, [])[1][1]
        state = safe.SCardGetStatusChange(session.context, 0, [(name, 0)])[1][0][1]
        safe.SCardGetStatusChange(session.context, 1, [(name, state)])  # creates a native context for waits
        lives: list[Callable[[], Any]] = [
            lambda: None,  # uses nothing
            lambda: os.kill(os.getpid(), signal.SIGKILL),  # uses nothing either
            lambda: exchanges(session, 1, 2),
            lambda: [called(session, *BEGIN), os.kill(os.getpid(), signal.SIGKILL)],
            lambda: [Session(), safe.SCardConnect(session.context, name, EXCLUSIVE, T1)].clear(),
            lambda: dies_asking(session, "SCardGetStatusChange", safe.INFINITE, [(name, state)]),
            lambda: dies_asking(session, "SCardConnect", name, EXCLUSIVE, T1),
            lambda: dies_asking(session, *BEGIN),
            lambda: dies_asking(session, "SCardReleaseContext"),
            lambda: subprocess.run(["true"], preexec_fn=lambda: None, check=True).returncode,
        ]

        def has() -> Any:
            of_broker = sorted(link.partition(":")[0] for link in descriptors(broker()).values())
            return of_broker, len(os.listdir(f"/proc/{broker()}/task")), len(descriptors(os.getpid()))

        before = has()
        for number in range(100):
            with contextlib.suppress(forking.ChildFailedError):
                in_child(lives[number % len(lives)])
        with contextlib.suppress(AssertionError):
            until(lambda: has() == before, "it has what it had")
        free = safe.SCardConnect(session.context, name, EXCLUSIVE, T1)[0]
        return before, has(), free, called(session, *IS_PIN_THERE)

    before, after, *rest = in_child(sharing(head))
    assert after == before
    assert rest == [OK, VERIFIED]


def in_turmoil(session: Session, report: int, number: int, levels: int, end: int) -> None:
    """Use the session in every way until the end, in children too; report how many results were wrong.

    :param end: a pipe that can be read at the end.
    """
    for child in (2 * number, 2 * number + 1) if levels else ():
        if not forking.fork():
            signal.alarm(forking.TIMEOUT)
            in_turmoil(session, report, child, levels - 1, end)
            os._exit(0)
    os.write(report, f"{number} {os.getpid()}\n".encode())
    dice, wrong, pair = random.Random(SEED * number), 0, [[0x80, 0x50, number, 0], [0x80, 0x51, number, 0]]
    while not select.select([end], [], [], 0)[0]:
        what = dice.randrange(8)
        if what < 4:
            answers = [called(session, *BEGIN), *map(session.transmit, [*pair, *pair]), called(session, *END)]
            wrong += answers != [OK, *[DONE] * 4, OK]
        elif what == 4:
            wrong += called(session, "SCardGetStatusChange", 5, [(session.reader, 0)])[0] != OK
        elif what == 5:
            wrong += called(session, "SCardReconnect", EXCLUSIVE, T1, 0) != [OK, T1]
        else:
            wrong += exchanges(session, number, 10) != (0, VERIFIED)
    os.write(report, f"{number} {wrong}\n".encode())


def test_processes_that_are_killed_disturb_nobody(stack: VirtualPcsc) -> None:
    """Fifteen processes in four generations use one session. Seven are killed, and the others are not affected."""

    def head() -> Any:
        session, dice = Session(EXCLUSIVE), random.Random(SEED)
        read_end, write_end = os.pipe()
        end, ends = os.pipe()
        turmoil = Calling(in_turmoil, session, write_end, 1, 3, end)
        victims = dice.sample(range(2, 16), 7)
        with open(read_end) as reports:
            pids = dict(map(int, reports.readline().split()) for _ in range(15))
            for victim in victims:
                time.sleep(dice.random() / 4)
                os.kill(pids[victim], signal.SIGKILL)
            time.sleep(1)
            os.write(ends, b"1")
            wrong = dict(map(int, reports.readline().split()) for _ in range(8))
        turmoil.answer()
        return wrong == dict.fromkeys({*pids} - {*victims}, 0), exchanges(session, 1, 10)

    assert in_child(sharing(head)) == (True, (0, VERIFIED))


# Brokers that die.


def test_a_broker_that_is_killed_fails_everybody_at_once(stack: VirtualPcsc) -> None:
    """Calls in flight return SCARD_F_COMM_ERROR, others raise BrokerError. New contexts work, and so does cleanup."""
    cleanup = [("SCardIsValidContext",), ("SCardCancel",), ("SCardDisconnect", UNPOWER), ("SCardReleaseContext",)]

    def late_child(link: Link, session: Session) -> None:
        link.say([called(session, *IS_PIN_THERE), Session().transmit(ECHO)])
        link.say([called(session, *asked) for asked in cleanup])

    def head(link: Link) -> Any:
        session = Session()
        state = safe.SCardGetStatusChange(session.context, 0, [(session.reader, 0)])[1][0][1]
        busy = [BEGIN, RECONNECT, ("SCardStatus",), ("SCardGetStatusChange", safe.INFINITE, [(session.reader, state)])]
        assert called(session, *BEGIN) == OK
        with contextlib.ExitStack() as undo:
            members = [undo.enter_context(Member(session)) for _ in range(6)]  # the last one has used nothing
            members[4].calls("SCardListReaders", [])
            for member, asked in zip(members, busy):
                member.say(asked)
                assert member.is_silent()
            mine = Calling(called, session, "SCardTransmit", safe.SCARD_PCI_T1, HELD)
            link.say("all are busy")
            link.hear()
            os.kill(broker(), signal.SIGKILL)
            under_way = [member.hear() for member in members[:4]]
            lost = [mine.answer(), *(member.calls(*TRANSMIT) for member in members), called(session, *TRANSMIT)]
            link.say("release the card")
            late = undo.enter_context(Client(late_child, session))
            return under_way, lost, late.hear(), late.hear(), Session().transmit(ECHO)

    with Client(sharing(head)) as client:
        client.hear()
        assert card_of(stack).reached.wait(ENOUGH)
        client.say("it is in an exchange")
        client.hear()
        card_of(stack).go.set()
        under_way, lost, *rest = client.result()
    assert [answer[0] if isinstance(answer, list) else answer for answer in under_way] == [COMM_ERROR] * 4
    assert lost == [[COMM_ERROR, []], *["BrokerError"] * 7]
    assert rest == [["BrokerError", ECHOED], [INVALID, OK, OK, OK], ECHOED]


def test_a_broker_that_is_killed_at_any_moment_gives_no_wrong_answer(stack: VirtualPcsc) -> None:
    """Every process gets right results until the broker dies, then errors. None hangs."""

    def until_it_fails(session: Session, number: int) -> Any:
        for i in range(1 << 16):
            data = [number, i >> 8, i & 0xFF]
            answer = called(session, "SCardTransmit", safe.SCARD_PCI_T1, [0x80, 1, 0, 0, 3, *data])
            if answer != [OK, [*data, 0x90, 0x00]]:
                break
        return answer in ([COMM_ERROR, []], "BrokerError"), called(session, *TRANSMIT)

    def head() -> Any:
        dice, answers = random.Random(SEED), []
        for _ in range(3):
            session = Session()
            children = [forking.start(until_it_fails, session, number) for number in range(6)]
            time.sleep(dice.random() / 5)
            os.kill(broker(), signal.SIGKILL)
            answers += [forking.wait_for(child) for child in children]
            at_once = called(session, *TRANSMIT)  # may have been in flight when the broker was killed
            answers.append((at_once in ([COMM_ERROR, []], "BrokerError"), called(session, *TRANSMIT)))
        return answers

    assert in_child(sharing(head)) == [(True, "BrokerError")] * 21


# Many forks, and forks that fail.


def test_threads_fork_at_once(stack: VirtualPcsc) -> None:
    """Every child has the session while other threads use it and fork. The parent's descriptors don't change."""

    def forks(session: Session, number: int) -> Any:
        return [in_child(exchanges, session, 8 * number + i, 20) for i in range(5)]

    def head() -> Any:
        session = Session()
        before = len(descriptors(os.getpid()))
        busy = Calling(exchanges, session, 99, 300)
        threads = [Calling(forks, session, number) for number in range(4)]
        answers = [answer for thread in threads for answer in thread.answer()]
        return answers, busy.answer(), len(descriptors(os.getpid())) - before

    answers, busy, more = in_child(sharing(head))
    assert answers == [(0, VERIFIED)] * 20
    assert busy == (0, VERIFIED)
    assert more <= 5  # connections for simultaneous calls


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may start no process")
def test_a_fork_that_fails_leaves_everything_as_it_was(stack: VirtualPcsc) -> None:
    """No descriptor is lost, no process that was never started has the session, and the next fork works."""

    def head() -> Any:
        session = Session()
        os.setresuid(65534, 65534, 65534)
        before, (soft, hard) = descriptors(os.getpid()), resource.getrlimit(resource.RLIMIT_NPROC)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
        failed = 0
        for _ in range(5):
            try:
                forking.fork() or os._exit(0)
            except OSError:  # before Python 3.10 with any errno that the hooks have left
                failed += 1
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
        same = before == descriptors(os.getpid())
        answers = in_child(exchanges, session, 1, 10), called(session, *IS_PIN_THERE)
        ended = called(session, "SCardDisconnect", RESET)
        connect = [session.context, session.reader, EXCLUSIVE, T1]
        until(lambda: safe.SCardConnect(*connect)[0] == OK, "the broker has seen the end of the child, the last holder")
        return failed, same, answers, ended

    assert in_child(sharing(head)) == (5, True, ((0, VERIFIED), VERIFIED), OK)


def test_a_disconnection_that_is_refused(stack: VirtualPcsc) -> None:
    """The last process keeps the card, and can disconnect."""

    def head() -> Any:
        session = Session(EXCLUSIVE)
        in_child(lambda: called(session, "SCardDisconnect", safe.SCARD_LEAVE_CARD))
        refused = called(session, "SCardDisconnect", 7)
        return refused, called(session, "SCardDisconnect", safe.SCARD_LEAVE_CARD)

    assert in_child(sharing(head)) == (safe.SCARD_E_INVALID_VALUE, OK)


@pytest.mark.parametrize("left", range(5))
def test_a_fork_for_which_there_are_no_descriptors(stack: VirtualPcsc, left: int) -> None:
    """The fork succeeds, nothing is lost, and the child joins the session as soon as it has a descriptor."""

    def child(session: Session, limits: tuple[int, int]) -> Any:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        return exchanges(session, 1, 10)

    def head() -> Any:
        session = Session()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        fillers = []
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        for _ in range(left + 2):  # two for the result
            os.close(fillers.pop())
        before = len(descriptors(os.getpid()))
        answer = in_child(child, session, (soft, hard))
        return answer, len(descriptors(os.getpid())) - before, called(session, *IS_PIN_THERE)

    assert in_child(sharing(head)) == ((0, VERIFIED), 0, VERIFIED)
