"""Programs under gevent and eventlet, for test_host_green.py; each runs in a new process.

Only the programs themselves import pcsc_safe, because the tests also vary whether it is imported before or after the
standard library is patched.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Optional

ECHO, RIGHT = [0x80, 1, 0, 0, 1], [0x90, 0]
LEAVE, PRESENT, SHARED, INFINITE = 0, 0x20, 2, 0xFFFFFFFF
OK, CANCELLED, TIMED_OUT, RESET = 0, 0x80100002, 0x8010000A, 0x80100068


class Gevent:
    """gevent: greenlets, and the native threads of the hub's pool."""

    child_has_pool = True

    def __init__(self) -> None:
        from gevent import monkey

        monkey.patch_all()
        import gevent

        self.sleep = gevent.sleep
        self._gevent = gevent

    def spawn(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Run the function in a greenlet; return a function that returns its result."""
        return self._gevent.spawn(function, *arguments).get  # type: ignore[no-any-return]

    def in_pool(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Run the function in a native thread; return a function that returns its result; other greenlets run."""
        return self._gevent.get_hub().threadpool.spawn(function, *arguments).get  # type: ignore[no-any-return]


class Eventlet:
    """eventlet: green threads, and the native threads of tpool."""

    child_has_pool = False  # tpool doesn't detect a fork, and waits for the threads of the parent

    def __init__(self) -> None:
        import warnings

        warnings.simplefilter("ignore")  # eventlet is deprecated
        import eventlet

        eventlet.monkey_patch()
        from eventlet import tpool

        self.sleep = eventlet.sleep
        self._eventlet, self._tpool = eventlet, tpool

    def spawn(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Run the function in a green thread; return a function that returns its result."""
        return self._eventlet.spawn(function, *arguments).wait  # type: ignore[no-any-return]

    def in_pool(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Run the function in a native thread; return a function that returns its result; other green threads run."""
        return self.spawn(self._tpool.execute, function, *arguments)


LIBRARIES: dict[str, Callable[[], Any]] = {"gevent": Gevent, "eventlet": Eventlet}


def _set_up(library: str, gateway: str, order: str) -> tuple[Any, Any, Any, str, Any]:
    """The library, pcsc_safe's scard, and a context, a reader and its card."""
    signal.alarm(50)
    green = LIBRARIES[library]() if order == "patched first" else None
    import pcsc_safe
    from pcsc_safe import scard as safe

    pcsc_safe.configure(broker="always" if gateway == "broker" else "on-fork", cards="reconnect")
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    assert hresult == OK, hresult
    reader = safe.SCardListReaders(context, [])[1][0]
    green = green or LIBRARIES[library]()
    hresult, card, _ = safe.SCardConnect(context, reader, SHARED, safe.SCARD_PROTOCOL_T1)
    assert hresult == OK, hresult
    return green, safe, context, reader, card


def _exchange(safe: Any, card: Any, number: int, times: int, pause: Callable[[], Any]) -> int:
    """How many exchanges got their own bytes."""
    right = 0
    for _ in range(times):
        right += safe.SCardTransmit(card, safe.SCARD_PCI_T1, [*ECHO, number]) == [OK, [number, *RIGHT]]
        pause()
    return right


def _code(result: Any) -> int:
    return int(result[0] if isinstance(result, (list, tuple)) else result) & 0xFFFFFFFF


def _say(value: Any) -> None:
    print(json.dumps(value), flush=True)


def _forked(function: Callable[[], Any]) -> list[Any]:
    """What the function returns in a forked child, and the child's exit status."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        status = 70
        try:
            os.write(writes, json.dumps(function()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writes)
    # First: a read would block the hub, which the pool of gevent's child shares at first and may need.
    status = os.waitpid(pid, 0)[1]
    with open(reads, "rb") as pipe:
        return [json.loads(pipe.read() or b"null"), status]


def pool(*how: str) -> None:
    """A wait in the pool, with exchanges and other calls in the pool and in greenlets; then the wait is cancelled."""
    green, safe, context, reader, card = _set_up(*how)
    wait = green.in_pool(safe.SCardGetStatusChange, context, INFINITE, [(reader, PRESENT)])
    green.sleep(0.3)
    natively = [green.in_pool(_exchange, safe, card, number, 50, lambda: None) for number in range(3)]
    lists = [green.in_pool(safe.SCardListReaders, context, []) for _ in range(3)]
    greenlets = [green.spawn(_exchange, safe, card, number, 50, lambda: green.sleep(0)) for number in (8, 9)]
    right = [get() for get in (*natively, *greenlets)]
    listed = [_code(get()) for get in lists]
    cancelled = safe.SCardCancel(context)
    ended = _code(wait())
    timed = _code(green.in_pool(safe.SCardGetStatusChange, context, 100, [(reader, PRESENT)])())
    _say([right, listed, cancelled, ended, timed, safe.SCardReleaseContext(context)])


def releases_beside_a_wait(*how: str) -> None:
    """A greenlet disconnects and releases while threads of the pool wait and exchange."""
    green, safe, context, reader, card = _set_up(*how)
    wait = green.in_pool(safe.SCardGetStatusChange, context, INFINITE, [(reader, PRESENT)])
    exchanges = green.in_pool(_exchange, safe, card, 5, 300, lambda: None)
    green.sleep(0.3)
    ended = green.spawn(lambda: [safe.SCardDisconnect(card, LEAVE), safe.SCardReleaseContext(context)])()
    exchanges()  # calls after the release were refused
    _say([ended, _code(wait()) != OK, safe.SCardIsValidContext(context) != OK])


def greenlets(*how: str) -> None:
    """Greenlets, and the patched threading.Thread, use one context and one card in turn."""
    green, safe, context, reader, card = _set_up(*how)
    import threading

    def poll() -> list[int]:
        codes = set()
        for _ in range(20):
            codes.add(_code(safe.SCardGetStatusChange(context, 10, [(reader, PRESENT)])))
            green.sleep(0.001)
        return sorted(codes)

    def transacts() -> int:
        done = 0
        for _ in range(20):
            done += safe.SCardBeginTransaction(card) == OK
            done += safe.SCardEndTransaction(card, LEAVE) == OK  # without a switch: greenlets are not threads
            green.sleep(0)
        return done

    threaded: list[int] = []
    threads = [
        threading.Thread(target=lambda: threaded.append(_exchange(safe, card, 7, 20, lambda: time.sleep(0.001))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    asked = [green.spawn(_exchange, safe, card, number, 20, lambda: green.sleep(0)) for number in range(4)]
    polled, transacted = green.spawn(poll), green.spawn(transacts)
    right = [get() for get in asked]
    for thread in threads:
        thread.join()
    _say([right, threaded, polled(), transacted(), safe.SCardReleaseContext(context)])


def forks(*how: str) -> None:
    """A greenlet forks while threads of the pool wait and exchange; parent, child and wait continue."""
    green, safe, context, reader, card = _set_up(*how)
    stop: list[bool] = []

    def exchanges() -> bool:
        right = []
        while not stop:
            right.append(safe.SCardTransmit(card, safe.SCARD_PCI_T1, [*ECHO, 5]) == [OK, [5, *RIGHT]])
        return len(right) > 10 and all(right)

    wait = green.in_pool(safe.SCardGetStatusChange, context, INFINITE, [(reader, PRESENT)])
    busy = green.in_pool(exchanges)
    green.sleep(0.2)

    def child() -> list[Any]:
        right = _exchange(safe, card, 3, 10, lambda: green.sleep(0))
        in_pool: Optional[int] = 10
        if green.child_has_pool:
            in_pool = green.in_pool(_exchange, safe, card, 4, 10, lambda: None)()
        timed_out = _code(safe.SCardGetStatusChange(context, 20, [(reader, PRESENT)]))
        return [_code(safe.SCardListReaders(context, [])), right, in_pool, timed_out, safe.SCardReleaseContext(context)]

    children = [green.spawn(_forked, child)() for _ in range(3)]
    after = _exchange(safe, card, 6, 10, lambda: green.sleep(0))
    stop.append(True)
    went_on = busy()
    cancelled = safe.SCardCancel(context)
    _say([children, after, went_on, cancelled, _code(wait()), safe.SCardReleaseContext(context)])


def hands_over(*how: str) -> None:
    """Fork in a handover block; the child and the parent, in this order, ask for the card's status."""
    green, safe, context, _, card = _set_up(*how)
    import pcsc_safe

    pcsc_safe.configure(cards="reset")

    def forked() -> list[Any]:
        with pcsc_safe.handover():
            return _forked(lambda: [_code(safe.SCardStatus(card)), safe.SCardReleaseContext(context)])

    child = green.spawn(forked)()
    _say([child, _code(safe.SCardStatus(card)), safe.SCardReleaseContext(context)])


def classes(*how: str) -> None:
    """After install(), pyscard's classes in greenlets: a monitor of readers, a request and connections; and a fork."""
    library, gateway, order = how
    signal.alarm(50)
    green = LIBRARIES[library]() if order == "patched first" else None
    import pcsc_safe

    pcsc_safe.configure(broker="always" if gateway == "broker" else "on-fork")
    pcsc_safe.install()
    from smartcard.System import readers

    assert len(readers()) == 2
    green = green or LIBRARIES[library]()
    waits = reports_again(library)
    _say([_uses_classes(green), _forked(lambda: _uses_classes(green, waits=waits)), _uses_classes(green, waits=waits)])


def reports_again(library: str) -> bool:
    """Whether pyscard's monitor reports readers if it is restarted.

    Before Python 3.13 it doesn't under eventlet, not even on raw pyscard: eventlet releases a lock of the ended thread
    (Thread._tstate_lock) a second time.
    """
    return library == "gevent" or sys.version_info >= (3, 13)


def _uses_classes(green: Any, *, waits: bool = True) -> list[int]:
    """How many exchanges of each connection were right, and how many readers the monitor reported.

    :param waits: whether to wait for the monitor's report.
    """
    from smartcard.CardRequest import CardRequest
    from smartcard.CardType import AnyCardType
    from smartcard.ReaderMonitoring import ReaderMonitor, ReaderObserver
    from smartcard.System import readers

    class Observer(ReaderObserver):  # type: ignore[misc]
        came = 0

        def update(self, observable: Any, handlers: Any) -> None:
            self.came += len(handlers[0])

    observer, monitor = Observer(), ReaderMonitor(period=0.05)
    monitor.addObserver(observer)
    service = CardRequest(timeout=5, cardType=AnyCardType()).waitforcard()
    connections = [service.connection, *(reader.createConnection() for reader in readers())]

    def exchange(connection: Any, number: int) -> int:
        connection.connect(disposition=LEAVE)
        right = 0
        for _ in range(20):
            right += connection.transmit([*ECHO, number]) == ([number], *RIGHT)
            green.sleep(0)
        connection.disconnect()
        return right

    asked = [green.spawn(exchange, connection, number) for number, connection in enumerate(connections)]
    right = [get() for get in asked]
    for _ in range(100 if waits else 0):
        if observer.came == len(connections) - 1:
            break
        green.sleep(0.05)
    monitor.deleteObserver(observer)
    return [*right, observer.came]
