"""Hazard 3: a forked child drops its copy of a pyscard connection, whose finalizer powers the parent's card off."""

from __future__ import annotations

import gc

from .._judge import Finding, Run, death
from .._stage import Stage

NUMBER, NAME, SECONDS = "3", "a connection dropped in the child: card off", 8.0
VERIFY, IS_VERIFIED = [0x80, 0x20, 0, 0, 0], [0x80, 0x30, 0, 0, 0]


def program(stage: Stage) -> None:
    """Verify the PIN, fork a child that drops the connection, and check whether the PIN is still verified."""
    stage.retrofit()
    from smartcard.Exceptions import SmartcardException
    from smartcard.System import readers

    dropped = [readers()[0].createConnection()]
    kept = dropped[0]
    kept.connect()
    kept.transmit(VERIFY)
    stage.report("parent", before=kept.transmit(IS_VERIFIED)[0])

    def child() -> None:
        nonlocal kept
        del kept
        dropped.clear()
        gc.collect()

    stage.report("parent", child_ended=stage.wait(stage.fork(child)))
    try:
        stage.report("parent", after=kept.transmit(IS_VERIFIED)[0])
    except SmartcardException as error:
        stage.report("parent", error=str(error).partition(":")[0])


def judge(run: Run) -> Finding:
    """Shown by a PIN that is no longer verified, or a call that fails, in the parent."""
    before, after, error, ended = run.of("parent", "before", "after", "error", "child_ended")
    harm = [f"after the child dropped the connection the parent got: {error}"] if error else []
    harm += ["the parent's PIN was no longer verified"] if after == [0] else []
    harm += death("the child", ended)
    if before != [1] or after != [1] or ended != 0:
        return Finding(harm, [])
    return Finding(harm, ["the child dropped the connection, and the parent's PIN stayed verified"])
