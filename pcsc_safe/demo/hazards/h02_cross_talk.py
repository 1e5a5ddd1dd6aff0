"""Hazard 2: parent and child use one inherited card connection at the same time.

The result depends on who reads first: wrong bytes, failed calls, a crash, or a process that waits for ever.  So it is
tried many times, each time with a new parent and child.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Optional

from .._judge import Finding, Run, patience
from .._stage import Stage

NUMBER, NAME, SECONDS = "2", "cross-talk: parent and child use one connection", 25.0
FORKS, EXCHANGES = 20, 25
PATIENCE = 2.0  # seconds that a process on raw pyscard gets for its exchanges
ENOUGH = 7.0  # seconds after which no further fork is tried


def program(stage: Stage) -> None:
    """Let pairs exchange commands with the card, and compare each response with its command."""
    started, seconds = time.monotonic(), patience(stage.scard.__name__, PATIENCE) + 0.5
    for number in range(FORKS):
        if time.monotonic() - started > ENOUGH:
            break
        parent = stage.fork(lambda number=number: _pair(stage, number), seconds=seconds)  # type: ignore[misc]
        stage.report(f"parent {number}", ended=stage.wait(parent))


def _pair(stage: Stage, number: int) -> None:
    context, card, protocol = stage.connect()
    ready, go = os.pipe()

    def child() -> None:
        os.write(go, b"!")
        _exchange(stage, f"child {number}", card, protocol)

    pid = stage.fork(child, seconds=patience(stage.scard.__name__, PATIENCE))
    os.read(ready, 1)
    _exchange(stage, f"parent {number}", card, protocol)
    stage.report(f"child {number}", ended=stage.wait(pid))
    stage.scard.SCardReleaseContext(context)


def _exchange(stage: Stage, who: str, card: Any, protocol: int) -> None:
    """Exchange commands until one fails, as an application would; report after each: the process may die."""
    wrong = 0
    stage.report(who, asked=0, wrong=0, failed=0)
    for asked in range(1, EXCHANGES + 1):
        data = who.encode() + bytes([asked])
        hresult, answer = stage.transmit(card, 0x01, data)
        if hresult == stage.scard.SCARD_W_RESET_CARD and asked == 1:
            # PC/SC's own way to say "not the session you knew": an application connects again.
            stage.report(who, told_reset=1)
            stage.scard.SCardReconnect(card, stage.scard.SCARD_SHARE_SHARED, protocol, stage.scard.SCARD_LEAVE_CARD)
            hresult, answer = stage.transmit(card, 0x01, data)
        wrong += hresult == 0 and bytes(byte & 255 for byte in answer) != data + b"\x90\x00"
        stage.report(who, asked=asked, wrong=wrong, failed=int(hresult != 0))
        if hresult:
            return


def judge(run: Run) -> Finding:
    """Shown by responses to another process's command, failures, deaths, and processes that never end."""
    total = {name: sum(seen.get(name, 0) for seen in run.reported.values()) for name in ("asked", "wrong", "failed")}
    ends = [seen.get("ended") for seen in run.reported.values()]
    forks = sum(who.startswith("parent") for who in run.reported)
    harm = [f"{total['wrong']} calls returned SCARD_S_SUCCESS and wrong bytes"] if total["wrong"] else []
    harm += [f"{total['failed']} calls failed"] if total["failed"] else []
    harm += _deaths(ends, patience(run.module, PATIENCE))
    if harm:
        return Finding([f"in {forks} forks {harm[0]}", *harm[1:]], [])
    if not forks or any(end != 0 for end in ends) or total["asked"] != len(ends) * EXCHANGES:
        return Finding([], [])
    told = sum(seen.get("told_reset", 0) for seen in run.reported.values())
    proof = [f"in {forks} forks all {total['asked']} calls returned the right bytes"]
    return Finding([], proof + ([f"{told} children got SCARD_W_RESET_CARD once and connected again"] if told else []))


def _deaths(ends: list[Optional[int]], seconds: float) -> list[str]:
    said = []
    for end in sorted({end for end in ends if end is not None and end < 0}):
        count = ends.count(end)
        processes = "1 process" if count == 1 else f"{count} processes"
        if -end == signal.SIGALRM:
            said.append(f"{processes} did not finish in {seconds:g} s")
        else:
            said.append(f"{processes} died of {signal.Signals(-end).name}")
    return said
