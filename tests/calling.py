"""Threads that call and wait, a card that can be held, and the calls that nearly every test makes.

A thread "waits" if the kernel shows it in poll(2) or recvfrom(2).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe.policy import Broker
from pcsc_safe.testing import EchoCard

OK = safe.SCARD_S_SUCCESS
CANCELLED = safe.SCARD_E_CANCELLED
TIMED_OUT = safe.SCARD_E_TIMEOUT
SHARED = safe.SCARD_SHARE_SHARED
CHANGED, EMPTY, PRESENT = safe.SCARD_STATE_CHANGED, safe.SCARD_STATE_EMPTY, safe.SCARD_STATE_PRESENT
ATR = [0x3B, 0x80, 0x80, 0x01, 0x01]
HELD = [0x80, 0x02, 0x00, 0x00, 0x03, 7, 8, 9]
ENOUGH = 20  # s; nothing takes that long
_IN_A_SYSTEM_CALL_ON_A_SOCKET = {"7", "45", "73", "207", "271"}  # poll, recvfrom, ppoll on x86-64 and aarch64


def until(condition: Callable[[], Any], what: str) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < deadline, f"waited {ENOUGH} s until {what}"
        time.sleep(0.001)


def stays(condition: Callable[[], Any]) -> bool:
    """Whether the condition holds, also for a short time afterwards."""
    # If a broker makes the wait, this process can't see when the wait has begun.
    until = time.monotonic() + (0.2 if pcsc_safe.settings().broker is Broker.ALWAYS else 0.01)
    while time.monotonic() < until:
        if not condition():
            return False
    return True


class Calling(threading.Thread):
    """A thread that calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, name: str = "calling") -> None:
        super().__init__(name=name, daemon=True)
        self._function, self._arguments = function, arguments
        self._outcome: Any = None
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        try:
            self._outcome = True, self._function(*self._arguments)
        except BaseException as error:
            self._outcome = False, error
        self.seconds = time.monotonic() - began

    def answer(self) -> Any:
        """Return what the function returned, or raise what it raised."""
        self.join(ENOUGH)
        assert not self.is_alive(), f"thread {self.name} is still busy after {ENOUGH} s"
        returned, value = self._outcome
        if not returned:
            raise value
        return value

    @property
    def waits(self) -> bool:
        """Whether the thread is blocked in libpcsclite, waiting for data from pcscd."""
        try:
            with open(f"/proc/self/task/{self.native_id}/syscall") as call:
                return call.read().split()[0] in _IN_A_SYSTEM_CALL_ON_A_SOCKET
        except OSError:
            return False


class HeldCard(EchoCard):
    """An EchoCard that responds to INS 02 when the test permits it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def apdu(self, command: bytes) -> bytes:
        if command[1] != 0x02:
            return super().apdu(command)
        self.reached.set()
        assert self.go.wait(ENOUGH)
        self.go.clear()
        self.reached.clear()
        return command[5:] + b"\x90\x00"


def establish() -> Any:
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    assert hresult == OK
    return context


def connect(context: Any, reader: str) -> Any:
    hresult, card, _ = safe.SCardConnect(context, reader, SHARED, safe.SCARD_PROTOCOL_T1)
    assert hresult == OK
    return card


def transmit(card: Any, command: list[int]) -> Any:
    return safe.SCardTransmit(card, safe.SCARD_PCI_T1, command)


def state_of(context: Any, reader: str) -> int:
    """A reader's state, with its event counter, as an application stores it for its next wait."""
    hresult, states = safe.SCardGetStatusChange(context, 0, [(reader, safe.SCARD_STATE_UNAWARE)])
    assert hresult == OK
    return int(states[0][1]) & ~CHANGED


def wait(context: Any, reader: str, timeout: int = safe.INFINITE, state: Any = None) -> Calling:
    """Start a thread that waits for a reader's next event; return when it waits."""
    known = [(reader, state_of(context, reader) if state is None else state)]
    waiter = Calling(safe.SCardGetStatusChange, context, timeout, known, name="waiter")
    until(lambda: waits_on(waiter) or not waiter.is_alive(), "it waits")
    return waiter


def waits_on(waiter: Calling) -> bool:
    """Whether the thread waits for events, and is not in a call of SCardCancel before the wait, which takes no time."""
    return stays(lambda: waiter.waits)


def flags(answer: Any) -> Any:
    """The result of SCardGetStatusChange without the event counters."""
    hresult, states = answer
    return hresult, [(name, state & 0xFFFF & ~safe.SCARD_STATE_INUSE, atr) for name, state, atr in states]
