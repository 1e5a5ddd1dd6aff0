"""What SCardGetStatusChange returns: its codes, and the states of readers.

Nothing here changes at a fork.
"""

from __future__ import annotations

from .library import constant

__all__ = ["CANCELLED", "CHANGED", "INFINITE", "TIMED_OUT", "UNKNOWN", "is_for_new_readers"]

CANCELLED = constant("SCARD_E_CANCELLED")
TIMED_OUT = constant("SCARD_E_TIMEOUT")
INFINITE = constant("INFINITE")
CHANGED = constant("SCARD_STATE_CHANGED")
UNKNOWN = constant("SCARD_STATE_UNKNOWN")
_NEW_READERS = "\\\\?pnp?\\notification"  # pcsc-lite: a change in the list of readers


def is_for_new_readers(name: str) -> bool:
    """Whether this name stands for the list of readers, and not for a reader."""
    return name.lower() == _NEW_READERS
