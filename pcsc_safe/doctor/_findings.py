"""Defines findings, what each needs, and their keys, which stay the same for programs that read ``--json``.

One cause is one finding: while something is a problem, the checks that need it are left out (:data:`NEEDS`).

A fork changes nothing here.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["KEYS", "NEEDS", "Finding", "Ledger", "Status"]

KEYS = (
    # this machine and installation
    "pcsc_safe",
    "python",
    "platform",
    "pyscard",
    "wrapt",
    "libpcsclite",
    "settings",
    # PC/SC
    "pcscd.program",
    "pcscd.socket",
    "pcscd.answer",
    "pcscd.clients",
    "pcsc.access",
    "readers",
    "reader",  # one for each reader
    # forks
    "fork.hooks",
    "fork.page",
    "fork.detection",
    "policy.auto",
    "broker",
    # what was tried
    "probe.inherited",
    "probe.fresh",
    "probe.c-fork",
    "probe.card",  # one for each card, with --touch-cards
    "hazards",
    "hazard",  # one for each hazard of the demo
    # --self-test
    "self.passing",
    "self.ends",
    "self.brokers",
    "self.deaths",
    "self.cancel",  # raw, in this process and through a broker
    "self.idle",
    "self.exchange",  # two for each card, with --touch-cards
    # --pid
    "family",
    "process",  # one for each process
)

_ALL_OF_PCSC = ("pcsc_safe", "pcsc.access")

NEEDS: dict[str, tuple[str, ...]] = {
    "pcsc_safe": ("pyscard", "wrapt"),
    "libpcsclite": ("pyscard",),
    "pcscd.answer": ("pcscd.socket",),
    "pcscd.clients": ("pcscd.socket",),
    "pcsc.access": ("pyscard", "libpcsclite", "pcscd.answer"),
    "readers": ("pcsc.access",),
    "reader": ("readers",),
    "broker": ("pcsc_safe",),
    "probe.inherited": _ALL_OF_PCSC,
    "probe.fresh": _ALL_OF_PCSC,
    "probe.c-fork": _ALL_OF_PCSC,
    "probe.card": _ALL_OF_PCSC,
    "hazards": ("pcsc_safe",),
    "hazard": ("pcsc_safe",),
    "self.passing": ("pcsc_safe",),
    "self.ends": ("pcsc_safe",),
    "self.brokers": ("pcsc_safe",),
    "self.deaths": ("pcsc_safe",),
    "self.cancel": _ALL_OF_PCSC,
    "self.idle": _ALL_OF_PCSC,
    "self.exchange": _ALL_OF_PCSC,
}
"""What a check needs, by keys: no problem there, nor in what these need in turn."""


class Status(str, enum.Enum):
    """The status of a finding."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    UNKNOWN = "unknown"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    :param key: one of :data:`KEYS`.
    :param status: its status.
    :param what: what was examined, in a few words.
    :param detail: what was observed, in a sentence.
    :param remedy: what to do about it, if the status isn't ok.
    :param data: the facts of ``detail``, for programs.
    """

    key: str
    status: Status
    what: str
    detail: str
    remedy: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.key in KEYS, self.key
        assert self.remedy or self.status in (Status.OK, Status.SKIPPED, Status.UNKNOWN), self

    def as_json(self) -> dict[str, Any]:
        """The finding as a dict for ``json.dumps``."""
        return {**asdict(self), "status": self.status.value}


class Ledger:
    """The findings so far, and the checks that are left out because of them."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.left_out: dict[str, list[str]] = {}
        """The keys of the checks that are left out, by the key of the problem."""

    def allows(self, *keys: str) -> bool:
        """Whether things can be examined; notes those that can't."""
        causes = {key: self._cause(key) for key in keys}
        for key, cause in causes.items():
            if cause and key not in self.left_out.setdefault(cause, []):
                self.left_out[cause].append(key)
        return not any(causes.values())

    def enter(self, finding: Finding) -> bool:
        """Enter a finding, unless it is left out; return whether it was entered."""
        if not self.allows(finding.key):
            return False
        self.findings.append(finding)
        return True

    def _cause(self, key: str) -> str:
        """The first problem that prevents a check; empty if there is none."""
        for need in NEEDS.get(key, ()):
            cause = self._cause(need) or (need if self._is_problem(need) else "")
            if cause:
                return cause
        return ""

    def _is_problem(self, key: str) -> bool:
        return any(each.key == key and each.status is Status.PROBLEM for each in self.findings)
