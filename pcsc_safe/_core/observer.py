"""Functions that the core calls when something happens to PC/SC; they do nothing unless a recorder replaces them.

``run --report`` and ``run --timeline`` record; see :mod:`pcsc_safe._trace`.  A process without a record calls an empty
function at each event, and none at each PC/SC call.  Nothing here changes at a fork.
"""

from __future__ import annotations

import os
from typing import Any, Callable

__all__ = [
    "VARIABLE",
    "connected",
    "established",
    "is_wanted",
    "process_started",
    "record",
    "wrap_call",
    "wrap_follow_up",
]

VARIABLE = "PCSC_SAFE_REPORT"
"""The environment variable with the path of the directory where processes record."""


def is_wanted() -> bool:
    """Whether this process should record."""
    return bool(os.environ.get(VARIABLE))


def _nothing(*arguments: Any, **fields: Any) -> None:
    """Do nothing."""


def _unchanged(of: Any, function: Any) -> Any:
    return function


record: Callable[..., None] = _nothing
"""Takes an event: its kind, a word; and its fields by name."""

established: Callable[..., None] = _nothing
"""Takes the kind of the event, and the record of a context that this process now owns."""

connected: Callable[..., None] = _nothing
"""Takes the kind of the event, and the record of a card that this process now owns."""

process_started: Callable[[int, str, str], None] = _nothing
"""Takes the PID of a process that was started and records nothing itself, how it was started, and its name."""

wrap_call: Callable[[Any, Any], Any] = _unchanged
"""Takes a row of the table of calls and the function for the application; returns that function, or one that also
records."""

wrap_follow_up: Callable[[str, Any], Any] = _unchanged
"""Takes a PC/SC function's name and the function called after it; returns that function, or one that also records."""
