"""Forks, threads, kills, moving cards and every policy, all at the same time; see :mod:`soak`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soak_report
from places import TESTS

from pcsc_safe.testing._install import Missing, look

SOAK = TESTS / "soak.py"
SEED = 7


def soaked(seconds: int) -> dict[str, Any]:
    """The output of a soak test of this many seconds."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    command = [sys.executable, str(SOAK), "--seconds", str(seconds), "--seed", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 200, check=False)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert (result["breaches"], result["stacks"], done.returncode) == ([], "", 0), done.stdout
    return dict(result["figures"])


def test_some_seconds() -> None:
    """No guarantee is broken, and there was some activity."""
    figures = soaked(6)
    assert figures["exchanges"] > 100
    assert figures["forks"] > 3
    assert figures["kills"] > 0


@pytest.mark.long
def test_two_minutes() -> None:
    """No guarantee is broken; the figures are printed (``-s`` shows them)."""
    figures = soaked(120)
    print(json.dumps(figures))
    assert figures["exchanges"] > 5000
    assert figures["pcscd killed"] > 3


def test_a_breach_is_seen(tmp_path: Path) -> None:
    """What a process of a family finds wrong is in the result, even if the process is killed immediately afterwards."""
    report = soak_report.Report(str(tmp_path), "policy=auto")
    report.breach("another's answer", sent="00")
    soak_report.judge_end(report, -11, 4711)
    soak_report.judge_end(report, 0, 4711)
    soak_report.judge_end(report, -9, 4711)
    assert [line["what"] for line in soak_report.lines(str(tmp_path), "breaches")] == [
        "another's answer",
        "a process died",
    ]
