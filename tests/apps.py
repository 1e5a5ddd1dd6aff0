"""A program that uses applications from PyPI through their Python interfaces, and forks.

    python tests/apps.py NAME
    python tests/apps.py personalise-piv | personalise-openpgp

The program doesn't import pcsc_safe.  It opens the application's session with the card in the first reader, and forks.
The child uses this session, opens one with the card in the second reader, and exits as programs usually do.  Then the
parent continues in its session.  The program prints the result of each step as JSON.

``scripts/fetch-apps`` fetches the applications.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Callable, NamedTuple

PIN, ADMIN_PIN = "123456", "12345678"


class App(NamedTuple):
    """An application.

    :ivar open: opens a session with the card in the reader with this index, selects the applet and verifies the PIN.
    :ivar use: does something that needs this session.
    :ivar close: closes the session.
    """

    open: Callable[[int], Any]
    use: Callable[[Any], str]
    close: Callable[[Any], object]


def _ykman(reader: int) -> Any:
    from ykman.pcsc import list_devices
    from yubikit.core.smartcard import SmartCardConnection
    from yubikit.piv import PivSession

    connection = list_devices("Virtual")[reader].open_connection(SmartCardConnection)
    session = PivSession(connection)
    session.verify_pin(PIN)
    return connection, session


def _ykman_signs(opened: Any) -> str:
    """Make a signature and verify it with the certificate's key; the card doesn't sign without a PIN."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from yubikit.piv import KEY_TYPE, SLOT

    _, session = opened
    certificate = session.get_certificate(SLOT.AUTHENTICATION)
    signature = session.sign(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256, b"a message", hashes.SHA256())
    certificate.public_key().verify(signature, b"a message", ec.ECDSA(hashes.SHA256()))
    return "signed by " + str(certificate.subject.rfc4514_string())


def _piv_smartcard(reader: int) -> Any:
    from smartcard_demo import CardSession, list_readers, select

    session = CardSession(list_readers()[reader]).connect()
    select(session)
    return session


def _piv_smartcard_reads(session: Any) -> str:
    from smartcard_demo import read_certificate

    return str(read_certificate(session, "authentication").subject)


def _fido2(reader: int) -> Any:
    from fido2.pcsc import CtapPcscDevice

    return next(CtapPcscDevice.list_devices(f"Virtual PCD 0 00 0{reader}"))  # others would be powered off


def _fido2_gets_info(device: Any) -> str:
    from fido2.ctap2 import Ctap2

    return ", ".join(Ctap2(device).get_info().versions)


def _openpgppy(reader: int) -> Any:
    from OpenPGPpy import OpenPGPcard

    card = OpenPGPcard(reader)
    card.verify_pin(1, PIN)
    return card


def _openpgppy_signs(card: Any) -> str:
    """Make a signature; the card doesn't sign without a PIN."""
    sha256 = bytes.fromhex("3031300d060960864801650304020105000420")
    return f"signed, {len(card.sign(sha256 + bytes(32)))} bytes"


APPS = {
    "ykman": App(_ykman, _ykman_signs, lambda opened: opened[0].close()),
    "piv-smartcard": App(_piv_smartcard, _piv_smartcard_reads, lambda session: session.disconnect()),
    "fido2": App(_fido2, _fido2_gets_info, lambda device: device.close()),
    "OpenPGPpy": App(_openpgppy, _openpgppy_signs, lambda card: card.__del__()),
}


def attempt(function: Callable[[], str]) -> str:
    """What the function returns, or the error that it raises."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(name: str) -> None:
    """Use an application before and after a fork."""
    app = APPS[name]
    session = app.open(0)
    told = {"before": app.use(session)}
    child = os.fork()
    if child == 0:
        told = {"inherited": attempt(lambda: app.use(session)), "own": attempt(lambda: app.use(app.open(1)))}
        print(json.dumps(told), flush=True)
        attempt(lambda: str(app.close(session)))
        sys.exit()
    told["child"] = str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    told["after"] = attempt(lambda: app.use(session))
    told["closed"] = attempt(lambda: str(app.close(session)))
    print(json.dumps(told))


def personalise_openpgp() -> None:
    """Give the OpenPGP card in every reader a key for signatures."""
    from OpenPGPpy import OpenPGPcard
    from smartcard.System import readers

    for number in range(len(readers())):
        card = OpenPGPcard(number)
        card.verify_pin(3, ADMIN_PIN)
        card.put_data("C4", "01")  # one PIN verification is valid for many signatures
        card.gen_key("B600")


def personalise_piv() -> None:
    """Give the PIV card in every reader a key and a certificate."""
    from datetime import datetime, timedelta, timezone

    from ykman.pcsc import list_devices
    from ykman.piv import generate_self_signed_certificate
    from yubikit.core.smartcard import SmartCardConnection
    from yubikit.piv import DEFAULT_MANAGEMENT_KEY, KEY_TYPE, SLOT, PivSession

    today = datetime.now(timezone.utc)
    for number, device in enumerate(list_devices("Virtual")):
        with device.open_connection(SmartCardConnection) as connection:
            session = PivSession(connection)
            session.authenticate(DEFAULT_MANAGEMENT_KEY)
            key = session.generate_key(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256)
            session.verify_pin(PIN)
            subject, end = f"CN=card holder {number}", today + timedelta(days=1)
            made = generate_self_signed_certificate(session, SLOT.AUTHENTICATION, key, subject, today, end)
            session.put_certificate(SLOT.AUTHENTICATION, made)


if __name__ == "__main__":
    commands = {"personalise-piv": personalise_piv, "personalise-openpgp": personalise_openpgp}
    commands.get(sys.argv[1], lambda: main(sys.argv[1]))()
