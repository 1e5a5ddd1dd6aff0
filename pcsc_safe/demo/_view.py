"""What the demo shows: a line for each hazard while it runs, and a table of sentences at the end.

Colours are used and lines are rewritten only on a terminal; NO_COLOR switches colours off (https://no-color.org).
There is no shared state, and nothing here is used in a forked process.
"""

from __future__ import annotations

import os
import shutil
import textwrap
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional, TextIO

from ._judge import Outcome, Verdict
from .hazards import Hazard

__all__ = ["Live", "Row", "table", "wants_colour"]

_COLOURS = {Outcome.HAZARD: "31", Outcome.SAFE: "32", Outcome.UNKNOWN: "33"}
_NAME, _WORD = 51, 11


class Row(NamedTuple):
    """One hazard's two verdicts."""

    hazard: Hazard
    raw: Verdict
    safe: Verdict


def wants_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether to colour what is written to ``stream``."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def _word(outcome: Outcome, raw: bool) -> str:
    if outcome is Outcome.SAFE:
        return "not seen" if raw else "SAFE"
    return str(outcome.value).upper()


def _coloured(text: str, outcome: Outcome, colour: bool) -> str:
    return f"\033[{_COLOURS[outcome]}m{text}\033[0m" if colour else text


class Live:
    """A line for each hazard, completed as its two runs end; used by the threads of both runs.

    :param stream: where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colour = wants_colour(stream)
        self._rewrites = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.Lock()
        self._title = ""
        self._verdicts: dict[bool, Verdict] = {}

    def begin(self, hazard: Hazard) -> None:
        """Start the line of a hazard."""
        self._title = f"{hazard.NUMBER:>2}  {hazard.NAME:<{_NAME}.{_NAME}}"
        self._verdicts = {}
        self._show()

    def result(self, raw: bool, verdict: Verdict) -> None:
        """Show the verdict of one run."""
        with self._lock:
            self._verdicts[raw] = verdict
            self._show()

    def heading(self, raw: str, safe: str) -> None:
        """Print the modules' names over the columns, without what they have in common."""
        print(
            f"{'':{_NAME + 4}}  {raw.partition('.')[0]:<{_WORD}}{safe.partition('.')[0]}", file=self._stream, flush=True
        )

    def _cell(self, raw: bool) -> str:
        verdict = self._verdicts.get(raw)
        if verdict is None:
            return f"{'...':<{_WORD}}"
        return _coloured(f"{_word(verdict.outcome, raw):<{_WORD}}", verdict.outcome, self._colour)

    def _show(self) -> None:
        line, done = f"{self._title}  {self._cell(True)}{self._cell(False)}".rstrip(), len(self._verdicts) == 2
        if self._rewrites:
            print(f"\r\033[K{line}", end="\n" if done else "", file=self._stream, flush=True)
        elif done:
            print(line, file=self._stream, flush=True)


def table(rows: Sequence[Row], raw: str, safe: str, colour: bool, width: Optional[int] = None) -> str:
    """A table: the hazard, what happened on raw pyscard, what happened on pcsc_safe.

    :param raw: the heading of the second column.
    :param safe: the heading of the third.
    :param width: in characters; if None, the terminal's width.
    """
    width = min(width or shutil.get_terminal_size((100, 25)).columns, 140)
    first = max(width // 5, 14)
    rest = max((width - first - 4) // 2, 20)
    widths = (first, rest, rest)
    lines = [_line(("hazard", raw, safe), widths), _line(tuple("-" * each for each in widths), widths)]
    for row in rows:
        cells = [textwrap.wrap(f"{row.hazard.NUMBER} {row.hazard.NAME}", first)]
        for verdict, is_raw in ((row.raw, True), (row.safe, False)):
            says = textwrap.wrap(f"{_word(verdict.outcome, is_raw)}: {verdict.says}", rest)
            cells.append([_coloured(f"{line:<{rest}}", verdict.outcome, colour) for line in says])
        height = max(map(len, cells))
        padded = [cell + [""] * (height - len(cell)) for cell in cells]
        lines += [_line(parts, widths) for parts in zip(*padded)] + [""]
    return "\n".join(lines)


def _line(parts: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{part:<{width}}" for part, width in zip(parts, widths)).rstrip()
