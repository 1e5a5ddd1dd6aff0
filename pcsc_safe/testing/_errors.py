"""The one error of the virtual stack.

Invariant: its text says what is wrong and what to do about it, and never contains a byte of an APDU.

At a fork: nothing.
"""

from __future__ import annotations

from ..errors import PcscSafeError


class PcscStackError(PcscSafeError):
    """The virtual PC/SC stack can't do what you asked it to do; the text says how to solve that."""
