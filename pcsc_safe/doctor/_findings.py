"""What a finding is, and the keys that findings have: a promise to programs that read ``--json``.

Nothing here is touched by a fork.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["KEYS", "Finding", "Status"]

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
    # --pid
    "family",
    "process",  # one for each process
)


class Status(str, enum.Enum):
    """How a thing is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    UNKNOWN = "unknown"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    :param key: one of :data:`KEYS`.
    :param status: how it is.
    :param what: what it is, in a few words.
    :param detail: what was seen, in a sentence.
    :param remedy: what to do about it, if it isn't well.
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
        """It for ``json.dumps``."""
        return {**asdict(self), "status": self.status.value}
