"""``smartcard.scard``, safe to use on both sides of a fork.

Import it instead of ``smartcard.scard``.  It has the same functions, constants and ``error``, with the same results.
In a process that never forks, one result differs: if SCardTransmit, SCardControl or another call fails, the data that
it returns is ``[]``.  pyscard returns uninitialised memory instead (hazard 11 of ``python -m pcsc_safe demo``).
Contexts and cards are proxies of integers; pass ``int(context)`` to C code.
"""

import sys as _sys

from ._gateways import public as _public

globals().update(_public)
scard = _sys.modules[__name__]  # some programs use the module smartcard.scard.scard, also after "import *"
__all__ = [*_public, "scard"]
