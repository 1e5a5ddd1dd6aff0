"""Hazard 6: a process forks while three of its threads use one context, and its children establish new contexts.

A thread that waits for a busy context in libpcsclite holds the lock of the whole process.  In a child that is forked
then, this lock stays locked, and no thread of the child holds it.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from .._judge import Finding, Run, patience
from .._stage import Stage

NUMBER, NAME, SECONDS = "6", "fork while threads share a context", 30.0
THREADS, FORKS = 3, 10
PATIENCE = 4.0  # seconds that a child on raw pyscard gets for its SCardEstablishContext
WAIT_10_MS = [0x80, 0x02, 0x01, 0x00, 0x01, 0x07]


def program(stage: Stage) -> None:
    """Fork a few times under load; check which children get a context, and whether the threads' calls succeed."""
    _, card, _ = stage.connect()
    done: list[int] = []
    stop = threading.Event()
    threads = [threading.Thread(target=_work, args=(stage, card, done, stop), daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while len(done) < THREADS and time.monotonic() < deadline:
        time.sleep(0.005)
    children = [_fork(stage, number) for number in range(FORKS)]
    for number, child in enumerate(children):
        stage.report(f"child {number}", ended=stage.wait(child))
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    failed = sum(hresult != 0 for hresult in done)
    stage.report("parent", calls=len(done), failed=failed, stuck=sum(thread.is_alive() for thread in threads))


def _work(stage: Stage, card: Any, done: list[int], stop: threading.Event) -> None:
    while not stop.is_set():
        done.append(stage.scard.SCardTransmit(card, stage.scard.SCARD_PCI_T1, WAIT_10_MS)[0])


def _fork(stage: Stage, number: int) -> int:
    def child() -> None:
        hresult, _ = stage.scard.SCardEstablishContext(stage.scard.SCARD_SCOPE_SYSTEM)
        stage.report(f"child {number}", code=stage.name(hresult))

    return stage.fork(child, seconds=patience(stage.scard.__name__, PATIENCE))


def judge(run: Run) -> Finding:
    """Shown by children that hang, or are refused, in their own SCardEstablishContext; and by calls that fail."""
    children = [seen for who, seen in run.reported.items() if who.startswith("child")]
    hung = sum(seen.get("ended") == -signal.SIGALRM for seen in children)
    died = sum(seen.get("ended", 0) < 0 for seen in children) - hung
    codes = sorted({seen["code"] for seen in children if "code" in seen} - {"SCARD_S_SUCCESS"})
    calls, failed, stuck = run.of("parent", "calls", "failed", "stuck")
    of = f"of {len(children)} children"
    harm = [f"{hung} {of} hung in SCardEstablishContext for a new context"] if hung else []
    harm += [f"{died} {of} died of a signal"] if died else []
    harm += [f"a new context was refused: {', '.join(codes)}"] if codes else []
    harm += [f"{failed} of the threads' {calls} calls failed"] if failed else []
    harm += [f"{stuck} of the parent's threads did not end"] if stuck else []
    whole = len(children) == FORKS and all(seen.get("ended") == 0 and "code" in seen for seen in children)
    if harm or not whole or not calls:
        return Finding(harm, [])
    return Finding([], [f"all {len(children)} children got their own contexts, and all {calls} calls succeeded"])
