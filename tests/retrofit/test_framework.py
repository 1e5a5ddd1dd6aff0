"""After install(), pyscard's classes work in a forked child: connections, requests, locks, finalizers, monitors."""

from __future__ import annotations

import gc
import os
import sys
import threading
from typing import Any

import pytest
from programs import (
    IS_VERIFIED,
    UNPOWER_CARD,
    VERIFY,
    Recorder,
    child,
    eventually,
    monitors,
    open_session,
    orderly_child,
    outcome,
    refusal,
    say,
    verified,
)

import pcsc_safe
from pcsc_safe.testing import EchoCard, VirtualPcsc

pytestmark = pytest.mark.native  # each test sets what its programs use

WAYS = {"native": {}, "broker": {"PCSC_SAFE_BROKER": "always"}}
through_both = pytest.mark.parametrize("way", WAYS)


def connections() -> dict[str, Any]:
    """A connection of each kind, all to one card."""
    from smartcard.CardConnectionObserver import CardConnectionObserver
    from smartcard.ExclusiveConnectCardConnection import ExclusiveConnectCardConnection
    from smartcard.ExclusiveTransmitCardConnection import ExclusiveTransmitCardConnection
    from smartcard.System import readers

    class Silent(CardConnectionObserver):  # type: ignore[misc]
        def update(self, observable: Any, event: Any) -> None:
            pass

    first, second = readers()
    made = {"plain": first.createConnection(), "observed": first.createConnection()}
    made["observed"].addObserver(Silent())
    made["transmitting alone"] = ExclusiveTransmitCardConnection(first.createConnection())
    made["connected alone"] = ExclusiveConnectCardConnection(second.createConnection())
    for connection in made.values():
        connection.connect(disposition=0)
        connection.transmit(VERIFY)
    return made


def each_connection() -> None:
    pcsc_safe.install()
    made = connections()

    def again(connection: Any) -> Any:
        connection.connect(disposition=0)
        return verified(connection)

    def in_child() -> Any:
        refused = {name: refusal(lambda c=connection: verified(c)) for name, connection in made.items()}
        works = {name: again(c) for name, c in made.items() if name != "connected alone"}
        works["connected alone"] = refusal(lambda: again(made["connected alone"]))
        made["transmitting alone"].lock()
        works["locked"] = made["transmitting alone"].transmit(IS_VERIFIED)[0]
        made["transmitting alone"].unlock()
        for name, connection in made.items():
            if name != "connected alone":
                connection.disconnect()
        return refused, works

    answers = child(in_child)
    say([answers, {name: verified(connection) for name, connection in made.items()}])


@through_both
def test_connections(shared_stack: VirtualPcsc, way: str) -> None:
    """With ``cards="reset"`` a child's connections report a reset card, and connect again; the parent's continue."""
    names = ["plain", "observed", "transmitting alone", "connected alone"]
    (refused, works), parents = outcome(each_connection, shared_stack, PCSC_SAFE_CARDS="reset", **WAYS[way])
    assert refused == dict.fromkeys(names, "CardConnectionException")
    told = {"connected alone": "CardConnectionException", "locked": [1]}  # the lock belongs to the parent alone
    assert works == {**dict.fromkeys(names, True), **told}
    assert parents == dict.fromkeys(names, True)


def renewed_by_two_threads(what: str) -> None:
    from pcsc_safe.retrofit import framework, monitors

    class Instance:
        mutex = framework._PerProcessAttribute("mutex", lambda: made())

    shared = framework.SharedLock(threading.RLock(), lambda: made())
    instance, used = Instance(), []
    instance.mutex = threading.RLock()
    lock = {"attribute": lambda: instance.mutex, "class": lambda: shared.__get__(None)}
    dropped: list[Any] = []
    renewal = monitors._Renewal(lambda: (made(), None, []), lambda *found: dropped.append(found))
    use = {**lock, "monitor": renewal}[what]

    def made() -> Any:
        """In the first thread, a signal handler runs here, and waits for another thread."""
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: used.append(use()), daemon=True)
            other.start()
            other.join(10)
            used.append("joined" if not other.is_alive() else "blocked")
        return threading.RLock()

    def in_child() -> Any:
        mine = use()
        return [used[-1], len(used), mine is used[0] and mine is use(), len(dropped)]

    say(child(in_child))


@pytest.mark.parametrize("what", ["attribute", "class", "monitor"])
def test_a_signal_handler_waits_for_a_thread(shared_stack: VirtualPcsc, what: str) -> None:
    """A handler that interrupts the first use in a child can wait for a thread with the same use: both get one lock."""
    assert outcome(renewed_by_two_threads, shared_stack, what) == ["joined", 2, True, int(what == "monitor")]


def requests_and_sessions() -> None:
    pcsc_safe.install()
    from smartcard.CardRequest import CardRequest
    from smartcard.CardType import AnyCardType
    from smartcard.Session import Session
    from smartcard.System import readers

    request = CardRequest(timeout=10, cardType=AnyCardType())
    service = request.waitforcard()
    service.connection.connect(disposition=0)
    service.connection.transmit(VERIFY)
    session = Session(str(readers()[1]))

    def in_child() -> Any:
        told = [
            refusal(lambda: verified(service.connection)),
            refusal(lambda: session.sendCommandAPDU(IS_VERIFIED)),
            len(readers()),
        ]
        service.connection.connect(disposition=0)
        found = request.waitforcard()
        found.connection.connect(disposition=0)
        return [*told, verified(service.connection), verified(found.connection)]

    answers = child(in_child)
    say([answers, verified(service.connection), session.sendCommandAPDU([0x80, 1, 0, 0, 1, 7])[0]])


@through_both
def test_requests_services_and_sessions(shared_stack: VirtualPcsc, way: str) -> None:
    """An inherited CardRequest, CardService or Session works in a child as a connection does; so does readers()."""
    told = ["CardConnectionException", "CardConnectionException", 2, True, True]
    assert outcome(requests_and_sessions, shared_stack, PCSC_SAFE_CARDS="reset", **WAYS[way]) == [told, True, [7]]


def drops_all(installed: str) -> None:
    if installed == "early":
        pcsc_safe.install()
    from smartcard.CardRequest import CardRequest
    from smartcard.PassThruCardService import PassThruCardService

    connection = open_session(UNPOWER_CARD)
    made = {"c": connection, "s": PassThruCardService(open_session(UNPOWER_CARD)), "r": CardRequest()}
    if installed == "late":
        pcsc_safe.install()

    def in_child() -> None:
        made.clear()
        gc.collect()

    ends = [orderly_child(in_child), orderly_child(lambda: None)]
    say([ends, verified(connection)])
    connection.disconnect()


@pytest.mark.parametrize("installed", ["early", "late"])
def test_finalizers_are_silent(shared_stack: VirtualPcsc, installed: str) -> None:
    """A child that drops what it inherited, or exits with it, writes nothing to stderr; the card stays powered."""
    assert outcome(drops_all, shared_stack, installed) == [[0, 0], True]


def locks() -> list[Any]:
    """Every lock of the framework, as a pair of functions: (acquire, release)."""
    import smartcard.CardMonitoring
    import smartcard.ReaderMonitoring

    found = []
    for owner in (smartcard.CardMonitoring.CardMonitor, smartcard.CardMonitoring.CardMonitoringThread):
        if hasattr(owner, "lock"):
            found.append(owner.lock)
    try:
        from smartcard.pcsc.PCSCContext import PCSCContext
    except ImportError:
        pass
    else:
        found.append(PCSCContext.mutex)
    found.append(smartcard.ReaderMonitoring.ReaderMonitor().mutex)
    return found


def held_at_the_fork() -> None:
    pcsc_safe.install()
    from smartcard.CardMonitoring import CardMonitor, CardObserver
    from smartcard.ReaderMonitoring import ReaderMonitor
    from smartcard.System import readers

    connection = open_session()
    inner = connection.component
    cards, mine = CardMonitor(), ReaderMonitor(startOnDemand=True)
    all_held = [*locks(), inner.mutex, cards.instance.mutex]
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in all_held:
            lock.acquire()
        taken.set()
        done.wait()
        for lock in all_held:
            lock.release()

    class Observer(CardObserver):  # type: ignore[misc]
        told = 0

        def update(self, observable: Any, handlers: Any) -> None:
            self.told += len(handlers[0])

    def in_child() -> Any:
        connection.connect(disposition=0)
        observer = Observer()
        CardMonitor().addObserver(observer)
        mine.addObserver(observer)
        ok = eventually(lambda: observer.told >= 4)
        mine.deleteObserver(observer)
        CardMonitor().deleteObserver(observer)
        return [verified(connection), len(readers()), ok]

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    answers = child(in_child)
    held = [not lock.acquire(blocking=False) for lock in all_held]
    done.set()
    holder.join()
    say([answers, all(held), verified(connection)])


def test_locks_that_another_thread_held(shared_stack: VirtualPcsc) -> None:
    """A child never waits for a lock that a thread of its parent held; the parent's locks are not changed."""
    assert outcome(held_at_the_fork, shared_stack) == [[True, 2, True], True, True]


def forks_holding_a_lock() -> None:
    pcsc_safe.install()
    inner = open_session().component
    with inner.mutex:
        mutex = inner.mutex

        def in_child() -> Any:
            inner.setChanged()
            same = inner.mutex is mutex
            mutex.release()
            other = threading.Thread(target=inner.setChanged)
            other.start()
            other.join(10)
            return same, other.is_alive()

        answer = child(in_child)
    say(answer)


def test_a_lock_that_the_forking_thread_holds(shared_stack: VirtualPcsc) -> None:
    """If the forking thread holds a lock, the same thread holds it in the child, and releases it there."""
    assert outcome(forks_holding_a_lock, shared_stack) == [True, False]


def monitored(kind: str, use: str) -> None:
    pcsc_safe.install()
    make = monitors(kind)
    monitor, parents = make(), Recorder()
    monitor.addObserver(parents)
    assert eventually(lambda: parents.came == 2), vars(parents)

    def in_child() -> Any:
        before = threading.active_count()
        own = make() if use == "made anew" else monitor
        observer = Recorder()
        if use == "inherited, cleaned first":
            own.deleteObserver(parents)
            own.deleteObservers()
            assert (threading.active_count(), own.countObservers()) == (1, 0)
        own.addObserver(observer)
        hears = eventually(lambda: observer.came >= 2)
        counted = own.countObservers()
        grandchild = child(lambda: [own.countObservers(), hears_again(own)])
        own.deleteObserver(parents)  # the parent's observer: it is forgotten, without an error
        own.deleteObserver(observer)
        own.deleteObservers()
        return before, hears, counted, grandchild, own.countObservers(), parents.elsewhere

    def hears_again(own: Any) -> bool:
        observer = Recorder()
        own.addObserver(observer)
        return eventually(lambda: observer.came >= 2)

    answers = child(in_child)
    exits = orderly_child(lambda: make().addObserver(Recorder()))
    goes_on = [parents.came, parents.went, monitor.countObservers()]
    sys.stdin.readline() if kind == "cards, changing" else None
    monitor.deleteObserver(parents)
    say([answers, exits, goes_on])


@pytest.mark.parametrize("use", ["made anew", "inherited", "inherited, cleaned first"])
@pytest.mark.parametrize("kind", ["cards", "readers", "readers, at once"])
def test_monitors(shared_stack: VirtualPcsc, kind: str, use: str) -> None:
    """In a child and a grandchild, a monitor notifies its own observers, as in a new process; the parent's continues.

    Before that it has no thread.  Deleting an observer of the parent starts no thread and is no error.  Nothing hangs.
    """
    told = outcome(monitored, shared_stack, kind, use)
    assert told == [[1, True, 1, [0, True], 0, 0], 0, [2, 0, 1]]


def thread_by_keywords() -> None:
    pcsc_safe.install()
    from smartcard.ReaderMonitoring import ReaderMonitoringThread

    say(ReaderMonitoringThread(observable=None, readerProc=lambda: ["a reader"], period=1).readerProc())


def test_a_monitors_thread_by_keywords(shared_stack: VirtualPcsc) -> None:
    """The thread of a monitor takes its arguments by pyscard's names."""
    assert outcome(thread_by_keywords, shared_stack) == ["a reader"]


def told_of_changes() -> None:
    pcsc_safe.install()
    make = monitors("cards")
    parents = Recorder()
    make().addObserver(parents)
    eventually(lambda: parents.came == 1)

    def in_child() -> Any:
        observer = Recorder()
        make().addObserver(observer)
        assert eventually(lambda: observer.came == 1)
        os.write(1, b"ready\n")
        return eventually(lambda: (observer.came, observer.went) == (2, 1))

    heard = child(in_child)
    say([heard, eventually(lambda: (parents.came, parents.went) == (2, 1))])


def test_cards_that_come_and_go() -> None:
    """While a child watches cards, parent and child are notified of a card that is removed and inserted again."""
    import subprocess
    from pathlib import Path

    import forking

    with VirtualPcsc(1, [EchoCard()], activate=False) as stack:
        code = [sys.executable, str(Path(forking.__file__)), __file__, "told_of_changes"]
        program = subprocess.Popen(code, env=stack.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert program.stdout is not None
        try:
            assert program.stdout.readline() == "ready\n"
            card = stack.readers[0].remove()
            eventually(lambda: False, 1.0)  # old pyscards poll: they never notice a card that is back immediately
            stack.readers[0].insert(card)
            rest, errors = program.communicate(timeout=30)
        finally:
            program.kill()
            program.wait()
    assert (errors, rest) == ("", "[true, true]\n")


def does_nothing() -> None:
    pcsc_safe.install()
    from smartcard.System import readers

    observer = Recorder()
    monitors("cards")().addObserver(observer)
    assert eventually(lambda: observer.came == 2)
    idle = child(lambda: [len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))])
    uses = child(lambda: [len(readers()), len(os.listdir("/proc/self/task"))])
    say([idle[0], uses])


def test_a_child_that_uses_no_monitor_has_no_thread(shared_stack: VirtualPcsc) -> None:
    """A fork starts no thread in the child, nor does the first use of something other than a monitor."""
    assert outcome(does_nothing, shared_stack) == [1, [2, 1]]


def singleton() -> None:
    late = os.environ["TEST_WHEN"] == "late"
    if not late:
        pcsc_safe.install()
    from smartcard.pcsc.PCSCContext import PCSCContext

    PCSCContext()
    if late:
        pcsc_safe.install()
    from smartcard.System import readers

    mine = int(PCSCContext.instance.getContext())

    def in_child() -> Any:
        return len(readers()), refusal(PCSCContext.renewContext), len(readers())

    say([child(in_child), int(PCSCContext.instance.getContext()) == mine, len(readers())])


@pytest.mark.parametrize("when", ["early", "late"])
def test_the_context_of_old(shared_stack: VirtualPcsc, when: str) -> None:
    """PCSCContext, the one context of a process before pyscard 2.3, is the child's own context in a child."""
    pytest.importorskip("smartcard.pcsc.PCSCContext", reason="pyscard 2.3 has none")
    assert outcome(singleton, shared_stack, TEST_WHEN=when) == [[2, "no error", 2], True, 2]
