"""pyscard, whose functions reach libpcsclite in this process.

This is the only untyped module.  :func:`load` loads the native library.  If every context is to live in a broker
(``broker="always"``), the broker's functions replace the C functions, and the library is not loaded.  Nothing here
changes at a fork.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Callable

from .. import errors
from .._core import library
from .._core.calls import CALLS

__all__ = ["is_loaded", "load", "load_from_broker", "raw"]

raw: dict[str, Callable[..., Any]] = {}
"""The C functions, by PC/SC's name; they take real handles."""

_loaded: list[Any] = []


def is_loaded() -> bool:
    """Whether the functions are those of this process's native library."""
    return bool(_loaded)


def load() -> None:
    """Import pyscard, and describe it in :mod:`library`."""
    import smartcard.scard as scard  # a retrofit may call this while smartcard is being imported
    from smartcard.scard import _scard

    errors.join_pyscard()
    for name, value in vars(scard).items():
        if not name.startswith("_") and not isinstance(value, types.ModuleType):
            library.public[name] = value
            if isinstance(value, types.FunctionType):
                library.signatures[name] = library.Signature.of(value)
    # Not pyscard's wrappers: a wrapper looks up its function at each call, and would find the retrofit's.
    for name in CALLS.keys() & library.public.keys():
        function = getattr(_scard, name)  # before the look at replaced: another thread may be replacing it
        raw[name] = library.replaced.get(name, function)
    _loaded.append(_scard)


def load_from_broker(functions: Mapping[str, Callable[..., Any]], described: Mapping[str, Any]) -> None:
    """Use another process's pyscard, and import none here.

    :param functions: the functions that reach it.
    :param described: its :func:`library.catalogue`.
    """
    library.load_catalogue(described, functions)
    raw.update({name: functions[name] for name in described["functions"] if name in functions})
