"""The example of a daemon that asks for the PIN first: it signs without having the PIN, even if its handlers die."""

from __future__ import annotations

import contextlib
import os
import pty
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hosts import EXAMPLES, PIN, Program, WatchedCard, processes_of, raw, stack_with, until

from pcsc_safe import scard
from pcsc_safe.testing import VirtualPcsc

pytest.importorskip("daemon", reason="python-daemon is not installed: pip install python-daemon")

NAME = "pin_daemon.py"


class Daemon:
    """The example in the background, and its clients."""

    patience = 20.0  # s

    def __init__(self, stack: VirtualPcsc, card: WatchedCard, path: str) -> None:
        self.stack = stack
        self.card = card
        self.path = path
        self.pid = until(lambda: pid_in(path))

    def ask(self, message: bytes) -> bytes:
        """The response to a client's message; empty if the handler died."""
        with self.client() as client, contextlib.suppress(ConnectionError):
            client.sendall(message)
            client.shutdown(socket.SHUT_WR)
            return client.recv(1024)
        return b""

    def client(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(self.patience)
        client.connect(self.path)
        return client

    def signs(self, message: bytes) -> bool:
        """Whether the response is a signature of this message; no response is wrong."""
        answer = self.ask(message)
        if not answer:
            return False
        assert self.card.has_signed(message, bytes.fromhex(answer.decode())), answer
        return True

    def handlers(self) -> list[int]:
        return [pid for pid in processes_of(os.getsid(self.pid)) if pid != self.pid]

    def has_ended(self) -> bool:
        return not alive(self.pid)


def pid_in(path: str) -> int:
    try:
        return int(Path(f"{path}.pid").read_text() or 0)
    except OSError:
        return 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def path() -> Iterator[str]:
    """The path of a socket; not in tmp_path, because it has to be short."""
    with tempfile.TemporaryDirectory() as directory:
        yield os.path.join(directory, "sign.sock")


@pytest.fixture
def daemon(tmp_path: Path, path: str) -> Iterator[Daemon]:
    """The example in the background; ended after the test."""
    card = WatchedCard.personalised()
    with stack_with(card) as stack:
        assert run(stack, tmp_path, path) == (0, "")
        daemon = Daemon(stack, card, path)
        session = os.getsid(daemon.pid)
        try:
            yield daemon
        finally:
            for pid in processes_of(session):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until(lambda: not processes_of(session))


def run(stack: VirtualPcsc, directory: Path, path: str, **env: str) -> tuple[int, str]:
    """Start the example; return exit status and stderr of the process in the foreground."""
    with Program(stack, directory, NAME, path, **env) as program:
        program.process.communicate(timeout=30)
        return program.process.returncode, program.errors.read_text()


def sign(daemon: Daemon, count: int, kill_every: int) -> int:
    """Have this many messages signed while handlers are killed, some of them signing; return the number of requests."""
    requests = 0
    killed: list[int] = []

    def before(number: int) -> None:
        if number % kill_every == 0:
            killed.extend(daemon.handlers())
            for pid in daemon.handlers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    daemon.card.before = before
    for _ in range(count):
        message = secrets.token_bytes(secrets.randbelow(100))
        requests += 1
        while not daemon.signs(message):
            requests += 1
            assert requests < 2 * count
    assert len(killed) >= count // kill_every
    daemon.card.before = None
    return requests


def test_it_signs(daemon: Daemon) -> None:
    """100 messages need one connection to pcscd, and one verification of the PIN; at the end nothing is left."""
    assert stat.S_IMODE(os.stat(daemon.path).st_mode) == 0o600
    requests = sign(daemon, 100, 25)
    assert requests > 100
    assert daemon.stack.clients() == 1
    assert daemon.card.verifications == 1
    os.kill(daemon.pid, signal.SIGTERM)
    until(daemon.has_ended)
    assert os.listdir(os.path.dirname(daemon.path)) == []
    daemon.stack.wait_for_clients(0)


@pytest.mark.long
def test_it_signs_a_thousand(daemon: Daemon) -> None:
    """Five clients have 1,000 messages signed at the same time, while handlers are killed."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                message = secrets.token_bytes(20)
                while not daemon.signs(message):
                    pass
        except BaseException as error:
            errors.append(error)

    killed: list[int] = []

    def before(number: int) -> None:
        if number % 20 == 0:
            for pid in daemon.handlers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    daemon.card.before = before
    clients = [threading.Thread(target=work) for _ in range(5)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(120)
        assert not client.is_alive()
    assert errors == []
    assert len(set(killed)) >= 50
    assert daemon.card.signing >= 1000
    assert daemon.card.verifications == 1
    until(lambda: not daemon.handlers())
    assert daemon.stack.clients() == 1


def test_a_client_that_hangs_keeps_nobody_waiting(daemon: Daemon) -> None:
    """Each client has its own handler, so a client that hangs blocks no other."""
    with daemon.client() as idle:
        idle.sendall(b"the beginning of")
        assert daemon.signs(b"another")


def test_nobody_else_can_use_the_pin(daemon: Daemon) -> None:
    """The daemon has exclusive access to the card from the verification on."""
    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    name = daemon.stack.readers[0].name
    hresult, *_ = scard.SCardConnect(context, name, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)
    scard.SCardReleaseContext(context)
    assert hresult == scard.SCARD_E_SHARING_VIOLATION


@pytest.mark.parametrize("loss", ["logout", "pulled out", "pcscd"])
def test_a_session_that_is_lost_is_the_end(daemon: Daemon, loss: str) -> None:
    """If the session is lost, the daemon tells the client, verifies nothing (it has no PIN), and leaves nothing."""
    assert daemon.signs(b"before")
    if loss == "logout":
        daemon.card.power_on()  # no connection is notified of it
    elif loss == "pulled out":
        daemon.stack.readers[0].remove()
        daemon.stack.readers[0].insert(daemon.card)
    else:
        daemon.stack.restart()
    assert daemon.ask(b"after").startswith(b"error: ")
    until(daemon.has_ended)
    assert daemon.card.verifications == 1
    assert os.listdir(os.path.dirname(daemon.path)) == []
    daemon.stack.wait_for_clients(0)


def test_a_wrong_pin_is_told_in_the_foreground(tmp_path: Path, path: str) -> None:
    """A wrong PIN ends the foreground with status 1, and leaves no daemon, socket or file."""
    with stack_with(WatchedCard.personalised()) as stack:
        assert run(stack, tmp_path, path, PIV_PIN="999999") == (1, "pin_daemon.py: the card refuses the PIN (63C2)\n")
        assert os.listdir(os.path.dirname(path)) == []
        stack.wait_for_clients(0)


def test_a_second_one_is_refused_in_the_foreground(daemon: Daemon, tmp_path: Path) -> None:
    """A second daemon is refused in the foreground; the first continues."""
    status, errors = run(daemon.stack, tmp_path, daemon.path)
    assert (status, errors.count("\n")) == (1, 1)
    assert daemon.signs(b"message")


def test_the_pin_is_asked_for_on_the_terminal(tmp_path: Path, path: str) -> None:
    """If PIV_PIN isn't set, the PIN is asked for on the terminal, without echo."""
    card = WatchedCard.personalised()
    with stack_with(card) as stack:
        ours, its = pty.openpty()
        # A terminal that a session leader opens becomes /dev/tty, where getpass asks.
        take = "import os, sys; os.open(sys.argv[1], os.O_RDWR); os.execv(sys.executable, sys.argv[2:])"
        command = [sys.executable, "-c", take, os.ttyname(its), sys.executable, str(EXAMPLES / NAME), path]
        process = subprocess.Popen(
            command, env={**stack.env, "PIV_PIN": ""}, stdin=its, stdout=its, stderr=its, start_new_session=True
        )
        shown = b""
        while b"PIN: " not in shown:
            shown += os.read(ours, 1000)
        os.write(ours, PIN.encode() + b"\n")
        assert process.wait(30) == 0
        daemon = Daemon(stack, card, path)
        assert daemon.signs(b"message")
        os.kill(daemon.pid, signal.SIGTERM)
        until(daemon.has_ended)
        os.close(its)
        with contextlib.suppress(OSError):
            shown += os.read(ours, 1000)
        os.close(ours)
        assert PIN.encode() not in shown


@pytest.mark.long
def test_the_control(tmp_path: Path, path: str) -> None:
    """On raw pyscard the same program has lost its session once it is a daemon."""
    card = WatchedCard.personalised()
    with stack_with(card) as stack:
        assert run(stack, tmp_path, path, **raw(tmp_path)) == (0, "")
        daemon = Daemon(stack, card, path)
        daemon.patience = 5
        session = os.getsid(daemon.pid)
        try:
            with contextlib.suppress(TimeoutError, ConnectionError):
                assert not daemon.signs(b"message")
        finally:
            for pid in processes_of(session):
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, signal.SIGKILL)
