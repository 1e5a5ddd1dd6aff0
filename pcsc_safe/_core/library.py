"""What the installed pyscard has: its public names and their values, and the signatures of its functions.

The first gateway that reaches a pyscard fills this in once, before anything else of the core is imported: this
process's native library, or a broker (see :mod:`pcsc_safe._gateways`).  Nothing here changes at a fork.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable

__all__ = [
    "SUCCESS",
    "Signature",
    "catalogue",
    "constant",
    "load_catalogue",
    "public",
    "replaced",
    "signatures",
    "with_signature",
]

SUCCESS = 0
"""SCARD_S_SUCCESS; the one code that is the same on every platform."""


class Signature:
    """How one of pyscard's functions is called."""

    def __init__(self, name: str, parameters: tuple[str, ...], doc: str) -> None:
        self.name = name
        self.parameters = parameters
        self.doc = doc

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Signature:
        """The signature of a function written in Python, such as pyscard's wrappers of its C functions."""
        code = function.__code__
        return cls(function.__name__, code.co_varnames[: code.co_argcount], function.__doc__ or "")


_WRAPPERS: dict[int, Callable[[Callable[..., Any]], Any]] = {
    1: lambda route: lambda a: route(a),
    2: lambda route: lambda a, b: route(a, b),
    3: lambda route: lambda a, b, c: route(a, b, c),
    4: lambda route: lambda a, b, c, d: route(a, b, c, d),
}


def with_signature(route: Callable[..., Any], signature: Signature) -> Any:
    """``route`` with the name, parameters and docstring of pyscard's own function.

    So it takes the same keywords, and wrong arguments raise the same TypeError.
    """
    function = _WRAPPERS[len(signature.parameters)](route)
    function.__code__ = function.__code__.replace(co_name=signature.name, co_varnames=signature.parameters)
    function.__name__ = function.__qualname__ = signature.name
    function.__module__, function.__doc__ = "pcsc_safe.scard", signature.doc
    return function


public: dict[str, Any] = {}
"""Every public name of ``smartcard.scard``, with its value."""

replaced: dict[str, Callable[..., Any]] = {}
"""The C functions that the retrofit has replaced, or what another tool had put there before."""

signatures: dict[str, Signature] = {}
"""The signatures of those that are functions."""


def catalogue() -> dict[str, Any]:
    """The contents of this module as plain values, which a broker sends to its client; see :func:`load_catalogue`."""
    constants = {name: value for name, value in public.items() if isinstance(value, (int, str))}
    functions = {name: (list(signature.parameters), signature.doc) for name, signature in signatures.items()}
    return {"constants": constants, "functions": functions}


def load_catalogue(described: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> None:
    """Fill this module with another process's catalogue of its pyscard.

    :param described: its :func:`catalogue`.
    :param functions: the functions that call those of the other process, by PC/SC's name.
    """
    public["error"] = type("error", (Exception,), {"__module__": "scard"})
    public.update(described["constants"])
    for name, (parameters, doc) in described["functions"].items():
        if name in functions:
            signatures[name] = Signature(name, tuple(parameters), doc)
            public[name] = with_signature(functions[name], signatures[name])


def constant(name: str) -> int:
    """The value of one of PC/SC's constants on this platform and in this pyscard."""
    return int(public[name])
