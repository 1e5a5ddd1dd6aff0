"""``python -m pcsc_safe doctor``: its arguments, its exit status, its JSON.  Nothing here forks or uses PC/SC."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, Optional

from .. import __version__, policy
from ..testing._disposable import default_sigchld
from . import _fork, _machine, _pcscd, _probe, _process, _self_test
from ._findings import Finding, Ledger, Status
from ._view import Page, left_out, summary

__all__ = ["EPILOG", "add_arguments", "main"]

EPILOG = """The doctor uses PC/SC only in separate processes, so a hang or a crash doesn't affect it. It connects to the
cards only with --touch-cards, in shared mode, and leaves them as they are. It sends an APDU only with both --self-test
and --touch-cards: GET RESPONSE, which changes nothing.

--self-test tests what pcsc_safe relies on: forks, brokers (helper processes), clients that die, waits for events. It
works with and without a reader, takes half a minute, and prints a report that you can paste into an issue. It is mainly
for macOS, because the authors of pcsc_safe have no Mac.

exit status: 0 if there is no problem, 1 if there is one, 2 if the doctor could not run or could not examine the program

--json prints {"version", "findings": [{"key", "status", "what", "detail", "remedy", "data"}, ...], "left_out"}. A key
stays the same from version to version. If there are several readers, hazards or processes, a key occurs several times.
A status is ok, warning, problem, unknown or skipped. "data" has the facts of "detail". "left_out" maps the key of a
problem to the keys of the findings that were omitted because of this problem."""

_Section = tuple[str, Iterator[Finding]]
_LONGEST = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON (default: as text)")
    parser.add_argument(
        "--no-probe", action="store_true", help="skip the tests of forks, which take 25 s (default: run them)"
    )
    parser.add_argument(
        "--touch-cards",
        action="store_true",
        help="also connect to the cards in the readers (default: leave the cards alone)",
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="also test what pcsc_safe relies on, and print a report (default: no self-test)",
    )
    parser.add_argument(
        "--pid",
        type=_pid,
        metavar="N",
        help="examine the running program with process ID N, and its children (Linux; default: examine this machine)",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="seconds to wait for pcscd, and for a broker (default: 10)",
    )


def _pid(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process ID: use the number that ps prints")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a timeout: use a number of seconds, {_LONGEST:g} at most")
    return seconds


def main(options: argparse.Namespace) -> int:
    """Examine, and print the findings.

    :return: the exit status, see :data:`EPILOG`.
    """
    if options.pid is not None and (options.touch_cards or options.no_probe or options.self_test):
        options.refuse(
            "--pid examines a program: leave out --touch-cards, --no-probe and --self-test, which examine this machine"
        )
    if options.pid is not None:
        return _examine(options)
    signal.signal(signal.SIGTERM, _terminated)
    default_sigchld()
    ledger = Ledger()
    status = _status(_show(_sections(options, ledger), options.json, ledger))
    if options.self_test and not options.json:
        print(_self_test.report(ledger.findings))
    return status


def _terminated(number: int, frame: object) -> NoReturn:
    # As an exception, so that stacks and disposable processes are cleared away.
    raise SystemExit(128 + number)


def _status(findings: Iterable[Finding]) -> int:
    return int(any(each.status is Status.PROBLEM for each in findings))


def _show(sections: Iterable[_Section], as_json: bool, ledger: Ledger) -> list[Finding]:
    page: Optional[Page] = None if as_json else Page(sys.stdout)
    if page is not None:
        print(f"pcsc_safe {__version__}: doctor", flush=True)
    for title, found in sections:
        if page is not None:
            page.section(title)
        for finding in found:
            if ledger.enter(finding) and page is not None:
                page.show(finding)
    if page is None:
        print(json.dumps(_as_json(ledger), indent=2))
    else:
        page.end([*left_out(ledger), summary(ledger.findings)])
    return ledger.findings


def _as_json(ledger: Ledger) -> dict[str, Any]:
    findings = [each.as_json() for each in ledger.findings]
    return {"version": __version__, "findings": findings, "left_out": ledger.left_out}


def _sections(options: argparse.Namespace, ledger: Ledger) -> Iterator[_Section]:
    """The sections of the page; each begins after the findings of the earlier ones have been entered."""
    yield "This installation", _installation()
    # The generator of a section puts here what it finds out about PC/SC; those of later sections use it.
    seen = [_pcscd.Service(False, [])]
    yield "PC/SC", _service(options.timeout, seen)
    yield "Forks", _forks(options.timeout, seen[-1].works, ledger)
    if options.self_test and ledger.allows("self.ends") and _fork.are_possible():
        yield "Self-test", _self_test.tests(seen[-1].works)
    if options.touch_cards and ledger.allows("probe.card"):
        yield "The cards", _probe.touches(seen[-1].cards)
        if options.self_test:
            yield "Exchanges with the cards", _self_test.exchanges(seen[-1].cards)
    if options.no_probe or not _fork.are_possible():
        return
    if ledger.allows(*_probe.KEYS):
        yield "Tests on the PC/SC of this machine", _probe.probes()
    if ledger.allows("hazards") and not options.self_test:
        yield "Tests on virtual cards", _probe.hazards()


def _installation() -> Iterator[Finding]:
    yield from _machine.installation()
    yield _machine.settings()


def _service(seconds: float, seen: list[_pcscd.Service]) -> Iterator[Finding]:
    for findings, service in _pcscd.service(seconds):
        seen.append(service)
        yield from findings


def _forks(seconds: float, pcsc_works: bool, ledger: Ledger) -> Iterator[Finding]:
    yield from _fork.forks()
    if _fork.are_possible() and ledger.allows("broker"):
        yield _fork.broker(seconds, pcsc_works)


def _examine(options: argparse.Namespace) -> int:
    if policy.PLATFORM != "linux":
        print("the doctor can't examine a program here: --pid needs /proc, which only Linux has", file=sys.stderr)
        return 2
    try:
        findings, could_examine = _process.examine(options.pid)
    except ProcessLookupError:
        print(f"the doctor can't examine it: {_process.why_invisible(options.pid)}", file=sys.stderr)
        return 2
    _show([(f"Process {options.pid} and its children", iter(findings))], options.json, Ledger())
    return _status(findings) if could_examine else 2
