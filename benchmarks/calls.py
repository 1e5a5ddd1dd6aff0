"""How long a call takes in a process that never forks: ``python calls.py ROUNDS [OPEN-FILES]``.

This one process loads both modules.  It makes a few calls with each in turns, so that the samples of a round are a
fraction of a millisecond apart.  The order changes.  It prints {name: [[raw, check by hand, safe], ...]}, in
microseconds a call.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Callable

import smartcard.scard as raw

import pcsc_safe.scard as safe

APDU = [0x00, 0x01, 0x00, 0x00, 0x03, 1, 2, 3]
clock = time.perf_counter_ns


class Side:
    """One way to call PC/SC, with the handles that it takes."""

    def __init__(self, scard: Any, context: Any, reader: str, card: Any = None) -> None:
        self.scard, self.context, self.reader = scard, context, reader
        self.card = self.connect() if card is None else card

    @staticmethod
    def all() -> tuple[Side, ...]:
        """Raw, with a check by hand, and safe; all three use one session.

        pcscd has a thread for each session.  The processor on which this thread runs makes more of a difference than
        anything that we want to measure.
        """
        _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
        _, readers = safe.SCardListReaders(context, [])
        ours = Side(safe, context, readers[0])
        theirs = (raw, int(context), ours.reader, int(ours.card))
        return Side(*theirs), ByHand(*theirs), ours

    def connect(self) -> Any:
        """A new connection to the card."""
        scard = self.scard
        hresult, card, _ = scard.SCardConnect(
            self.context, self.reader, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1
        )
        assert hresult == scard.SCARD_S_SUCCESS, scard.SCardGetErrorMessage(hresult)
        return card

    def is_valid(self) -> None:
        """The cheapest call: libpcsclite only looks into its own table."""
        self.scard.SCardIsValidContext(self.context)

    def status(self) -> None:
        """A question to pcscd."""
        self.scard.SCardStatus(self.card)

    def transmit(self) -> None:
        """An exchange with the card."""
        self.scard.SCardTransmit(self.card, self.scard.SCARD_PCI_T1, APDU)

    def connect_and_disconnect(self) -> None:
        """Connect to the card and disconnect."""
        self.scard.SCardDisconnect(self.connect(), self.scard.SCARD_LEAVE_CARD)

    def establish_and_release(self) -> None:
        """Establish a context and release it."""
        _, context = self.scard.SCardEstablishContext(self.scard.SCARD_SCOPE_SYSTEM)
        self.scard.SCardReleaseContext(context)


class ByHand(Side):
    """Raw pyscard in an application that compares the PID before each call."""

    def __init__(self, *arguments: Any) -> None:
        self._pid = os.getpid()
        super().__init__(*arguments)

    @property
    def context(self) -> Any:
        """The context of this process."""
        if os.getpid() != self._pid:
            self._begin_anew()
        return self._context

    @context.setter
    def context(self, value: Any) -> None:
        self._context = value

    @property
    def card(self) -> Any:
        """The card of this process."""
        if os.getpid() != self._pid:
            self._begin_anew()
        return self._card

    @card.setter
    def card(self, value: Any) -> None:
        self._card = value

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        _, self._context = self.scard.SCardEstablishContext(self.scard.SCARD_SCOPE_SYSTEM)
        self._card = self.connect()


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


def rounds_of(sides: Sequence[Side], method: str, times: int, rounds: int) -> list[list[float]]:
    """``rounds`` samples of (raw, by hand, safe), each of ``times`` calls."""
    calls = [getattr(side, method) for side in sides]
    for call in calls:
        call()
    found = []
    for number in range(rounds):
        taken = [0.0] * len(calls)
        for turn in range(len(calls)):
            side = (number + turn) % len(calls)
            taken[side] = sample(calls[side], times)
        found.append(taken)
    return found


def main() -> None:
    """Measure every call."""
    rounds = int(sys.argv[1])
    sides = Side.all()
    found = {name: rounds_of(sides, method, times, rounds) for name, (method, times) in CALLS.items()}
    more = [os.open(os.devnull, os.O_RDONLY) for _ in range(int(sys.argv[2]))]
    name = "SCardEstablishContext + Release"
    found[f"{name}, {len(more)} more open files"] = rounds_of(sides, *CALLS[name], rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
