"""``python -m pcsc_safe run --report``: watches a program until it ends, and tells what happened to PC/SC meanwhile.

The program is a child here, so that its end is seen however it ends; what it is told by a signal, it is passed on, and
the watcher ends as the program did.  Nothing here forks Python code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import _events
from ._events import Event

__all__ = ["end_as", "summary", "watch"]

_PASSED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
_FROM_TERMINAL = ("SIGINT", "SIGQUIT")


def watch(command: Sequence[str], environment: Mapping[str, str], *, report: bool) -> int:
    """Run a program, and print its report on stderr when it has ended.

    :param report: whether there is to be one.
    :return: its exit status; the negative number of the signal that ended it.
    """
    if not report:
        return _run(command, environment)
    with tempfile.TemporaryDirectory(prefix="pcsc_safe-") as directory:
        file = Path(directory, "events")
        file.touch(0o600)
        status = _run(command, {**environment, _events.VARIABLE: str(file)})
        events = [*_events.parse(file.read_text(errors="replace").splitlines())]
    print(summary(events), end="", file=sys.stderr, flush=True)
    return status


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    # What it was to inherit, it inherits, as if nobody stood between.
    process = subprocess.Popen(command, env=environment, close_fds=False)  # noqa: S603  # it is the user's

    def pass_on(number: int, frame: Any) -> None:
        if number not in at_terminal or not _have_terminal():
            process.send_signal(number)

    at_terminal = {getattr(signal, name, None) for name in _FROM_TERMINAL}
    for name in _PASSED_ON:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    return process.wait()


def _have_terminal() -> bool:
    """Whether Ctrl-C is for this process's group, so that the program was told by the terminal itself."""
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except (OSError, AttributeError):
        return False


def end_as(status: int) -> int:
    """End by the signal that ended the program, or return its exit status."""
    if status >= 0:
        return status
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core dump is enough
    with contextlib.suppress(OSError):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    return 128 - status


_TOLD = {
    "retrofit": "imported pyscard, and was retrofitted",
    "fork": "used PC/SC after its fork from process {parent}",
    "reestablished": "has a context of its own in the place of process {owner}'s",
    "recovered": "established a context anew when pcscd had gone",
    "broker": "started the broker {broker}",
    "handover": "handed {contexts} context(s) over to a forked child",
    "share": "shared {contexts} context(s) with a forked child",
}
_COUNTED = {
    "fork": "forked processes that used PC/SC",
    "reestablished": "contexts re-established",
    "broker": "brokers started",
    "handover": "handovers",
}


def summary(events: Iterable[Event]) -> str:
    """The report: a line of sums, and one for each thing that a process told."""
    events = list(events)
    kinds = Counter(event.kind for event in events)
    lines = ["pcsc_safe: " + ", ".join(f"{what}: {kinds[kind]}" for kind, what in _COUNTED.items())]
    parents: dict[int, int] = {}
    for event in events:
        parents.setdefault(event.pid, event.parent)
    for pid, parent in parents.items():
        lines.append(f"  process {pid}, parent {parent}")
        told = Counter(_sentence(event) for event in events if event.pid == pid)
        lines += [f"    {sentence}" + (f" ({times} times)" if times > 1 else "") for sentence, times in told.items()]
    return "\n".join(lines) + "\n"


def _sentence(event: Event) -> str:
    try:
        return _TOLD[event.kind].format_map(event.fields)
    except KeyError:
        return " ".join([event.kind, *(f"{name}={value}" for name, value in event.fields.items())])
