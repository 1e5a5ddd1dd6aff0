"""`PivCard`: a virtual card with a signing key, for applications that use PIV (NIST SP 800-73-4).

The applet is that of jcecard, another project; ``pip install 'pcsc-safe[piv]'`` installs it, for Python 3.10 and later.
This module has the adapter, and the functions that the applet lacks.

Invariant: keys, certificates, PINs and their counters belong to the card, so they survive a loss of power, a change of
the reader, and the end of pcscd.  A loss of power ends the verification of the PIN and the selection of an application.

At a fork: see `pcsc_safe.testing.cards`.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from ._errors import PcscStackError
from .cards import DEFAULT_ATR, VirtualCard

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

__all__ = ["PivCard"]

_handler = logging.NullHandler()
logging.getLogger().addHandler(_handler)  # or jcecard would configure logging for the whole process
try:
    from jcecard.apdu import APDUCommand, APDUParser
    from jcecard.piv import PIVApplet
    from jcecard.piv.data_objects import PIVAlgorithm, PIVDataObjects, PIVKeyData, PIVSlot
    from jcecard.tlv import TLVEncoder
except ModuleNotFoundError as error:
    remedy = "pip install 'pcsc-safe[piv]', on Python 3.10 or later"
    raise PcscStackError(f"the virtual PIV card needs jcecard ({error})", remedy=remedy) from error
finally:
    logging.getLogger().removeHandler(_handler)
logging.getLogger("jcecard").setLevel(logging.CRITICAL + 1)  # it logs APDUs, and PINs with them

_AID = bytes.fromhex("A000000308")
_SELECT, _GET_RESPONSE = 0xA4, 0xC0
_VALID = timedelta(days=30)


class PivCard(VirtualCard):
    """An empty PIV card: PIN 123456, PUK 12345678, and the management key of the standard.

    :param atr: see `VirtualCard`.  OpenSC signs with elliptic curves only on cards whose ATR it knows.

    A real card has a key and a certificate from its issuer; `PivCard.personalised` makes such a card.
    """

    def __init__(self, atr: bytes = DEFAULT_ATR) -> None:
        super().__init__(atr)
        self._applet = PIVApplet()
        self._chain = self._rest = b""

    @classmethod
    def personalised(cls, common_name: str = "A card holder", atr: bytes = DEFAULT_ATR) -> PivCard:
        """A card with two P-256 keys, and self-signed certificates of them.

        One authenticates the card holder (slot 9A), and needs the PIN; the other authenticates the card itself (slot
        9E), and needs no PIN.

        :param common_name: the certificates' subject and issuer.
        :param atr: see `VirtualCard`.
        """
        card = cls(atr)
        card.issue(common_name)
        return card

    def issue(self, common_name: str) -> None:
        """Write a card holder's identifier to the card, and for slots 9A and 9E a new P-256 key and its certificate.

        :param common_name: the certificates' subject and issuer.
        """
        objects = self._applet.data_objects
        objects.chuid, objects.ccc = PIVDataObjects.create_default_chuid(), PIVDataObjects.create_default_ccc()
        self._issue_key(PIVSlot.AUTHENTICATION, b"\x5f\xc1\x05", common_name)
        self._issue_key(PIVSlot.CARD_AUTH, b"\x5f\xc1\x01", common_name)

    def _issue_key(self, slot: PIVSlot, certificate_object: bytes, common_name: str) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = ec.generate_private_key(ec.SECP256R1())
        numbers = key.public_key().public_numbers()
        point = b"\x04" + numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
        # Certificate, "not compressed", no error detection code (SP 800-73-4, part 1, table 10).
        certificate = TLVEncoder.encode(0x70, _self_signed(key, common_name)) + bytes.fromhex("710100FE00")
        objects = self._applet.data_objects
        objects.put_key(
            slot,
            PIVKeyData(
                algorithm=PIVAlgorithm.ECC_P256,
                private_key=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
                public_key=TLVEncoder.encode(0x7F49, TLVEncoder.encode(0x86, point)),
            ),
        )
        objects.put_data_object(certificate_object, certificate)  # by itself jcecard puts that of 9E elsewhere

    def apdu(self, command: bytes) -> bytes:
        """Return the response to one command of SP 800-73; before SELECT it refuses all others.

        This method handles command chaining, and responses in parts of 256 bytes, because the applet doesn't.
        """
        parsed = APDUParser.parse(command)
        if parsed.ins == _GET_RESPONSE:
            return self._next_piece() if self._rest else b"\x69\x85"
        self._rest = b""
        if parsed.ins == _SELECT:
            if parsed.data.startswith(_AID):
                parsed.data = _AID  # the applet doesn't know that an AID may be given with its version
        elif not self._applet.selected:
            return b"\x69\x85"
        if parsed.chained:
            self._chain += parsed.data
            return b"\x90\x00"
        parsed.data, self._chain = self._chain + parsed.data, b""
        return self._respond_whole(parsed)

    def _respond_whole(self, command: APDUCommand) -> bytes:
        answer = self._applet.process_apdu(command)
        if command.ins == _SELECT and answer.sw == 0x9000:
            answer.data = TLVEncoder.encode(0x61, answer.data)  # it forgets the template (SP 800-73-4, part 2, 3.1.1)
        if command.extended or answer.sw != 0x9000:
            return bytes(answer.to_bytes())
        self._rest = bytes(answer.data)
        return self._next_piece()

    def _next_piece(self) -> bytes:
        piece, self._rest = self._rest[:256], self._rest[256:]
        return piece + (bytes([0x61, min(len(self._rest), 0xFF)]) if self._rest else b"\x90\x00")

    def power_on(self) -> None:
        """Forget the PIN and the selected application."""
        self._applet.reset()
        self._chain = self._rest = b""

    power_off = reset = power_on


def _self_signed(key: EllipticCurvePrivateKey, common_name: str) -> bytes:
    """A certificate in DER, valid since yesterday, because clocks differ."""
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + _VALID)
    return bytes(builder.sign(key, SHA256()).public_bytes(Encoding.DER))
