"""A wait for events in the main thread, during which signal handlers run.

Python runs signal handlers in its main thread, between two steps of Python, and therefore only after a C function has
returned.  A wait for events can last for hours.  So if the main thread waits, another thread makes the native call, and
the main thread waits for a lock that this thread releases.  During that wait a handler runs as soon as the signal
arrives.  It may do anything, because the main thread is not inside the native library.  If the handler raises, the
native call is ended.

The other thread runs no code of the application and receives no signal.  It has ended when the wait returns.

At a fork it is a thread in a wait like any other.  A child that a handler forks doesn't have this thread: the hook
releases the lock, and the child continues as with any call on an inherited object.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enumerations when it is imported
import os
import sys
import threading
from functools import partial
from typing import Any, Callable

from .._core import in_flight, process
from .._core.failures import is_ours
from .._core.one_step import Operation
from .._core.unpatched import allocate_lock, get_ident, get_native_id, sleep, start_new_thread
from .native_context import NativeContext

__all__ = ["attempt", "is_wanted"]

_SHORT = 100  # ms; how long a handler can wait
_CHECK_INTERVAL = 5.0  # s; whether a fork that ran no hook has made this another process
_END_TIMEOUT = 1.0  # s
# A thread that has nothing left to do needs two intervals to end.
_REMOVAL_INTERVAL, _REMOVAL_CHECKS = 0.00002, 100  # s, and how many
_LINUX = sys.platform.startswith("linux")


def is_wanted(timeout: int) -> bool:
    """Whether a wait of this thread would delay signal handlers.

    :param timeout: in ms.
    """
    return timeout > _SHORT and _runs_handlers()


def _runs_handlers() -> bool:
    if _LINUX:
        return bool(get_native_id() == os.getpid())  # threading's main_thread() is a greenlet where gevent patched it
    return bool(get_ident() == threading.main_thread().ident)


def attempt(
    place: NativeContext, owned: Any, function: str, *operations: Operation, wait: Any, **more: Any
) -> list[Any]:
    """:func:`in_flight.attempt`, made by another thread.

    :return: the same; also empty in a child that was forked in the meantime.
    """
    gate = in_flight.closed_for(get_ident())
    if place.calls or gate:
        return []  # without a thread for it
    call = partial(in_flight.attempt, place, owned, function, *operations, wait=wait, gate=gate, **more)
    other = _OtherThread(call)
    try:
        process.locks_to_release[other] = other.done  # several, where handlers wait too
        if not other.start():
            return call()
        return other.outcome()
    except BaseException:
        if other.started and not other.has_ended:  # otherwise the call itself has failed
            try:
                # The first call after the exception, so no handler comes before it: somebody does end the native call.
                start_new_thread(_end, (place, wait))
            except RuntimeError:
                _end(place, wait)
            other.done.acquire(True, _END_TIMEOUT)
        raise
    finally:
        process.locks_to_release.pop(other, None)


class _OtherThread:
    """A thread that makes one call.

    :ivar done: a lock, held until it is over.
    :ivar started: not empty if it was started.
    :ivar has_ended: whether the call is over.
    """

    def __init__(self, call: Callable[[], list[Any]]) -> None:
        self.done = allocate_lock()
        self.done.acquire()
        self._call = call
        self.started: list[Any] = []
        self._returned: list[list[Any]] = []
        self._raised: list[BaseException] = []
        self.has_ended = False
        self._native_id = 0

    def start(self) -> bool:
        """Start; False if no thread can be started: the limit is reached, or the interpreter ends."""
        start = map(start_new_thread, (self._run,), ((),))
        try:
            self.started.extend(start)
        except RuntimeError as error:
            if not is_ours(error):
                raise
            if self.started:
                raise  # a handler has
        return bool(self.started)

    def _run(self) -> None:
        try:
            self._native_id = get_native_id()
            _signal.pthread_sigmask(_signal.SIG_BLOCK, _BLOCKED_SIGNALS)
            self._returned.append(self._call())
        except BaseException as error:
            self._raised.append(error)
        finally:
            self.has_ended = True
            self.done.release()

    def outcome(self) -> list[Any]:
        """What the call returned; empty in a child that has no such thread."""
        while not self.done.acquire(True, _CHECK_INTERVAL) and process.sentinel[0]:
            pass
        if _LINUX:
            self._wait_until_removed()
        if self._raised:
            raise self._raised.pop()
        return self._returned.pop() if self._returned else []

    def _wait_until_removed(self) -> None:
        """Wait until the system has removed the thread: since Python 3.12 a fork warns about several threads."""
        for _ in range(_REMOVAL_CHECKS):
            if not os.path.exists(f"/proc/self/task/{self._native_id}"):
                break
            sleep(_REMOVAL_INTERVAL)


_FAULT_SIGNALS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS")
_BLOCKED_SIGNALS = set(_signal.valid_signals()) - {getattr(_signal, name, 0) for name in _FAULT_SIGNALS}


def _end(place: NativeContext, wait: Any) -> None:
    """End the native call of a wait, or keep it from beginning."""
    wait.cancelled = True
    place.end(wait)


def _begin(epoch: process.Epoch) -> None:
    for lock in list(process.locks_to_release.values()):
        if process.here is not epoch and lock.locked():
            lock.release()


process.at_fork(at_begin=_begin)
process.clear_at_begin(process.locks_to_release)
