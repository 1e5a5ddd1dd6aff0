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
from brokers import ENOUGH, Client, Link, Watch, descriptors, held_card, let_go, stack_to_hold, until
from conftest import ECHO, IS_VERIFIED, Session
from forking import fork, in_child, in_program, start, wait_for
from test_detection import c_fork
from test_macos import OnMacos, on_macos
from test_quiesce import Alarm, no_new_process, raise_alarm
from test_threads import HELD, Calling, connect, establish, state_of, stays, transmit

import pcsc_safe
from pcsc_safe import policy
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
        pid = handing_over()
        if pid == 0:
            pid = fork() if how.startswith("leaves") else os.getpid()
            if pid == 0:
                signal.alarm(ENOUGH)
                link.hear()  # for ever
            signal.alarm(ENOUGH)
            if how == "execs":
                os.execvp("sleep", ["sleep", str(ENOUGH)])
            link.say(os.getpid())
            signal.pause()
        if how != "execs":
            assert link.hear() == "kill it"
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        signal.pause()

    with Client(parent) as living:
        if how != "execs":
            living.hear()
            assert not is_free(reader)
            living.say("kill it")
        until(lambda: is_free(reader), "the card is free")
        os.killpg(living.pid, 0)
        os.killpg(living.pid, signal.SIGKILL)
