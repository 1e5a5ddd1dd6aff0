"""Reads what processes have recorded; see :mod:`events`, which writes this format.

A process may have been killed in the middle of a slot; such a slot is ignored.  Nothing here forks.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

from .events import SLOT, SPAN, SPAN_TAG

__all__ = ["Event", "Span", "events", "names", "read", "read_one"]


class Event(NamedTuple):
    """An event that a process recorded.

    :ivar time: CLOCK_MONOTONIC, ns; the same clock in all processes.
    :ivar process: the name of its record.
    :ivar thread: the native ID of the thread.
    """

    time: int
    process: str
    kind: str
    thread: int
    fields: dict[str, Any]

    @property
    def pid(self) -> int:
        """The PID of the process."""
        return int(self.process.partition("-")[0])


class Span(NamedTuple):
    """What a process did many times.

    :ivar activity: ``apdu``, ``begun`` or ``wait``.
    :ivar key: of the card or context.
    :ivar end: 0 if it had not ended.
    :ivar times: how often.
    """

    process: str
    activity: str
    key: str
    start: int
    end: int
    times: int


def names(directory: Path) -> set[str]:
    """The names of all records."""
    return {file.name.partition(".")[0] for file in directory.iterdir()}


def read(directory: Path) -> list[Union[Event, Span]]:
    """All that was recorded, in the order of time."""
    recorded: list[Union[Event, Span]] = []
    for name in names(directory):
        recorded += read_one(directory, name)
    return sorted(recorded, key=lambda each: each.start if isinstance(each, Span) else each.time)


def read_one(directory: Path, name: str) -> list[Union[Event, Span]]:
    """What one process recorded, in the order of its record."""
    files = sorted(directory.glob(f"{name}.*"), key=lambda file: int(file.suffix[1:]))
    return [slot for file in files for slot in _slots(name, file.read_bytes())]


def events(recorded: Iterable[Union[Event, Span]]) -> list[Event]:
    """The events in it."""
    return [each for each in recorded if isinstance(each, Event)]


def _slots(name: str, data: bytes) -> Iterator[Union[Event, Span]]:
    for start in range(0, len(data), SLOT):
        slot = data[start : start + SLOT]
        if slot[:1] == SPAN_TAG:
            _, activity, key, began, ended, count = SPAN.unpack_from(slot)
            yield Span(
                name, activity.rstrip(b"\0").decode(), key.hex(), round(began * 1e9), round(ended * 1e9), int(count)
            )
        elif slot[:1] == b"(":
            with contextlib.suppress(ValueError, SyntaxError, TypeError):
                time, kind, thread, fields = ast.literal_eval(slot.rstrip(b"\0").decode())
                words = {word: value.hex() if isinstance(value, bytes) else value for word, value in fields.items()}
                yield Event(int(time), name, str(kind), int(thread), words)
