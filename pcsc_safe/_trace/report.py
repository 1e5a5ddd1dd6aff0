"""What ``run --report`` and ``run --timeline`` print and draw when a program has ended.

The program, and every process that it starts, write records to a directory made for them; see :mod:`events`.  Nothing
here forks.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Optional, Union

from . import events, records, watch
from .records import Event, Span

__all__ = ["run", "summary"]


def run(command: Sequence[str], environment: Mapping[str, str], *, report: bool, picture: Optional[Path] = None) -> int:
    """Run a program, and report what happened when it has ended.

    :param report: whether to print a report on stderr.
    :param picture: the file for its timeline; .svg or .html.
    :return: its exit status, or the negative number of the signal that ended it.
    """
    if not report and picture is None:
        return watch.run(command, environment)
    directory = Path(tempfile.mkdtemp(prefix="pcsc_safe-"))
    try:
        ends = watch.Ends(directory) if picture is not None else None
        status = watch.run(command, {**environment, events.VARIABLE: str(directory)}, ends)
        with _messages("report"):
            recorded = records.read(directory)
            if picture is not None and ends is not None:
                with _messages("timeline"):
                    _draw(recorded, ends, picture)
            if report:
                print(summary(records.events(recorded)), end="", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # somebody may be writing still
    return status


@contextlib.contextmanager
def _messages(what: str) -> Iterator[None]:
    """Print a message instead of an exception: nothing may replace the program's exit status."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            print(f"pcsc_safe: no {what}: {error}", file=sys.stderr, flush=True)


def _draw(recorded: list[Union[Event, Span]], ends: watch.Ends, picture: Path) -> None:
    from . import history, timeline  # a report needs neither

    picture.write_text(timeline.draw(history.History(recorded, ends.at, ends.before), picture.suffix), "utf-8")


_SENTENCES = {
    "retrofit": "imported pyscard, and runs on pcsc_safe",
    "fork": "used PC/SC after its fork from process {parent}",
    "reestablished": "has a new context, which replaces process {owner}'s",
    "recovered": "established a new context after pcscd had ended",
    "broker": "started the broker {broker}",
    "handover": "handed {contexts} context(s) over to a forked child",
    "interferes": "reset or powered off a card that another process uses: its application called {function}",
    "share": "shared {contexts} context(s) with a forked child",
}
_COUNTED = {
    "fork": "forked processes that used PC/SC",
    "reestablished": "contexts re-established",
    "broker": "brokers started",
    "handover": "handovers",
}
_ONLY_DRAWN = frozenset(
    ("process", "incomplete", "established", "released", "connected", "reconnected", "disconnected", "got", "lost")
)


def summary(all_events: Iterable[Event]) -> str:
    """The report: a line of totals, and a line for each kind of event of each process."""
    all_events = list(all_events)
    parents = {event.process: event.fields["ppid"] for event in all_events if event.kind == "process"}
    recorded = [event for event in all_events if event.kind not in _ONLY_DRAWN]
    kinds = Counter(event.kind for event in recorded)
    lines = ["pcsc_safe: " + ", ".join(f"{what}: {kinds[kind]}" for kind, what in _COUNTED.items())]
    for process in dict.fromkeys(event.process for event in recorded):
        mine = [event for event in recorded if event.process == process]
        lines.append(f"  process {mine[0].pid}, parent {parents.get(process, 'unknown')}")
        sentences = Counter(map(_sentence, mine))
        lines += [
            f"    {sentence}" + (f" ({times} times)" if times > 1 else "") for sentence, times in sentences.items()
        ]
    return "\n".join(lines) + "\n"


def _sentence(event: Event) -> str:
    try:
        return _SENTENCES[event.kind].format_map(event.fields)
    except KeyError:
        return " ".join([event.kind, *(f"{name}={value}" for name, value in event.fields.items())])
