"""A program that uses one context and one card step by step, while the test changes the stack."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from typing import Any

import forking
from conftest import ECHO

from pcsc_safe import scard as safe
from pcsc_safe.testing import VirtualPcsc

OK = safe.SCARD_S_SUCCESS
READER = "Virtual PCD 0 00 00"


class Life:
    """A program that uses one context and one card of a module, step by step, and records the results."""

    def __init__(self, module: str) -> None:
        self.scard = importlib.import_module(module)
        self.context: Any = 54321
        self.card: Any = 54321

    def step(self, name: str) -> Any:
        """Make one call; return its result without handles, states and memory."""
        return getattr(self, name)()

    def establish(self) -> Any:
        hresult, context = self.scard.SCardEstablishContext(self.scard.SCARD_SCOPE_SYSTEM)
        self.context = context if hresult == OK else self.context
        return hresult

    def connect(self) -> Any:
        hresult, card, _ = self.scard.SCardConnect(self.context, READER, self.scard.SCARD_SHARE_SHARED, 3)
        self.card = card if hresult == OK else self.card
        return hresult

    def change(self) -> Any:
        hresult, states = self.scard.SCardGetStatusChange(self.context, 2000, [(READER, 0x20)])
        return hresult, [(name, atr) for name, _, atr in states]

    def transmit(self) -> Any:
        hresult, answer = self.scard.SCardTransmit(self.card, 2, ECHO)
        return hresult, answer if hresult == OK else []

    def reconnect(self) -> Any:
        return self.scard.SCardReconnect(self.card, self.scard.SCARD_SHARE_SHARED, 3, 0)[0]

    def status(self) -> Any:
        return self.scard.SCardStatus(self.card)[0]

    def list(self) -> Any:
        return self.scard.SCardListReaders(self.context, [])

    def valid(self) -> Any:
        return self.scard.SCardIsValidContext(self.context)

    def begin(self) -> Any:
        return self.scard.SCardBeginTransaction(self.card)

    def end(self) -> Any:
        return self.scard.SCardEndTransaction(self.card, 0)

    def disconnect(self) -> Any:
        return self.scard.SCardDisconnect(self.card, 0)

    def release(self) -> Any:
        return self.scard.SCardReleaseContext(self.context)

    def wait(self) -> None:
        """Let the test change the stack now."""
        os.write(1, b"\n")
        sys.stdin.readline()


def live(module: str, *steps: str) -> None:
    """The program itself."""
    life = Life(module)
    os.write(1, json.dumps([(step, life.step(step)) for step in steps]).encode())


def outcome(stack: VirtualPcsc, module: str, changes: list[Any], steps: list[str]) -> Any:
    """Run :func:`live` and make one change to the stack at each ``wait``; return the results."""
    command = [sys.executable, forking.__file__, __file__, "live", module, *steps]
    process = subprocess.Popen(command, env=stack.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    watchdog = threading.Timer(20, process.kill)
    watchdog.start()
    try:
        for change in changes:
            assert process.stdout.readline() == "\n"
            change()
            process.stdin.write("\n")
            process.stdin.flush()
        answers = process.stdout.read()
    finally:
        watchdog.cancel()
        process.stdin.close()
        process.stdout.close()
        status = process.wait()
    assert status == 0
    return json.loads(answers)


USES = ["list", "valid", "transmit", "status", "begin", "end", "disconnect", "release"]
AGAIN = ["establish", "list", "connect", "transmit", "disconnect", "release"]
