"""``python -m pcsc_safe.testing [options] -- command``: run a command on a virtual PC/SC stack.

Use it to test an application, or one of our examples, without a reader.  The stack ends with the command, even if the
command leaves processes running.

Invariant: the exit status is the command's own, or 128 plus the number of the signal that ended it, as in a shell.

At a fork: nothing here forks; the command is a subprocess, which runs Python code only to ignore an inherited SIGCHLD.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Optional

from . import EchoCard, PcscStackError, VirtualCard, VirtualPcsc
from ._command_line import Parser, exit_status
from ._disposable import default_sigchld

__all__ = ["main"]

_PROGRAM = "python -m pcsc_safe.testing"
_CARDS = ("echo", "piv", "none")
_FORWARDED = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
_FROM_TERMINAL = ("SIGINT", "SIGQUIT")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROGRAM,
        usage="%(prog)s [-h] [--card CARD] -- command [argument ...]",
        description="Run a command on a private PC/SC stack with virtual readers and cards.",
        epilog="exit status: that of the command; 128 plus the number of the signal that ended it; 2 if the stack or "
        "the command can't be started",
    )
    parser.add_argument(
        "--card",
        action="append",
        choices=_CARDS,
        metavar="CARD",
        help="the card in a reader; each further --card adds a reader with a card: echo, which returns the data that "
        "it gets; piv, which has a key, a certificate and the PIN 123456; none, for an empty reader (default: echo)",
    )
    parser.add_argument("command", nargs="+", metavar="-- command", help="the command to run, with its arguments")
    return parser


def _card(kind: str) -> Optional[VirtualCard]:
    if kind == "piv":
        from .piv import PivCard  # needs the extra piv

        return PivCard.personalised()
    return EchoCard() if kind == "echo" else None


def _run(command: Sequence[str], stack: VirtualPcsc) -> int:
    """Run the command; forward the signals that would end this process, and with it the stack."""
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []  # a signal that arrives while the command starts must not end this process alone

    def forward(number: int, frame: object) -> None:
        if not started:
            early.append(number)
        elif signal.Signals(number).name not in _FROM_TERMINAL or not _have_terminal():
            _send(started[0], number)

    for number in (getattr(signal, name) for name in _FORWARDED):
        # What is ignored because of nohup, or in the background of a script, stays ignored in the command, too.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    started.append(subprocess.Popen(command, env=stack.env, preexec_fn=default_sigchld()))  # noqa: S603  # the user's
    for noted in early:
        _send(started[0], noted)
    status = started[0].wait()
    return status if status >= 0 else 128 - status


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(OSError):  # it has ended, or has become another user's
        process.send_signal(number)


def _have_terminal() -> bool:
    """Whether the terminal sends Ctrl-C to this process group, and therefore to the command itself."""
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    :param arguments: those of the command line if None.
    :return: the exit status.
    """
    return exit_status(_PROGRAM, lambda: _main(arguments))


def _main(arguments: Optional[Sequence[str]]) -> int:
    options = _parser().parse_args(arguments)
    try:
        cards = [_card(kind) for kind in options.card or ["echo"]]
        with VirtualPcsc(readers=len(cards), cards=cards, activate=False) as stack:
            return _run(options.command, stack)
    except OSError as error:
        print(f"{_PROGRAM}: {options.command[0]}: {error.strerror}", file=sys.stderr)
    except (PcscStackError, ValueError) as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
