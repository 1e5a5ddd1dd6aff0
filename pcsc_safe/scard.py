"""``smartcard.scard``, safe to use on both sides of a fork.

Import it instead of ``smartcard.scard``: the same functions, constants and ``error``, with the same results.  In a
process that never forks only one thing differs: a failed call returns no uninitialised memory beside its error code.
SCardTransmit and SCardControl return ``[]``; hazard 11 of ``python -m pcsc_safe demo`` shows what pyscard returns.
"""

import sys as _sys

from ._gateways import public as _public

globals().update(_public)
scard = _sys.modules[__name__]  # some import the module smartcard.scard.scard from smartcard.scard
__all__ = list(_public)
