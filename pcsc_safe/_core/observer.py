"""The functions that are told what happens to PC/SC in this process: empty ones, unless a recorder has replaced them.

``run --report`` and ``run --timeline`` record; see :mod:`pcsc_safe._trace`.  A process without a record pays for a call
of an empty function at each event, and nothing at each PC/SC call.  Nothing here changes at a fork.
"""

from __future__ import annotations

import os
from typing import Any, Callable

__all__ = ["VARIABLE", "born_elsewhere", "connected", "established", "followed", "is_wanted", "record", "recorded"]

VARIABLE = "PCSC_SAFE_REPORT"
"""The environment variable that holds the path of the directory where processes are to record."""


def is_wanted() -> bool:
    """Whether this process is to record."""
    return bool(os.environ.get(VARIABLE))


def _nothing(*arguments: Any, **fields: Any) -> None:
    """Tell nobody."""


def _as_it_is(of: Any, function: Any) -> Any:
    return function


record: Callable[..., None] = _nothing
"""Takes an event: its kind, a word; and its fields by name."""

established: Callable[..., None] = _nothing
"""Takes the kind of the event, and the record of a context that this process has now."""

connected: Callable[..., None] = _nothing
"""Takes the kind of the event, and the record of a card that this process has now."""

born_elsewhere: Callable[[int, str, str], None] = _nothing
"""Takes the PID of a process that was started and records nothing itself, how it was started, and its name."""

recorded: Callable[[Any, Any], Any] = _as_it_is
"""Takes a row of the table of calls and the function that an application is to call; returns that function, or one
that also records what it does."""

followed: Callable[[str, Any], Any] = _as_it_is
"""Takes a PC/SC function's name and what is to follow each call of it; returns that, or what also records the call."""
