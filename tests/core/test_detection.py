"""Detection of forks: each of the three layers alone, and the log line that names the layer."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
from typing import Any

import cforks
import pytest
from cforks import SYS_CLONE, c_fork
from conftest import ECHO, Session
from forking import ChildFailedError, fork, in_child, in_program

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import descriptors, in_flight, process
from pcsc_safe.testing import VirtualPcsc

CLONE_NEWPID = 0x20000000


PAGE = pytest.mark.not_on_macos("no page is wiped there")


def uses_its_own(session: Session) -> tuple[Any, ...]:
    """Use an inherited session in a child: reset, reconnect, exchange."""
    pcsc_safe.configure(cards="reset")
    answers = (
        session.transmit(ECHO)[0],
        safe.SCardReconnect(session.card, safe.SCARD_SHARE_SHARED, session.protocol, safe.SCARD_LEAVE_CARD)[0],
        session.transmit(ECHO),
        session.context.owner_pid == os.getpid(),
    )
    safe.SCardReleaseContext(session.context)
    return answers


OWN = (safe.SCARD_W_RESET_CARD, 0, [0, [1, 2, 3, 0x90, 0x00]], True)


class Lines(logging.Handler):
    """Collects the messages of pcsc_safe's logger."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        logging.getLogger("pcsc_safe").addHandler(self)
        logging.getLogger("pcsc_safe").setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_os_fork(session: Session) -> None:
    """A child of os.fork() works with its own context. The parent's session continues."""
    assert in_child(uses_its_own, session) == OWN


def test_a_fork_in_a_thread(session: Session) -> None:
    """Any thread may fork."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(in_child(uses_its_own, session)))
    thread.start()
    thread.join()
    assert results == [OWN]


def test_grandchildren(session: Session) -> None:
    """Each of five generations gets its own context, whether its parent used PC/SC before or after the fork."""

    def generation(depth: int, uses_first: bool) -> list[Any]:
        own = []
        if uses_first:
            own.append(safe.SCardListReaders(session.context, [])[0])
        below = in_child(generation, depth - 1, uses_first) if depth > 1 else []
        own.append(safe.SCardListReaders(session.context, [])[0])
        own.append(session.context.owner_pid == os.getpid())
        own.append(process.here.number)
        return [own, *below]

    assert in_child(generation, 5, False) == [[0, True, depth] for depth in range(1, 6)]
    assert in_child(generation, 5, True) == [[0, 0, True, depth] for depth in range(1, 6)]


def test_the_hook_says_so(session: Session) -> None:
    """The debug log names the layer that detected the fork. Nothing is logged before the child uses PC/SC."""

    def child() -> tuple[list[str], list[str]]:
        lines = Lines()
        before = list(lines.messages)
        safe.SCardListReaders(session.context, [])
        return before, lines.messages

    before, after = in_child(child)
    assert before == []
    assert after[0].startswith("process ")
    assert after[0].endswith(f"was forked from process {os.getpid()}, detected by hook")


def unhooked(fork_name: str, layer: str) -> None:
    """A program whose fork runs no Python hook. Parent and child both work, and the child logs the layer."""
    if layer == "pid":
        process._page = None
        process.sentinel = process._PidSentinel()
    fork = getattr(cforks, fork_name)
    session = Session()
    lines = Lines()
    answers = in_child(uses_its_own, session, fork=fork)
    grandchild = in_child(
        lambda: (safe.SCardListReaders(session.context, [])[0], in_child(uses_its_own, session, fork=fork)), fork=fork
    )
    messages = in_child(lambda: (safe.SCardListReaders(session.context, []), lines.messages)[1], fork=fork)
    session.assert_untouched()
    print(json.dumps([answers, grandchild, messages[0].rsplit(" ", 1)[-1], lines.messages]))


def run_unhooked(stack: VirtualPcsc, *arguments: str) -> None:
    done = in_program(unhooked, *arguments, env=stack.env)
    assert done.returncode == 0, done.stderr
    answers, grandchild, layer, parents = json.loads(done.stdout)
    assert tuple(answers) == OWN
    assert (grandchild[0], tuple(grandchild[1])) == (0, OWN)
    assert layer == arguments[1]
    assert parents == []


@PAGE
def test_a_fork_from_c(shared_stack: VirtualPcsc) -> None:
    """The wiped page detects a fork by C code."""
    run_unhooked(shared_stack, "c_fork", "page")


@PAGE
@pytest.mark.skipif(SYS_CLONE is None, reason=f"the number of clone(2) on {platform.machine()} is not in this test")
def test_a_raw_clone(shared_stack: VirtualPcsc) -> None:
    """A process is detected as new if no hook of libc or Python ran, as in a server that embeds Python."""
    run_unhooked(shared_stack, "raw_clone", "page")


@pytest.mark.parametrize("fork_name", ["c_fork", "raw_clone"])
def test_the_pid_where_no_page_is_wiped(shared_stack: VirtualPcsc, fork_name: str) -> None:
    """The PID detects a fork if the kernel has no MADV_WIPEONFORK (simulated: the sentinel is replaced)."""
    done = in_program(unhooked_by_pid, fork_name, env=shared_stack.env)
    assert done.returncode == 0, done.stderr
    answers, _, layer, _ = json.loads(done.stdout)
    assert (tuple(answers), layer) == (OWN, "pid")


def unhooked_by_pid(fork_name: str) -> None:
    """Like :func:`unhooked`, in an interpreter that never had a page."""
    ours = ("calling", "conftest", "test_detection")
    for name in [name for name in sys.modules if name.startswith("pcsc_safe") or name in ours]:
        del sys.modules[name]
    real, sys.platform = sys.platform, "freebsd14"
    import pcsc_safe._core.process

    sys.platform = real
    assert isinstance(pcsc_safe._core.process.sentinel, pcsc_safe._core.process._PidSentinel)
    import test_detection

    test_detection.unhooked(fork_name, "as it is")


def test_no_python_runs_where_a_step_of_c_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of C that holds a lock compares PIDs in C, so that no signal handler can run in the middle."""
    process.current()  # begins this process's epoch
    sentinel = process._PidSentinel()
    monkeypatch.setattr(process, "sentinel", sentinel)
    events: list[str] = []
    for is_set in (0, 1):
        sentinel[0] = is_set
        look, found = process.is_here(), list[Any]()
        sys.setprofile(lambda _, event, __: events.append(event))
        found.extend(look)
        sys.setprofile(None)
        assert found == [bool(is_set)]
    assert "call" not in events


def same_pid() -> None:
    """Process 1 of one PID namespace forks process 1 of another, with no hook."""
    assert os.getpid() == 1
    session = Session()
    libc = ctypes.PyDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWPID) == 0, os.strerror(ctypes.get_errno())
    answers = in_child(lambda: (os.getpid(), uses_its_own(session)), fork=c_fork)
    session.assert_untouched()
    print(json.dumps(answers))


def may_unshare() -> bool:
    """Return whether this machine permits a PID namespace."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode == 0


@PAGE
@pytest.mark.skipif(not may_unshare(), reason="this machine does not permit PID namespaces (unshare --pid)")
def test_a_child_with_the_same_pid(shared_stack: VirtualPcsc) -> None:
    """The page tells a child from its parent when both are process 1, in different PID namespaces."""
    done = in_program(same_pid, env=shared_stack.env, prefix=("unshare", "--pid", "--fork"))
    assert done.returncode == 0, done.stderr
    pid, answers = json.loads(done.stdout)
    assert (pid, tuple(answers)) == (1, OWN)


def test_a_reused_pid(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descendant that got the dead owner's PID (simulated) is not taken for it: epochs count, not PIDs."""
    owner = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: owner)
    assert in_child(uses_its_own, session) == OWN


def test_an_epoch_begins_once_however_many_threads_come_first(shared_stack: VirtualPcsc) -> None:
    """After a fork that ran no hook, threads that use PC/SC first at the same time get the same epoch."""
    done = in_program(threads_come_first, env=shared_stack.env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, 1]


def threads_come_first() -> None:
    """Fork in C; ten threads of the child ask for the epoch simultaneously, and use one context."""
    session = Session()

    def child() -> tuple[int, int]:
        barrier = threading.Barrier(10)
        seen = []

        def ask() -> None:
            barrier.wait()
            safe.SCardListReaders(session.context, [])
            seen.append((process.current(), session.context._self_record.real))

        threads = [threading.Thread(target=ask) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len({id(epoch) for epoch, _ in seen}), len({real for _, real in seen})

    results = {in_child(child, fork=c_fork) for _ in range(20)}
    print(json.dumps(results.pop() if len(results) == 1 else sorted(results)))


def test_the_helper_sees_a_child_that_dies() -> None:
    """The fork helper reports a child's exception, its exit and its death by a signal."""
    with pytest.raises(ChildFailedError, match="ZeroDivisionError"):
        in_child(lambda: 1 / 0)
    with pytest.raises(ChildFailedError, match="status 7"):
        in_child(os._exit, 7)
    with pytest.raises(ChildFailedError, match="status -9"):
        in_child(lambda: os.kill(os.getpid(), 9))


@pytest.mark.native
@pytest.mark.parametrize("forks", [fork, c_fork], ids=["hooks", "page"])
@pytest.mark.parametrize("function", ["replace_guarded", "calls", "clear", "_begin"])
def test_a_handler_that_uses_pcsc_while_the_epoch_begins(shared_stack: VirtualPcsc, function: str, forks: Any) -> None:
    """What a signal handler of the child establishes in the middle stays usable, and the next fork knows it."""
    _, inherited = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    parent, established = os.getpid(), list[Any]()

    def as_a_handler(frame: Any, event: str, _: Any) -> None:
        if os.getpid() != parent and frame.f_code.co_name == function:
            sys.settrace(None)
            established.append(safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1])

    def forks_traced() -> int:
        sys.settrace(as_a_handler)
        try:
            return int(forks())
        finally:
            if os.getpid() == parent:
                sys.settrace(None)

    def child() -> Any:
        process.current()
        sys.settrace(None)
        (context,) = established
        safe.SCardListReaders(inherited, [])
        places, guarded = len(in_flight.places), len(descriptors.guarded)
        grandchild = in_child(lambda: safe.SCardListReaders(context, [])[0])
        return safe.SCardListReaders(context, [])[0], places, guarded, grandchild

    assert in_child(child, fork=forks_traced) == (safe.SCARD_S_SUCCESS, 3, 2, safe.SCARD_S_SUCCESS)
    safe.SCardReleaseContext(inherited)
