"""The native contexts behind a PC/SC context: how many there are, and that none stays locked or is lost.

The programs run outside of pytest, each with its own stack, so that their signal handlers, timers and collections
disturb nothing else.  Their faults need no fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import logging
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from calling import Calling, connect, establish, stays, until, waits_on
from conftest import ECHO, Session
from forking import fork, in_child, in_program
from interrupts import Alarm, RaisesInside, before_3_10

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import descriptors, handles, in_flight, new_handles, process, recovery, reestablish, router
from pcsc_safe._native import contexts, native_context, pyscard
from pcsc_safe.broker.connection import Connection
from pcsc_safe.testing import EchoCard, VirtualPcsc
from pcsc_safe.testing._stack import _connections

OK, CANCELLED, TIMED_OUT = safe.SCARD_S_SUCCESS, safe.SCARD_E_CANCELLED, safe.SCARD_E_TIMEOUT
LEAVE, PRESENT = safe.SCARD_LEAVE_CARD, safe.SCARD_STATE_PRESENT
RIGHT = [OK, [1, 2, 3, 0x90, 0x00]]


def told(program: Callable[..., Any], *arguments: str, cards: Any = None, timeout: float = 60) -> Any:
    """Return what a program of this module printed as JSON, on its own stack; PCSCD is the process number of pcscd."""
    cards = cards or [EchoCard(), EchoCard()]
    with VirtualPcsc(len(cards), cards, activate=False) as stack:
        done = in_program(
            program, *arguments, env={**os.environ, **stack.env, "PCSCD": str(stack.pid)}, timeout=timeout
        )
        assert done.returncode == 0, done.stderr
        stack.wait_for_clients(0)
    return json.loads(done.stdout.splitlines()[-1])


def transmit(card: Any) -> Any:
    return safe.SCardTransmit(card, safe.SCARD_PCI_T1, ECHO)


def waiting(context: Any, reader: str) -> Calling:
    """Start a thread that waits for events; return when it waits."""
    waiter = Calling(safe.SCardGetStatusChange, context, safe.INFINITE, [(reader, PRESENT)])
    until(lambda: waits_on(waiter), "it waits")
    return waiter


# 1. Never more than raw pyscard: one for a thread and a card, one more for each other card, one more for each wait.


def nothing(context: Any, readers: list[str]) -> Callable[[], Any]:
    return lambda: None


def lists(context: Any, readers: list[str]) -> Callable[[], Any]:
    assert safe.SCardListReaders(context, [])[0] == OK
    return lambda: None


def one_card(context: Any, readers: list[str]) -> Callable[[], Any]:
    card = connect(context, readers[0])
    assert transmit(card) == RIGHT
    assert safe.SCardListReaders(context, [])[0] == OK
    assert safe.SCardGetStatusChange(context, 0, [(readers[0], 0)])[0] == OK
    return lambda: safe.SCardDisconnect(card, LEAVE)


def one_card_again_and_again(context: Any, readers: list[str]) -> Callable[[], Any]:
    for _ in range(5):
        one_card(context, readers)()
    return lambda: None


def one_card_in_turn_by_threads(context: Any, readers: list[str]) -> Callable[[], Any]:
    card = connect(context, readers[0])
    threads = [Calling(lambda: [transmit(card) for _ in range(20)]) for _ in range(4)]
    assert all(thread.answer() == [RIGHT] * 20 for thread in threads)
    return lambda: None


def two_cards(context: Any, readers: list[str]) -> Callable[[], Any]:
    cards = [connect(context, reader) for reader in readers[:2]]
    assert [transmit(card) for card in cards] == [RIGHT] * 2
    return lambda: [safe.SCardDisconnect(card, LEAVE) for card in cards]


def a_wait(context: Any, readers: list[str]) -> Callable[[], Any]:
    waiter = waiting(context, readers[0])
    return lambda: (safe.SCardCancel(context), waiter.answer())


def waits_one_after_another(context: Any, readers: list[str]) -> Callable[[], Any]:
    for _ in range(5):
        assert safe.SCardGetStatusChange(context, 5, [(readers[0], PRESENT)])[0] == TIMED_OUT
    return lambda: None


def a_card_and_a_wait(context: Any, readers: list[str]) -> Callable[[], Any]:
    card, end = connect(context, readers[0]), a_wait(context, readers)
    assert transmit(card) == RIGHT
    return end


def cancelled_waits(context: Any, readers: list[str]) -> Callable[[], Any]:
    for _ in range(5):
        a_wait(context, readers)()
    return lambda: None


TYPICAL = {
    nothing: 1,
    lists: 1,
    one_card: 1,
    one_card_again_and_again: 1,
    one_card_in_turn_by_threads: 1,
    two_cards: 2,
    a_wait: 1,
    waits_one_after_another: 1,
    a_card_and_a_wait: 2,
    cancelled_waits: 1,
}


@pytest.mark.native
@pytest.mark.parametrize("program", TYPICAL, ids=lambda program: program.__name__)
def test_clients_of_typical_programs(pcsc_stack: VirtualPcsc, program: Callable[..., Any]) -> None:
    """Each thing in progress has one connection to pcscd, in the parent and in a child. A release closes all."""
    readers = [reader.name for reader in pcsc_stack.readers]
    context = establish()
    end = program(context, readers)
    pcsc_stack.wait_for_clients(TYPICAL[program])

    def child() -> int:
        assert safe.SCardListReaders(context, [])[0] == OK
        made = len(context._self_record.real.natives)
        assert safe.SCardReleaseContext(context) == OK
        return made

    assert in_child(child) == 1
    end()
    assert safe.SCardReleaseContext(context) == OK
    pcsc_stack.wait_for_clients(0)


@pytest.mark.native
def test_clients_after_a_handover(pcsc_stack: VirtualPcsc) -> None:
    """A handover transfers all native contexts. They end with the child."""
    readers = [reader.name for reader in pcsc_stack.readers]
    context = establish()
    cards = [connect(context, reader) for reader in readers]

    def handing_over() -> int:
        with pcsc_safe.handover():
            return fork()

    assert in_child(lambda: ([transmit(card) for card in cards], pcsc_stack.clients()), fork=handing_over) == (
        [RIGHT] * 2,
        2,
    )
    pcsc_stack.wait_for_clients(0)
    assert safe.SCardReleaseContext(context) == OK


@pytest.mark.native
def test_connections_in_the_order_of_their_numbers(pcsc_stack: VirtualPcsc) -> None:
    """Each native context knows its own connection, even if other threads open and close files at the same time."""
    stop = threading.Event()

    def opens() -> None:
        while not stop.is_set():
            os.close(os.open(os.devnull, os.O_RDONLY))

    threads = [Calling(opens) for _ in range(2)]
    contexts = [establish() for _ in range(40)]
    stop.set()
    for thread in threads:
        thread.answer()
    found = [descriptor for context in contexts for descriptor in context._self_record.real.descriptors()]
    assert len({descriptor.inode for descriptor in found}) == 40
    assert all(descriptor.is_intact() for descriptor in found)
    for context in contexts:
        safe.SCardReleaseContext(context)


@pytest.mark.native
@pytest.mark.not_on_macos("its connections have no descriptors")
def test_a_release_while_another_thread_cuts_the_connection(pcsc_stack: VirtualPcsc) -> None:
    """A thread that finds pcscd ended puts no dead socket in the place of a file that another thread has opened."""

    def client() -> Any:
        record = establish()._self_record
        contexts, files, dup2 = record.real, list[int](), os.dup2
        contexts.establish(record)  # a surplus one, as after two calls at the same time

        def after_another_thread(source: int, number: int, inheritable: bool = True) -> int:
            if number == surplus.number:
                Calling(contexts.release_idle).answer()
                files.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(number))
            return dup2(source, number, inheritable)

        surplus = contexts.descriptors()[1]
        os.dup2 = after_another_thread
        handles.mark_lost(record, contexts, process.SERVICE_LOST)
        os.dup2 = dup2
        return {os.readlink(f"/proc/self/fd/{file}") for file in files}

    assert in_child(client) == {os.devnull}


# 2. Handlers that raise.


class AlarmError(Exception):
    """Raised by a signal handler."""


BUILTIN = [IndexError, OSError, RuntimeError, TimeoutError, TypeError, ValueError]
ALARMS = [AlarmError, *(type(f"Alarm{kind.__name__}", (AlarmError, kind), {}) for kind in BUILTIN)]
"""What the handlers raise; also exceptions of types that code in between may catch for another reason.

A KeyError isn't here: os.environ.get() catches it.
"""


def raise_alarm(*_: object) -> None:
    raise random.choice(ALARMS)


def held() -> dict[str, Any]:
    """Return what is held in this process now: nothing, if no call is in progress."""
    from pcsc_safe._core import in_flight
    from pcsc_safe._native import contexts, releasing

    free = []
    for place in in_flight.places:
        acquire, _, _, release = place.steps
        free.append(acquire(True, 0))
        release()
    return {
        "in flight": len(in_flight.calls()),
        "locked": free.count(False),
        "doomed": len(releasing.awaiting_release),
        "natives": sum(isinstance(place, contexts.NativeContext) for place in in_flight.places),
    }


def interrupted(how_many: str, where: str) -> None:
    """Program: alarms at random moments in every function of the table; then print what is held and what works."""
    from pcsc_safe._core import handles

    wanted = int(how_many)
    if where == "broker":
        pcsc_safe.configure(broker="always")
    context = establish()
    readers = safe.SCardListReaders(context, [])[1]
    card = connect(context, readers[0])
    waiter = waiting(context, readers[1]) if where == "beside a wait" else None
    if where == "in a transaction":
        assert safe.SCardBeginTransaction(card) == OK

    def establish_and_release() -> None:
        hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
        if hresult == OK:  # pyscard's functions raise SystemError for the handle 0
            safe.SCardReleaseContext(context)

    def connect_and_disconnect() -> None:
        hresult, card, _ = safe.SCardConnect(context, readers[1], safe.SCARD_SHARE_SHARED, 3)
        if hresult == OK:
            safe.SCardDisconnect(card, LEAVE)

    def transaction() -> None:
        safe.SCardBeginTransaction(card)
        safe.SCardEndTransaction(card, LEAVE)

    calls: list[Callable[[], Any]] = [
        lambda: safe.SCardIsValidContext(context),
        lambda: safe.SCardListReaders(context, []),
        lambda: safe.SCardListReaderGroups(context),
        lambda: safe.SCardGetStatusChange(context, 0, [(readers[0], 0)]),
        lambda: safe.SCardGetStatusChange(context, 2, [(readers[0], PRESENT)]),
        lambda: safe.SCardGetStatusChange(context, 101, [(readers[0], PRESENT)]),  # run by another thread
        lambda: safe.SCardStatus(card),
        lambda: transmit(card),
        lambda: safe.SCardControl(card, 1, []),
        lambda: safe.SCardGetAttrib(card, 1),
        lambda: safe.SCardReconnect(card, safe.SCARD_SHARE_SHARED, 3, LEAVE),
        establish_and_release,
        connect_and_disconnect,
        transaction,
    ]
    signal.signal(signal.SIGALRM, raise_alarm)
    alarms = lost = 0
    while alarms < wanted:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.002))
            for _ in range(1000):
                random.choice(calls)()
            lost += 1
        except AlarmError:
            alarms += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    noted = handles.cards[card].transactions
    if where != "broker":
        assert [safe.SCardEndTransaction(card, LEAVE) for _ in range(noted)] == [OK] * noted
    for _ in range(100):
        if safe.SCardEndTransaction(card, LEAVE) != OK:
            break
        assert where == "broker"
    works = [Calling(call, *arguments).answer()[0] for call, *arguments in (
        (safe.SCardListReaders, context, []), (transmit, card), (safe.SCardStatus, card),
    )]  # fmt: skip
    answers = None
    if waiter is not None:
        answers = [waiter.is_alive(), safe.SCardCancel(context), waiter.answer()[0]]
    for handle, record in list(handles.cards.items()):
        if record.reader == readers[1]:
            safe.SCardDisconnect(handle, LEAVE)
    # A broker can still be undoing the last call.
    until(lambda: safe.SCardConnect(context, readers[1], safe.SCARD_SHARE_EXCLUSIVE, 3)[0] == OK, "it is not connected")
    for handle in list(handles.contexts):
        safe.SCardReleaseContext(handle)
    print(json.dumps([works, answers, lost, held(), len(handles.contexts), len(handles.cards)]))


NOTHING = {"in flight": 0, "locked": 0, "doomed": 0, "natives": 0}


@pytest.mark.skipif(sys.version_info < (3, 10), reason="CPython 3.9 runs handlers between any two instructions")
@pytest.mark.parametrize("alarms", [100, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("where", ["idle", "in a transaction", "beside a wait", "broker"])
def test_handlers_that_raise(where: str, alarms: int) -> None:
    """The program gets what a handler raises, at any moment. Everything works afterwards, and nothing stays locked."""
    works, answers, lost, held, contexts, cards = told(interrupted, str(alarms), where, timeout=60 + alarms / 10)
    assert works == [OK, OK, OK]
    assert answers == ([True, OK, CANCELLED] if where == "beside a wait" else None)
    assert (lost, held, contexts, cards) == (0, NOTHING, 0, 0)


@before_3_10
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # a connection to the broker is closed by its finalizer
@pytest.mark.parametrize("broker", ["on-fork", "always"])
@pytest.mark.parametrize("function", ["SCardEstablishContext", "SCardConnect"])
def test_a_signal_at_any_line_leaves_no_handle(function: str, broker: str, shared_stack: VirtualPcsc) -> None:
    """A context or card that the application doesn't get is given up, whichever line a handler raises in."""

    def child() -> int:
        pcsc_safe.configure(broker=broker)
        context = establish()
        reader = safe.SCardListReaders(context, [])[1][0]
        inside, call, give_up = {
            "SCardEstablishContext": (
                new_handles.establish,
                lambda: safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM),
                safe.SCardReleaseContext,
            ),
            "SCardConnect": (
                new_handles.connect,
                lambda: safe.SCardConnect(context, reader, safe.SCARD_SHARE_EXCLUSIVE, 3),
                lambda card: safe.SCardDisconnect(card, LEAVE),
            ),
        }[function]
        known, clients = (set(handles.contexts), set(handles.cards)), shared_stack.clients()
        line, left = 0, -1
        while left < 0:
            raises = RaisesInside(inside, line)
            sys.settrace(raises)
            with contextlib.suppress(Alarm):
                hresult, handle, *_ = call()
                assert (hresult, give_up(handle)) == (OK, OK), line
            sys.settrace(None)
            left = raises.left
            assert (set(handles.contexts), set(handles.cards)) == known, line
            until(lambda: shared_stack.clients() <= clients, "nothing is left")
            line += 1
        return line

    assert in_child(child) > 20


@before_3_10
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    "function", ["SCardBeginTransaction", "SCardEndTransaction", "SCardDisconnect", "SCardReleaseContext"]
)
def test_a_signal_at_any_line_of_a_call_through_a_broker(function: str, shared_stack: VirtualPcsc) -> None:
    """No transaction, card or context is left, whichever line of a call a handler raises in, if cleanup is repeated."""

    def child() -> int:
        pcsc_safe.configure(broker="always")
        other = establish()
        known, known_cards = set(handles.contexts), set(handles.cards)
        clients, reader = shared_stack.clients(), safe.SCardListReaders(other, [])[1][0]
        line, left = 0, -1
        while left < 0:
            context = establish()
            card = connect(context, reader)
            begin, end, disconnect, release = (
                partial(call, *arguments)
                for call, *arguments in (
                    (safe.SCardBeginTransaction, card),
                    (safe.SCardEndTransaction, card, LEAVE),
                    (safe.SCardDisconnect, card, LEAVE),
                    (safe.SCardReleaseContext, context),
                )
            )
            if function == "SCardEndTransaction":
                assert begin() == OK
            raises = RaisesInside(router._through_broker, line)
            sys.settrace(raises)
            with contextlib.suppress(Alarm):
                {
                    "SCardBeginTransaction": begin,
                    "SCardEndTransaction": end,
                    "SCardDisconnect": disconnect,
                    "SCardReleaseContext": release,
                }[function]()
            sys.settrace(None)
            left = raises.left
            if function == "SCardEndTransaction":
                end()
            elif function == "SCardBeginTransaction":  # what is noted can be ended
                assert [end() for _ in range(handles.cards[card].transactions)] in ([], [OK]), line
            assert card not in handles.cards or handles.cards[card].transactions == 0, line
            rival = connect(other, reader)  # waits as long as a transaction is open
            safe.SCardDisconnect(rival, LEAVE)
            disconnect()
            assert set(handles.cards) == known_cards, line
            release()
            assert set(handles.contexts) == known, line
            until(lambda: shared_stack.clients() <= clients, "nothing is left")
            line += 1
        return line

    assert in_child(child) > 20


@before_3_10
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_signal_when_a_transaction_ends_in_a_broker(shared_stack: VirtualPcsc) -> None:
    """A handler that raises while the program waits for the reply: the transaction counts as ended, as it is."""

    def child() -> Any:
        pcsc_safe.configure(broker="always")
        context = establish()
        card = connect(context, safe.SCardListReaders(context, [])[1][0])
        assert safe.SCardBeginTransaction(card) == OK
        receive = Connection.receive

        def interrupted(connection: Connection) -> bytes:
            receive(connection)
            raise Alarm

        Connection.receive = interrupted  # type: ignore[method-assign]
        with pytest.raises(Alarm):
            safe.SCardEndTransaction(card, LEAVE)
        Connection.receive = receive  # type: ignore[method-assign]
        return handles.cards[card].transactions, handles.cards[card].session.is_in_transaction()

    assert in_child(child) == (0, False)


# 3. Handlers, finalizers and other threads' exceptions that use PC/SC, or wait for a thread that does.


class SlowReset(EchoCard):
    """An EchoCard that takes 1.2 s for a reset, and for INS 03."""

    def power_on(self) -> None:
        super().power_on()
        time.sleep(1.2)

    reset = power_on

    def apdu(self, command: bytes) -> bytes:
        if command[1] == 0x03:
            time.sleep(1.2)
        return super().apdu(command)


def interrupted_after(function: str, turn: str) -> None:
    """Program: a signal arrives during a call, and its handler raises when the call has been made."""
    from pcsc_safe._core import handles
    from pcsc_safe._native.contexts import native_contexts_of

    signal.signal(signal.SIGALRM, raise_alarm)
    context = establish()
    reader = safe.SCardListReaders(context, [])[1][0]
    card = connect(context, reader)
    record = handles.cards[card]
    session = record.session
    assert safe.SCardBeginTransaction(card) == OK
    arguments = (safe.SCARD_SHARE_SHARED, 3) if function == "SCardReconnect" else ()
    other = Calling(safe.SCardTransmit, card, safe.SCARD_PCI_T1, [0x80, 3, 0, 0]) if turn == "waits" else None
    if other is not None:
        until(lambda: waits_on(other), "it waits")
    signal.setitimer(signal.ITIMER_REAL, 0.6 if other is None else 1.8)
    with contextlib.suppress(AlarmError):
        print("not interrupted:", getattr(safe, function)(card, *arguments, safe.SCARD_RESET_CARD))
    # The other two calls may use another native context, which a handler can keep from being released until the next.
    natives = len(native_contexts_of(record.context).natives) if function == "SCardDisconnect" else None
    print(
        json.dumps(
            [
                card in handles.cards,
                record.transactions,
                record.session is session,
                natives,
                safe.SCardEndTransaction(card, LEAVE),
            ]
        )
    )


@pytest.mark.parametrize("turn", ["is free", "waits"])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("SCardDisconnect", [False, 0, True, 1, safe.SCARD_E_INVALID_HANDLE]),
        ("SCardEndTransaction", [True, 0, False, None, safe.SCARD_W_RESET_CARD]),
        ("SCardReconnect", [True, 1, False, None, OK]),
    ],
)
def test_a_handler_that_raises_after_a_call(function: str, turn: str, expected: list[Any]) -> None:
    """What the call has changed in pcscd is known afterwards: the card, its session, and the open transactions."""
    assert told(interrupted_after, function, turn, cards=[SlowReset()]) == expected


@before_3_10
@pytest.mark.parametrize("how", ["if it is free", "in turn"])
def test_a_handler_that_raises_after_an_exception(how: str) -> None:
    """If a call raises TypeError, and a handler raises while that is handled, the native context is free again."""
    done = in_program(raises_twice, how)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], True]


def raises_twice(how: str) -> None:
    class Here:
        owner = process.here

    signal.signal(signal.SIGUSR1, raise_alarm)
    place = in_flight.Place()
    # The signal is pending when the second call raises, all in one step.
    operations = (ctypes.PyDLL(None).kill, os.getpid(), int(signal.SIGUSR1)), (len, 5)
    for _ in range(4):
        with contextlib.suppress(AlarmError, TypeError):
            in_flight.attempt(place, Here(), "SCardStatus", *operations, in_turn=how == "in turn")
    print(json.dumps([place.calls, Calling(place.steps[0], True, 0).answer()]))


def test_a_handler_that_forks_while_a_thread_waits_to_establish() -> None:
    """SCardEstablishContext succeeds in the parent, and in the child that the handler has forked and that continues.

    Neither logs that there is no pcscd.
    """
    assert told(forks_while_waiting) == [True, True]


def forks_while_waiting() -> None:
    establish()
    warned: list[str] = []
    recovery.warn_of_no_service = warned.append
    place, forked = native_context.establishing, []
    signal.signal(signal.SIGUSR1, lambda *_: forked.append(fork()))

    def is_in_the_way() -> None:
        acquire, _, _, release = place.steps
        acquire()
        held.set()
        until(lambda: place.waiting, "the main thread waits for its turn")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        until(lambda: forked, "its handler has forked")
        release()

    held = threading.Event()
    other = threading.Thread(target=is_in_the_way)
    other.start()
    held.wait()
    is_right = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[0] == OK and not warned
    (pid,) = forked
    if pid == 0:
        os._exit(0 if is_right else 1)
    other.join()
    print(json.dumps([is_right, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0]))


def test_a_handler_that_forks_when_the_gateway_is_chosen() -> None:
    """A child that can't use the native library doesn't, although its parent's call had chosen it."""
    assert told(forks_when_chosen) == [True, True]


def forks_when_chosen() -> None:
    pcsc_safe.configure(quiesce_timeout=0.05)
    establish()
    native, choose, forked, established = pyscard.raw["SCardEstablishContext"], reestablish.gateway, [], []

    def chooses(*arguments: Any) -> Any:
        chosen = choose(*arguments)
        if not forked:
            in_flight.calls_without_place["busy"] = ("SCardTransmit", 0, time.monotonic(), None)
            forked.append(fork())
            if forked[0]:
                in_flight.calls_without_place.pop("busy", None)
        return chosen

    reestablish.gateway = chooses
    pyscard.raw["SCardEstablishContext"] = lambda scope: established.append(os.getpid()) or native(scope)
    hresult = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[0]
    is_right = hresult == OK and (os.getpid() in established) == bool(forked[0])
    if forked == [0]:
        os._exit(0 if is_right else 1)
    print(json.dumps([is_right, os.waitstatus_to_exitcode(os.waitpid(forked[0], 0)[1]) == 0]))


def test_a_handler_that_forks_while_a_thread_waits_to_cancel() -> None:
    """The child, whose context is in a broker, doesn't call the native library, with the handle of its parent."""
    assert told(forks_while_cancelling) == [OK, 1, True]


def forks_while_cancelling() -> None:
    pcsc_safe.configure(quiesce_timeout=0.2)
    context = establish()

    def forks(*_: Any) -> None:
        forked.append(fork())
        if forked == [0]:
            # Another thread was establishing a context, so the child's context is in a broker.
            os.kill(pcscd, signal.SIGCONT)
            assert safe.SCardListReaders(context, [])[0] == OK

    def is_in_the_way() -> None:
        main = threading.main_thread().ident
        until(lambda: main in native_context.establishing.waiting.values(), "the main thread waits for its turn")
        signal.pthread_kill(main or 0, signal.SIGUSR1)

    forked: list[int] = []
    cancelled: list[int] = []
    pyscard.raw["SCardCancel"] = lambda handle: cancelled.append(handle) or OK
    signal.signal(signal.SIGUSR1, forks)
    pcscd = int(os.environ["PCSCD"])
    os.kill(pcscd, signal.SIGSTOP)
    establishing = Calling(establish)
    until(lambda: native_context.establishing.calls, "the other thread establishes a context")
    Calling(is_in_the_way)
    hresult = safe.SCardCancel(context)
    (pid,) = forked
    if pid == 0:
        os._exit(0 if hresult == OK and not cancelled else 1)
    establishing.answer()
    print(json.dumps([hresult, len(cancelled), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0]))


def test_a_file_that_gets_the_number_of_the_dead_socket_keeps_its_lock() -> None:
    """While a thread waits for its turn to establish a context, the application closes the socket, and locks a file."""
    assert told(locks_a_file) == [True, True]


def locks_a_file() -> None:
    establish()
    place, dead = native_context.establishing, descriptors.any_open()
    assert dead is not None
    acquire, _, _, release = place.steps
    acquire()
    other = Calling(establish)
    until(lambda: place.waiting, "the other thread waits for its turn")
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), dead.number)
    fcntl.lockf(dead.number, fcntl.LOCK_EX)
    release()
    is_established = other.answer() != 0
    pid = fork()
    if pid == 0:
        try:
            fcntl.lockf(dead.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os._exit(1)
        os._exit(0)
    is_locked = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    print(json.dumps([is_established, is_locked]))


def connects_beside_a_fork() -> None:
    """Program: a signal handler raises when SCardConnect returns, and another thread is about to fork."""
    from pcsc_safe._core import in_flight

    def forks_and_raises(*_: object) -> None:
        in_flight.closers[0] = time.monotonic() + 0.5  # what the other thread's hook does
        raise AlarmError

    signal.signal(signal.SIGALRM, forks_and_raises)
    context = establish()
    reader = safe.SCardListReaders(context, [])[1][0]
    connecting = (context, reader, safe.SCARD_SHARE_EXCLUSIVE, safe.SCARD_PROTOCOL_T1)
    # The card has power now, so only the last disconnection makes the next connection slow.
    assert safe.SCardDisconnect(connect(context, reader), safe.SCARD_UNPOWER_CARD) == OK
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with contextlib.suppress(AlarmError):
        print("not interrupted:", safe.SCardConnect(*connecting))
    in_flight.closers.clear()
    other = establish()
    print(json.dumps(safe.SCardConnect(other, *connecting[1:])[0]))


def test_a_connection_that_nobody_gets_is_ended_beside_a_fork() -> None:
    """A card that was connected for nobody is disconnected, even if another thread's fork keeps all calls out."""
    assert told(connects_beside_a_fork, cards=[SlowReset()]) == OK


def forks_as_it_connects() -> None:
    """Program: a fork as SCardConnect returns; the child uses the context before it continues the call."""
    context, pids = establish(), list[int]()
    reader = safe.SCardListReaders(context, [])[1][0]
    native = pyscard.raw["SCardConnect"]

    def connects(*arguments: Any) -> Any:
        answer = native(*arguments)
        if not pids:
            pids.append(fork())
            if pids == [0]:
                signal.alarm(5)
                assert safe.SCardListReaders(context, [])[0] == OK
        return answer

    pyscard.raw["SCardConnect"] = connects
    answer = safe.SCardConnect(context, reader, safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_T1)[0]
    if pids == [0]:
        os._exit(answer != OK)
    print(json.dumps([answer, os.waitpid(pids[0], 0)[1]]))


def test_a_fork_as_a_card_is_connected() -> None:
    """SCardConnect also returns in the child, which has already used the context."""
    assert told(forks_as_it_connects) == [OK, 0]


def worker_of(card: Any, stop: threading.Event) -> Calling:
    def exchange() -> set[int]:
        answers = set()
        while not stop.is_set():
            answers.add(transmit(card)[0])
        return answers

    return Calling(exchange)


def handler_releases() -> None:
    """Program: SIGTERM's handler disconnects and releases while the main thread waits and a worker exchanges."""
    context, stop = establish(), threading.Event()
    reader = safe.SCardListReaders(context, [])[1][0]
    card, said = connect(context, reader), []

    def clean_up(*_: object) -> None:
        stop.set()
        said.extend([safe.SCardDisconnect(card, LEAVE), safe.SCardReleaseContext(context)])

    signal.signal(signal.SIGTERM, clean_up)
    worker = worker_of(card, stop)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while not said:
        safe.SCardGetStatusChange(context, 100, [(reader, PRESENT)])
    worker.join(10)
    print(json.dumps([said, worker.is_alive()]))


def handler_joins(how: str) -> None:
    """Program: a handler stops a worker and joins it, again and again; the worker may be about to use the card."""
    context = establish()
    reader = safe.SCardListReaders(context, [])[1][0]
    card = connect(context, reader)
    joined = 0
    for _ in range(30):
        stop = threading.Event()
        worker = worker_of(card, stop)

        def end(*_: object, stop: threading.Event = stop, worker: Calling = worker) -> None:
            stop.set()
            worker.join(10)

        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.01))
        while not stop.is_set():
            if how == "a wait":
                safe.SCardGetStatusChange(context, 3, [(reader, PRESENT)])
            else:
                transmit(card)
        joined += not worker.is_alive()
    print(json.dumps(joined))


def test_a_handler_that_disconnects_and_releases() -> None:
    """A handler that cleans up does not wait for another thread's Python code. The worker's next call fails."""
    assert told(handler_releases) == [[OK, OK], False]


@pytest.mark.parametrize("how", ["a wait", "the same card"])
def test_a_handler_that_joins(how: str) -> None:
    """The main thread holds nothing that a worker needs while the handler joins it."""
    assert told(handler_joins, how) == 30


def finalizers(what: str) -> None:
    """Program: very frequent collections run finalizers that use PC/SC, or wait for a thread that does."""
    context = establish()
    reader = safe.SCardListReaders(context, [])[1][0]
    card, stop, finalized = connect(context, reader), threading.Event(), []

    class Disconnects:
        def __init__(self) -> None:
            self.card, self.me = connect(context, reader), self

        def __del__(self) -> None:
            finalized.append(safe.SCardDisconnect(self.card, LEAVE))

    class Joins:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            asked.put(True)
            finalized.append(answered.get(timeout=20))

    # One thread for all: threading's own lock may be held when the collector runs.
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
    answered: queue.SimpleQueue[int] = queue.SimpleQueue()

    def answers() -> None:
        while asked.get():
            answered.put(transmit(card)[0])

    threading.Thread(target=answers, daemon=True).start()
    other = worker_of(card, stop)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        gc.set_threshold(random.randrange(1, 30), 1, 1)
        Disconnects() if what == "disconnects" else Joins()
        safe.SCardGetStatusChange(context, 3, [(reader, PRESENT)])
        safe.SCardStatus(card)
    stop.set()
    gc.set_threshold(700, 10, 10)
    print(json.dumps([sorted(set(finalized)), len(finalized) > 20, sorted(other.answer())]), flush=True)
    os._exit(0)  # finalizers at interpreter exit would wait for threads that have ended


@pytest.mark.parametrize("what", ["disconnects", "joins"])
def test_finalizers(what: str) -> None:
    """Finalizers return at any moment of a collection, and the other thread continues."""
    assert told(finalizers, what) == [[OK], True, [OK]]


def stopped() -> None:
    """Program: another thread sends exceptions that stop threads in the middle of their calls."""
    context = establish()
    reader = safe.SCardListReaders(context, [])[1][0]
    card, stuck = connect(context, reader), 0
    # The first call beside another thread starts a thread, for imports.  CPython confuses a thread that starts with the
    # one that starts it, and sends the exception to that one.
    Calling(transmit, card).answer()

    class StopError(Exception):
        pass

    def busy() -> None:
        with contextlib.suppress(StopError):
            while True:
                transmit(card), safe.SCardStatus(card), safe.SCardGetStatusChange(context, 2, [(reader, PRESENT)])

    for _ in range(100):
        threads = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(random.uniform(0, 0.01))
        for thread in threads:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(StopError))
        for thread in threads:
            thread.join(10)
            stuck += thread.is_alive()
    works = [Calling(safe.SCardListReaders, context, []).answer()[0], Calling(transmit, card).answer()[0]]
    safe.SCardReleaseContext(context)
    print(json.dumps([stuck, works, held()]))


def test_threads_that_are_stopped() -> None:
    """Threads stopped in the middle of a call leave nothing locked, and no native context."""
    assert told(stopped) == [0, [OK, OK], NOTHING]


# 4. A wait beside calls.


def test_calls_end_no_wait(pcsc_stack: VirtualPcsc) -> None:
    """A wait continues beside 2,000 calls of another thread on its context, a hundred of which connect a card."""
    readers = [reader.name for reader in pcsc_stack.readers]
    context = establish()
    waiter = waiting(context, readers[0])
    for number in range(2000):
        assert safe.SCardListReaders(context, [])[0] == OK
        if number % 20 == 0:
            assert safe.SCardDisconnect(connect(context, readers[1]), LEAVE) == OK
    assert waiter.is_alive()
    assert safe.SCardCancel(context) == OK
    assert waiter.answer()[0] == CANCELLED
    assert safe.SCardReleaseContext(context) == OK


def test_release_ends_waits(pcsc_stack: VirtualPcsc) -> None:
    """SCardReleaseContext doesn't wait for a wait for events. It ends it like SCardCancel."""
    context = establish()
    waiter = waiting(context, pcsc_stack.readers[0].name)
    assert Calling(safe.SCardReleaseContext, context).answer() == OK
    assert waiter.answer()[0] in (CANCELLED, safe.SCARD_E_INVALID_HANDLE)
    pcsc_stack.wait_for_clients(0)


@pytest.mark.native
def test_release_ends_a_wait_that_begins_meanwhile(pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that begins just before SCardReleaseContext marks the context as released is ended, too."""
    from pcsc_safe._native import contexts

    context, waiters, mark_released = establish(), [], contexts.mark_released

    def after_another_thread(*arguments: Any) -> bool:  # a switch of threads, after the waits were listed
        waiters.append(waiting(context, pcsc_stack.readers[0].name))
        return mark_released(*arguments)

    monkeypatch.setattr(contexts, "mark_released", after_another_thread)
    assert Calling(safe.SCardReleaseContext, context).answer() == OK
    assert waiters[0].answer()[0] in (CANCELLED, safe.SCARD_E_INVALID_HANDLE)
    pcsc_stack.wait_for_clients(0)


@pytest.mark.native
def test_a_release_waits_for_a_fork(pcsc_stack: VirtualPcsc) -> None:
    """SCardReleaseContext of another thread waits for the end of a handover() block. Nothing is left afterwards."""
    context, other = establish(), establish()
    connect(context, pcsc_stack.readers[0].name)
    with pcsc_safe.handover(other):
        release = Calling(safe.SCardReleaseContext, context)
        assert stays(release.is_alive)
        assert in_child(int) == 0
    assert release.answer() == OK
    pcsc_stack.wait_for_clients(0)


@pytest.mark.native
def test_a_release_that_a_handler_interrupts(pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that raises in SCardReleaseContext leaves it released, with its cards. Nothing is left in pcscd."""
    context = establish()
    card = connect(context, pcsc_stack.readers[0].name)
    record = handles.contexts[context]

    def interrupted() -> None:
        monkeypatch.setattr(handles.Context, "forget", forget)
        raise Alarm

    forget = handles.Context.forget
    monkeypatch.setattr(handles.Context, "forget", lambda _: interrupted())
    with pytest.raises(Alarm):
        safe.SCardReleaseContext(context)
    assert record.released
    assert safe.SCardReleaseContext(establish()) == OK  # any call releases what is left
    assert safe.SCardStatus(card)[0] == safe.SCARD_E_INVALID_HANDLE
    assert safe.SCardListReaders(context, [])[0] == safe.SCARD_E_INVALID_HANDLE
    pcsc_stack.wait_for_clients(0)
    record.forget()


@pytest.mark.native
def test_a_release_that_a_handler_interrupts_beside_a_wait(
    pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call of the process ends the wait of the other thread."""
    from pcsc_safe._native.contexts import NativeContexts

    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise Alarm

    context = establish()
    waiter = waiting(context, pcsc_stack.readers[0].name)
    monkeypatch.setattr(NativeContexts, "_wake", interrupted)
    with pytest.raises(Alarm):
        safe.SCardReleaseContext(context)
    assert safe.SCardReleaseContext(establish()) == OK
    assert waiter.answer()[0] in (CANCELLED, safe.SCARD_E_INVALID_HANDLE)
    pcsc_stack.wait_for_clients(0)


@pytest.mark.native
def test_a_handler_as_a_card_is_connected_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that raises at the end of a child's implicit SCardConnect leaves no connection that nobody knows."""

    class Calls(dict[Any, Any]):
        def pop(self, key: Any, *default: Any) -> Any:
            entry = super().pop(key, *default)
            if entry and entry[0] == "SCardConnect":
                monkeypatch.undo()
                raise Alarm
            return entry

    def child() -> Any:
        monkeypatch.setattr(in_flight, "calls_without_place", Calls())
        with pytest.raises(Alarm):
            session.transmit(ECHO)
        left = [list(context.cards) for context in handles.contexts[session.context].real.natives]
        return left, session.transmit(ECHO)

    assert in_child(child) == ([[]], RIGHT)


def recording(monkeypatch: pytest.MonkeyPatch, context: Any, reader: str) -> tuple[Calling, threading.Event]:
    """Start a thread that has connected to a card, and records it as soon as the event is set."""
    reached, go_on, card_of = threading.Event(), threading.Event(), handles.Card.__init__

    def stopped(*arguments: Any) -> None:
        reached.set()
        go_on.wait(20)
        card_of(*arguments)

    monkeypatch.setattr(handles.Card, "__init__", stopped)
    connecting = Calling(safe.SCardConnect, context, reader, safe.SCARD_SHARE_EXCLUSIVE, 3)
    assert reached.wait(20)
    return connecting, go_on


@pytest.mark.native
def test_a_handover_while_another_thread_connects(pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork waits until the card is recorded: the child gets it, and the parent's calls say so."""
    pcsc_safe.configure(quiesce_timeout=20)
    context, reader = establish(), pcsc_stack.readers[0].name
    connecting, go_on = recording(monkeypatch, context, reader)
    threading.Timer(0.2, go_on.set).start()

    def handing_over() -> int:
        with pcsc_safe.handover(context):
            return fork()

    def child() -> Any:
        (card,) = handles.contexts[context].cards.values()
        return card.native is not None, safe.SCardReleaseContext(context)

    assert in_child(child, fork=handing_over) == (True, OK)
    hresult, card, _ = connecting.answer()
    assert (hresult, safe.SCardStatus(card)[0]) == (OK, safe.SCARD_W_RESET_CARD)
    assert safe.SCardReleaseContext(context) == OK
    pcsc_stack.wait_for_clients(0)


@pytest.mark.native
def test_a_cancel_during_a_handover(pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCardCancel of another thread doesn't wait for a context that a child has got."""
    context, here = establish(), threading.get_ident()
    go_on, wait_until_open = threading.Event(), in_flight.wait_until_open

    def waits(ident: int) -> Any:
        gate = wait_until_open(ident)
        assert ident == here or go_on.wait(20)
        return gate

    monkeypatch.setattr(in_flight, "wait_until_open", waits)
    with pcsc_safe.handover(context):
        cancel = Calling(safe.SCardCancel, context)
        assert stays(cancel.is_alive)
        assert in_child(lambda: safe.SCardReleaseContext(context)) == OK
        assert safe.SCardListReaders(context, [])[0] == OK  # established again
        go_on.set()
    assert cancel.answer() == OK
    assert safe.SCardReleaseContext(context) == OK
    pcsc_stack.wait_for_clients(0)


@pytest.mark.native
def test_a_release_while_another_thread_connects(pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card ends with its context, and calls on it say so."""
    context, reader = establish(), pcsc_stack.readers[0].name
    connecting, go_on = recording(monkeypatch, context, reader)
    assert safe.SCardReleaseContext(context) == OK
    go_on.set()
    hresult, card, _ = connecting.answer()
    assert hresult in (OK, safe.SCARD_E_INVALID_HANDLE)
    if hresult == OK:
        assert safe.SCardStatus(card)[0] == safe.SCARD_E_INVALID_HANDLE
    pcsc_stack.wait_for_clients(0)
    assert card not in handles.cards


@pytest.mark.native
def test_a_cancel_uses_no_context_that_is_being_established(shared_stack: VirtualPcsc) -> None:
    """SCardCancel needs the handle of a native context, which another thread's new one may not have yet."""
    from pcsc_safe._core import handles
    from pcsc_safe._native.native_context import NativeContext

    context = establish()
    real = handles.contexts[context].real
    real.natives = {NativeContext(): None, **real.natives}
    assert safe.SCardCancel(context) == OK
    assert safe.SCardReleaseContext(context) == OK


@pytest.mark.native
def test_no_cancel_follows_a_wait_that_has_ended(shared_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCardCancel is called for one wait.  It must not end the next one, nor one of the child that has the context."""
    cancelled: list[int] = []
    monkeypatch.setitem(pyscard.raw, "SCardCancel", lambda handle: cancelled.append(handle) or OK)
    context = establish()
    (native,) = handles.contexts[context].real.natives
    waiter = Calling(safe.SCardGetStatusChange, context, 3000, [(shared_stack.readers[0].name, PRESENT)])
    until(lambda: waits_on(waiter), "it waits")
    wait = native.calls[-1][3]
    acquire, _, _, release = native_context.establishing.steps
    with monkeypatch.context() as patch:
        patch.setattr(native, "descriptor", None)  # otherwise the connection is shut down
        patch.setattr(in_flight, "_CHECK_INTERVAL", 10.0)
        acquire()
        try:
            waker = Calling(native.wake, wait)
            until(lambda: native_context.establishing.waiting, "the other thread waits for its turn")
            assert waiter.answer()[0] == TIMED_OUT
        finally:
            release()
        waker.answer()
    assert (cancelled, native.wakers) == ([], {})
    assert safe.SCardReleaseContext(context) == OK


@pytest.mark.native
@pytest.mark.parametrize("end", [safe.SCardCancel, safe.SCardReleaseContext])
def test_a_cancel_that_comes_late(pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch, end: Any) -> None:
    """A wait on an unknown connection ends, even if SCardCancel has to wait for a call that pcscd doesn't reply to."""
    monkeypatch.setattr(in_flight, "_CHECK_INTERVAL", 0.05)
    monkeypatch.setattr(contexts, "_CANCEL_TIMEOUT", 0.05)
    context = establish()
    waiter = waiting(context, pcsc_stack.readers[0].name)
    for native in handles.contexts[context].real.natives:
        native.descriptor = None
    os.kill(pcsc_stack.pid, signal.SIGSTOP)
    try:
        establishing = Calling(establish)
        until(lambda: native_context.establishing.calls, "another thread establishes a context")
        ending = Calling(end, context)
        assert stays(ending.is_alive)
    finally:
        os.kill(pcsc_stack.pid, signal.SIGCONT)
    assert ending.answer() == OK
    assert waiter.answer()[0] == CANCELLED
    assert safe.SCardReleaseContext(establishing.answer()) == OK


@pytest.mark.native
def test_no_connection_is_closed_while_its_call_is_ended(
    shared_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever shuts a connection down marks its native context, so that its number isn't reused meanwhile."""
    from pcsc_safe._core import connections, handles

    context = establish()
    real = handles.contexts[context].real
    (native,) = real.natives
    marks: list[int] = []
    monkeypatch.setattr(connections, "shut_down", lambda *_, **__: marks.append(len(native.wakers)))
    real.end_long_calls()
    assert (marks, len(native.wakers)) == ([1], 0)
    assert safe.SCardReleaseContext(context) == OK


@pytest.mark.native
def test_where_pcscd_refuses_another_connection(
    pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls share the existing native contexts, and a log line says why. A wait delays a card's calls only briefly."""
    from pcsc_safe._native import contexts

    readers = [reader.name for reader in pcsc_stack.readers]
    context = establish()
    first = connect(context, readers[0])
    full = [safe.SCARD_E_NO_MEMORY, 0]
    monkeypatch.setitem(contexts.raw, "SCardEstablishContext", lambda scope: list(full))
    second = connect(context, readers[1])
    assert [transmit(card) for card in (first, second)] == [RIGHT] * 2
    waiter = Calling(safe.SCardGetStatusChange, context, 300, [(readers[0], PRESENT)])
    assert [Calling(transmit, card).answer() for card in (first, second)] == [RIGHT] * 2
    assert waiter.answer()[0] == TIMED_OUT
    assert any("refuses more connections" in record.message for record in caplog.records)
    assert safe.SCardReleaseContext(context) == OK


@pytest.mark.native
@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_a_code_that_may_be_wrong(shared_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    """After SCARD_E_UNKNOWN_READER, which may be a misread message, two other native contexts are asked, not more."""
    asked: list[int] = []
    native = contexts.raw["SCardListReaders"]

    def lists(handle: int, groups: list[str]) -> Any:
        asked.append(handle)
        return [safe.SCARD_E_UNKNOWN_READER, []] if len(asked) <= wrong else native(handle, groups)

    context = establish()
    monkeypatch.setitem(contexts.raw, "SCardListReaders", lists)
    readers = [reader.name for reader in shared_stack.readers]
    expected = [OK, readers] if wrong < 3 else [safe.SCARD_E_UNKNOWN_READER, []]
    assert safe.SCardListReaders(context, []) == expected
    assert len({*asked}) == len(asked) == min(wrong + 1, 3)
    assert len(handles.contexts[context].real.natives) == 1
    assert safe.SCardReleaseContext(context) == OK


TAKES_ALL_BUT = """
import sys, time
from smartcard.scard import *
contexts, refusals = [], []
while len(refusals) < 5 and len(contexts) < 1000:  # a busy pcscd may refuse one for another reason
    hresult, context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)
    if hresult == SCARD_S_SUCCESS:
        contexts.append(context)
        refusals.clear()
    else:
        refusals.append(hresult & 0xFFFFFFFF)
        time.sleep(0.05)
for context in contexts[-int(sys.argv[1]) :]:
    SCardReleaseContext(context)
print(len(contexts), refusals[-1], flush=True)
sys.stdin.read()
"""


AT_THE_LIMIT = (
    OK,
    safe.SCARD_E_NO_SERVICE,
    safe.SCARD_E_NO_MEMORY,
    safe.SCARD_F_COMM_ERROR,
    safe.SCARD_W_SECURITY_VIOLATION,
)
"""What SCardEstablishContext returns there, on raw pyscard too, depending on when pcscd closes the connection.  It also
succeeds, if a surplus connection has just been released."""


def at_the_limit(free: str) -> None:
    """Program: other processes leave so many of pcscd's connections free; then threads use two cards and wait."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pcsc_safe").addHandler(handler)
    other = subprocess.Popen(
        [sys.executable, "-c", TAKES_ALL_BUT, free], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    most, refusal = map(int, other.stdout.readline().split())
    pcscd = os.environ["PCSCLITE_CSOCK_NAME"]
    until(lambda: _connections(pcscd) == most - int(free), "pcscd has noticed the releases")
    context = establish()
    readers = safe.SCardListReaders(context, [])[1]
    cards = [Calling(connect, context, reader).answer() for reader in readers[:2]]
    waiter = waiting(context, readers[0])
    exchanges = [Calling(lambda card=card: [transmit(card) for _ in range(5)]) for card in cards for _ in range(2)]
    right = [thread.answer() == [RIGHT] * 5 for thread in exchanges]
    calls: list[tuple[Any, ...]] = [
        (safe.SCardListReaders, context, []),
        (safe.SCardGetStatusChange, context, 100, [(readers[1], PRESENT)]),
        (safe.SCardStatus, cards[1]),
    ]
    codes = [Calling(*call).answer()[0] for call in calls]
    more = Calling(safe.SCardEstablishContext, safe.SCARD_SCOPE_SYSTEM).answer()[0] & 0xFFFFFFFF
    goes_on = waiter.is_alive()
    ended = Calling(safe.SCardCancel, context).answer(), waiter.answer()[0]
    right += [Calling(transmit, card).answer() == RIGHT for card in cards]  # the end of a wait ends no card's session
    last = waiting(context, readers[0])
    released = Calling(safe.SCardReleaseContext, context).answer()
    last_ended = last.answer()[0] != OK
    other.communicate("")
    print(
        json.dumps(
            [
                most,
                right,
                codes,
                more in (refusal, *AT_THE_LIMIT),
                goes_on,
                ended,
                released,
                last_ended,
                sorted(said),
            ]
        )
    )


@pytest.mark.native
@pytest.mark.parametrize("free", [1, 2])
def test_at_the_limit_of_pcscd(free: int) -> None:
    """With only one or two of pcscd's 200 connections free nothing hangs or fails, and a log line says why."""
    most, right, codes, same, goes_on, ended, released, last_ended, said = told(at_the_limit, str(free))
    assert most >= 100
    assert right == [True] * 6
    assert codes == [OK, TIMED_OUT, OK]
    assert (same, goes_on, ended, released, last_ended) == (True, True, [OK, CANCELLED], OK, True)
    # Once, and once more each time after pcscd has accepted one; not at every attempt.
    assert 1 <= sum("refuses more connections" in line for line in said) <= 6


@pytest.mark.native
def test_a_refused_context_returns_all_states(shared_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """If pcscd refuses another native context, SCardGetStatusChange returns a state for each reader, as ever."""
    context = establish()
    readers = safe.SCardListReaders(context, [])[1]
    waiter = waiting(context, readers[0])
    monkeypatch.setattr(contexts.NativeContexts, "establish", lambda *_, **__: safe.SCARD_E_NO_SERVICE)
    hresult, states = safe.SCardGetStatusChange(context, 0, [(name, 0) for name in readers])
    assert (hresult, [name for name, *_ in states]) == (safe.SCARD_E_NO_SERVICE, readers)
    monkeypatch.undo()
    safe.SCardCancel(context)
    waiter.answer()
    safe.SCardReleaseContext(context)
