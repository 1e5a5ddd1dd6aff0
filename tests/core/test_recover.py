"""``recover``: for a context, the end of pcscd is like a fork.

Each story runs in a client, a forked child that uses PC/SC natively or through a broker.  The client asks the test to
kill, stop or start the test's pcscd.  "restart" is SIGKILL and a start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from brokers import ENOUGH, Client, Link, descriptors, until
from calling import Calling, HeldCard, waits_on
from conftest import ECHO, IS_VERIFIED, VERIFY, Session
from forking import in_child, start, wait_for
from interrupts import Alarm, RaisesInside
from rawscard import raw

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import handles, process, recovery
from pcsc_safe._core.calls import CALLS
from pcsc_safe.broker import family
from pcsc_safe.errors import ForkedHandleError
from pcsc_safe.testing import VirtualPcsc
from pcsc_safe.testing._install import Missing, look

OK, LEAVE, UNPOWER = safe.SCARD_S_SUCCESS, safe.SCARD_LEAVE_CARD, safe.SCARD_UNPOWER_CARD
SHARED, EXCLUSIVE, T1 = safe.SCARD_SHARE_SHARED, safe.SCARD_SHARE_EXCLUSIVE, safe.SCARD_PROTOCOL_T1
RESET, INVALID = safe.SCARD_W_RESET_CARD, safe.SCARD_E_INVALID_HANDLE
NO_SERVICE, COMM_ERROR = safe.SCARD_E_NO_SERVICE, safe.SCARD_F_COMM_ERROR
CANCELLED, TIMED_OUT = safe.SCARD_E_CANCELLED, safe.SCARD_E_TIMEOUT
CHANGED, EMPTY, PRESENT = safe.SCARD_STATE_CHANGED, safe.SCARD_STATE_EMPTY, safe.SCARD_STATE_PRESENT
NEW_READERS = "\\\\?PnP?\\Notification"
NOT_YET, VERIFIED, ECHOED = [OK, [0, 0x90, 0x00]], [OK, [1, 0x90, 0x00]], [OK, [1, 2, 3, 0x90, 0x00]]
HELD = [0x80, 0x02, 0x00, 0x00, 0x03, 7, 8, 9]


@pytest.fixture(scope="module")
def module_stack() -> Iterator[VirtualPcsc]:
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(2, [HeldCard()]) as stack:
        yield stack


@pytest.fixture
def stack(module_stack: VirtualPcsc) -> Iterator[VirtualPcsc]:
    """The module's stack. pcscd runs and the card is in its reader, before and after."""
    yield module_stack
    if not module_stack.pid:
        module_stack.start()
    if module_stack.readers[0].card is None:
        module_stack.readers[0].insert(HeldCard())
    module_stack.wait_for_clients(0)


def kill_in_an_exchange(stack: VirtualPcsc) -> None:
    card: Any = stack.readers[0].card
    assert card.reached.wait(ENOUGH)
    os.kill(stack.pid, signal.SIGKILL)
    until(lambda: has_ended(stack.pid), "pcscd has ended")
    card.go.set()  # because kill() waits for the card
    stack.kill()
    card.reached.clear()
    card.go.clear()


def stop(stack: VirtualPcsc) -> None:
    """End pcscd in an orderly way, as systemd does."""
    os.kill(stack.pid, signal.SIGTERM)
    until(lambda: has_ended(stack.pid), "pcscd has ended")


def has_ended(pid: int) -> bool:
    """Return whether only the exit status is left: no thread, and so no listening socket."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "Z" and len(os.listdir(f"/proc/{pid}/task")) == 1


ASKED_FOR: dict[str, Callable[[VirtualPcsc], Any]] = {
    "kill": VirtualPcsc.kill,
    "stop": stop,
    "start": VirtualPcsc.start,
    "restart": VirtualPcsc.restart,
    "kill in an exchange": kill_in_an_exchange,
    "remove": lambda stack: stack.readers[0].remove(),
    "insert": lambda stack: stack.readers[0].insert(HeldCard()),
}


class Pcscd:
    """pcscd as seen by a client: a call asks the test for changes, and returns when they are done."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __call__(self, *wishes: str) -> None:
        for wish in wishes:
            self._link.say(wish)
            self._link.hear()


def told(stack: VirtualPcsc, way: str, story: Callable[[Pcscd], Any], **settings: Any) -> Any:
    """Return the story's result; the test makes the changes of pcscd that the client asks for.

    :param way: ``native`` or ``broker``.
    """

    def client(link: Link) -> Any:
        always = {"broker": "always"} if way == "broker" else {}
        pcsc_safe.configure(**{"recover": True, **always, **settings})
        # Not on stderr: if a thread writes there while another forks, the child inherits a locked lock.
        logging.getLogger("pcsc_safe").addHandler(logging.NullHandler())
        logging.getLogger("pcsc_safe").propagate = False
        try:
            return story(Pcscd(link))
        finally:
            link.say("")

    with Client(client) as teller:
        with contextlib.suppress(EOFError):
            while wish := teller.hear():
                ASKED_FOR[wish](stack)
                teller.say("done")
        return teller.result()


by_either_way = pytest.mark.parametrize("way", [pytest.param("native", marks=pytest.mark.native), "broker"])


def status(card: Any) -> int:
    return int(safe.SCardStatus(card)[0])


def reconnect(card: Any, share_mode: int = SHARED, initialization: int = LEAVE) -> int:
    return int(safe.SCardReconnect(card, share_mode, T1, initialization)[0])


def establish() -> Any:
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    assert hresult == OK
    return context


def reader() -> str:
    return "Virtual PCD 0 00 00"


# 1. What becomes of a context and a card.


@by_either_way
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_nothing_is_there_and_then_it_is(stack: VirtualPcsc, way: str, end: str) -> None:
    """Without pcscd calls return SCARD_E_NO_SERVICE. With a new one they work; the card needs SCardReconnect."""

    def story(pcscd: Pcscd) -> Any:
        session = Session()
        pcscd(end)
        down = [
            status(session.card),
            session.transmit(ECHO),
            reconnect(session.card),
            safe.SCardListReaders(session.context, []),
            safe.SCardGetStatusChange(session.context, 0, [(session.reader, 0)])[0],
            safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[0],
        ]
        pcscd("start")
        number = int(session.context)
        up = [
            session.transmit(ECHO),
            safe.SCardIsValidContext(session.context),
            len(safe.SCardListReaders(session.context, [])[1]),
            status(session.card),
            safe.SCardBeginTransaction(session.card),
        ]
        again = [reconnect(session.card), session.transmit(IS_VERIFIED), session.transmit(ECHO)]
        same = int(session.context) == number, session.context.owner_pid == os.getpid()
        session.close()
        return down, up, again, same

    down, up, again, same = told(stack, way, story)
    assert down == [NO_SERVICE, [NO_SERVICE, []], NO_SERVICE, [NO_SERVICE, []], NO_SERVICE, NO_SERVICE]
    assert up == [[RESET, []], OK, 2, RESET, RESET]
    assert again == [OK, NOT_YET, ECHOED]
    assert same == (True, True)


@pytest.mark.not_on_macos("raw pyscard, for comparison, can't be used in a forked process")
@by_either_way
def test_off_by_default(stack: VirtualPcsc, way: str) -> None:
    """Without ``recover`` a lost context returns raw pyscard's codes for ever. With it, the context works again."""

    def answers(scard: Any, pcscd: Pcscd) -> Any:
        _, context = scard.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
        _, card, _ = scard.SCardConnect(context, reader(), SHARED, T1)
        pcscd("restart")
        return [
            scard.SCardListReaders(context, []),
            scard.SCardGetStatusChange(context, 100, [(reader(), 0)]),
            scard.SCardConnect(context, reader(), SHARED, T1)[0],
            scard.SCardIsValidContext(context),
            scard.SCardStatus(card)[0],
            scard.SCardTransmit(card, safe.SCARD_PCI_T1, ECHO)[0],
            scard.SCardReconnect(card, SHARED, T1, LEAVE)[0],
            scard.SCardBeginTransaction(card),
            scard.SCardEndTransaction(card, LEAVE),
            scard.SCardDisconnect(card, LEAVE),
            scard.SCardReleaseContext(context),
            scard.SCardReleaseContext(context),
        ]

    def story(pcscd: Pcscd) -> Any:
        ours, theirs = answers(safe, pcscd), answers(raw, pcscd)
        context = establish()
        pcscd("restart")
        before = safe.SCardListReaders(context, [])[0]
        pcsc_safe.configure(recover=True, context=context)
        return ours == theirs, before, safe.SCardListReaders(context, [])[0], safe.SCardReleaseContext(context)

    assert told(stack, way, story, recover=False) == (True, NO_SERVICE, OK, OK)


@by_either_way
def test_cards_reconnect(stack: VirtualPcsc, way: str) -> None:
    """With ``cards="reconnect"`` the first call uses a new connection, except inside a transaction."""

    def story(pcscd: Pcscd) -> Any:
        session = Session()
        pcscd("restart")
        first = session.transmit(IS_VERIFIED)
        began = safe.SCardBeginTransaction(session.card)
        pcscd("restart")
        within = [session.transmit(ECHO), safe.SCardEndTransaction(session.card, LEAVE), session.transmit(ECHO)]
        session.close()
        return first, began, within

    assert told(stack, way, story, cards="reconnect") == (NOT_YET, OK, [[RESET, []], OK, ECHOED])


@by_either_way
def test_cleanup_of_what_is_lost(stack: VirtualPcsc, way: str) -> None:
    """Cleanup of what ended with pcscd succeeds, and the handles are then invalid, with and without a new pcscd."""

    def story(pcscd: Pcscd) -> Any:
        answers = []
        for wish in ("kill", "restart"):
            for first in ("transaction", "card", "context"):
                session = Session()
                safe.SCardBeginTransaction(session.card)
                pcscd(wish)
                if first == "transaction":
                    answers.append(safe.SCardEndTransaction(session.card, LEAVE))
                if first != "context":
                    answers += [safe.SCardDisconnect(session.card, LEAVE), status(session.card) == INVALID]
                answers += [safe.SCardCancel(session.context), safe.SCardReleaseContext(session.context)]
                answers.append(safe.SCardReleaseContext(session.context) == INVALID)
                if wish == "kill":
                    pcscd("start")
        return answers

    answers = told(stack, way, story)
    assert answers == 2 * [OK, OK, True, OK, OK, True, OK, True, OK, OK, True, OK, OK, True]


@by_either_way
def test_the_card_is_gone_when_pcscd_is_back(stack: VirtualPcsc, way: str) -> None:
    """SCardReconnect returns why it fails, and succeeds as soon as it can."""

    def story(pcscd: Pcscd) -> Any:
        session = Session()
        pcscd("kill", "remove", "start")
        gone = [status(session.card), reconnect(session.card), status(session.card)]
        pcscd("insert")
        stranger = Session(EXCLUSIVE)
        taken = reconnect(session.card)
        stranger.close()
        back = [reconnect(session.card, SHARED, UNPOWER), session.transmit(IS_VERIFIED)]
        session.close()
        return gone, taken, back

    gone, taken, back = told(stack, way, story)
    assert gone == [RESET, safe.SCARD_E_NO_SMARTCARD, RESET]
    assert taken == safe.SCARD_E_SHARING_VIOLATION
    assert back == [OK, NOT_YET]


@by_either_way
def test_a_call_that_was_under_way(stack: VirtualPcsc, way: str) -> None:
    """A call in flight may have been carried out: it returns SCARD_F_COMM_ERROR, and is not made again."""

    def story(pcscd: Pcscd) -> Any:
        session = Session()
        exchange = Calling(session.transmit, HELD)
        pcscd("kill in an exchange")
        under_way = exchange.answer()
        pcscd("start")
        answers = [under_way, session.transmit(ECHO), reconnect(session.card), session.transmit(ECHO)]
        session.close()
        return answers

    assert told(stack, way, story) == [[COMM_ERROR, []], [RESET, []], OK, ECHOED]


@by_either_way
@pytest.mark.parametrize("policy", ["raise", "invalid", "broker", "share"])
def test_every_policy(stack: VirtualPcsc, way: str, policy: str) -> None:
    """What ends with pcscd is not inherited: no policy for forks refuses it."""

    def story(pcscd: Pcscd) -> Any:
        session = Session()
        pcscd("restart")
        answers = [session.transmit(ECHO), status(session.card), reconnect(session.card), session.transmit(ECHO)]
        session.close()
        return answers

    if policy == "share" and way == "native":
        pytest.skip("a session is shared in a broker")
    assert told(stack, way, story, policy=policy) == [[RESET, []], RESET, OK, ECHOED]


@by_either_way
def test_nothing_is_left_of_old_contexts(stack: VirtualPcsc, way: str) -> None:
    """Restarts of pcscd leave no descriptor and no record, however many there are."""

    def story(pcscd: Pcscd) -> Any:
        from pcsc_safe._core import handles
        from pcsc_safe.broker import family

        def used() -> Any:
            broker = family.existing()  # may be the broker of this process's family
            # A broker is not dumpable, so only root can count its descriptors.
            processes = [os.getpid(), *([broker.helper_pid] if broker is not None and os.geteuid() == 0 else [])]
            return [len(descriptors(pid)) for pid in processes], len(handles.contexts), len(handles.cards)

        session = Session()
        counts = []
        for _ in range(6):
            pcscd("restart")
            safe.SCardDisconnect(session.card, LEAVE)
            _, session.card, _ = safe.SCardConnect(session.context, session.reader, SHARED, T1)
            assert session.transmit(ECHO) == ECHOED
            counts.append(used())
        session.close()
        return counts

    first, second, *others = told(stack, way, story)
    assert others == [second] * 4
    assert first[0] == second[0]


@pytest.mark.not_on_macos("a forked process has a broker there, and says so")
@pytest.mark.native
def test_what_is_logged(stack: VirtualPcsc) -> None:
    """The log has a line for each re-established context, and a warning for each card that needs SCardReconnect."""

    def story(pcscd: Pcscd) -> Any:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
        logging.getLogger("pcsc_safe").addHandler(handler)
        logging.getLogger("pcsc_safe").setLevel("INFO")
        session = Session()
        for _ in range(2):
            pcscd("restart")
            assert [session.transmit(ECHO), session.transmit(ECHO)] == 2 * [[RESET, []]]
            assert reconnect(session.card) == OK
        logging.getLogger("pcsc_safe").removeHandler(handler)
        session.close()
        return lines, os.getpid(), session.reader

    lines, pid, reader = told(stack, "native", story)
    assert lines == 2 * [
        f"INFO process {pid} has a new context, which replaces one that ended with pcscd",
        f"WARNING SCardTransmit returns SCARD_W_RESET_CARD to process {pid} for the card in {reader}, because pcscd "
        "was restarted: call SCardReconnect (pcsc_safe.reconnecting() does), or configure cards='reconnect'",
    ]


# 2. pcscd by socket activation, as in current distributions.


class Activator(threading.Thread):
    """Listens at pcscd's socket, and starts pcscd when a client connects, as systemd does."""

    def __init__(self, stack: VirtualPcsc) -> None:
        super().__init__(daemon=True)
        daemon = stack._running()
        stack._configure()  # read by pcscd as it starts; the stack removes it after its own pcscd's start
        self._command = daemon._command()
        self._home = daemon.home
        self.pcscd: Any = None
        self.starts = 0
        self._over = False
        os.unlink(daemon.path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(daemon.path)
        self._listener.listen()
        self.start()

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while not self._over:
            if poll.poll(10) and not self._over:
                self.starts += 1
                self.pcscd = self._activated()
                self.pcscd.wait()

    def _activated(self) -> Any:
        code = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
        code += "os.execv(sys.argv[2], sys.argv[2:])"
        number = self._listener.fileno()
        return subprocess.Popen(
            [sys.executable, "-c", code, str(number), *self._command, "--auto-exit"],
            env={"LISTEN_FDS": "1", "PCSCLITE_HP_DROPDIR": f"{self._home}/none"},
            pass_fds=[number, 3],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def stop_pcscd(self) -> None:
        """End pcscd as it ends by itself when it had no client for a minute."""
        self.pcscd.terminate()
        self.pcscd.wait()

    def end(self) -> None:
        self._over = True
        if self.pcscd is not None:
            self.pcscd.kill()
        self.join()
        self._listener.close()


@by_either_way
def test_socket_activation(stack: VirtualPcsc, way: str) -> None:
    """The next call starts pcscd and re-establishes the context. No call returns SCARD_E_NO_SERVICE."""
    stack.kill()
    activator = Activator(stack)

    def is_plugged() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            stack.readers[0]._slot.plug()
            return True
        return False

    def story(pcscd: Pcscd) -> Any:
        context = establish()
        answers = []
        for _ in range(2):
            pcscd("activated pcscd ends")
            answers.append(safe.SCardListReaders(context, []))
        pcscd("activated pcscd ends")
        answers.append(safe.SCardConnect(context, reader(), SHARED, T1)[0])
        wait = Calling(safe.SCardGetStatusChange, context, safe.INFINITE, [(reader(), EMPTY)])
        pcscd("activated pcscd ends", "plug")
        answers.append(wait.answer()[1][0][1] & (CHANGED | PRESENT))
        return [*answers, safe.SCardReleaseContext(context)]

    try:
        ASKED_FOR["activated pcscd ends"] = lambda stack: activator.stop_pcscd()
        ASKED_FOR["plug"] = lambda stack: until(is_plugged, "vpcd listens")
        listed = [OK, [each.name for each in stack.readers]]
        assert told(stack, way, story) == [listed, listed, safe.SCARD_E_NO_SMARTCARD, CHANGED | PRESENT, OK]
        assert activator.starts == 5
    finally:
        stack._unplug()
        activator.end()
        stack.start()


# 3. Waits for events and monitors continue.


def state(context: Any) -> int:
    hresult, states = safe.SCardGetStatusChange(context, 0, [(reader(), 0)])
    assert hresult == OK
    return int(states[0][1]) & ~CHANGED


@by_either_way
def test_a_wait_goes_on(stack: VirtualPcsc, way: str) -> None:
    """A wait reports what happened to the card while no pcscd ran, and what happens later."""

    def story(pcscd: Pcscd) -> Any:
        context = establish()
        first = Calling(safe.SCardGetStatusChange, context, safe.INFINITE, [(reader(), PRESENT)])
        pcscd("kill", "remove", "start")
        gone = first.answer()
        second = Calling(safe.SCardGetStatusChange, context, 60000, [(reader(), EMPTY)])
        pcscd("restart", "insert")
        back = second.answer()
        safe.SCardReleaseContext(context)
        return [(answer[0], answer[1][0][1] & (CHANGED | PRESENT | EMPTY)) for answer in (gone, back)]

    assert told(stack, way, story) == [(OK, CHANGED | EMPTY), (OK, CHANGED | PRESENT)]


@by_either_way
def test_a_wait_takes_no_longer(stack: VirtualPcsc, way: str) -> None:
    """The timeout includes the time without pcscd. The wait ends on time, whether pcscd is back or not."""

    def story(pcscd: Pcscd) -> Any:
        context = establish()
        states = [(reader(), PRESENT)]
        first = Calling(safe.SCardGetStatusChange, context, 400, states)
        pcscd("kill")
        down = first.answer()
        begun_without = Calling(safe.SCardGetStatusChange, context, 100, states)
        still_down = begun_without.answer()
        pcscd("start")
        known = state(context)
        second = Calling(safe.SCardGetStatusChange, context, 1500, [(reader(), PRESENT)])
        pcscd("restart")
        up = second.answer()
        safe.SCardReleaseContext(context)
        times = [0.4 <= first.seconds < ENOUGH / 4, begun_without.seconds >= 0.1, second.seconds < ENOUGH / 4]
        return [down[0], still_down, up[0] in (OK, TIMED_OUT), times, known & PRESENT]

    down, still_down, is_right, times, present = told(stack, way, story)
    assert (down, still_down) == (TIMED_OUT, [TIMED_OUT, [(reader(), 0, [])]])
    assert (is_right, times, present) == (True, [True] * 3, PRESENT)


@by_either_way
@pytest.mark.parametrize("when", ["down", "restarted"])
def test_cancel(stack: VirtualPcsc, way: str, when: str) -> None:
    """SCardCancel ends the context's waits, with and without a pcscd, and no other wait."""

    def story(pcscd: Pcscd) -> Any:
        context, other = establish(), establish()
        waits = [Calling(safe.SCardGetStatusChange, context, safe.INFINITE, [(reader(), PRESENT)]) for _ in range(2)]
        another = Calling(safe.SCardGetStatusChange, other, safe.INFINITE, [(NEW_READERS, 0)])
        pcscd("remove")
        known = [each.answer()[0] for each in waits]
        waits = [Calling(safe.SCardGetStatusChange, context, safe.INFINITE, [(reader(), EMPTY)]) for _ in range(2)]
        until(lambda: all(map(waits_on, waits)), "they wait")
        pcscd("kill", *(["start"] if when == "restarted" else []))
        answers = [safe.SCardCancel(context), *(each.answer()[0] for each in waits)]
        others = another.is_alive() or another.answer()[0] == OK
        safe.SCardCancel(other)
        another.answer()
        safe.SCardReleaseContext(context), safe.SCardReleaseContext(other)
        return known, answers, others

    assert told(stack, way, story) == ([OK, OK], [OK, CANCELLED, CANCELLED], True)


@pytest.mark.parametrize(("recover", "expected"), [(True, OK), (False, INVALID)])
def test_a_cancel_before_the_loss_is_noticed(stack: VirtualPcsc, recover: bool, expected: int) -> None:
    """If a new pcscd doesn't know the context, SCardCancel succeeds nevertheless."""
    pcsc_safe.configure(recover=recover)
    context = establish()
    assert recovery.cancel(context._self_record, lambda: INVALID) == expected
    assert safe.SCardReleaseContext(context) == OK


def test_a_wait_that_another_thread_ends(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread notices the end of pcscd and releases the context; this cancels no wait of another one."""

    def child() -> Any:
        pcsc_safe.configure(recover=True, broker="always")
        session = Session()
        mine = family.existing()
        assert mine is not None
        functions, record, ended = mine.functions, session.context._self_record, list[int]()

        def ends(real: int, timeout: int, states: Any, **more: Any) -> Any:
            if not ended:
                ended.append(real)
                handles.mark_lost(record, real, process.SERVICE_LOST)
                return [CANCELLED, states]
            return functions["SCardGetStatusChange"](real, timeout, states, **more)

        monkeypatch.setattr(mine, "functions", {**functions, "SCardGetStatusChange": ends})
        answer = safe.SCardGetStatusChange(session.context, 50, [(session.reader, PRESENT)])[0]
        return len(ended), answer in (OK, TIMED_OUT)

    assert in_child(child) == (1, True)


def test_a_signal_as_a_wait_begins_to_continue(stack: VirtualPcsc) -> None:
    """Whichever line a handler raises in, another thread's SCardCancel does not look for this wait afterwards."""

    def client() -> Any:
        record, line, reached, cancelled = handles.contexts[establish()], 0, list[bool](), list[int]()

        def list_readers(*_: Any) -> None:
            sys.settrace(None)
            reached.append(True)
            raise Alarm

        def cancel_once() -> int:
            cancelled.append(OK)
            return OK

        while not reached:
            sys.settrace(RaisesInside(recovery.continue_wait, line))
            with contextlib.suppress(Alarm):
                recovery.continue_wait(CALLS["SCardGetStatusChange"], abs, list_readers, record, 0, [], 0.0, 0)
            line += 1
        return Calling(recovery.cancel, record, cancel_once).answer(), cancelled, line > 5

    assert in_child(client) == (OK, [OK], True)


@by_either_way
def test_new_readers(stack: VirtualPcsc, way: str) -> None:
    """A wait for new readers ends when pcscd is back: its readers may be others."""

    def story(pcscd: Pcscd) -> Any:
        context = establish()
        wait = Calling(safe.SCardGetStatusChange, context, safe.INFINITE, [(reader(), PRESENT), (NEW_READERS, 0)])
        pcscd("restart")
        hresult, states = wait.answer()
        safe.SCardReleaseContext(context)
        return hresult, [name for name, *_ in states], any(state & CHANGED for _, state, _ in states)

    assert told(stack, way, story) == (OK, [reader(), NEW_READERS], True)


@by_either_way
@pytest.mark.parametrize("kind", ["cards", "readers"])
def test_monitors(stack: VirtualPcsc, way: str, kind: str) -> None:
    """The monitors of pyscard continue, and report what has changed. Nothing is written to stderr."""

    def story(pcscd: Pcscd) -> Any:
        from programs import Recorder, eventually, monitors

        warnings.simplefilter("ignore", DeprecationWarning)  # pyscard 2.0 issues some
        pcsc_safe.install()
        caught: list[Any] = []
        threading.excepthook = lambda arguments: caught.append(arguments.exc_type.__name__)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # its position shows whether anything was written
        monitor, observer = monitors(kind)(), Recorder()
        monitor.addObserver(observer)
        there = 1 if kind == "cards" else 2
        answers = [eventually(lambda: observer.came == there)]
        for gone in (there, 2 * there):
            pcscd("kill", "remove")
            if kind == "cards":
                pcscd("start")
            answers.append(eventually(lambda: observer.went == gone))  # noqa: B023
            pcscd("insert", *(["start"] if kind == "readers" else []))
            answers.append(eventually(lambda: observer.came == gone + there))  # noqa: B023
        monitor.deleteObserver(observer)
        return answers, caught, sys.stderr.tell()

    assert told(stack, way, story) == ([True] * 5, [], 0)


# 4. Threads, forks and handovers.


@by_either_way
def test_threads_notice_at_once(stack: VirtualPcsc, way: str) -> None:
    """One of several threads re-establishes the context, for all."""

    def story(pcscd: Pcscd) -> Any:
        session = Session()
        for _ in range(3):
            pcscd("restart")
            barrier = threading.Barrier(8)

            def use() -> Any:
                barrier.wait()  # noqa: B023
                return safe.SCardListReaders(session.context, [])[0], session.transmit(ECHO)

            answers = [caller.answer() for caller in [Calling(use) for _ in range(8)]]
            assert answers == [(OK, [RESET, []])] * 8
            pcscd("count clients")
            reconnects = [Calling(reconnect, session.card) for _ in range(8)]
            assert [caller.answer() for caller in reconnects] == [OK] * 8
            assert session.transmit(ECHO) == ECHOED
        session.close()
        return True

    # Surplus contexts, if several threads established one, are released.
    ASKED_FOR["count clients"] = lambda stack: stack.wait_for_clients(1)
    assert told(stack, way, story)


@by_either_way
@pytest.mark.parametrize("when", ["before it is noticed", "when it is lost", "when it is had again"])
def test_forks(stack: VirtualPcsc, way: str, when: str) -> None:
    """A child continues the parent's new session, never the old one, whether or not the parent had noticed."""

    def story(pcscd: Pcscd) -> Any:
        session = Session()

        def child() -> Any:
            first = [session.transmit(ECHO), status(session.card), safe.SCardListReaders(session.context, [])[0]]
            return [*first, reconnect(session.card), session.transmit(ECHO), safe.SCardReleaseContext(session.context)]

        pcscd("kill")
        if when == "when it is lost":
            assert status(session.card) == NO_SERVICE
        pcscd("start")
        if when == "when it is had again":
            assert [status(session.card), reconnect(session.card)] == [RESET, OK]
        left = in_child(child)
        if when != "when it is had again":
            assert [status(session.card), reconnect(session.card)] == [RESET, OK]
        session.transmit(VERIFY)
        again = in_child(child)
        session.assert_untouched()
        session.close()
        return left, again

    goes_on, has_ended = [ECHOED, OK, OK, OK, ECHOED, OK], [[RESET, []], RESET, OK, OK, ECHOED, OK]
    assert told(stack, way, story) == (goes_on if when == "when it is had again" else has_ended, goes_on)


@pytest.mark.native
def test_a_child_obeys_its_policy(stack: VirtualPcsc) -> None:
    """A child has inherited what its parent lost: policy ``raise`` applies to it."""

    def story(pcscd: Pcscd) -> Any:
        session = Session()
        pcscd("kill")
        assert status(session.card) == NO_SERVICE
        pcscd("start")

        def child() -> Any:
            with pytest.raises(ForkedHandleError):
                status(session.card)
            return True

        answers = in_child(child), status(session.card)
        session.close()
        return answers

    assert told(stack, "native", story, policy="raise") == (True, RESET)


@by_either_way
def test_a_fork_while_others_recover(stack: VirtualPcsc, way: str) -> None:
    """A fork beside threads that recover has a working child, and the parent's threads continue."""

    def story(pcscd: Pcscd) -> Any:
        session = Session()
        over = threading.Event()
        answers: list[Any] = []

        def use() -> None:
            while not over.is_set():
                answers.append(session.transmit(ECHO)[0])
                if answers[-1] == RESET:
                    answers.append(reconnect(session.card))

        def child() -> Any:
            return status(session.card), reconnect(session.card), session.transmit(ECHO)

        # Also the codes for a connection made as pcscd dies, or before the card is in its reader.
        known = {OK, RESET, NO_SERVICE, COMM_ERROR, safe.SCARD_W_SECURITY_VIOLATION, safe.SCARD_E_NO_SMARTCARD}
        users = [Calling(use) for _ in range(3)]
        children = []
        for _ in range(3):
            pcscd("kill")
            started = [start(child)]
            pcscd("start")
            started += [start(child) for _ in range(3)]
            children += [wait_for(each) for each in started[1:]]
            wait_for(started[0])  # pcscd may not have run yet
            until(lambda: answers[-20:].count(OK) >= 10, "they go on")
        over.set()
        for user in users:
            user.answer()
        session.close()
        return children, {*answers} - known

    assert told(stack, way, story, cards="reset") == ([(RESET, OK, ECHOED)] * 9, set())


@by_either_way
@pytest.mark.parametrize("when", ["before", "in the block", "after"])
def test_handover(stack: VirtualPcsc, way: str, when: str) -> None:
    """The child recovers a session that ends before, during or after the handover."""

    def story(pcscd: Pcscd) -> Any:
        session = Session()
        (ours, theirs), (told, tell) = os.pipe(), os.pipe()

        def child() -> Any:
            os.read(told, 1)
            answers = [session.transmit(ECHO), reconnect(session.card), session.transmit(ECHO)]
            session.close()
            return answers

        if when == "before":
            pcscd("restart")
        with pcsc_safe.handover():
            if when == "in the block":
                pcscd("restart")
            started = start(child)
        if when == "after":
            pcscd("restart")
        os.write(tell, b"1")
        answers = wait_for(started), status(session.card), reconnect(session.card)
        session.close()
        for number in (ours, theirs, told, tell):
            os.close(number)
        return answers

    assert told(stack, way, story) == ([[RESET, []], OK, ECHOED], RESET, OK)


# 5. Sessions that several processes share.


def test_share(stack: VirtualPcsc) -> None:
    """A shared session ends for all its processes. Each then has its own, which its later children share."""

    def story(pcscd: Pcscd) -> Any:
        session = Session(EXCLUSIVE)

        def member(link: Link) -> Any:
            answers = [session.transmit(IS_VERIFIED)]
            link.say("has it")
            link.hear()
            answers += [session.transmit(IS_VERIFIED), reconnect(session.card, EXCLUSIVE)]
            return [*answers, safe.SCardReleaseContext(session.context)]

        with Client(member) as other:
            other.hear()
            pcscd("restart")
            mine = [session.transmit(ECHO), reconnect(session.card, EXCLUSIVE), session.transmit(VERIFY)]
            other.say("go on")
            theirs = other.result()
        younger = in_child(lambda: session.transmit(IS_VERIFIED))
        session.assert_untouched()
        session.close()
        return mine, theirs, younger

    mine, theirs, younger = told(stack, "broker", story, policy="share")
    assert mine == [[RESET, []], OK, [OK, [0x90, 0x00]]]
    assert theirs == [VERIFIED, [RESET, []], safe.SCARD_E_SHARING_VIOLATION, OK]
    assert younger == VERIFIED


# 6. What no real pcscd does.


def test_contexts_but_nothing_else() -> None:
    """If contexts can be established but calls fail, a call is made three more times and returns SCARD_E_NO_SERVICE."""
    made = []

    def fails() -> Any:
        made.append(1)
        return recovery.repeat(CALLS["SCardListReaders"], fails, ())

    assert (fails(), len(made), recovery._attempts) == ([NO_SERVICE, []], 4, {})
