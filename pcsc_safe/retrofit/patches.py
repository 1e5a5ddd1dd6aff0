"""Replaces attributes of pyscard, and restores them.

Invariant: an attribute is restored only if it still has the value that was put there.  An attribute that other code has
replaced since is left alone.  Each function here can be called again to complete what an exception of a signal handler
has interrupted.  A child continues with the patches that it inherited, under a new lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Callable, NamedTuple

from .._core import process
from .._core.one_step import call_in_turn
from .._core.unpatched import RLock

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
        self._replaced: dict[tuple[int, str], tuple[Any, list[Patch]]] = {}  # what was there before, what we put there
        self._lock = RLock()
        self.wanted = False
        process.at_fork(at_begin=self._begin)

    def has(self, name: str, module: Any) -> bool:
        """Whether this module was patched."""
        return self._modules.get(name) is module

    def apply(self, name: str, module: Any, rows: Iterable[Patch]) -> None:
        """Put a module's replacements in force, once.

        :param name: the name under which it was imported.
        """

        def put_once() -> None:
            if self.wanted and not self.has(name, module):
                self.put(rows)
                self._modules[name] = module

        call_in_turn(self._lock, put_once)

    def put(self, rows: Iterable[Patch]) -> None:
        """Put replacements in force; remember what they replace, unless that is itself a replacement."""

        def put_each() -> None:
            for row in rows:
                present = vars(row.owner).get(row.name, MISSING)
                _, ours = self._replaced.setdefault((id(row.owner), row.name), (present, []))
                ours.append(row)  # before it is in force, so that it can be restored whatever interrupts this
                setattr(row.owner, row.name, row.replacement)
                ours[:] = [row]

        call_in_turn(self._lock, put_each)

    def undo(self, still_needed: Callable[[Patch], bool] = lambda row: False) -> None:
        """Restore everything, the latest first, except what is still needed, which a later :meth:`undo` restores."""

        def restore_each() -> None:
            self.wanted = False
            self._modules.clear()
            for key, (original, ours) in reversed(list(self._replaced.items())):
                if not any(map(still_needed, ours)):
                    _restore(original, ours)
                    self._replaced.pop(key, None)

        call_in_turn(self._lock, restore_each)

    def finish(self) -> None:
        """Restore what was still needed, if no patches are wanted any more."""
        call_in_turn(self._lock, lambda: None if self.wanted else self.undo())

    def _begin(self, epoch: process.Epoch) -> None:
        self._lock = RLock()


def _restore(original: Any, ours: Iterable[Patch]) -> None:
    row = next((row for row in ours if vars(row.owner).get(row.name) is row.replacement), None)
    if row is None:
        return
    restored_value = getattr(row.replacement, "restored_value", None)
    value = restored_value(original) if restored_value is not None else original
    if value is MISSING:
        delattr(row.owner, row.name)
    else:
        setattr(row.owner, row.name, value)
