"""Puts the rooms together: gives the core its gateways, and the names of the installed pyscard.

The core knows neither :mod:`pcsc_safe._native` nor :mod:`pcsc_safe.broker`.  This module gives them to it once, when it
is imported.  To use other gateways, as a test does, call :func:`pcsc_safe._core.gateways.compose`.  Nothing here
changes at a fork.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

from ._core import gateways, observer
from ._core.settings import settings
from ._native import pyscard
from .policy import Broker

__all__ = ["files_to_preserve", "handover", "public"]

if TYPE_CHECKING:
    from ._core.handover import files_to_preserve, handover


class _Brokers:
    """The brokers of this process, by :mod:`pcsc_safe.broker.family`, which is imported when it can first be needed.

    :mod:`readiness` says when that is.
    """

    def prepare(self) -> None:
        """Import it, and what it requires."""
        from ._core import handover  # noqa: F401  # a child may call handover() for a child of its own
        from .broker import family  # not before

        family.prepare()

    def get(self) -> gateways.BrokerGateway:
        """The broker of this process; see :class:`gateways.Brokers`."""
        from .broker import family  # it is already imported, except in a child that is the first process to use PC/SC

        return family.get()

    def existing(self) -> Optional[gateways.BrokerGateway]:
        """The broker of this process, if it has one."""
        broker: Optional[gateways.BrokerGateway] = self._ask("existing")
        return broker

    def as_broker(self, gateway: object) -> Optional[gateways.BrokerGateway]:
        """The gateway, if it is a broker."""
        broker: Optional[gateways.BrokerGateway] = self._ask("as_broker", gateway)
        return broker

    def files_to_preserve(self) -> Sequence[int]:
        """The descriptors without which this process loses its broker."""
        return self._ask("files_to_preserve") or ()

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Call a function of that module; return None if it isn't imported, or another thread is importing it."""
        of_family = getattr(sys.modules.get(f"{__package__}.broker.family"), function, None)
        return of_family(*arguments) if of_family else None


if settings().broker is not Broker.ALWAYS or "smartcard.scard._scard" in sys.modules:
    pyscard.load()
else:
    from .broker import family

    pyscard.load_from_broker(family.functions, family.request_catalogue())

# From here on PC/SC's constants are known, which the modules below have in their tables.
from ._native import gateway  # noqa: E402

gateways.compose(gateway.gateway, _Brokers())
if observer.is_wanted():
    from ._trace import events, recorder

    if events.is_on():
        recorder.begin()

from ._core.router import public  # noqa: E402
from ._native import unprotected  # noqa: E402, F401  # imported last, so that its hook runs after all others


def __getattr__(name: str) -> Any:
    """Load a name that few programs need at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ._core import handover  # not before

    return getattr(handover, name)
