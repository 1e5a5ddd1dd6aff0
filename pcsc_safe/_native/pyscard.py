"""What the installed pyscard has: its names and their values, its functions' signatures, and its C functions.

The untyped world ends here.  To import pyscard is to load the native library; where that is not wanted, because every
context is to live in a broker (``broker="always"``), the broker says what its pyscard has, and its functions take the
place of the C functions.  Nothing here changes at a fork.
"""

from __future__ import annotations

import sys
import types
from typing import Any, Callable, NamedTuple

from .. import errors
from .._core.calls import CALLS
from .._core.settings import settings
from ..policy import Broker

__all__ = ["SUCCESS", "Signature", "catalogue", "constant", "is_loaded", "public", "raw", "shaped", "signatures"]


class Signature(NamedTuple):
    """How one of pyscard's functions is called."""

    name: str
    parameters: tuple[str, ...]
    doc: str

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Signature:
        """That of a function written in Python, as pyscard's wrappers of its C functions are."""
        code = function.__code__
        return cls(function.__name__, code.co_varnames[: code.co_argcount], function.__doc__ or "")


_TAKING: dict[int, Callable[[Callable[..., Any]], Any]] = {
    1: lambda route: lambda a: route(a),
    2: lambda route: lambda a, b: route(a, b),
    3: lambda route: lambda a, b, c: route(a, b, c),
    4: lambda route: lambda a, b, c, d: route(a, b, c, d),
}


def shaped(route: Callable[..., Any], like: Signature) -> Any:
    """``route`` with the name, parameters and docstring of pyscard's own function.

    So that it takes the same keywords, and Python words a wrong call the same way.
    """
    function = _TAKING[len(like.parameters)](route)
    function.__code__ = function.__code__.replace(co_name=like.name, co_varnames=like.parameters)
    function.__name__ = function.__qualname__ = like.name
    function.__module__, function.__doc__ = "pcsc_safe.scard", like.doc
    return function


public: dict[str, Any] = {}
"""Every public name of the installed ``smartcard.scard``, with its value."""

signatures: dict[str, Signature] = {}
"""Of those that are functions."""

raw: dict[str, Callable[..., Any]] = {}
"""The C functions, by PC/SC's name; they take real handles."""


def _from_pyscard() -> None:
    import smartcard.scard as scard  # while pyscard is being imported, a retrofit may ask: it has no attribute yet
    from smartcard.scard import _scard

    errors.join_pyscard()
    for name, value in vars(scard).items():
        if not name.startswith("_") and not isinstance(value, types.ModuleType):
            public[name] = value
            if isinstance(value, types.FunctionType):
                signatures[name] = Signature.of(value)
    # Not pyscard's wrappers of them: a wrapper looks its own up anew, and would find a retrofit there.
    for name in CALLS.keys() & public.keys():
        function = getattr(_scard, name)
        raw[name] = getattr(function, "__wrapped__", function)  # a retrofit's knows what it has replaced


def _from_broker() -> None:
    from ..broker import family

    described = family.describe()
    public["error"] = type("error", (Exception,), {"__module__": "scard"})
    public.update(described["constants"])
    for name, (parameters, doc) in described["functions"].items():
        signatures[name] = Signature(name, tuple(parameters), doc)
        raw[name] = family.functions[name]
        public[name] = shaped(raw[name], signatures[name])


def catalogue() -> dict[str, Any]:
    """What a broker says of its pyscard."""
    return {
        "constants": {name: value for name, value in public.items() if isinstance(value, (int, str))},
        "functions": {name: (list(like.parameters), like.doc) for name, like in signatures.items() if name in raw},
    }


is_loaded = settings().broker is not Broker.ALWAYS or "smartcard.scard._scard" in sys.modules
"""Whether the native library is in this process."""

if is_loaded:
    _from_pyscard()
else:
    _from_broker()


def constant(name: str) -> int:
    """The value of one of PC/SC's constants on this platform and in this pyscard."""
    return int(public[name])


SUCCESS = constant("SCARD_S_SUCCESS")
