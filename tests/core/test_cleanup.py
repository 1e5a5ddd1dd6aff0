"""Cleanup in a child never reaches the owner's session, however it is made, in any order and under any policy."""

from __future__ import annotations

import atexit
import gc
import itertools
import json
import multiprocessing
import os
import sys
import types
import weakref
from typing import Any, Callable

import pytest
from conftest import ECHO, Session
from forking import fork, forks_with_threads, in_child, in_program

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import descriptors, handles
from pcsc_safe.policy import Broker, Policy, native_works_after_fork
from pcsc_safe.testing import VirtualPcsc

OK, INVALID = safe.SCARD_S_SUCCESS, safe.SCARD_E_INVALID_HANDLE

CLEANUPS: dict[str, Callable[[Session], Any]] = {
    "end": lambda session: safe.SCardEndTransaction(session.card, safe.SCARD_RESET_CARD),
    "disconnect": lambda session: safe.SCardDisconnect(session.card, safe.SCARD_UNPOWER_CARD),
    "release": lambda session: safe.SCardReleaseContext(session.context),
}

POLICIES = [policy for policy in Policy if policy is not Policy.SHARE]  # needs a broker, and has its own tests


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("order", list(itertools.permutations(CLEANUPS)), ids="-".join)
def test_explicit_calls(session: Session, policy: Policy, order: tuple[str, ...]) -> None:
    """Every order of explicit cleanup succeeds in the child. The owner's session and transaction continue."""
    pcsc_safe.configure(policy=policy)
    assert safe.SCardBeginTransaction(session.card) == OK
    answers = in_child(lambda: [CLEANUPS[name](session) for name in order])
    released = order.index("release")
    expected = [
        INVALID if index > released or ("disconnect" in order[:index] and name == "end") else OK
        for index, name in enumerate(order)
    ]
    assert answers == expected
    assert safe.SCardEndTransaction(session.card, safe.SCARD_LEAVE_CARD) == OK


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_forgotten_is_invalid(session: Session, policy: Policy) -> None:
    """After its cleanup a child's handles are invalid: SCARD_E_INVALID_HANDLE, as after every release."""
    pcsc_safe.configure(policy=policy)

    def child() -> Any:
        safe.SCardReleaseContext(session.context)
        return (
            safe.SCardListReaders(session.context, [])[0],
            safe.SCardIsValidContext(session.context),
            session.transmit(ECHO),
            safe.SCardReleaseContext(session.context),
            (int(session.context) in handles.contexts, int(session.card) in handles.cards),
        )

    # Where the child has no native library that could forget the numbers too, they stay known.
    stay = native_works_after_fork() is False and pcsc_safe.settings().broker is Broker.ON_FORK
    assert in_child(child) == (INVALID, INVALID, [INVALID, []], INVALID, (stay, stay))


def test_a_child_that_released_goes_on_with_a_context_of_its_own(session: Session) -> None:
    """A child that releases what it inherited and then establishes a context works: well-behaved programs do so."""

    def child() -> Any:
        safe.SCardDisconnect(session.card, safe.SCARD_UNPOWER_CARD)
        safe.SCardReleaseContext(session.context)
        own = Session()
        own.assert_untouched()
        safe.SCardDisconnect(own.card, safe.SCARD_LEAVE_CARD)

    in_child(child)


class Connection:
    """A typical driver: its finalizer disconnects, powers the card off and releases the context."""

    def __init__(self, session: Session) -> None:
        self.context, self.card = session.context, session.card
        self.cycle = self
        self.armed = True

    def close(self) -> None:
        """Disconnect and release."""
        if self.armed:
            safe.SCardDisconnect(self.card, safe.SCARD_UNPOWER_CARD)
            safe.SCardReleaseContext(self.context)

    __del__ = close


def test_garbage_collection(session: Session) -> None:
    """A finalizer that runs in the child, directly or in a garbage collection, does not affect the owner."""
    connections = [Connection(session)]
    watch = weakref.ref(connections[0])

    def child() -> Any:
        connections.clear()
        gc.collect()
        return watch() is None

    assert in_child(child) is True
    connections[0].armed = False


@pytest.mark.parametrize("policy", [policy.value for policy in POLICIES])
@pytest.mark.parametrize("how", ["falls off", "sys.exit", "raises", "os._exit", "multiprocessing", "killed"])
def test_the_end_of_a_child(shared_stack: VirtualPcsc, how: str, policy: str) -> None:
    """The parent's session continues however a child ends, its finalizers and atexit functions included."""
    done = in_program(ends, how, env={**shared_stack.env, "PCSC_SAFE_POLICY": policy})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        "untouched",
        {"falls off": 0, "sys.exit": 3, "raises": 1, "os._exit": 4, "multiprocessing": 5, "killed": -9}[how],
    ]
    assert "Exception ignored" not in done.stderr


def ends(how: str) -> None:
    """A program whose child ends in the given way, with a finalizer and an atexit function that clean up."""
    session = Session()
    connection = Connection(session)
    atexit.register(lambda: connection.close())
    owner = os.getpid()
    if how == "multiprocessing":
        child = multiprocessing.get_context("fork").Process(target=ends_as_a_worker, args=(connection,))
        child.start()
        child.join()
        status: Any = child.exitcode
    else:
        pid = fork()
        if pid == 0:
            if how == "raises":
                raise RuntimeError("unhandled, on purpose")
            if how == "sys.exit":
                sys.exit(3)
            if how == "os._exit":
                os._exit(4)
            if how == "killed":
                os.kill(os.getpid(), 9)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert os.getpid() == owner
    session.assert_untouched()
    print(json.dumps(["untouched", status]))


def ends_as_a_worker(connection: Connection) -> None:
    """A multiprocessing child that cleans up explicitly and in finalizers."""
    connection.close()
    del connection
    gc.collect()
    sys.exit(5)


def test_the_parents_own_exit_is_clean(shared_stack: VirtualPcsc) -> None:
    """The owner's finalizers at interpreter exit succeed, and leave no connection to pcscd."""
    before = shared_stack.clients()
    done = in_program(ends, "os._exit", env=shared_stack.env)
    assert (done.returncode, done.stderr) == (0, "")
    shared_stack.wait_for_clients(before)


def test_finalizers_at_interpreter_exit_find_everything_they_need(shared_stack: VirtualPcsc) -> None:
    """A handle that a module keeps until the very end can still be disconnected and released, in a child too."""
    done = in_program(keeps_until_the_end, env=shared_stack.env)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["child 0 0", "parent 0 0"]


def keeps_until_the_end() -> None:
    """Keep a handle in the worst place: a module that is torn down last."""
    session = Session()

    class Last:
        write, disconnect, release = os.write, safe.SCardDisconnect, safe.SCardReleaseContext

        def __del__(self) -> None:
            cls = type(self)
            codes = cls.disconnect(session.card, 2), cls.release(session.context)
            cls.write(1, b"%s %d %d\n" % (who, *codes))

    sys.modules["last"] = types.ModuleType("last")
    sys.modules["last"].keeper = Last()  # type: ignore[attr-defined]
    who = b"child"
    pid = fork()
    if pid:
        os.waitpid(pid, 0)
        session.assert_untouched()
        who = b"parent"


def test_fork_and_exec_pays_nothing(session: Session) -> None:
    """A child that only execs establishes nothing, logs nothing and passes no descriptor to the program."""
    import subprocess

    with forks_with_threads():
        done = subprocess.run(
            ["ls", "-l", "/proc/self/fd"], preexec_fn=lambda: None, close_fds=False, capture_output=True, text=True
        )
    assert done.stdout.count("socket:") <= 2  # at most pytest's own: ours are closed on exec
    assert not any(str(connection.inode) in done.stdout for connection in list(descriptors.guarded))
