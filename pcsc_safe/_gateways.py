"""Puts the rooms together: gives the core its gateways, and the names of the installed pyscard.

The core knows neither :mod:`pcsc_safe._native` nor :mod:`pcsc_safe.broker`.  This module gives them to it once, when it
is imported.  To use other gateways, as a test does, call :func:`pcsc_safe._core.gateways.compose`.  Nothing here
changes at a fork.
"""

from __future__ import annotations

import sys

from ._core import gateways
from ._core.settings import settings
from ._native import pyscard
from ._trace import events
from .broker import family
from .policy import Broker

__all__ = ["files_to_preserve", "handover", "public"]

if settings().broker is not Broker.ALWAYS or "smartcard.scard._scard" in sys.modules:
    pyscard.load()
else:
    pyscard.stand_in(family.functions, family.describe())

# From here on PC/SC's constants are known, which the modules below have in their tables.
from ._native import gateway

gateways.compose(gateway.gateway, family)
if events.is_on():
    from ._trace import recorder

    recorder.begin()

from ._core.handover import files_to_preserve, handover  # noqa: E402
from ._core.router import public  # noqa: E402
from ._native import unprotected  # noqa: E402, F401  # its hook comes last: what a fork needs has been done then
