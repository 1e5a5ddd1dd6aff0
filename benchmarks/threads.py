"""How many calls eight threads make: ``python threads.py SCENE ROUNDS SECONDS VARIANT...``.

In each round every variant runs for SECONDS, in turns, in this one process and on the same sessions.  The order
alternates.  It prints [{variant: microseconds for each call of any thread, or null if they froze}, ...].  After a
freeze no other round is possible, so a variant that may freeze needs a separate process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from typing import Any, Callable

THREADS = 8
MODULES = {"raw": "smartcard.scard", "safe": "pcsc_safe.scard"}
AT_ONCE = [0x80, 0x01, 0x00, 0x00, 0x03, 1, 2, 3]
IN_10_MS = [0x80, 0x02, 0x01, 0x00, 0x03, 1, 2, 3]

Calls = list[Callable[[], Any]]
"""What each thread does, over and over."""


class Sessions:
    """Contexts and cards, as one of the modules takes them.

    :param count: the number of sessions; the n-th one is on the n-th reader.
    """

    def __init__(self, count: int) -> None:
        self.scard: Any = importlib.import_module(MODULES["safe"])
        self.contexts, self.cards = [], []
        for number in range(count):
            _, context = self.scard.SCardEstablishContext(self.scard.SCARD_SCOPE_SYSTEM)
            _, readers = self.scard.SCardListReaders(context, [])
            hresult, card, _ = self.scard.SCardConnect(
                context, readers[number], self.scard.SCARD_SHARE_SHARED, self.scard.SCARD_PROTOCOL_T1
            )
            assert hresult == self.scard.SCARD_S_SUCCESS, self.scard.SCardGetErrorMessage(hresult)
            self.contexts.append(context)
            self.cards.append(card)
        unaware = [(readers[0], self.scard.SCARD_STATE_UNAWARE)]
        _, states = self.scard.SCardGetStatusChange(context, 0, unaware)
        self.known = [(name, state) for name, state, _ in states]

    def of(self, variant: str) -> Sessions:
        """The same for another module: raw takes the native handles."""
        if variant == "safe":
            return self
        other = Sessions.__new__(Sessions)
        other.scard, other.known = importlib.import_module(MODULES[variant]), self.known
        other.contexts, other.cards = [int(each) for each in self.contexts], [int(each) for each in self.cards]
        return other

    def exchange(self, number: int, apdu: list[int]) -> Callable[[], Any]:
        """An exchange with the n-th card."""
        transmit, card, protocol = self.scard.SCardTransmit, self.cards[number], self.scard.SCARD_PCI_T1
        return lambda: transmit(card, protocol, apdu)

    def wait(self, number: int) -> Callable[[], Any]:
        """A wait on the n-th context for events that don't come."""
        change, context, forever, known = (
            self.scard.SCardGetStatusChange,
            self.contexts[number],
            self.scard.INFINITE,
            self.known,
        )
        return lambda: change(context, forever, known)


def own(sessions: Sessions) -> Calls:
    """A context for each thread."""
    return [sessions.exchange(number, AT_ONCE) for number in range(THREADS)]


def slow_cards(sessions: Sessions) -> Calls:
    """The same with cards that take 10 ms."""
    return [sessions.exchange(number, IN_10_MS) for number in range(THREADS)]


def shared(sessions: Sessions) -> Calls:
    """Two threads on one context, which is always busy; a context for each of the others."""
    return [sessions.exchange(0, IN_10_MS)] * 2 + own(sessions)[2:]


def monitored(sessions: Sessions) -> Calls:
    """Two threads on one context, of which one waits for events; a context for each of the others."""
    return [sessions.wait(0), *own(sessions)[: THREADS - 1]]


SCENES: dict[str, Callable[[Sessions], Calls]] = {
    "own": own,
    "slow-cards": slow_cards,
    "shared": shared,
    "monitored": monitored,
}


class Phase:
    """Threads at work for a while."""

    def __init__(self, calls: Calls) -> None:
        self._counts, self._ends = [0] * len(calls), [0.0] * len(calls)
        self._stop = False
        self._start = threading.Barrier(len(calls) + 1)
        self._threads = [threading.Thread(target=self._work, args=each, daemon=True) for each in enumerate(calls)]
        for thread in self._threads:
            thread.start()

    def _work(self, number: int, call: Callable[[], Any]) -> None:
        self._start.wait()
        while not self._stop:
            call()
            self._counts[number] += 1
        self._ends[number] = time.perf_counter()

    def run(self, seconds: float, end: Callable[[], Any]) -> Any:
        """Microseconds a call; None if no call ended in the second half.

        :param end: called at last, to end a wait.
        """
        self._start.wait()
        start = time.perf_counter()
        time.sleep(seconds / 2)
        half = sum(self._counts)
        time.sleep(seconds / 2)
        if sum(self._counts) == half:
            return None
        self._stop = True
        end()
        for thread in self._threads:
            thread.join()
        # The time of each thread ends with its last call.
        return 1e6 / sum(count / (end - start) for count, end in zip(self._counts, self._ends))


def main() -> None:
    """Measure one scene."""
    scene, rounds, seconds, variants = SCENES[sys.argv[1]], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
    sessions = Sessions(THREADS)
    found = []
    for number in range(rounds):
        taken = {}
        for variant in variants if number % 2 else reversed(variants):
            these = sessions.of(variant)
            taken[variant] = Phase(scene(these)).run(seconds, lambda s=these: s.scard.SCardCancel(s.contexts[0]))
        found.append(taken)
        if None in taken.values():
            break
    print(json.dumps(found), flush=True)
    os._exit(0)  # a frozen thread can't be waited for


if __name__ == "__main__":
    main()
