"""Two processes with two threads each use two readers, step by step, on raw pyscard and on pcsc_safe.

On raw pyscard each thread has a context, as pcsc-lite requires; on pcsc_safe the threads of a process share one.  A
step is blocked if it doesn't return soon.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import select
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Optional

from forking import forks_with_threads

SOON = 0.3  # s; pcscd checks every 0.1 s whether a transaction has ended
PATIENCE = 5
ENDS = ("End", "Disconnect", "Reconnect")
OPERATIONS = ("Begin", "Connect", "Transmit", "Status", "Reconnect", "Disconnect", "End")
BEHIND_A_TRANSACTION = ("Begin", "Connect", "Transmit", "Status", "Reconnect", "Disconnect")


blocked_steps: list[int] = []
"""How many threads were blocked on raw pyscard, after each step."""


class Step(NamedTuple):
    """What a thread does; each thread has its own handle for each reader."""

    process: int
    thread: int
    operation: str
    reader: int

    def __repr__(self) -> str:
        return f"{self.process}{self.thread} {self.operation} {self.reader}"

    @property
    def who(self) -> tuple[int, int]:
        return self.process, self.thread


THREADS = tuple(itertools.product((0, 1), (0, 1)))
EVERY_STEP = [Step(*who, operation, reader) for who in THREADS for operation in OPERATIONS for reader in (0, 1)]


class Worker:
    """A process that makes the requested calls, each of its threads for itself.

    :ivar pending: the threads that haven't returned from their step.
    """

    def __init__(self, scard: Any, readers: tuple[str, ...], is_shared: bool) -> None:
        ours, self._commands = os.pipe()
        self._answers, theirs = os.pipe()
        with forks_with_threads():
            self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.alarm(300)
                os.close(self._commands)
                _Obeying(scard, readers, is_shared, theirs).run(ours)
            finally:
                os._exit(0)
        os.close(ours)
        os.close(theirs)
        self.pending: set[int] = set()
        self._codes: dict[int, int] = {}

    def tell(self, step: Step) -> None:
        """Start a step."""
        self.pending.add(step.thread)
        os.write(self._commands, f"{step.thread}{step.reader}{step.operation}\n".encode())

    def listen(self, deadline: float, thread: Optional[int] = None) -> None:
        """Read results until a thread or all have returned, or the time is over; read what is there in any case."""
        while thread in self.pending if thread is not None else self.pending:
            if not select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return
            data = os.read(self._answers, 4096)
            assert data, "a process has died"
            for line in data.decode().splitlines():
                ident, code = map(int, line.split())
                self.pending.discard(ident)
                self._codes[ident] = code

    def code(self, thread: int) -> int:
        """The return code of a thread's last step."""
        return self._codes[thread]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._commands)
        os.close(self._answers)


class _Obeying:
    """The code that runs in a :class:`Worker`."""

    def __init__(self, scard: Any, readers: tuple[str, ...], is_shared: bool, answers: int) -> None:
        self._scard, self._readers, self._answers = scard, readers, answers
        contexts = [scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)[1] for _ in range(1 if is_shared else 2)]
        self._contexts = contexts * (2 if is_shared else 1)
        self._cards: dict[tuple[int, int], Any] = {}

    def run(self, commands: int) -> None:
        tasks = [queue.SimpleQueue[tuple[str, int]]() for _ in range(2)]
        for thread in (0, 1):
            threading.Thread(target=self._obey, args=(thread, tasks[thread]), daemon=True).start()
        for line in open(commands):  # noqa: SIM115  it ends with the process
            tasks[int(line[0])].put((line[2:].strip(), int(line[1])))

    def _obey(self, thread: int, tasks: Any) -> None:
        while True:
            operation, reader = tasks.get()
            code = getattr(self, f"_{operation.lower()}")(thread, reader)
            os.write(self._answers, f"{thread} {code & 0xFFFFFFFF}\n".encode())

    def _connect(self, thread: int, reader: int) -> int:
        s = self._scard
        before = self._cards.get((thread, reader))
        code, card, _ = s.SCardConnect(self._contexts[thread], self._readers[reader], s.SCARD_SHARE_SHARED, 2)
        if code == 0:
            self._cards[thread, reader] = card
            if before is not None:
                s.SCardDisconnect(before, s.SCARD_LEAVE_CARD)
        return int(code)

    def _begin(self, thread: int, reader: int) -> int:
        return self._on(thread, reader, "SCardBeginTransaction")

    def _end(self, thread: int, reader: int) -> int:
        return self._on(thread, reader, "SCardEndTransaction", self._scard.SCARD_LEAVE_CARD)

    def _transmit(self, thread: int, reader: int) -> int:
        return self._on(thread, reader, "SCardTransmit", self._scard.SCARD_PCI_T1, [0x80, 1, 0, 0, 1, 7])

    def _status(self, thread: int, reader: int) -> int:
        return self._on(thread, reader, "SCardStatus")

    def _reconnect(self, thread: int, reader: int) -> int:
        s = self._scard
        return self._on(thread, reader, "SCardReconnect", s.SCARD_SHARE_SHARED, 2, s.SCARD_LEAVE_CARD)

    def _disconnect(self, thread: int, reader: int) -> int:
        code = self._on(thread, reader, "SCardDisconnect", self._scard.SCARD_LEAVE_CARD)
        if code == 0:
            self._cards.pop((thread, reader), None)
        return code

    def _on(self, thread: int, reader: int, function: str, *arguments: Any) -> int:
        card = self._cards.get((thread, reader))
        if card is None:
            return 1
        result = getattr(self._scard, function)(card, *arguments)
        return int(result[0] if isinstance(result, (list, tuple)) else result)


class Side:
    """Two processes on one of the libraries."""

    def __init__(self, scard: Any, readers: tuple[str, ...], is_shared: bool) -> None:
        self.workers = [Worker(scard, readers, is_shared) for _ in (0, 1)]
        self._begun: set[tuple[tuple[int, int], int]] = set()
        self._last: dict[tuple[int, int], Step] = {}

    def tell(self, step: Step) -> None:
        """Start a step."""
        self.held()
        self._last[step.who] = step
        self.workers[step.process].tell(step)

    def held(self) -> set[tuple[tuple[int, int], int]]:
        """Which thread is in a transaction with which reader."""
        for who, step in list(self._last.items()):
            if who not in self.blocked():
                succeeded = self.workers[step.process].code(step.thread) == 0
                if succeeded and step.operation == "Begin":
                    self._begun.add((who, step.reader))
                elif step.operation == ("Disconnect" if succeeded else "End"):  # End may end a nested one
                    self._begun.discard((who, step.reader))
                del self._last[who]
        return self._begun

    def listen(self, deadline: float, step: Optional[Step] = None) -> None:
        """Wait until the step returns; without a step, until all blocked ones return."""
        for number, worker in enumerate(self.workers):
            if step is None or step.process == number:
                worker.listen(deadline, step.thread if step else None)

    def blocked(self) -> set[tuple[int, int]]:
        return {(number, thread) for number, worker in enumerate(self.workers) for thread in worker.pending}


@contextlib.contextmanager
def sides(raw: Any, safe: Any, raw_readers: tuple[str, ...], safe_readers: tuple[str, ...]) -> Iterator[list[Side]]:
    """Raw pyscard with a context for each thread, and pcsc_safe with one for both."""
    both: list[Side] = []
    try:
        both.append(Side(raw, raw_readers, is_shared=False))
        both.append(Side(safe, safe_readers, is_shared=True))
        yield both
    finally:
        for side in both:
            for worker in side.workers:
                worker.kill()


def _listen(both: list[Side], step: Optional[Step] = None) -> None:
    deadline = time.monotonic() + SOON
    for side in both:
        side.listen(deadline, step)


def difference(both: list[Side], schedule: Iterable[Step]) -> str:
    """How pcsc_safe blocks where raw pyscard doesn't, or returns something else; '' if it doesn't.

    If two threads wait for one transaction, pcscd chooses the next one, not always the same.  From there on, only
    whether every thread finishes is compared.
    """
    raw, safe = both
    done: list[Step] = []
    for step in schedule:
        before = raw.blocked() | safe.blocked()
        if step.who in before or any(_deadlocks(side, step, before) for side in both):
            continue
        done.append(step)
        for side in both:
            side.tell(step)
        _listen(both, step)
        if step.operation in ENDS:
            _listen(both)
        for _ in range(PATIENCE):  # pcscd may notice the end of a transaction later for one side
            if safe.blocked() - raw.blocked():
                _listen([safe, raw])
        blocked_steps.append(len(raw.blocked()))
        if safe.blocked() - raw.blocked():
            if len(before) > 1:
                break
            return f"{done}: blocked {safe.blocked()}, raw {raw.blocked()}"
        if not before and step.who not in raw.blocked() | safe.blocked():
            codes = [side.workers[step.process].code(step.thread) for side in both]
            if codes[0] != codes[1]:
                return f"{done}: raw returned {codes[0]:#x}, pcsc_safe {codes[1]:#x}"
    left = [_unwound(side) for side in both]
    return f"{done}: deadlock of {left[1]}, raw {left[0]}" if left[1] - left[0] else ""


def _deadlocks(side: Side, step: Step, blocked: set[tuple[int, int]]) -> bool:
    """Whether threads would wait for each other's transactions, or for their own, which blocks pcscd for good."""
    held = side.held()
    if step.operation == "Connect" and (step.who, step.reader) in held:
        return True
    return any(reader != step.reader for who, reader in held if who == step.who) and any(
        who in blocked for who, reader in held if reader == step.reader and who != step.who
    )


def _unwound(side: Side) -> set[tuple[int, int]]:
    """The threads that are still blocked after all others have repeatedly ended all transactions."""
    for _ in range(PATIENCE):
        for who, reader in itertools.product(THREADS, (0, 1)):
            while who not in side.blocked():
                step = Step(*who, "End", reader)
                side.tell(step)
                _listen([side], step)
                if step.who in side.blocked() or side.workers[step.process].code(step.thread) != 0:
                    break
        if not side.blocked():
            break
        _listen([side])
    return side.blocked()


def connected() -> list[Step]:
    """Each thread has a handle for each reader."""
    return [Step(*who, "Connect", reader) for who in THREADS for reader in (0, 1)]


def crossed() -> Iterator[list[Step]]:
    """Each process has a transaction with one reader, and another of its threads requests the other one, in every way.

    Then both transactions end, in either order, in every way.  Afterwards all threads use both readers.
    """
    begun = [Step(0, 0, "Begin", 0), Step(1, 0, "Begin", 1)]
    ends = [Step(0, 0, "End", 0), Step(1, 0, "End", 1)]
    uses = [Step(*who, "Transmit", reader) for who in THREADS for reader in (0, 1)]
    for first, second in itertools.product(BEHIND_A_TRANSACTION, BEHIND_A_TRANSACTION):
        wants = [Step(0, 1, first, 1), Step(1, 1, second, 0)]
        amid = [Step(0, 0, "Transmit", 0), Step(1, 0, "Status", 1)]
        order = ends if BEHIND_A_TRANSACTION.index(first) % 2 else ends[::-1]
        yield [*connected(), *begun, *wants, *amid, *order, *uses]


def in_one_process() -> Iterator[list[Step]]:
    """Two threads of one process are in transactions; the other process and one of the two request the same readers."""
    begun = [Step(0, 0, "Begin", 0), Step(0, 1, "Begin", 1)]
    for wanted in BEHIND_A_TRANSACTION:
        for end in ("End", "Disconnect", "Reconnect"):
            wants = [Step(1, 0, wanted, 0), Step(1, 1, wanted, 1), Step(0, 0, wanted, 1)]
            yield [*connected(), *begun, *wants, Step(0, 1, end, 1), Step(0, 0, end, 0), Step(0, 0, "Status", 1)]
