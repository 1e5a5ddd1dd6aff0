"""The benchmarks run to their end and say what they promise to; what the figures are is not tested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

RUN = Path(__file__).parent.parent / "benchmarks" / "run.py"
INTERVAL = {"median", "low", "high", "first_quartile", "third_quartile"}
COMPARED = {
    "SCardIsValidContext": {"raw pyscard", "check by hand"},
    "SCardTransmit, 8 bytes": {"raw pyscard", "check by hand"},
    "SCardStatus": {"raw pyscard", "check by hand"},
    "SCardConnect + Disconnect": {"raw pyscard", "check by hand"},
    "SCardEstablishContext + Release": {"raw pyscard", "check by hand"},
    "import, whole process": {"raw pyscard"},
    "import, net": {"raw pyscard"},
    "first SCardEstablishContext": {"raw pyscard"},
    **{
        f"{what}, {count}": {"raw pyscard", "raw, wrapt imported"}
        for what in ("os.fork()", "fork to reaped")
        for count in ("1 context", "10 contexts", "50 contexts", "100 contexts")
    },
    **{
        f"{what}, guard_native, {count} sockets": {"guard off"}
        for what in ("os.fork()", "fork to reaped")
        for count in (10, 1000)
    },
    **{
        f"os.fork(), {what} in {count} thread{'s' * (count > 1)}": {"raw pyscard"}
        for what in ("waits for events", "10 ms APDUs")
        for count in (1, 2, 4, 8)
    },
    "8 threads, 8 contexts": {"raw pyscard"},
    "8 threads, 8 contexts, 10 ms": {"raw pyscard"},
    "8 threads, 2 on one busy context": {"raw pyscard"},
    "8 threads, 1 context monitored": {"raw pyscard"},
    "SCardTransmit, broker": {"raw pyscard"},
    "first answer of a pool": {"check by hand", "spawn"},
    "a task in a pool of 2": {"check by hand", "spawn"},
    "SCardTransmit, 8 bytes, recorded": {"pcsc_safe"},
    "first use in a child, cold broker": {"raw pyscard"},
    "first use in a child, prestarted broker": {"raw pyscard"},
    "first use in a child": {"raw pyscard", "raw, wrapt imported"},
}


@pytest.mark.skipif(not RUN.exists(), reason="benchmarks/ is not part of this installation")
def test_benchmarks_run_to_their_end(tmp_path: Path) -> None:
    """``benchmarks/run.py --fast`` measures everything, raw pyscard beside pcsc_safe, and writes it down."""
    command = [sys.executable, str(RUN), "--fast", "--output", str(tmp_path / "out")]
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
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    page = (tmp_path / "out" / "results.md").read_text()
    assert ElementTree.fromstring((tmp_path / "out" / "results.svg").read_text()).tag.endswith("svg")
    assert document["fast"] is True
    assert document["machine"].keys() >= {"platform", "cpus", "python", "pcsc-safe", "pyscard", "wrapt"}
    compared: dict[str, set[str]] = {}
    for figure in document["figures"]:
        compared.setdefault(figure["name"], set()).add(figure["against"])
        assert figure["name"] in output
        assert figure["name"] in page
        froze = figure["raw"] is None
        assert froze == (figure["froze"] == figure["rounds"])
        assert all(figure[key].keys() == INTERVAL for key in (("safe",) if froze else ("raw", "safe", "more", "ratio")))
        assert figure["safe"]["median"] > 0
        assert figure["met"] in ("met", "NOT MET", "unclear", "-")
    assert compared.items() >= COMPARED.items()
