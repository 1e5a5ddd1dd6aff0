"""The hazards that the demo shows: one module for each.  A module in this directory is found without registration.

A module ``hNN_name`` has ``NUMBER`` (as in docs/survives.md), ``NAME``, ``SECONDS`` (that a run may take),
``program(stage)``, which runs in a disposable process and reports what it sees, and ``judge(run)``, a pure function of
what was reported.
Importing one uses no PC/SC.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from typing import Protocol

from .._judge import Finding, Run
from .._stage import Stage

__all__ = ["Hazard", "load"]


class Hazard(Protocol):
    """The interface of a hazard's module."""

    __name__: str
    NUMBER: str
    NAME: str
    SECONDS: float

    def program(self, stage: Stage) -> None:
        """Cause the hazard, and report what is observed."""

    def judge(self, run: Run) -> Finding:
        """Judge what the reports show."""


def load(only: Collection[str] = ()) -> list[Hazard]:
    """The hazards in the order of their modules' names.

    :param only: their numbers; all if empty.
    :raises ValueError: there is no hazard with this number; the text lists the numbers.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] == "h")
    every: list[Hazard] = [importlib.import_module(f"{__name__}.{name}") for name in names]
    unknown = set(only) - {hazard.NUMBER for hazard in every}
    if unknown:
        known = ", ".join(hazard.NUMBER for hazard in every)
        raise ValueError(f"there is no hazard {', '.join(sorted(unknown))}; the hazards are {known}")
    return [hazard for hazard in every if not only or hazard.NUMBER in only]
