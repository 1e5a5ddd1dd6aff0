"""What a call costs in a process that never forks: ``python calls.py ROUNDS [OPEN-FILES]``.

Both modules are loaded in this one process and called by turns, a few calls each, so that a pair of samples is a
fraction of a millisecond apart; who goes first alternates.  Prints {name: [[raw, safe], ...]}, in microseconds a call.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Callable

import smartcard.scard as raw

import pcsc_safe.scard as safe

APDU = [0x00, 0x01, 0x00, 0x00, 0x03, 1, 2, 3]
clock = time.perf_counter_ns


class Side:
    """One of the two modules, and the handles as it takes them."""

    def __init__(self, scard: Any, context: Any, reader: str, card: Any = None) -> None:
        self.scard, self.context, self.reader = scard, context, reader
        self.card = self.connect() if card is None else card

    @classmethod
    def both(cls) -> tuple[Side, Side]:
        """Raw and safe, with one session between them.

        pcscd has a thread for each session, and on which processor it happens to sit makes more of a difference than
        anything that we want to measure.
        """
        _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
        _, readers = safe.SCardListReaders(context, [])
        ours = cls(safe, context, readers[0])
        return cls(raw, int(context), ours.reader, int(ours.card)), ours

    def connect(self) -> Any:
        """A new connection to the card."""
        scard = self.scard
        hresult, card, _ = scard.SCardConnect(
            self.context, self.reader, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1
        )
        assert hresult == scard.SCARD_S_SUCCESS, scard.SCardGetErrorMessage(hresult)
        return card

    def is_valid(self) -> None:
        """The cheapest call there is: it asks nobody."""
        self.scard.SCardIsValidContext(self.context)

    def status(self) -> None:
        """A question to pcscd."""
        self.scard.SCardStatus(self.card)

    def transmit(self) -> None:
        """An exchange with the card."""
        self.scard.SCardTransmit(self.card, self.scard.SCARD_PCI_T1, APDU)

    def connect_and_disconnect(self) -> None:
        """A connection, and its end."""
        self.scard.SCardDisconnect(self.connect(), self.scard.SCARD_LEAVE_CARD)

    def establish_and_release(self) -> None:
        """A context, and its end."""
        _, context = self.scard.SCardEstablishContext(self.scard.SCARD_SCOPE_SYSTEM)
        self.scard.SCardReleaseContext(context)


CALLS = {  # what, and how many calls a sample
    "SCardIsValidContext": ("is_valid", 500),
    "SCardTransmit, 8 bytes": ("transmit", 4),
    "SCardStatus": ("status", 4),
    "SCardConnect + Disconnect": ("connect_and_disconnect", 4),
    "SCardEstablishContext + Release": ("establish_and_release", 2),
}


def sample(call: Callable[[], None], times: int) -> float:
    """Microseconds a call."""
    repeat = range(times)
    start = clock()
    for _ in repeat:
        call()
    return (clock() - start) / times / 1000


def pairs(calls: tuple[Callable[[], None], Callable[[], None]], times: int, rounds: int) -> list[list[float]]:
    """So many times (raw, safe)."""
    found = []
    for call in calls:
        call()
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        pair = [0.0, 0.0]
        for side in order:
            pair[side] = sample(calls[side], times)
        found.append(pair)
    return found


def main() -> None:
    """Measure every call."""
    rounds = int(sys.argv[1])
    sides = Side.both()
    found = {}
    for name, (method, times) in CALLS.items():
        calls = getattr(sides[0], method), getattr(sides[1], method)
        found[name] = pairs(calls, times, rounds)
    more = [os.open(os.devnull, os.O_RDONLY) for _ in range(int(sys.argv[2]))]
    name = "SCardEstablishContext + Release"
    calls = sides[0].establish_and_release, sides[1].establish_and_release
    found[f"{name}, {len(more)} more open files"] = pairs(calls, CALLS[name][1], rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
