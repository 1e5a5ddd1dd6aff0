"""Hazard 11: a session is ended from outside, SCardTransmit fails, and returns memory of the process.

First a child releases its copy of the handles; then pcscd ends.  In the second case the call also fails under
pcsc_safe.  Only the data that it returns beside the error code count.
"""

from __future__ import annotations

from typing import Any

from .._judge import Finding, Run
from .._stage import Stage

NUMBER, NAME, SECONDS = "11", "a failed call returns memory of the process", 8.0
ROUNDS = 20
SECRET = b"a secret of this process;"
BUFFER = 65538  # about what pyscard allocates for an answer
ENDINGS = {"child": "after its child dropped its copy", "pcscd": "after pcscd died"}


def program(stage: Stage) -> None:
    """Let the session end twice, and check what the calls after it return."""
    context, card, _ = stage.connect()

    def child() -> None:
        stage.scard.SCardDisconnect(card, stage.scard.SCARD_LEAVE_CARD)
        stage.scard.SCardReleaseContext(context)

    stage.wait(stage.fork(child))
    _ask(stage, "child", card)
    stage.kill_pcscd()
    _ask(stage, "pcscd", card)


def _ask(stage: Stage, ended_by: str, card: Any) -> None:
    codes, failed, filled, told = set(), 0, 0, 0
    for _ in range(ROUNDS):
        # Freed immediately, so that malloc gives its memory to pyscard next.
        bytearray(SECRET * (BUFFER // len(SECRET)))
        hresult, answer = stage.transmit(card, 0x01, b"anything")
        codes.add(stage.name(hresult))
        failed += hresult != 0
        filled += bool(hresult and answer)
        told += bool(hresult and SECRET in bytes(byte & 255 for byte in answer))
    stage.report(ended_by, calls=ROUNDS, codes=sorted(codes), failed=failed, filled=filled, held_secret=told)


def judge(run: Run) -> Finding:
    """Shown by failed calls that return data."""
    harm, proof = [], []
    for ended_by, when in ENDINGS.items():
        calls, codes, failed, filled, told = run.of(ended_by, "calls", "codes", "failed", "filled", "held_secret")
        if calls is None:
            continue
        if filled:
            harm.append(
                f"{when} {failed} of {calls} calls failed ({', '.join(codes)}): {filled} returned memory of the "
                f"process, {told} of them a secret"
            )
        elif failed:
            proof.append(f"{when} {failed} of {calls} calls failed ({', '.join(codes)}) and returned only the code")
        else:
            proof.append(f"{when} all {calls} calls succeeded")
    # Only a call that fails can show anything.
    failed = run.of("pcscd", "failed")[0]
    return Finding(harm, proof if failed and len(proof) == len(ENDINGS) else [])
