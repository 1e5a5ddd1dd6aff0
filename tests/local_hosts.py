"""What the tests of examples without a server share: a program in its own session, and a card that kills processes.

The card responds to a command only when its `before` has returned.  Until then, the process that sent the command is
inside PC/SC, in its transaction, so a test can reliably kill it there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Optional, TypeVar

import pytest
from places import EXAMPLES

from pcsc_safe.testing import PcscStackError, VirtualPcsc

try:
    from pcsc_safe.testing.piv import PivCard
except PcscStackError as error:
    pytest.skip(str(error), allow_module_level=True)

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256

T = TypeVar("T")
PIN = "123456"
FORKS_WITH_THREADS = "ignore:This process:DeprecationWarning"  # Python 3.12 warns about them


class WatchedCard(PivCard):
    """A card that reports each command to sign before it responds, and counts these commands and the PINs."""

    before: Optional[Callable[[int], None]] = None
    signing = verifications = 0

    def apdu(self, command: bytes) -> bytes:
        self.verifications += command[1] == 0x20
        if command[1] == 0x87:
            self.signing += 1
            if self.before is not None:
                self.before(self.signing)
        return super().apdu(command)

    def certificate(self, number: int = 0x05) -> bytes:
        """The certificate in data object 5FC1xx, in DER; by default that of slot 9A."""
        data = self._applet.data_objects.get_data_object(bytes([0x5F, 0xC1, number]))
        length = int.from_bytes(data[2:4], "big")
        assert data[:2] == b"\x70\x82"
        return data[4 : 4 + length]

    def has_signed(self, message: bytes, signature: bytes) -> bool:
        """Whether a signature is right for exactly this message."""
        key = x509.load_der_x509_certificate(self.certificate()).public_key()
        assert isinstance(key, EllipticCurvePublicKey)
        try:
            key.verify(signature, message, ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True


@contextlib.contextmanager
def stack_with(*cards: PivCard) -> Iterator[VirtualPcsc]:
    """A stack with these cards."""
    with VirtualPcsc(len(cards), cards) as stack:
        yield stack


def raw(directory: Path) -> dict[str, str]:
    """The environment in which pcsc_safe is plain pyscard: the control."""
    package = directory / "pcsc_safe"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import contextlib\nhandover = contextlib.nullcontext\nfiles_to_preserve = list\ndef install(): pass\n"
    )
    (package / "scard.py").write_text("from smartcard.scard import *\n")
    return {"PYTHONPATH": str(directory)}


class Program:
    """A running example, with all processes that it starts in one session.

    :param name: the example's file.
    :param env: variables in addition to the stack's.
    """

    def __init__(self, stack: VirtualPcsc, directory: Path, name: str, *arguments: str, **env: str) -> None:
        self.errors = directory / f"{name}.stderr"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", str(EXAMPLES / name), *arguments],
                env={**stack.env, "PIV_PIN": PIN, "PYTHONWARNINGS": FORKS_WITH_THREADS, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    def others(self) -> list[int]:
        """The running processes of the session, except the first."""
        return [pid for pid in processes_of(self.process.pid) if pid != self.process.pid]

    def kill_one_inside_pcsc(self) -> int:
        """SIGKILL the process that waits for the card's response; to be called while the card holds it back."""
        pid = until(lambda: next(filter(waits_for_pcscd, self.others()), 0))
        os.kill(pid, signal.SIGKILL)
        return pid

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for pid in [self.process.pid, *self.others()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT if error else signal.SIGKILL)  # faulthandler shows the stacks
        with contextlib.suppress(ProcessLookupError):
            until(lambda: not self.others())
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        if error:
            print(self.errors.read_text(errors="replace")[-10000:])


def processes_of(session: int) -> list[int]:
    """The processes of a session that haven't ended."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = (directory / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(directory.name))
    return sorted(found)


def waits_for_pcscd(pid: int) -> bool:
    """Whether a process without threads is in poll(), as libpcsclite is when it waits for pcscd."""
    try:
        where = Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return False
    return "poll" in where and "ep_poll" not in where and "epoll" not in where


def until(condition: Callable[[], T], timeout: float = 20.0) -> T:
    """Wait for a condition for which the kernel has no event; return its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s in vain")
        time.sleep(0.002)
    return value
