"""What can prevent a handover: other threads' calls and forks, signals, a lack of descriptors, a dead broker.

Afterwards exactly one process has the session.  If anything failed before the fork, the parent has it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from brokers import ENOUGH, Client, Link, broker, held_card, module_stack, stack, until, watched
from calling import HELD, Calling, establish, state_of, stays
from conftest import IS_VERIFIED, Session
from forking import fork, in_child, in_program, start, wait_for
from handovers import BROKER, NATIVE, NOTHING, OK, attempt, handing_over, has, is_free, opened, through_both
from interrupts import Alarm, RaisesInside, before_3_10, no_new_thread, raise_alarm

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import gate, handles, process, transfer
from pcsc_safe._core.calls import KEEP_FILES, LOST_REASON
from pcsc_safe.broker.client import InheritedConnection
from pcsc_safe.errors import HandoverError
from pcsc_safe.testing import VirtualPcsc

__all__ = ["module_stack", "stack"]


# 1. Threads.


@through_both
def test_a_call_in_flight(stack: VirtualPcsc, through: str) -> None:
    """A native call of another thread returns before the fork, and the handover succeeds."""

    def parent(link: Link) -> Any:
        session = opened(through, policy="raise", quiesce_timeout=ENOUGH)
        exchange = Calling(session.transmit, HELD)
        link.hear()
        forking = Calling(lambda: start(has, session, fork=handing_over))
        link.say(through == "broker" or stays(forking.is_alive))
        return exchange.answer(), wait_for(forking.answer()), has(session)

    with Client(parent) as client:
        assert held_card(stack).reached.wait(ENOUGH)
        client.say("it is in flight")
        assert client.hear()
        held_card(stack).go.set()
        assert client.result() == ([OK, [7, 8, 9, 0x90, 0x00]], True, False)


@pytest.mark.native
@pytest.mark.not_on_macos("a forked process has no native contexts")
def test_a_call_that_lasts(stack: VirtualPcsc) -> None:
    """A call that lasts too long makes the block raise. A fork beside it hands nothing over. Later ones do."""

    def parent(link: Link) -> Any:
        session, other = opened(policy="raise", quiesce_timeout=0.1), establish()
        exchange = Calling(session.transmit, HELD)
        link.hear()
        with pytest.raises(HandoverError) as error:
            handing_over()
        answers = [Calling(safe.SCardListReaders, other, []).answer()[0]]
        pcsc_safe.configure(owner="child")
        answers.append(in_child(has, session))
        link.say("let it go")
        return str(error.value), [*answers, exchange.answer()[0], has(session), in_child(has, session), has(session)]

    with Client(parent) as client:
        assert held_card(stack).reached.wait(ENOUGH)
        client.say("it is in flight")
        client.hear()
        held_card(stack).go.set()
        why = f"{NOTHING}other threads are inside PC/SC calls; end these calls first, or configure a longer "
        why += "quiesce_timeout"
        assert client.result() == (why, [OK, False, OK, True, True, False])


@through_both
def test_a_fork_by_another_thread(stack: VirtualPcsc, through: str) -> None:
    """Another thread's fork doesn't wait for the block, and gets nothing. The block's own child gets the session."""

    def parent() -> Any:
        session = opened(through, policy="raise", quiesce_timeout=ENOUGH)
        began = time.monotonic()
        with pcsc_safe.handover():
            other = Calling(start, has, session).answer()
            child = start(has, session)
        waited = time.monotonic() - began > ENOUGH / 2
        return waited, wait_for(child), wait_for(other), has(session)

    assert in_child(parent) == (False, True, False, False)


@through_both
def test_threads_go_on(stack: VirtualPcsc, through: str) -> None:
    """20 handovers of a context affect neither a thread that waits for events on it nor one that makes calls."""
    reader = stack.readers[2].name

    def child(context: Any) -> Any:
        pcsc_safe.configure(policy="raise")
        return safe.SCardListReaders(context, [])[0]

    def parent() -> Any:
        pcsc_safe.configure(broker=BROKER[through], quiesce_timeout=ENOUGH)
        context, stop, answers, children = establish(), threading.Event(), set(), set()
        waiter = Calling(safe.SCardGetStatusChange, context, safe.INFINITE, [(reader, state_of(context, reader))])

        def call() -> None:
            while not stop.is_set():
                answers.add(safe.SCardListReaders(context, [])[0])

        caller = Calling(call)
        for _ in range(20):
            answers.add(safe.SCardListReaders(context, [])[0])
            children.add(in_child(child, context, fork=handing_over))
        stop.set()
        caller.answer()
        until(lambda: not waiter.is_alive() or stays(lambda: waiter.waits), "the wait goes on")
        return children, answers, safe.SCardCancel(context), waiter.answer()[0]

    assert in_child(parent) == ({OK}, {OK}, OK, safe.SCARD_E_CANCELLED)


# 2. Signals.


@before_3_10
@through_both
def test_a_signal_at_any_moment(stack: VirtualPcsc, through: str) -> None:
    """Handlers raise at 150 moments of a handover: one process has the session, and no thread is locked out."""
    done = in_program(swept, through, "150", env=stack.env)
    assert done.returncode == 0, done.stderr
    wrong, given, alarms = json.loads(done.stdout)
    assert (wrong, given > 15, alarms > 15) == ([], True, True)


def how_many_threads() -> int:
    """Return the number of threads, including those just started, which _thread._count() doesn't count yet."""
    return len(os.listdir("/proc/self/task"))


def swept(through: str, moments: str) -> None:
    """Fork in a block with an alarm set, each time a little later."""
    sys.unraisablehook = lambda unraisable: None
    heap = bytearray(b"x") * (32 << 20)  # a fork that copies more page tables takes longer, so alarms hit it more often
    session, other, here = opened(through, policy="raise"), establish(), os.getpid()
    ready, go = threading.Semaphore(0), threading.Semaphore(0)

    def call() -> None:
        while go.acquire():
            safe.SCardListReaders(other, [])
            ready.release()

    threading.Thread(target=call, daemon=True).start()
    signal.signal(signal.SIGALRM, raise_alarm)
    longest, wrong, given, alarms, threads = 0.0, list[Any](), 0, 0, how_many_threads()
    undisturbed: list[float] = []
    for number in range(-5, int(moments)):
        read_end, write_end = os.pipe()
        began = time.monotonic()
        try:
            if number >= 0:
                signal.setitimer(signal.ITIMER_REAL, longest * (number + 1) / int(moments))
            with contextlib.suppress(HandoverError), pcsc_safe.handover(session.context):
                os.fork()
            if os.getpid() == here:
                if number < 0:
                    undisturbed.append(time.monotonic() - began)
                    longest = 1.2 * sorted(undisturbed)[len(undisturbed) // 2]
                time.sleep(2 * longest)
                until(lambda: how_many_threads() == threads, "what was raised in a hook has come")  # by a thread
                time.sleep(0.001)
        except Alarm:
            alarms += 1
        if os.getpid() != here:
            try:
                os.write(write_end, str(has(session)).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        with open(read_end) as report:
            child, parent = report.read(), str(has(session))
        go.release()
        if (child, parent) not in (("True", "False"), ("False", "True"), ("", "True")) or not ready.acquire(timeout=5):
            wrong.append([number, child, parent])
            break
        if parent == "False":
            given += 1
            until(lambda: is_free(session.reader), "the child is gone")  # noqa: B023  # called immediately
            session = opened(through)
    del heap
    print(json.dumps([wrong, given, alarms]), flush=True)
    os._exit(0)


@before_3_10
@pytest.mark.parametrize("when", ["get", "pop"])
def test_a_signal_at_the_end_of_a_block(stack: VirtualPcsc, when: str) -> None:
    """A handler that raises while a block ends opens the gate all the same: other threads' calls go on."""

    class Interrupted(dict[int, Any]):
        def get(self, *arguments: Any) -> Any:
            interrupt("get")
            return super().get(*arguments)

        def pop(self, *arguments: Any) -> Any:
            interrupt("pop")
            return super().pop(*arguments)

    def interrupt(now: str) -> None:
        if now in moments:
            moments.remove(now)
            os.kill(os.getpid(), signal.SIGUSR1)

    def parent() -> Any:
        signal.signal(signal.SIGUSR1, raise_alarm)
        context = establish()
        transfer.blocks = Interrupted()
        with contextlib.suppress(Alarm), pcsc_safe.handover():
            moments.append(when)
        return moments, dict(transfer.blocks), Calling(safe.SCardListReaders, context, []).answer()[0]

    moments: list[str] = []
    assert in_child(parent) == ([], {}, OK)


def test_a_block_that_another_thread_ends(stack: VirtualPcsc) -> None:
    """A block that ends in another thread than it began in, as a generator's can, opens the gate."""

    def parent() -> Any:
        context, block = establish(), pcsc_safe.handover()
        block.__enter__()
        Calling(block.__exit__, None, None, None).answer()
        return Calling(safe.SCardListReaders, context, []).answer()[0]

    assert in_child(parent) == OK


def test_a_signal_that_raises_a_system_error(stack: VirtualPcsc) -> None:
    """An OSError of a handler that runs in the parent's hook is raised after the fork, and prevents the handover."""

    def time_out(*_: Any) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "the application's")

    def parent() -> Any:
        def interrupted(plan: Any) -> None:
            transfer._choose = choose
            os.kill(os.getpid(), signal.SIGUSR1)
            choose(plan)

        def fork_and_wait() -> None:
            os.waitpid(fork() or os._exit(0), 0)
            until(lambda: False, "the exception has come")

        session = opened(owner="child", policy="raise")
        signal.signal(signal.SIGUSR1, time_out)
        choose, transfer._choose = transfer._choose, interrupted
        with pytest.raises(TimeoutError, match="the application's"):
            fork_and_wait()
        return has(session)

    assert in_child(parent)


@through_both
def test_a_signal_when_no_thread_can_be_started(stack: VirtualPcsc, through: str) -> None:
    """An exception in the parent's first hook that can't be raised later is printed, and the child has the session."""

    def parent() -> Any:
        unraisable: list[Any] = []
        sys.unraisablehook = lambda each: unraisable.append(type(each.exc_value.__context__))
        session = opened(through, policy="raise")
        process.before_fork(process.QUIESCE, raise_alarm)
        with no_new_thread():
            child = start(has, session, fork=handing_over)
        return wait_for(child), has(session), unraisable

    assert in_child(parent) == (True, False, [Alarm])


@pytest.mark.parametrize(
    ("through", "where"),
    [
        pytest.param("native", process._hook_in_child, marks=NATIVE.marks),
        pytest.param("native", process._begin, marks=NATIVE.marks),
        ("broker", process._hook_in_child),
        ("broker", process._begin),
    ],
)
def test_a_signal_in_the_child(stack: VirtualPcsc, through: str, where: Any) -> None:
    """The child has the session, and its parent has not, whichever line of its hook or first call a handler raises in.

    A descriptor that the child replaces has a few lines of its own; how many there are differs each time.
    """
    skipped = ("replace_guarded", "replace_with_dead", "is_intact", "_identity", "<listcomp>")

    def child(raises: RaisesInside, session: Any) -> Any:
        with contextlib.suppress(Alarm):
            process.current()
        return raises.left, has(session)

    def parent() -> Any:
        sys.unraisablehook = lambda unraisable: None
        wrong, line, left = list[Any](), 0, -1
        while left < 0:
            session, raises = opened(through, policy="raise"), RaisesInside(where, line, skipped)
            sys.settrace(raises)
            started = start(child, raises, session, fork=handing_over)
            sys.settrace(None)
            left, given = wait_for(started)
            if (given, has(session)) != (True, False):
                wrong.append(line)
            line += 3  # it takes long enough
            until(lambda: is_free(session.reader), "the child is gone")  # noqa: B023  # called immediately
            safe.SCardReleaseContext(session.context)
        return wrong, line > 20

    assert in_child(parent) == ([], True)


# 3. Other faults.


@pytest.mark.parametrize("when", ["after the fork", "while it waits"])
def test_a_fork_that_fails(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Another thread's call through a broker, made while the broker keeps the session for the child, succeeds."""
    waits_for_it, wait, settle = threading.Event(), transfer.wait_while_given, InheritedConnection.settle

    def waits(context: Any) -> None:
        waits_for_it.set()
        if when == "after the fork":
            until(lambda: not handles.given, "it has failed")
        wait(context)

    def settles(connection: InheritedConnection, has_child: bool) -> None:
        assert handles.given  # as long as calls fail
        settle(connection, has_child)

    def parent() -> Any:
        session = opened("broker", owner="child")
        monkeypatch.setattr(transfer, "wait_while_given", waits)
        monkeypatch.setattr(InheritedConnection, "settle", settles)
        transfer._plan_before_fork()
        calling = Calling(session.transmit, IS_VERIFIED)
        assert waits_for_it.wait(ENOUGH)
        transfer._settle_in_parent()
        return calling.answer()

    assert in_child(parent) == [OK, [1, 0x90, 0x00]]


def lists(session: Session) -> Any:
    return attempt(lambda: safe.SCardListReaders(session.context, [])[0])


def cancels(session: Session) -> Any:
    return attempt(lambda: safe.SCardCancel(session.context))


def releases(session: Session) -> Any:
    return attempt(lambda: safe.SCardReleaseContext(session.context))


def transmits(session: Session) -> Any:
    return attempt(lambda: session.transmit(IS_VERIFIED))


def joins(session: Session) -> Any:
    """Wait for another thread that uses the context."""
    return Calling(lists, session).answer()


@pytest.mark.parametrize("use", [lists, cancels, releases, transmits, joins])
@through_both
def test_a_handler_just_after_the_fork(stack: VirtualPcsc, through: str, use: Any) -> None:
    """What a signal handler in the parent uses is the child's already. The handler waits for nothing."""

    def parent() -> Any:
        used: list[Any] = []

        def disturbed(plan: Any) -> bool:
            if not used:
                used.append(None)
                used[0] = use(session)
            return has_started(plan)

        session = opened(through, policy="raise")
        has_started, transfer._child_has_started = transfer._child_has_started, disturbed
        return wait_for(start(has, session, fork=handing_over)), used

    assert in_child(parent) == (True, [OK if use in (cancels, releases) else "raised"])


@pytest.mark.parametrize("after", ["_reserve", "_complete"])
@through_both
def test_a_handler_forks_just_before_the_fork(stack: VirtualPcsc, through: str, after: str) -> None:
    """The first child gets the session, the other one and the parent don't, and no thread waits for it."""
    # Not here: once concurrent.futures has been imported after pcsc_safe, no fork can begin in another one's hooks.
    done = in_program(forks_twice, through, after, env=stack.env)
    assert (done.stdout.split(), done.returncode) == (["True", "False", "False"], 0), done.stderr


def forks_twice(through: str, after: str) -> None:
    def disturbed(*arguments: Any) -> Any:
        result = function(*arguments)
        if not inner:
            inner.append((0, 0))
            inner[0] = start(has, session, fork=fork)
        return result

    function, inner, session = getattr(transfer, after), list[Any](), opened(through, policy="raise")

    def forking() -> int:
        with contextlib.suppress(HandoverError), pcsc_safe.handover():
            setattr(transfer, after, disturbed)
            pid = fork()
        return pid

    outer = in_child(lambda: has(session), fork=forking)
    print(wait_for(inner[0]), outer, has(session))
    until(lambda: is_free(session.reader), "nobody has it when the child is gone")


@pytest.mark.native
@pytest.mark.not_on_macos("a forked process has no native contexts")
def test_a_handler_that_raises_when_another_thread_has_a_new_context(
    pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent settles again, and doesn't give up what the thread has established since."""
    context, notes, raised = establish(), list[int](), list[Any]()

    def interrupted(*_: Any, **__: Any) -> None:
        if not notes:
            notes.append(Calling(safe.SCardListReaders, context, []).answer()[0])
            raise Alarm

    monkeypatch.setattr(transfer.observer, "record", interrupted)
    monkeypatch.setattr(gate, "raise_later", lambda _, error: raised.append(type(error)))
    assert in_child(int, fork=lambda: handing_over(context)) == 0
    assert (notes, raised, handles.contexts[context].owner) == ([OK], [Alarm], process.current())
    assert safe.SCardReleaseContext(context) == OK
    pcsc_stack.wait_for_clients(0)


@pytest.mark.native
@pytest.mark.not_on_macos("a forked process has no native contexts")
def test_a_hook_that_was_registered_earlier(pcsc_stack: VirtualPcsc) -> None:
    """A hook of the application that runs in the parent before ours doesn't use a session that the child has."""
    program = """if True:
        import os, signal
        hooks = []
        signal.alarm(30)
        os.register_at_fork(after_in_child=lambda: signal.alarm(30), after_in_parent=lambda: [hook() for hook in hooks])
        import pcsc_safe
        from pcsc_safe import scard as safe
        context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1]
        reader = safe.SCardListReaders(context, [])[1][0]
        card = safe.SCardConnect(context, reader, safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_ANY)[1]
        with pcsc_safe.handover(context):
            hooks.append(lambda: os.write(1, b"%d " % safe.SCardStatus(card)[0]))
            pid = os.fork()
        if pid == 0:
            os.write(1, b"%d " % safe.SCardStatus(card)[0])
            os._exit(0)
        os.waitpid(pid, 0)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert sorted(map(int, done.stdout.split())) == sorted([OK, safe.SCARD_W_RESET_CARD])


@pytest.mark.parametrize("after", ["_reserve", "_complete"])
@through_both
def test_a_handler_just_before_the_fork(
    stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch, through: str, after: str
) -> None:
    """If a signal handler uses a context that is about to be handed over, the parent keeps it, and learns why."""

    def parent() -> Any:
        def disturbed(*arguments: Any) -> Any:
            result = function(*arguments)
            used.append(transmits(session))
            return result

        function, used, session, errors = getattr(transfer, after), list[Any](), opened(through, policy="raise"), []

        def forking() -> int:
            try:
                with pcsc_safe.handover():
                    monkeypatch.setattr(transfer, after, disturbed)
                    pid = fork()
                    monkeypatch.undo()
            except HandoverError as error:
                errors.append(str(error))
            return pid

        child = in_child(has, session, fork=forking)
        return child, used, errors, has(session), in_child(has, session, fork=handing_over)

    why = [f"{NOTHING}a signal handler or an at-fork hook of the application has used it"]
    child, used, errors, here, next_one = in_child(parent)
    assert (child, used, here, next_one) == (False, [[OK, [1, 0x90, 0x00]]], True, True)
    assert [error.split(";")[0] for error in errors] == why


@pytest.mark.parametrize("now", ["closed", "another file"])
@through_both
def test_a_hook_that_closes_descriptors(stack: VirtualPcsc, through: str, now: str) -> None:
    """The child has the session even if a hook in the parent closes the descriptor over which the child confirms."""

    def parent() -> Any:
        def disturbed(plan: Any) -> bool:
            number = plan.start_signal[0].fileno()
            os.close(number) if now == "closed" else os.dup2(other, number)
            return has_started(plan)

        session, other = opened(through, policy="raise"), os.open(os.devnull, os.O_RDONLY)
        has_started, transfer._child_has_started = transfer._child_has_started, disturbed
        return wait_for(start(has, session, fork=handing_over)), has(session)

    assert in_child(parent) == (True, False)


@through_both
def test_a_default_timeout(stack: VirtualPcsc, through: str) -> None:
    """The timeout of socket.setdefaulttimeout() ends no handover, even if the child confirms after it."""

    def parent() -> Any:
        raised, (read_end, write_end), receive = list[Any](), os.pipe(), transfer._receive

        def receives_late(plan: Any) -> None:
            select.select([read_end], [], [], 1)
            receive(plan)

        def forking() -> int:
            pid = handing_over()
            os.write(write_end, b"the parent has settled")
            return pid

        transfer._receive, gate.raise_later = receives_late, lambda *each: raised.append(each)
        session = opened(through, policy="raise")
        socket.setdefaulttimeout(0.001)
        return wait_for(start(has, session, fork=forking)), has(session), raised

    assert in_child(parent) == (True, False, [])


@pytest.mark.parametrize("fault", ["no descriptor", "no broker"])
@through_both
def test_nothing_can_be_given(stack: VirtualPcsc, through: str, fault: str) -> None:
    """Without a free descriptor or a living broker, parent and child both learn that nothing was handed over."""
    if (through, fault) == ("native", "no broker"):
        pytest.skip("a native handover needs no broker")

    def parent() -> Any:
        session, errors = opened(through, policy="raise"), list[str]()

        def forking() -> int:
            limits, lowest = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
            os.close(lowest)
            try:
                with pcsc_safe.handover():
                    if fault == "no broker":
                        os.kill(broker(), signal.SIGKILL)
                    else:
                        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
                    pid = fork()
            except HandoverError as error:
                errors.append(str(error))
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            return pid

        if fault == "no broker":
            return in_child(lambda: errors, fork=forking), errors
        child = in_child(lambda: (errors, has(session)), fork=forking)
        return child, (errors, has(session)), in_child(has, session, fork=handing_over)

    died = [f"{NOTHING}{LOST_REASON}; establish a new context; {KEEP_FILES}"]
    if fault == "no broker":
        assert in_child(parent) == (died, died)
    else:
        (told, child), (told_too, here), next_one = in_child(parent)
        assert (told, "Too many open files" in told[0], child, here, next_one) == (told_too, True, False, True, True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the root")
@through_both
def test_a_child_without_proc(stack: VirtualPcsc, tmp_path: Path, through: str) -> None:
    """A child that changes its root before its first call still gets the session."""

    def jailing() -> int:
        with pcsc_safe.handover():
            pid = fork()
            if pid == 0:
                os.chroot(tmp_path)
                os.chdir("/")
        return pid

    def parent() -> Any:
        session = opened(through, policy="raise")
        return in_child(has, session, fork=jailing), has(session)

    assert in_child(parent) == (True, False)


def test_the_broker_of_the_family_has_ended(stack: VirtualPcsc) -> None:
    """A child of a family whose broker has ended can enter and leave a block, and then uses a broker of its own."""

    def child(session: Session, pid: int) -> Any:
        with watched(pid) as watch:
            os.kill(pid, signal.SIGKILL)
            assert watch.ends(ENOUGH)
        with pcsc_safe.handover():
            pass
        return safe.SCardListReaders(session.context, [])[0]

    def parent() -> Any:
        pcsc_safe.configure(broker="always")
        session = Session()
        return in_child(child, session, broker())

    assert in_child(parent) == OK
