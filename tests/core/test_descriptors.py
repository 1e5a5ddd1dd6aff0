"""A child replaces its inherited connections to pcscd by dead sockets, and touches no other descriptor."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from brokers import until
from conftest import ECHO, Session
from forking import fork, in_child, in_program, start, wait_for
from handovers import is_free
from interrupts import Alarm, RaisesInside, before_3_10, raise_alarm
from own_descriptors import descriptors, is_dead

from pcsc_safe import scard as safe
from pcsc_safe._core import connections, handles, process
from pcsc_safe._core import descriptors as core
from pcsc_safe._core.descriptors import Descriptor
from pcsc_safe._core.one_step import Operation
from pcsc_safe.testing import EchoCard, VirtualPcsc

OK = safe.SCARD_S_SUCCESS


def connection_of(context: Any) -> Descriptor:
    """Return the recorded connection of a context that has one native context."""
    (descriptor,) = context._self_record.real.descriptors()
    assert isinstance(descriptor, Descriptor)
    return descriptor


def establish() -> Any:
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    assert hresult == OK
    return context


def test_a_look_closes_nothing(session: Session) -> None:
    """A signal handler that raises during a check of a connection doesn't close it, or its number would be reused."""
    number = connection_of(session.context).number
    with pytest.raises(Alarm):
        connections._call_on_socket(number, raise_alarm)
    gc.collect()
    assert session.transmit(ECHO)[0] == OK


def looks() -> None:
    """Program: alarms while it looks at its descriptors; print how many came and how many descriptors are left."""
    signal.signal(signal.SIGALRM, raise_alarm)
    before, alarms = len(os.listdir("/proc/self/fd")), 0
    for number in range(1000):
        with contextlib.suppress(Alarm):
            try:
                alarms += 1
                signal.setitimer(signal.ITIMER_REAL, 0.000003 + number % 50 * 0.000001)
                connections.open_numbers(), connections.open_numbers()
                alarms -= 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps([alarms > 10, len(os.listdir("/proc/self/fd")) - before]))


@before_3_10
def test_a_look_leaves_nothing_open() -> None:
    """A signal handler that raises while all descriptors are listed leaves none open."""
    done = in_program(looks)
    assert (done.stdout, done.returncode) == ("[true, 0]\n", 0), done.stderr


def test_the_connection_is_found(session: Session) -> None:
    """The connection recorded for a context is its connection to pcscd, among all that the process has open."""
    crowd = [socket.socketpair() for _ in range(20)]
    context = establish()
    found = connection_of(context)
    assert found.is_intact()
    with socket.socket(fileno=os.dup(found.number)) as connection:
        assert connection.getpeername().endswith(".comm")
    assert found.number not in {end.fileno() for pair in crowd for end in pair}
    assert connection_of(session.context) != found
    safe.SCardReleaseContext(context)
    assert not found.is_intact()
    for pair in crowd:
        for end in pair:
            end.close()


def test_one_that_was_opened_later_is_not_taken_for_it(session: Session, tmp_path: Path) -> None:
    """A connection opened later is not taken for the context's, even if it has the number that a search has listed."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "pcscd.comm"))
        door.listen()
        low, ours, theirs = os.open(os.devnull, os.O_RDONLY), *(socket.socket(socket.AF_UNIX) for _ in range(2))
        ours_at, later = os.dup(low), connections.ConnectionFinder()
        traces = connections.ConnectionFinder()
        before, after = traces.operations(True)
        run(before)
        os.dup2(ours.fileno(), ours_at)  # another thread closes a file, and libpcsclite gets its number
        ours.connect(door.getsockname())
        run(after)
        run(later.operations(False)[0])
        theirs.connect(door.getsockname())
        os.dup2(theirs.fileno(), traces._next[0])
        assert [is_likely for is_likely, _ in connections.unguarded_sockets({str(traces._next[0])})] == [True]
        assert traces.connection() is None
        for number in (low, ours_at, traces._next[0]):
            os.close(number)
        ours.close()
        theirs.close()


def run(operations: Sequence[Operation]) -> None:
    for function, *arguments in operations:
        function(*arguments)


def test_the_right_one_is_found_among_busy_threads(shared_stack: VirtualPcsc) -> None:
    """Threads that establish, cancel and open other Unix sockets don't mislead the search."""
    stop = threading.Event()

    def noise() -> None:
        other = establish()
        while not stop.is_set():
            safe.SCardCancel(other)
            for end in socket.socketpair():
                end.close()
            safe.SCardReleaseContext(establish())
        safe.SCardReleaseContext(other)

    threads = [threading.Thread(target=noise) for _ in range(3)]
    for thread in threads:
        thread.start()
    contexts = [establish() for _ in range(50)]
    stop.set()
    for thread in threads:
        thread.join()
    found = [connection_of(context) for context in contexts]
    assert len(set(found)) == 50
    assert all(descriptor.is_intact() for descriptor in found)
    for context, descriptor in zip(contexts, found):
        assert safe.SCardReleaseContext(context) == OK
        assert not descriptor.is_intact()


def test_a_hundred_contexts(shared_stack: VirtualPcsc) -> None:
    """A fork turns each inherited connection into a dead socket with the same number. The parent's don't change."""
    contexts = [establish() for _ in range(100)]
    numbers = [connection_of(context).number for context in contexts]
    before = descriptors()
    clients = shared_stack.clients()

    def child() -> Any:
        dead = sum(is_dead(number) for number in numbers)
        extra = set(descriptors()) - set(before)
        used = [safe.SCardListReaders(context, [])[0] for context in contexts]
        intact = sum(connection_of(context).is_intact() for context in contexts)
        return dead, len(extra), set(used), intact, len(set(descriptors()) - set(before))

    # Beyond what the parent had open: the pipe for this result, and the directory that was listed.
    dead, extra, used, intact, extra_after = in_child(child)
    assert (dead, used, intact) == (100, {OK}, 100)
    assert extra_after == extra <= 2
    assert not any(is_dead(number) for number in numbers)
    assert {safe.SCardListReaders(context, [])[0] for context in contexts} == {OK}
    for context in contexts:
        safe.SCardReleaseContext(context)
    shared_stack.wait_for_clients(clients - 100)


def test_the_application_closed_everything(shared_stack: VirtualPcsc) -> None:
    """Hazard 9: a child closes all descriptors and opens its own. They stay open, and no PIN is written to them."""
    done = in_program(closes_everything, env=shared_stack.env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[safe.SCARD_W_RESET_CARD, OK, [OK, [1, 2, 3, 0x90, 0x00]], OK], "", 120]


def closes_everything() -> None:
    """Do what a daemon does: fork, close everything, open files; then use, reconnect and release what it inherited."""
    session = Session()
    if os.fork():
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
    signal.alarm(20)
    os.closerange(3, 300)
    ends = [end for _ in range(60) for end in socket.socketpair()]
    inodes = [os.fstat(end.fileno()).st_ino for end in ends]
    answers = [session.transmit([0, 0x20, 0, 0x80, 4, 1, 2, 3, 4])[0]]
    answers.append(safe.SCardReconnect(session.card, safe.SCARD_SHARE_SHARED, 3, safe.SCARD_LEAVE_CARD)[0])
    answers.append(session.transmit(ECHO))
    answers.append(safe.SCardReleaseContext(session.context))
    received = b""
    for end in ends:
        end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            received += end.recv(1000)
    still_open = sum(os.fstat(end.fileno()).st_ino == inode for end, inode in zip(ends, inodes))
    os.write(1, json.dumps([answers, received.decode(), still_open]).encode())
    os._exit(0)


def test_the_owner_closed_it_before_the_fork(shared_stack: VirtualPcsc) -> None:
    """A number that was reused before the fork belongs to somebody else. The child leaves it alone."""
    context = establish()
    number = connection_of(context).number
    ours, theirs = socket.socketpair()
    os.dup2(ours.fileno(), number)
    with socket.socket(fileno=number) as taken:

        def child() -> Any:
            still_alive = not is_dead(number)
            used = safe.SCardListReaders(context, [])[0]
            safe.SCardReleaseContext(context)
            taken.send(b"mine")
            return still_alive, used, theirs.recv(10)

        assert in_child(child) == (True, OK, b"mine")
        handles.find(context._self_record.kind, context).forget()  # type: ignore[union-attr]
    ours.close()
    theirs.close()


@pytest.mark.parametrize("free", [0, 1])
def test_no_descriptor_is_free(session: Session, free: int) -> None:
    """A process at its limit of open files still replaces the connections that its child inherits."""
    number = connection_of(session.context).number
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(descriptors())

    def child() -> Any:
        return is_dead_by_send(number)

    pid_pipe = os.pipe()
    filler = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, hard))
        with contextlib.suppress(OSError):
            while True:
                filler.append(os.dup(0))
        for _ in range(free):
            os.close(filler.pop())
        pid = fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(20)
                status = 0 if child() else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in (*filler, *pid_pipe):
            os.close(descriptor)


@pytest.mark.parametrize("function", ["fstat", "dup2"])
def test_a_handlers_exception_is_not_taken_for_a_failure(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """A TimeoutError that a signal handler raises during a replacement is raised, so that the caller can repeat it."""
    core.prepare()
    ours, theirs = socket.socketpair()
    connection, real = core.of(ours.fileno()), getattr(os, function)

    def times_out(*arguments: Any, **options: Any) -> Any:
        if connection.number in arguments:
            raise TimeoutError("a handler's")
        return real(*arguments, **options)

    with ours, theirs, monkeypatch.context() as patch:
        patch.setattr(core, "_dead_socket", None)
        patch.setattr(os, function, times_out)
        with pytest.raises(TimeoutError):
            core.replace_with_dead([connection])


def is_dead_by_send(number: int) -> bool:
    """Like :func:`is_dead`, but without another descriptor."""
    connection = socket.socket(fileno=number)
    try:
        connection.send(b"")
        connection.getpeername()
    except OSError:
        return True
    finally:
        connection.detach()
    return False


def test_without_a_hook_it_is_done_at_first_use(shared_stack: VirtualPcsc) -> None:
    """After a fork by C code the child's first pcsc_safe call replaces every connection, whatever context it uses."""
    done = in_program(unhooked, env=shared_stack.env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[False, False], [True, True], OK]


def unhooked() -> None:
    """Fork in C. Check the connections before and after a call on a third context."""
    contexts = [establish() for _ in range(3)]
    numbers = [connection_of(context).number for context in contexts[:2]]

    def child() -> Any:
        before = [is_dead(number) for number in numbers]
        used = safe.SCardListReaders(contexts[2], [])[0]
        return before, [is_dead(number) for number in numbers], used

    result = in_child(child, fork=lambda: int(ctypes.PyDLL(None).fork()))
    assert all(safe.SCardListReaders(context, [])[0] == OK for context in contexts)
    print(json.dumps(result))


def test_the_owners_death_frees_the_card(pcsc_stack: VirtualPcsc) -> None:
    """Hazard 5: after the owner is killed, the card can be connected exclusively although an idle child lives."""
    ready_end, ready = os.pipe()
    stay, stay_end = os.pipe()
    owner = fork()
    if owner == 0:
        try:
            Session(safe.SCARD_SHARE_EXCLUSIVE)
            idle = fork()
            if idle == 0:
                os.close(stay_end)
                signal.alarm(20)
                os.read(stay, 1)
                os._exit(0)
            os.write(ready, b"%d" % idle)
            signal.pause()
        finally:
            os._exit(1)
    idle = int(os.read(ready_end, 20))
    assert pcsc_stack.clients() == 1
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    pcsc_stack.wait_for_clients(0)
    until(lambda: is_free(pcsc_stack.readers[0].name), "pcscd has released the card, which it does after that")
    os.kill(idle, 0)
    session = Session(safe.SCARD_SHARE_EXCLUSIVE)
    session.close()
    for end in (stay_end, stay, ready, ready_end):
        os.close(end)


@pytest.mark.long
def test_a_thousand_forks_leave_nothing(shared_stack: VirtualPcsc) -> None:
    """1,000 children that re-establish leave no descriptor in the parent and no client at pcscd."""
    session = Session()
    before, clients = descriptors(), shared_stack.clients()
    for _ in range(1000):
        pid = fork()
        if pid == 0:
            signal.alarm(20)
            os._exit(safe.SCardListReaders(session.context, [])[0] != OK)
        assert os.waitpid(pid, 0)[1] == 0
    assert descriptors() == before
    shared_stack.wait_for_clients(clients)
    session.assert_untouched()
    session.close()


@pytest.mark.parametrize("how", ["re-establish", "release and establish"])
def test_a_chain_of_forks_gathers_nothing(shared_stack: VirtualPcsc, how: str) -> None:
    """Each of 60 generations has as many descriptors as the first. None keeps its ancestors' dead sockets."""
    done = in_program(chain, how, env=shared_stack.env)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert len(counts) == 60
    assert len(set(counts)) == 1, counts


def chain(how: str) -> None:
    """A daemon that its child replaces, again and again."""
    context = establish()
    counts = []
    signal.alarm(20)
    for _ in range(60):
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            os._exit(0)
        signal.alarm(20)
        if how == "re-establish":
            assert safe.SCardListReaders(context, [])[0] == OK
        else:
            assert safe.SCardReleaseContext(context) == OK
            context = establish()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert len(handles.contexts) == 1
    os.write(1, json.dumps(counts).encode())
    os._exit(0)


def test_many_threads_come_first(session: Session, shared_stack: VirtualPcsc) -> None:
    """An inherited context is re-established exactly once, however many threads of a child use it first."""

    def child() -> Any:
        before = shared_stack.clients()
        barrier = threading.Barrier(16)
        answers = []

        def use() -> None:
            barrier.wait()
            answers.append(safe.SCardListReaders(session.context, [])[0])

        threads = [threading.Thread(target=use) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shared_stack.wait_for_clients(before + 1)  # surplus contexts are released
        return set(answers)

    assert in_child(child) == {OK}


def test_a_signal_in_the_hook(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child doesn't keep a connection of its parent, whichever line of its hook a handler raises in."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    number, line, left = connection_of(session.context).number, 0, -1
    while left < 0:
        raises = RaisesInside(process._hook_in_child, line)
        sys.settrace(raises)
        child = start(lambda: (raises.left, is_dead(number)))  # noqa: B023  # called immediately
        sys.settrace(None)
        left, dead = wait_for(child)
        assert dead, line
        line += 1
    assert line > 20


def test_the_first_stack_is_no_precondition(shared_stack: VirtualPcsc) -> None:
    """A process that was forked before anything was established is an owner like any other."""

    def child() -> Any:
        assert process.current().number == 1
        own = Session()
        own.assert_untouched()
        result = in_child(own.transmit, ECHO)
        own.close()
        return result

    assert in_child(child) == [safe.SCARD_S_SUCCESS, [1, 2, 3, 0x90, 0x00]]
    assert isinstance(shared_stack.readers[0].card, EchoCard)
