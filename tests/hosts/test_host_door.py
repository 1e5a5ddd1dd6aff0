"""The example of a door decides correctly for each card, and misses no event, even if its handlers die."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hosts import PivCard, Program, WatchedCard, raw, until

from pcsc_safe.testing import EchoCard, Reader, VirtualCard, VirtualPcsc

NAME = "door.py"
CARD_AUTHENTICATION = 0x01  # object 5FC101


def fingerprint(card: WatchedCard) -> str:
    return hashlib.sha256(card.certificate(CARD_AUTHENTICATION)).hexdigest()


def copy_of(card: WatchedCard) -> WatchedCard:
    """A card that has the certificate of another, but not its key."""
    copy = WatchedCard.personalised("A thief")
    original = card._applet.data_objects.get_data_object(b"\x5f\xc1\x01")
    copy._applet.data_objects.put_data_object(b"\x5f\xc1\x01", original)
    return copy


class Cards:
    """Two cards of each kind, because a card can be in one reader only, with what the door has to log.

    :ivar admitted: the content of the list of admitted cards.
    """

    def __init__(self) -> None:
        alice, bob, stranger = (WatchedCard.personalised(name) for name in ("Alice", "Bob", "Stranger"))
        empty = PivCard()
        self.admitted = f"{fingerprint(alice)} Alice\n{fingerprint(bob)} Bob B.\n"
        self.said: list[tuple[VirtualCard, str]] = [
            (alice, "open: Alice"),
            (bob, "open: Bob B."),
            (stranger, f"closed: not on the list: {fingerprint(stranger)}"),
            (copy_of(alice), "closed: a copy of the card of Alice"),
            (empty, "closed: the card refuses command CB (6A82)"),
            (EchoCard(), "closed: the card refuses command A4 (6D00)"),
        ]


class Log:
    """What the door logs, by reader."""

    def __init__(self, program: Program, stack: VirtualPcsc) -> None:
        self._lines: dict[str, queue.Queue[str]] = {reader.name: queue.Queue() for reader in stack.readers}
        self._program = program
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(ValueError):  # closed
            for line in self._program.process.stdout or ():
                reader, _, text = line.decode().rstrip("\n").partition(": ")
                self._lines[reader].put(text)

    def next(self, reader: Reader) -> str:
        return self._lines[reader.name].get(timeout=20)

    def is_empty(self) -> bool:
        return all(lines.empty() for lines in self._lines.values())


@contextlib.contextmanager
def door(stack: VirtualPcsc, directory: Path, cards: Cards, **env: str) -> Iterator[tuple[Program, Log]]:
    """The door, waiting for cards."""
    admitted = directory / "admitted"
    admitted.write_text(cards.admitted)
    with Program(stack, directory, NAME, str(admitted), **env) as program:
        yield program, Log(program, stack)


def visit(reader: Reader, log: Log, card: VirtualCard, said: str) -> int:
    """Insert and remove a card, again while its handler dies; return how many times it was inserted."""
    times = 0
    while True:
        times += 1
        reader.insert(card)
        decided = log.next(reader)
        reader.remove()
        assert log.next(reader) == "removed"
        if decided != "closed: the handler died; present the card again":
            assert decided == said
            return times
        assert times < 10


class Killer:
    """Kills the handler that waits for a card, at every so many commands to sign.

    :ivar killed: how many.
    :ivar enter: not set while it waits for the end of the other handlers; then nobody may insert a card.
    """

    def __init__(self, program: Program, every: int) -> None:
        self._program = program
        self._every = every
        self._signing = itertools.count(1)
        self.killed = 0
        self.enter = threading.Event()
        self.enter.set()

    def before(self, number: int) -> None:
        """The card calls this before it signs."""
        if next(self._signing) % self._every == 0:
            self.enter.clear()
            os.kill(until(self._only_one), signal.SIGKILL)
            self.killed += 1
            self.enter.set()

    def _only_one(self) -> int:
        others = self._program.others()
        return others[0] if len(others) == 1 else 0


def visits(directory: Path, count: int, kill_every: int) -> tuple[int, int]:
    """Let this many cards visit two readers at the same time; return the numbers of visits and of killed handlers."""
    cards = [Cards(), Cards()]
    cards[0].admitted += cards[1].admitted
    times = [0, 0]
    errors: list[BaseException] = []
    with VirtualPcsc(2) as stack, door(stack, directory, cards[0]) as (program, log):
        stack.wait_for_clients(1)
        killer = Killer(program, kill_every)

        def people(number: int) -> None:
            try:
                for card, said in itertools.islice(itertools.cycle(cards[number].said), count // 2):
                    assert killer.enter.wait(60)
                    times[number] += visit(stack.readers[number], log, card, said)
            except BaseException as error:
                errors.append(error)

        for card, _ in cards[0].said + cards[1].said:
            if isinstance(card, WatchedCard):
                card.before = killer.before
        threads = [threading.Thread(target=people, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert log.is_empty()
        assert until(lambda: not program.others())
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(20) == 0
        assert program.errors.read_text() == ""
        stack.wait_for_clients(0)
    return sum(times), killer.killed


def test_it_decides(tmp_path: Path) -> None:
    """60 events at two readers: each killed handler is noticed, and each card gets its decision."""
    times, killed = visits(tmp_path, 30, 3)
    assert times == 30 + killed
    assert killed == 7  # of 23 handlers that signed, 16 for a decision


@pytest.mark.long
def test_it_decides_a_thousand_times(tmp_path: Path) -> None:
    """1,000 events and more: 500 cards visit, some several times because their handlers were killed."""
    times, killed = visits(tmp_path, 500, 5)
    assert times == 500 + killed
    assert killed == 62  # of 314 handlers that signed, 252 for a decision


def test_cards_that_are_there_when_it_starts(tmp_path: Path) -> None:
    """Cards that are present at the start get a decision; the monitor waits in PC/SC when the handlers are forked."""
    cards = Cards()
    (alice, said), (echo, refused) = cards.said[0], cards.said[-1]
    with VirtualPcsc(2, [alice, echo]) as stack, door(stack, tmp_path, cards) as (_, log):
        assert log.next(stack.readers[0]) == said
        assert log.next(stack.readers[1]) == refused


def test_a_card_that_hangs_keeps_nobody_out(tmp_path: Path) -> None:
    """While one card doesn't respond, the card in the other reader is admitted."""
    cards = Cards()
    (alice, _), (bob, said) = cards.said[:2]
    go_on = threading.Event()
    alice.before = lambda number: go_on.wait(30)
    with VirtualPcsc(2) as stack, door(stack, tmp_path, cards) as (program, log):
        stack.readers[0].insert(alice)
        until(lambda: program.others() and alice.signing)
        stack.readers[1].insert(bob)
        assert log.next(stack.readers[1]) == said
        go_on.set()
        assert log.next(stack.readers[0]) == "open: Alice"


@pytest.mark.long
def test_the_control(tmp_path: Path) -> None:
    """On raw pyscard handler and parent use one connection to pcscd: not every card gets its decision."""
    cards = Cards()
    wrong = 0
    with VirtualPcsc(2) as stack, door(stack, tmp_path, cards, **raw(tmp_path)) as (_, log):
        stack.wait_for_clients(1)
        for card, said in 3 * cards.said:
            stack.readers[0].insert(card)
            wrong += log.next(stack.readers[0]) != said
            stack.readers[0].remove()
            assert log.next(stack.readers[0]) == "removed"
    assert wrong
