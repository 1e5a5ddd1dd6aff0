"""``python -m pcsc_safe.testing``: signals reach the command, and don't end its stack alone."""

from __future__ import annotations

import json
import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from forking import in_program
from interrupts import signalled_while_it_starts

from pcsc_safe.testing import __main__ as command_line

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the virtual PC/SC stack runs on Linux")


def run(*command: str) -> int:
    """Run a command as ``python -m pcsc_safe.testing`` does, without a stack."""
    stack: Any = SimpleNamespace(env=dict(os.environ))
    return command_line._run(command, stack)


def end_while_it_starts() -> None:
    """Program: get SIGTERM when the command runs, and subprocess hasn't returned; print how both ended."""
    started = signalled_while_it_starts(command_line)
    try:
        status = run("sleep", "60")
    except SystemExit as error:
        status = int(str(error))
    print(json.dumps([status, started[0].poll()]))
    started[0].kill()


def test_a_signal_while_the_command_starts() -> None:
    """A signal ends the command also if it arrives between its start and the moment from which its process is known."""
    done = in_program(end_while_it_starts)
    assert json.loads(done.stdout) == [128 + signal.SIGTERM, -signal.SIGTERM], done.stderr


def run_with_signals() -> None:
    """Program: ignore SIGHUP as nohup does, and print the status of commands that send signals to this process."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    script = "trap 'exit 7' {0}; kill -{0} $PPID; for n in 1 2 3 4 5 6 7 8 9; do sleep 0.1; done"
    seen = {name: run("sh", "-c", script.format(name)) for name in ("INT", "QUIT", "TERM", "USR1", "USR2")}
    print(json.dumps({**seen, "HUP": run("sh", "-c", "kill -HUP $PPID $$; exit 6")}))


def test_the_signals_of_a_command() -> None:
    """The command gets every signal that would end its stack; what is ignored stays ignored in the command."""
    done = in_program(run_with_signals)
    assert json.loads(done.stdout) == {"INT": 7, "QUIT": 7, "TERM": 7, "USR1": 7, "USR2": 7, "HUP": 6}, done.stderr


def run_with_sigchld_ignored() -> None:
    """Program: ignore SIGCHLD; print the status of a command that returns how it inherited that."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(run(sys.executable, "-c", "import signal, sys; sys.exit(3 + signal.getsignal(signal.SIGCHLD))"))


def test_the_exit_status_where_sigchld_is_ignored() -> None:
    """An inherited, ignored SIGCHLD doesn't hide how the command ends, and the command inherits it, too."""
    done = in_program(run_with_sigchld_ignored)
    assert int(done.stdout) == 3 + signal.SIG_IGN, done.stderr
