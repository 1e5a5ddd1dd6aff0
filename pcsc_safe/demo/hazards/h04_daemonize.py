"""Hazard 4: a daemon asks for the PIN and forks; its parent's orderly exit ends the session."""

from __future__ import annotations

import os
import sys

from .._judge import Finding, Run
from .._stage import Stage

NUMBER, NAME, SECONDS = "4", "daemonize: the parent's exit ends the session", 8.0
VERIFY, IS_VERIFIED = [0x80, 0x20, 0, 0, 0], [0x80, 0x30, 0, 0, 0]


def program(stage: Stage) -> None:
    """Start a program that daemonizes in the usual way, and read what the daemon reports."""
    read_end, write_end = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        os.close(read_end)
        _daemonizes(stage, write_end)
    os.close(write_end)
    stage.report("launcher", ended=stage.wait(launcher))
    os.read(read_end, 1)  # until the daemon has ended


def _daemonizes(stage: Stage, until: int) -> None:
    stage.watch()
    handover = stage.retrofit()
    from smartcard.System import readers

    connection = readers()[0].createConnection()
    connection.connect()
    connection.transmit(VERIFY)
    stage.report("launcher", before=connection.transmit(IS_VERIFIED)[0])
    gone, going = os.pipe()
    with handover():
        pid = os.fork()
    if pid:
        sys.exit(0)  # atexit functions, finalizers and all
    stage.watch()
    os.close(going)
    os.read(gone, 1)  # until the parent has exited
    try:
        stage.report("daemon", after=connection.transmit(IS_VERIFIED)[0])
    except Exception as error:
        stage.report("daemon", error=str(error).partition(":")[0])
    finally:
        os.close(until)
        os._exit(0)


def judge(run: Run) -> Finding:
    """Shown by a PIN that is no longer verified, or a call that fails, in the daemon."""
    before, ended = run.of("launcher", "before", "ended")
    after, error = run.of("daemon", "after", "error")
    harm = [f"after its parent had exited, the daemon got: {error}"] if error else []
    harm += ["after its parent had exited, the daemon's PIN was no longer verified"] if after == [0] else []
    if before != [1] or after != [1] or ended != 0:
        return Finding(harm, [])
    return Finding(harm, ["its parent exited, and the daemon's PIN stayed verified"])
