"""Signal handlers run during a wait of the main thread, and may do there what they may do anywhere.

Each program is a separate process, because the tests examine its signals, its threads and its CPU time.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import forking
import pytest
from calling import CANCELLED, OK, PRESENT, TIMED_OUT, Calling, connect, establish, state_of, transmit, until
from cforks import c_fork
from conftest import ECHO
from forking import fork, in_program
from interrupts import Alarm, as_of_c, before_3_10

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe.testing import EchoCard, VirtualPcsc

RIGHT = [OK, [1, 2, 3, 0x90, 0x00]]
FOR_EVER = safe.INFINITE
A_WHILE = 600  # ms; longer than the signal and its handler take
SOON = 0.2  # s

pytestmark = pytest.mark.native  # each program chooses its own way to PC/SC


def told(program: Callable[..., Any], *arguments: str, stack: VirtualPcsc, **env: str) -> Any:
    """Return what a program of this module printed as JSON; it prints nothing else."""
    done = in_program(program, *arguments, env={**os.environ, **stack.env, **env})
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


class Session:
    """A context, its readers, and a connection to the card in the first one."""

    def __init__(self, gateway: str = "native") -> None:
        if gateway == "broker":
            pcsc_safe.configure(broker="always")
        self.context = establish()
        self.readers = safe.SCardListReaders(self.context, [])[1]
        self.card = connect(self.context, self.readers[0])

    def wait(self, timeout: int, reader: int = 1) -> int:
        return int(safe.SCardGetStatusChange(self.context, timeout, [(self.readers[reader], PRESENT)])[0])

    def works(self) -> bool:
        answers = [safe.SCardListReaders(self.context, [])[0], transmit(self.card, ECHO), self.wait(1)]
        return answers == [OK, RIGHT, TIMED_OUT]


def at_alarm(function: Callable[[], Any], seconds: float = SOON) -> list[Any]:
    """Have a signal handler call the function; return the list for its result."""
    returned: list[Any] = []
    signal.signal(signal.SIGALRM, lambda *_: returned.append(function()))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    return returned


def left_behind() -> list[Any]:
    """Release all contexts; return how many native contexts and calls are left. No threads may be."""
    from pcsc_safe._core import handles, in_flight
    from pcsc_safe._native import contexts, releasing

    for handle in list(handles.contexts):
        safe.SCardReleaseContext(handle)
    # After an exception a thread may still exist that has just ended the wait.
    until(lambda: len(os.listdir("/proc/self/task")) == 1, "there are no threads")
    natives = [place for place in in_flight.places if isinstance(place, contexts.NativeContext)]
    return [len(natives), len(in_flight.calls()), len(releasing.awaiting_release)]


NOTHING = [0, 0, 0]


# 1. The handler runs immediately, and the wait ends as it says.


@pytest.mark.parametrize("gateway", ["native", "broker"])
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_an_endless_wait(shared_stack: VirtualPcsc, number: str, gateway: str) -> None:
    """A wait ends with what a signal handler raises. Everything works afterwards, and nothing is left."""
    raised, works, left = told(ended, number, gateway, stack=shared_stack)
    assert raised == {"SIGINT": "KeyboardInterrupt", "SIGTERM": "SystemExit"}[number]
    assert works
    assert left == NOTHING


def ended(number: str, gateway: str) -> None:
    session = Session(gateway)
    signal.signal(signal.SIGTERM, lambda *_: exit(3))
    with subprocess.Popen(["sh", "-c", f"sleep {SOON}; kill -{number[3:]} {os.getpid()}"]):
        try:
            session.wait(FOR_EVER)
        except BaseException as error:
            raised = type(error).__name__
    print(json.dumps([raised, session.works(), left_behind()]))


def returns(session: Session) -> Any:
    return OK


def cancels(session: Session) -> Any:
    return safe.SCardCancel(session.context)


def releases(session: Session) -> Any:
    return safe.SCardReleaseContext(session.context)


def exchanges(session: Session) -> Any:
    return int(transmit(session.card, ECHO) != RIGHT)


def connects(session: Session) -> Any:
    card = connect(session.context, session.readers[1])
    return safe.SCardDisconnect(card, safe.SCARD_LEAVE_CARD)


def waits(session: Session) -> Any:
    return int(session.wait(150) != TIMED_OUT)


def joins(session: Session) -> Any:
    """Join threads that use the card and the context, and that wait for the same reader."""
    calls: list[Callable[[], Any]] = [
        lambda: exchanges(session),
        lambda: safe.SCardListReaders(session.context, [])[0],
        lambda: int(session.wait(150) != TIMED_OUT),
    ]
    return sum(Calling(call).answer() for call in calls)


HANDLERS: dict[str, Callable[[Session], Any]] = {
    function.__name__: function for function in (returns, cancels, releases, exchanges, connects, waits, joins)
}


@pytest.mark.parametrize("gateway", ["native", "broker"])
@pytest.mark.parametrize("what", HANDLERS)
def test_a_handler_may_do_everything(shared_stack: VirtualPcsc, what: str, gateway: str) -> None:
    """A handler runs during the wait, which ends as if another thread had done the same."""
    in_handler, ended, seconds, left = told(handled, what, gateway, stack=shared_stack)
    assert in_handler == [OK]
    assert ended == (CANCELLED if what in ("cancels", "releases") else TIMED_OUT)
    assert ended == CANCELLED or A_WHILE / 1000 <= seconds < 5
    assert left == NOTHING


def handled(what: str, gateway: str) -> None:
    session = Session(gateway)
    in_handler = at_alarm(lambda: HANDLERS[what](session))
    began = time.monotonic()
    ended = session.wait(FOR_EVER if what in ("cancels", "releases") else A_WHILE)
    print(json.dumps([in_handler, ended, time.monotonic() - began, left_behind()]))


# 2. Handlers that fork.


@pytest.mark.parametrize(
    ("then", "how"),
    [
        ("exits", "os.fork"),
        ("exits", "C"),
        ("returns", "os.fork"),
        # No hook tells such a child that it is another process; it checks every five seconds.
        pytest.param("returns", "C", marks=pytest.mark.long),
        ("uses PC/SC", "C"),
    ],
)
def test_a_handler_that_forks(shared_stack: VirtualPcsc, then: str, how: str) -> None:
    """The wait continues in the parent. A child that returns from the handler waits on its own context."""
    expected = [0, None if then == "exits" else TIMED_OUT, OK]
    assert told(forks, then, how, stack=shared_stack) == [[expected] * 3, [TIMED_OUT] * 3, True, NOTHING]


def forks(then: str, how: str) -> None:
    session, me = Session(), os.getpid()
    ended, children = [], []
    for _ in range(3):
        reads, writes = os.pipe()
        pids = at_alarm(lambda: forked_in_handler(session, then, how, writes))  # noqa: B023
        outcome = session.wait(A_WHILE)
        if os.getpid() != me:
            report(session, outcome, writes)
        ended.append(outcome)
        os.close(writes)
        with open(reads, "rb") as pipe:
            said = json.loads(pipe.read() or b"[]")
        children.append([os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]), *said])
    print(json.dumps([children, ended, session.works(), left_behind()]))


class SlowCard(EchoCard):
    """An EchoCard that takes two seconds for INS 03."""

    def apdu(self, command: bytes) -> bytes:
        if command[1] == 0x03:
            time.sleep(2)
            return b"\x90\x00"
        return super().apdu(command)


@pytest.mark.parametrize("how", ["os.fork", "C"])
def test_a_handler_that_forks_while_its_thread_waits_for_its_turn(how: str) -> None:
    """The child doesn't wait for a card that a thread of its parent uses, and continues through a broker."""
    with VirtualPcsc(2, [SlowCard(), EchoCard()]) as stack:
        done = in_program(forks_in_its_turn, how, env={**os.environ, **stack.env})
    assert (done.returncode, json.loads(done.stdout)) == (0, [RIGHT, RIGHT, 0]), done.stderr


def forks_in_its_turn(how: str) -> None:
    pcsc_safe.configure(quiesce_timeout=0.1)
    session, me = Session(), os.getpid()
    reads, writes = os.pipe()
    other = Calling(transmit, session.card, [0x80, 0x03, 0, 0])
    time.sleep(SOON)
    pids = at_alarm(lambda: fork() if how == "os.fork" else c_fork())
    answer = transmit(session.card, ECHO)
    if os.getpid() != me:
        os.write(writes, json.dumps(answer).encode())
        os._exit(0)
    childs = json.loads(os.read(reads, 1000))
    other.answer()
    print(json.dumps([answer, childs, os.waitpid(pids[0], 0)[1]]))


def forked_in_handler(session: Session, then: str, how: str, writes: int) -> int:
    pid = fork() if how == "os.fork" else c_fork()
    if pid == 0 and then == "exits":
        report(session, None, writes)
    if pid == 0 and then == "uses PC/SC":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        assert safe.SCardListReaders(session.context, [])[0] == OK
    return pid


def report(session: Session, outcome: Any, writes: int) -> None:
    """In a child: report the result of its wait, and whether PC/SC works; then exit."""
    signal.alarm(20)
    os.write(writes, json.dumps([outcome, safe.SCardListReaders(session.context, [])[0]]).encode())
    os._exit(0)


# 3. No lost events, nothing left behind, no wasted time.

CHANGES = 60


@contextlib.contextmanager
def lines_of(program: Callable[..., Any], *arguments: str, stack: VirtualPcsc) -> Iterator[Iterator[str]]:
    """Yield what a program of this module prints, line by line; kill it after a timeout."""
    command = [sys.executable, forking.__file__, __file__, program.__name__, *arguments]
    with subprocess.Popen(command, env={**os.environ, **stack.env}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(forking.TIMEOUT, process.kill)
        watchdog.start()
        try:
            yield iter(process.stdout.readline, "")
        finally:
            watchdog.cancel()
            process.kill()


@before_3_10
@pytest.mark.parametrize("then", ["return", "raise"])
def test_no_event_is_lost(then: str) -> None:
    """Handlers return or raise at any moment of a wait, and the loop still sees each change of the card."""
    with VirtualPcsc(1, [EchoCard()]) as stack, lines_of(sees, then, stack=stack) as lines:
        slot = stack.readers[0]
        card, seen = slot.card, [next(lines)]
        assert card is not None
        for number in range(CHANGES):
            if number % 2:
                slot.insert(card)
            else:
                slot.remove()
            seen.append(next(lines))
        assert seen == ["present\n", "empty\n"] * (CHANGES // 2) + ["present\n"]
        alarms, left = json.loads(next(lines))
    assert alarms > CHANGES // 2
    assert left == NOTHING


def sees(then: str) -> None:
    """Print a reader's state whenever it changes, while alarms come all the time."""
    context, reader, alarms, armed = establish(), "Virtual PCD 0 00 00", 0, False
    state = state_of(context, reader)
    print("present" if state & PRESENT else "empty", flush=True)

    def handler(*_: object) -> None:
        nonlocal alarms, armed
        alarms += 1
        if armed:
            armed = False
            raise Alarm

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    for _ in range(CHANGES):
        states: Any = None
        while states is None:
            try:
                armed = then == "raise"
                states = safe.SCardGetStatusChange(context, FOR_EVER, [(reader, state)])[1]
                armed = False
            except Alarm:
                pass
        state = states[0][1] & ~safe.SCARD_STATE_CHANGED
        print("present" if state & PRESENT else "empty", flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps([alarms, left_behind()]), flush=True)


def test_two_signals_at_once(shared_stack: VirtualPcsc) -> None:
    """A signal never goes to a thread of pcsc_safe, where its handler would not run: both handlers run."""
    assert told(two_signals, stack=shared_stack) == [CANCELLED] * 20


def two_signals() -> None:
    session, came, ended = Session(), [], []

    def handler(number: int, _: object) -> None:
        came.append(number)
        if len(came) % 2 == 0:
            safe.SCardCancel(session.context)

    signal.signal(signal.SIGUSR1, handler)
    signal.signal(signal.SIGUSR2, handler)
    me = os.getpid()
    for _ in range(20):
        # The wait is a second thread's.
        begun = f"until [ $(ls /proc/{me}/task | wc -l) -gt 1 ]; do :; done; sleep 0.1"
        with subprocess.Popen(["sh", "-c", f"{begun}; kill -USR1 {me}; kill -USR2 {me}"]):
            ended.append(session.wait(FOR_EVER))
    print(json.dumps(ended))


def test_a_wait_has_its_price_once(shared_stack: VirtualPcsc) -> None:
    """An idle wait of the main thread uses almost no CPU time and hardly ever wakes up."""
    seconds, switches = told(idle, stack=shared_stack)
    assert seconds < 0.1
    assert switches < 30


def idle() -> None:
    session = Session()
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert session.wait(3000) == TIMED_OUT
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps([seconds, after.ru_nvcsw - before.ru_nvcsw]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the test counts threads in /proc")
def test_its_thread_ends_with_the_wait(shared_stack: VirtualPcsc) -> None:
    """The process has one thread directly after a wait: no DeprecationWarning at a fork (Python 3.12)."""
    assert told(forks_after_waits, stack=shared_stack, PYTHONWARNINGS="error::DeprecationWarning") == [1] * 20


def forks_after_waits() -> None:
    session, threads = Session(), []
    for _ in range(20):
        session.wait(110)
        threads.append(len(os.listdir("/proc/self/task")))
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    print(json.dumps(threads))


def test_a_call_that_fails_starts_no_other_thread(shared_stack: VirtualPcsc) -> None:
    """A wait that pyscard refuses needs no thread that ends it: the thread would still exist after the call."""
    assert told(refused, stack=shared_stack) == ["TypeError", 1]


def refused() -> None:
    from pcsc_safe._core import handles
    from pcsc_safe._native import interruptible

    session, started, start = Session(), [], interruptible.start_new_thread
    interruptible.start_new_thread = lambda *arguments: (started.append(arguments), start(*arguments))
    record = handles.contexts[session.context]
    (native,) = record.real.natives
    wait = SimpleNamespace(cancelled=False)
    try:
        interruptible.attempt(native, record, "SCardGetStatusChange", (abs, "not a number"), wait=wait)
    except Exception as error:
        print(json.dumps([type(error).__name__, len(started)]))


def test_where_no_thread_can_be_had(shared_stack: VirtualPcsc) -> None:
    """A wait lasts as long as it should even if no thread can be started."""
    ended, seconds = told(without_a_thread, stack=shared_stack)
    assert ended == TIMED_OUT
    assert A_WHILE / 1000 <= seconds < 5


def without_a_thread() -> None:
    """Simulate it: only root can set such a limit, and another user can't use this pcscd."""
    from pcsc_safe._native import interruptible

    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    session, began = Session(), time.monotonic()
    interruptible.start_new_thread = as_of_c(no_thread)
    print(json.dumps([session.wait(A_WHILE), time.monotonic() - began]))
