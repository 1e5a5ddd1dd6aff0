"""What the programs of test_retrofit.py and test_framework.py share; each of their tests runs one of these programs.

Nothing here imports pyscard or pcsc_safe's core, because the tests vary when these are imported.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from forking import fork, in_program, wait_for
from forking import start as start_child

from pcsc_safe.testing import VirtualPcsc

VERIFY, IS_VERIFIED = [0x80, 0x20, 0, 0, 0], [0x80, 0x30, 0, 0, 0]
RESET_CARD, INVALID_HANDLE = 0x80100068, 0x80100003


def outcome(program: Callable[..., None], stack: VirtualPcsc, *arguments: str, **env: str) -> Any:
    """The result that a program prints (:func:`say`); it must succeed, and stderr has only warnings of pcsc_safe."""
    done = in_program(program, *arguments, env={**stack.env, **env})
    known = ("SCARD_W_RESET_CARD", "the application passes this disposition", "pcsc_safe doesn't protect")
    complaints = [line for line in done.stderr.splitlines() if not any(part in line for part in known)]
    assert (done.returncode, complaints) == (0, []), done.stderr
    return json.loads(done.stdout)


def say(value: Any) -> None:
    """Print a program's result."""
    print(json.dumps(value), flush=True)


def child(function: Callable[[], Any]) -> Any:
    """Call ``function()`` in a forked child."""
    return wait_for(start_child(function))


def code(hresult: int) -> int:
    """A return code as PC/SC writes it; in pyscard it is signed or unsigned, depending on the version."""
    return hresult & 0xFFFFFFFF


def refusal(call: Callable[[], Any]) -> str:
    """The kind of error that a call of the framework raises; 'no error' if it raises none."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "no error"


def eventually(condition: Callable[[], Any], seconds: float = 15.0) -> bool:
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def verified(connection: Any) -> bool:
    """Whether the PIN is verified in a connection of the framework."""
    return bool(connection.transmit(IS_VERIFIED) == ([1], 0x90, 0))


LEAVE_CARD, UNPOWER_CARD = 0, 2


def open_session(disposition: int = LEAVE_CARD) -> Any:
    """A connection of the framework, with the PIN verified.

    :param disposition: for the card in the end; pyscard's default powers it off, for every application.
    """
    from smartcard.System import readers

    connection = readers()[0].createConnection()
    connection.connect(disposition=disposition)
    connection.transmit(VERIFY)
    assert verified(connection)
    return connection


def orderly_child(function: Callable[[], Any]) -> int:
    """Call ``function()`` in a child that exits as programs do, with finalizers; return its exit status."""
    pid = fork()
    if pid == 0:
        import signal

        signal.alarm(30)
        function()
        gc.collect()
        sys.exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Recorder:
    """An observer of a monitor, of either kind; it counts what was added and removed, and calls in another process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.came = self.went = self.elsewhere = 0

    def update(self, observable: Any, handlers: Any) -> None:
        came, went = handlers
        self.came += len(came)
        self.went += len(went)
        self.elsewhere += os.getpid() != self.pid


def monitors(kind: str) -> Any:
    if kind == "cards":
        from smartcard.CardMonitoring import CardMonitor

        return CardMonitor
    from smartcard.ReaderMonitoring import ReaderMonitor

    return lambda: ReaderMonitor(startOnDemand=kind == "readers", period=0.05)
