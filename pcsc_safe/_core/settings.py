"""The settings that are in force: of this process, and of single contexts.

They are plain values that are replaced as a whole.  A child inherits them like any other value, and can change its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Callable, Optional

from ..policy import Owner, Policy, Settings, from_environment, misspelt

__all__ = ["gives_at_forks", "replace", "settings", "when_changed"]

_settings: Optional[Settings] = None
for_contexts = False
"""Whether any context has its own settings."""


def settings() -> Settings:
    """The settings of this process: those of the environment (``PCSC_SAFE_*``), changed by :func:`configure`.

    :return: a named tuple with a field for each setting.
    :raises SettingsError: at the first call, if an environment variable has a value that its setting can't have.
    """
    return _settings if _settings is not None else _read_environment()


_has_warned = False


def _read_environment() -> Settings:
    global _has_warned, _settings
    found = from_environment()
    if not _has_warned:
        _has_warned = True
        unknown = misspelt()
        if unknown:
            _warn_of(unknown)
    if _settings is None:  # another thread may have set it: from this look to the next line no other thread runs
        _settings = found
    return _tell_listeners()


def _warn_of(unknown: Mapping[str, str]) -> None:
    from . import log  # few environments have any

    for name, meant in unknown.items():
        remedy = f"did you mean {meant}?" if meant else "'python -m pcsc_safe run --help' lists the settings"
        log.warning(
            "unknown-variable",
            "the environment variable %(variable)s is ignored, because no setting has this name: %(remedy)s",
            variable=name,
            remedy=remedy,
        )


def gives_at_forks() -> bool:
    """Whether a child may get sessions of its parent; in as few steps as possible, because every fork asks."""
    if _settings is None:
        return False
    return _settings.owner is Owner.CHILD or _settings.policy is Policy.SHARE or for_contexts


_listeners: list[Callable[[Settings], None]] = []


def when_changed(listener: Callable[[Settings], None]) -> None:
    """Add a function that is called with the settings: now, if they are known, and at each change."""
    _listeners.append(listener)
    if _settings is not None:
        listener(_settings)


def replace(new: Settings) -> Settings:
    """Replace the settings of this process."""
    global _settings
    _settings = new
    return _tell_listeners()


def _tell_listeners() -> Settings:
    assert _settings is not None
    for listener in _listeners:
        listener(_settings)
    return _settings
