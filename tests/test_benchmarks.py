"""The benchmarks run to their end and say what they promise to; what the figures are is not tested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent.parent / "benchmarks" / "run.py"
INTERVAL = {"median", "low", "high"}
COMPARED = {
    "SCardIsValidContext": {"raw pyscard"},
    "SCardTransmit, 8 bytes": {"raw pyscard"},
    "SCardStatus": {"raw pyscard"},
    "SCardConnect + Disconnect": {"raw pyscard"},
    "SCardEstablishContext + Release": {"raw pyscard"},
    "import, whole process": {"raw pyscard"},
    "import, net": {"raw pyscard"},
    "first SCardEstablishContext": {"raw pyscard"},
    "os.fork(), 1 context": {"raw pyscard", "raw, wrapt imported"},
    "os.fork(), 100 contexts": {"raw pyscard", "raw, wrapt imported"},
    "fork to reaped, 1 context": {"raw pyscard", "raw, wrapt imported"},
    "fork to reaped, 100 contexts": {"raw pyscard", "raw, wrapt imported"},
    **{
        f"{what}, guard_native, {count} sockets": {"guard off"}
        for what in ("os.fork()", "fork to reaped")
        for count in (10, 1000)
    },
    "os.fork(), 1 thread waiting for events": {"raw pyscard"},
    "os.fork(), 4 threads waiting for events": {"raw pyscard"},
    "os.fork(), 10 ms APDUs in 1 thread": {"raw pyscard"},
    "os.fork(), 10 ms APDUs in 4 threads": {"raw pyscard"},
    "8 threads, 8 contexts": {"raw pyscard"},
    "8 threads, 8 contexts, 10 ms": {"raw pyscard"},
    "8 threads, 2 on one busy context": {"raw pyscard"},
    "8 threads, 1 context monitored": {"raw pyscard"},
    "SCardTransmit, broker": {"raw pyscard"},
    "SCardTransmit, 8 bytes, recorded": {"pcsc_safe"},
    "first use in a child, cold broker": {"raw pyscard"},
    "first use in a child, prestarted broker": {"raw pyscard"},
    "first use in a child": {"raw pyscard", "raw, wrapt imported"},
}


@pytest.mark.skipif(not RUN.exists(), reason="benchmarks/ is not part of this installation")
def test_benchmarks_run_to_their_end(tmp_path: Path) -> None:
    """``benchmarks/run.py --fast`` measures everything, raw pyscard beside pcsc_safe, and writes it down."""
    file = tmp_path / "figures.json"
    command = [sys.executable, str(RUN), "--fast", "--json", str(file)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    )
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors
    document = json.loads(file.read_text())
    assert document["fast"] is True
    assert document["machine"].keys() >= {"platform", "cpus", "python", "pcsc-safe", "pyscard", "wrapt"}
    compared: dict[str, set[str]] = {}
    for figure in document["figures"]:
        compared.setdefault(figure["name"], set()).add(figure["against"])
        assert figure["name"] in output
        froze = figure["raw"] is None
        assert froze == (figure["froze"] == figure["rounds"])
        assert all(figure[key].keys() == INTERVAL for key in (("safe",) if froze else ("raw", "safe", "more", "ratio")))
        assert figure["safe"]["median"] > 0
        assert figure["met"] in ("met", "NOT MET", "unclear", "-")
    assert compared.items() >= COMPARED.items()
