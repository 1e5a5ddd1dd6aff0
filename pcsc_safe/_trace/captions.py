"""The texts in a drawing: sessions, processes and notes in words.

Every text from outside, such as the name of a reader or a program, goes through :func:`escaped`.  A fork changes
nothing here: this runs after the program has ended.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from .history import History, Lane, Session

__all__ = ["duration", "escaped", "life_in_words", "notes", "session_in_words", "shortened", "times"]

_BEGINNINGS = {
    "start": "was started",
    "fork": "was forked",
    "C fork": "was forked by C code, which runs no hooks; its record begins with its first PC/SC call",
    "exec": "was started by exec, and replaced the program that had this PID",
    "broker": "was started to make PC/SC calls for others",
}
_ENDS = {
    "seen": "its end was observed",
    "exec": "it became another program, by exec",
    "gone": "it ended at some point in the faded part",
    "unknown": "its end is not known",
}
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escaped(text: str) -> str:
    """The text, safe in XML and HTML as content and in an attribute; characters that XML can't have are replaced."""
    return html.escape(_ILLEGAL.sub("\ufffd", text))


def shortened(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"


def duration(ns: float) -> str:
    """A duration for people: 3 digits and a unit."""
    for unit, size in (("s", 1e9), ("ms", 1e6)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}" if ns < 999.5 * size else f"{ns / size:.0f} {unit}"
    return f"{ns / 1e3:.0f} µs"


def times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def session_in_words(session: Session) -> str:
    thread = f" by thread {session.thread}" if session.thread and session.owned else ""
    words = [f"context {session.how}{thread}"]
    if session.at:
        words.append(f"established at {session.at}")
    if session.through:
        words.append(f"through broker {session.through}")
    if session.end:
        words.append(f"until {session.end}")
    return ", ".join(words)


def life_in_words(lane: Lane) -> str:
    parent = f" by process {lane.parent.pid}" if lane.parent is not None else ""
    gap = "; its record ends earlier" if lane.is_incomplete else ""
    return f"{lane.title()}: {_BEGINNINGS[lane.how]}{parent}; {_ENDS[lane.end]}{gap}"


def notes(history: History, not_drawn: int) -> Iterator[str]:
    """Sentences about processes that aren't in the drawing, or whose record is incomplete."""
    if not_drawn:
        yield f"{not_drawn} more processes are not drawn."
    if history.left_out:
        yield f"{history.left_out} more did not use PC/SC, and are left out."
    incomplete = [str(lane.pid) for lane in history.lanes if lane.is_incomplete]
    if incomplete:
        pids = ", ".join(incomplete)
        yield f"The record of process {pids} is incomplete: it was full, or could no longer be written."
    yield (
        "Not drawn are processes that don't run Python, that ignore PYTHONPATH, or that could not write a record "
        "because they were started in another root directory or as another user."
    )
