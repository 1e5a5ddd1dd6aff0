"""PYTHONPATH, which starts with the directory of our ``sitecustomize.py`` in a program that ``run`` has started.

Python processes that the program starts inherit it.  Brokers are started without it.  A fork changes nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

__all__ = ["DIRECTORY", "PACKAGE", "add_to", "remove_from"]

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIRECTORY = os.path.join(PACKAGE, "retrofit", "site")


def add_to(path: str, last: Sequence[str] = ()) -> str:
    """A PYTHONPATH that has this directory first, and then the previous entries.

    :param path: the current PYTHONPATH, or ``""``.
    :param last: a directory to put at the end.
    """
    # An empty entry is the current directory, so none may be added.
    entries = [DIRECTORY, *filter(None, [remove_from(path)]), *last]
    return os.pathsep.join(entries)


def remove_from(path: str) -> str:
    """The PYTHONPATH without this directory."""
    return os.pathsep.join(entry for entry in path.split(os.pathsep) if entry != DIRECTORY)
