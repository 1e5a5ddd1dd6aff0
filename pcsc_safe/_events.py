"""What happens to PC/SC in a family of processes, told for ``python -m pcsc_safe run --report``.

Each event is a line, appended to a file when it happens, for a forked child often ends without any exit handler.  The
file is opened anew each time: a descriptor could be somebody else's by then.  Without a report this does nothing.  A
forked child goes on with its parent's file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = ["VARIABLE", "Event", "parse", "record"]

VARIABLE = "PCSC_SAFE_REPORT"
"""The environment variable that holds the file's path."""

_LONGEST = 512  # bytes; POSIX's PIPE_BUF, so no two lines mix
_path = os.environ.get(VARIABLE) or None


def record(kind: str, **fields: object) -> None:
    """Tell that something happened in this process.

    It never fails: who can't write to the file, in a chroot or as another user, tells nothing.

    :param kind: what; a word.
    :param fields: more of it; words and numbers.
    """
    if _path is None:
        return
    words = [str(os.getpid()), str(os.getppid()), kind, *(f"{name}={value}" for name, value in fields.items())]
    line = " ".join(words).encode(errors="replace")[: _LONGEST - 1] + b"\n"
    with contextlib.suppress(OSError):
        file = os.open(_path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_CLOEXEC", 0))
        try:
            os.write(file, line)
        finally:
            os.close(file)


class Event(NamedTuple):
    """What a process told."""

    pid: int
    parent: int
    kind: str
    fields: dict[str, str]


def parse(lines: Iterable[str]) -> Iterator[Event]:
    """The events that were told; a line that is none is passed over."""
    for line in lines:
        with contextlib.suppress(ValueError):
            pid, parent, kind, *fields = line.split()
            yield Event(int(pid), int(parent), kind, dict(field.split("=", 1) for field in fields))
