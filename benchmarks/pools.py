"""An application with a pool of workers that use a card: ``python pools.py WAY``, one command a line on stdin.

It connects to the card before it starts workers, like a server that loads the application first.  The commands and
answers have the same format as those of worker.py.

This module imports little, because a spawned worker imports all of it again.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Optional

WAYS: dict[str, tuple[str, str, dict[str, str]]] = {
    "check by hand": ("smartcard.scard", "fork", {}),
    "spawn": ("smartcard.scard", "spawn", {}),
    "safe": ("pcsc_safe.scard", "fork", {"PCSC_SAFE_CARDS": "reconnect"}),
    "cold broker": ("pcsc_safe.scard", "fork", {"PCSC_SAFE_CARDS": "reconnect", "PCSC_SAFE_POLICY": "broker"}),
    "prestarted broker": ("pcsc_safe.scard", "fork", {"PCSC_SAFE_CARDS": "reconnect", "PCSC_SAFE_POLICY": "broker"}),
}
"""The module that it uses, how it starts its workers, and its settings."""

APDU = [0x80, 0x01, 0x00, 0x00, 0x03, 1, 2, 3]
clock = time.perf_counter_ns


class Card:
    """The card of the application.

    :param module: ``smartcard.scard`` or ``pcsc_safe.scard``.
    """

    def __init__(self, module: str) -> None:
        self.scard: Any = importlib.import_module(module)
        self.connect()

    def connect(self) -> None:
        """Establish a context and connect the first card."""
        scard, self.pid = self.scard, os.getpid()
        _, self.context = self._must(scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM))
        _, readers = self._must(scard.SCardListReaders(self.context, []))
        shared = scard.SCARD_SHARE_SHARED
        _, self.card, _ = self._must(scard.SCardConnect(self.context, readers[0], shared, scard.SCARD_PROTOCOL_T1))

    def ask(self) -> bytes:
        """An exchange with the card."""
        return bytes(self._must(self.scard.SCardTransmit(self.card, self.scard.SCARD_PCI_T1, APDU))[1])

    def _must(self, result: Any) -> Any:
        if result[0] != self.scard.SCARD_S_SUCCESS:
            raise RuntimeError(self.scard.SCardGetErrorMessage(result[0]))
        return result


class CheckedCard(Card):
    """The same, which connects again if the PID is another one."""

    def ask(self) -> bytes:
        """Compare the PID, and exchange."""
        if os.getpid() != self.pid:
            self.connect()
        return super().ask()


card: Optional[Card] = None


def open_card(way: str) -> None:
    """In the application, and in each spawned worker."""
    global card
    card = (CheckedCard if way == "check by hand" else Card)(WAYS[way][0])


def task(_: int) -> bytes:
    """What a worker does."""
    assert card is not None
    return card.ask()


class Application:
    """What can be measured.

    :param way: one of WAYS.
    """

    def __init__(self, way: str) -> None:
        _, method, settings = WAYS[way]
        os.environ.update(settings)
        open_card(way)
        self._context = get_context(method)
        self._start = {"initializer": open_card, "initargs": (way,)} if method == "spawn" else {}
        self._kept: Optional[ProcessPoolExecutor] = None

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        start: dict[str, Any] = self._start
        return ProcessPoolExecutor(workers, mp_context=self._context, **start)

    def prestart(self) -> list[float]:
        """Start a broker for the workers before they are forked."""
        importlib.import_module("pcsc_safe").prestart_broker()
        time.sleep(1)
        return []

    def first_answer(self) -> list[float]:
        """The time from a pool's first task to its result."""
        start = clock()
        with self._pool(1) as pool:
            pool.submit(task, 0).result()
            return [(clock() - start) / 1000]

    def tasks(self, count: int) -> list[float]:
        """The time for each of ``count`` tasks, in a pool of two workers that have done some tasks before."""
        if self._kept is None:
            self._kept = self._pool(2)
            list(self._kept.map(task, range(count)))
        start = clock()
        list(self._kept.map(task, range(count)))
        return [(clock() - start) / 1000 / count]

    def end(self) -> None:
        """End the workers."""
        if self._kept is not None:
            self._kept.shutdown()


def main() -> None:
    """Execute commands until stdin ends."""
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    application = Application(sys.argv[1])
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(application, name)(*arguments)), flush=True)
    application.end()


if __name__ == "__main__":
    main()
