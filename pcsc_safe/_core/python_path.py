"""PYTHONPATH, which starts with the directory of our ``sitecustomize.py`` in a program that ``run`` has started.

Python processes that the program starts inherit it.  Brokers are started without it.  A fork changes nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

__all__ = ["DIRECTORY", "PACKAGE", "put_on", "take_off"]

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIRECTORY = os.path.join(PACKAGE, "retrofit", "site")


def put_on(path: str, last: Sequence[str] = ()) -> str:
    """A PYTHONPATH that leads here first, and then where it led.

    :param path: PYTHONPATH as it is, or ``""``.
    :param last: where it is to lead at last.
    """
    # An empty entry is the current directory, so none may be added.
    entries = [DIRECTORY, *filter(None, [take_off(path)]), *last]
    return os.pathsep.join(entries)


def take_off(path: str) -> str:
    """A PYTHONPATH that doesn't lead here."""
    return os.pathsep.join(entry for entry in path.split(os.pathsep) if entry != DIRECTORY)
