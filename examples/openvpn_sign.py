"""Signs for an OpenVPN client whose key is on a PIV card, over OpenVPN's management interface.

What it shows: a program may ask for the PIN on the terminal, and continue in the background as a daemon.  The daemon
doesn't keep the PIN, so it needs the session in which the PIN was verified.  `pcsc_safe.handover` gives this session to
the daemon.  The exit of the foreground process then doesn't affect the session.

The daemon listens on a socket, to which its user and root may connect.  Start it, and then OpenVPN, which connects::

    python examples/openvpn_sign.py ~/card.sock    # asks for the PIN, or takes PIV_PIN; prints the daemon's PID
    sudo openvpn client.conf

Put these lines into client.conf instead of cert and key::

    management /home/me/card.sock unix
    management-client
    management-client-user me
    management-external-cert piv
    management-external-key nopadding

If the session is lost (the card is removed, reset, or used for something else), the daemon and OpenVPN end.  With
--keep-pin the daemon keeps the PIN and begins another session.  It writes a log to ~/card.sock.log.  Without a card,
``python -m pcsc_safe.testing --card piv -- sh`` starts a shell with a virtual card, whose PIN is 123456.
"""

import argparse
import base64
import hashlib
import logging
import os
import signal
import socket
import ssl
import sys

import piv

import pcsc_safe
from pcsc_safe import scard


def main(path, reader, exclusive, keep_pin):
    signer = piv.Signer(piv.pin(), reader, scard.SCARD_SHARE_EXCLUSIVE if exclusive else scard.SCARD_SHARE_SHARED)
    try:
        if not keep_pin:
            signer.forget_pin()
        certificate = ssl.DER_cert_to_PEM_cert(signer.certificate())
        log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        listener = listen(path)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal may close before the daemon has detached from it
        pid = 0
        try:
            with pcsc_safe.handover():
                pid = os.fork()
            if pid:
                print(pid, flush=True)
                return
            detach(log)
            while True:
                converse(listener.accept()[0], signer, certificate)
        finally:
            if pid == 0:
                os.unlink(path)
    finally:
        signer.close()


def listen(path):
    """A socket for this user and root only, because every client can have anything signed."""
    listener = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o177)
    listener.bind(path)
    os.umask(umask)
    listener.listen()
    return listener


def detach(log):
    """Leave the terminal, and clean up on SIGTERM."""
    os.setsid()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)


def converse(client, signer, certificate):
    """Serve one OpenVPN until it disconnects (doc/management-notes.txt of OpenVPN has the protocol)."""
    try:
        with client, client.makefile("rw", encoding="utf-8", errors="replace") as lines:
            say(
                lines, "version 3", "state on"
            )  # with version 3 or later, OpenVPN says which kind of signature it needs
            for line in lines:
                kind, _, text = line.rstrip().partition(":")
                if kind == ">NEED-CERTIFICATE":
                    say(lines, "certificate", certificate, "END")
                elif kind == ">PK_SIGN":
                    sign(lines, signer, text)
                elif kind == ">HOLD":
                    say(lines, "hold release")
                elif kind in (">STATE", ">FATAL"):
                    logging.info("OpenVPN: %s", text)
    except OSError as error:
        logging.info("OpenVPN: %s", error)


def sign(lines, signer, request):
    """Send a signature; or an empty one, after which OpenVPN ends this handshake."""
    try:
        signature = base64.b64encode(signer.sign(digest(*request.split(",")))).decode()
    except ValueError as error:
        logging.error("not signed: %s", error)
        say(lines, "pk-sig", "END")
    except piv.CardError:
        say(lines, "pk-sig", "END")
        raise
    else:
        logging.info("signed")
        say(lines, "pk-sig", signature, "END")


def digest(data, algorithm, *parameters):
    """What a P-256 key signs: ``data``, or the digest of ``data`` if this is the message itself.

    :raises ValueError: OpenVPN wants another kind of key.
    """
    if algorithm != "ECDSA":
        raise ValueError(f"OpenVPN wants {algorithm}, but the key can only sign with ECDSA")
    data = base64.b64decode(data)
    if "data=message" in parameters:
        data = hashlib.new(dict(parameter.split("=") for parameter in parameters)["hashalg"], data).digest()
    return data[:32].rjust(32, b"\0")  # TLS 1.2 permits any digest with any curve: FIPS 186-5, 6.4.1


def say(lines, *commands):
    lines.write("".join(f"{command.rstrip()}\n" for command in commands))
    lines.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--exclusive",
        action="store_true",
        help="prevent other applications from using the card (default: they can use it)",
    )
    parser.add_argument(
        "--keep-pin",
        action="store_true",
        help="keep the PIN, and verify it again if the session is lost (default: end)",
    )
    parser.add_argument("--reader", default="", help="a part of the reader's name (default: the first reader)")
    parser.add_argument(
        "socket", type=os.path.abspath, help="the path of the socket for OpenVPN's --management; the program creates it"
    )
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    try:
        main(options.socket, options.reader, options.exclusive, options.keep_pin)
    except (piv.CardError, pcsc_safe.HandoverError, OSError) as error:
        sys.exit(f"openvpn_sign.py: {error}")
