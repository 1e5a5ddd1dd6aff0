"""Turns the observations of one run into a verdict and a sentence.

Invariant: a sentence contains only what a process reported or what the demo observed from outside.  A run of which too
little is known gets the outcome ``unknown``.  Nothing here starts a process, and a fork changes nothing here.
"""

from __future__ import annotations

import enum
import signal
from typing import Any, NamedTuple, Optional

__all__ = ["Finding", "Outcome", "Run", "Verdict", "conclude", "death", "patience", "signal_name"]


class Outcome(str, enum.Enum):
    """The outcome of a run."""

    HAZARD = "hazard"
    SAFE = "safe"
    UNKNOWN = "unknown"


class Run(NamedTuple):
    """Everything that was observed of one hazard program.

    :ivar module: the scard module that it used.
    :ivar reported: what its processes reported, by process: ``{"child": {"wrong": 3}}``.
    :ivar exit_status: of the program, if it ended by itself.
    :ivar killed_by: the signal that ended it, unless the demo sent it.
    :ivar timed_out: the seconds that it was given, if it needed more.
    :ivar seconds: how long it took.
    :ivar log: the end of what it wrote to stderr.
    """

    module: str
    reported: dict[str, dict[str, Any]]
    exit_status: Optional[int] = None
    killed_by: Optional[int] = None
    timed_out: Optional[float] = None
    seconds: float = 0.0
    log: str = ""

    def of(self, process: str, *names: str) -> list[Any]:
        """What ``process`` reported under ``names``; None for each that it did not report."""
        reported = self.reported.get(process, {})
        return [reported.get(name) for name in names]


class Finding(NamedTuple):
    """The judgement of a hazard's module about what was reported.

    :ivar harm: sentences that show the hazard.
    :ivar proof: sentences that show its absence; empty if too little was reported.
    """

    harm: list[str]
    proof: list[str]


class Verdict(NamedTuple):
    """The outcome of a run, and the sentence for it."""

    outcome: Outcome
    says: str


def conclude(finding: Finding, run: Run) -> Verdict:
    """Add to a finding how the program ended.

    :param finding: of the hazard's own ``judge``.
    :param run: what it judged.
    """
    ending, clean = _ending(run)
    if finding.harm or (ending and not clean):
        return Verdict(Outcome.HAZARD, _sentence([*finding.harm, *ending]))
    if finding.proof and not ending:
        return Verdict(Outcome.SAFE, _sentence(finding.proof))
    return Verdict(Outcome.UNKNOWN, _sentence(ending or ["it reported too little for a verdict"]))


def _ending(run: Run) -> tuple[list[str], bool]:
    """How the program ended, if it failed; and whether this says nothing about the hazard."""
    if run.timed_out is not None:
        return [f"did not finish in {run.timed_out:g} s"], False
    if run.killed_by is not None:
        return [f"the program died of {signal_name(run.killed_by)}"], False
    if run.exit_status:
        return [f"the program failed with status {run.exit_status}"], True
    return [], True


def patience(module: str, seconds: float) -> float:
    """How long a process may take before it counts as one that hangs.

    :param module: the scard module under test.
    :param seconds: for raw pyscard.  pcsc_safe gets more, because its children may first start a broker.
    """
    return seconds if module == "smartcard.scard" else 5 * seconds


def death(who: str, status: Optional[int]) -> list[str]:
    """A clause if a process died of a signal.

    :param who: "the child".
    :param status: as ``os.waitstatus_to_exitcode`` returns it; None if its end was not observed.
    """
    return [f"{who} died of {signal_name(-status)}"] if status is not None and status < 0 else []


def signal_name(number: int) -> str:
    """The name of a signal: SIGSEGV for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _sentence(clauses: list[str]) -> str:
    return "; ".join(clauses)
