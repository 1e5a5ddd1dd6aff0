"""Brokers as the kernel shows them, and their clients as a test sees them.

A client is a forked child (:class:`Client`) or a program (:class:`Program`).  It exchanges messages with the test while
it runs, so that the test knows what it is doing, and can kill it there.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Optional

import forking
import pytest
from forking import start, wait_for

from pcsc_safe.testing import EchoCard, VirtualPcsc
from pcsc_safe.testing._install import Missing, look

ENOUGH = 20  # s; nothing takes that long
_PROGRAM = 90  # s; no whole program takes that long
SOON = 5.0  # s; a broker that has lost its client ends within this time, on a busy machine, too
_COMMANDS = (b"pcsc_safe.broker", b"--pcsc-safe-broker")
looks_into_brokers = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can look into a broker: it is not dumpable"
)


class Process(NamedTuple):
    """A process that another process has started."""

    pid: int
    state: str
    command: bytes


def _processes(parent: int) -> list[Process]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, ppid = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(ppid) == parent:
                found.append(Process(int(directory.name), state, (directory / "cmdline").read_bytes()))
    return found


def brokers(parent: Optional[int] = None) -> list[int]:
    """The PIDs of the running brokers that a process has started.

    :param parent: None for this process.
    """
    started = _processes(os.getpid() if parent is None else parent)
    return [each.pid for each in started if each.state not in "ZX" and any(text in each.command for text in _COMMANDS)]


def broker(parent: Optional[int] = None) -> int:
    """The PID of the only broker that a process has started."""
    (pid,) = brokers(parent)
    return pid


def children() -> list[int]:
    """The children of this process for which it hasn't waited."""
    return [each.pid for each in _processes(os.getpid())]


class Watch:
    """Detects the end of a process, even if another process gets the same PID."""

    def __init__(self, pid: int) -> None:
        self._process = os.pidfd_open(pid)

    def ends(self, within: float = SOON) -> bool:
        """Whether the process ends within so many seconds, or has ended."""
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return bool(poll.poll(within * 1000))

    def close(self) -> None:
        os.close(self._process)


@contextlib.contextmanager
def watched(pid: int) -> Iterator[Watch]:
    """A :class:`Watch` for the duration of a block."""
    watch = Watch(pid)
    try:
        yield watch
    finally:
        watch.close()


@contextlib.contextmanager
def stopped(pid: int, then: int = signal.SIGKILL) -> Iterator[None]:
    """Stop a process for the duration of a block, then kill it, or send it another signal."""
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "it has stopped")
        yield
    finally:
        os.kill(pid, then)


class Link:
    """The client's end of the connection to the test."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def say(self, value: Any) -> None:
        self._connection.send(value)

    def hear(self) -> Any:
        if not self._connection.poll(ENOUGH):
            raise TimeoutError(f"heard nothing for {ENOUGH} s")
        return self._connection.recv()


class Client(Link):
    """A forked child that runs ``function(link, *arguments)``.

    :param fork: how to fork.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, fork: Callable[[], int] = forking.fork) -> None:
        ours, theirs = multiprocessing.Pipe()
        super().__init__(ours)
        self._child: Optional[tuple[int, int]] = start(function, Link(theirs), *arguments, fork=fork)
        theirs.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if self._child:
            self.kill()
        self._connection.close()

    def result(self) -> Any:
        """Wait for the child; return what the function returned."""
        child, self._child = self._child, None
        assert child
        return wait_for(child)

    @property
    def pid(self) -> int:
        assert self._child
        return self._child[0]

    def kill(self) -> None:
        """Send SIGKILL to the child; its own children may live on."""
        assert self._child
        (pid, read_end), self._child = self._child, None
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read_end)


class Program:
    """A function of a test module as a separate program, which writes and reads lines.

    :param terminal: the slave end of a terminal, for standard input and output instead of pipes.
    """

    def __init__(
        self, function: Callable[..., Any], *arguments: str, env: dict[str, str], terminal: Optional[int] = None
    ) -> None:
        file = Path(sys.modules[function.__module__].__file__ or "").resolve()
        command = [sys.executable, "-X", "faulthandler", forking.__file__, str(file), function.__name__, *arguments]
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE if terminal is None else terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._watchdog = threading.Timer(_PROGRAM, self.process.send_signal, (signal.SIGABRT,))
        self._watchdog.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.process.kill()
        self.ends()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def hear(self) -> str:
        """The next line that the program writes."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the program wrote no more lines: {self.errors()}"
        return line.rstrip("\n")

    def let_go(self) -> None:
        """Close the program's standard input; the program waits for this."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def errors(self) -> str:
        """Wait for the program's end; return all that it has written to standard error."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def ends(self) -> int:
        """The program's exit status."""
        status = self.process.wait(ENOUGH)
        self._watchdog.cancel()
        return status


class ComesInBetweenError(Exception):
    """The exception that a signal handler raises."""


def until(condition: Callable[[], Any], what: str) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < deadline, f"waited {ENOUGH} s until {what}"
        time.sleep(0.002)


def descriptors(pid: int) -> dict[int, str]:
    """The open descriptors of a process."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(link.name)] = os.readlink(link)
    return found


def by_broker(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for a forked child that uses PC/SC through its own broker."""

    def in_it(*arguments: Any) -> Any:
        import pcsc_safe

        pcsc_safe.configure(policy="broker", broker="on-fork")
        return function(*arguments)

    return in_it


@contextlib.contextmanager
def stack_to_hold() -> Iterator[VirtualPcsc]:
    """A stack whose first card can be held; the third reader is another device, and never waits for that card."""
    from calling import HeldCard

    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(4, [HeldCard(), EchoCard(), EchoCard()]) as stack:
        yield stack


def held_card(stack: VirtualPcsc) -> Any:
    """The card that can be held, a HeldCard."""
    return stack.readers[0].card


def let_go(stack: VirtualPcsc) -> None:
    """Wait until no process has a context on such a stack, or holds a card."""
    card = held_card(stack)
    card.go.set()
    stack.wait_for_clients(0)
    # pcscd first closes the connection of a client that has ended, and then releases its cards.
    until(lambda: _is_free(stack), "pcscd has given up the cards of who is gone")
    card.go.clear()
    card.reached.clear()


def _is_free(stack: VirtualPcsc) -> bool:
    from pcsc_safe import scard

    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    answers = [
        scard.SCardConnect(context, reader.name, scard.SCARD_SHARE_EXCLUSIVE, scard.SCARD_PROTOCOL_T1)
        for reader in stack.readers
        if reader.card is not None
    ]
    for hresult, card, _ in answers:
        if hresult == scard.SCARD_S_SUCCESS:
            scard.SCardDisconnect(card, scard.SCARD_UNPOWER_CARD)
    scard.SCardReleaseContext(context)
    return all(hresult == scard.SCARD_S_SUCCESS for hresult, _, _ in answers)


@pytest.fixture(scope="module")
def module_stack() -> Iterator[VirtualPcsc]:
    """A stack whose first card can be held; only the tests of one module have contexts there."""
    with stack_to_hold() as stack:
        yield stack


@pytest.fixture
def stack(module_stack: VirtualPcsc) -> Iterator[VirtualPcsc]:
    """The same stack; at the end of the test no process has a context there."""
    yield module_stack
    let_go(module_stack)


def script(path: Path, text: str) -> str:
    """A shell script at this path, to be used as an interpreter."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def imports() -> None:
    """A program that prints why it can't import pcsc_safe.scard if no broker can start."""
    from pcsc_safe.errors import BrokerError

    try:
        import pcsc_safe.scard  # noqa: F401
    except BrokerError as error:
        print(json.dumps([str(error), children()]))


def without_native(how: str) -> None:
    """A program that sets ``broker="always"``, by the ``"environment"`` or by ``"configure"``, uses a card and forks.

    The function contains imports because the modules that it imports import :mod:`pcsc_safe.scard`.
    """
    import pcsc_safe

    if how == "configure":
        pcsc_safe.configure(broker="always")
    pcsc_safe.configure(quiesce_timeout=10)
    from calling import HELD, Calling
    from conftest import Session

    from pcsc_safe import scard

    session = Session()
    session.assert_untouched()
    _, name, _, protocol, atr = scard.SCardStatus(session.card)
    exchange = Calling(session.transmit, HELD)
    print(json.dumps([name, protocol, atr]), flush=True)
    sys.stdin.read()

    def child() -> Any:
        _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
        same = scard.SCardListReaders(context, []) == scard.SCardListReaders(session.context, [])
        return same, "libpcsclite" in Path("/proc/self/maps").read_text()

    began = time.monotonic()
    started = start(child)
    waited = time.monotonic() - began
    print(json.dumps([wait_for(started), exchange.is_alive(), waited < 5, len(brokers())]), flush=True)
    exchanged = exchange.answer()
    session.assert_untouched()
    session.close()
    maps = Path("/proc/self/maps").read_text()
    print(json.dumps([exchanged, "libpcsclite" in maps, "_scard" in maps, "smartcard" in sys.modules]), flush=True)
