"""How ``python -m pcsc_safe`` and ``python -m pcsc_safe.testing`` end.

Invariant: if a command can't write its output, it prints one line to stderr and ends with 2.  Python would print a
traceback and end with 1, which means "found a problem" for some commands.

Nothing here forks.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import Any, Callable

__all__ = ["Parser", "exit_status"]


class Parser(argparse.ArgumentParser):
    """A parser that doesn't suppress the error if its help, or the version, can't be written."""

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stderr)


def exit_status(program: str, command: Callable[[], int]) -> int:
    """Run a command, and write what it has printed.

    :param program: what the message begins with.
    :param command: returns its exit status.
    :return: the exit status: the command's own; 130 after Ctrl-C, 141 after a broken pipe, 2 if it failed, for example
        because the disk is full; the reason is then printed to stderr.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, in a shell by >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # until this process ends
        if isinstance(getattr(sys, name), io.TextIOWrapper):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # a path may have any character
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # an error would be too late when the interpreter ends
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # the interpreter flushes it once more
        if isinstance(error, BrokenPipeError):
            return 141
        try:
            print(f"{program}: {error}", file=sys.stderr)
        except OSError:
            os.dup2(null, 2)
        return 2
