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
    :ivar replacement: its new value.  If this has a method ``restored_value``, the method returns what is restored in
        the end instead of the original value.
    """

    owner: Any
    name: str
    replacement: Any


class Patches:
    """The patches in force.

    :ivar wanted: whether there should be any.
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

        :param name: the name under which it was imported.
        """
        with self._lock:
            if self.wanted and not self.has(name, module):
                self._modules[name] = module
                self.put(rows)

    def put(self, rows: Iterable[Patch]) -> None:
        """Put replacements in force; remember what they replace, unless that is itself a replacement."""
        with self._lock:
            for row in rows:
                key = id(row.owner), row.name
                _, original = self._replaced.get(key, (row, vars(row.owner).get(row.name, MISSING)))
                self._replaced[key] = row, original
                setattr(row.owner, row.name, row.replacement)

    def undo(self, still_needed: Callable[[Patch], bool] = lambda row: False) -> None:
        """Restore everything, the latest first, except what is still needed, which a later :meth:`undo` restores."""
        with self._lock:
            self.wanted = False
            self._modules.clear()
            for key, (row, original) in reversed(list(self._replaced.items())):
                if not still_needed(row):
                    del self._replaced[key]
                    _restore(row, original)

    def finish(self) -> None:
        """Restore what was still needed, if no patches are wanted any more."""
        with self._lock:
            if not self.wanted:
                self.undo()

    def _begin(self, epoch: process.Epoch) -> None:
        self._lock = threading.RLock()


def _restore(row: Patch, original: Any) -> None:
    if vars(row.owner).get(row.name) is not row.replacement:
        return
    restored_value = getattr(row.replacement, "restored_value", None)
    value = restored_value(original) if restored_value is not None else original
    if value is MISSING:
        delattr(row.owner, row.name)
    else:
        setattr(row.owner, row.name, value)
