"""PC/SC smart cards that survive ``fork()``.

Import :mod:`pcsc_safe.scard` instead of ``smartcard.scard``; a program that uses pyscard's classes calls
:func:`install`.  The names of this package are loaded when they are first used, so ``import pcsc_safe`` is quick and
loads no native library.  If the environment has ``PCSC_SAFE_GUARD_NATIVE``, this setting applies from the import on.

PYTEST_DONT_REWRITE: under ``run``, this package is imported before pytest could rewrite its assertions.
"""

from __future__ import annotations

from os import environ as _environment
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._core.configure import configure
    from ._core.handover import files_to_preserve, handover
    from ._core.reconnecting import reconnecting
    from ._core.settings import settings
    from .broker.family import prestart as prestart_broker
    from .broker.freeze import freeze_support
    from .errors import (
        BrokerError,
        ForkedHandleError,
        ForkUnsafeError,
        HandoverError,
        PcscSafeError,
        ReconnectError,
        SettingsError,
    )
    from .policy import Broker, Cards, Owner, Policy, Settings
    from .retrofit.installation import install, uninstall

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
    "ReconnectError",
    "Settings",
    "SettingsError",
    "__version__",
    "configure",
    "files_to_preserve",
    "freeze_support",
    "handover",
    "install",
    "prestart_broker",
    "reconnecting",
    "settings",
    "uninstall",
]

_HOME = {
    "configure": "_core.configure",
    "reconnecting": "_core.reconnecting",
    "settings": "_core.settings",
    "files_to_preserve": "_gateways",
    "handover": "_gateways",
    "prestart_broker": "broker.family:prestart",
    "freeze_support": "broker.freeze",
    "install": "retrofit.installation",
    "uninstall": "retrofit.installation",
    "BrokerError": "errors",
    "ForkUnsafeError": "errors",
    "HandoverError": "errors",
    "ForkedHandleError": "errors",
    "PcscSafeError": "errors",
    "ReconnectError": "errors",
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
    # A program with this setting may use nothing else of the package, so the variable has to be read here.
    from . import policy
    from ._core import connections

    connections.guard_all(policy.parse("guard_native", _environment[_GUARD], _GUARD))
