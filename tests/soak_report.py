"""What the director of a soak and its families have in common: where breaches and figures go."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["Report", "judge_end", "lines"]


class Report:
    """Where breaches and figures go: files, a line each, which a process that is killed can't take with it.

    :param directory: of the files.
    :param settings: of the family, to be named with each breach.
    """

    def __init__(self, directory: str, settings: str = "") -> None:
        self.settings = settings
        self._directory = Path(directory)
        self.figures: Counter[str] = Counter()

    def breach(self, what: str, **facts: Any) -> None:
        """Something that must not be."""
        self._line("breaches", {"what": what, "pid": os.getpid(), "settings": self.settings, **facts})

    def close(self) -> None:
        """Write down what has been counted in this process."""
        self._line("figures", self.figures)
        self.figures = Counter()

    def _line(self, name: str, content: Any) -> None:
        end = os.open(self._directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(end, json.dumps(content).encode() + b"\n")
        os.close(end)


def judge_end(report: Report, status: int, pid: int) -> None:
    """Of a process: it ended by itself, or was killed by the director."""
    if status not in (0, -signal.SIGKILL):
        report.breach("a process died", status=status, who=pid)


def lines(directory: str, name: str) -> list[Any]:
    """Those of a report."""
    path = Path(directory) / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
