"""A PIV card on the virtual stack, and independent programs that use it.

The card is jcecard's PIV applet, through `pcsc_safe.testing.piv`.  yubico-piv-tool personalises it over the same PC/SC
stack, and yubikit (of yubikey-manager) has the sessions that sign.  ``scripts/fetch-piv`` fetches all three into
``.cache/piv``; without them, importing this module raises a ModuleNotFoundError that says so.  Only `Connection` is our
code: it adapts yubikit to the functions of smartcard.scard or pcsc_safe.scard.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from places import ROOT

from pcsc_safe.testing import PcscStackError

__all__ = ["PIN", "ApduError", "Connection", "PivCard", "Signer", "is_signature", "personalise", "tool"]

FETCHED = ROOT / ".cache" / "piv"
PACKAGES = FETCHED / str(sys.implementation.cache_tag)
PIN = "123456"
SUBJECT = "CN=A card holder,O=pcsc_safe"

if str(PACKAGES) not in sys.path:
    sys.path.append(str(PACKAGES))  # last: installed packages take precedence

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from ykman.piv import generate_self_signed_certificate
    from yubikit.core import TRANSPORT
    from yubikit.core.smartcard import ApduError, SmartCardConnection
    from yubikit.piv import KEY_TYPE, SLOT, PivSession

    from pcsc_safe.testing.piv import PivCard

    _tool = shutil.which("yubico-piv-tool", path=str(FETCHED / "tool/usr/bin")) or shutil.which("yubico-piv-tool")
    if _tool is None:
        raise ModuleNotFoundError("yubico-piv-tool is not installed")
except (ModuleNotFoundError, PcscStackError) as error:
    raise ModuleNotFoundError(f"{error}; scripts/fetch-piv gets it (for Python 3.10 and later)") from None


class Connection(SmartCardConnection):
    """yubikit's connection to a card, through the functions of a module like smartcard.scard.

    :param scard: the module.
    :param share_mode: the name of SCARD_SHARE_SHARED or SCARD_SHARE_EXCLUSIVE.
    """

    transport = TRANSPORT.USB

    def __init__(self, scard: Any, share_mode: str = "SCARD_SHARE_SHARED") -> None:
        self._scard = scard
        (self._context,) = self._done("SCardEstablishContext", scard.SCARD_SCOPE_SYSTEM)
        (readers,) = self._done("SCardListReaders", self._context, [])
        mode = getattr(scard, share_mode)
        self._card, _ = self._done("SCardConnect", self._context, readers[0], mode, scard.SCARD_PROTOCOL_T1)

    def send_and_receive(self, apdu: bytes) -> tuple[bytes, int]:
        """One exchange; return data and status word."""
        (answer,) = self._done("SCardTransmit", self._card, self._scard.SCARD_PCI_T1, list(apdu))
        return bytes(answer[:-2]), int.from_bytes(bytes(answer[-2:]), "big")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction for the block: no other process may interfere with a response in several pieces."""
        self._done("SCardBeginTransaction", self._card)
        try:
            yield
        finally:
            self._done("SCardEndTransaction", self._card, self._scard.SCARD_LEAVE_CARD)

    def reset(self, how: str) -> None:
        """Reset the card.

        :param how: the name of SCARD_RESET_CARD or SCARD_UNPOWER_CARD.
        """
        mode, protocol = self._scard.SCARD_SHARE_SHARED, self._scard.SCARD_PROTOCOL_T1
        self._done("SCardReconnect", self._card, mode, protocol, getattr(self._scard, how))

    def close(self) -> None:
        """Disconnect as pyscard does by default: power off the card."""
        self._done("SCardDisconnect", self._card, self._scard.SCARD_UNPOWER_CARD)
        self._done("SCardReleaseContext", self._context)

    def _done(self, function: str, *arguments: Any) -> list[Any]:
        result = getattr(self._scard, function)(*arguments)
        hresult, *rest = result if isinstance(result, list) else [result]
        assert hresult == 0, f"{function}: {self._scard.SCardGetErrorMessage(hresult)}"
        return rest


class Signer:
    """A session of yubikit on the personalised card.

    :param pin: the PIN to verify first; empty for none.
    """

    def __init__(self, connection: Connection, pin: str = PIN) -> None:
        self.connection = connection
        self._session = PivSession(connection)
        if pin:
            self._session.verify_pin(pin)

    def sign(self, message: bytes) -> bytes:
        """The signature of the card's P-256 key.

        :raises ApduError: the card refuses.
        """
        return bytes(self._session.sign(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256, message, hashes.SHA256()))

    def certificate(self) -> str:
        """The card's certificate in PEM.  The card sends it in two pieces."""
        with self.connection.transaction():
            return _pem(self._session.get_certificate(SLOT.AUTHENTICATION))

    def self_sign(self, public_key: str) -> str:
        """A certificate for the card's key, signed with this key; both in PEM."""
        key = serialization.load_pem_public_key(public_key.encode())
        today = datetime.now(timezone.utc)
        tomorrow = today + timedelta(days=1)
        return _pem(generate_self_signed_certificate(self._session, SLOT.AUTHENTICATION, key, SUBJECT, today, tomorrow))


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def is_signature(certificate: str, message: bytes, signature: bytes) -> bool:
    """Whether the signature is by the certificate's key."""
    key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    try:
        key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def tool(*arguments: str, env: Mapping[str, str], given: str = "") -> subprocess.CompletedProcess[str]:
    """Run yubico-piv-tool on the stack of an environment; it must succeed.

    :param arguments: its options.
    :param given: its standard input.
    :return: the result.
    """
    libraries = [*map(str, FETCHED.glob("tool/usr/lib/*")), *filter(None, [env.get("LD_LIBRARY_PATH")])]
    result = subprocess.run(
        [_tool, "--reader=Virtual", f"--slot={int(SLOT.AUTHENTICATION):x}", *arguments],
        env={**env, "LD_LIBRARY_PATH": ":".join(libraries)},
        input=given,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 0, result
    return result


def personalise(env: Mapping[str, str], self_sign: Callable[[str], str]) -> str:
    """Give the card of a stack a card holder's identifier, a P-256 key made on the card, and a certificate.

    :param self_sign: makes the certificate from the public key; both in PEM.  yubico-piv-tool can do it too, but Debian
        12's can't: it doesn't work with OpenSSL 3 (its issue 388).
    :return: the certificate.
    """
    tool("--action=set-chuid", env=env)
    certificate = self_sign(tool("--action=generate", "--algorithm=ECCP256", env=env).stdout)
    tool("--action=import-certificate", env=env, given=certificate)
    return certificate
