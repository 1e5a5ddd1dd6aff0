"""Replaces attributes of pyscard, and restores them.

Invariant: an attribute is restored only if it still has the value that was put there.  An attribute that other code has
replaced since is left alone.  A child continues with the patches that it inherited, under a new lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Callable, NamedTuple

from .._core import process

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
        self._replaced: dict[tuple[int, str], tuple[Patch, Any]] = {}
        self._lock = threading.RLock()
        self.wanted = False
        process.at_fork(at_begin=self._begin)

    def has(self, name: str, module: Any) -> bool:
        """Whether this module was patched."""
        return self._modules.get(name) is module

    def apply(self, name: str, module: Any, rows: Iterable[Patch]) -> None:
        """Put a module's replacements in force, once.

        :param name: under which it was imported.
        """
        with self._lock:
            if self.wanted and not self.has(name, module):
                self._modules[name] = module
                self.put(rows)

    def put(self, rows: Iterable[Patch]) -> None:
        """Put replacements in force; what they replace is remembered, but not if it is a replacement itself."""
        with self._lock:
            for row in rows:
                key = id(row.owner), row.name
                _, original = self._replaced.get(key, (row, vars(row.owner).get(row.name, MISSING)))
                self._replaced[key] = row, original
                setattr(row.owner, row.name, row.replacement)

    def undo(self, still_needed: Callable[[Patch], bool] = lambda row: False) -> None:
        """Put everything back, the latest first; but what is still needed, which another :meth:`undo` puts back."""
        with self._lock:
            self.wanted = False
            self._modules.clear()
            for key, (row, original) in reversed(list(self._replaced.items())):
                if not still_needed(row):
                    del self._replaced[key]
                    _restore(row, original)

    def finish(self) -> None:
        """Put back what was still needed, if nothing is wanted any more."""
        with self._lock:
            if not self.wanted:
                self.undo()

    def _begin(self, epoch: process.Epoch) -> None:
        self._lock = threading.RLock()


def _restore(row: Patch, original: Any) -> None:
    if vars(row.owner).get(row.name) is not row.replacement:
        return
    left_behind = getattr(row.replacement, "left_behind", None)
    value = left_behind(original) if left_behind is not None else original
    if value is MISSING:
        delattr(row.owner, row.name)
    else:
        setattr(row.owner, row.name, value)
