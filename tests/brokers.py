"""Brokers as the kernel sees them, and their clients as a test sees them.

A client is a forked child (:class:`Client`) or a program (:class:`Program`) that talks with the test while it lives, so
that the test knows what it is in the middle of, and can end it there.
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
SOON = 1.0  # s; within which a broker ends that has lost its client
_COMMANDS = (b"pcsc_safe.broker", b"--pcsc-safe-broker")


class Process(NamedTuple):
    """A process that was started by another."""

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
    """The PIDs of the living brokers that a process has started.

    :param parent: this process if None.
    """
    started = _processes(os.getpid() if parent is None else parent)
    return [each.pid for each in started if each.state not in "ZX" and any(text in each.command for text in _COMMANDS)]


def broker(parent: Optional[int] = None) -> int:
    """The PID of the one broker that a process has started."""
    (pid,) = brokers(parent)
    return pid


def children() -> list[int]:
    """Every process that this one has started, and not waited for."""
    return [each.pid for each in _processes(os.getpid())]


class Watch:
    """Sees the end of a process, and never takes another with the same PID for it."""

    def __init__(self, pid: int) -> None:
        self._process = os.pidfd_open(pid)

    def ends(self, within: float = SOON) -> bool:
        """Whether it has ended, or does so in so many seconds."""
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return bool(poll.poll(within * 1000))

    def close(self) -> None:
        os.close(self._process)


@contextlib.contextmanager
def watched(pid: int) -> Iterator[Watch]:
    """A :class:`Watch`, for the time of a block."""
    watch = Watch(pid)
    try:
        yield watch
    finally:
        watch.close()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process for the time of a block, and kill it then."""
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "it has stopped")
        yield
    finally:
        os.kill(pid, signal.SIGKILL)


class Link:
    """The client's end of what it and the test say to each other."""

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
        """What the function returned; waits for the child."""
        child, self._child = self._child, None
        assert child
        return wait_for(child)

    @property
    def pid(self) -> int:
        assert self._child
        return self._child[0]

    def kill(self) -> None:
        """SIGKILL; a child that it has forked itself may live on."""
        assert self._child
        (pid, read_end), self._child = self._child, None
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read_end)


class Program:
    """A function of a test module as a program of its own, that says and is told lines.

    :param terminal: the slave end of a terminal, for standard input and output in the place of pipes.
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
        self._watchdog = threading.Timer(ENOUGH, self.process.send_signal, (signal.SIGABRT,))
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
        """The next line that it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it said nothing more: {self.errors()}"
        return line.rstrip("\n")

    def let_go(self) -> None:
        """Close its standard input, which it waits for."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def errors(self) -> str:
        """All that it has written to standard error; waits for its end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def ends(self) -> int:
        """Its exit status."""
        status = self.process.wait(ENOUGH)
        self._watchdog.cancel()
        return status


def until(condition: Callable[[], Any], what: str) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < deadline, f"waited {ENOUGH} s until {what}"
        time.sleep(0.002)


def descriptors(pid: int) -> dict[int, str]:
    """What a process has open."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(link.name)] = os.readlink(link)
    return found


def by_broker(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for a forked child that does PC/SC through a broker of its own."""

    def in_it(*arguments: Any) -> Any:
        import pcsc_safe

        pcsc_safe.configure(policy="broker", broker="on-fork")
        return function(*arguments)

    return in_it


@contextlib.contextmanager
def stack_to_hold() -> Iterator[VirtualPcsc]:
    """A stack whose first card can be held; the third reader is another device, and never waits for it."""
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
    """Wait until nobody has a context on such a stack any more, nor holds a card."""
    card = held_card(stack)
    card.go.set()
    stack.wait_for_clients(0)
    # pcscd closes the connection of a client that is gone first, and gives up its cards then.
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
    """A stack whose first card can be held; only one module has contexts there."""
    with stack_to_hold() as stack:
        yield stack


@pytest.fixture
def stack(module_stack: VirtualPcsc) -> Iterator[VirtualPcsc]:
    """That stack; when the test is over nobody has a context there."""
    yield module_stack
    let_go(module_stack)


def script(path: Path, text: str) -> str:
    """A shell script at this path, to be an interpreter."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def imports() -> None:
    """A program that says why it can't import what takes a broker."""
    from pcsc_safe.errors import BrokerError

    try:
        import pcsc_safe.scard  # noqa: F401
    except BrokerError as error:
        print(json.dumps([str(error), children()]))


def without_native(how: str) -> None:
    """A program that has ``broker="always"``, from ``"environment"`` or by ``"configure"``, and uses a card and forks.

    Here, for what is imported where it stands imports :mod:`pcsc_safe.scard` first.
    """
    import pcsc_safe

    if how == "configure":
        pcsc_safe.configure(broker="always")
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
    print(json.dumps([wait_for(started), exchange.is_alive(), waited < 0.5, len(brokers())]), flush=True)
    exchanged = exchange.answer()
    session.assert_untouched()
    session.close()
    maps = Path("/proc/self/maps").read_text()
    print(json.dumps([exchanged, "libpcsclite" in maps, "_scard" in maps, "smartcard" in sys.modules]), flush=True)
