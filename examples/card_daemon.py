"""A card service that opens the card in the foreground and serves it from the background.

What it shows: a program may connect to the card before it daemonizes, so that a missing card is reported on the
terminal.  The daemon then uses this card.  Its parent has ended, so the daemon's first command returns
SCARD_W_RESET_CARD, as after any reset of the card.  pcsc_safe.reconnecting() connects again and repeats the command.
This example needs no PIN and no applet.  A daemon that needs them passes on_reset, a function that selects the applet
and verifies the PIN.

Run it, and send it commands over its socket; each line is a command in hex, and each reply is a line::

    python examples/card_daemon.py /tmp/card.sock       # prints the daemon's PID
    echo 80010000021234 | nc -UN /tmp/card.sock
    kill PID
"""

import contextlib
import os
import signal
import socket
import sys

import pcsc_safe
from pcsc_safe import scard


def main(path):
    context, card = open_card()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal may close before the daemon has detached from it
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        # This cleanup doesn't affect the daemon, which gets its own context and connection.
        scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD)
        scard.SCardReleaseContext(context)
        return
    status = 1
    try:
        detach()
        serve(listener, card)
        status = 0
    finally:
        os.unlink(path)
        scard.SCardReleaseContext(context)
        os._exit(status)


def open_card():
    """A context, and a connection to the card in the first reader; ends the program if there is none."""
    hresult, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    check("SCardEstablishContext", hresult)
    hresult, readers = scard.SCardListReaders(context, [])
    check("SCardListReaders", hresult)
    hresult, card, _ = scard.SCardConnect(context, readers[0], scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)
    check("SCardConnect", hresult)
    return context, card


def check(function, hresult):
    if hresult != scard.SCARD_S_SUCCESS:
        sys.exit(f"{function}: {scard.SCardGetErrorMessage(hresult)}")


def detach():
    """Leave the terminal, and clean up on SIGTERM."""
    os.setsid()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


def serve(listener, card):
    """Answer commands, one client after the other, until SIGTERM."""
    with contextlib.suppress(SystemExit):
        while True:
            client, _ = listener.accept()
            # A client may disconnect at any time, and may send bytes that aren't text.
            with client, client.makefile(encoding="ascii", errors="replace") as lines, contextlib.suppress(OSError):
                for line in lines:
                    client.sendall(f"{answer(card, line)}\n".encode())


def answer(card, line):
    """The card's reply to a command, both in hex, or an error message."""
    try:
        command = list(bytes.fromhex(line))
    except ValueError:
        return "error: not a command in hex"
    try:
        hresult, response = pcsc_safe.reconnecting(
            card, lambda card: scard.SCardTransmit(card, scard.SCARD_PCI_T1, command)
        )
    except pcsc_safe.ReconnectError as error:
        return f"error: {error}"
    if hresult != scard.SCARD_S_SUCCESS:
        return f"error: {scard.SCardGetErrorMessage(hresult)}"
    return bytes(response).hex()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: card_daemon.py SOCKET")
    main(sys.argv[1])
