"""Handover: the child goes on in the very session, natively and through a broker, and nothing its parent does counts.

The session of these tests has all that can't be had twice: a verified PIN, an open transaction, an exclusive hold.  Most
of them fork a first process from pytest's, a :class:`Session` is opened there, and handed over to a child of that one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from brokers import ENOUGH, Client, Link, Watch, descriptors, held_card, let_go, stack_to_hold, until, watched
from conftest import ECHO, IS_VERIFIED, VERIFY, Session
from forking import fork, in_child, in_program, start, wait_for
from test_detection import c_fork
from test_macos import OnMacos, on_macos
from test_quiesce import Alarm, before_3_10, no_new_process, raise_alarm
from test_threads import HELD, Calling, connect, establish, state_of, stays, wait

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe.errors import ForkedHandleError, HandoverError
from pcsc_safe.testing import VirtualPcsc

__all__ = ["on_macos"]

OK = safe.SCARD_S_SUCCESS
INVALID = safe.SCARD_E_INVALID_HANDLE
RESET = safe.SCARD_W_RESET_CARD
HELD_BY_ANOTHER = safe.SCARD_E_SHARING_VIOLATION
LEAVE = safe.SCARD_LEAVE_CARD
RIGHT = [OK, [1, 2, 3, 0x90, 0x00]]
STILL_OWNER = "the parent is still the owner"

native_only = pytest.param("native", marks=pytest.mark.native)
through_both = pytest.mark.parametrize("through", [native_only, "broker"])


@pytest.fixture(scope="module")
def module_stack() -> Iterator[VirtualPcsc]:
    """Only this module has contexts there."""
    with stack_to_hold() as stack:
        yield stack


@pytest.fixture
def stack(module_stack: VirtualPcsc) -> Iterator[VirtualPcsc]:
    """That stack; when the test is over nobody has a context there, so nothing is held."""
    yield module_stack
    let_go(module_stack)


# What a process does.


def opened(through: str = "native", **settings: Any) -> Session:
    """A session of this process."""
    pcsc_safe.configure(broker="always" if through == "broker" else "on-fork", **settings)
    session = Session(safe.SCARD_SHARE_EXCLUSIVE)
    assert safe.SCardBeginTransaction(session.card) == OK
    return session


def state(session: Session) -> list[Any]:
    """What the session is to this process."""
    return [
        safe.SCardIsValidContext(session.context),
        safe.SCardListReaders(session.context, [])[0],
        session.transmit(IS_VERIFIED),
        session.transmit(ECHO),
        safe.SCardEndTransaction(session.card, LEAVE),
        safe.SCardBeginTransaction(session.card),
    ]


HAS_IT = [OK, OK, [OK, [1, 0x90, 0x00]], RIGHT, OK, OK]


def has(session: Session) -> Any:
    """Whether the session is this process's, all of it; under policy ``raise``."""
    try:
        answers = state(session)
    except ForkedHandleError:
        return False
    return True if answers == HAS_IT else answers


def handing_over(*contexts: Any) -> int:
    """Fork as most programs would."""
    with pcsc_safe.handover(*contexts):
        return fork()


def at_command(link: Link, session: Session) -> Any:
    """A child that says what its session is whenever it is asked, and at last ends it in good order."""
    while link.hear():
        link.say(state(session))
    return [
        safe.SCardEndTransaction(session.card, LEAVE),
        safe.SCardDisconnect(session.card, safe.SCARD_UNPOWER_CARD),
        safe.SCardReleaseContext(session.context),
    ]


def asked(child: Link) -> Any:
    child.say(True)
    return child.hear()


def ended(child: Client) -> Any:
    child.say(False)
    return child.result()


def is_free(reader: str) -> bool:
    """Whether a stranger gets the card."""
    context = establish()
    try:
        hresult, card, _ = safe.SCardConnect(context, reader, safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_T1)
        if hresult == OK:
            safe.SCardDisconnect(card, LEAVE)
        return bool(hresult == OK)
    finally:
        safe.SCardReleaseContext(context)


# 1. Whatever the parent does next.


@pytest.mark.parametrize("how", ["exit", "SIGKILL", "SIGSEGV"])
@through_both
def test_the_parent_ends(stack: VirtualPcsc, through: str, how: str) -> None:
    """The child has it all, after its parent has run atexit functions and finalizers that clean up, or has crashed."""
    done = in_program(hands_over_and_ends, through, how, env=stack.env)
    status = 3 if how == "exit" else -getattr(signal, how)
    assert (done.returncode, json.loads(done.stdout)) == (status, [HAS_IT, RIGHT])
    assert done.stderr == "" or how == "SIGSEGV"


class Finalized:
    """An object as drivers have them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._scard = safe

    def __del__(self) -> None:
        self._scard.SCardEndTransaction(self._session.card, self._scard.SCARD_RESET_CARD)
        self._scard.SCardDisconnect(self._session.card, self._scard.SCARD_UNPOWER_CARD)
        self._scard.SCardReleaseContext(self._session.context)


def hands_over_and_ends(through: str, how: str) -> None:
    session = opened(through)
    parent = Watch(os.getpid())
    atexit.register(session.close)
    if handing_over() == 0:
        assert parent.ends(ENOUGH)
        print(json.dumps([state(session), session.transmit(ECHO)]), flush=True)
        os._exit(0)
    sys.modules["keeps it until the end"] = Finalized(session)  # type: ignore[assignment]
    if how != "exit":
        os.kill(os.getpid(), getattr(signal, how))
    sys.exit(3)


USES = [OK, OK, [RESET, []], [HELD_BY_ANOTHER, 0], OK, OK, OK, OK]
REFUSED = [INVALID, "raised", "raised", "raised", OK, OK, OK, OK]
NOT_VALID = [INVALID, INVALID, [INVALID, []], [INVALID, 0], OK, OK, OK, OK]


@pytest.mark.parametrize(("settings", "answers"), [("auto", USES), ("raise", REFUSED), ("invalid", NOT_VALID)])
@through_both
def test_the_parent_lives_on(stack: VirtualPcsc, through: str, settings: str, answers: list[Any]) -> None:
    """The parent has inherited objects, its policy counts, and no use of them, fork or finalizer reaches the child's."""

    def parent() -> Any:
        session = opened(through, policy=settings)
        with Client(at_command, session, fork=handing_over) as child:
            uses: list[Callable[[], Any]] = [
                lambda: safe.SCardIsValidContext(session.context),
                lambda: safe.SCardListReaders(session.context, [])[0],
                lambda: session.transmit(ECHO),
                lambda: safe.SCardReconnect(session.card, safe.SCARD_SHARE_SHARED, 3, safe.SCARD_RESET_CARD),
                lambda: safe.SCardCancel(session.context),
                lambda: safe.SCardEndTransaction(session.card, safe.SCARD_RESET_CARD),
                lambda: safe.SCardDisconnect(session.card, safe.SCARD_UNPOWER_CARD),
                lambda: safe.SCardReleaseContext(session.context),
            ]
            answered, undisturbed = [], []
            for use in uses:
                in_child(attempt, use)
                answered.append(attempt(use))
                undisturbed.append(asked(child) == HAS_IT)
            session.context = session.card = None
            gc.collect()
            return answered, undisturbed, asked(child), ended(child)

    assert in_child(parent) == (answers, [True] * len(answers), HAS_IT, [OK, OK, OK])


def attempt(use: Callable[[], Any]) -> Any:
    try:
        return use()
    except ForkedHandleError:
        return "raised"


@pytest.mark.parametrize("how", ["dies", "execs", "leaves a child of its own"])
@through_both
def test_the_childs_end_frees_the_card(stack: VirtualPcsc, through: str, how: str) -> None:
    """When the new owner has died, or exec'd, nothing is held any more, although its parent and its child live."""
    reader = stack.readers[0].name

    def parent(link: Link) -> None:
        opened(through)
        if handing_over() == 0:
            if not how.startswith("leaves") or fork():
                link.say(os.getpid())
                if how == "execs":
                    os.execvp("sleep", ["sleep", str(ENOUGH)])
            signal.alarm(ENOUGH)
        signal.pause()

    with Client(parent) as living:
        heir = living.hear()
        with watched(heir) as watch:
            if how != "execs":
                assert not is_free(reader)
                os.kill(heir, signal.SIGKILL)
            until(lambda: is_free(reader), "the card is free")
            assert watch.ends(0) == (how != "execs")
        os.killpg(living.pid, signal.SIGKILL)


# 2. Daemons.


@pytest.mark.parametrize("how", ["by hand", "PCSC_SAFE_OWNER", "python-daemon"])
@through_both
def test_a_daemon(stack: VirtualPcsc, through: str, how: str) -> None:
    """A daemon has the session that its grandparent opened, when both are gone and other descriptors are closed."""
    if how == "python-daemon":
        pytest.importorskip("daemon", reason="python-daemon is not installed (PyPI: python-daemon)")
    env = {**stack.env, "PCSC_SAFE_OWNER": "child"} if how == "PCSC_SAFE_OWNER" else stack.env
    done = in_program(becomes_a_daemon, through, how, env=env)
    assert (done.returncode, done.stderr, json.loads(done.stdout)) == (0, "", [True, HAS_IT])


def becomes_a_daemon(through: str, how: str) -> None:
    session, began_in, grandparent = opened(through), os.getsid(0), os.getpid()
    with contextlib.nullcontext() if how == "PCSC_SAFE_OWNER" else pcsc_safe.handover():
        if how == "python-daemon":
            import daemon  # type: ignore[import-untyped,unused-ignore]

            daemon.DaemonContext(files_preserve=pcsc_safe.files_to_preserve(), stdout=sys.stdout).open()
        else:
            for step in (os.setsid, os.getpid):
                if os.fork():
                    os._exit(0)
                step()
    signal.alarm(ENOUGH)
    until(lambda: has_ended(grandparent) and has_ended(os.getsid(0)), "its ancestors are gone")
    print(json.dumps([os.getsid(0) not in (began_in, os.getpid()), state(session)]), flush=True)
    os._exit(0)


def has_ended(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


# 3. Which fork, which contexts: exactly one process has a session, whatever happens.


def in_an_inner_block() -> int:
    with pcsc_safe.handover(), pcsc_safe.handover():
        return fork()


def in_an_outer_block() -> int:
    with pcsc_safe.handover():
        with pcsc_safe.handover():
            pass
        return fork()


def in_a_block_within_itself() -> int:
    block = pcsc_safe.handover()
    with block:
        with block:
            pass
        return fork()


def in_a_block_used_again() -> int:
    block = pcsc_safe.handover()
    for _ in range(2):
        with block, contextlib.suppress(BlockingIOError), no_new_process():
            os.fork()
    with block:
        return fork()


def in_a_thread() -> int:
    return handing_over()


def after_failed_ones() -> int:
    with pcsc_safe.handover():
        for _ in range(3):
            with contextlib.suppress(BlockingIOError), no_new_process():
                os.fork()
        return fork()


def after_a_block_of_failed_ones() -> int:
    with pcsc_safe.handover():
        for _ in range(3):
            with contextlib.suppress(BlockingIOError), no_new_process():
                os.fork()
    return fork()


def after_a_block_without_one() -> int:
    with pcsc_safe.handover():
        pass
    return fork()


def after_an_exception() -> int:
    with contextlib.suppress(ZeroDivisionError), pcsc_safe.handover():
        raise ZeroDivisionError
    return fork()


def in_a_block_for_another() -> int:
    with pcsc_safe.handover(establish()):
        return fork()


def from_c() -> int:
    with pcsc_safe.handover():
        return c_fork()


TO_THE_CHILD = [
    *(handing_over, in_an_inner_block, in_an_outer_block, in_a_block_within_itself, in_a_block_used_again),
    *(in_a_thread, after_failed_ones),
]
TO_NOBODY = [
    *(after_a_block_of_failed_ones, after_a_block_without_one, after_an_exception, in_a_block_for_another, from_c),
]
NO_HOOKS = (
    "nothing is handed over: the fork in this block ran none of Python's hooks; use os.fork(); the parent is still the "
    "owner"
)


@pytest.mark.parametrize("fork_so", [*TO_THE_CHILD, *TO_NOBODY], ids=lambda fork_so: fork_so.__name__)
@through_both
def test_who_has_it(stack: VirtualPcsc, through: str, fork_so: Callable[[], int]) -> None:
    """After this fork either the child has all of the session or the parent has; a fork from C is an error there."""

    def parent() -> Any:
        session, errors = opened(through, policy="raise"), list[str]()

        def noting_errors() -> int:
            here = os.getpid()
            try:
                return fork_so()
            except HandoverError as error:
                errors.append(str(error))
                return -(os.getpid() == here)

        def forking() -> Any:
            return start(lambda: (has(session), errors), fork=noting_errors)

        child = Calling(forking).answer() if fork_so is in_a_thread else forking()
        return wait_for(child), (has(session), errors)

    to_the_child = fork_so in TO_THE_CHILD
    assert in_child(parent) == ((to_the_child, [NO_HOOKS] if fork_so is from_c else []), (not to_the_child, []))


@through_both
def test_some_contexts_only(stack: VirtualPcsc, through: str) -> None:
    """Of two sessions the child gets the one that was named, and the parent keeps the other."""

    def parent() -> Any:
        given = opened(through, policy="raise")
        kept = Session.__new__(Session)
        kept.context = establish()
        kept.card = connect(kept.context, stack.readers[2].name)
        assert kept.transmit(VERIFY)[0] == safe.SCardBeginTransaction(kept.card) == OK
        child = start(lambda: (has(given), has(kept)), fork=lambda: handing_over(given.context))
        return wait_for(child), (has(given), has(kept))

    assert in_child(parent) == ((True, False), (False, True))


@through_both
def test_what_happens_to_contexts_inside_the_block(stack: VirtualPcsc, through: str) -> None:
    """What is released there is released; what is established there is handed over, where all are; none is no error."""

    def parent() -> Any:
        released, named = opened(through, policy="raise"), establish()
        listing = lambda context: attempt(lambda: safe.SCardListReaders(context, [])[0])  # noqa: E731

        def emptied() -> int:
            with pcsc_safe.handover(named):
                assert safe.SCardReleaseContext(named) == OK
                return fork()

        unnamed = wait_for(start(listing, released.context, fork=emptied))
        with pcsc_safe.handover():
            released.close()
            new = opened(through)
            child = start(lambda: (listing(released.context), has(new)))
        nothing = in_child(lambda: 1, fork=handing_over)
        return unnamed, wait_for(child), (listing(released.context), has(new)), nothing

    assert in_child(parent) == ("raised", (INVALID, True), (INVALID, False), 1)


@through_both
def test_what_cannot_be_handed_over(stack: VirtualPcsc, through: str) -> None:
    """What is no context, released, or another process's is refused by handover() itself."""

    def refused(context: Any) -> str:
        with pytest.raises(HandoverError) as error:
            pcsc_safe.handover(context)
        return str(error.value)

    def parent() -> Any:
        session, released = opened(through), establish()
        safe.SCardReleaseContext(released)
        errors = {refused(what) for what in (session.card, released, None, 12345)}
        errors.add(in_child(refused, session.context))
        return errors, state(session)

    assert in_child(parent) == (
        {
            "this is not a context that this process has; pass what SCardEstablishContext gave, or nothing to hand all "
            "of them over"
        },
        HAS_IT,
    )


# 4. Threads.


@through_both
def test_a_call_in_flight(stack: VirtualPcsc, through: str) -> None:
    """The fork is after a call of another thread that is in the native library; it is answered, the child has it all."""
    card = held_card(stack)

    def parent(link: Link) -> Any:
        session = opened(through, policy="raise", quiesce_timeout=ENOUGH)
        exchange = Calling(session.transmit, HELD)
        link.hear()
        forking = Calling(lambda: start(has, session, fork=handing_over))
        waits = through == "broker" or stays(forking.is_alive)
        link.say(waits)
        return exchange.answer(), wait_for(forking.answer()), has(session)

    with Client(parent) as client:
        assert card.reached.wait(ENOUGH)
        client.say("in flight")
        assert client.hear()
        card.go.set()
        assert client.result() == ([OK, [7, 8, 9, 0x90, 0x00]], True, False)


@pytest.mark.native
def test_a_call_that_lasts(stack: VirtualPcsc) -> None:
    """With a call in flight for too long entering the block is an error, and an unquiet fork hands nothing over."""
    card = held_card(stack)

    def parent(link: Link) -> Any:
        session, other = opened(policy="raise", quiesce_timeout=0.1), establish()
        exchange = Calling(session.transmit, HELD)
        link.hear()
        began = time.monotonic()
        with pytest.raises(HandoverError) as error:
            handing_over()
        in_time = 0.1 <= time.monotonic() - began < 5
        others = Calling(safe.SCardListReaders, other, []).answer()[0]
        pcsc_safe.configure(owner="child")
        child = in_child(has, session)
        link.say(None)
        return str(error.value), in_time, others, child, exchange.answer()[0], has(session), in_child(has, session)

    why = (
        "nothing is handed over: calls of other threads are inside PC/SC; end them first, or configure a longer "
        "quiesce_timeout"
    )
    with Client(parent) as client:
        assert card.reached.wait(ENOUGH)
        client.say("in flight")
        client.hear()
        card.go.set()
        assert client.result() == (why, True, OK, False, OK, True, True)


@pytest.mark.parametrize("patience", [0.05, ENOUGH])
@through_both
def test_a_fork_by_another_thread(stack: VirtualPcsc, through: str, patience: float) -> None:
    """While one thread is in its block the child that another one forks gets nothing; the block's gets all."""

    def parent() -> Any:
        session = opened(through, policy="raise", quiesce_timeout=patience)
        with pcsc_safe.handover():
            other = Calling(start, has, session)
            waits = stays(other.is_alive)
            if patience < 1:
                other.join(ENOUGH)
            child = start(has, session)
        return waits, wait_for(child), wait_for(other.answer()), has(session)

    assert in_child(parent) == (True, True, False, False)


@through_both
def test_threads_go_on(stack: VirtualPcsc, through: str) -> None:
    """A thread that waits for events and one that calls, on the very context, notice nothing of 20 handovers of it."""
    reader = stack.readers[2].name

    def owns(context: Any) -> Any:
        pcsc_safe.configure(policy="raise")
        return safe.SCardListReaders(context, [])[0]

    def parent() -> Any:
        pcsc_safe.configure(broker="always" if through == "broker" else "on-fork", quiesce_timeout=ENOUGH)
        context, stop, answers = establish(), threading.Event(), set()
        waiter = Calling(safe.SCardGetStatusChange, context, safe.INFINITE, [(reader, state_of(context, reader))])

        def call() -> None:
            while not stop.is_set():
                answers.add(safe.SCardListReaders(context, [])[0])

        caller = Calling(call)
        children = [in_child(owns, context, fork=handing_over) for _ in range(20)]
        stop.set()
        caller.answer()
        until(lambda: stays(lambda: waiter.waits), "the wait goes on")
        return children, answers, safe.SCardCancel(context), waiter.answer()[0]

    assert in_child(parent) == ([OK] * 20, {OK}, OK, safe.SCARD_E_CANCELLED)


@pytest.mark.native
def test_a_cancel_that_comes_too_late(stack: VirtualPcsc) -> None:
    """An SCardCancel that waits for the fork is none of the child's waits, though it was called when they were ours."""
    reader = stack.readers[2].name

    def child(link: Link, context: Any) -> Any:
        waiter = wait(context, reader)
        link.say("waits")
        link.hear()
        goes_on = stays(waiter.is_alive)
        return goes_on, safe.SCardCancel(context), waiter.answer()[0]

    def parent() -> Any:
        ends = []
        for _ in range(5):
            context, other = establish(), establish()
            with pcsc_safe.handover(context):
                cancelling = Calling(safe.SCardCancel, context)
                assert stays(cancelling.is_alive)
                heir = Client(child, context)
            with heir:
                with pcsc_safe.handover(other):
                    heir.hear()
                cancelled = cancelling.answer()
                heir.say("cancelled")
                ends.append((cancelled, heir.result()))
        return ends

    assert in_child(parent) == [(OK, (True, OK, safe.SCARD_E_CANCELLED))] * 5


# 5. Signals.


@before_3_10
@pytest.mark.parametrize(
    ("through", "moments"), [pytest.param("native", 200, marks=pytest.mark.native), ("broker", 100)]
)
def test_a_signal_at_any_moment(stack: VirtualPcsc, through: str, moments: int) -> None:
    """Handlers that raise before, in and after the fork: one process has all, never two or none; nobody is locked out."""
    done = in_program(swept, through, str(moments), env=stack.env)
    wrong, given, alarms = json.loads(done.stdout)
    assert (done.returncode, wrong) == (0, [])
    assert given > moments / 10
    assert alarms > moments / 20


def swept(through: str, moments: str) -> None:
    """Fork in a block with an alarm set, a little later each time."""
    sys.unraisablehook = lambda unraisable: None
    heap = bytearray(b"x") * (32 << 20)  # a fork that copies more tables takes longer, and is hit more often
    session, other, here = opened(through, policy="raise"), establish(), os.getpid()
    ready, go = threading.Semaphore(0), threading.Semaphore(0)

    def call() -> None:
        while go.acquire():
            safe.SCardListReaders(other, [])
            ready.release()

    threading.Thread(target=call, daemon=True).start()
    signal.signal(signal.SIGALRM, raise_alarm)
    others, longest = threading.active_count(), 0.0
    wrong, given, alarms = [], 0, 0
    for number in range(-1, int(moments)):
        read_end, write_end = os.pipe()
        began = time.monotonic()
        try:
            if number >= 0:
                signal.setitimer(signal.ITIMER_REAL, longest * (number + 1) / int(moments))
            with contextlib.suppress(HandoverError), pcsc_safe.handover(session.context):
                os.fork()
            if os.getpid() == here:
                longest = longest or 1.2 * (time.monotonic() - began)
                time.sleep(2 * longest)
        except Alarm:
            alarms += 1
        if os.getpid() != here:
            try:
                os.write(write_end, str(has(session)).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        with open(read_end) as report:
            child = report.read()
        with contextlib.suppress(ChildProcessError):
            os.wait()
        parent = str(has(session))
        go.release()
        if (child, parent) not in (("True", "False"), ("False", "True"), ("", "True")) or not ready.acquire(timeout=5):
            wrong.append([number, child, parent])
            break
        if parent == "False":
            given += 1
            safe.SCardReleaseContext(session.context)
            session = opened(through)
    del heap
    print(json.dumps([wrong, given, alarms]), flush=True)
    os._exit(0)


# 6. Many.


@through_both
def test_generations(stack: VirtualPcsc, through: str) -> None:
    """A session goes through 20 generations, some of which never use it, and no descriptor is left over on the way."""

    def generation(session: Session, left: int) -> list[Any]:
        used = state(session) == HAS_IT if left % 2 == 0 else None
        sockets = sum(what.startswith("socket:") for what in descriptors(os.getpid()).values())
        if not left:
            return [(used, sockets)]
        child = start(generation, session, left - 1, fork=fork if left % 3 == 0 else handing_over)
        return [(used, sockets), *wait_for(child)]

    def parent() -> Any:
        return generation(opened(through, owner="child"), 20)

    found = in_child(parent)
    assert [used for used, _ in found] == [True, None] * 10 + [True]
    assert {sockets for _, sockets in found[1:]} == {found[1][1]}


@through_both
def test_again_and_again(stack: VirtualPcsc, through: str) -> None:
    """100 handovers of one proxy, which the parent goes on using: no descriptor, and no client of pcscd's, is left."""

    def parent() -> Any:
        pcsc_safe.configure(broker="always" if through == "broker" else "on-fork")
        context, counted = establish(), set()
        for number in range(100):
            assert in_child(safe.SCardListReaders, context, [], fork=handing_over)[0] == OK
            assert safe.SCardListReaders(context, [])[0] == OK
            if number > 1:
                stack.wait_for_clients(1)
                counted.add(len(descriptors(os.getpid())))
        return len(counted), state_of(context, stack.readers[0].name) > 0

    assert in_child(parent) == (1, True)


# 7. macOS.


@pytest.mark.native
@pytest.mark.parametrize("how", ["native", "native, inside the block", "broker"])
def test_on_macos(stack: VirtualPcsc, on_macos: OnMacos, how: str) -> None:
    """There a session in a broker is handed over; one that isn't is refused before the fork, with the remedy."""
    done = in_program(hands_over_on_macos, how, env=on_macos(stack))
    refused = [
        "nothing is handed over: a forked process can't use PC/SC on this platform; set broker='always' before it is "
        "established",
        [True],
    ]
    assert (done.returncode, json.loads(done.stdout)) == (0, ["", [True, False]] if how == "broker" else refused)


def hands_over_on_macos(how: str) -> None:
    session = None if how.endswith("block") else opened(how, policy="raise")
    error, owners = "", list[Any]()
    try:
        with pcsc_safe.handover():
            session = session or opened(policy="raise")
            owners.append(in_child(has, session))
    except HandoverError as refused:
        error = str(refused)
    print(json.dumps([error, [*owners, has(session)]]), flush=True)
