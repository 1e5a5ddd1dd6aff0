"""Runs a program as a child, and detects when it, and the other processes that write records, end.

The watcher forwards signals to the program, and ends as the program did.  It detects the end of other processes by a
pidfd, which Linux has, and for which it need not be their parent.  Nothing here forks Python code, but to restore an
ignored SIGCHLD in the program.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

from . import events, records

__all__ = ["Ends", "exit_as", "run"]

_FORWARDED = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
_FROM_TERMINAL = ("SIGINT", "SIGQUIT")
_CHECK_INTERVAL = 0.005  # s
_LATE_RECORD_TIMEOUT = 0.25  # s; a child may begin its record when its parent has ended already
_MESSAGE_AFTER = 2.0  # s, after which a message names the processes that are still running


def run(command: Sequence[str], environment: Mapping[str, str], ends: Optional[Ends] = None) -> int:
    """Run a program until it ends.

    :param ends: watches, and waits for processes that outlive the program; a signal ends that wait.
    :return: its exit status, or the negative number of the signal that ended it.
    """
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []  # a signal that arrives while the program starts must not end this process alone

    def forward(number: int, frame: Any) -> None:
        if not started:
            early.append(number)
        elif started[0].returncode is not None and ends is not None:
            if number not in ignored:
                ends.stop()
        elif number not in at_terminal or not _have_terminal():
            _send(started[0], number)

    at_terminal = {getattr(signal, name, None) for name in _FROM_TERMINAL}
    forwarded = [getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)]
    # Ignored because of nohup, or in the background of a script.  The program inherits this.
    ignored = [number for number in forwarded if signal.getsignal(number) is signal.SIG_IGN]
    for number in forwarded:
        if number not in ignored:
            signal.signal(number, forward)
    # The program inherits the same descriptors as without this process.
    started.append(subprocess.Popen(command, env=environment, close_fds=False, preexec_fn=_default_sigchld()))  # noqa: S603  # it is the user's
    process = started[0]
    for number in early:
        _send(process, number)
    for number in ignored:
        signal.signal(number, forward)
    if ends is None:
        return process.wait()
    ends.watch()
    status = process.wait()
    ends.wait_for_the_rest()
    return status


def _default_sigchld() -> Optional[Callable[[], object]]:
    """Make it possible to wait for the program, although SIGCHLD may be ignored.

    :return: what the program's process has to call before its exec, to ignore SIGCHLD again.
    """
    if not hasattr(signal, "SIGCHLD") or signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN:
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(OSError):  # it has become another user's
        process.send_signal(number)


def _have_terminal() -> bool:
    """Whether the terminal sends Ctrl-C to this process group, and therefore to the program itself."""
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except (OSError, AttributeError):
        return False


def exit_as(status: int) -> int:
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


class Ends:
    """When the processes that keep records in a directory ended.

    :ivar at: the time of each end, by the name of the record; by monotonic_ns().
    :ivar before: for processes that ended too quickly: when it was observed that they had already ended.
    """

    def __init__(self, directory: Path) -> None:
        self.at: dict[str, int] = {}
        self.before: dict[str, int] = {}
        self._directory = directory
        self._space = events.pid_space()
        self._seen: set[str] = set()
        self._alive: dict[int, str] = {}  # by pidfd
        self._poll = select.poll()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._all_ended = threading.Event()
        self._program_has_ended = False
        self._stopped = False

    def watch(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def wait_for_the_rest(self) -> None:
        """Wait until all these processes have ended."""
        self._program_has_ended = True
        if not self._all_ended.wait(_MESSAGE_AFTER):
            pids = ", ".join(sorted(name.partition("-")[0] for name in list(self._alive.values())))
            with contextlib.suppress(OSError):  # the program's exit status is more important
                print(
                    f"pcsc_safe: the program has ended, but process {pids} still runs: recording continues "
                    "until it ends or you press Ctrl-C",
                    file=sys.stderr,
                    flush=True,
                )
            while not self._all_ended.wait(_MESSAGE_AFTER):
                pass

    def stop(self) -> None:
        """Stop watching and waiting."""
        self._stopped = True

    def _watch(self) -> None:
        busy = time.monotonic()
        try:
            while not self._stopped:
                self._check()
                now = time.monotonic()
                busy = now if self._alive or not self._program_has_ended else busy
                if now - busy > _LATE_RECORD_TIMEOUT:
                    break
        finally:
            self._all_ended.set()

    def _check(self) -> None:
        with contextlib.suppress(OSError):  # somebody may have removed it
            for name in records.names(self._directory) - self._seen:
                self._watch_process(name)
        if not self._alive:
            time.sleep(_CHECK_INTERVAL)
        for descriptor, _ in self._poll.poll(_CHECK_INTERVAL * 1000):
            self.at[self._alive.pop(descriptor)] = time.monotonic_ns()
            self._poll.unregister(descriptor)
            os.close(descriptor)

    def _watch_process(self, name: str) -> None:
        recorded = records.events(records.read_one(self._directory, name))
        if not recorded:
            return  # it is about to be written
        self._seen.add(name)
        if not hasattr(os, "pidfd_open") or recorded[0].fields.get("space") != self._space:
            return
        try:
            descriptor = os.pidfd_open(recorded[0].pid)
        except ProcessLookupError:
            self.before[name] = time.monotonic_ns()
        except OSError:
            pass  # Linux is older than 5.3
        else:
            self._alive[descriptor] = name
            self._poll.register(descriptor, select.POLLIN)
