"""Forks in a process with threads: quiet, unquiet, failed and interrupted ones, and forks inside calls.

The tests don't ask pcsc_safe which threads are inside the native library.  The programs below replace pyscard's
functions by those of a :class:`Watch`, and a child reads the copy that it has since the fork.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import json
import logging
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from calling import (
    ATR,
    CANCELLED,
    CHANGED,
    EMPTY,
    ENOUGH,
    HELD,
    OK,
    PRESENT,
    SHARED,
    TIMED_OUT,
    Calling,
    HeldCard,
    connect,
    establish,
    flags,
    stays,
    transmit,
    until,
    wait,
    waits_on,
)
from cforks import c_fork
from conftest import ECHO, Session
from forking import fork, in_child, in_program, start, wait_for
from interrupts import Alarm, RaisesInside, before_3_10, no_new_process, no_new_thread, raise_alarm

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import gate, in_flight, process
from pcsc_safe._native import pyscard
from pcsc_safe.errors import ForkUnsafeError
from pcsc_safe.testing import VirtualPcsc

T1 = safe.SCARD_PROTOCOL_T1
INVALID = safe.SCARD_E_INVALID_HANDLE
RESET = safe.SCARD_W_RESET_CARD
READER = "Virtual PCD 0 00 00"
RIGHT = [OK, [1, 2, 3, 0x90, 0x00]]


def works(context: Any, card: Any, reader: str, scard: Any = safe) -> list[Any]:
    """Do all that a child can do: list, reset, reconnect, exchange, and the same with its own context."""
    answers = [
        scard.SCardListReaders(context, [])[0],
        scard.SCardReconnect(card, SHARED, T1, scard.SCARD_LEAVE_CARD),
        scard.SCardTransmit(card, scard.SCARD_PCI_T1, ECHO),
    ]
    hresult, own = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    connected, another, _ = scard.SCardConnect(own, reader, SHARED, T1)
    exchanged = scard.SCardTransmit(another, scard.SCARD_PCI_T1, ECHO) if connected == OK else []
    answers += [hresult, connected, exchanged]
    return [*answers, scard.SCardReleaseContext(own), scard.SCardReleaseContext(context)]


WORKS = [OK, [OK, T1], RIGHT, OK, OK, RIGHT, OK, OK]


# 1. Quiet forks.


@pytest.mark.parametrize("waiting", [1, 3])
def test_an_endless_wait_notices_nothing_of_forks(pcsc_stack: VirtualPcsc, waiting: int) -> None:
    """Threads that wait INFINITE still wait after 20 forks, and then get the event. Every child can do everything."""
    session, slot = Session(), pcsc_stack.readers[1]
    contexts = [establish() for _ in range(waiting)]
    waiters = [wait(context, slot.name) for context in contexts]
    for _ in range(20):
        assert in_child(works, session.context, session.card, session.reader) == WORKS
        assert [waiter.is_alive() for waiter in waiters] == [True] * waiting
    session.assert_untouched()
    for waiter in waiters:
        until(lambda waiter=waiter: waits_on(waiter), "the wait goes on")  # type: ignore[misc]
    slot.remove()
    assert [flags(waiter.answer()) for waiter in waiters] == [(OK, [(slot.name, CHANGED | EMPTY, [])])] * waiting
    session.close()
    assert [safe.SCardReleaseContext(context) for context in contexts] == [OK] * waiting


def test_a_timeout_of_a_class_of_its_own(session: Session) -> None:
    """A wait ends early at a fork also if its timeout is an instance of a subclass of int, as of IntEnum."""
    timeout = enum.IntEnum("Timeout", {"LONG": 10_000}).LONG  # type: ignore[attr-defined]
    waiter = wait(session.context, session.reader, timeout)
    assert in_child(lambda: process.current().unquiet) is None
    assert safe.SCardCancel(session.context) == OK
    assert waiter.answer()[0] == safe.SCARD_E_CANCELLED


def test_a_finite_wait_has_the_time_that_was_left(session: Session) -> None:
    """A wait of 1 s beside forks returns on time what an undisturbed wait returns: SCARD_E_TIMEOUT and the states."""
    context = establish()
    undisturbed = wait(context, session.reader, 10).answer()
    waiter = wait(context, session.reader, 1000)
    forks = 0
    while waiter.is_alive():
        assert in_child(safe.SCardListReaders, context, [])[0] == OK
        forks += 1
    assert waiter.answer() == undisturbed
    assert undisturbed[0] == TIMED_OUT
    assert 0.99 <= waiter.seconds < 6
    assert forks >= 2
    safe.SCardReleaseContext(context)


@pytest.mark.native
@pytest.mark.not_on_macos("a forked process has no native contexts")
def test_a_context_with_a_policy_of_its_own(session: Session) -> None:
    """A fork under policy broker is quiet if a context has another policy, although a thread waits for events."""

    def parent() -> Any:
        context = establish()
        pcsc_safe.configure(policy="broker", quiesce_timeout=ENOUGH)
        pcsc_safe.configure(policy="reestablish", context=context)
        waiter = wait(context, session.reader)
        answer = in_child(safe.SCardListReaders, context, [])[0]
        until(lambda: waits_on(waiter), "the wait goes on")
        return answer, safe.SCardCancel(context), waiter.answer()[0]

    assert in_child(parent) == (OK, OK, CANCELLED)


class Hold:
    """A fork that waits for a call in flight, and a thread whose wait for events the fork has interrupted."""

    def __init__(self, stack: VirtualPcsc, state: Any = None) -> None:
        pcsc_safe.configure(quiesce_timeout=ENOUGH)
        card = stack.readers[0].card
        assert isinstance(card, HeldCard)
        self.slot, self._card = stack.readers[2], card
        self.context, busy = establish(), establish()
        self.connection = connect(busy, stack.readers[0].name)
        self.waiter = wait(self.context, self.slot.name, state=state)
        self._long_call = Calling(transmit, self.connection, HELD, name="busy")
        assert card.reached.wait(ENOUGH)
        self._child: list[Any] = []
        self.forking = Calling(start, works, self.context, self.connection, self.slot.name)
        until(lambda: not stays(lambda: self.waiter.waits) and stays(lambda: not self.waiter.waits), "it gave way")
        assert self.forking.is_alive()

    def end(self) -> Any:
        """Let the call return, and so the fork happen; return what the child could do."""
        self._card.go.set()
        assert self._long_call.answer() == [OK, [7, 8, 9, 0x90, 0x00]]
        return wait_for(self.forking.answer())


def test_a_call_in_flight_is_waited_for(held: VirtualPcsc) -> None:
    """A fork waits for another thread's call. The call returns its result, and the child can do everything."""
    hold = Hold(held)
    assert stays(lambda: hold.forking.is_alive())
    assert hold.end() == WORKS
    assert transmit(hold.connection, ECHO) == RIGHT
    assert safe.SCardCancel(hold.context) == OK
    assert hold.waiter.answer()[0] == CANCELLED


def test_newcomers_wait_for_the_fork(held: VirtualPcsc) -> None:
    """A call of any kind that begins while a fork waits starts after the fork, and returns its result."""
    hold = Hold(held)
    calls = [
        Calling(safe.SCardListReaders, hold.context, []),
        Calling(establish),
        Calling(safe.SCardGetStatusChange, hold.context, 10, [(hold.slot.name, PRESENT)]),
    ]
    assert stays(lambda: all(call.is_alive() for call in calls))
    assert hold.end() == WORKS
    listed, _, waited = (call.answer() for call in calls)
    assert (listed[0], waited[0]) == (OK, TIMED_OUT)
    until(lambda: hold.waiter.waits, "the wait goes on")
    assert safe.SCardCancel(hold.context) == OK
    assert hold.waiter.answer()[0] == CANCELLED


def test_a_gate_that_opens_now_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the gate opens while a newcomer looks at it, the newcomer doesn't conclude that the fork takes too long."""
    from pcsc_safe._core import gate, in_flight

    class Opening(dict[int, float]):
        def values(self) -> Any:
            self.clear()
            return super().values()

    monkeypatch.setattr(in_flight, "closers", Opening({0: time.monotonic() + ENOUGH}))
    assert not gate.wait_until_open(1)


def test_a_cancel_during_the_fork_arrives_once(held: VirtualPcsc) -> None:
    """An SCardCancel during a fork ends the interrupted wait, after the fork, and no later one."""
    hold = Hold(held)
    cancelling = Calling(safe.SCardCancel, hold.context)
    assert stays(lambda: hold.waiter.is_alive())
    assert hold.end() == WORKS
    assert cancelling.answer() == OK
    hresult, states = hold.waiter.answer()
    assert (hresult, [name for name, *_ in states]) == (CANCELLED, [hold.slot.name])
    assert wait(hold.context, hold.slot.name, 50).answer()[0] == TIMED_OUT


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cancel_around_a_fork_arrives_once(session: Session, when: str) -> None:
    """An SCardCancel just before or after a fork ends the wait, and no later one."""
    context = establish()
    for _ in range(10):
        waiter = wait(context, session.reader)
        if when == "before":
            assert safe.SCardCancel(context) == OK
        child = start(works, context, session.card, session.reader)
        if when == "after":
            assert safe.SCardCancel(context) == OK
        assert waiter.answer()[0] == CANCELLED
        assert wait(context, session.reader, 20).answer()[0] == TIMED_OUT
        assert wait_for(child) == WORKS
    safe.SCardReleaseContext(context)


def test_cancels_and_forks_at_once(session: Session) -> None:
    """SCardCancel ends each of 200 waits, and no later one, while another thread forks again and again."""
    context, stop = establish(), threading.Event()

    def forks() -> set[int]:
        seen = set()
        while not stop.is_set():
            seen.add(in_child(safe.SCardListReaders, context, [])[0])
        return seen

    forking, early = Calling(forks), 0
    for _ in range(200):
        waiter = wait_briefly(context, session.reader)
        assert safe.SCardCancel(context) == OK
        answer = waiter.answer()[0]
        if answer == TIMED_OUT:  # SCardCancel came before the wait began
            early += 1
            continue
        assert answer == CANCELLED
        assert safe.SCardGetStatusChange(context, 1, [(session.reader, PRESENT)])[0] == TIMED_OUT
    stop.set()
    assert forking.answer() == {OK}
    assert early < 20
    safe.SCardReleaseContext(context)


def wait_briefly(context: Any, reader: str) -> Calling:
    """Start a thread that waits for events; a fork may have interrupted it when this returns."""
    waiter = Calling(safe.SCardGetStatusChange, context, 1000, [(reader, PRESENT)])
    until(lambda: waiter.waits or not waiter.is_alive(), "it waits")
    return waiter


@pytest.mark.parametrize("known", ["with its counter", "without"])
@pytest.mark.parametrize("event", ["removed", "inserted", "removed and inserted"])
def test_an_event_during_the_fork_is_not_lost(held: VirtualPcsc, event: str, known: str) -> None:
    """A wait that a fork interrupts reports a card that is inserted, removed, or removed and inserted then."""
    slot = held.readers[2]
    card = slot.remove() if event == "inserted" else slot.card
    assert card is not None
    state = None if known == "with its counter" else EMPTY if event == "inserted" else PRESENT
    hold = Hold(held, state)
    if event != "inserted":
        slot.remove()
    if event != "removed":
        slot.insert(card)
    assert hold.waiter.is_alive()
    hold._card.go.set()
    expected = (CHANGED | EMPTY, []) if event == "removed" else (CHANGED | PRESENT, ATR)
    assert flags(hold.waiter.answer()) == (OK, [(slot.name, *expected)])
    listed, reconnected, exchanged, *own = wait_for(hold.forking.answer())
    assert (listed, reconnected, exchanged) == (OK, [OK, T1], RIGHT)
    assert own[1:] == (WORKS[4:] if event != "removed" else [safe.SCARD_E_NO_SMARTCARD, [], OK, OK])


# A view from outside of pcsc_safe.


class Watch:
    """Pyscard's functions, with a record of who is inside and a hook for the moment when a call returns.

    :ivar inside: the function that a thread is in.
    :ivar entered: the names of the functions, once for each call.
    :ivar at_return: is called with a function's name as soon as Python runs again after it.
    """

    def __init__(self) -> None:
        self.inside: dict[int, str] = {}
        self.entered: list[str] = []
        self.at_return: Callable[[str], None] = lambda name: None
        from smartcard.scard import _scard

        for name, native in list(vars(_scard).items()):
            if name.startswith("SCard") and isinstance(native, types.BuiltinFunctionType):
                setattr(_scard, name, self._watched(name, native))
        for name in [name for name in sys.modules if name.partition(".")[0] == "pcsc_safe"]:
            del sys.modules[name]
        self.scard = importlib.import_module("pcsc_safe.scard")
        self.package = sys.modules["pcsc_safe"]

    def _watched(self, name: str, native: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            ident = threading.get_ident()
            before = self.inside.get(ident)
            self.inside[ident] = name
            self.entered.append(name)
            try:
                return native(*arguments)
            finally:
                if before is None:
                    del self.inside[ident]
                else:
                    self.inside[ident] = before
                self.at_return(name)

        return watched

    def session(self) -> tuple[Any, Any]:
        """Return a context and a card."""
        _, context = self.scard.SCardEstablishContext(self.scard.SCARD_SCOPE_SYSTEM)
        hresult, card, _ = self.scard.SCardConnect(context, READER, SHARED, T1)
        assert hresult == OK
        return context, card


def run(stack: VirtualPcsc, program: Callable[..., Any], *arguments: str) -> Any:
    """Return what a program of this module printed as JSON."""
    done = in_program(program, *arguments, env=stack.env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nobody_is_inside_at_a_quiet_fork(shared_stack: VirtualPcsc) -> None:
    """At 100 forks beside six busy threads, two of which wait, no other thread is in the native library."""
    inside, answers, wrong, calls = run(shared_stack, busy)
    assert inside == [[]]
    assert answers == [WORKS]
    assert wrong == []
    assert calls > 1000


def busy() -> None:
    """Six threads make calls; the main thread forks, and its children check which thread was inside."""
    watch = Watch()
    scard, stop, wrong = watch.scard, threading.Event(), []
    context, card = watch.session()
    waiting = [watch.session()[0] for _ in range(2)]

    def exchange(number: int, own_card: Any) -> None:
        while not stop.is_set():
            for used in (card, own_card):
                answer = scard.SCardTransmit(used, scard.SCARD_PCI_T1, [0x80, 1, 0, 0, 2, number, 7])
                if answer != [OK, [number, 7, 0x90, 0]]:
                    wrong.append(answer)
            scard.SCardStatus(own_card)

    def awaits(context: Any) -> None:
        while not stop.is_set():
            answer = scard.SCardGetStatusChange(context, scard.INFINITE, [(READER, 0x20)])[0]
            if answer != CANCELLED or not stop.is_set():
                wrong.append(answer)

    threads = [threading.Thread(target=exchange, args=(number, watch.session()[1]), daemon=True) for number in range(4)]
    threads += [threading.Thread(target=awaits, args=(context,), daemon=True) for context in waiting]
    for thread in threads:
        thread.start()
    until(lambda: list(watch.inside.values()).count("SCardGetStatusChange") == 2, "both wait")
    me, found, answers = threading.get_ident(), [], []
    for _ in range(100):
        inside, answer = in_child(
            lambda: (
                [name for thread, name in watch.inside.items() if thread != me],
                works(context, card, READER, scard),
            )
        )
        found += [] if inside in found else [inside]
        answers += [] if answer in answers else [answer]
    stop.set()
    for thread in threads:
        while thread.is_alive():
            for context in waiting:
                scard.SCardCancel(context)
            thread.join(0.05)
    print(json.dumps([found, answers, wrong, len(watch.entered)]))


# 2. Unquiet forks.


def attempts(scard: Any, context: Any, card: Any) -> dict[str, Any]:
    """Try every call, as a child; return an error as its class and the fields that a program uses."""
    calls: dict[str, Callable[[], Any]] = {
        "SCardListReaders": lambda: scard.SCardListReaders(context, []),
        "SCardGetStatusChange": lambda: scard.SCardGetStatusChange(context, 1000, [(READER, 0)]),
        "SCardConnect": lambda: scard.SCardConnect(context, READER, SHARED, T1),
        "SCardEstablishContext": lambda: scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM),
        "SCardReconnect": lambda: scard.SCardReconnect(card, SHARED, T1, scard.SCARD_LEAVE_CARD),
        "a plain number": lambda: scard.SCardListReaders(12345678, []),
        "SCardTransmit": lambda: scard.SCardTransmit(card, scard.SCARD_PCI_T1, ECHO),
        "SCardStatus": lambda: scard.SCardStatus(card)[0],
        "SCardIsValidContext": lambda: scard.SCardIsValidContext(context),
        "SCardCancel": lambda: scard.SCardCancel(context),
        "SCardEndTransaction": lambda: scard.SCardEndTransaction(card, scard.SCARD_LEAVE_CARD),
        "SCardDisconnect": lambda: scard.SCardDisconnect(card, scard.SCARD_UNPOWER_CARD),
        "SCardReleaseContext": lambda: scard.SCardReleaseContext(context),
        "SCardReleaseContext of a number": lambda: scard.SCardReleaseContext(12345678),
    }
    outcome = {}
    for name, call in calls.items():
        try:
            outcome[name] = call()
        except Exception as error:
            outcome[name] = [type(error).__name__, getattr(error, "function", None), str(error)]
    return outcome


def refused(outcome: dict[str, Any], who: str) -> Any:
    """Check the errors in what :func:`attempts` returned; return the other results."""
    rest = {}
    for name, value in outcome.items():
        if not (isinstance(value, list) and value[0] == "ForkUnsafeError"):
            rest[name] = value
            continue
        _, function, text = value
        assert function == ("SCardListReaders" if name == "a plain number" else name)
        for said in (function, "SCardTransmit", who, " s); ", "quiesce_timeout", "use policy 'auto'"):
            assert said in text, text
    return rest


REST = {
    "SCardIsValidContext": INVALID,
    "SCardCancel": OK,
    "SCardEndTransaction": OK,
    "SCardDisconnect": OK,
    "SCardReleaseContext": OK,
    "SCardReleaseContext of a number": INVALID,
}


@pytest.mark.parametrize("where", ["its only thread", "a thread"])
@pytest.mark.parametrize(("how", "who"), [("os.fork", "thread signing"), ("C", "thread ")])
def test_an_unquiet_fork(shared_stack: VirtualPcsc, how: str, who: str, where: str) -> None:
    """A child forked during another thread's SCardTransmit never enters the library, nor does its own child.

    Calls that are impossible raise an error that names the function and the thread that was inside.  Cleanup succeeds.
    The parent's call returns its result.  The child of the next fork, a quiet one, can do everything.
    """
    child, grandchild, entered, long_call, inside, after, seconds = run(shared_stack, unquiet, how, where)
    assert refused(child, who) == REST
    assert refused(grandchild, who) == REST
    assert (entered, inside) == ([0, 0], ["SCardTransmit"])
    assert long_call == [OK, [7, 8, 9, 0x90, 0x00]]
    assert after == WORKS
    assert 0.1 <= seconds < 5 or how == "C"


def unquiet(how: str, where: str) -> None:
    """Fork while another thread is in an SCardTransmit of 1.5 s.

    It is the only other thread, and needs no GIL then: if a thread waits for the GIL during a fork that runs no hooks,
    CPython itself hangs in the child.
    """
    watch = Watch()
    scard = watch.scard
    watch.package.configure(quiesce_timeout=0.1, policy="reestablish")
    card = watch.session()[1]
    idle, idle_card = watch.session()
    busy = Calling(scard.SCardTransmit, card, scard.SCARD_PCI_T1, [0x80, 2, 150, 0, 3, 7, 8, 9], name="signing")
    until(lambda: busy.waits, "it is inside")
    how_to_fork = os.fork if how == "os.fork" else c_fork
    began = time.monotonic()

    def tries() -> Any:
        before = len(watch.entered)
        return attempts(scard, idle, idle_card), len(watch.entered) - before, list(watch.inside.values())

    def child() -> Any:
        below = in_child(tries, fork=how_to_fork)
        # In a thread, which may have the same identifier as the parent's thread that was inside.
        return Calling(tries).answer() if where == "a thread" else tries(), below

    started = start(child, fork=how_to_fork)
    seconds = time.monotonic() - began
    (outcome, entered, inside), (below, entered_below, _) = wait_for(started)
    answer = busy.answer()
    after = in_child(works, idle, idle_card, READER, scard)
    print(json.dumps([outcome, below, [entered, entered_below], answer, inside, after, seconds]))


@pytest.mark.parametrize(
    ("how", "patience", "expected"),
    [("os.fork", "20", "works"), ("os.fork", "0.05", "refused"), ("C", "20", "refused")],
)
def test_a_fork_while_another_thread_imports(shared_stack: VirtualPcsc, how: str, patience: str, expected: str) -> None:
    """A fork waits for the imports of the first SCardEstablishContext. A child with half of them doesn't hang."""
    child, parent = run(shared_stack, importing, how, patience)
    why = "was forked while thread first was inside an import" if how != "C" else "was inside an import"
    assert child == OK if expected == "works" else why in child
    assert parent == OK


def importing(how: str, patience: str) -> None:
    """Fork while the first context is being established, and the import of wrapt takes long."""
    in_the_middle, go_on = threading.Event(), threading.Event()

    class Slow:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == "wrapt":
                in_the_middle.set()
                go_on.wait(ENOUGH)

    sys.meta_path.insert(0, Slow())
    pcsc_safe.configure(quiesce_timeout=float(patience))
    first = Calling(safe.SCardEstablishContext, safe.SCARD_SCOPE_SYSTEM, name="first")
    assert in_the_middle.wait(ENOUGH)

    def child() -> Any:
        sys.meta_path.pop(0)
        try:
            return safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[0]
        except ForkUnsafeError as error:
            return str(error)

    if patience == "20":  # the fork waits for the import
        threading.Timer(0.3, go_on.set).start()
    started = start(child, fork=os.fork if how == "os.fork" else c_fork)
    go_on.set()
    print(json.dumps([wait_for(started), first.answer()[0]]))


def test_how_long_a_fork_waits(held: VirtualPcsc) -> None:
    """A fork waits for a call for at most quiesce_timeout, or not at all if that is 0. Waits for events continue."""
    card = held.readers[0].card
    assert isinstance(card, HeldCard)
    context, reader = establish(), held.readers[2].name
    connection, waiter = connect(context, held.readers[0].name), wait(establish(), reader)
    busy = Calling(transmit, connection, HELD, name="signing")
    assert card.reached.wait(ENOUGH)

    def child() -> Any:
        with pytest.raises(ForkUnsafeError) as caught:
            establish()
        with pytest.raises(ForkUnsafeError):
            safe.SCardListReaders(context, [])
        error = pickle.loads(pickle.dumps(caught.value))
        return error.function, error.pid == os.getpid(), " inside SCard" in str(error)

    for timeout in (0, 0.3):
        pcsc_safe.configure(quiesce_timeout=timeout, policy="reestablish")
        began = time.monotonic()
        started = start(child)
        assert timeout <= time.monotonic() - began < timeout + 5
        assert wait_for(started) == ("SCardEstablishContext", True, True)
    card.go.set()
    assert busy.answer() == [OK, [7, 8, 9, 0x90, 0x00]]
    assert in_child(works, context, connection, reader) == WORKS
    until(lambda: waits_on(waiter), "the wait goes on")
    held.readers[2].remove()
    assert flags(waiter.answer()) == (OK, [(reader, CHANGED | EMPTY, [])])


@pytest.mark.native
def test_a_fork_that_can_start_no_thread(session: Session) -> None:
    """A fork that can't interrupt a wait, because no thread can be started, is unquiet, and nothing else."""

    def parent() -> Any:
        unraisable: list[Any] = []
        sys.unraisablehook = unraisable.append
        pcsc_safe.configure(quiesce_timeout=0.1)
        context = establish()
        waiter = wait(context, session.reader)
        with no_new_thread():
            function = in_child(lambda: process.current().unquiet.function)
        return unraisable, function, safe.SCardCancel(context), waiter.answer()[0]

    assert in_child(parent) == ([], "SCardGetStatusChange", OK, CANCELLED)


BLOCKED = {"auto": "a broker makes its PC/SC calls", "reestablish": "use policy 'auto', which uses a broker here"}


@pytest.mark.parametrize("policy", BLOCKED)
def test_a_fork_beside_a_connect_that_a_transaction_blocks(session: Session, policy: str) -> None:
    """A child forked while a transaction blocks SCardConnect works. Its log line names the function."""
    pcsc_safe.configure(quiesce_timeout=0.1, policy=policy)
    begun, end = os.pipe(), os.pipe()
    holder = start(in_a_transaction, session.reader, begun[1], end[0])
    os.read(begun[0], 1)
    context = establish()
    blocked = Calling(safe.SCardConnect, context, session.reader, SHARED, T1, name="connecting")
    until(lambda: stays(lambda: blocked.waits), "it is blocked in SCardConnect")
    answers, lines = in_child(lists_and_logs, context)
    os.write(end[1], b"\n")
    assert wait_for(holder) == OK
    assert blocked.answer()[0] == OK
    assert answers == (OK if policy == "auto" else "ForkUnsafeError")
    why = "was forked while thread connecting was inside SCardConnect, and can't use the native PC/SC library"
    assert [line.partition(" was")[2] for line in lines] == [f"{why}: {BLOCKED[policy]}".partition("was")[2]]
    for descriptor in (*begun, *end):
        os.close(descriptor)
    safe.SCardReleaseContext(context)


def in_a_transaction(reader: str, begun: int, end: int) -> int:
    """Hold a transaction until the pipe says so."""
    card = connect(establish(), reader)
    hresult = int(safe.SCardBeginTransaction(card))
    os.write(begun, b"\n")
    os.read(end, 1)
    return hresult + int(safe.SCardEndTransaction(card, safe.SCARD_LEAVE_CARD))


def lists_and_logs(context: Any) -> Any:
    """Use PC/SC; return the result and the warnings."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pcsc_safe").addHandler(handler)
    try:
        return safe.SCardListReaders(context, [])[0], lines
    except ForkUnsafeError as error:
        return type(error).__name__, lines


# 3. Forks that fail, are interrupted, or happen during a call.


def test_a_fork_that_fails_leaves_nothing_behind(shared_stack: VirtualPcsc) -> None:
    """After 20 os.fork() that fail (process limit) threads make calls and wait as before. The next fork works."""
    failed, waits, calls, answer, cancelled = run(shared_stack, failing)
    assert (failed, waits, calls) == (20, True, [OK] * 20)
    assert (answer, cancelled) == (WORKS, CANCELLED)


def failing() -> None:
    """Fork at the limit of processes."""
    context, waiting = establish(), establish()
    card, waiter = connect(context, READER), wait(waiting, READER)
    ready, go = threading.Semaphore(0), threading.Semaphore(0)
    calls: list[int] = []

    def call() -> None:
        while go.acquire():
            calls.append(safe.SCardListReaders(context, [])[0])
            ready.release()

    threading.Thread(target=call, daemon=True).start()
    with no_new_process():
        failed = 0
        for _ in range(20):
            try:
                if os.fork() == 0:
                    os._exit(0)
            except BlockingIOError:
                failed += 1
            go.release()
            assert ready.acquire(timeout=ENOUGH)
    answer = in_child(works, context, card, READER)
    waits = waiter.is_alive()
    until(lambda: waits_on(waiter), "the wait goes on")
    safe.SCardCancel(waiting)
    print(json.dumps([failed, waits, calls, answer, waiter.answer()[0]]))


@pytest.mark.parametrize("waits_for", ["a call", "another thread's fork"])
@pytest.mark.parametrize("what", ["KeyboardInterrupt", "SystemExit", "Alarm"])
def test_an_interrupt_while_a_fork_waits(shared_stack: VirtualPcsc, what: str, waits_for: str) -> None:
    """An exception that a signal handler raises while a fork waits is raised in the parent, after the fork.

    The fork stops waiting, its child knows that it was unquiet, and everything works afterwards.
    """
    arrived, is_early, child, answer, after = run(shared_stack, interrupted, what, waits_for)
    assert (arrived, child) == (what, "ForkUnsafeError")
    assert is_early or waits_for != "a call"  # the exception comes when no thread forks
    assert answer == [OK, [7, 8, 9, 0x90, 0x00]]
    assert after == WORKS


def interrupted(what: str, waits_for: str) -> None:
    """Fork with a timeout of 20 s, and send a signal after 0.2 s."""
    sys.unraisablehook = lambda unraisable: None
    pcsc_safe.configure(quiesce_timeout=ENOUGH, policy="reestablish")
    context, idle = establish(), establish()
    card, idle_card = connect(context, READER), connect(idle, READER)
    handlers = {"KeyboardInterrupt": signal.default_int_handler, "SystemExit": lambda *_: sys.exit(3)}
    signal.signal(signal.SIGINT, handlers.get(what, raise_alarm))
    busy = Calling(transmit, card, [0x80, 2, 255, 0, 3, 7, 8, 9])
    until(lambda: busy.waits, "it is inside")
    if waits_for != "a call":
        Calling(in_child, int)
        until(lambda: in_flight.closers, "it waits for the call")
    read_end, write_end = os.pipe()
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    arrived = None
    try:
        if os.fork() == 0:
            try:
                establish()
            except BaseException as error:
                os.write(write_end, type(error).__name__.encode())
            os._exit(0)
        for _ in range(5000):
            time.sleep(0.001)
    except BaseException as error:
        arrived = type(error).__name__
    is_early = busy.is_alive()
    child = os.read(read_end, 100).decode()
    os.wait()
    answer = busy.answer()
    after = in_child(works, idle, idle_card, READER)
    print(json.dumps([arrived, is_early, child, answer, after]))


def test_an_interrupted_fork_locks_no_import(shared_stack: VirtualPcsc) -> None:
    """Python imports ctypes to raise what a handler has raised in a hook, but neither during this fork nor the next.

    What is done before a fork after the interrupted function is done all the same.
    """
    assert run(shared_stack, imports_after_an_interrupt) == ["Alarm", True, True, 2]


def imports_after_an_interrupt() -> None:
    """Raise while a fork waits; fork in another thread when the import has begun; import in both children."""
    del sys.modules["ctypes"]
    importing, warned, arrived = threading.Event(), list[bool](), ""

    class Slow:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == "ctypes":
                importing.set()
                time.sleep(0.3)

    def imports() -> bool:
        signal.alarm(5)
        sys.meta_path.pop(0)
        return bool(importlib.import_module("ctypes"))

    sys.meta_path.insert(0, Slow())
    process.before_fork(process.WARN, lambda: warned.append(importing.wait(0.2)))
    Calling(gate.call_inside, "SCardTransmit", time.sleep, 1)
    second = Calling(lambda: importing.wait(ENOUGH) and in_child(imports))
    signal.signal(signal.SIGALRM, raise_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        first = start(imports)
        for _ in range(5000):
            time.sleep(0.001)
    except Alarm:
        arrived = "Alarm"
    print(json.dumps([arrived, wait_for(first), second.answer(), len(warned)]))


def test_an_interrupted_fork_of_one_thread(shared_stack: VirtualPcsc) -> None:
    """The import of ctypes waits for a fork without other threads, too: the fork is quiet, and its child can import."""
    assert run(shared_stack, raises_in_the_hook) == ["Alarm", [True, True]]


def raises_in_the_hook() -> None:
    """Raise at the start of the hook; give the import time to begin before the process forks."""
    del sys.modules["ctypes"]
    importing, arrived = threading.Event(), ""

    class Slow:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == "ctypes":
                importing.set()
                time.sleep(0.2)

    def child() -> Any:
        signal.alarm(5)
        sys.meta_path.pop(0)
        return process.current().unquiet is None, bool(importlib.import_module("ctypes"))

    sys.meta_path.insert(0, Slow())
    process.before_fork(process.WARN, lambda: importing.wait(0.1) and None)
    try:
        sys.settrace(RaisesInside(gate._before_fork, 0))
        forked = start(child)
        for _ in range(5000):
            time.sleep(0.001)
    except Alarm:
        arrived = "Alarm"
    print(json.dumps([arrived, wait_for(forked)]))


def test_a_signal_as_the_epoch_begins() -> None:
    """An unquiet fork isn't taken for a quiet one, whichever line of the child's first call a handler raises in."""
    pcsc_safe.configure(quiesce_timeout=0)
    may_leave, line, left = threading.Event(), 0, -1
    inside = Calling(gate.call_inside, "SCardTransmit", may_leave.wait)

    def child() -> Any:
        raises = RaisesInside(process._begin, line)
        sys.settrace(raises)
        with contextlib.suppress(Alarm):
            process.current()
        return raises.left, process.current().unquiet is not None, in_flight.calls()

    until(in_flight.calls, "it is inside")
    while left < 0:
        left, unquiet, calls = in_child(child)
        assert (unquiet, calls) == (True, []), line
        line += 1
    may_leave.set()
    assert inside.answer()
    assert line > 20


@pytest.mark.long
@pytest.mark.parametrize("threads", ["idle", "waiting"])
def test_a_signal_at_any_moment_of_a_fork(shared_stack: VirtualPcsc, threads: str) -> None:
    """Handlers that raise at 400 moments before, during and after a fork never lock other threads out."""
    calls, alarms, after = run(shared_stack, swept, threads)
    assert calls == 400
    assert alarms > 20
    assert after == WORKS


def swept(threads: str) -> None:
    """Fork with an alarm set, each time a little later."""
    sys.unraisablehook = lambda unraisable: None
    context = establish()
    card = connect(context, READER)
    if threads == "waiting":
        wait(establish(), READER)
    ready, go = threading.Semaphore(0), threading.Semaphore(0)

    def call() -> None:
        while go.acquire():
            safe.SCardListReaders(context, [])
            ready.release()

    threading.Thread(target=call, daemon=True).start()
    heap = bytearray(b"x") * (64 << 20)  # a fork that copies more page tables takes longer, so alarms hit it more often
    alarms = calls = 0
    others = len(os.listdir("/proc/self/task"))  # _thread._count() counts only those that already run
    began = time.monotonic()
    if os.fork() == 0:
        os._exit(0)
    longest = 1.5 * (time.monotonic() - began)
    for number in range(400):
        signal.signal(signal.SIGALRM, raise_alarm)
        try:
            signal.setitimer(signal.ITIMER_REAL, longest * (number + 1) / 400)
            if os.fork() == 0:
                os._exit(0)
            time.sleep(2 * longest)
            # A thread raises an exception of a hook, a moment after the fork.
            while len(os.listdir("/proc/self/task")) > others:
                time.sleep(0.0005)
            time.sleep(0.0005)
        except Alarm:
            alarms += 1
        # The signal may have been sent to another thread, which has not run since.
        for end in (
            partial(signal.setitimer, signal.ITIMER_REAL, 0),
            partial(signal.signal, signal.SIGALRM, signal.SIG_IGN),
        ):
            with contextlib.suppress(Alarm):
                end()
        with contextlib.suppress(ChildProcessError):
            os.wait()
        go.release()
        if not ready.acquire(timeout=5):
            break
        calls += 1
    del heap
    # in_child alone would not show it: a gate that is closed is closed for the main thread too.
    after = in_child(works, context, card, READER) if calls == 400 else []
    print(json.dumps([calls, alarms, after]), flush=True)
    os._exit(0)


@before_3_10
@pytest.mark.parametrize("where", ["idle", "in a transaction"])
def test_an_exception_in_the_middle_of_calls(shared_stack: VirtualPcsc, where: str) -> None:
    """After exceptions of handlers at any moment of the main thread's calls, other threads can use the context."""
    calls, alarms, after = run(shared_stack, interrupted_calls, where)
    assert calls == 1000
    assert alarms > 500
    assert after == WORKS


def interrupted_calls(where: str) -> None:
    """Make calls in the main thread with an alarm set; then check that another thread can."""
    context = establish()
    card = connect(context, READER)
    if where == "in a transaction":
        assert safe.SCardBeginTransaction(card) == 0
    ready, go = threading.Semaphore(0), threading.Semaphore(0)

    def call() -> None:
        while go.acquire():
            safe.SCardListReaders(context, [])
            ready.release()

    threading.Thread(target=call, daemon=True).start()
    signal.signal(signal.SIGALRM, raise_alarm)
    alarms = calls = 0
    for _ in range(1000):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00005, 0.0005))
            while True:
                safe.SCardIsValidContext(context)
                safe.SCardListReaderGroups(context)
                safe.SCardGetStatusChange(context, 0, [(READER, 0)])
                safe.SCardStatus(card)
        except Alarm:
            alarms += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        go.release()
        if not ready.acquire(timeout=5):
            break
        calls += 1
    if where == "in a transaction":
        assert safe.SCardEndTransaction(card, safe.SCARD_LEAVE_CARD) == 0
    after = in_child(works, context, card, READER) if calls == 1000 else []
    print(json.dumps([calls, alarms, after]), flush=True)
    os._exit(0)


@before_3_10
@pytest.mark.parametrize("threads", ["alone", "with threads"])
def test_signal_handlers_that_fork(shared_stack: VirtualPcsc, threads: str) -> None:
    """300 forks by a signal handler, at any moment of the main thread's calls, make no result wrong.

    A child may work in the handler, or return from it into the call in which it was forked.  In both cases it gets
    what the policy says.
    """
    done = in_program(forking_handler, threads, env=shared_stack.env, timeout=180)
    assert done.returncode == 0, done.stderr
    wrong, statuses, forks, after = json.loads(done.stdout)
    errors = done.stderr
    assert wrong == []
    assert statuses == {"0": forks}, errors
    assert forks >= 300
    assert after == WORKS


def forking_handler(threads: str) -> None:
    """The program."""
    context, me = establish(), os.getpid()
    card = connect(context, READER)
    wrong: list[Any] = []
    statuses: dict[int, int] = {}
    if threads == "with threads":
        wait(establish(), READER)
        other = establish()
        threading.Thread(target=lambda: keep_calling(other, wrong), daemon=True).start()

    def handler(*_: Any) -> None:
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            if random.random() < 0.5:
                os._exit(works(context, card, READER) != WORKS)
            return
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0002, 0.003))

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    forks = 0
    while forks < 300:
        data = [random.randrange(256) for _ in range(3)]
        answers = [
            transmit(card, [0x80, 1, 0, 0, 3, *data]),
            safe.SCardIsValidContext(context),
            safe.SCardListReaders(context, [])[0],
            safe.SCardGetStatusChange(context, 1, [(READER, PRESENT)])[0],
        ]
        right = [[OK, [*data, 0x90, 0x00]], OK, OK, TIMED_OUT]
        if os.getpid() != me:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            fine = [got == want or got == [RESET, []] for got, want in zip(answers, right)]
            if not all(fine):
                sys.stderr.write(f"{answers}\n")
            os._exit(2 * (not all(fine)) + (works(context, card, READER) != WORKS))
        if answers != right:
            wrong.append(answers)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                status = os.waitstatus_to_exitcode(ended[1])
                statuses[status] = statuses.get(status, 0) + 1
                forks += 1
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # the timer alone is not enough, because the handler may set it again
    if os.getpid() != me:  # a child of the last fork, after the last calls
        os._exit(0)
    with contextlib.suppress(ChildProcessError):
        while True:
            status = os.waitstatus_to_exitcode(os.wait()[1])
            statuses[status] = statuses.get(status, 0) + 1
            forks += 1
    after = in_child(works, context, card, READER)
    print(json.dumps([wrong, statuses, forks, after]), flush=True)
    os._exit(0)


def keep_calling(context: Any, wrong: list[Any]) -> None:
    while True:
        answer = safe.SCardListReaders(context, [])[0]
        if answer != OK:
            wrong.append(answer)


CALLS_TO_FORK_IN = [
    *(("owner", call, call) for call in (
        "SCardEstablishContext", "SCardListReaders", "SCardGetStatusChange", "SCardConnect",
        "SCardReconnect", "SCardTransmit", "SCardStatus", "SCardBeginTransaction", "SCardEndTransaction",
        "SCardDisconnect", "SCardReleaseContext",
    )),
    *(("child", call, "SCardEstablishContext") for call in (
        "SCardEstablishContext", "SCardListReaders", "SCardIsValidContext", "SCardGetStatusChange", "SCardConnect",
        "SCardReconnect", "SCardTransmit",
    )),
    *(("child", call, "SCardConnect") for call in ("SCardReconnect", "SCardTransmit", "SCardStatus")),
]  # fmt: skip


@pytest.mark.parametrize(("generation", "call", "native"), CALLS_TO_FORK_IN)
def test_a_fork_as_a_call_returns(shared_stack: VirtualPcsc, generation: str, call: str, native: str) -> None:
    """A signal handler forks as soon as a call is out of the library: both processes continue that call.

    The child then has none of the parent's connections and can do everything, and the parent is unaffected.  The same
    holds if the process that forks is itself a child that is just getting its own context or card.
    """
    parent, child = run(shared_stack, forks_as_it_returns, generation, call, native)
    # A card that the parent connected is an inherited one in the child.
    assert child.pop("answer") == OK
    assert child == {"works": WORKS, "shared": []}
    assert parent == {"answer": OK, "works": WORKS}


def forks_as_it_returns(generation: str, call: str, native: str) -> None:
    """The program."""
    watch = Watch()
    before = sockets("self")
    context, card = watch.session()
    if generation == "child":
        watch.package.configure(cards="reconnect")
        print(json.dumps(in_child(forks_in, watch, call, native, context, card, before)))
    else:
        print(json.dumps(forks_in(watch, call, native, context, card, before)))


def forks_in(watch: Watch, call: str, native: str, context: Any, card: Any, before: set[str]) -> Any:
    """Make a call; fork as a native part of it returns; return what both can do, and what they share."""
    scard, pids = watch.scard, []
    read_end, write_end = os.pipe()

    def at_return(name: str) -> None:
        if name == native and not pids:
            pids.append(os.fork())

    if call == "SCardEndTransaction":
        scard.SCardBeginTransaction(card)
    made: dict[str, Callable[[], Any]] = {
        "SCardEstablishContext": lambda: scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM),
        "SCardListReaders": lambda: scard.SCardListReaders(context, [])[0],
        "SCardIsValidContext": lambda: scard.SCardIsValidContext(context),
        "SCardGetStatusChange": lambda: scard.SCardGetStatusChange(context, 0, [(READER, 0)])[0],
        "SCardConnect": lambda: scard.SCardConnect(context, READER, SHARED, T1),
        "SCardReconnect": lambda: scard.SCardReconnect(card, SHARED, T1, scard.SCARD_LEAVE_CARD)[0],
        "SCardTransmit": lambda: scard.SCardTransmit(card, scard.SCARD_PCI_T1, ECHO)[0],
        "SCardStatus": lambda: scard.SCardStatus(card)[0],
        "SCardBeginTransaction": lambda: scard.SCardBeginTransaction(card),
        "SCardEndTransaction": lambda: scard.SCardEndTransaction(card, scard.SCARD_LEAVE_CARD),
        "SCardDisconnect": lambda: scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD),
        "SCardReleaseContext": lambda: scard.SCardReleaseContext(context),
    }
    watch.at_return = at_return
    try:
        answer = made[call]()
    finally:
        watch.at_return = lambda name: None
        is_child = pids == [0]
        if is_child:
            signal.alarm(20)
            sys.excepthook = lambda *error: (sys.__excepthook__(*error), os._exit(1))
    if call in ("SCardEstablishContext", "SCardConnect"):
        answer, handle, *_ = answer
        context, card = (handle, None) if call == "SCardEstablishContext" else (context, handle)
    if call == "SCardBeginTransaction":
        scard.SCardEndTransaction(card, scard.SCARD_LEAVE_CARD)
    outcome: dict[str, Any] = {"answer": answer, "works": works_with(watch, call, context, card)}
    if is_child:
        # What it still shares with its parent, also after it has its own context.
        outcome["shared"] = sorted((sockets("self") & sockets(str(os.getppid()))) - before)
        os.write(write_end, json.dumps(outcome).encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        said = pipe.read()
    assert pids, f"{native} was not called"
    os.waitpid(pids[0], 0)
    return outcome, json.loads(said) if said else {"answer": "none"}


def works_with(watch: Watch, call: str, context: Any, card: Any) -> Any:
    """Call :func:`works` on the handles that the call leaves."""
    scard = watch.scard
    if call == "SCardReleaseContext":
        context, card = watch.session()
    elif card is None or call == "SCardDisconnect":
        hresult, card, _ = scard.SCardConnect(context, READER, SHARED, T1)
        assert hresult == OK, hresult
    return works(context, card, READER, scard)


def sockets(process: str) -> set[str]:
    """Return the names of a process's sockets; of this process only those that are connected."""
    found = set()
    for number in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/{process}/fd/{number}")
            if name.startswith("socket:") and (process != "self" or leads_somewhere(int(number))):
                found.add(name)
    return found


def leads_somewhere(number: int) -> bool:
    with socket.socket(fileno=os.dup(number)) as duplicate, contextlib.suppress(OSError):
        return bool(duplicate.getpeername())
    return False


def test_a_fork_in_a_forks_own_wait(shared_stack: VirtualPcsc) -> None:
    """A signal handler forks while the main thread's fork waits for a call in flight: both forks are quiet."""
    inner, outer, wrong = run(shared_stack, nested)
    assert inner == [WORKS] * 10
    assert outer == [WORKS] * 10
    assert wrong == []


def nested() -> None:
    """The program."""
    pcsc_safe.configure(quiesce_timeout=ENOUGH)
    context, other = establish(), establish()
    card, long_card = connect(context, READER), connect(other, READER)
    wrong: list[Any] = []
    for _ in range(4):
        wait(establish(), READER)
        threading.Thread(target=keep_calling, args=(establish(), wrong), daemon=True).start()
    inner: list[Any] = []
    outer: list[Any] = []
    signal.signal(signal.SIGALRM, lambda *_: inner.append(start(works, context, card, READER)))
    for _ in range(10):
        busy = Calling(transmit, long_card, [0x80, 2, 10, 0, 0])
        until(lambda busy=busy: busy.waits, "it is inside")  # type: ignore[misc]
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        outer.append(start(works, context, card, READER))
        busy.answer()
        until(lambda: len(inner) == len(outer), "the handler has run")
    print(json.dumps([[wait_for(child) for child in inner], [wait_for(child) for child in outer], wrong]), flush=True)
    os._exit(0)


def test_many_threads_fork_at_once(session: Session) -> None:
    """Eight threads fork ten times each, beside others that make calls and wait. Every child can do everything."""
    stop, barrier = threading.Event(), threading.Barrier(8)
    waiter, other = wait(waiting := establish(), session.reader), establish()

    def calls() -> set[int]:
        seen = set()
        while not stop.is_set():
            seen.add(safe.SCardListReaders(other, [])[0])
        return seen

    def forks() -> Any:
        barrier.wait()
        return [in_child(works, session.context, session.card, session.reader) for _ in range(10)]

    calling = [Calling(calls) for _ in range(2)]
    forking = [Calling(forks) for _ in range(8)]
    assert [thread.answer() for thread in forking] == [[WORKS] * 10] * 8
    stop.set()
    assert [thread.answer() for thread in calling] == [{OK}] * 2
    until(lambda: waits_on(waiter), "the wait goes on")
    assert safe.SCardCancel(waiting) == OK
    assert waiter.answer()[0] == CANCELLED
    assert [safe.SCardReleaseContext(context) for context in (waiting, other)] == [OK, OK]


def test_a_preexec_fn(session: Session) -> None:
    """Subprocess with a preexec_fn is a fork like any other, also beside waits, calls and other such forks."""
    waiter = wait(waiting := establish(), session.reader)

    def runs() -> set[int]:
        return {
            subprocess.run(
                ["true"], preexec_fn=lambda: safe.SCardReleaseContext(session.context), timeout=ENOUGH
            ).returncode
            for _ in range(10)
        }

    with pytest.MonkeyPatch.context() as patch:
        if sys.version_info >= (3, 12):
            patch.setattr("warnings.warn", lambda *_, **__: None)
        threads = [Calling(runs) for _ in range(3)]
        for _ in range(20):
            session.assert_untouched()
        assert [thread.answer() for thread in threads] == [{0}] * 3
    until(lambda: waits_on(waiter), "the wait goes on")
    assert safe.SCardCancel(waiting) == OK
    assert waiter.answer()[0] == CANCELLED
    safe.SCardReleaseContext(waiting)


# 7. Programs without threads.


def test_a_program_without_threads_gets_none(shared_stack: VirtualPcsc) -> None:
    """pcsc_safe starts no thread in a program that has none: no DeprecationWarning at its forks (Python 3.12)."""
    done = in_program(single_threaded, env={**shared_stack.env, "PYTHONWARNINGS": "error::DeprecationWarning"})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [[WORKS] * 3, [1, 1], OK]


def single_threaded() -> None:
    """Use contexts, fork, re-establish, fork in the child."""
    session = Session()
    counts = [threading.active_count()]

    def child() -> Any:
        below = in_child(works, session.context, session.card, session.reader, fork=os.fork)
        return [below, works(session.context, session.card, session.reader)]

    answers = in_child(child, fork=os.fork)
    answers.append(in_child(works, session.context, session.card, session.reader, fork=os.fork))
    session.assert_untouched()
    counts.append(threading.active_count())
    print(json.dumps([answers, counts, safe.SCardReleaseContext(session.context)]))


def fork_while_a_thread_establishes() -> None:
    """Print which call was inside, in a child and a grandchild; the function blocks in the native library."""
    inside, may_leave = threading.Event(), threading.Event()

    def establish(scope: int) -> Any:
        inside.set()
        may_leave.wait(ENOUGH)
        return [safe.SCARD_E_NO_SERVICE, 0]

    safe.SCardReleaseContext(safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1])
    pcsc_safe.configure(quiesce_timeout=0.2)
    pyscard.raw["SCardEstablishContext"] = establish

    def forked(then: Callable[[], None]) -> None:
        inside.clear()
        may_leave.clear()
        thread = threading.Thread(target=safe.SCardEstablishContext, args=(safe.SCARD_SCOPE_SYSTEM,))
        thread.start()
        assert inside.wait(ENOUGH)
        pid = fork()
        if pid == 0:
            unquiet = process.current().unquiet
            print(unquiet.function if unquiet else None, flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        may_leave.set()
        thread.join()
        then()

    def again_in_a_child() -> None:
        pid = fork()
        if pid == 0:
            process.current()
            forked(lambda: os._exit(0))
        os.waitpid(pid, 0)

    forked(again_in_a_child)


def test_establishing_is_waited_for_in_every_generation(shared_stack: VirtualPcsc) -> None:
    """A fork during SCardEstablishContext is unquiet, whether the first process or its child forks."""
    done = in_program(fork_while_a_thread_establishes, env={**os.environ, **shared_stack.env})
    assert (done.stdout.split(), done.returncode) == (["SCardEstablishContext"] * 2, 0), done.stderr
