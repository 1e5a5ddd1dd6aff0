"""Hazard 9: a daemon closes every descriptor and opens a database connection; libpcsclite still uses the number.

The PIN belongs to the demo's virtual card; it is neither reported nor shown.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any

from .._judge import Finding, Run, death
from .._stage import Stage

NUMBER, NAME, SECONDS = "9", "the PIN goes to the database connection", 8.0
PIN = b"739184"
VERIFY, IS_VERIFIED = 0x20, 0x30


def program(stage: Stage) -> None:
    """Fork a daemon that verifies the PIN over the connection it inherited."""
    context, card, protocol = stage.connect()
    stage.report("parent", daemon_ended=stage.wait(stage.fork(lambda: _daemon(stage, context, card, protocol))))


def _daemon(stage: Stage, context: Any, card: Any, protocol: int) -> None:
    os.closerange(3, 256)
    client, server = socket.socketpair()
    inode = os.fstat(client.fileno()).st_ino
    received = bytearray()
    threading.Thread(target=_database, args=(stage, server, received), daemon=True).start()
    hresult, answer = stage.transmit(card, VERIFY, PIN)
    stage.report("daemon", code=stage.name(hresult), answer_length=len(answer))
    if hresult == stage.scard.SCARD_W_RESET_CARD:
        stage.scard.SCardReconnect(card, stage.scard.SCARD_SHARE_SHARED, protocol, stage.scard.SCARD_LEAVE_CARD)
        hresult, _ = stage.transmit(card, VERIFY, PIN)
    _, answer = stage.transmit(card, IS_VERIFIED)
    stage.report("daemon", code_at_last=stage.name(hresult), verified=answer == [1, 0x90, 0])
    stage.scard.SCardReleaseContext(context)
    stage.report("daemon", database_open=_inode(client.fileno()) == inode, database_received=len(received))


def _database(stage: Stage, server: socket.socket, received: bytearray) -> None:
    """A server of some binary protocol: it returns zeros, as many bytes as it got."""
    while True:
        data = server.recv(4096)
        if not data:
            return
        received += data
        stage.report("daemon", database_received=len(received), database_has_pin=PIN in received)
        with contextlib.suppress(OSError):
            server.sendall(bytes(len(data)))


def _inode(descriptor: int) -> int:
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return -1


def judge(run: Run) -> Finding:
    """Shown by bytes that reach the database, and by its connection being closed."""
    received, has_pin, still_open = run.of("daemon", "database_received", "database_has_pin", "database_open")
    code, length, at_last, verified = run.of("daemon", "code", "answer_length", "code_at_last", "verified")
    harm = []
    if has_pin:
        harm.append("the database connection received the PIN")
        if code is not None:
            harm.append(f"SCardTransmit took the database's reply for the card's: {code}, {length} bytes")
    elif received:
        harm.append(f"the database connection received {received} bytes that were meant for pcscd")
    if still_open is False:
        harm.append("SCardReleaseContext closed the database connection")
    harm += death("the daemon", run.of("parent", "daemon_ended")[0])
    if received != 0 or not still_open or not verified or at_last != "SCARD_S_SUCCESS":
        return Finding(harm, [])
    proof = ["the database connection received nothing and stayed open"]
    if code != at_last:
        proof.append(f"SCardTransmit returned {code}")
    return Finding(harm, [*proof, "after SCardReconnect the PIN reached the card"])
