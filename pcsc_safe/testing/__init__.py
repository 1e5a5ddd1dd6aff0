"""A PC/SC stack without hardware: a real pcscd with the vpcd reader driver, and cards scripted in Python.

::

    from pcsc_safe.testing import EchoCard, VirtualPcsc

    with VirtualPcsc(cards=[EchoCard()]) as pcsc:
        ...  # smartcard.scard, pyscard, pcsc_safe.scard: all see pcsc.readers[0].name

For pytest the fixtures ``pcsc_stack`` and ``pcsc_card`` are in `pcsc_safe.testing.plugin`.

It needs Linux, pcscd and vpcd (Debian: pcscd, vsmartcard-vpcd), but no system service, no network, and no root if the
directory /run/pcscd exists.  It makes no PC/SC call in this process.

Invariant: a stack leaves nothing behind, whatever happens to the process that started it.

At a fork: a stack belongs to the process that started it.  Its children can use it, and can't damage it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._errors import PcscStackError
    from ._stack import Reader, VirtualPcsc
    from .cards import DEFAULT_ATR, CardEvent, EchoCard, VirtualCard

__all__ = ["DEFAULT_ATR", "CardEvent", "EchoCard", "PcscStackError", "Reader", "VirtualCard", "VirtualPcsc"]

_HOME = {"PcscStackError": "_errors", "Reader": "_stack", "VirtualPcsc": "_stack"}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use (PEP 562): every pytest run imports this package for its plugin."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME.get(name, 'cards')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
