"""Several C functions in one step of the interpreter.

Between two steps of Python a signal handler, a finalizer or another thread's exception can run.  A C function that goes
through an iterator of C functions doesn't return to the interpreter in between, so none of them can run there
(finalizers: from Python 3.12).  Only acquiring a lock with a timeout runs signal handlers while it waits, so it comes
first in its step.  A lock that one step takes and releases is therefore never locked while code of the application
runs.  Nothing here changes at a fork.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import starmap, takewhile
from typing import Any, Callable, TypeVar

__all__ = ["Operation", "call_each", "call_in_turn", "consumer", "in_one_step", "is_not_false"]


_Result = TypeVar("_Result")

Operation = tuple[Any, ...]
"""A C function and its arguments."""


def _call_each_partial(operations: Iterable[Operation]) -> Iterator[Any]:
    return map(_call_a_partial, starmap(partial, operations))


_call_a_partial: Any = partial.__call__

_call: Any = getattr(operator, "call", None)  # since Python 3.11

call_each: Callable[[Iterable[Operation]], Iterator[Any]] = partial(starmap, _call) if _call else _call_each_partial
"""An iterator of what these return; each is called when the iterator reaches it, in C if C code iterates."""

is_not_false = partial(operator.is_not, False)

consumer: deque[Any] = deque(maxlen=0)
"""Takes results of C functions that are not needed."""


def in_one_step(*operations: Operation) -> None:
    """Call each of these without returning to the interpreter in between.

    A call that returns False is the last one.
    """
    consumer.extend(takewhile(is_not_false, call_each(operations)))


_TURN_TIMEOUT = 1.0  # s


def call_in_turn(lock: Any, function: Callable[[], _Result]) -> _Result:
    """Return ``function()``, called after other threads that do the same.

    This avoids double work, but is no mutual exclusion.  A signal handler may interrupt the thread whose turn it is,
    and wait for this thread.  So a thread waits for one second at most, and the function must then be correct, too:
    each of its steps takes effect only if no other thread has done it.

    :param lock: an RLock; a handler that raises does not leave it held.
    """
    held: list[bool] = []
    try:
        held.extend(call_each(((lock.acquire, True, _TURN_TIMEOUT),)))
        return function()
    finally:
        if held and held[0]:
            lock.release()
