"""The part of pcscd's client protocol that the stack needs: what is in the readers, and a card reset.

The stack talks to pcscd without loading libpcsclite, because a context in the test process could affect the code under
test.

Invariant: when `Probe.close` returns, pcscd has forgotten the connection, and doesn't count it as a client.

At a fork: a probe exists only during one call, under the stack's lock; a child inherits no probe that it could use.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from ._errors import PcscStackError

PRESENT = 0x0004
MAX_READERS = 16

# seconds; a fraction of the 400 ms that pcscd takes without a nudge
_HURRY_INTERVAL = 0.01
_NAME_LENGTH = 128
_STATE = struct.Struct(f"={_NAME_LENGTH}sIIi33s3xII")
_HEADER = struct.Struct("=II")
_ESTABLISH, _CONNECT, _DISCONNECT = 0x01, 0x04, 0x06
_VERSION, _GET_STATES, _WAIT_CHANGE = 0x11, 0x12, 0x13
_GET_SLOTS, _SLOTS = 0x16, struct.Struct("=i")
_SHARED, _ANY_PROTOCOL, _RESET_CARD = 2, 3, 1
_SHARING_VIOLATION, _NO_CARD, _REMOVED = 0x8010000B, 0x8010000C, 0x80100069


@dataclass(frozen=True)
class ReaderState:
    """What pcscd says about one reader.

    :ivar name: its name.
    :ivar present: whether a card is in it.
    :ivar powered: whether that has an ATR, so it was powered up.
    :ivar events: how often pcscd has detected that a card was inserted or removed.
    """

    name: str
    present: bool
    powered: bool
    events: int


class Probe:
    """One short-lived connection to pcscd.

    :param path: pcscd's socket.
    :param timeout: seconds for everything together that is done with this probe.
    :raises ConnectionError: no process serves that socket.
    :raises TimeoutError: the time is up.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self._deadline = time.monotonic() + timeout
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(path)
            # The answer has pcscd's version of the protocol; ours has not changed since pcsc-lite 1.8.24.  A newer
            # pcscd logs a mismatch and uses our version.  Its own version waits for changes differently (2.5.3).
            self._request(_VERSION, struct.pack("=iiI", 4, 4, 0), 12)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, and wait until pcscd has closed it, too."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
            while self._receive_some(4096):
                pass
        except OSError:
            pass
        finally:
            self._socket.close()

    def states(self) -> list[ReaderState]:
        """The states of the readers now."""
        return _parse(self._request(_GET_STATES, b"", _STATE.size * MAX_READERS))

    def slots(self) -> int:
        """How many slots for readers pcscd has; only pcsc-lite 2.5 and later report it."""
        return int(_SLOTS.unpack(self._request(_GET_SLOTS, b"", _SLOTS.size))[0])

    def wait(self, satisfied: Callable[[list[ReaderState]], bool], hurry: Callable[[], None]) -> None:
        """Wait until the readers are in the desired state, by pcscd's own events.

        :param satisfied: whether they are in that state.
        :param hurry: makes pcscd look at its readers; called repeatedly until they are in that state.
        :raises TimeoutError: the time is up, and they are not in that state.
        """
        poller = select.poll()  # select() can't watch a descriptor above 1023
        poller.register(self._socket, select.POLLIN)
        while not satisfied(_parse(self._request(_WAIT_CHANGE, b"", _STATE.size * MAX_READERS))):
            hurry()
            while not poller.poll(min(_HURRY_INTERVAL, self._remaining()) * 1000):
                hurry()
            self._receive(8)

    def reset(self, reader: str) -> None:
        """Reset the card as another application would: connect shared, disconnect with SCARD_RESET_CARD.

        :raises PcscStackError: there is no card, or an application holds it exclusively or in a transaction.
        """
        context = struct.unpack("=III", self._request(_ESTABLISH, struct.pack("=III", 2, 0, 0), 12))[1]
        request = struct.pack("=I128sIIiII", context, reader.encode(), _SHARED, _ANY_PROTOCOL, 0, 0, 0)
        *_, card, _, result = struct.unpack("=I128sIIiII", self._request(_CONNECT, request, len(request)))
        if not result:
            request = struct.pack("=iII", card, _RESET_CARD, 0)
            result = struct.unpack("=iII", self._request(_DISCONNECT, request, 12))[2]
        if result:
            raise PcscStackError(f"the card in {reader!r} can't be reset (0x{result:08X})", remedy=_reason(result))

    def _request(self, command: int, body: bytes, response_size: int) -> bytes:
        self._socket.settimeout(self._remaining())
        self._socket.sendall(_HEADER.pack(len(body), command) + body)
        return self._receive(response_size)

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._receive_some(count - len(data))
            if not more:
                raise ConnectionResetError("pcscd closed the connection")
            data += more
        return data

    def _receive_some(self, count: int) -> bytes:
        self._socket.settimeout(self._remaining())
        return self._socket.recv(count)

    def _remaining(self) -> float:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("pcscd did not reply in time")
        return remaining


def _parse(data: bytes) -> list[ReaderState]:
    states = []
    for name, events, state, _, _, atr_length, _ in _STATE.iter_unpack(data):
        if name[0]:
            states.append(ReaderState(name.split(b"\0")[0].decode(), bool(state & PRESENT), bool(atr_length), events))
    return states


def _reason(result: int) -> str:
    if result == _SHARING_VIOLATION:
        return "an application holds it exclusively or in a transaction: let it disconnect first"
    if result in (_NO_CARD, _REMOVED):
        return "there is no card in the reader: insert one"
    return "see VirtualPcsc.log"
