"""The virtual PIV card, and the example that signs with it."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from places import EXAMPLES

from pcsc_safe import scard
from pcsc_safe.testing import PcscStackError, VirtualPcsc

try:
    from pcsc_safe.testing.piv import PivCard
except PcscStackError as error:
    pytest.skip(str(error), allow_module_level=True)

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256

PIN = "123456"
MESSAGE = b"to be signed"
DIGEST = hashlib.sha256(MESSAGE).digest()


@pytest.fixture(scope="module")
def stack() -> Iterator[VirtualPcsc]:
    """A stack with a personalised card."""
    with VirtualPcsc(cards=[PivCard.personalised("Somebody")]) as stack:
        yield stack


@pytest.fixture
def piv(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example's module, as the other examples import it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import piv

    if Path(piv.__file__).parent != EXAMPLES:  # tests/piv.py has the same name
        monkeypatch.delitem(sys.modules, "piv")
        import piv
    monkeypatch.delitem(sys.modules, "piv")
    return piv


def is_signature(certificate: bytes, signature: bytes) -> bool:
    """Whether it is a signature of the message by the key of a certificate in DER."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    assert isinstance(key, EllipticCurvePublicKey)
    try:
        key.verify(signature, MESSAGE, ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def test_it_signs(stack: VirtualPcsc, piv: ModuleType) -> None:
    """The card returns its certificate, and signs with the certificate's key."""
    signer = piv.Signer(PIN)
    certificate = signer.certificate()
    signatures = {signer.sign(DIGEST) for _ in range(3)}
    signer.close()
    assert x509.load_der_x509_certificate(certificate).subject.rfc4514_string() == "CN=Somebody"
    assert len(signatures) == 3
    assert all(is_signature(certificate, signature) for signature in signatures)


def test_what_is_on_it_outlasts_pcscd(stack: VirtualPcsc, piv: ModuleType) -> None:
    """Key and certificate survive the end of pcscd; the verified PIN does not."""
    signer = piv.Signer(PIN)
    certificate = signer.certificate()
    stack.restart()
    signer.close()
    again = piv.Signer(PIN)
    signature, same = again.sign(DIGEST), again.certificate() == certificate
    again.close()
    assert same
    assert is_signature(certificate, signature)


def test_a_signer_goes_on_after_a_reset(stack: VirtualPcsc, piv: ModuleType) -> None:
    """A signer continues after a reset by another application, and after one that logged it out."""
    signer = piv.Signer(PIN)
    certificate = signer.certificate()
    stack.readers[0].reset()
    after_reset = signer.sign(DIGEST)
    stack.readers[0].card.power_on()  # no connection is notified of it
    after_logout = signer.sign(DIGEST)
    signer.close()
    assert is_signature(certificate, after_reset)
    assert is_signature(certificate, after_logout)


def test_a_signer_goes_on_without_a_protocol(
    stack: VirtualPcsc, piv: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signer continues after a reset that unsets the protocol when the signer has already reconnected.

    No test can make pcscd do so at a given time, so the test replaces its return value.
    """
    signer = piv.Signer(PIN)
    certificate = signer.certificate()
    answers = [[scard.SCARD_E_PROTO_MISMATCH, []]]
    transmit = scard.SCardTransmit
    monkeypatch.setattr(scard, "SCardTransmit", lambda *call: answers.pop() if answers else transmit(*call))
    signature = signer.sign(DIGEST)
    signer.close()
    assert answers == []
    assert is_signature(certificate, signature)


def test_a_wrong_pin_is_tried_once(stack: VirtualPcsc, piv: ModuleType) -> None:
    """A wrong PIN is refused, and isn't tried again, so it doesn't block the card."""
    signer = piv.Signer(PIN)
    signer._pin = "999999"
    stack.readers[0].reset()
    for message in ("the card refuses the PIN", "isn't tried again", "isn't tried again", "isn't tried again"):
        with pytest.raises(piv.CardError, match=message):
            signer.sign(DIGEST)
    signer.close()
    piv.Signer(PIN).close()


def test_no_pin_no_signature(stack: VirtualPcsc) -> None:
    """Without the PIN the card refuses to sign (6982); it has no other application (6A82), and needs a SELECT first."""
    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    name = stack.readers[0].name
    _, card, _ = scard.SCardConnect(context, name, scard.SCARD_SHARE_EXCLUSIVE, scard.SCARD_PROTOCOL_T1)
    scard.SCardReconnect(card, scard.SCARD_SHARE_EXCLUSIVE, scard.SCARD_PROTOCOL_T1, scard.SCARD_RESET_CARD)
    sign = [0x00, 0x87, 0x11, 0x9A, 38, 0x7C, 36, 0x82, 0, 0x81, 32, *DIGEST, 0x00]
    select = list(bytes.fromhex("00A4040005A000000308"))
    other = list(bytes.fromhex("00A4040007A0000005272001"))
    commands = (sign, other, select, sign)
    answers = [scard.SCardTransmit(card, scard.SCARD_PCI_T1, command)[1][-2:] for command in commands]
    scard.SCardReleaseContext(context)
    assert answers == [[0x69, 0x85], [0x6A, 0x82], [0x90, 0x00], [0x69, 0x82]]


def on_a_stack(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m pcsc_safe.testing``."""
    command = [sys.executable, "-m", "pcsc_safe.testing", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_example_on_a_virtual_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example does what its header says."""
    monkeypatch.setenv("PIV_PIN", PIN)
    file = tmp_path / "file"
    file.write_bytes(MESSAGE)
    done = on_a_stack("--card", "piv", "--", sys.executable, str(EXAMPLES / "piv.py"), str(file))
    *pem, signature = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert is_signature(ssl.PEM_cert_to_DER_cert("\n".join(pem)), bytes.fromhex(signature))


def test_a_command_ends_as_it_ends() -> None:
    """``python -m pcsc_safe.testing`` ends with the exit status of its command, as a shell reports it."""
    assert on_a_stack("--", "sh", "-c", "exit 7").returncode == 7
    assert on_a_stack("--", "sh", "-c", "kill -9 $$").returncode == 137


def test_a_command_has_the_cards_it_asked_for() -> None:
    """The command has a reader for each requested card, in order."""
    code = (
        "from pcsc_safe.scard import *; c = SCardEstablishContext(0)[1]; "
        "print([bool(s[1] & SCARD_STATE_PRESENT) for s in "
        "SCardGetStatusChange(c, 0, [(r, 0) for r in SCardListReaders(c, [])[1]])[1]])"
    )
    done = on_a_stack("--card", "none", "--card", "echo", "--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[False, True]\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "/nonexistent"], "/nonexistent: No such file or directory"),
        (["--card", "gold", "--", "true"], "invalid choice: 'gold'"),
        ([], "required"),
        (["--card", "none"] * 17 + ["--", "true"], "pcscd serves 1 to 16 readers, not 17"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    """Wrong arguments end with status 2 and a line that says what is wrong, without a traceback."""
    done = on_a_stack(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
