"""A storm of forks in a process whose threads use PC/SC all the time: no hang, no wrong byte, no crash, no leak.

The short version is in every run; the long one by ``pytest -m long``, with the figures printed (``-s`` shows them).
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from typing import Any

import pytest
from forking import in_program, start, wait_for

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe.errors import ForkUnsafeError
from pcsc_safe.testing import VirtualPcsc

OK = safe.SCARD_S_SUCCESS
SHARED = safe.SCARD_SHARE_SHARED
T1 = safe.SCARD_PROTOCOL_T1
READERS = ["Virtual PCD 0 00 00", "Virtual PCD 0 00 01"]
_AT_ONCE = 4  # children


class Tally:
    """What was done, and what went wrong."""

    def __init__(self) -> None:
        self.exchanges = 0
        self.wrong: list[Any] = []

    def expect(self, what: str, got: Any, *right: Any) -> None:
        """Record a result that is not one of the right ones."""
        if got not in right:
            self.wrong.append([what, got])

    def exchange(self, card: Any) -> None:
        """Send bytes that no other process sends, and check that they come back."""
        data = [*os.getpid().to_bytes(4, "big"), *os.urandom(random.randrange(1, 200))]
        answer = safe.SCardTransmit(card, safe.SCARD_PCI_T1, [0x80, 1, 0, 0, len(data), *data])
        self.expect("SCardTransmit", answer, [OK, [*data, 0x90, 0x00]])
        self.exchanges += 1


def establish(tally: Tally) -> Any:
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    tally.expect("SCardEstablishContext", hresult, OK)
    return context


def connect(tally: Tally, context: Any) -> Any:
    hresult, card, _ = safe.SCardConnect(context, random.choice(READERS), SHARED, T1)
    tally.expect("SCardConnect", hresult, OK)
    return card


# What the threads of the parent do repeatedly.


def exchanges(tally: Tally, context: Any, card: Any) -> None:
    tally.exchange(card)


def asks(tally: Tally, context: Any, card: Any) -> None:
    tally.expect("SCardStatus", safe.SCardStatus(card)[0], OK)
    tally.expect("SCardListReaders", safe.SCardListReaders(context, []), [OK, READERS])
    tally.expect("SCardIsValidContext", safe.SCardIsValidContext(context), OK)


def waits(tally: Tally, context: Any, card: Any) -> None:
    states = [(reader, safe.SCARD_STATE_PRESENT) for reader in READERS]
    answer = safe.SCardGetStatusChange(context, random.randrange(1, 30), states)
    tally.expect("SCardGetStatusChange", answer[0], safe.SCARD_E_TIMEOUT)


def comes_and_goes(tally: Tally, context: Any, card: Any) -> None:
    own = establish(tally)
    tally.expect("SCardListReaders", safe.SCardListReaders(own, []), [OK, READERS])
    tally.expect("SCardReleaseContext", safe.SCardReleaseContext(own), OK)


# Without SCardConnect and SCardDisconnect: libpcsclite (1.9.9) changes a context's list of cards without the lock
# under which calls on other contexts' cards read it, and so dies of SIGSEGV, on raw pyscard and without any fork.
THREADS = [exchanges, exchanges, exchanges, asks, waits, waits, comes_and_goes, comes_and_goes]


def connects(tally: Tally) -> None:
    own = establish(tally)
    own_card = connect(tally, own)
    tally.exchange(own_card)
    tally.expect("SCardDisconnect", safe.SCardDisconnect(own_card, safe.SCARD_LEAVE_CARD), OK)
    tally.expect("SCardReleaseContext", safe.SCardReleaseContext(own), OK)


def child(levels: int, context: Any, card: Any, own_context: Any, own_card: Any) -> Any:
    """Use inherited handles, from several threads and from one, and new ones; then fork, if requested."""
    tally, below = Tally(), []
    try:
        if levels > 1 and random.random() < 0.5:
            below.append(start(child, levels - 1, context, card, own_context, own_card))
        for inherited, its_card in ((context, card), (own_context, own_card)):
            first = safe.SCardTransmit(its_card, 2, [0x80, 1, 0, 0, 0])[0]
            tally.expect("SCardTransmit", first, OK, safe.SCARD_W_RESET_CARD)  # reset if the owner has ended
            tally.expect("SCardListReaders", safe.SCardListReaders(inherited, []), [OK, READERS])
            answer = safe.SCardReconnect(its_card, SHARED, T1, safe.SCARD_LEAVE_CARD)
            tally.expect("SCardReconnect", answer, [OK, T1])
            for _ in range(3):
                tally.exchange(its_card)
        waits(tally, context, card)
        connects(tally)
        if levels > 1 and not below:
            below.append(start(child, levels - 1, context, card, own_context, own_card))
        for started in below:
            exchanged, wrong = wait_for(started)
            tally.exchanges += exchanged
            tally.wrong += wrong
        for inherited, its_card in ((context, card), (own_context, own_card)):
            tally.exchange(its_card)
            tally.expect("SCardReleaseContext", safe.SCardReleaseContext(inherited), OK)
    except ForkUnsafeError as error:
        tally.wrong.append(["unquiet", str(error)])
    return tally.exchanges, tally.wrong


def storm(count: str, levels: str) -> None:
    """The program: threads, forks, and the figures of both."""
    random.seed(0)
    # Longer than any call takes on a busy machine: no fork may be unquiet.
    pcsc_safe.configure(quiesce_timeout=20, policy="reestablish")
    safe.SCardReleaseContext(establish(Tally()))  # opens everything that pcsc_safe keeps open
    descriptors = sorted(os.listdir("/proc/self/fd"))
    tallies, stop = [Tally() for _ in range(len(THREADS) + 1)], threading.Event()
    shared = establish(tallies[-1])
    shared_card = connect(tallies[-1], shared)
    own = [establish(tallies[-1]) for _ in THREADS]
    own_cards = [connect(tallies[-1], context) for context in own]

    def run(number: int) -> None:
        tally, step, turn = tallies[number], THREADS[number], 0
        while not stop.is_set():
            turn += 1
            step(tally, *((shared, shared_card) if turn % 2 else (own[number], own_cards[number])))

    endless = threading.Thread(target=wait_for_ever, args=(tallies[-1], shared, stop))
    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(THREADS))]
    began = time.monotonic()
    for thread in (*threads, endless):
        thread.start()
    children: list[Any] = []
    exchanged, held = 0, []
    for number in range(int(count)):
        before = time.monotonic()
        children.append(start(child, int(levels), shared, shared_card, own[number % 8], own_cards[number % 8]))
        held.append(time.monotonic() - before)
        if len(children) == _AT_ONCE:
            exchanged += collect(children.pop(0), tallies[-1])
    for started in children:
        exchanged += collect(started, tallies[-1])
    seconds = time.monotonic() - began
    stop.set()
    for thread in threads:
        thread.join()
    while endless.is_alive():
        safe.SCardCancel(shared)
        endless.join(0.05)
    for context in (shared, *own):
        tallies[-1].expect("SCardReleaseContext", safe.SCardReleaseContext(context), OK)
    wrong = [entry for tally in tallies for entry in tally.wrong]
    figures = {
        "forks": int(count) * int(levels),
        "seconds": round(seconds, 1),
        "exchanges in the parent": sum(tally.exchanges for tally in tallies),
        "exchanges in children": exchanged,
        "median fork, ms": round(sorted(held)[len(held) // 2] * 1000, 1),
        "longest fork, ms": round(max(held) * 1000, 1),
    }
    unquiet = sum(what == "unquiet" for what, _ in wrong)
    leaked = sorted(os.listdir("/proc/self/fd")) != descriptors
    print(json.dumps([figures, wrong[:10], len(wrong), unquiet, leaked]), flush=True)


def wait_for_ever(tally: Tally, context: Any, stop: threading.Event) -> None:
    """Wait for events without end; only the end of the program may end the wait."""
    states = [(reader, safe.SCARD_STATE_PRESENT) for reader in READERS]
    while not stop.is_set():
        answer = safe.SCardGetStatusChange(context, safe.INFINITE, states)[0]
        if answer != safe.SCARD_E_CANCELLED or not stop.is_set():
            tally.wrong.append(["the endless wait ended", answer])
            return


def collect(started: Any, tally: Tally) -> int:
    """How many exchanges a child made."""
    try:
        exchanged, wrong = wait_for(started)
    except AssertionError as error:
        tally.wrong.append(["a child", str(error)])
        return 0
    tally.wrong += wrong
    return int(exchanged)


def check(stack: VirtualPcsc, forks: int, levels: int, timeout: float = 60) -> dict[str, Any]:
    """Run a storm and check its result."""
    done = in_program(storm, str(forks), str(levels), env=stack.env, timeout=timeout)
    assert done.returncode == 0, done.stderr
    figures, *found = json.loads(done.stdout)
    assert found == [[], 0, 0, False]
    stack.wait_for_clients(0)
    assert figures["exchanges in children"] >= figures["forks"] * 9
    return dict(figures)


@pytest.mark.parametrize(("forks", "levels"), [(60, 1), (8, 3)])
def test_a_storm_of_forks(pcsc_stack: VirtualPcsc, forks: int, levels: int) -> None:
    """With forks among eight threads and an endless wait, every process gets its own bytes, and nothing is left."""
    check(pcsc_stack, forks, levels)


@pytest.mark.long
@pytest.mark.parametrize(("forks", "levels"), [(2000, 1), (300, 3)])
def test_a_long_storm_of_forks(pcsc_stack: VirtualPcsc, forks: int, levels: int) -> None:
    """The same, for long enough to meet rare cases."""
    print(check(pcsc_stack, forks, levels, timeout=900))
