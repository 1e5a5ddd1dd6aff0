"""Hazard 10: fork() is called by C code, so Python's at-fork hooks do not run; the child releases its copy."""

from __future__ import annotations

import ctypes

from .._judge import Finding, Run, death
from .._stage import Stage

NUMBER, NAME, SECONDS = "10", "fork() called from C, the child releases its copy", 8.0
VERIFY, IS_VERIFIED = 0x20, 0x30


def program(stage: Stage) -> None:
    """Verify the PIN in the parent, let the child clean up, and check whether the PIN is still verified."""
    context, card, _ = stage.connect()
    stage.transmit(card, VERIFY)
    stage.report("parent", verified=_verified(stage, card)[1])

    def child() -> None:
        disconnected = stage.scard.SCardDisconnect(card, stage.scard.SCARD_UNPOWER_CARD)
        released = stage.scard.SCardReleaseContext(context)
        stage.report("child", disconnect=stage.name(disconnected), release=stage.name(released))

    pid = stage.fork(child, ctypes.PyDLL(None).fork)
    stage.report("parent", child_ended=stage.wait(pid))
    code, verified = _verified(stage, card)
    stage.report("parent", code_afterwards=code, verified_afterwards=verified)


def _verified(stage: Stage, card: object) -> tuple[str, bool]:
    hresult, answer = stage.transmit(card, IS_VERIFIED)
    return stage.name(hresult), hresult == 0 and answer == [1, 0x90, 0]


def judge(run: Run) -> Finding:
    """Shown by a parent whose session ended with its child's."""
    before, ended, code, after = run.of("parent", "verified", "child_ended", "code_afterwards", "verified_afterwards")
    (disconnected,) = run.of("child", "disconnect")
    if not before or disconnected is None:
        return Finding([], [])
    harm = death("the child", ended)
    if code == "SCARD_S_SUCCESS" and after is False:
        harm.append("the child's SCardDisconnect ended the parent's PIN session")
    elif code not in (None, "SCARD_S_SUCCESS"):
        harm.append(f"the parent lost its session: its next SCardTransmit returned {code}")
    whole = after and ended == 0
    proof = f"the child's SCardDisconnect returned {disconnected}, and the parent's PIN stayed verified"
    return Finding(harm, [proof] if whole else [])
