"""One run of one hazard: a fresh virtual stack, a sacrificial process on it, and what is seen of it from outside.

Invariant: whatever the program does, the run ends within the hazard's ``SECONDS`` and a little, and nothing of it is
left: it is the leader of a session of its own, which is killed as a group.  The demo itself never forks and never uses
PC/SC.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO, Any, NamedTuple, Optional

from ._judge import Run
from ._stage import PCSCD
from .hazards import Hazard

__all__ = ["Stopped", "run"]

_POLL = 0.01
_LAST_WORDS = 0.5  # seconds that a program gets to dump its stacks after it was given up
_LOG_TAIL = 3000


class Stopped(Exception):  # noqa: N818  # not an error: the demo was interrupted
    """The demo is ending; there is no result."""


class _End(NamedTuple):
    exit_status: Optional[int] = None
    killed_by: Optional[int] = None
    timed_out: Optional[float] = None


def run(hazard: Hazard, module: str, stop: threading.Event) -> Run:
    """Run a hazard's program on a stack of its own.

    :param module: the name of the scard module that it is to use.
    :param stop: set to have the run end at once.
    :raises PcscStackError: there is no virtual stack to be had.
    :raises Stopped: ``stop`` was set.
    """
    from pcsc_safe.testing import EchoCard, VirtualPcsc

    with VirtualPcsc(cards=[EchoCard(), EchoCard()], activate=False) as stack:
        # Settings of the user's would make it another demonstration.
        env = {name: value for name, value in stack.env.items() if not name.startswith("PCSC_SAFE_")}
        return _sacrifice(hazard, module, {**env, PCSCD: str(stack.pid)}, stop)


def _sacrifice(hazard: Hazard, module: str, env: dict[str, str], stop: threading.Event) -> Run:
    command = [sys.executable, "-m", "pcsc_safe.demo._stage", hazard.__name__, module, f"{hazard.SECONDS + 5}"]
    # Files, not pipes: nobody has to read them meanwhile, and a forgotten child can't keep them from ending.
    with tempfile.TemporaryFile() as reports, tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(  # noqa: S603  # every word of it is ours
            command, env=env, stdin=subprocess.DEVNULL, stdout=reports, stderr=log, start_new_session=True
        )
        try:
            end = _watch(process, hazard.SECONDS, stop)
        finally:
            _end_group(process)
        seconds = round(time.monotonic() - started, 2)
        return Run(module, _reported(reports), *end, seconds, _read(log)[-_LOG_TAIL:].decode(errors="replace"))


def _watch(process: subprocess.Popen[bytes], seconds: float, stop: threading.Event) -> _End:
    if _ended_within(process, seconds, stop):
        status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert status is not None
        if status.si_code == os.CLD_EXITED:
            return _End(exit_status=status.si_status)
        return _End(killed_by=status.si_status)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGALRM)
    _ended_within(process, _LAST_WORDS, stop)
    return _End(timed_out=seconds)


def _ended_within(process: subprocess.Popen[bytes], seconds: float, stop: threading.Event) -> bool:
    deadline = time.monotonic() + seconds
    # It is not reaped here: as long as it is a zombie its number is nobody else's, and the group can be killed by it.
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        if stop.wait(_POLL):
            raise Stopped
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _reported(reports: IO[bytes]) -> dict[str, dict[str, Any]]:
    """What the processes reported, the latest of each; lines that are no report are passed over."""
    reported: dict[str, dict[str, Any]] = {}
    for line in _read(reports).splitlines():
        with contextlib.suppress(ValueError, TypeError):
            process, observations = json.loads(line)
            reported.setdefault(process, {}).update(observations)
    return reported
