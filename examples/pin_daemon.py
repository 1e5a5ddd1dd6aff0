"""A signing daemon that asks for the PIN on the terminal, and then continues in the background without it.

What it shows: the process that asks for the PIN transfers its session to the daemon with `pcsc_safe.handover()`.  The
PIN is still verified, and the card is still held exclusively.  So the daemon needs no PIN and has none.  But it can't
verify the PIN again.  If the session ends, because the card was pulled out or pcscd was restarted, the daemon reports
this to the client, writes a line to the system's log, and ends.  Start it again then.  It forks a handler for every
client.  The handler doesn't use the session, and may die.

Run it with python-daemon installed, and send files to it; the reply is the signature in hex, or ``error: ...``::

    python examples/pin_daemon.py ~/sign.sock      # asks for the PIN, or takes it from PIV_PIN in the environment
    nc -UN ~/sign.sock < file
    kill $(cat ~/sign.sock.pid)

Everybody who may connect to the socket may sign.  So only its user may use the socket (mode 0600).  The card is held
exclusively, because otherwise every user of the reader could sign with the PIN that was verified here.
"""

import contextlib
import hashlib
import os
import selectors
import signal
import socket
import sys
import syslog

import daemon
import piv

import pcsc_safe
from pcsc_safe import scard

TIMEOUT = 60  # seconds; how long a client may take


def main(path):
    signer = piv.Signer(piv.pin(), share_mode=scard.SCARD_SHARE_EXCLUSIVE)
    signer.forget_pin()
    os.environ.pop("PIV_PIN", None)
    os.umask(0o177)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    background = daemon.DaemonContext(umask=0o177, files_preserve=[listener, *pcsc_safe.files_to_preserve()])
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal may close before this process has detached from it
    try:
        with pcsc_safe.handover():
            background.open()
    except (pcsc_safe.HandoverError, OSError) as error:
        os.unlink(path)
        syslog.syslog(syslog.LOG_ERR, f"not started: {error}")  # the terminal may be closed already
        raise
    # Outside of the handover block, so that the forks of handlers hand nothing over.
    with background:
        try:
            with open(f"{path}.pid", "w") as file:
                file.write(f"{os.getpid()}\n")
            serve(listener, signer)
        except (piv.CardError, OSError) as error:
            syslog.syslog(syslog.LOG_ERR, f"ended, start it again: {error}")
            sys.exit(1)
        finally:
            os.unlink(path)
            os.unlink(f"{path}.pid")
            signer.close()


def serve(listener, signer):
    """Fork a handler for each client, and sign the digests that the handlers send."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    pid, handler = fork_handler(listener, selector)
                    selector.register(handler, selectors.EVENT_READ, pid)
                elif not answer(key.fileobj, signer):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    os.waitpid(key.data, 0)


def answer(handler, signer):
    """Sign a digest that a handler sends.  Return False if the handler has ended."""
    try:
        digest = handler.recv(32)
    except ConnectionResetError:  # the handler was killed
        return False
    if len(digest) < 32:
        return False
    try:
        signature = signer.sign(digest)
    except piv.CardError as error:
        tell(handler, f"error: {error}")
        raise
    tell(handler, signature.hex())
    return True


def tell(whom, line):
    with contextlib.suppress(OSError):  # the other side has ended
        whom.sendall(f"{line}\n".encode())


def fork_handler(listener, selector):
    """Fork a handler for the next client; return its PID and a socket to it."""
    client, _ = listener.accept()
    ours, its = socket.socketpair()
    pid = os.fork()
    if pid:
        client.close()
        its.close()
        return pid, ours
    try:
        ours.close()  # otherwise the handler would not notice the end of the daemon
        for key in selector.get_map().values():  # the listener, and the daemon's sockets to other handlers
            key.fileobj.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(TIMEOUT)
        handle(client, its)
    finally:
        os._exit(0)


def handle(client, signing):
    """Read all that a client sends, and give it the signature."""
    digest = hashlib.sha256()
    while data := client.recv(65536):
        digest.update(data)
    signing.sendall(digest.digest())
    client.sendall(signing.recv(1024))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: pin_daemon.py SOCKET")
    try:
        main(os.path.abspath(sys.argv[1]))
    except (piv.CardError, pcsc_safe.HandoverError, OSError) as error:
        sys.exit(f"pin_daemon.py: {error}")
