"""A disposable process: it may crash, hang, or leave children behind, and doesn't affect the process that started it.

Invariant: whatever the process does, it ends soon after its time is over, and leaves nothing behind: it leads a
separate session, which is killed as a group.  Nothing here forks Python code or uses PC/SC.
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
from collections.abc import Mapping, Sequence
from typing import IO, Any, Callable, NamedTuple, Optional

__all__ = ["Ended", "Stopped", "command_of", "default_sigchld", "run_disposable"]

_POLL = 0.01
_LAST_WORDS = 0.5  # seconds that a process gets to dump its stacks after it was given up
_LOG_TAIL = 3000


class Stopped(Exception):  # noqa: N818  # not an error: the process that started it was interrupted
    """The starter is ending; there is no result."""


class Ended(NamedTuple):
    """What is known of a disposable process.

    :ivar reported: what it and its children reported, by process: ``{"child": {"wrong": 3}}``.
    :ivar exit_status: its exit status, if it ended by itself.
    :ivar killed_by: the signal that ended it, unless this module sent it.
    :ivar timed_out: the seconds that it was given, if it needed more.
    :ivar seconds: how long it took.
    :ivar log: the end of what it wrote to stderr.
    """

    reported: dict[str, dict[str, Any]]
    exit_status: Optional[int] = None
    killed_by: Optional[int] = None
    timed_out: Optional[float] = None
    seconds: float = 0.0
    log: str = ""


def default_sigchld() -> Optional[Callable[[], object]]:
    """Undo what this process may have inherited: where SIGCHLD is ignored, no child can be waited for.

    :return: the ``preexec_fn`` of a subprocess that is to ignore SIGCHLD again; None if it wasn't ignored.
    """
    if not hasattr(signal, "SIGCHLD") or signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN:
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def command_of(module: str) -> list[str]:
    """The command that runs a module of this package with this interpreter.

    ``python -m`` looks for modules in the current directory first.  This command does that only if this process does:
    a file there could have the name of a module that the package imports.
    """
    try:
        looks_here = os.getcwd() in [os.path.abspath(path) for path in sys.path]
    except OSError:  # the current directory was removed
        looks_here = False
    # With -c, the current directory is the first one, and empty.
    forget = "" if looks_here else "import sys; sys.path[0] or sys.path.pop(0); "
    flags = ["-I"] if sys.flags.isolated else ["-E"] if sys.flags.ignore_environment else []
    code = f"import runpy; runpy.run_module({module!r}, None, '__main__', True)"
    return [sys.executable, *flags, "-c", forget + code]


def run_disposable(
    command: Sequence[str], env: Mapping[str, str], seconds: float, stop: Optional[threading.Event] = None
) -> Ended:
    """Run a program that may crash or hang.

    :param command: of the program, which reports in lines of JSON, ``["child", {"wrong": 3}]``, on descriptor 1.
    :param seconds: that it may take.
    :param stop: set it to end the program immediately.
    :raises Stopped: ``stop`` was set.
    """
    # Files, not pipes: they need no reader, and a remaining child can't prevent their end.
    with tempfile.TemporaryFile() as reports, tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(  # noqa: S603  # every word of it is ours
            command, env=env, stdin=subprocess.DEVNULL, stdout=reports, stderr=log, start_new_session=True
        )
        try:
            end = _watch(process, seconds, stop or threading.Event())
        finally:
            _end_group(process)
        took = round(time.monotonic() - started, 2)
        return Ended(_reported(reports), *end, took, _read(log)[-_LOG_TAIL:].decode(errors="replace"))


_End = tuple[Optional[int], Optional[int], Optional[float]]


def _watch(process: subprocess.Popen[bytes], seconds: float, stop: threading.Event) -> _End:
    if _ended_within(process, seconds, stop):
        status = _status(process)
        return (status, None, None) if status >= 0 else (None, -status, None)
    with contextlib.suppress(OSError, AttributeError):  # Windows has no groups
        os.killpg(process.pid, signal.SIGALRM)
    _ended_within(process, _LAST_WORDS, stop)
    return None, None, seconds


def _ended_within(process: subprocess.Popen[bytes], seconds: float, stop: threading.Event) -> bool:
    deadline = time.monotonic() + seconds
    while not _has_ended(process):
        if time.monotonic() > deadline:
            return False
        if stop.wait(_POLL):
            raise Stopped
    return True


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    if sys.platform != "linux":  # macOS has no waitid before Python 3.13
        return process.poll() is not None
    # It is not reaped here: as long as it is a zombie its PID isn't reused, so its group can be killed by this number.
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _status(process: subprocess.Popen[bytes]) -> int:
    """Its exit status, or the negative number of the signal that ended it."""
    if sys.platform != "linux":
        return process.wait()
    status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert status is not None
    return int(status.si_status if status.si_code == os.CLD_EXITED else -status.si_status)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _reported(reports: IO[bytes]) -> dict[str, dict[str, Any]]:
    """What the processes reported, the latest report of each; other lines are ignored."""
    reported: dict[str, dict[str, Any]] = {}
    for line in _read(reports).splitlines():
        with contextlib.suppress(ValueError, TypeError):
            process, observations = json.loads(line)
            reported.setdefault(process, {}).update(observations)
    return reported
