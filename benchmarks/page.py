"""Writes the figures of a run to the documentation: ``python benchmarks/page.py DIRECTORY``.

The directory is the one to which ``run.py --output`` has written.  docs/speed.json keeps the figures of that run, and
the tables on docs/speed.md and other pages are made from them.  So nobody types a figure, and tests/house/test_docs.py
notices a page that has other figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

__all__ = ["RECORD", "in_page", "pages", "tables"]

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECORD, PICTURE = DOCS / "speed.json", DOCS / "images" / "speed.svg"
BEGIN, END = "<!-- made by benchmarks/page.py: ", "<!-- end -->"
RAW, WRAPT, BY_HAND, SPAWN = "raw pyscard", "raw, wrapt imported", "check by hand", "spawn"

Figures = dict[tuple[str, str], dict[str, Any]]
"""The figures of a run, by the name of the measure and what pcsc_safe is compared with."""

COSTS = {
    "SCardTransmit": "SCardTransmit, 8 bytes",
    "SCardTransmit, with a card that takes 5 ms": "SCardTransmit of 5 ms",
    "SCardTransmit, with a card that takes 50 ms": "SCardTransmit of 50 ms",
    "SCardIsValidContext, the cheapest call": "SCardIsValidContext",
    "SCardConnect and SCardDisconnect": "SCardConnect + Disconnect",
    "SCardEstablishContext and SCardReleaseContext": "SCardEstablishContext + Release",
    '`python -c "import ..."`': "import, whole process",
    "a program that reads a card, from start to exit": "a card read, start to exit",
    "the same, with wrapt 1.17": "a card read, start to exit, other wrapt",
    "the first context of a process": "first SCardEstablishContext",
    "`os.fork()`, one context": "os.fork(), 1 context",
    "`os.fork()`, 100 contexts": "os.fork(), 100 contexts",
    "`os.fork()`, 4 threads waiting for events": "os.fork(), waits for events in 4 threads",
    "`os.fork()`, 4 threads exchanging APDUs of 10 ms": "os.fork(), 10 ms APDUs in 4 threads",
    "from the fork until the child is reaped, one context": "fork to reaped, 1 context",
    "the first reply in a forked child": "first use in a child",
    "the same, through a broker that it starts": "first use in a child, cold broker",
    "the same, through a broker that was started before the fork": "first use in a child, prestarted broker",
    "private memory of a forked worker": "private memory of a worker",
    "SCardTransmit through a broker": "SCardTransmit, broker",
    "the same, with a card that takes 5 ms": "SCardTransmit of 5 ms, broker",
    "the same, with a card that takes 50 ms": "SCardTransmit of 50 ms, broker",
    "8 threads on 8 contexts, time of a call": "8 threads, 8 contexts",
    "8 threads on 8 contexts, through a broker": "8 threads, 8 contexts, broker",
    "8 threads, 2 of them on one context with APDUs of 10 ms": "8 threads, 2 on one busy context",
    "8 threads, 1 waiting for events on the context of another": "8 threads, 1 context monitored",
}
"""The rows of the first table; those that a run hasn't measured are left out."""

IN_SHORT = (
    *("SCardTransmit", "SCardTransmit through a broker", "`os.fork()`, one context"),
    *("the first context of a process", "the first reply in a forked child"),
)
"""The rows of that table that docs/why.md has."""

ALTERNATIVES = {
    "SCardTransmit": "SCardTransmit, 8 bytes",
    "the first reply of a pool": "first answer of a pool",
    "the same, through a broker that was started before the fork": "first answer of a pool, prestarted broker",
    "a task of one exchange, in a pool of two workers": "a task in a pool of 2",
    "the same, through a broker": "a task in a pool of 2, broker",
}

BY_NUMBER = {
    "SCardTransmit, by clients of pcscd": ("SCardTransmit, {} clients", (2, 50, 190)),
    "SCardEstablishContext and SCardReleaseContext, by clients of pcscd": (
        "Establish + Release, {} clients",
        (2, 50, 190),
    ),
    "SCardEstablishContext and SCardReleaseContext, by open files": (
        "Establish + Release, {} files",
        (10, 1000, 10000),
    ),
    "`os.fork()`, by open files": ("os.fork(), {} files", (10, 1000, 10000)),
    "SCardConnect and SCardDisconnect, by readers": ("Connect + Disconnect, {} readers", (2, 8, 16)),
    "SCardGetStatusChange of all readers, by readers": ("all states, {} readers", (2, 8, 16)),
    "first exchange of a forked worker, by workers": ("first exchange of a worker, {} worker{s}", (1, 16, 64)),
}


def tables(record: dict[str, Any]) -> dict[str, str]:
    """The parts of pages that are made from a run, by the name in their marker."""
    figures: Figures = {(figure["name"], figure["against"]): figure for figure in record["figures"]}
    pool = {label: name for label, name in ALTERNATIVES.items() if "broker" not in name}
    return {
        "machine": _machine(record["machine"]),
        "costs": _table(("", RAW, "pcsc_safe", "difference", "ratio"), _costs(figures)),
        "costs in short": _table(("", RAW, "pcsc_safe"), (row[:3] for row in _costs(figures) if row[0] in IN_SHORT)),
        "alternatives": _table(("", BY_HAND, SPAWN, "pcsc_safe"), _alternatives(figures, ALTERNATIVES)),
        "by hand": _table(
            ("", BY_HAND, "pcsc_safe"), ((row[0], row[1], row[3]) for row in _alternatives(figures, pool))
        ),
        "spawn": _table(
            ("", SPAWN, "pcsc_safe"), (row[:1] + row[2:] for row in _alternatives(figures, ALTERNATIVES) if row[2])
        ),
        "targets": _table(("", "compared with", "target", "measured", "met"), _targets(record["figures"])),
        "numbers": _table(("", "numbers", RAW, "pcsc_safe"), _numbers(figures)),
    }


def in_page(text: str, record: dict[str, Any]) -> str:
    """The text of a page, with the tables of a run in the parts that are marked for them."""
    made = tables(record)
    first, *parts = text.split(BEGIN)
    for part in parts:
        name, _, rest = part.partition(" -->")
        _, end, after = rest.partition(END)
        if not end or name not in made:
            raise SystemExit(f"this part of a page has no end, or no such name: {BEGIN}{name}")
        first += f"{BEGIN}{name} -->\n\n{made[name]}\n\n{END}{after}"
    return first


def pages() -> list[Path]:
    """The pages that have such parts."""
    return [page for page in sorted(DOCS.rglob("*.md")) if BEGIN in page.read_text()]


def _machine(machine: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"- date: {machine['date']}",
            f"- machine: {machine['processor']}, {machine['cpus']} CPUs, load average {machine['load']} before the run "
            f"and {machine['load at the end']} at its end",
            f"- system: {machine['platform']}",
            f"- versions: pcsc-lite {machine['pcsc-lite']}, Python {machine['python']}, pyscard {machine['pyscard']}, "
            f"wrapt {machine['wrapt']}",
        ]
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _costs(figures: Figures) -> Iterator[tuple[str, ...]]:
    for label, name in COSTS.items():
        figure = figures.get((name, RAW))
        if figure is None:
            continue
        ours = _value(figure, figure["safe"])
        if figure["raw"] is None:
            yield label, "freeze", ours, "", ""
        else:
            more = _value(figure, figure["more"], "+")
            yield label, _value(figure, figure["raw"]), ours, more, f"{figure['ratio']:.2f}"


def _alternatives(figures: Figures, rows: dict[str, str]) -> Iterator[tuple[str, ...]]:
    for label, name in rows.items():
        by_hand, spawned = figures.get((name, BY_HAND)), figures.get((name, SPAWN))
        if by_hand is not None:
            others = [_value(each, each["raw"]) if each else "" for each in (by_hand, spawned)]
            yield label, *others, _value(by_hand, by_hand["safe"])


def _targets(figures: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for figure in figures:
        if figure["most"] is not None and figure["raw"] is not None:
            is_ratio = figure["target_is_ratio"]
            target = f"ratio {figure['most']:g}" if is_ratio else _value(figure, figure["most"], "+")
            measured = f"ratio {figure['ratio']:.2f}" if is_ratio else _value(figure, figure["more"], "+")
            met = {"met": "yes", "NOT MET": "no"}.get(figure["met"], figure["met"])
            yield figure["name"], figure["against"], f"at most {target}", measured, met


def _numbers(figures: Figures) -> Iterator[tuple[str, ...]]:
    for label, (name, counts) in BY_NUMBER.items():
        found = [figures.get((name.format(count, s="s" if count > 1 else ""), RAW)) for count in counts]
        whole = [each for each in found if each is not None]
        if len(whole) == len(counts):
            sides = [", ".join(_value(each, each[side]) for each in whole) for side in ("raw", "safe")]
            yield label, ", ".join(f"{count:,}" for count in counts), *sides


def _value(figure: dict[str, Any], value: Optional[float], sign: str = "") -> str:
    """A median in words, with two or three digits."""
    assert value is not None
    if figure["unit"] != "us":
        return f"{value:{sign}.0f} {figure['unit']}"
    unit, value = ("ms", value / 1000) if abs(value) >= 1000 else ("µs", value)
    return f"{value:{sign}.{1 if abs(value) < 10 else 0}f} {unit}"


def _record(results: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of results.json: the medians, without their spread."""
    if results["fast"]:
        raise SystemExit("the figures of a run with --fast mean nothing")
    figures = []
    for figure in results["figures"]:
        medians = {key: figure[key] and round(figure[key]["median"], 3) for key in ("raw", "safe", "more", "ratio")}
        kept = {key: figure[key] for key in ("name", "against", "unit", "most", "target_is_ratio", "met")}
        figures.append({**kept, **medians})
    return {"machine": results["machine"], "figures": figures}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the figures of a run to docs/speed.json and to the pages.")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="where run.py --output has written")
    directory = parser.parse_args().directory
    record = _record(json.loads((directory / "results.json").read_text()))
    lines = ",\n  ".join(json.dumps(figure) for figure in record["figures"])
    RECORD.write_text(f'{{\n "machine": {json.dumps(record["machine"])},\n "figures": [\n  {lines}\n ]\n}}\n')
    for page in pages():
        page.write_text(in_page(page.read_text(), record))
    shutil.copyfile(directory / "results.svg", PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
