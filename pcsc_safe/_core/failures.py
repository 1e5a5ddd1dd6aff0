"""Whose an exception is: of what failed here, or of a signal handler.

Python runs a signal handler in the middle of any function, so a ``try`` catches what the handler raises as well: a
TimeoutError, which is an OSError, would pass for a failed system call, and the application would wait for its timeout
for ever.  But what a handler raises has the handler's frame in its traceback, and that is not a frame of this package.
Nothing here changes at a fork.
"""

from __future__ import annotations

from types import TracebackType
from typing import Optional

__all__ = ["is_ours", "suppress"]

_OURS = frozenset((__name__.partition(".")[0], "gevent", "eventlet"))
"""Whose frames are no handler's; the others put functions of their own in the place of some of C."""


def is_ours(error: BaseException) -> bool:
    """Whether a function of C raised this, called by this package, and not the application.

    :param error: just caught; no module but those of this package and of C was called in the ``try``.
    """
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
