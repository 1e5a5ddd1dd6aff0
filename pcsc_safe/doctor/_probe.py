"""Tests what a fork does to PC/SC here, on raw pyscard and on pcsc_safe.

Three probes need no card and run on the PC/SC of this machine.  The hazards of the demo run on virtual stacks, if these
are installed.  The probe of a user's card runs with ``--touch-cards`` only, and on pcsc_safe only: on raw pyscard it
would show the hazard by ending other applications' sessions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional

from ..demo._judge import signal_name
from ._ask import TaskResult, run_task, tasks_at_once
from ._findings import Finding, Status
from ._pcscd import LOG, POLKIT

__all__ = ["KEYS", "hazards", "probes", "touches"]

RAW, SAFE = "smartcard.scard", "pcsc_safe.scard"
_OK = "SCARD_S_SUCCESS"
_REPORT = "report it, with the output of `python -m pcsc_safe doctor --json`"
_SECONDS = 12.0


class _Probe(NamedTuple):
    key: str
    task: str
    what: str


_PROBES = (
    _Probe("probe.inherited", "inherited", "context used after fork"),
    _Probe("probe.fresh", "fresh", "fresh context after fork"),
    _Probe("probe.c-fork", "c_fork", "context used after C fork"),
)


KEYS = tuple(each.key for each in _PROBES)


def probes() -> Iterator[Finding]:
    """Test what needs no card, on the PC/SC of this machine."""
    with tasks_at_once(2) as start:
        for probe in _PROBES:
            raw, safe = (start(probe.task, _SECONDS, module=module) for module in (RAW, SAFE))
            yield _probe_finding(probe, _judge(raw.result()), _judge(safe.result()))


class _Outcome(NamedTuple):
    """What happened to the child, and to its parent.

    :ivar harm: what went wrong, in words; empty if nothing did.
    :ivar known: whether enough was reported for a verdict.
    """

    harm: str
    known: bool


def _judge(result: TaskResult) -> _Outcome:
    parent, child = result.of("parent"), result.of("child")
    if result.failure:
        return _Outcome(f"the process {result.failure}", bool(parent))
    code, ended = parent.get("code"), child.get("ended")
    if code is None or ended is None:
        return _Outcome("", False)
    if ended < 0:
        return _Outcome(f"the child died of {signal_name(-ended)}", True)
    if child.get("code") != code:
        return _Outcome(f"the child got {child.get('code')}, its parent {code}", True)
    if child.get("shares"):
        return _Outcome("the child used its parent's connection", True)
    if parent.get("afterwards") != code:
        return _Outcome(f"the parent got {parent.get('afterwards')} afterwards, and {code} before", True)
    return _Outcome("", True)


def _probe_finding(probe: _Probe, raw: _Outcome, safe: _Outcome) -> Finding:
    data = {"raw": raw.harm, "raw_known": raw.known, "safe": safe.harm, "safe_known": safe.known}
    raw_says = raw.harm or ("no harm seen" if raw.known else "unknown: too little was reported")
    raw_text = f"raw pyscard: {raw_says}"
    if safe.harm:
        detail = f"pcsc_safe: {safe.harm}; {raw_text}"
        return Finding(probe.key, Status.PROBLEM if safe.known else Status.UNKNOWN, probe.what, detail, _REPORT, data)
    if not safe.known:
        return Finding(
            probe.key, Status.UNKNOWN, probe.what, f"pcsc_safe: too little was reported; {raw_text}", data=data
        )
    return Finding(probe.key, Status.OK, probe.what, f"pcsc_safe: works; {raw_text}", data=data)


def hazards() -> Iterator[Finding]:
    """Run the demo's hazards, each on separate virtual stacks."""
    reason = _no_stack()
    if reason:
        yield Finding("hazards", Status.SKIPPED, "hazards", reason[0], reason[1])
        return
    from ..demo._judge import Outcome  # only the probe needs the demo
    from ..demo._run import judged  # as above
    from ..demo.hazards import load  # as above
    from ..testing import PcscStackError  # as above

    every, shown, let_through, untried = load(), 0, 0, 0
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            for hazard in every:
                runs = [pool.submit(judged, hazard, module, stop) for module in (RAW, SAFE)]
                try:
                    (_, raw), (_, safe) = (run.result() for run in runs)
                except PcscStackError as error:
                    untried += 1
                    detail = f"{hazard.NAME}. Not tried: {error.problem}"
                    yield Finding("hazard", Status.UNKNOWN, f"hazard {hazard.NUMBER}", detail, error.remedy)
                    continue
                shown += raw.outcome is Outcome.HAZARD
                let_through += safe.outcome is not Outcome.SAFE
                yield _hazard_finding(hazard, raw, safe)
        finally:
            stop.set()
    data = {"hazards": len(every), "seen_raw": shown, "let_through": let_through, "untried": untried}
    detail = f"{shown} of {len(every)} seen on raw pyscard, {let_through} on pcsc_safe; on virtual cards"
    if let_through:
        yield Finding("hazards", Status.PROBLEM, "hazards", detail, _REPORT, data)
    elif untried:
        yield Finding("hazards", Status.UNKNOWN, "hazards", f"{detail}; {untried} not tried", data=data)
    else:
        yield Finding("hazards", Status.OK, "hazards", detail, data=data)


def _no_stack() -> Optional[tuple[str, str]]:
    from ..testing import PcscStackError, VirtualPcsc  # only the probe needs a stack

    try:
        with VirtualPcsc(activate=False):
            return None
    except PcscStackError as error:
        return f"they need a virtual PC/SC stack: {error.problem}", error.remedy


def _hazard_finding(hazard: Any, raw: Any, safe: Any) -> Finding:
    data = {
        "number": hazard.NUMBER,
        "raw": {"outcome": raw.outcome.value, "says": raw.says},
        "safe": {"outcome": safe.outcome.value, "says": safe.says},
    }
    what = f"hazard {hazard.NUMBER}"
    raw_says = raw.says if raw.outcome.value == "hazard" else f"{_NOT.get(raw.outcome.value)}: {raw.says}"
    if safe.outcome.value == "safe":
        detail = f"{hazard.NAME}. pcsc_safe is safe. Raw pyscard: {raw_says}"
        return Finding("hazard", Status.OK, what, detail, data=data)
    status = Status.PROBLEM if safe.outcome.value == "hazard" else Status.UNKNOWN
    return Finding("hazard", status, what, f"{hazard.NAME}. pcsc_safe: {safe.says}", _REPORT, data)


_NOT = {"safe": "not seen", "unknown": "not known"}


_REFUSED = {
    "SCARD_E_SHARING_VIOLATION": "another application may hold the card: have it disconnect",
    "SCARD_W_SECURITY_VIOLATION": POLKIT,
}


def touches(readers: list[str]) -> Iterator[Finding]:
    """Connect to the user's cards, as --touch-cards allows: shared, no APDU, left as they are."""
    for reader in readers:
        yield _touched(reader, run_task("touch", _SECONDS, reader, module=SAFE))


def _touched(reader: str, result: TaskResult) -> Finding:
    parent, child = result.of("parent"), result.of("child")
    what, data = reader, {"reader": reader, "parent": parent, "child": child}
    if result.failure:
        remedy = "see the log of pcscd, and try the card in another reader"
        return Finding("probe.card", Status.PROBLEM, what, f"the process {result.failure}", remedy, data)
    if parent.get("connect") != _OK:
        detail = f"a shared connection is refused: {parent.get('connect')}"
        remedy = _REFUSED.get(str(parent.get("connect")), LOG)
        return Finding("probe.card", Status.WARNING, what, detail, remedy, data)
    connected = f"connected by {parent['protocol']}"
    expected = (_OK, "SCARD_W_RESET_CARD")  # as the setting cards says
    if parent.get("afterwards") != _OK or child.get("ended") != 0 or child.get("inherited") not in expected:
        results = f"{child.get('inherited')}, and the parent's {parent.get('afterwards')}"
        detail = f"{connected}; after a fork the child's call returned {results}"
        return Finding("probe.card", Status.PROBLEM, what, detail, _REPORT, data)
    if child.get("own") != _OK:
        detail = (
            f"{connected}; a forked child can't connect to it while its parent is connected: {child.get('reconnect')}"
        )
        remedy = "if the child has to use this card, share the session: docs/sessions.md"
        return Finding("probe.card", Status.WARNING, what, detail, remedy, data)
    detail = f"{connected}; a forked child connected again, and its parent's connection still works"
    return Finding("probe.card", Status.OK, what, detail, data=data)
