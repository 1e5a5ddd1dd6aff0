"""Distinguishes exceptions of this package's own calls from exceptions of signal handlers.

Python can run a signal handler in the middle of any function, so a ``try`` also catches what the handler raises.  A
handler's TimeoutError, which is an OSError, would look like a failed system call, and the application would never get
it.  But the traceback of such an exception has the handler's frame, which is not a frame of this package.  An exception
that another thread has sent (PyThreadState_SetAsyncExc) has no such frame, but it is made without arguments; those of C
functions and of this package have some.
Nothing here changes at a fork.
"""

from __future__ import annotations

from types import TracebackType
from typing import Optional

__all__ = ["is_ours", "suppress"]

_OURS = frozenset((__name__.partition(".")[0], "gevent", "eventlet", "tempfile"))
"""Packages whose frames are not a handler's; gevent and eventlet replace some C functions by Python functions."""


def is_ours(error: BaseException) -> bool:
    """Whether a C function that this package called raised this, and not the application.

    :param error: just caught; the ``try`` called only modules of this package and C functions.
    """
    if not error.args:
        return False
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in _OURS:
            return False
        step = step.tb_next
    return True


class suppress:  # noqa: N801  # as contextlib's
    """Suppress these exceptions where they :func:`are ours <is_ours>`."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], where: Optional[TracebackType]
    ) -> bool:
        return isinstance(error, self._kinds) and is_ours(error)
