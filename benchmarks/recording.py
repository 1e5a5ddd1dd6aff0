"""How much longer recorded calls take: ``PCSC_SAFE_REPORT=DIRECTORY python recording.py ROUNDS``.

Like calls.py, it calls the functions of pcsc_safe in one process on one session, in turns with and without a record.
It prints {name: [[without, with], ...]}, in microseconds a call.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from calls import Side, rounds_of

import pcsc_safe.scard as safe
from pcsc_safe._core import library, observer, router


class Recorded(Side):
    """What can be measured on either side."""

    def transaction(self) -> None:
        """An empty transaction."""
        self.scard.SCardBeginTransaction(self.card)
        self.scard.SCardEndTransaction(self.card, self.scard.SCARD_LEAVE_CARD)


CALLS = {  # what, and how many calls a sample
    "SCardTransmit, 8 bytes": ("transmit", 4),
    "SCardBeginTransaction + End": ("transaction", 4),
    "SCardConnect + Disconnect": ("connect_and_disconnect", 4),
    "SCardEstablishContext + Release": ("establish_and_release", 2),
}


def without_record() -> Any:
    """``pcsc_safe.scard`` as it is in a process without a record."""
    told = observer.wrap_call, observer.wrap_follow_up
    observer.wrap_call, observer.wrap_follow_up = as_it_is, as_it_is
    try:
        return SimpleNamespace(**{name: router._exported(name, value) for name, value in library.public.items()})
    finally:
        observer.wrap_call, observer.wrap_follow_up = told


def as_it_is(of: Any, function: Any) -> Any:
    """The function, without a record."""
    return function


def main() -> None:
    """Measure every call."""
    _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    _, readers = safe.SCardListReaders(context, [])
    recorded = Recorded(safe, context, readers[0])
    sides = Recorded(without_record(), context, readers[0], recorded.card), recorded
    found = {}
    for name, (method, times) in CALLS.items():
        found[name] = rounds_of(sides, method, times, int(sys.argv[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
