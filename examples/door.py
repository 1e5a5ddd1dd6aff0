"""A door that opens for PIV cards: pyscard's CardMonitor, and a separate process for every card that is inserted.

What it shows: with `pcsc_safe.install()` a program that uses pyscard's own classes may fork, here in the thread of the
monitor.  The forked handler uses the connection that was made before the fork.  Neither the parent nor the other
handlers are affected by what it does, or by how it ends.  A handler that hangs with a bad card blocks no other
handler, and a handler that dies opens no door.

A card opens the door if it is on the list and proves that it is that card: it signs a random challenge with the key of
its certificate for card authentication (slot 9E), which needs no PIN.  A UID, an ATR or a certificate alone is easily
copied and opens nothing.  The certificates' dates and issuers are not checked, because the list decides.

Run it with a list that has the SHA-256 of a certificate and a name in each line.  For a card that isn't on the list,
the program logs the SHA-256.  The log is on standard output.  SIGTERM and Ctrl-C end the program::

    python examples/door.py list

Without a reader, and with cryptography from the extra ``piv``::

    pip install 'pcsc-safe[piv]'
    python -m pcsc_safe.testing --card piv -- python examples/door.py /dev/null
"""

import hashlib
import os
import signal
import sys
import threading
import traceback

import piv
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from smartcard.CardMonitoring import CardMonitor, CardObserver
from smartcard.Exceptions import SmartcardException
from smartcard.scard import SCARD_LEAVE_CARD

import pcsc_safe

CARD_AUTHENTICATION_KEY = 0x9E
CERTIFICATE = bytes.fromhex("5C035FC101")
TIMEOUT = 20  # seconds; how long a card may take


class NotAdmittedError(Exception):
    """Why the door stays closed."""


class Door(CardObserver):
    """Forks a handler for each card; called by the monitor, in its thread."""

    def __init__(self, admitted):
        self.admitted = admitted

    def update(self, observable, handlers):
        """The monitor calls this when cards were inserted or removed."""
        added, removed = handlers
        for card in removed:
            log(card, "removed")
        for card in added:
            try:
                self.handle(card)
            except (OSError, RuntimeError, SmartcardException) as error:  # which would end the monitor's thread
                log(card, f"closed: no handler ({error})")

    def handle(self, card):
        """Fork a handler, which never returns from here."""
        connection = card.createConnection()
        pid = os.fork()
        if pid:
            threading.Thread(target=reap, args=(pid, card), daemon=True).start()
            return
        status = 1
        try:
            signal.alarm(TIMEOUT)
            log(card, decision(connection, self.admitted))
            status = 0
        except Exception:
            traceback.print_exc()  # os._exit() would discard it
        finally:
            os._exit(status)


def reap(pid, card):
    _, status = os.waitpid(pid, 0)
    if status:
        log(card, "closed: the handler died; present the card again")


def decision(connection, admitted):
    """What to log about a card.  A real program would open the door here."""
    try:
        # By default disconnect() powers the card off, for all applications.
        connection.connect(disposition=SCARD_LEAVE_CARD)
        try:
            return f"open: {authenticated(connection, admitted)}"
        finally:
            connection.disconnect()
    except (NotAdmittedError, SmartcardException) as error:
        return f"closed: {error}"


def authenticated(connection, admitted):
    """The name of a card on the list that has the key of its certificate."""
    transmit(connection, piv.SELECT)
    certificate = piv.value(piv.value(transmit(connection, piv.apdu(0xCB, 0x3F, 0xFF, CERTIFICATE))))
    fingerprint = hashlib.sha256(certificate).hexdigest()
    if fingerprint not in admitted:
        raise NotAdmittedError(f"not on the list: {fingerprint}")
    challenge = os.urandom(32)
    template = piv.tlv(0x7C, piv.tlv(0x82, b"") + piv.tlv(0x81, hashlib.sha256(challenge).digest()))
    answer = transmit(connection, piv.apdu(0x87, piv.P_256, CARD_AUTHENTICATION_KEY, template))
    key = x509.load_der_x509_certificate(certificate).public_key()
    try:
        key.verify(piv.value(piv.value(answer)), challenge, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise NotAdmittedError(f"a copy of the card of {admitted[fingerprint]}") from None
    return admitted[fingerprint]


def transmit(connection, command):
    """The complete reply to a command, which a card may send in parts."""
    answer, sw1, sw2 = connection.transmit(list(command))
    while sw1 == 0x61:
        piece, sw1, sw2 = connection.transmit([0x00, 0xC0, 0x00, 0x00, sw2])
        answer += piece
    if sw1 != 0x90:
        raise NotAdmittedError(f"the card refuses command {command[1]:02X} ({sw1:02X}{sw2:02X})")
    return bytes(answer)


def log(card, text):
    os.write(1, f"{card.reader}: {text}\n".encode())  # one write, because handlers write to the same file


def main(path):
    pcsc_safe.install()
    with open(path) as file:
        admitted = dict(line.strip().split(maxsplit=1) for line in file if line.strip())
    the_end = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, the_end)  # in all threads and handlers
    monitor, door = CardMonitor(), Door(admitted)
    monitor.addObserver(door)
    signal.sigwait(the_end)
    monitor.deleteObserver(door)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: door.py LIST")
    main(sys.argv[1])
