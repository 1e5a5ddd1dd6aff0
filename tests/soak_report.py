"""What the director of a soak test and its families share: the files for breaches and figures."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["Report", "judge_end", "lines"]


class Report:
    """Files for breaches and figures, one line each; they are complete even if the process is killed.

    :param directory: of the files.
    :param settings: of the family, which each breach names.
    """

    def __init__(self, directory: str, settings: str = "") -> None:
        self.settings = settings
        self._directory = Path(directory)
        self.figures: Counter[str] = Counter()

    def breach(self, what: str, **facts: Any) -> None:
        """Record a breach of a guarantee."""
        self._line("breaches", {"what": what, "pid": os.getpid(), "settings": self.settings, **facts})

    def close(self) -> None:
        """Write the figures of this process."""
        self._line("figures", self.figures)
        self.figures = Counter()

    def _line(self, name: str, content: Any) -> None:
        end = os.open(self._directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(end, json.dumps(content).encode() + b"\n")
        os.close(end)


def judge_end(report: Report, status: int, pid: int) -> None:
    """Check that a process ended by itself, or was killed by the director."""
    if status not in (0, -signal.SIGKILL):
        report.breach("a process died", status=status, who=pid)


def lines(directory: str, name: str) -> list[Any]:
    """The lines of a report."""
    path = Path(directory) / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
