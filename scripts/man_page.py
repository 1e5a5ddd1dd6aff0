"""Makes the man page of the command line from its parsers and from the table of settings.

python scripts/man_page.py            print it
python scripts/man_page.py --write    write it to man/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pcsc_safe
from pcsc_safe import __main__ as command_line
from pcsc_safe import policy

_ARGUMENTS = {"run": '.RI [ options "] " program', "completion": ".IR bash | fish | zsh"}
PAGE = Path(__file__).resolve().parent.parent / "man" / "pcsc-safe.1"


def page() -> str:
    """The page, in the macros of man(7)."""
    return "\n".join([*_head(), *_commands(), *_environment(), *_foot()]) + "\n"


def _head() -> Iterator[str]:
    yield '.\\" Made by scripts/man_page.py'
    yield f'.TH PCSC\\-SAFE 1 "" "pcsc_safe {pcsc_safe.__version__}" "User Commands"'
    yield ".SH NAME"
    yield "pcsc\\-safe \\- PC/SC smart cards in Python that survive fork()"
    yield ".SH SYNOPSIS"
    for name in command_line.COMMANDS:
        yield f".B pcsc\\-safe {_roff(name)}"
        yield _ARGUMENTS.get(name, ".RI [ options ]")
        yield ".br"
    yield ".B pcsc\\-safe \\-\\-help"
    yield ".br"
    yield ".B pcsc\\-safe \\-\\-version"
    yield ".SH DESCRIPTION"
    yield _roff("A process that uses PC/SC through pyscard must not fork. With pcsc_safe it may.")
    yield "This command shows the hazards, examines a machine or a program, and runs a program on pcsc_safe."
    yield ".B python \\-m pcsc_safe"
    yield "is the same command."


def _commands() -> Iterator[str]:
    yield ".SH COMMANDS"
    for name, command in command_line.COMMANDS.items():
        yield f".SS {_roff(name)}"
        yield f"{_roff(command.summary[0].upper() + command.summary[1:])}."
        home = command.load()
        parser = argparse.ArgumentParser(add_help=False)
        home.add_arguments(parser)
        for action in parser._actions:
            yield from _option(action)
        for paragraph in filter(None, getattr(home, "EPILOG", "").split("\n\n")):
            lines = _roff(paragraph).splitlines()
            yield from [".PP", *([".nf", *lines, ".fi"] if "  " in paragraph else lines)]


def _option(action: Any) -> Iterator[str]:
    if action.help == argparse.SUPPRESS:
        return
    names = ", ".join(f"\\fB{_roff(name)}\\fR" for name in action.option_strings)
    value = "" if action.nargs == 0 else str(action.metavar or "|".join(action.choices or [action.dest.upper()]))
    shown = f"[{_roff(value)}]" if action.nargs == "?" else f" \\fI{_roff(value)}\\fR" if value else ""
    yield from (".TP", f"{names}{shown}".strip(), f"{_roff((action.help or '').replace('%%', '%'))}.")


def _environment() -> Iterator[str]:
    yield ".SH ENVIRONMENT"
    yield "Each setting has a variable. Options of"
    yield ".B run"
    yield "take precedence."
    for name, setting in policy.SETTINGS.items():
        yield from (".TP", f".B {_roff(policy.variable(name))}", f"{_roff(setting.summary)}.")


def _foot() -> Iterator[str]:
    yield ".SH SEE ALSO"
    yield ".BR pcscd (8),"
    yield ".BR pcsc_scan (1)"


def _roff(text: str) -> str:
    """The text, escaped for roff, so that no line is a request."""
    lines = text.replace("\\", "\\e").replace("-", "\\-").splitlines()
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page())
    else:
        sys.stdout.write(page())
