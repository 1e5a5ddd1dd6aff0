"""Hazard 7: no process forks; one thread waits for events on a context, and another uses the same context."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable

from .._judge import Finding, Run
from .._stage import Stage

NUMBER, NAME, SECONDS = "7", "no fork: a waiting thread freezes all others", 8.0
PATIENCE = 1.5  # seconds that the calls get, all together, after the last has begun
BETWEEN = 0.2  # seconds from one call to the next, so that they come in this order
SAYS = {
    "wait": "the wait itself",
    "same context": "SCardListReaders on its context",
    "other context": "SCardListReaders on another context",
    "cancel": "SCardCancel",
}


def program(stage: Stage) -> None:
    """Begin the calls one after the other, each in a separate thread, and report which of them end."""
    scard = stage.scard
    context, readers = stage.establish()
    other, _ = stage.establish()
    _, states = scard.SCardGetStatusChange(context, 0, [(readers[0], scard.SCARD_STATE_UNAWARE)])
    known = [(name, state) for name, state, _ in states]
    calls: dict[str, Callable[[], Any]] = {
        "wait": lambda: scard.SCardGetStatusChange(context, scard.INFINITE, known)[0],
        "same context": lambda: scard.SCardListReaders(context, [])[0],
        "other context": lambda: scard.SCardListReaders(other, [])[0],
        "cancel": lambda: scard.SCardCancel(context),
    }
    threads = [threading.Thread(target=_time, args=(stage, *call), daemon=True) for call in calls.items()]
    for thread in threads:
        thread.start()
        time.sleep(BETWEEN)
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    stage.report("program", watched=PATIENCE)


def _time(stage: Stage, name: str, call: Callable[[], int]) -> None:
    started = time.monotonic()
    hresult = call()
    stage.report(name, code=stage.name(hresult), seconds=round(time.monotonic() - started, 3))


def judge(run: Run) -> Finding:
    """Shown by calls that do not end."""
    (watched,) = run.of("program", "watched")
    if watched is None:
        return Finding([], [])
    code = {name: run.of(name, "code")[0] for name in SAYS}
    stuck = [says for name, says in SAYS.items() if code[name] is None]
    harm = [f"still frozen after {watched:g} s: {', '.join(stuck)}"] if stuck else []
    for name in ("same context", "other context", "cancel"):
        if code[name] not in (None, "SCARD_S_SUCCESS"):
            harm.append(f"{SAYS[name]} returned {code[name]}")
    if harm or code["wait"] != "SCARD_E_CANCELLED":
        return Finding(harm, [])
    took = 1000 * max(run.of(name, "seconds")[0] for name in ("same context", "other context"))
    proof = f"calls on the same and on another context took {took:.0f} ms at most, SCardCancel ended the wait"
    return Finding([], [proof])
