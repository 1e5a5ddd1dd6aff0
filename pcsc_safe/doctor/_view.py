"""The printed page: findings in columns, a remedy under each problem, and a line of totals.

Colours are used only on a terminal; NO_COLOR switches them off.  There is no shared state, and nothing here is used in
a forked process.
"""

from __future__ import annotations

import itertools
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Optional, TextIO

from ..demo._view import wants_colour
from ._findings import Finding, Ledger, Status

__all__ = ["Page", "left_out", "summary"]

_COLOURS = {
    Status.OK: "32",
    Status.WARNING: "33",
    Status.PROBLEM: "31",
    Status.UNKNOWN: "33",
    Status.SKIPPED: "2",
}
_STATUS = max(len(status.value) for status in Status)
_WHAT = 26
_WIDEST, _FOR_COLUMNS, _NARROWEST = 120, 60, 15  # characters: a page at most, one with columns, a line at least


class Page:
    """Prints findings as they are made.

    :param stream: where to write.
    :param width: in characters; if None, the terminal's width.
    """

    def __init__(self, stream: TextIO, width: Optional[int] = None) -> None:
        self._stream = stream
        self._colour = wants_colour(stream)
        self._width = min(width or shutil.get_terminal_size((100, 25)).columns, _WIDEST)

    def section(self, title: str) -> None:
        """Begin a section of the page."""
        self._print(f"\n{title}")

    def show(self, finding: Finding) -> None:
        """Print one finding."""
        status = f"{finding.status.value:<{_STATUS}}"
        if self._colour:
            status = f"\033[{_COLOURS[finding.status]}m{status}\033[0m"
        texts = [finding.detail, *([f"-> {finding.remedy}"] if finding.remedy else [])]
        lines = self._in_columns if self._width >= _FOR_COLUMNS else self._beneath
        self._print("\n".join(lines(status, finding.what, texts)))

    def end(self, sentences: Iterable[str]) -> None:
        """Print the last lines of the page."""
        self._print("")
        for sentence in sentences:
            self._print("\n".join(self._wrapped(sentence, 0)))

    def _in_columns(self, status: str, what: str, texts: list[str]) -> list[str]:
        width = min(_WHAT, self._width // 4)
        names = textwrap.wrap(what, width)
        lines = [line for text in texts for line in self._wrapped(text, _STATUS + width + 6)]
        rows = itertools.zip_longest(names, lines, fillvalue="")
        statuses = itertools.chain([status], itertools.repeat(" " * _STATUS))
        return [f"  {first}  {name:<{width}}  {line}".rstrip() for first, (name, line) in zip(statuses, rows)]

    def _beneath(self, status: str, what: str, texts: list[str]) -> list[str]:
        name, *more = self._wrapped(what, _STATUS + 2)
        lines = [line for text in texts for line in self._wrapped(text, 2)]
        return [f"{status}  {name}", *(f"  {line}" for line in [*more, *lines])]

    def _wrapped(self, text: str, indent: int) -> list[str]:
        """Wrap text into lines that begin after so many printed characters."""
        width = max(self._width - indent, _NARROWEST)
        follow = "   " if text.startswith("-> ") else ""
        return textwrap.wrap(text, width, subsequent_indent=follow, break_long_words=False, break_on_hyphens=False)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def left_out(ledger: Ledger) -> Iterable[str]:
    """The checks that were left out, and the problem that is the reason."""
    for cause, keys in ledger.left_out.items():
        yield f"Left out because of the problem with {cause}: {', '.join(keys)}."


def summary(findings: Iterable[Finding]) -> str:
    """The number of findings of each status."""
    counts = Counter(finding.status for finding in findings)
    names = {
        Status.PROBLEM: ("problem", "problems"),
        Status.WARNING: ("warning", "warnings"),
        Status.UNKNOWN: ("unknown", "unknown"),
        Status.SKIPPED: ("skipped", "skipped"),
    }
    said = [f"{counts[each]} {words[counts[each] != 1]}" for each, words in names.items() if counts[each]]
    return f"{', '.join(said)}." if said else "All is well."
