"""A signing key on a PIV card (NIST SP 800-73-4), for the other examples: five commands, and nothing about forks.

What it shows: code that handles a reset of its card also handles a fork.  Another application may reset the card at any
time.  PC/SC then returns SCARD_W_RESET_CARD, and the remedy is to connect again, select the applet and verify the PIN.
A forked process gets the same code if the session that it inherited has ended, and the same remedy works.

Sign a file with the card in the first reader.  The program prints the certificate, and the signature in hex::

    python examples/piv.py file

It asks for the PIN, or takes it from the environment variable PIV_PIN.  The key in slot 9A must be P-256, and the card
must support the protocol T=1.  On a virtual card, whose PIN is 123456::

    pip install 'pcsc-safe[piv]'
    python -m pcsc_safe.testing --card piv -- python examples/piv.py file
"""

import contextlib
import getpass
import hashlib
import os
import ssl
import sys

from pcsc_safe import scard

SELECT = bytes.fromhex("00A4040009A00000030800001000")
AUTHENTICATION_KEY = 0x9A
P_256 = 0x11
CERTIFICATE = bytes.fromhex("5C035FC105")


class CardError(Exception):
    """The card or PC/SC has refused something."""


class SessionLostError(Exception):
    """The session is gone: another application reset the card, or the session that this process inherited has ended."""


class Signer:
    """The authentication key of the PIV card in a reader.

    :param pin: the card holder's, 6 to 8 digits.
    :param reader: a part of the reader's name; the first one by default.
    :param share_mode: SCARD_SHARE_EXCLUSIVE keeps other applications out.
    :raises CardError: no such reader, no card, or a PIN that is wrong.
    """

    def __init__(self, pin, reader="", share_mode=scard.SCARD_SHARE_SHARED):
        self._pin, self._first_certificate = pin, None
        self._how = share_mode, scard.SCARD_PROTOCOL_T1
        (self._context,) = done("SCardEstablishContext", scard.SCARD_SCOPE_SYSTEM)
        try:
            (readers,) = done("SCardListReaders", self._context, [])
            name = next((name for name in readers if reader in name), None)
            if name is None:
                raise CardError(f"no reader {reader!r}; there are {readers}")
            self._card, _ = done("SCardConnect", self._context, name, *self._how)
            self._in_a_session(self._open)
        except BaseException:
            self.close()
            raise

    def close(self):
        """Disconnect from the card.  Other applications are not affected."""
        if hasattr(self, "_card"):
            scard.SCardDisconnect(self._card, scard.SCARD_LEAVE_CARD)
        scard.SCardReleaseContext(self._context)

    def forget_pin(self):
        """Don't keep the PIN.  The session in which it is verified continues, but can't be replaced if it is lost."""
        self._pin = None
        self._no_pin = "the session with the card is lost, and the PIN was not kept"

    def sign(self, digest):
        """The ECDSA signature, in DER, of a SHA-256 digest."""
        template = tlv(0x7C, tlv(0x82, b"") + tlv(0x81, digest))
        answer = self._on_the_card(lambda: self._command(0x87, P_256, AUTHENTICATION_KEY, template))
        return value(value(answer))

    def certificate(self):
        """The certificate of the key, in DER."""
        return value(value(self._on_the_card(lambda: self._command(0xCB, 0x3F, 0xFF, CERTIFICATE))))

    def _on_the_card(self, action):
        """The result of an action, with the PIN verified."""

        def attempt():
            try:
                return action()
            except CardError:  # another application has selected another applet, or reset the PIN
                self._open()
                return action()

        return self._in_a_session(attempt)

    def _in_a_session(self, action):
        """The result of an action in one transaction.  If the session is lost, reconnect and try again."""
        while True:
            try:
                with self._alone():
                    return action()
            except SessionLostError:
                with contextlib.suppress(SessionLostError):  # lost again
                    done("SCardReconnect", self._card, *self._how, scard.SCARD_LEAVE_CARD)

    @contextlib.contextmanager
    def _alone(self):
        """A transaction: no other process can send a command in between."""
        done("SCardBeginTransaction", self._card)
        try:
            yield
        finally:
            scard.SCardEndTransaction(self._card, scard.SCARD_LEAVE_CARD)

    def _open(self):
        if self._pin is None:
            raise CardError(self._no_pin)
        self._transmit(SELECT)
        certificate = self._command(0xCB, 0x3F, 0xFF, CERTIFICATE)  # which needs no PIN
        if self._first_certificate not in (None, certificate):
            raise CardError("another card is in the reader; it doesn't get the PIN of the first one")
        self._first_certificate = certificate
        _, sw = self._transmit(apdu(0x20, 0x00, 0x80, self._pin.encode().ljust(8, b"\xff")))
        if sw >> 8 == 0x63 or sw == 0x6983:  # wrong, or blocked
            self._pin = None
            self._no_pin = "the card refused this PIN; it isn't tried again, or the card would block it"
        if sw != 0x9000:
            raise CardError(f"the card refuses the PIN ({sw:04X})")

    def _command(self, ins, p1, p2, data):
        """The complete reply to a command, which the card may send in parts."""
        answer, sw = self._transmit(apdu(ins, p1, p2, data))
        while sw >> 8 == 0x61:
            piece, sw = self._transmit(bytes([0x00, 0xC0, 0x00, 0x00, sw & 0xFF]))
            answer += piece
        if sw != 0x9000:
            raise CardError(f"the card refuses command {ins:02X} ({sw:04X})")
        return answer

    def _transmit(self, command):
        (answer,) = done("SCardTransmit", self._card, scard.SCARD_PCI_T1, list(command))
        return bytes(answer[:-2]), int.from_bytes(bytes(answer[-2:]), "big")


# What pcscd may return while it resets a card, because an application died inside a transaction.
LOST = {("SCardTransmit", scard.SCARD_E_PROTO_MISMATCH)}


def done(function, *arguments):
    """Call a function of PC/SC, check its return code, and return the rest of its result."""
    result = getattr(scard, function)(*arguments)
    hresult, *rest = result if isinstance(result, list) else [result]
    if (function, hresult) in LOST or hresult == scard.SCARD_W_RESET_CARD:
        raise SessionLostError
    if hresult != scard.SCARD_S_SUCCESS:
        raise CardError(f"{function}: {scard.SCardGetErrorMessage(hresult)}")
    return rest


def apdu(ins, p1, p2, data):
    """A command with data that asks for the complete reply (ISO 7816-4, case 4)."""
    return bytes([0x00, ins, p1, p2, len(data)]) + data + b"\x00"


def tlv(tag, data):
    """Tag, length and value, for less than 128 bytes."""
    return bytes([tag, len(data)]) + data


def value(encoded):
    """The value of the first object (ISO 7816-4, BER-TLV, tags of one byte)."""
    length, start = encoded[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(encoded[2:start], "big")
    return encoded[start : start + length]


def pin():
    """The card holder's PIN."""
    return os.environ.get("PIV_PIN") or getpass.getpass("PIN: ")


def main(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).digest()
    signer = Signer(pin())
    print(ssl.DER_cert_to_PEM_cert(signer.certificate()), end="")
    print(signer.sign(digest).hex())
    signer.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: piv.py FILE")
    try:
        main(sys.argv[1])
    except CardError as error:
        sys.exit(f"piv.py: {error}")
