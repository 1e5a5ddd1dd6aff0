"""Handover: the child continues the parent's session, natively and through a broker, whatever the parent does.

The session here has everything that only one process can have: a verified PIN, an open transaction, an exclusive
connection.  Most tests fork a first process, ``parent``, which opens the session and hands it over to a child.
:mod:`test_handover_faults` tests what can prevent a handover.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from brokers import ENOUGH, Client, Link, Watch, descriptors, module_stack, stack, until, watched
from calling import Calling, connect, establish
from cforks import c_fork
from conftest import ECHO, VERIFY, Session
from forking import fork, in_child, in_program, start, wait_for
from handovers import (
    ALL,
    BROKER,
    HELD_BY_ANOTHER,
    INVALID,
    NOTHING,
    OK,
    RESET,
    attempt,
    handing_over,
    has,
    is_free,
    opened,
    state,
    through_both,
)
from interrupts import no_new_process
from macos import OnMacos

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core.descriptors import guarded
from pcsc_safe._native.pyscard import raw
from pcsc_safe.errors import HandoverError
from pcsc_safe.testing import VirtualPcsc

__all__ = ["module_stack", "stack"]


# 1. What the parent does next.


@pytest.mark.parametrize("how", ["exit", "SIGKILL", "SIGSEGV"])
@through_both
def test_the_parent_ends(stack: VirtualPcsc, through: str, how: str) -> None:
    """The child has the whole session after its parent has cleaned up at its exit, or has crashed."""
    done = in_program(hands_over_and_ends, through, how, env=stack.env)
    status = 3 if how == "exit" else -getattr(signal, how)
    assert (done.returncode, json.loads(done.stdout)) == (status, ALL)
    assert done.stderr == "" or how == "SIGSEGV"


def hands_over_and_ends(through: str, how: str) -> None:
    session, parent = opened(through), Watch(os.getpid())
    atexit.register(session.close)
    if handing_over() == 0:
        assert parent.ends(ENOUGH)
        print(json.dumps(state(session)), flush=True)
        os._exit(0)
    sys.modules["x"] = type("Driver", (), {"__del__": lambda driver: session.close()})()  # type: ignore[assignment]
    if how != "exit":
        os.kill(os.getpid(), getattr(signal, how))
    sys.exit(3)


POLICIES = {
    "auto": [OK, OK, [RESET, []], [HELD_BY_ANOTHER, 0]],
    "raise": [INVALID, "raised", "raised", "raised"],
    "invalid": [INVALID, INVALID, [INVALID, []], [INVALID, 0]],
}


@pytest.mark.parametrize("policy", POLICIES)
@through_both
def test_the_parent_lives_on(stack: VirtualPcsc, through: str, policy: str) -> None:
    """The parent's objects count as inherited. None of its calls, forks and finalizers reaches the child's session."""

    def child(link: Link, session: Session) -> None:
        while link.hear():
            link.say(state(session))
        session.close()

    def parent() -> Any:
        session = opened(through, policy=policy)
        context, card, answered, states = session.context, session.card, [], []
        uses: list[Callable[[], Any]] = [
            lambda: safe.SCardIsValidContext(context),
            lambda: safe.SCardListReaders(context, [])[0],
            lambda: safe.SCardTransmit(card, safe.SCARD_PCI_T1, ECHO),
            lambda: safe.SCardReconnect(card, safe.SCARD_SHARE_SHARED, 3, safe.SCARD_RESET_CARD),
            lambda: safe.SCardCancel(context),
            lambda: safe.SCardEndTransaction(card, safe.SCARD_RESET_CARD),
            lambda: safe.SCardDisconnect(card, safe.SCARD_UNPOWER_CARD),
            lambda: safe.SCardReleaseContext(context),
        ]
        with Client(child, session, fork=handing_over) as heir:
            for use in [*uses, lambda: gc.collect() < 0]:
                in_child(attempt, use)
                answered.append(attempt(use))
                heir.say(True)
                states.append(heir.hear())
                session = context if use is uses[-1] else session
            heir.say(False)
            heir.result()
        return answered[:-1], states

    assert in_child(parent) == ([*POLICIES[policy], OK, OK, OK, OK], [ALL] * 9)


@pytest.mark.parametrize("how", ["dies", "execs", "leaves a child of its own"])
@through_both
def test_the_childs_end_frees_the_card(stack: VirtualPcsc, through: str, how: str) -> None:
    """When the new owner has died or exec'd, the card is free, although its parent and its child live."""

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
                assert not is_free(stack.readers[0].name)
                os.kill(heir, signal.SIGKILL)
            until(lambda: is_free(stack.readers[0].name), "the card is free")
            assert watch.ends(0 if how == "execs" else ENOUGH) == (how != "execs")
        os.killpg(living.pid, signal.SIGKILL)


# 2. Daemons.


@pytest.mark.parametrize("how", ["by hand", "PCSC_SAFE_OWNER", "python-daemon"])
@through_both
def test_a_daemon(stack: VirtualPcsc, through: str, how: str) -> None:
    """A daemon has the session of its grandparent, after both ancestors ended and other descriptors were closed."""
    if how == "python-daemon":
        pytest.importorskip("daemon", reason="python-daemon is not installed")
    env = {**stack.env, "PCSC_SAFE_OWNER": "child"} if how == "PCSC_SAFE_OWNER" else stack.env
    done = in_program(becomes_a_daemon, through, how, env=env)
    assert (done.returncode, done.stderr, done.stdout and json.loads(done.stdout)) == (0, "", [True, ALL])


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
    with contextlib.suppress(OSError):  # ESRCH, too: it ended between open and read
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


# 3. Which fork, which contexts: in every case exactly one process has the session.


def fork_as(steps: str) -> int:
    """Fork in the way that the steps describe.

    :param steps: ``(`` and ``)`` enter and leave a new block, ``[`` and ``]`` always the same one; ``!`` leaves a block
            by an exception; ``x`` is a fork that fails, ``.`` one that succeeds, ``c`` one in C; ``t``: in a thread.
    """
    same, blocks, pid = pcsc_safe.handover(), [], -1
    for step in steps.lstrip("t"):
        if step in "([":
            blocks.append(same if step == "[" else pcsc_safe.handover())
            blocks[-1].__enter__()
        elif step in ")]!":
            error = ValueError() if step == "!" else None
            blocks.pop().__exit__(type(error) if error else None, error, None)
        elif step == "x":
            with pytest.raises(BlockingIOError), no_new_process():
                os.fork()
        else:
            pid = fork() if step == "." else c_fork()
    return pid


HANDED_OVER = ["(.)", "((.))", "(().)", "[[.]]", "[[].]", "[x][.]", "(x)(.)", "(xxx.)", "(!(.)", "t(.)", "t((.))"]
KEPT = [".", "().", "(!.", "(xxx).", "[].", "(c)", "t.", "t(c)"]


@pytest.mark.parametrize("steps", [*HANDED_OVER, *KEPT])
@through_both
def test_who_has_it(stack: VirtualPcsc, through: str, steps: str) -> None:
    """Either the child or the parent has the whole session. A fork in C raises an error, in the child."""

    def parent() -> Any:
        session, errors = opened(through, policy="raise"), list[str]()

        def forking() -> int:
            try:
                return fork_as(steps)
            except HandoverError as error:
                errors.append(str(error))
                return 0  # only a child gets here, or two processes have the session

        def begin() -> Any:
            return start(lambda: (has(session), errors), fork=forking)

        return wait_for(Calling(begin).answer() if steps[0] == "t" else begin()), (has(session), errors)

    why = f"{NOTHING}the fork in this block ran none of Python's at-fork hooks; use os.fork(); the parent is still the "
    why += "owner"
    to_child = steps in HANDED_OVER
    assert in_child(parent) == ((to_child, [why] if "c" in steps else []), (not to_child, []))


@through_both
def test_which_contexts(stack: VirtualPcsc, through: str) -> None:
    """A handover includes the named contexts, or all, also those established in the block; not those released there."""

    def parent() -> Any:
        first, second = opened(through, policy="raise"), Session.__new__(Session)
        second.context = establish()
        second.card = connect(second.context, stack.readers[2].name)
        assert second.transmit(VERIFY)[0] == safe.SCardBeginTransaction(second.card) == OK
        child = start(lambda: (has(first), has(second)), fork=lambda: handing_over(first.context))
        answers = [wait_for(child), (has(first), has(second))]

        def in_block() -> int:
            nonlocal first
            with pcsc_safe.handover():
                safe.SCardReleaseContext(second.context)
                first = opened(through)
                return fork()

        until(lambda: is_free(stack.readers[0].name), "the child is gone")
        answers.append(in_child(lambda: (has(first), state(second)[:2]), fork=in_block))
        answers += [(has(first), state(second)[:2]), in_child(has, first, fork=handing_over)]
        with pytest.raises(HandoverError) as refused:
            pcsc_safe.handover(second.context)
        with pytest.raises(HandoverError, match="doesn't own this context"):
            pcsc_safe.handover(first.context)
        return answers, str(refused.value)

    gone = [INVALID, INVALID]
    why = (
        "this context: it is released, inherited, or not a context; pass contexts that "
        "SCardEstablishContext returned in this process, or no argument, which hands over all contexts"
    )
    expected = [(True, False), (False, True), (True, gone), (False, gone), False]
    answers, said = in_child(parent)
    assert answers == expected
    assert said.endswith(why)


@through_both
def test_calls_of_other_threads(stack: VirtualPcsc, through: str) -> None:
    """A call that blocks until the fork returns what the parent's policy says, like every later call."""

    def parent() -> Any:
        session = opened(through, policy="reestablish")

        def in_block() -> int:
            with pcsc_safe.handover():
                # More than there are idle connections to a broker.
                calls.extend(Calling(safe.SCardListReaders, session.context, []) for _ in range(6))
                time.sleep(0.3)
                return fork()

        calls: list[Calling] = []
        child = in_child(has, session, fork=in_block)
        return child, [call.answer()[0] for call in calls]

    assert in_child(parent) == (True, [OK] * 6)


@pytest.mark.native
@pytest.mark.not_on_macos("a forked process has no native contexts")
def test_a_cancel_of_another_thread(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCardCancel that blocks until the fork doesn't end the child's waits: the context is no longer the parent's."""
    cancelled: list[int] = []
    monkeypatch.setitem(raw, "SCardCancel", lambda handle: cancelled.append(handle) or OK)

    def parent() -> Any:
        session = opened(policy="raise")

        def in_block() -> int:
            with pcsc_safe.handover():
                calls.append(Calling(safe.SCardCancel, session.context))
                time.sleep(0.3)
                return fork()

        calls: list[Calling] = []
        return in_child(has, session, fork=in_block), [call.answer() for call in calls], cancelled

    assert in_child(parent) == (True, [OK], [])


@through_both
def test_a_wait_in_the_block(stack: VirtualPcsc, through: str) -> None:
    """The thread that hands over can wait for events in the block; natively, another thread makes the call for it."""

    def parent() -> Any:
        session = opened(through, policy="raise")
        context = establish()
        name = stack.readers[0].name
        _, ((_, seen, _),) = safe.SCardGetStatusChange(context, 0, [(name, safe.SCARD_STATE_UNAWARE)])
        before, results = stack.clients(), []

        def in_block() -> int:
            with pcsc_safe.handover():
                results.append(safe.SCardGetStatusChange(context, 300, [(name, seen & ~safe.SCARD_STATE_CHANGED)])[0])
                results.append(stack.clients() - before)
                return fork()

        return in_child(has, session, fork=in_block), results

    assert in_child(parent) == (True, [safe.SCARD_E_TIMEOUT, 0])


UNUSABLE = f"{NOTHING}a forked process can't use PC/SC on this platform; "
ON_MACOS = {
    "native": [f"{UNUSABLE}set broker='always' before you establish the context", [True]],
    "native, from within": [f"{UNUSABLE}the parent is still the owner: fork again", [False, True]],
    "broker": ["", [True, False]],
}


@pytest.mark.native
@pytest.mark.parametrize("how", ON_MACOS)
def test_on_macos(stack: VirtualPcsc, on_macos: OnMacos, how: str) -> None:
    """On macOS a session in a broker is handed over. Any other is refused, before the fork if possible."""
    done = in_program(hands_over_on_macos, how, env=on_macos(stack))
    assert (done.returncode, json.loads(done.stdout)) == (0, ON_MACOS[how])


def hands_over_on_macos(how: str) -> None:
    error, owners, session = "", list[Any](), None if how.endswith("within") else opened(how, policy="raise")
    try:
        with pcsc_safe.handover():
            session = session or opened(policy="raise")
            owners.append(in_child(has, session))
    except HandoverError as refused:
        error = str(refused)
    print(json.dumps([error, [*owners, has(session)]]), flush=True)  # type: ignore[arg-type]


# 4. Many.


@through_both
def test_generations(stack: VirtualPcsc, through: str) -> None:
    """A session passes through 20 generations, some of which never use it, and leaves no descriptor on the way."""

    def generation(session: Session, left: int) -> list[Any]:
        used = state(session) == ALL if left % 2 == 0 else None
        found = [(used, sum(what.startswith("socket:") for what in descriptors(os.getpid()).values()))]
        if not left:
            return found
        child = start(generation, session, left - 1, fork=fork if left % 3 == 0 else handing_over)
        return found + wait_for(child)

    found = in_child(lambda: generation(opened(through, owner="child"), 20))
    assert [used for used, _ in found] == [True, None] * 10 + [True]
    assert {sockets for _, sockets in found[1:]} == {found[1][1]}


@through_both
def test_again_and_again(stack: VirtualPcsc, through: str) -> None:
    """100 handovers of a context that the parent continues to use leave no descriptor and no client of pcscd."""

    def parent() -> Any:
        pcsc_safe.configure(broker=BROKER[through])
        context, counts = establish(), set()
        for number in range(100):
            assert in_child(safe.SCardListReaders, context, [], fork=handing_over)[0] == OK
            assert safe.SCardListReaders(context, [])[0] == OK
            if number:
                stack.wait_for_clients(1)
                counts.add((len(descriptors(os.getpid())), len(guarded)))
        return len(counts)

    assert in_child(parent) == 1
