"""The benchmarks run to their end and report each measure; their figures are not tested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from places import ROOT

RUN = ROOT / "benchmarks" / "run.py"
INTERVAL = {"median", "low", "high", "first_quartile", "third_quartile"}
RAW, WRAPT, BY_HAND, SPAWN = "raw pyscard", "raw, wrapt imported", "check by hand", "spawn"
CALLS = (
    "SCardIsValidContext",
    "SCardTransmit, 8 bytes",
    "SCardStatus",
    "SCardConnect + Disconnect",
    "SCardEstablishContext + Release",
)
COMPARED = {
    **{name: {RAW, BY_HAND} for name in CALLS},
    "import, whole process": {RAW},
    "import, net": {RAW},
    "a card read, start to exit": {RAW, WRAPT},
    "private memory of a worker": {RAW, WRAPT},
    "first SCardEstablishContext": {RAW},
    **{
        f"{what}, {contexts}": {RAW, WRAPT}
        for what in ("os.fork()", "fork to reaped")
        for contexts in ("1 context", "10 contexts", "50 contexts", "100 contexts")
    },
    **{
        f"{what}, guard_native, {count} sockets": {"guard off"}
        for what in ("os.fork()", "fork to reaped")
        for count in (10, 1000)
    },
    **{
        f"os.fork(), {what} in {threads}": {RAW}
        for what in ("waits for events", "10 ms APDUs")
        for threads in ("1 thread", "2 threads", "4 threads", "8 threads")
    },
    "8 threads, 8 contexts": {RAW},
    "8 threads, 8 contexts, 10 ms": {RAW},
    "8 threads, 8 contexts, broker": {RAW},
    "8 threads, 2 on one busy context": {RAW},
    "8 threads, 1 context monitored": {RAW},
    "SCardTransmit, broker": {RAW},
    **{f"SCardTransmit of {ms} ms{through}": {RAW} for ms in (5, 50) for through in ("", ", broker")},
    "SCardTransmit, 8 bytes, recorded": {"pcsc_safe"},
    "first use in a child, cold broker": {RAW},
    "first use in a child, prestarted broker": {RAW},
    "first use in a child": {RAW, WRAPT},
    "first answer of a pool": {BY_HAND, SPAWN},
    "first answer of a pool, cold broker": {BY_HAND, SPAWN},
    "first answer of a pool, prestarted broker": {BY_HAND, SPAWN},
    **{
        name: {RAW}
        for name in (
            *("first exchange of a worker, 1 worker", "first exchange of a worker, 64 workers"),
            *("SCardTransmit, 190 clients", "Establish + Release, 190 clients"),
            *("Establish + Release, 10000 files", "os.fork(), 10000 files", "fork to reaped, 10000 files"),
            *("Connect + Disconnect, 16 readers", "all states, 16 readers"),
        )
    },
    "a task in a pool of 2": {BY_HAND, SPAWN},
    "a task in a pool of 2, broker": {BY_HAND, SPAWN},
}
PANELS = 10


pytestmark = pytest.mark.skipif(not RUN.exists(), reason="benchmarks/ is not part of this installation")


def run(output: Path, *arguments: str) -> str:
    """The output of ``benchmarks/run.py --fast --output``."""
    command = [sys.executable, str(RUN), "--fast", "--output", str(output), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=output.parent
    )
    try:
        printed, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors
    return printed


@pytest.mark.long
def test_benchmarks_run_to_their_end(tmp_path: Path) -> None:
    """``benchmarks/run.py --fast`` measures everything, and writes data, a page and a picture."""
    printed, output = run(tmp_path / "figures"), tmp_path / "figures"
    document, page = json.loads((output / "results.json").read_text()), (output / "results.md").read_text()
    assert document["fast"] is True
    assert document["machine"].keys() >= {"cpus", "pcsc-lite", "pcsc-safe", "pyscard", "wrapt"}
    compared: dict[str, set[str]] = {}
    for figure in document["figures"]:
        compared.setdefault(figure["name"], set()).add(figure["against"])
        assert figure["name"] in printed
        assert f"| {figure['name']} | {figure['against']} |" in page
        froze = figure["raw"] is None
        assert froze == (figure["froze"] == figure["rounds"])
        assert all(figure[key].keys() == INTERVAL for key in (("safe",) if froze else ("raw", "safe", "more", "ratio")))
        assert figure["safe"]["median"] > 0
        assert figure["met"] in ("met", "NOT MET", "unclear", "-")
    assert compared == {**compared, **COMPARED}
    assert len(panels(output)) == PANELS


def panels(output: Path) -> list[ElementTree.Element]:
    """The diagrams of the picture."""
    return ElementTree.parse(output / "results.svg").getroot().findall("{http://www.w3.org/2000/svg}g")


def test_benchmarks_of_one_measure(tmp_path: Path) -> None:
    """``--only`` measures nothing else, and the picture has no diagram without figures."""
    printed = run(tmp_path / "figures", "--only", "first-establish")
    assert "first SCardEstablishContext  raw pyscard" in printed
    assert "SCardTransmit, 8 bytes" not in printed
    assert not panels(tmp_path / "figures")
