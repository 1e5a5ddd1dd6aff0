"""PC/SC smart cards that survive ``fork()``.

Import :mod:`pcsc_safe.scard` in place of ``smartcard.scard``; that is the whole adoption.  This package's own names
are loaded when they are first asked for, so that ``import pcsc_safe`` costs nothing and loads no native library.  One
setting counts from the import on, if the environment has it: ``PCSC_SAFE_GUARD_NATIVE``.
"""

from __future__ import annotations

from os import environ as _environment
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._bequest import files_to_preserve, handover
    from ._configure import configure
    from ._settings import settings
    from .broker._freeze import freeze_support
    from .broker._mine import prestart as prestart_broker
    from .errors import (
        BrokerError,
        ForkedHandleError,
        ForkUnsafeError,
        HandoverError,
        PcscSafeError,
        SettingsError,
    )
    from .policy import Broker, Cards, Owner, Policy, Settings
    from .retrofit import install, uninstall

__version__ = "0.1.0"

__all__ = [
    "Broker",
    "BrokerError",
    "Cards",
    "ForkUnsafeError",
    "ForkedHandleError",
    "HandoverError",
    "Owner",
    "PcscSafeError",
    "Policy",
    "Settings",
    "SettingsError",
    "__version__",
    "configure",
    "files_to_preserve",
    "freeze_support",
    "handover",
    "install",
    "prestart_broker",
    "settings",
    "uninstall",
]

_HOME = {
    "configure": "_configure",
    "settings": "_settings",
    "files_to_preserve": "_bequest",
    "handover": "_bequest",
    "prestart_broker": "broker._mine:prestart",
    "freeze_support": "broker._freeze",
    "install": "retrofit",
    "uninstall": "retrofit",
    "BrokerError": "errors",
    "ForkUnsafeError": "errors",
    "HandoverError": "errors",
    "ForkedHandleError": "errors",
    "PcscSafeError": "errors",
    "SettingsError": "errors",
    "Broker": "policy",
    "Cards": "policy",
    "Owner": "policy",
    "Policy": "policy",
    "Settings": "policy",
}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use (PEP 562)."""
    home, _, called = _HOME.get(name, "").partition(":")
    if not home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), called or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_GUARD = "PCSC_SAFE_GUARD_NATIVE"
if _environment.get(_GUARD):
    # It is for programs that may use nothing else of this package, so nothing else would look.
    from . import _pcscd, policy

    _pcscd.guard_all(policy.parse("guard_native", _environment[_GUARD], _GUARD))
