"""The settings that are in force: of this process, and of single contexts.

They are plain values, replaced whole and inherited over a fork as any other; a child may change its own.
"""

from __future__ import annotations

from typing import Optional

from .._native import connections
from ..policy import Owner, Policy, Settings, from_environment, native_works_after_fork
from . import gate

__all__ = ["gives_at_forks", "put_in_force", "settings"]

_settings: Optional[Settings] = None
for_contexts = False
"""Whether any context has settings of its own."""


def settings() -> Settings:
    """The settings of this process; before :func:`configure`, those of the environment (``PCSC_SAFE_*``).

    :raises SettingsError: the environment holds a value that makes no sense.
    """
    return _settings if _settings is not None else put_in_force(from_environment())


def gives_at_forks() -> bool:
    """Whether a child may get something of its parent's sessions; in as few steps as there are, for every fork asks."""
    if _settings is None:
        return False
    return _settings.owner is Owner.CHILD or _settings.policy is Policy.SHARE or for_contexts


def put_in_force(new: Settings) -> Settings:
    global _settings
    _settings = new
    gate.quiesce_timeout = new.quiesce_timeout
    gate.may_child_use_native = lambda: new.policy is not Policy.BROKER and native_works_after_fork()
    connections.guard_all(new.guard_native)
    return new
