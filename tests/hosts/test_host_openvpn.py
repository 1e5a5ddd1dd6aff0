"""An OpenVPN client whose key is on a PIV card: real OpenVPN, real pcscd, and the example that signs between them.

The server decides whether a signature is right: it covers this handshake, and the server knows only the card's key.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import pwd
import runpy
import select
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from brokers import until
from places import EXAMPLES, ROOT

from pcsc_safe import scard
from pcsc_safe.testing import PcscStackError, VirtualCard, VirtualPcsc

try:
    from pcsc_safe.testing.piv import PivCard, _self_signed
except PcscStackError as error:
    pytest.skip(str(error), allow_module_level=True)

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA1, SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

OPENVPN = which("openvpn", path=f"{os.environ['PATH']}:/usr/sbin")
if OPENVPN is None:
    pytest.skip("OpenVPN is not installed (Debian: openvpn)", allow_module_level=True)
if not hasattr(os, "pidfd_open"):
    pytest.skip("the end of a process that is not our child can't be awaited here", allow_module_level=True)

EXAMPLE = str(EXAMPLES / "openvpn_sign.py")
PAGE = (ROOT / "docs" / "hosts" / "openvpn.md").read_text()
CONFIGURATION = PAGE.partition("```conf\n")[2].partition("```")[0]
PIN = "123456"
HANDSHAKE = "Control Channel: TLSv1.3, cipher TLSv1.3 "  # a client prints it at the end of the handshake
VERIFIED = "peer info: IV_PROTO="  # a server prints it at the end of TLS, after the client's signature
CONNECTED = ",CONNECTED,SUCCESS,"
NOT_KEPT = "the session with the card is lost, and the PIN was not kept"
VERIFY, SIGN = 0x20, 0x87


class Card(PivCard):
    """A PIV card that counts its commands."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.commands: Counter[int] = Counter()

    def apdu(self, command: bytes) -> bytes:
        self.commands[command[1]] += 1
        return super().apdu(command)


class OpenVpn:
    """An OpenVPN process, and its output."""

    def __init__(self, *options: object) -> None:
        command = [str(OPENVPN), "--dev", "null", "--verb", "3", *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._news:
                self._lines.append(line)
                self._news.notify()

    @property
    def said(self) -> str:
        return "".join(self._lines)

    def says(self, text: str, times: int = 1) -> None:
        """Return when the output contains the text this many times."""
        with self._news:
            done = self._news.wait_for(lambda: self.said.count(text) >= times, timeout=20)
        assert done, f"waited for {text!r}:\n{self.said}"

    def ends(self) -> int:
        """The exit status, after the process has ended by itself."""
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it goes on:\n{self.said}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout
        self.process.stdout.close()


class Helper:
    """The example in the background."""

    def __init__(self, socket: Path, pid: int) -> None:
        self.socket = socket
        self.pid = pid
        self._end = os.pidfd_open(pid)

    @property
    def log(self) -> str:
        return Path(f"{self.socket}.log").read_text()

    def ends(self) -> None:
        """Return when the daemon has ended by itself."""
        assert select.select([self._end], [], [], 20)[0], f"it goes on:\n{self.log}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._end, signal.SIGKILL)
        os.close(self._end)


class Vpn:
    """A server, clients, and the helper that connects them to the card; all end with the block."""

    def __init__(self, stack: VirtualPcsc, keys: Path, directory: Path, cleanup: contextlib.ExitStack) -> None:
        self._stack = stack
        self._keys = keys
        self.socket = directory / "card.sock"
        self._cleanup = cleanup
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]

    def server(self, *options: object) -> OpenVpn:
        """A server that trusts the card's certificate; return when it listens."""
        where = ("--local", "127.0.0.1", "--lport", self._port, "--float", "--reneg-sec", 0)
        keys = ("--cert", self._keys / "server.crt", "--key", self._keys / "server.key", "--dh", "none")
        server = OpenVpn(*where, "--tls-server", "--ca", self._keys / "client.crt", *keys, *options)
        self._cleanup.callback(server.kill)
        server.says("UDPv4 link remote: [AF_UNSPEC]")
        return server

    def client(self, *options: object, key: str = "nopadding") -> OpenVpn:
        """Start a client with the documented configuration."""
        where = ("--nobind", "--remote", "127.0.0.1", self._port, "--tls-client", "--ca", self._keys / "server.crt")
        file = self.socket.with_name("client.conf")
        told = CONFIGURATION.replace("/home/me/card.sock", str(self.socket)).replace("user me\n", f"user {me()}\n")
        file.write_text(told.replace("nopadding", key))
        client = OpenVpn("--config", file, *where, "--connect-retry", 1, 1, *options)
        self._cleanup.callback(client.kill)
        return client

    def helper(self, *options: str, program: tuple[str, ...] = (EXAMPLE,), **env: str) -> Helper:
        """Start the helper; return when it listens."""
        foreground = self.foreground(*options, program=program, **env)
        assert (foreground.returncode, foreground.stderr) == (0, "")
        helper = Helper(self.socket, int(foreground.stdout))
        self._cleanup.callback(helper.kill)
        return helper

    def foreground(
        self, *options: str, program: tuple[str, ...] = (EXAMPLE,), **env: str
    ) -> subprocess.CompletedProcess[str]:
        """The output of the helper's first process."""
        command = [sys.executable, "-X", "faulthandler", *program, *options, str(self.socket)]
        env = {**self._stack.env, "PIV_PIN": PIN, **env}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


def me() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture(scope="module")
def stack() -> Iterator[VirtualPcsc]:
    """A stack with the card that the server knows, and another card."""
    with VirtualPcsc(cards=[Card.personalised("Somebody"), Card.personalised("A stranger")]) as stack:
        yield stack


@pytest.fixture
def card(stack: VirtualPcsc) -> Card:
    """The card that the server knows, with all counters at 0."""
    card = stack.readers[0].card
    assert isinstance(card, Card)
    card.commands.clear()
    return card


@pytest.fixture(scope="module")
def keys(stack: VirtualPcsc, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with server.key, server.crt and client.crt."""
    directory = tmp_path_factory.mktemp("keys")
    key = ec.generate_private_key(ec.SECP256R1())
    (directory / "server.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (directory / "server.crt").write_text(ssl.DER_cert_to_PEM_cert(_self_signed(key, "the server")))
    command = [sys.executable, str(EXAMPLES / "piv.py"), os.devnull]
    certificate = subprocess.check_output(command, env={**stack.env, "PIV_PIN": PIN}, text=True).splitlines()[:-1]
    (directory / "client.crt").write_text("\n".join(certificate))
    return directory


@pytest.fixture
def vpn(stack: VirtualPcsc, keys: Path) -> Iterator[Vpn]:
    """See `Vpn`; all connections to pcscd are closed at its end."""
    # Not tmp_path: the path of a socket has to be short.
    with tempfile.TemporaryDirectory() as directory:
        with contextlib.ExitStack() as cleanup:
            yield Vpn(stack, keys, Path(directory), cleanup)
        stack.wait_for_clients(0)


def test_a_client_connects(vpn: Vpn, card: Card) -> None:
    """A client connects with TLS 1.3 and one signature, in the session whose PIN was verified in the foreground."""
    server, helper = vpn.server(), vpn.helper()
    client = vpn.client()
    client.says(HANDSHAKE)
    client.says(CONNECTED)
    server.says(VERIFIED)
    until(lambda: CONNECTED in helper.log, "the helper is told the state")
    assert "VERIFY OK: depth=0, CN=Somebody" in server.said
    assert card.commands[SIGN] == helper.log.count(" signed\n") == 1
    assert card.commands[VERIFY] == 1
    assert PIN not in helper.log


@pytest.mark.parametrize(
    ("key", "options"),
    [("", ("--management-hold",)), ("nopadding digest", ())],
    ids=["held until the helper is there", "the message in place of its digest"],
)
def test_other_options(vpn: Vpn, card: Card, key: str, options: tuple[str, ...]) -> None:
    """Other options of management-external-key and of the management make no difference."""
    server = vpn.server()
    vpn.helper()
    vpn.client(*options, key=key).says(HANDSHAKE)
    server.says(VERIFIED)
    assert card.commands[SIGN] == 1


def test_others_are_kept_out(vpn: Vpn, stack: VirtualPcsc, card: Card) -> None:
    """On request, no other process can use or reset the card; the exclusive access is handed over, too."""
    vpn.server()
    vpn.helper("--exclusive")
    with pytest.raises(PcscStackError, match="an application holds it exclusively"):
        stack.readers[0].reset()
    vpn.client().says(HANDSHAKE)
    assert card.commands[SIGN] == card.commands[VERIFY] == 1


def test_through_a_broker(vpn: Vpn, card: Card) -> None:
    """As on macOS, the broker that the foreground started serves the daemon, and ends with it."""
    vpn.server()
    helper = vpn.helper(PCSC_SAFE_BROKER="always")
    client = vpn.client()
    client.says(HANDSHAKE)
    assert card.commands[SIGN] == card.commands[VERIFY] == 1
    os.kill(helper.pid, signal.SIGTERM)
    helper.ends()


def test_tls_1_2(vpn: Vpn, card: Card) -> None:
    """A server with TLS 1.2 gets its signature as well."""
    server = vpn.server("--tls-version-max", "1.2")
    vpn.helper()
    vpn.client().says("Control Channel: TLSv1.2, cipher TLSv1.2 ECDHE-ECDSA-")
    server.says(VERIFIED)
    assert card.commands[SIGN] == 1


CHANGED = """
import contextlib, gc, os, runpy, signal, sys
import pcsc_safe

{}
sys.argv[0] = {!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def changed(change: str) -> dict[str, Any]:
    """What `Vpn.helper` runs: a changed copy of the example."""
    return {"program": ("-c", CHANGED.format(change, EXAMPLE)), "PYTHONPATH": str(EXAMPLES)}


def is_off(card: VirtualCard) -> bool:
    """Whether pcscd soon powers off the card, as it does if no process is connected."""
    return card.power_ons == card.power_offs


def test_the_card_is_not_let_go(vpn: Vpn, stack: VirtualPcsc, card: Card) -> None:
    """The daemon has the connection from the end of the foreground on, also before its first signature."""
    until(lambda: is_off(card), "the card is off")
    vpn.server()
    vpn.helper()
    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    reader, how = stack.readers[1], (scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)
    _, other, _ = scard.SCardConnect(context, reader.name, *how)
    assert reader.card is not None
    assert not is_off(reader.card)
    scard.SCardDisconnect(other, scard.SCARD_LEAVE_CARD)
    scard.SCardReleaseContext(context)
    until(lambda: is_off(reader.card), "a card that was let go later is off")
    assert not is_off(card)
    vpn.client().says(HANDSHAKE)


def test_without_handover(vpn: Vpn, card: Card) -> None:
    """Without handover the card is disconnected, and the PIN is no longer verified in the daemon's own connection."""
    until(lambda: is_off(card), "the card is off")
    vpn.server()
    helper = vpn.helper(**changed("pcsc_safe.handover = contextlib.nullcontext"))
    until(lambda: is_off(card), "the card is off again")
    vpn.client()
    helper.ends()
    assert helper.log.endswith(f"\nopenvpn_sign.py: {NOT_KEPT}\n")
    assert card.commands[VERIFY] == 1


FORKS_WHEN_TOLD = """
def fork(number, frame):
    pid = os.fork()
    if pid == 0:
        for thing in gc.get_objects():
            if type(thing).__name__ == "Signer":
                thing.close()
        os._exit(0)
    os.waitpid(pid, 0)
    os.write(2, b"a child has cleaned up\\n")

signal.signal(signal.SIGUSR2, fork)
"""


@pytest.mark.parametrize("restarts", [pytest.param(18, id="20"), pytest.param(1000, id="1000", marks=pytest.mark.long)])
def test_many_handshakes(vpn: Vpn, card: Card, restarts: int) -> None:
    """In one session, OpenVPN processes are killed and restarted, and renegotiate.

    Before each, the helper forks a child that disconnects the card and ends.
    """
    helper = vpn.helper(**changed(FORKS_WHEN_TOLD))
    handshakes = 0

    def disturb() -> None:
        os.kill(helper.pid, signal.SIGUSR2)

    def shake_hands(server: OpenVpn, client: OpenVpn, times: int = 1) -> None:
        nonlocal handshakes
        handshakes += 1
        client.says(HANDSHAKE, times)
        server.says(VERIFIED, times)
        until(lambda: helper.log.count("cleaned up") == handshakes, "its child has ended")
        assert card.commands[SIGN] == handshakes

    for _ in range(restarts):
        server = vpn.server()  # a new server: without --mode server it serves one client
        disturb()
        client = vpn.client()
        shake_hands(server, client)
        client.kill()
        server.kill()
    server = vpn.server()
    disturb()
    client = vpn.client("--reneg-sec", 1)
    shake_hands(server, client)
    disturb()
    shake_hands(server, client, 2)
    assert card.commands[VERIFY] == 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGHUP, marks=pytest.mark.long)], ids=str)
def test_a_restart(vpn: Vpn, card: Card, number: signal.Signals) -> None:
    """After a restart OpenVPN keeps the connection to the helper, and requests certificate and signature again."""
    server, helper = vpn.server(), vpn.helper()
    client = vpn.client()
    client.says(CONNECTED)
    server.says("Initialization Sequence Completed")
    os.kill(client.process.pid, number)
    client.says(HANDSHAKE, 2)
    server.says(VERIFIED, 2)
    until(lambda: helper.log.count(" signed\n") == 2, "the helper has written what it did")
    assert card.commands[SIGN] == 2
    assert card.commands[VERIFY] == 1


def reset(stack: VirtualPcsc) -> None:
    stack.readers[0].reset()


def remove(stack: VirtualPcsc) -> None:
    stack.readers[0].insert(stack.readers[0].remove())


@pytest.mark.parametrize(
    ("lose", "options", "reason"),
    [
        (reset, (), NOT_KEPT),
        pytest.param(remove, (), "SCardBeginTransaction: Card was removed.", marks=pytest.mark.long),
        (remove, ("--keep-pin",), "SCardBeginTransaction: Card was removed."),
    ],
    ids=["the card is reset", "it is taken out and put back", "it is taken out, and the PIN is kept"],
)
def test_the_session_is_lost(
    vpn: Vpn,
    stack: VirtualPcsc,
    card: Card,
    lose: Callable[[VirtualPcsc], None],
    options: tuple[str, ...],
    reason: str,
) -> None:
    """If the session is lost, the log has the reason and nothing is left; OpenVPN ends, and needs a new helper."""
    vpn.server()
    helper = vpn.helper(*options)
    client = vpn.client("--reneg-sec", 1)
    client.says(HANDSHAKE)
    lose(stack)
    client.says("SIGTERM[soft,management-exit] received")
    assert client.ends() == 0
    helper.ends()
    assert helper.log.endswith(f"\nopenvpn_sign.py: {reason}\n")
    assert client.said.count(HANDSHAKE) == card.commands[VERIFY] == 1
    assert not helper.socket.exists()
    stack.wait_for_clients(0)
    late = vpn.client()
    assert late.ends() == 0
    assert f"MANAGEMENT: connect to unix socket {helper.socket} failed: No such file or directory" in late.said


def test_the_pin_is_kept(vpn: Vpn, stack: VirtualPcsc, card: Card) -> None:
    """If the helper is set to keep the PIN, a reset ends neither helper nor tunnel."""
    vpn.server()
    helper = vpn.helper("--keep-pin")
    client = vpn.client("--reneg-sec", 1)
    client.says(HANDSHAKE)
    reset(stack)
    client.says(HANDSHAKE, 2)
    assert card.commands[VERIFY] == 2
    assert PIN not in helper.log


def test_a_wrong_pin(vpn: Vpn, stack: VirtualPcsc, card: Card) -> None:
    """A wrong PIN is reported on the terminal, after one try; no daemon starts."""
    refused = vpn.foreground(PIV_PIN="654321")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "openvpn_sign.py: the card refuses the PIN (63C2)\n"
    assert not vpn.socket.exists()
    assert card.commands[VERIFY] == 1
    stack.wait_for_clients(0)
    vpn.helper()  # the right PIN resets the card's count of tries


def test_the_socket_is_in_use(vpn: Vpn) -> None:
    """If the socket is in use, the terminal says so, and the daemon that uses it is not affected."""
    vpn.server()
    vpn.helper()
    second = vpn.foreground()
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == "openvpn_sign.py: [Errno 98] Address already in use\n"
    vpn.client().says(HANDSHAKE)


def test_another_card(vpn: Vpn, card: Card) -> None:
    """The server refuses another card, and logs whose it is."""
    server = vpn.server()
    vpn.helper("--reader", "01")
    vpn.client()
    server.says("VERIFY ERROR: depth=0, error=self-signed certificate: CN=A stranger")
    server.says("TLS Error: TLS handshake failed")
    assert VERIFIED not in server.said
    assert card.commands[SIGN] == 0


def test_the_header_says_what_the_page_says() -> None:
    """The header of the example and the page agree, and the clients in these tests are configured by the page."""
    header = Path(EXAMPLE).read_text().partition('"""\n\nimport')[0]
    assert CONFIGURATION.count("\n") == 5
    assert "".join(f"    {line}\n" for line in CONFIGURATION.splitlines()) in header


def test_its_end(vpn: Vpn) -> None:
    """Only its user and root can use the helper.  SIGTERM leaves nothing but the log, and ends OpenVPN."""
    vpn.server()
    helper = vpn.helper()
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in helper.socket.parent.iterdir()} == {
        "card.sock": 0o600,
        "card.sock.log": 0o600,
    }
    client = vpn.client()
    client.says(HANDSHAKE)
    os.kill(helper.pid, signal.SIGTERM)
    helper.ends()
    assert client.ends() == 0
    assert {file.name for file in helper.socket.parent.iterdir()} == {"card.sock.log", "client.conf"}
    assert "Traceback" not in helper.log


RAW = """
import contextlib
from smartcard import scard

handover, HandoverError = contextlib.nullcontext, OSError
"""


def test_on_raw_pyscard(vpn: Vpn, card: Card, tmp_path: Path) -> None:
    """On raw pyscard the same helper signs nothing: the cleanup in its foreground ended the daemon's session."""
    (tmp_path / "pcsc_safe.py").write_text(RAW)
    vpn.server()
    helper = vpn.helper(PYTHONPATH=str(tmp_path))
    client = vpn.client()
    assert client.ends() == 0
    helper.ends()
    assert card.commands[VERIFY] == 1
    assert card.commands[SIGN] == 0
    assert "openvpn_sign.py: SCardBeginTransaction: " in helper.log


@pytest.mark.parametrize("algorithm", [SHA1(), SHA256(), SHA384(), SHA512()], ids=lambda algorithm: algorithm.name)
def test_what_is_signed(monkeypatch: pytest.MonkeyPatch, algorithm: HashAlgorithm) -> None:
    """The card signs TLS's digest of any length, as 32 bytes."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "piv", raising=False)  # tests/piv.py has the same name
    digest = runpy.run_path(EXAMPLE)["digest"]
    monkeypatch.delitem(sys.modules, "piv")
    whole = hashlib.new(algorithm.name, b"a message").digest()
    for_the_card = digest(base64.b64encode(whole), "ECDSA")
    key = ec.generate_private_key(ec.SECP256R1())
    signature = key.sign(for_the_card, ec.ECDSA(Prehashed(SHA256())))
    key.public_key().verify(signature, b"a message", ec.ECDSA(algorithm))
    name = algorithm.name.upper()
    assert digest(base64.b64encode(b"a message"), "ECDSA", f"hashalg={name}", "data=message") == for_the_card
    with pytest.raises(ValueError, match="OpenVPN wants RSA_PKCS1_PADDING, but the key can only sign with ECDSA"):
        digest(base64.b64encode(whole), "RSA_PKCS1_PADDING")
