"""``--self-test``: tests what pcsc_safe relies on, above all on macOS, and reports it.

The tests need no reader.  With a reader, waits for events are also tested, and with ``--touch-cards`` an exchange with
each card.  All tests run in the processes of :mod:`_self_tasks`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Callable, NamedTuple

from ..testing._versions import versions
from ._ask import TaskResult, run_task, tasks_at_once
from ._findings import Finding, Status

__all__ = ["KEYS", "exchanges", "report", "tests"]

RAW, SAFE = "smartcard.scard", "pcsc_safe.scard"
_SECONDS = 40.0
_IDLE = 20  # s
_REMEDY = "report it, with the whole output of `python -m pcsc_safe doctor --self-test`"
_REPORTED_KEYS = (
    "platform",
    "pyscard",
    "wrapt",
    "fork.",
    "policy.",
    "broker",
    "probe.inherited",
    "probe.fresh",
    "probe.c-fork",
)
"""The beginnings of the keys of other findings that the report contains, besides those of this module."""
_DIRECTORIES = re.compile(r"""(?:~|/[^/\n"':;,]+)+/""")
_PATHS = ("executable", "path", "place", "python")


class _Test(NamedTuple):
    """One test.

    :ivar key: of its finding.
    :ivar what: what is tested, in a few words.
    :ivar task: of :mod:`_self_tasks`, with its arguments.
    :ivar module: the scard module that it uses, if any.
    :ivar needs_pcsc: whether PC/SC must work here.
    :ivar judge: returns what is wrong with the report, in words; empty if nothing is.
    :ivar says: the result of a passed test, in words.
    """

    key: str
    what: str
    task: tuple[str, ...]
    module: str
    needs_pcsc: bool
    judge: Callable[[dict[str, Any]], str]
    says: str


def _wrong(**expected: Any) -> Callable[[dict[str, Any]], str]:
    """A judge that returns what differs from the expected values."""

    def judge(seen: dict[str, Any]) -> str:
        differing = [name for name, value in expected.items() if seen.get(name) != value]
        return ", ".join(f"{name.replace('_', ' ')}: {seen.get(name)}, not {expected[name]}" for name in differing)

    return judge


def _cancelled(seen: dict[str, Any]) -> str:
    if "wait" not in seen:
        return ""  # no reader to wait for
    return "" if seen["wait"] == "SCARD_E_CANCELLED" else f"the wait ended with {seen['wait']}"


def _idle_failure(seen: dict[str, Any]) -> str:
    before, after = seen.get("before"), seen.get("after")
    return "" if before == after is not None else f"SCardListReaders returned {before}, and {after} after {_IDLE} s"


_ENDS = _wrong(what_is_sent=[], hang_up=True, exit=True, peer=True, identity=True)
_TESTS = (
    _Test("self.passing", "passing sockets", ("passing",), "", False, _wrong(dead_if_kept=0), "sockets arrive"),
    _Test(
        "self.ends",
        "ends of connections and processes",
        ("ends",),
        "",
        False,
        _ENDS,
        "the ends of connections and processes are detected",
    ),
    _Test(
        "self.brokers",
        "brokers",
        ("brokers",),
        "",
        False,
        lambda seen: _wrong(served=seen.get("children", -1), after_its_death=True)(seen),
        "all children are served, and another broker starts when one is killed",
    ),
    _Test(
        *("self.deaths", "death of a client", ("deaths",), "", False, _wrong(broker_ended=True)),
        "its broker ends, although a child that C code forked has copies of its file descriptors",
    ),
    _Test("self.cancel", "waits, raw", ("events",), RAW, True, _cancelled, "SCardCancel ends a wait"),
    _Test("self.cancel", "waits", ("events",), SAFE, True, _cancelled, "SCardCancel ends a wait"),
    _Test("self.cancel", "waits, broker", ("events", "always"), SAFE, True, _cancelled, "SCardCancel ends a wait"),
    _Test(
        *("self.idle", "idle context", ("idle", str(_IDLE)), RAW, True, _idle_failure),
        f"a context works after {_IDLE} s",
    ),
)
KEYS = tuple(dict.fromkeys(test.key for test in _TESTS))


def tests(pcsc_works: bool) -> Generator[Finding, None, None]:
    """Test everything that needs no card.

    :param pcsc_works: whether a context can be established.
    """
    with tasks_at_once(4) as start:
        futures = [
            (test, start(test.task[0], _SECONDS, *test.task[1:], module=test.module, home="_self_tasks"))
            for test in _TESTS
            if pcsc_works or not test.needs_pcsc
        ]
        for test, future in futures:
            yield _finding(test, future.result())


def _finding(test: _Test, result: TaskResult) -> Finding:
    seen = result.of()
    wrong = f"the process {result.failure}" if result.failure else test.judge(seen)
    if not wrong:
        return Finding(test.key, Status.OK, test.what, test.says, data=seen)
    if test.module == RAW:  # it is not pcsc_safe's
        return Finding(test.key, Status.WARNING, test.what, f"on raw pyscard: {wrong}", _REMEDY, seen)
    return Finding(test.key, Status.PROBLEM, test.what, wrong, _REMEDY, seen)


def exchanges(readers: list[str]) -> Iterator[Finding]:
    """Exchange a command with each card in parent and child, natively and through a broker."""
    for number, reader in enumerate(readers):
        for broker in ("", "always"):
            result = run_task("exchange", _SECONDS, reader, broker, module=SAFE, home="_self_tasks")
            seen, what = result.of(), f"card {number}{', broker' if broker else ''}"
            codes = [seen.get(who) for who in ("parent", "child", "parent_again")]
            if result.failure or len({*codes}) > 1 or codes[0] is None:
                wrong = f"the process {result.failure}" if result.failure else f"parent, child and parent got {codes}"
                yield Finding("self.exchange", Status.PROBLEM, what, wrong, _REMEDY, seen)
            else:
                detail = f"parent and child get {codes[0]}"
                yield Finding("self.exchange", Status.OK, what, detail, data=seen)


def report(findings: Iterable[Finding]) -> str:
    """The report to paste into an issue: the findings, without the names of directories and devices."""
    rule = "-" * 72
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = []
    for each in findings:
        if each.key.startswith((*_REPORTED_KEYS, "self.")):
            data = {name: value for name, value in each.data.items() if name not in _PATHS}
            facts = json.dumps(data, sort_keys=True)
            lines.append(f"{each.status.value:<8} {each.key}: {each.what}: {each.detail} {facts}")
    text = "\n".join(["", rule, "pcsc_safe doctor --self-test", installed, *lines, rule])
    # A process that failed may have named files, perhaps the user's own directory.
    text = re.sub(rf"{re.escape(os.path.expanduser('~'))}(?![\w.-])", "~", text)
    return _DIRECTORIES.sub("", text)
