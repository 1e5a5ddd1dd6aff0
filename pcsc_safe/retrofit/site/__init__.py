"""The directory by which the retrofit gets into a Python process: it stands first on PYTHONPATH, with a sitecustomize.

Python processes that the process starts inherit it; :mod:`pcsc_safe.broker` is started without it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

__all__ = ["DIRECTORY", "put_on", "take_off"]

DIRECTORY = os.path.dirname(os.path.abspath(__file__))


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
