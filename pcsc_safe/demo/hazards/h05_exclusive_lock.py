"""Hazard 5: the owner of an exclusive connection is killed while a forked child of it idles."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from .._judge import Finding, Run
from .._stage import Stage

NUMBER, NAME, SECONDS = "5", "the owner dies, an idle child keeps its card locked", 10.0
PATIENCE = 1.5  # seconds that pcscd gets to notice that the owner is gone


def program(stage: Stage) -> None:
    """Kill the owner; try to connect; kill the idle child; try again."""
    said, say = os.pipe()

    def owner() -> None:
        context, readers = stage.establish()
        hresult = _connect(stage, context, readers, stage.scard.SCARD_SHARE_EXCLUSIVE)
        os.write(say, b"%d %d\n" % (hresult, stage.fork(_idle) if hresult == 0 else 0))
        os.kill(os.getpid(), signal.SIGKILL)

    killed = stage.wait(stage.fork(owner)) == -signal.SIGKILL
    os.close(say)  # so that the read ends if the owner has failed
    hresult, idle = map(int, os.read(said, 100).split())
    stage.report("owner", code=stage.name(hresult), killed=killed)
    if not idle:
        return  # PID 0 would be this process's group
    context, readers = stage.establish()
    started = time.monotonic()
    code = _connect_soon(stage, context, readers)
    waited = round(time.monotonic() - started, 3)
    stage.report("other", code=code, waited=waited, idle_alive=_alive(idle))
    os.kill(idle, signal.SIGKILL)
    if code != "SCARD_S_SUCCESS":
        stage.report("other", code_after_idle_died=_connect_soon(stage, context, readers))


def _idle() -> None:
    # Until it is killed: by the program, or by the demo with the whole group.
    signal.pause()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _connect(stage: Stage, context: Any, readers: list[str], share_mode: int) -> int:
    hresult, _, _ = stage.scard.SCardConnect(context, readers[0], share_mode, stage.scard.SCARD_PROTOCOL_ANY)
    return int(hresult)


def _connect_soon(stage: Stage, context: Any, readers: list[str]) -> str:
    """The result of SCardConnect, called until it succeeds or the time is up."""
    deadline = time.monotonic() + PATIENCE
    while True:
        hresult = _connect(stage, context, readers, stage.scard.SCARD_SHARE_SHARED)
        if hresult == 0 or time.monotonic() > deadline:
            return stage.name(hresult)
        time.sleep(0.02)


def judge(run: Run) -> Finding:
    """Shown by a third process that can't connect although the owner is dead."""
    held, killed = run.of("owner", "code", "killed")
    code, waited, alive, later = run.of("other", "code", "waited", "idle_alive", "code_after_idle_died")
    if held != "SCARD_S_SUCCESS" or not killed or code is None or not alive:
        return Finding([], [])
    if code == "SCARD_S_SUCCESS":
        free = f"the card was free {1000 * waited:.0f} ms after its owner was killed, while the idle child was alive"
        return Finding([], [free])
    harm = [f"the card was still locked {waited:.1f} s after its owner was killed ({code}), while its child was alive"]
    if later == "SCARD_S_SUCCESS":
        harm.append("it was free after the child was killed, too")
    return Finding(harm, [])
