"""Replacing attributes of pyscard, and putting them back.

Invariant: an attribute is put back only where it still has what was put there; what somebody else has replaced since
is left alone.  A child goes on with the patches it inherited, under a lock of its own.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from .. import _process

__all__ = ["MISSING", "Patch", "Patches"]

MISSING = object()


class Patch(NamedTuple):
    """One replacement.

    :ivar owner: a module or a class of pyscard.
    :ivar name: of its attribute.
    :ivar replacement: what it is to be.  If it has a method ``left_behind``, that gives what is put back in the end, if
        not what was there.
    """

    owner: Any
    name: str
    replacement: Any


class Patches:
    """Those in force.

    :ivar wanted: whether there are to be any.
    """

    def __init__(self) -> None:
        self._modules: dict[str, Any] = {}
        self._originals: list[tuple[Patch, Any]] = []
        self._lock = threading.RLock()
        self.wanted = False
        _process.at_fork(at_begin=self._begin)

    def has(self, name: str, module: Any) -> bool:
        """Whether this module was patched."""
        return self._modules.get(name) is module

    def apply(self, name: str, module: Any, rows: list[Patch]) -> None:
        """Put replacements in force, once.

        :param name: under which the module was imported.
        :param module: in which they stand.
        """
        with self._lock:
            if not self.wanted or self.has(name, module):
                return
            self._modules[name] = module
            for row in rows:
                self._originals.append((row, vars(row.owner).get(row.name, MISSING)))
                setattr(row.owner, row.name, row.replacement)

    def undo(self) -> None:
        """Put everything back."""
        with self._lock:
            self.wanted = False
            self._modules.clear()
            while self._originals:
                row, original = self._originals.pop()
                if vars(row.owner).get(row.name) is not row.replacement:
                    continue
                left_behind = getattr(row.replacement, "left_behind", None)
                value = left_behind(original) if left_behind is not None else original
                if value is MISSING:
                    delattr(row.owner, row.name)
                else:
                    setattr(row.owner, row.name, value)

    def _begin(self, epoch: _process.Epoch) -> None:
        self._lock = threading.RLock()
