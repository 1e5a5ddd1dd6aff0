"""The results of each stack: reads them from the output of scripts/test, prints and records them, and makes a table.

A result is a dict, as in JSON.  docs/stacks.json has the results of the stacks on which all tests passed.  The table on
the pages is made from that file only.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "stacks.json"
PAGES = ("README.md", "docs/hosts/index.md")
BEGIN, END = "<!-- table of stacks: scripts/stacks --record writes it -->\n", "<!-- end of the table of stacks -->"
COUNTS = ("passed", "failed", "errors", "skipped", "xfailed")

Result = dict[str, Any]


def read_tests(output: str) -> Result:
    """Read pytest's results from the output of scripts/test: counts, failures, and skips with their reasons."""
    counts: Counter[str] = Counter()
    skips: Counter[str] = Counter()
    failures: list[str] = []
    for run in re.split(r"(?m)^== pytest", output)[1:]:
        closing = re.findall(r"(?m)^=+ (.*\d+ .*) in [\d.]+s.*=+$", run)
        for number, what in re.findall(r"(\d+) (\w+)", closing[-1] if closing else ""):
            counts[{"error": "errors"}.get(what, what)] += int(number)
        summary = run.rpartition("short test summary info")[2]
        for number, reason in re.findall(r"(?m)^SKIPPED \[(\d+)\] (?:\S+:\d+: )?(.*)$", summary):
            skips[reason] += int(number)
        failures += re.findall(r"(?m)^((?:FAILED|ERROR) .*)$", summary)
        if not closing:
            failures.append(_unfinished(run))
    told = {name: counts[name] for name in COUNTS}
    lacking = re.findall(r"(?m)^optional, not installed: (.*) \(", output)
    return {**told, "skips": dict(skips.most_common()), "failures": failures, "lacking": " ".join(lacking).split()}


def _unfinished(run: str) -> str:
    said = [line.strip() for line in run.splitlines() if line.strip()]
    if any("Timeout" in line and line.startswith("+") for line in said):
        tests = re.findall(r'File ".*/(test_\w+\.py)", line \d+, in (test_\w+)', run)
        which = "::".join(tests[-1]) if tests else "a test"
        return f"{which} took longer than its limit, and pytest ended; the log has its stacks"
    return f"pytest did not finish; its last output: {said[-1] if said else 'none'}"


def read_demo(output: str, status: int) -> str:
    """The text for the demo's column: ``ok``, or the exit status and the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return "ok" if status == 0 else f"status {status}: {lines[-1] if lines else 'no output'}"


def is_green(result: Result) -> bool:
    """Whether the demo and all tests passed on this stack."""
    return "impossible" not in result and result["demo"] == "ok" and result["status"] == 0


COLUMNS = ("stack", "Debian", "pcsc-lite", "Python", "pyscard", "wrapt", "demo", "tests", "minutes")


def tests_in_words(result: Result) -> str:
    """The number of tests for each outcome, without zeros except for passed and failed."""
    tests = result["tests"]
    return ", ".join(f"{tests[name]} {name}" for name in COUNTS if tests[name] or name in ("passed", "failed"))


def _row(result: Result) -> list[str]:
    if "impossible" in result:
        return [result["stack"], "-", "-", "-", "-", "-", "-", "not possible", "-"]
    versions = [result[name] for name in ("debian", "pcsc_lite", "python", "pyscard", "wrapt")]
    tests = tests_in_words(result) + ("" if result["status"] == 0 else f" (status {result['status']})")
    demo = "ok" if result["demo"] == "ok" else "FAILED"
    return [result["stack"], *versions, demo, tests, str(round(result["seconds"] / 60))]


def as_text(results: list[Result]) -> str:
    """The table for a terminal, and below it failures, skips and the paths of the logs."""
    rows = [list(COLUMNS), *map(_row, results)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *(note for result in results for note in _notes(result))])


def _notes(result: Result) -> list[str]:
    if "impossible" in result:
        return [f"\n{result['stack']}: {result['impossible']}"]
    tests = result["tests"]
    notes = [] if result["demo"] == "ok" else [f"demo: {result['demo']}"]
    notes += tests["failures"]
    notes += [f"skipped {number}: {reason}" for reason, number in tests["skips"].items()]
    notes += [f"optional, can't be installed: {name}" for name in tests["lacking"]]
    return [f"\n{result['stack']} (log: {result['log']})", *(f"  {note}" for note in notes)] if notes else []


def record(results: list[Result], order: list[str], file: Path = RECORD) -> list[str]:
    """Record the green results of whole runs in the file; each replaces the former result of its stack.

    :param order: the stacks' names, in the order of the table.
    :return: the reasons why some of the results are not recorded.
    """
    refused = [f"{result['stack']}: {why}" for result in results if (why := _why_not(result))]
    known = {result["stack"]: result for result in recorded(file)}
    known |= {result["stack"]: _lasting(result) for result in results if not _why_not(result)}
    lasting = [known[name] for name in order if name in known]
    file.write_text(json.dumps(lasting, indent=1, ensure_ascii=False) + "\n")
    return refused


def _why_not(result: Result) -> str:
    if "impossible" in result:
        return "not possible here"
    if not is_green(result):
        return "the demo or a test failed"
    return "" if result["arguments"] == [] else "only some of the tests were run"


def _lasting(result: Result) -> Result:
    return {name: value for name, value in result.items() if name not in ("log", "arguments", "status")}


def recorded(file: Path = RECORD) -> list[Result]:
    """The results that the file has."""
    return json.loads(file.read_text()) if file.exists() else []


def as_markdown(results: list[Result]) -> str:
    """The table, for the pages, of the stacks on which all tests passed."""
    if not results:
        return "No run of `scripts/stacks` has been recorded yet.\n"
    lines = ["| Debian | pcsc-lite | Python | pyscard | wrapt | tests | date |", "|---|---|---|---|---|---|---|"]
    for result in results:
        cells = [result[name] for name in ("debian", "pcsc_lite", "python", "pyscard", "wrapt")]
        lines.append(f"| {' | '.join([*cells, tests_in_words(result), result['date']])} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, table: str) -> str:
    """The page, with this table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN.strip()} or {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def write_pages() -> None:
    """Write the table to the pages."""
    for name in PAGES:
        page = ROOT / name
        page.write_text(with_table(page.read_text(), as_markdown(recorded())))
