"""``python -m pcsc_safe run``: runs a program that the user can't edit on pcsc_safe.

This process becomes the program, by exec; with ``--report`` and ``--timeline`` it starts and watches the program.  Only
the environment of the program differs: it has the settings, and on PYTHONPATH a directory whose sitecustomize calls
``pcsc_safe.install()``.  The Python processes that the program starts inherit this environment.

Nothing here forks; see :mod:`pcsc_safe._trace.watch` for the program that is watched.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import policy
from .._core import python_path
from ..errors import SettingsError

__all__ = ["EPILOG", "add_arguments", "main", "split"]

EPILOG = """The options that are listed with [=0] turn a setting on (1). To turn it off (0), add =0, without a space:
  python -m pcsc_safe run --recover --spare-cards=0 program.py

The program runs as with "python program". Options of Python itself go before the first -m:
  python -X dev -m pcsc_safe run -m my.server --port 80

Python programs that the program starts also run on pcsc_safe, unless they are started with -E, -I or -S, or
without PYTHONPATH in their environment, or by a Python that has no pcsc_safe.

exit status: that of the program; 2 if an option or a setting is wrong"""
_SETTINGS = {policy.option(name): name for name in policy.SETTINGS}
_SWITCHES = {option for option, name in _SETTINGS.items() if isinstance(policy.SETTINGS[name].default, bool)}
_TIMELINE = "--timeline"
_MEANING_PROGRAM = ("-m", "-c")
_OF_PYTHON = re.compile("-([bBdiOPqsuv]*)(?:([XW])(.*)|([mc].*))?")
_KEEP_OUT = re.compile("-[^XWmc]*[EIS]")
_LEAVE_OUT = "python -E, -I and -S keep pcsc_safe out of the program: leave them out"
_VALUES = {float: "SECONDS", str: "PATH"}


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of ``run``, and the program with its arguments.

    As with Python itself, the program begins with the first argument that is not an option, and all later arguments are
    the program's.
    """
    index = 0
    while index < len(arguments) and (arguments[index] == "-h" or arguments[index][:2] == "--" != arguments[index]):
        option, equals, _ = arguments[index].partition("=")
        taking = (*(_SETTINGS.keys() - _SWITCHES), _TIMELINE)
        takes_next = not equals and any(name.startswith(option) for name in taking)
        index += 2 if takes_next else 1
    return list(arguments[:index]), list(arguments[index:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; :func:`split` separates the program from them."""
    parser.usage = f"{parser.prog} [options] script.py | -m module | -c code | -  [argument ...]"
    for option, setting in _SETTINGS.items():
        row = policy.SETTINGS[setting]
        help_text = row.description()
        if option in _SWITCHES:
            parser.add_argument(option, nargs="?", const="1", metavar="=0", help=help_text)
        else:
            metavar = _VALUES.get(type(row.default), setting.upper())
            added = parser.add_argument(option, metavar=metavar, help=help_text)
            # For the completion; main() refuses other values with our own message.
            vars(added)["values"] = row.choices()
    parser.add_argument(
        "--report",
        action="store_true",
        help="at the end, print to stderr what each process did with PC/SC (default: no report)",
    )
    parser.add_argument(
        _TIMELINE,
        metavar="FILE",
        help="draw the sessions of each process over time; FILE ends in .svg or .html (default: no drawing)",
    )


def main(options: argparse.Namespace) -> int:
    """Become the program.

    :return: the exit status of the program, if this process can't become it but must watch it.
    """
    program: list[str] = options.program
    if not program:
        options.refuse("name a program to run: script.py, -m module, -c code, or - for standard input")
    if program[0].startswith("-") and program[0] not in ("-", "--") and program[0][:2] not in _MEANING_PROGRAM:
        options.refuse(_why_no_option(program))
    if sys.flags.ignore_environment or sys.flags.no_site:
        options.refuse(_LEAVE_OUT)
    try:
        environment = _environment(os.environ, options)
    except SettingsError as error:
        options.refuse(str(error))
    command = [sys.executable, *_interpreter_options(), *program]
    timeline = _checked(options) if options.timeline is not None else None
    if not options.report and timeline is None and os.name == "posix":
        os.execve(sys.executable, command, environment)  # noqa: S606  # it is what the user wants to run
    from .._trace import report, watch

    status = report.run(command, environment, report=options.report, picture=timeline)
    if sys.flags.inspect:
        os._exit(watch.exit_as(status))  # it is the program that is to be inspected
    return watch.exit_as(status)


def _why_no_option(program: Sequence[str]) -> str:
    """Why the first word is not an option of run, and, if it is one of Python, where to put it."""
    given, of_python = program[0], _OF_PYTHON.fullmatch(program[0])
    if _KEEP_OUT.match(given):
        return _LEAVE_OUT
    if of_python is None:
        return f"run has no option {given}"
    flags, takes_value, value, meaning_program = of_python.groups()
    if meaning_program:
        return f"run has no option {given}; write: python -{flags} -m pcsc_safe run -{meaning_program} ..."
    before = " ".join([*program, "..."][:2]) if takes_value and not value else given
    return f"run has no option {given}; options of Python go first: python {before} -m pcsc_safe run ..."


def _checked(options: argparse.Namespace) -> Path:
    """The file for the timeline; one that can't be written is refused before the program runs."""
    from .._trace.timeline import SUFFIXES  # most runs draw nothing

    if os.name != "posix":
        options.refuse(f"{_TIMELINE} is unsupported on this platform: use it on Linux or macOS")
    file = Path(options.timeline).absolute()
    if file.suffix not in SUFFIXES:
        options.refuse(f"{_TIMELINE} {options.timeline}: name a file that ends in {' or '.join(SUFFIXES)}")
    try:
        file.open("ab").close()
    except OSError as error:
        options.refuse(f"{_TIMELINE} {options.timeline}: {error.strerror}")
    return file


def _environment(mine: Mapping[str, str], options: argparse.Namespace) -> dict[str, str]:
    """The environment of the program.

    :raises SettingsError: an option or a variable can't have its value.
    """
    environment = dict(mine)
    for option, setting in _SETTINGS.items():
        value = getattr(options, setting)
        if value is not None:
            policy.parse(setting, value, option)
            environment[policy.variable(setting)] = value
    policy.from_environment(environment)
    last = [] if _is_found(python_path.PACKAGE) else [os.path.dirname(python_path.PACKAGE)]
    environment["PYTHONPATH"] = python_path.add_to(mine.get("PYTHONPATH", ""), last)
    return environment


def _is_found(package: str) -> bool:
    """Whether a program finds this pcsc_safe; only ``-m`` looks in the current directory."""
    path = sys.path[:]
    sys.path[:] = path if getattr(sys.flags, "safe_path", False) else path[1:]
    try:
        found: Any = next(filter(None, (finder.find_spec("pcsc_safe", None) for finder in sys.meta_path)), None)
    finally:
        sys.path[:] = path
    return found is not None and os.path.dirname(os.path.abspath(found.origin or "")) == package


_FLAGS = {
    "debug": "d",
    "interactive": "i",
    "optimize": "O",
    "dont_write_bytecode": "B",
    "no_user_site": "s",
    "verbose": "v",
    "bytes_warning": "b",
    "quiet": "q",
    "safe_path": "P",
}


def _interpreter_options() -> list[str]:
    """The options of this Python, from its command line or its environment."""
    given = [f"-{letter * int(getattr(sys.flags, flag, 0))}" for flag, letter in _FLAGS.items()]
    if getattr(sys.__stderr__, "write_through", False):
        given.append("-u")
    implied = [*["default"] * sys.flags.dev_mode, "error::BytesWarning", "default::BytesWarning"]
    given += [f"-W{warning}" for warning in sys.warnoptions if warning not in implied]
    given += [f"-X{name}" if value is True else f"-X{name}={value}" for name, value in sys._xoptions.items()]
    return [option for option in given if option != "-"]
