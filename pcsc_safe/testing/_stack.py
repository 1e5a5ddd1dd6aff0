"""`VirtualPcsc`: a complete private PC/SC stack, with readers and cards.

Invariant: everything that a stack has started or created is removed when it is closed, or soon after its process died.

At a fork: the stack belongs to the process that started it.  Its children may use it as PC/SC clients and read its
properties.  Everything that would change it raises PcscStackError there, and leaving its with block does nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Optional

from . import _activation, _install, _slots
from ._daemon import Daemon
from ._errors import PcscStackError
from ._nudge import nudge
from ._vpcd import PortPair, Slot
from ._wire import MAX_READERS, Probe, ReaderState
from .cards import VirtualCard, check_card

__all__ = ["Reader", "VirtualPcsc"]

# By a line of pcscd's log; %s is pcscd's run directory.
_REMEDIES = {
    "cannot create %s: ": "without root, pcscd can't create its run directory: sudo mkdir -p %s",
    "failed to map segment": "more than two readers need a TMPDIR that is not mounted noexec",
}
_LOG_TAIL = 2000  # characters


class Reader:
    """A virtual reader; `VirtualPcsc` creates it."""

    def __init__(self, stack: VirtualPcsc, name: str, slot: Slot) -> None:
        self.name = name
        """The name by which PC/SC lists it."""
        self._stack = stack
        self._slot = slot

    def __repr__(self) -> str:
        return f"<Reader {self.name!r}: {self.card!r}>"

    @property
    def card(self) -> Optional[VirtualCard]:
        """The card in the reader."""
        return self._slot.card

    def insert(self, card: VirtualCard) -> None:
        """Insert a card; return when pcscd has detected it and powered it up.

        While pcscd is down (after `VirtualPcsc.kill`), the card stays in the reader until pcscd is up again.

        :param card: a card that is in no reader.
        :raises PcscStackError: it is not a card, there is a card in the reader, or pcscd does not detect this one.
        """
        check_card(card)
        with self._stack._exclusive() as stack:
            if self.card is not None:
                raise PcscStackError(f"there is a card in {self.name!r}", remedy="remove() it first")
            if any(reader.card is card for reader in stack.readers):
                raise PcscStackError("this card is in another reader", remedy="remove() it there first")
            self._slot.card = card
            stack._cards_seen.append(card)
            try:
                stack._plug([self])
            except BaseException:
                self._take_out()
                raise

    def remove(self) -> VirtualCard:
        """Remove the card; return it when pcscd has detected that.

        :raises PcscStackError: there is no card in the reader, or pcscd still detects it.
        """
        with self._stack._exclusive() as stack:
            card = self.card
            if card is None:
                raise PcscStackError(f"there is no card in {self.name!r}", remedy="insert() one first")
            with stack._until_detected([self]):
                self._take_out()
            return card

    def _take_out(self) -> None:
        try:
            self._slot.unplug()
        finally:
            self._slot.card = None

    def reset(self) -> None:
        """Reset the card as another application would: every application that is connected gets SCARD_W_RESET_CARD.

        :raises PcscStackError: there is no card, or an application holds it exclusively or in a transaction.
        """
        with self._stack._exclusive() as stack, stack._explained(), stack._probe() as probe:
            probe.reset(self.name)


class VirtualPcsc:
    """A private pcscd with virtual readers; a context manager.

    It needs no hardware, no system pcscd, and no root if the directory /run/pcscd exists.  Several can run at the same
    time.  The cards run in threads of this process.  Inside the block, PC/SC calls of this process and its children use
    this stack, unless ``activate=False``; see `activated`.

    :param readers: the number of readers, 1 to 16.  vpcd's readers come in pairs: for an odd number pcscd lists one
        more, which is always empty.
    :param cards: the cards in the first readers, for example ``[EchoCard()]``; None leaves a reader empty.
    :param activate: whether PC/SC calls in this process use this stack.
    :param timeout: seconds that pcscd may take for each request.
    :raises ValueError: ``readers`` is not 1 to 16, or there are more cards than readers.
    :raises PcscStackError: an item of ``cards`` is not a card.  On entry: pcscd or vpcd is not installed, or does not
        start; the error says what to do.  On exit: the code of a card raised an exception, and the block did not; the
        card's exception is the error's cause.
    """

    def __init__(
        self,
        readers: int = 2,
        cards: Sequence[Optional[VirtualCard]] = (),
        *,
        activate: bool = True,
        timeout: float = 20.0,
    ) -> None:
        for card in cards:
            if card is not None:
                check_card(card)
        if not 1 <= readers <= MAX_READERS:
            raise ValueError(f"pcscd serves 1 to {MAX_READERS} readers, not {readers}; start several stacks for more")
        if len(cards) > readers:
            raise ValueError(f"{len(cards)} cards for {readers} readers; ask for more readers")
        self.readers: tuple[Reader, ...] = ()
        """The readers, in the order in which PC/SC lists them; empty outside the block."""
        self._count = readers
        self._first_cards = tuple(cards)
        self._activate = activate
        self._timeout = timeout
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._daemon: Optional[Daemon] = None
        self._cards_seen: list[VirtualCard] = []
        self._ports: list[PortPair] = []  # the readers' devices, then those that pcscd adds and removes again
        self._slots = 0  # that pcscd has for readers; 0: it does not matter
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> VirtualPcsc:
        if self._daemon is not None:
            raise PcscStackError("this virtual PC/SC stack is running", remedy="make another VirtualPcsc")
        self._owner = os.getpid()
        self._cards_seen = []
        with contextlib.ExitStack() as undo:
            self._build(undo)
            self.start()
            if self._activate:
                undo.enter_context(self.activated())
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._undo.close()
        if error is None:
            self._report()

    @property
    def env(self) -> dict[str, str]:
        """The environment for a subprocess that should use this stack, based on this process's."""
        return {**os.environ, _activation.VARIABLE: self._running().path}

    @property
    def pid(self) -> int:
        """The process ID of pcscd: 0 after `kill`; still the old one after pcscd has died by itself."""
        return self._running().pid

    @property
    def log(self) -> str:
        """What pcscd has logged since the block was entered, over all restarts; no APDUs."""
        return self._running().log()

    def clients(self) -> int:
        """How many connections pcscd serves now: one for each PC/SC context that is established.

        pcscd detects the end of a context a little later: see `wait_for_clients`.
        """
        path = self._running().path
        # no lock in a child: a thread that it does not have may have held it at the fork
        with self._lock if os.getpid() == self._owner else contextlib.nullcontext():
            return _connections(path)

    def wait_for_clients(self, count: int, timeout: float = 10.0) -> None:
        """Wait until pcscd serves this number of connections.

        :param count: the number of connections.
        :param timeout: seconds.
        :raises TimeoutError: after ``timeout``, it serves more or fewer.
        """
        deadline = time.monotonic() + timeout
        while (now := self.clients()) != count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout:g} s for pcscd to have {count} clients: it has {now}")
            # the kernel has no event for it
            time.sleep(0.002)

    def kill(self) -> None:
        """Kill pcscd with SIGKILL.  Until `start`, PC/SC calls fail; cards stay in their readers, without power."""
        with self._exclusive():
            self._running().kill()
            self._unplug()

    def start(self) -> None:
        """Start pcscd after `kill`, or after it died by itself; return when it has detected the readers and the cards.

        :raises PcscStackError: it does not start; the text has the end of its log.
        """
        with self._exclusive(), self._explained():
            self._unplug()
            self._configure()
            self._running().start()
            with self._probe() as probe:
                self._check_readers(probe.states())
                self._slots = probe.slots() if self._slots else 0
            self._running().settle()
            self._plug([reader for reader in self.readers if reader.card is not None])

    def restart(self) -> None:
        """`kill` and `start`: every session is lost, and the cards are reset."""
        with self._exclusive():
            self.kill()
            self.start()

    @contextlib.contextmanager
    def activated(self) -> Iterator[VirtualPcsc]:
        """Let PC/SC calls of this process use this stack while a block runs, by PCSCLITE_CSOCK_NAME in os.environ.

        libpcsclite reads the variable once in the life of a process, at the first PC/SC call.  So the variable has one
        path for the whole process, a symbolic link to the stack that was activated last: stacks can follow each other,
        or be nested.  If a process has used PC/SC before its first stack, its calls can't use a stack any more.
        """
        with contextlib.ExitStack() as undo:
            with self._exclusive():
                switch, stack = _activation.switch(), _activation.Active(self._running().path, self._slots)
                undo.callback(switch.deactivate, stack)  # first, because a signal handler may raise
                switch.activate(stack)
            yield self

    def _build(self, undo: contextlib.ExitStack) -> None:
        """Everything but pcscd itself."""
        installed = _find()
        self._slots = _slots.LEAST if _slots.matter(installed) else 0
        undo.callback(self._forget)
        self._reserve(self._device_count)
        self._daemon = Daemon(installed, _activation.switch().path, self._timeout)
        undo.callback(self._daemon.close)
        readers = []
        for index in range(self._count):
            (name, port), number = self._devices()[index // 2], index % 2
            readers.append(Reader(self, f"{name} 00 {number:02X}", Slot(port + number)))
        self.readers = tuple(readers)
        undo.callback(self._unplug)
        for reader, card in zip(self.readers, self._first_cards):
            reader._slot.card = card
            if card is not None:
                self._cards_seen.append(card)

    @property
    def _device_count(self) -> int:
        return (self._count + 1) // 2

    def _devices(self) -> list[tuple[str, int]]:
        return [(f"Virtual PCD {number}", pair.port) for number, pair in enumerate(self._ports[: self._device_count])]

    def _reserve(self, count: int) -> None:
        """Reserve ports for so many devices."""
        while len(self._ports) < count:
            self._ports.append(PortPair())

    def _configure(self) -> None:
        """Write the configuration that pcscd reads when it starts."""
        surplus = _slots.hidden_devices(self._device_count, self._slots and _slots.wanted(self._device_count))
        shown, in_all = self._device_count, self._device_count + max(0, surplus - 1)
        self._reserve(in_all)
        hidden = [pair.port for pair in self._ports[shown:in_all]]
        self._running().configure(self._devices(), hidden, refused=surplus > 0)

    def _forget(self) -> None:
        self._daemon = None
        self.readers = ()
        while self._ports:
            self._ports.pop().close()

    def _running(self) -> Daemon:
        if self._daemon is None:
            raise PcscStackError("this virtual PC/SC stack is not running", remedy="use it in a with block")
        return self._daemon

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[VirtualPcsc]:
        """Guards everything that changes the stack: one thread at a time, and never a forked child."""
        if os.getpid() != self._owner:
            problem = (
                f"this virtual PC/SC stack belongs to process {self._owner}, and this is its forked child {os.getpid()}"
            )
            raise PcscStackError(problem, remedy="change it in that process, or start another stack here")
        with self._lock:
            yield self

    def _plug(self, readers: Sequence[Reader]) -> None:
        if self.pid:
            with self._until_detected(readers):
                for reader in readers:
                    reader._slot.plug()

    def _unplug(self) -> None:
        for reader in self.readers:
            reader._slot.unplug()

    def _probe(self) -> Probe:
        return Probe(self._running().path, self._timeout)

    @contextlib.contextmanager
    def _until_detected(self, readers: Sequence[Reader]) -> Iterator[None]:
        """Insert or remove the cards of these readers in the block; wait until pcscd has detected all that.

        The state of a reader doesn't tell: if a client resets a card that is gone, pcscd changes the state, but hasn't
        detected the removal, and doesn't detect a card that is inserted before it has.
        """
        if not self.pid or not readers:
            yield
            return
        before: dict[str, int] = {}
        with contextlib.suppress(OSError), self._probe() as probe:  # pcscd may have died: the wait below says so
            before = {state.name: state.events for state in probe.states()}
        yield
        wanted = {reader.name: reader.card is not None for reader in readers}

        def are_detected(states: Sequence[ReaderState]) -> bool:
            return all(
                state.events != before.get(state.name) and wanted[state.name] == state.present == state.powered
                for state in states
                if state.name in wanted
            )

        with self._explained(), self._probe() as probe:
            probe.wait(are_detected, hurry=lambda: nudge(self.pid))

    def _check_readers(self, states: Sequence[ReaderState]) -> None:
        names = {state.name for state in states}
        missing = {reader.name for reader in self.readers} - names
        if missing:
            raise ConnectionError(f"no reader {', '.join(sorted(missing))}")
        if any(name.startswith(_slots.HIDDEN) for name in names):
            raise ConnectionError("it still lists readers that it should have removed")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn failures to reach pcscd into an error that quotes its log."""
        try:
            yield
        except OSError as error:
            log = self.log
            remedy = "see the end of its log:\n" + log[-_LOG_TAIL:]
            directory = _find().directory
            for symptom, hint in _REMEDIES.items():
                if symptom.replace("%s", directory) in log:
                    remedy = f"{hint.replace('%s', directory)}; {remedy}"
            raise PcscStackError(f"pcscd does not serve the virtual readers ({error})", remedy=remedy) from error

    def _report(self) -> None:
        for card in self._cards_seen:
            if card.errors:
                problem = f"the code of {type(card).__name__} raised {type(card.errors[0]).__name__}"
                raise PcscStackError(problem, remedy="see the cause; card.errors lists all of them") from card.errors[0]


def _find() -> _install.Installed:
    found = _install.look()
    if isinstance(found, _install.Missing):
        raise PcscStackError(found.problem, remedy=found.remedy)
    return found


def _connections(path: str) -> int:
    """Connections to a listening Unix socket that its server has not closed; state 03 in /proc is "connected"."""
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as table:
        rows = [line.split(maxsplit=7) for line in table]
    return sum(len(row) == 8 and row[5] == "03" and row[7].rstrip("\n") == path for row in rows)
