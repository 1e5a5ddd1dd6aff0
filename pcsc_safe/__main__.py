"""``python -m pcsc_safe``, also installed as ``pcsc-safe``: the command line.

A command is a row in :data:`COMMANDS`.  Only the module of the requested command is imported, so no command pays for
another, and ``version`` prints the versions even if nothing else can be imported.  Nothing here forks.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from . import __version__
from .testing._command_line import Parser, exit_status

__all__ = ["COMMANDS", "Command", "main"]


class Command(NamedTuple):
    """A subcommand.

    :ivar summary: for ``--help``.
    :ivar home: its module in the package.  It has ``add_arguments(parser)``, and ``main(options)``, which runs the
        command and returns the exit status.  It may have ``EPILOG``, the end of its ``--help``, and
        ``split(arguments)``, which separates its arguments from those of a program that it runs (these become
        ``options.program``).
    """

    summary: str
    home: str

    def load(self) -> Any:
        """Import its module."""
        return importlib.import_module(f"pcsc_safe.{self.home}")


COMMANDS = {
    "demo": Command("show each hazard on raw pyscard and on pcsc_safe, on a virtual PC/SC stack", "demo._command"),
    "doctor": Command("find what is wrong with this machine, this installation or a program", "doctor._command"),
    "run": Command(
        "run a Python program that uses pyscard, and the Python programs that it starts, on pcsc_safe",
        "retrofit.launcher",
    ),
    "version": Command("print the versions that a bug report needs", "testing._versions"),
    "completion": Command("print a script with which a shell completes this command line", "testing._completion"),
}


_WANTS_ALL = "completion"


def _program() -> str:
    name_of_file = os.path.basename(sys.argv[0])
    return name_of_file if name_of_file.startswith("pcsc-safe") else "python -m pcsc_safe"


def _parser(asked: str) -> argparse.ArgumentParser:
    """A parser with the summary of every command, and with the arguments of the requested one."""
    parser = Parser(prog=_program(), description="PC/SC smart cards that survive fork().")
    parser.add_argument("--version", action="version", version=f"pcsc_safe {__version__}")
    parser.set_defaults(tree=parser)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(refuse=added.error)
        if asked in (name, _WANTS_ALL):
            home = command.load()
            added.epilog = getattr(home, "EPILOG", "")
            home.add_arguments(added)
    return parser


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    asked = arguments[0] if arguments else ""
    program: Sequence[str] = []
    split = getattr(COMMANDS[asked].load(), "split", None) if asked in COMMANDS else None
    if split is not None:
        own, program = split(arguments[1:])
        arguments = [asked, *own]
    options, unknown = _parser(asked).parse_known_args(arguments, argparse.Namespace(program=program))
    if unknown:  # argparse itself would print the usage of the whole command line
        kind = "option" if unknown[0].startswith("-") else "argument"
        options.refuse(f"{options.command} has no {kind} {unknown[0]}")
    return options


def _run(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    return int(COMMANDS[options.command].load().main(options))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one command.

    :param arguments: those of the command line if None.
    :return: the exit status: the command's own, or that of :func:`exit_status`.
    """
    return exit_status(_program(), lambda: _run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
