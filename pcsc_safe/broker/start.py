"""Starts a broker: by exec, never by a fork of Python code.

``os.posix_spawn`` runs no at-fork hook and touches no lock, so it is safe in a forked child, in any thread.  The broker
gets the part of the environment that it needs, and no file descriptor but its door.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.machinery
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple, Optional

from .._core import descriptors, failures, one_step, python_path
from .._core.failures import is_ours
from ..errors import BrokerError

with contextlib.suppress(ImportError):  # Windows, where this module is imported as well, has none
    import fcntl

__all__ = [
    "DOOR",
    "FOR_FAMILY",
    "FOR_ONE",
    "IGNORED",
    "SOCKET_NAME",
    "Helper",
    "environment",
    "spawn",
]

DOOR = 3
"""The descriptor over which a broker gets its clients' connections."""

FOR_FAMILY, FOR_ONE = b"f", b"1"
"""The message with each connection that is passed through the door: whether other clients may follow."""

# POSIX has these numbers in kill(1).  Importing signal, which makes enums, would take another 0.7 ms.
_SIGHUP, _SIGINT, _SIGQUIT, _SIGKILL, _SIGTERM = 1, 2, 3, 9, 15
IGNORED = [_SIGINT, _SIGQUIT, _SIGTERM, _SIGHUP]
"""Signals that are for its client, which may still need the broker; end of file ends a broker."""

_MODULE = "pcsc_safe.broker"
FROZEN_BROKER = "--pcsc-safe-broker"
"""The argument by which a frozen program is its own broker."""

# Without -P or PYTHONSAFEPATH, which older Pythons don't know, python -m looks for modules in the current directory
# first; so does python -c, and says so by an empty entry.
_WITHOUT_CWD = "import sys; sys.path[0] or sys.path.pop(0); "
# Where this process has pcsc_safe and pyscard comes last: what else is there must not replace Python's own modules.
_WITH_PLACES = _WITHOUT_CWD + "sys.path += sys.argv[1:]; del sys.argv[1:]; "
_BY_ANY_PYTHON = _WITH_PLACES + f"import runpy; runpy.run_module({_MODULE!r}, None, '__main__', True)"
# python -S runs no .pth file and no sitecustomize: that is faster, and no tool that they load sees a PIN. Nothing that
# is imported is garbage, so main() is where the collector begins.
_BY_THIS_PYTHON = f"import gc; gc.disable(); {_WITH_PLACES}from {_MODULE}.__main__ import main; main([])"
SOCKET_NAME = "PCSCLITE_CSOCK_NAME"
_NEEDED = {
    *("HOME", "LANG", "LANGUAGE", "PATH", "TMPDIR", "TZ"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_FRAMEWORK_PATH", "DYLD_INSERT_LIBRARIES", "DYLD_LIBRARY_PATH"),
    *("PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "PYTHONUTF8"),
}
_NEEDED_PREFIXES = ("LC_", "PCSCLITE_", "LIBPCSCLITE_")
_ABOVE_STANDARD = 10
# EINVAL: there is no free number above _ABOVE_STANDARD.
_OUT_OF_RESOURCES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINVAL)
_LONGEST_TEXT = 4096  # bytes; of what a broker that can't start says
_EXIT_TIMEOUT = 1.0  # s
_REAP_TIMEOUT = 0.1  # s

can_freeze = False
"""Whether the program has called :func:`pcsc_safe.freeze_support`."""


class Helper(NamedTuple):
    """A broker's process, on its parent's side.

    :ivar pid: its PID.
    :ivar parent: the PID of the process that started it, which can wait for it.
    :ivar errors: a descriptor from which to read its messages until it is ready; None when it is ready.
    :ivar attempt: a shell command that shows a user why it doesn't start.
    """

    pid: int
    parent: int
    errors: Optional[descriptors.Descriptor]
    attempt: str = ""

    def failure_reason(self) -> str:
        """Its last message and how it ended; kills it if it is not ready."""
        if sys.platform == "win32":
            return ""
        ended = self._wait_for_exit(_EXIT_TIMEOUT)
        output, is_ready = self._read_output()
        if ended is None and is_ready:
            return "it accepts no more clients"
        if ended is None:
            self.kill()
        lines = output.decode(errors="replace").strip().splitlines()
        return "; ".join(filter(None, [lines[-1] if lines else "", ended or "it was not ready in time"]))

    def _read_output(self) -> tuple[bytes, bool]:
        """Its messages before it was ready; and whether it is ready, which it shows by closing its end."""
        if sys.platform == "win32" or self.errors is None or not self.errors.is_intact():
            return b"", True
        os.set_blocking(self.errors.number, False)
        output = b""
        while len(output) < _LONGEST_TEXT:
            try:
                more = os.read(self.errors.number, _LONGEST_TEXT)
            except OSError as error:
                if not is_ours(error):
                    raise
                return output, False
            if not more:
                return output, True
            output += more
        return output, False

    def close_errors(self) -> None:
        """Stop reading its messages, which are no longer needed."""
        if self.errors is not None and self.errors.is_intact():
            os.close(self.errors.number)

    def kill(self) -> None:
        """End its process, if it has not ended, and wait for that."""
        if sys.platform != "win32" and self._wait_for_exit(0) is None:
            with failures.suppress(OSError):
                os.kill(self.pid, _SIGKILL)
            self._wait_for_exit(_EXIT_TIMEOUT)

    def reap(self) -> None:
        """Wait for its process, which has ended or is about to end."""
        self._wait_for_exit(_REAP_TIMEOUT)

    def _wait_for_exit(self, timeout: float) -> Optional[str]:
        """How it ended; None if it is still alive.

        :param timeout: seconds to wait for that.
        """
        if sys.platform == "win32" or self.parent != os.getpid():
            return "it was started by another process"
        deadline = time.monotonic() + timeout
        while True:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except OSError as error:  # the application waits for every child, or ignores SIGCHLD
                if not is_ours(error):
                    raise
                return "it ended"
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return f"it ended with status {code}" if code >= 0 else f"signal {-code} ended it"
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.005)


def spawn(door: int, configured: str) -> Helper:
    """Start a broker.

    :param door: the descriptor of its end of the door.
    :param configured: the interpreter that the settings name, if any.
    :raises BrokerError: there is no interpreter, or no process or file descriptor can be created.
    """
    if sys.platform == "win32":
        raise NotImplementedError
    command = _command(configured)
    try:
        return _start_process(door, command, environment(os.environ))
    except (OSError, ValueError) as error:
        if not is_ours(error):
            raise
        raise BrokerError(
            f"process {os.getpid()} can't start a broker: {command[0]}: {getattr(error, 'strerror', None) or error}",
            remedy="a broker needs one process and five file descriptors: end processes, or raise the limit (ulimit)"
            if getattr(error, "errno", None) in _OUT_OF_RESOURCES
            else "set PCSC_SAFE_BROKER_PYTHON to the path of the Python interpreter that has pcsc_safe",
            pid=os.getpid(),
        ) from error


def _start_process(door: int, command: list[str], variables: dict[str, str]) -> Helper:
    """Start a broker by this command.

    :param door: the descriptor of its end of the door.
    :param variables: its environment.
    :raises OSError, ValueError: it can't be started.
    """
    if sys.platform == "win32":
        raise NotImplementedError
    # What is opened or started is recorded in the same step, so that a signal handler can't raise in between.
    opened: list[int] = []
    started: list[int] = []
    try:
        opened.extend(chain.from_iterable(one_step.call_each(((os.pipe,),))))
        # Above those that the broker gets, so that none is overwritten before it is duplicated.
        above = (fcntl.F_DUPFD_CLOEXEC, _ABOVE_STANDARD)
        opened.extend(one_step.call_each([(fcntl.fcntl, number, *above) for number in (door, opened[1])]))
        _, _, high_door, high_errors = opened
        duplicates = [(high_errors, 0), (high_errors, 1), (high_errors, 2), (high_door, DOOR)]
        start = partial(
            os.posix_spawn,
            file_actions=[(os.POSIX_SPAWN_DUP2, source, number) for source, number in duplicates],
            setsigmask=IGNORED,  # until it ignores them itself
        )
        started.extend(one_step.call_each([(start, command[0], command, variables)]))
        helper = Helper(started[0], os.getpid(), descriptors.of(opened[0]), _attempt(command))
        _close_after(opened, 1)
        return helper
    except BaseException:
        _close_after(opened, 0)
        for pid in started:
            Helper(pid, os.getpid(), None).kill()
        raise


def _close_after(opened: list[int], kept: int) -> None:
    """Close descriptors and forget them, in one step.

    :param kept: how many, at the beginning, are not closed.
    """
    close = (one_step.consumer.extend, map(os.close, opened[kept:]))
    one_step.in_one_step(close, (opened.__delitem__, slice(kept, None)))


def _attempt(command: Sequence[str]) -> str:
    """A shell command that does the same as the start of a broker, with the interpreter's path."""
    is_frozen = command[-1] == FROZEN_BROKER
    words = command if is_frozen else [command[0], "-m", _MODULE, "--help"]
    return " ".join(repr(word) if " " in word else word for word in words)


def _command(configured: str) -> list[str]:
    """The command that runs a broker.

    :param configured: the interpreter that the settings name, if any.
    """
    if configured:
        return [configured, "-c", _BY_ANY_PYTHON]  # of whatever version it is
    if getattr(sys, "frozen", False):
        if not can_freeze:
            raise BrokerError(
                f"{sys.executable!r} is a frozen program, and a broker needs a Python interpreter",
                remedy="call pcsc_safe.freeze_support() at the beginning of its main module, or set "
                "PCSC_SAFE_BROKER_PYTHON to the path of a Python interpreter that has pcsc_safe",
            )
        return [sys.executable, FROZEN_BROKER]
    # What multiprocessing.set_executable() has set; it can't have been called where the module isn't imported.
    spawning = sys.modules.get("multiprocessing.spawn")
    python = os.fsdecode((spawning.get_executable() if spawning else sys.executable) or "")
    if not os.path.basename(python).lower().startswith(("python", "pypy", "graalpy")):
        raise BrokerError(
            f"this program runs in {python!r}, which embeds Python and can't run a broker (uWSGI, for example)",
            remedy="set PCSC_SAFE_BROKER_PYTHON to the path of the Python interpreter that has pcsc_safe, for example "
            + os.path.join(sys.exec_prefix, "bin", "python3"),
        )
    options = ["-S", "-c", _BY_THIS_PYTHON] if python == sys.executable else ["-c", _BY_ANY_PYTHON]
    return [python, *options, *_import_directories()]


def environment(mine: Mapping[str, str]) -> dict[str, str]:
    """The part of this process's environment for a broker: no secret that it does not need, and none of our settings.

    :param mine: this process's environment.
    """
    kept = {name: value for name, value in mine.items() if name in _NEEDED or name.startswith(_NEEDED_PREFIXES)}
    if sys.flags.ignore_environment:  # python -I and -E: what this process doesn't trust is not for its broker either
        kept = {name: value for name, value in kept.items() if not name.startswith("PYTHON")}
    path = python_path.remove_from(kept.pop("PYTHONPATH", "")).split(os.pathsep)
    places = [place for place in path if os.path.isabs(place)]  # to others this process's directory may have changed
    given = {"PYTHONPATH": os.pathsep.join(places)} if places else {}
    no_user_site = {"PYTHONNOUSERSITE": "1"} if sys.flags.no_user_site else {}
    return {**kept, **given, **no_user_site, "PYTHONSAFEPATH": "1"}


def _import_directories() -> list[str]:
    """The directories from which this process has imported pcsc_safe and pyscard.

    No other entry of sys.path: modules beside a script would come before Python's own modules.
    """
    found = []
    for name in ("pcsc_safe", "smartcard"):
        module = sys.modules.get(name)
        path = getattr(module, "__path__", None) if module is not None else _path_of(name)
        for package in path or ():
            place = os.path.dirname(os.path.abspath(package))
            if os.pathsep not in place and "\0" not in place and place not in found:
                found.append(place)
    return found


def _path_of(name: str) -> Optional[Sequence[str]]:
    """The path of a package that is not imported here; not in the current directory, which others may write to."""
    with contextlib.suppress(OSError):
        here = os.getcwd()
        places = [place for place in sys.path if isinstance(place, str) and os.path.abspath(place) != here]
        spec = importlib.machinery.PathFinder.find_spec(name, places)
        return spec.submodule_search_locations if spec is not None else None
    return None
