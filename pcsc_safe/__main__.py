"""``python -m pcsc_safe``: the command line.

A command is a row in :data:`COMMANDS`.  What a command needs is imported when it runs, so that ``version`` tells the
versions even where nothing else can be imported.  Nothing here forks.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional

from . import __version__
from . import _run as run
from .demo import _command as demo

__all__ = ["COMMANDS", "Command", "main", "versions"]


class Command(NamedTuple):
    """A subcommand.

    :ivar summary: for ``--help``.
    :ivar add_arguments: declares its arguments.
    :ivar run: runs it, and returns the exit status.
    :ivar epilog: ends its ``--help``.
    :ivar split: tells its arguments from those of a program that it runs; these become ``options.program``.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str = ""
    split: Callable[[Sequence[str]], tuple[Sequence[str], Sequence[str]]] = lambda arguments: (arguments, [])


def versions() -> dict[str, str]:
    """The versions of pcsc_safe and of what it stands on; "not installed" for what is missing."""
    return {
        "pcsc_safe": __version__,
        "python": platform.python_version(),
        "pyscard": _installed("pyscard"),
        "wrapt": _installed("wrapt"),
        "platform": platform.platform(),
    }


def _installed(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _version_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print them for programs")


def _version(options: argparse.Namespace) -> int:
    found = versions()
    print(
        json.dumps(found, indent=2) if options.json else "\n".join(f"{name} {value}" for name, value in found.items())
    )
    return 0


COMMANDS = {
    "demo": Command(
        "show each hazard on raw pyscard and on pcsc_safe, on a virtual PC/SC stack",
        demo.add_arguments,
        demo.main,
        demo.EPILOG,
    ),
    "run": Command(
        "run a Python program that uses pyscard, and the Pythons that it starts, on pcsc_safe",
        run.add_arguments,
        run.main,
        run.EPILOG,
        run.split,
    ),
    "version": Command("print the versions that a bug report wants", _version_arguments, _version),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pcsc_safe", description="PC/SC smart cards that survive fork().")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
    return parser


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    program: Sequence[str] = []
    if arguments and arguments[0] in COMMANDS:
        own, program = COMMANDS[arguments[0]].split(arguments[1:])
        arguments = [arguments[0], *own]
    return _parser().parse_args(arguments, argparse.Namespace(program=program))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one command.

    :param arguments: those of the command line if None.
    :return: the exit status: the command's own; 130 if it was interrupted.
    """
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
