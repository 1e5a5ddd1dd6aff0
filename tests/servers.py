"""Web servers that sign with a card, their clients, and a card that kills the process that uses it.

The clients check each response: every request has a unique message, and the response is right if it is a signature of
exactly this message by the key of the card's certificate.  If a connection breaks, the client sends the request again,
as any client would; after a wrong response it doesn't.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from places import ROOT

from pcsc_safe.testing import PcscStackError, VirtualPcsc

try:
    from pcsc_safe.testing.piv import PivCard
except PcscStackError as error:
    pytest.skip(str(error), allow_module_level=True)

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.hashes import SHA256

PIN = "123456"
TIMEOUT = 20  # s; for operations that take milliseconds
CLIENTS = 4
KILL_EVERY = 50
BROKER_PYTHON = "PCSC_SAFE_BROKER_PYTHON"
RECYCLE_AFTER = "20"  # so one of two workers is recycled before any is killed
_VERIFY, _SIGN = 0x20, 0x87
_ENOUGH_IS_WRONG = 5
_LATE = "no response in time"


class DeadlyCard(PivCard):
    """A PIV card; during some of its signatures, inside a worker's transaction, something happens.

    :ivar signatures: how many were requested.
    :ivar verifications: how many times a PIN was verified.
    :ivar on_signature: called with the number of each signature, before it is made.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.signatures = self.verifications = 0
        self.on_signature: Callable[[int], object] = lambda number: None

    def apdu(self, command: bytes) -> bytes:
        self.verifications += command[1] == _VERIFY
        if command[1] == _SIGN:
            self.signatures += 1
            self.on_signature(self.signatures)
        return super().apdu(command)


@pytest.fixture
def card() -> DeadlyCard:
    """The card in the reader of `stack`."""
    card = DeadlyCard.personalised()
    assert isinstance(card, DeadlyCard)
    return card


@pytest.fixture
def stack(card: DeadlyCard) -> Iterator[VirtualPcsc]:
    """A stack with one card; after the test no process has a context there."""
    with VirtualPcsc(cards=[card]) as stack:
        yield stack
        stack.wait_for_clients(0)


def documented(page: str, program: str, address: str, setting: str = "") -> list[str]:
    """The first command on a page of the documentation that runs a program, for a `Server`.

    :param address: replaces the address on the page; ``{path}`` is the path of the server's socket.
    :param setting: text that the command also has to contain.
    """
    if shutil.which(program, path=str(Path(sys.executable).parent)) is None:
        pytest.skip(f"{program} is not installed: pip install 'pcsc-safe[hosts]'")
    lines = code_of(page, setting, "sh").replace("\\\n", " ").splitlines()
    command = ["env", *shlex.split(next(line for line in lines if program in line.split() and setting in line))]
    places = {"127.0.0.1:8000": address, "PCSC_SAFE_BROKER_PYTHON=/path/to/python": f"{BROKER_PYTHON}={sys.executable}"}
    assert "127.0.0.1:8000" in command
    return [places.get(part, part) for part in command]


def code_of(page: str, piece: str, language: str = "python") -> str:
    """The first code block of a page of the documentation that contains this text."""
    blocks = re.findall(rf"```{language}(\n.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return str(next(block for block in blocks if piece in block))


class Server:
    """A server of the example on a Unix socket, with all its processes in a new session.

    :param command: has ``{path}`` for the path of the socket, and ``$PWD`` as in a shell.
    :param cwd: its working directory.
    :ivar keeps_alive: whether a client may send a second request over a connection.
    :ivar kills: how many times workers were sent SIGKILL.
    """

    def __init__(self, command: list[str], stack: VirtualPcsc, directory: str, cwd: Path, **env: str) -> None:
        self.directory = directory
        self.path = os.path.join(directory, "http")
        self.kills = 0
        self.keeps_alive = "--http-socket" not in command  # uWSGI closes these connections without announcing it
        self._choice = random.Random(0)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (`close` does)
        programs = str(Path(sys.executable).parent)
        self._process = subprocess.Popen(
            [part.format(path=self.path).replace("$PWD", str(cwd)) for part in command],
            cwd=cwd,
            env={
                **stack.env,
                **dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "TMPDIR"), directory),
                "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
                "PIV_PIN": PIN,
                "PYTHONDONTWRITEBYTECODE": "1",
                **env,
            },
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid

    @property
    def log(self) -> str:
        """The server's output so far."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def workers(self) -> list[int]:
        """The running workers that it forked; a broker is not one, because it has called exec."""
        mine = _command_of(self.pid)
        return [pid for pid, parent in self._family().items() if parent == self.pid and _command_of(pid) == mine]

    def kill_some(self) -> None:
        """SIGKILL a worker; the first time and every third time, all workers."""
        workers = self.workers()
        if self.kills % 3:
            workers = self._choice.sample(workers, min(1, len(workers)))
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kills += 1

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to the master."""
        self._process.send_signal(number)

    def request(self, method: str, url: str, body: Optional[bytes] = None) -> tuple[int, bytes]:
        """Status and body of the response to one request."""
        with contextlib.closing(Connection(self.path)) as connection:
            return connection.ask(method, url, body)

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a condition for which there is no event."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self._process.poll() is None, f"the server has ended:\n{self.log}"
            assert time.monotonic() < deadline, f"waited {TIMEOUT} s {what}:\n{self.log}"
            time.sleep(0.01)

    def is_listening(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.path) == 0

    def status(self) -> int:
        """Wait for the server's end; return its exit status; no process of it may be left."""
        status = self._process.wait(TIMEOUT)
        deadline = time.monotonic() + TIMEOUT
        while left := self._family():
            assert time.monotonic() < deadline, f"these are left: {left}\n{self.log}"
            time.sleep(0.01)
        return status

    def close(self) -> None:
        """Kill all its processes."""
        for pid in [self.pid, *self._family()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(TIMEOUT)
        self._log.close()

    def _family(self) -> dict[int, int]:
        """The running processes of its session, and their parents."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state not in "ZX":
                    found[int(path.parent.name)] = int(parent)
        return found


def _command_of(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@contextlib.contextmanager
def serving(command: list[str], stack: VirtualPcsc, cwd: Path = ROOT, **env: str) -> Iterator[Server]:
    """A server that responds; it is killed at the end if it still runs."""
    # Not tmp_path: the path of a socket has to be short.
    with tempfile.TemporaryDirectory() as directory:
        server = Server(command, stack, directory, cwd, **env)
        try:
            server.wait_until(server.is_listening, "for the server to listen")
            yield server
        except BaseException:
            print(server.log)
            raise
        finally:
            server.close()


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket.

    :param keep_alive: send further requests over the same connection, if the server keeps it open.
    """

    def __init__(self, path: str, timeout: float = TIMEOUT, *, keep_alive: bool = True) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._headers = {} if keep_alive else {"Connection": "close"}

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def ask(self, method: str, url: str, body: Optional[bytes] = None) -> tuple[int, bytes]:
        """Status and body of the response."""
        self.request(method, url, body, self._headers)
        with self.getresponse() as response:
            answer = response.status, response.read()
        if self._headers:
            self.close()
        return answer


class Clients:
    """Clients that have messages signed, at the same time.

    :param count: the number of messages, of all clients together.
    :param timeout: how long a client waits for a response, in seconds.
    :ivar right: how many signatures were right for their messages.
    :ivar wrong: other responses; after a few of these no client sends a request.
    :ivar late: how many requests had no response in time; these count like wrong responses.
    :ivar broken: how many connections the server closed without a response.
    """

    def __init__(self, server: Server, certificate: bytes, count: int, timeout: float = TIMEOUT) -> None:
        self.right, self.wrong, self.late, self.broken = 0, list[str](), 0, 0
        self._server, self._timeout = server, timeout
        self._key: Any = x509.load_der_x509_certificate(certificate).public_key()
        self._left = iter(range(count))
        self._news = threading.Condition()
        self._threads = [threading.Thread(target=self._work) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, right: int) -> None:
        """Wait until so many signatures were right, or it is clear that this won't happen."""
        with self._news:
            assert self._news.wait_for(lambda: self.right >= right or self._is_enough(), 15 * TIMEOUT)

    def finish(self) -> None:
        """Wait until all messages have responses."""
        for thread in self._threads:
            thread.join(15 * TIMEOUT)
            assert not thread.is_alive()

    def _is_enough(self) -> bool:
        return len(self.wrong) + self.late >= _ENOUGH_IS_WRONG

    def _work(self) -> None:
        connection = Connection(self._server.path, self._timeout, keep_alive=self._server.keeps_alive)
        with contextlib.closing(connection):
            while not self._is_enough():
                with self._news:
                    if next(self._left, None) is None:
                        return
                problem = self._have_signed(connection, os.urandom(random.randrange(3000)))
                with self._news:
                    self.late += problem == _LATE
                    self.wrong += [problem] if problem and problem != _LATE else []
                    self.right += not problem
                    self._news.notify_all()

    def _have_signed(self, connection: Connection, message: bytes) -> str:
        """What was wrong with the response."""
        try:
            status, body = self._answer(connection, message)
        except Exception as error:
            connection.close()
            # Before Python 3.10 socket.timeout is no TimeoutError.
            is_late = isinstance(error, (TimeoutError, socket.timeout))
            return _LATE if is_late else f"{type(error).__name__}: {error}"
        if status != 200:
            return f"{status}: {body!r}"
        try:
            self._key.verify(body, message, ECDSA(SHA256()))
        except InvalidSignature:
            return f"not a signature of the message: {body.hex()}"
        return ""

    def _answer(self, connection: Connection, message: bytes) -> tuple[int, bytes]:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return connection.ask("POST", "/sign", message)
            except (ConnectionError, http.client.HTTPException):
                connection.close()
                with self._news:
                    self.broken += 1
                if time.monotonic() > deadline:
                    raise TimeoutError("nobody answers") from None
                time.sleep(0.01)


def certificate_of(server: Server) -> bytes:
    """The certificate that the server sends, in DER."""
    status, pem = server.request("GET", "/certificate")
    assert status == 200, pem
    return ssl.PEM_cert_to_DER_cert(pem.decode())


def sign_while_workers_die(server: Server, card: DeadlyCard, count: int, halfway: Callable[[], object]) -> Clients:
    """Have so many messages signed while workers are killed, some while they sign; in the end each message is signed.

    :param halfway: called when half of the messages are signed.
    """
    certificate = certificate_of(server)
    card.on_signature = lambda number: number % KILL_EVERY == 0 and server.kill_some()
    clients = Clients(server, certificate, count)
    clients.wait_for(count // 2)
    halfway()
    clients.finish()
    card.on_signature = lambda number: None
    assert clients.right == count, f"{clients.right} of {count} are right; wrong: {clients.wrong}; late: {clients.late}"
    assert server.kills >= count // KILL_EVERY
    return clients


def raw_pyscard(directory: Path) -> dict[str, str]:
    """The environment in which the examples run on smartcard.scard itself."""
    package = directory / "pcsc_safe"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "scard.py").write_text("from smartcard.scard import *\n")
    return {"PYTHONPATH": str(directory)}
