"""The gate that a fork closes before the native library.

libpcsclite has locks.  A child that was forked while another thread held one blocks for ever in its first call.  So a
fork waits, at most for :data:`quiesce_timeout`, until no thread is inside (the fork is then *quiet*), and no thread can
enter while it waits; see :mod:`in_flight`.

Invariant: the child of a fork that was not quiet never enters the native library.  In a child nothing here stays closed
or locked.
"""

from __future__ import annotations

import sys
import threading
from operator import not_
from typing import Any, Callable

from ..policy import Policy, Settings, native_works_after_fork
from . import in_flight, process, settings
from .failures import suppress
from .in_flight import PAUSE, calls_without_place, places, unsettled, wait_until_open
from .one_step import in_one_step
from .unpatched import count_threads, get_ident, monotonic, sleep, start_new_thread

__all__ = ["call_inside", "close_if_quiet", "raise_later", "wait_until_quiet"]

_WAKE_INTERVAL = 0.01  # s; a wait that can't be ended for good may have begun since
_FOREVER = float("inf")
_GRACE = 1.0  # s; longer than a fork takes that waited for quiesce_timeout

quiesce_timeout = 1.0
"""How long a fork waits at most, in seconds; a setting."""

_policy = Policy.AUTO
_thread_names: dict[int, str] = {}


def _configured(now: Settings) -> None:
    global quiesce_timeout, _policy
    quiesce_timeout, _policy = now.quiesce_timeout, now.policy


settings.when_changed(_configured)


def call_inside(function: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``call(*arguments)``, a call that a fork waits for and that has no place.

    :param function: PC/SC's name of the call, or another name.
    """
    key, ident = object(), get_ident()
    entry = (function, ident, monotonic(), None)
    try:
        while key not in calls_without_place:
            in_one_step((not_, wait_until_open(ident)), (calls_without_place.__setitem__, key, entry))
        return call(*arguments)
    finally:
        calls_without_place.pop(key, None)


def close_if_quiet() -> bool:
    """Close the gate until the next fork.

    If another thread is forking, its fork comes first, and does not wait for ours: it may already hold locks that we
    need to get there, such as logging's.  It opens the gate, and ours closes it again.

    :return: whether no other thread is inside; if one is, the gate is open.
    """
    _close(include_native=True)
    if in_flight.others_are_inside():
        in_flight.closers.pop(get_ident(), None)
        return False
    in_flight.closers[get_ident()] = _FOREVER
    return True


def wait_until_quiet() -> bool:
    """Wait before a fork, with the gate closed; return whether no other thread is inside."""
    ident, deadline = get_ident(), monotonic() + quiesce_timeout
    in_flight.closers.setdefault(ident, deadline + _GRACE)  # a signal handler may have kept the first hook from it
    _quiesce(ident, deadline, include_native=True)
    return not in_flight.others_are_inside()


def _before_fork() -> None:
    # Usually no other thread is inside, and a fork costs only this check.
    if not (count_threads() or any(places.values()) or calls_without_place or unsettled):
        return
    try:
        if count_threads() or in_flight.calls():
            # If the child can't use the native library anyway, the fork needn't wait for native calls.
            may_use_native = _policy is not Policy.BROKER or settings.for_contexts
            _close(include_native=may_use_native and native_works_after_fork())
    finally:
        _settle()


def _settle(attempts: int = 3) -> None:
    try:
        for place in list(unsettled):
            place.settle()
    except BaseException:  # a signal handler's; without this the child would keep a connection
        if attempts > 1:
            _settle(attempts - 1)
        raise


def _close(*, include_native: bool) -> None:
    if not process.sentinel[0]:
        return  # a child that never used PC/SC: the calls in the table are its parent's
    ident = get_ident()
    deadline = monotonic() + quiesce_timeout
    until = deadline + _GRACE
    try:
        while _is_another_forking(ident) and monotonic() < deadline:
            sleep(PAUSE)
        in_flight.closers[ident] = until
        _quiesce(ident, deadline, include_native=include_native)
    finally:  # also if a signal handler raises
        in_flight.closers[ident] = until
        if in_flight.others_are_inside():
            _thread_names.update({thread.ident or 0: thread.name for thread in threading.enumerate()})


def _is_another_forking(ident: int) -> bool:
    return any(until < _FOREVER for thread, until in list(in_flight.closers.items()) if thread != ident)


def _quiesce(ident: int, deadline: float, *, include_native: bool) -> None:
    """Wait until no other thread is inside, or until the timeout.

    :param include_native: also wait for native calls, and end waits for events.
    """
    interrupters: list[list[bool]] = []
    try:
        _wait_for_others(ident, deadline, include_native, interrupters)
    finally:
        for interrupter in interrupters:
            interrupter.append(True)
    if interrupters:  # for what it is doing
        _wait_for_others(ident, deadline, include_native, interrupters)


def _wait_for_others(ident: int, deadline: float, include_native: bool, interrupters: list[list[bool]]) -> None:
    while (remaining := deadline - monotonic()) > 0:
        busy = [
            place for place in list(places) if include_native and any(call[1] != ident for call in list(place.calls))
        ]
        others = [
            call
            for call in list(in_flight.calls_without_place.values())
            if call[1] != ident and (include_native or call[0] in in_flight.NOT_NATIVE)
        ]
        if not busy and not others:
            return
        if not interrupters and any(call[3] is not None for place in busy for call in list(place.calls)):
            interrupters.append([])
            with suppress(RuntimeError):  # no thread can be started: at worst the fork is unquiet
                start_new_thread(_end_waits, (ident, interrupters[0]))
        for call in others:
            if call[3] is not None:
                call[3].interrupt()
        if busy:
            busy[0].wait_until_free(remaining)
        else:
            sleep(PAUSE)
        in_flight.closers.setdefault(ident, deadline + _GRACE)  # a signal handler may have forked


def _end_waits(forking: int, stopped: list[bool]) -> None:
    """End the native calls of waits for events for a fork, also of those that begin later, until it is stopped.

    This runs in a separate thread, because it may need pcscd, which may not respond, and a fork must not wait longer
    than its timeout.  The fork waits for each call that this makes: it may establish a native context.

    :param forking: the thread that forks.
    :param stopped: not empty if it is.
    """
    key, ident = object(), get_ident()
    while not stopped:
        calls = [(place, call) for place in list(places) for call in list(place.calls)]
        for place, wait in [(place, call[3]) for place, call in calls if call[3] and call[1] != forking]:
            entry = ("SCardCancel", ident, monotonic(), None)
            try:
                in_one_step((not_, stopped), (calls_without_place.__setitem__, key, entry))
                if key in calls_without_place:  # otherwise the fork looks no more
                    place.wake(wait)
            finally:
                calls_without_place.pop(key, None)
        sleep(_WAKE_INTERVAL)


def raise_later(ident: int, error: BaseException) -> None:
    """Raise ``error`` in the thread ``ident``, after its fork."""
    start_new_thread(_raise_later, (ident, error))


def _raise_after_fork(ident: int, error: BaseException) -> None:
    in_flight.closers.setdefault(ident, monotonic() + _GRACE)  # until the fork is over: the thread waits for that
    raise_later(ident, error)


def _raise_later(ident: int, error: BaseException) -> None:
    _wait_for_forks()
    ctypes = call_inside(in_flight.IMPORTS, __import__, "ctypes")  # rarely needed
    _wait_for_forks()  # for the next one, too, which has waited for the import

    def the_very_instance(kind: type[BaseException]) -> BaseException:
        if sys.version_info < (3, 12):
            raise error  # returned, it would lose its traceback, and so the frame that shows that it is not ours
        return error

    # What is raised in another thread is a class, without arguments.
    carrier = type(type(error).__name__, (type(error),), {"__new__": the_very_instance})
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(carrier))


def _wait_for_forks() -> None:
    while in_flight.closers:
        sleep(PAUSE)


def _begin(epoch: process.Epoch) -> None:
    """Decide whether the fork was quiet."""
    # The thread that forked can be inside itself, if a finalizer forked in the middle of a call.  All other calls in
    # the table count, even if a thread of this process has the number of one of the parent's threads.
    calls = in_flight.calls()
    if process.here is epoch:  # a signal handler's call has begun it in the middle of that
        return
    for function, thread, since, _ in calls:
        if thread != process.forked_by and (epoch.unquiet is None or function == in_flight.IMPORTS):
            epoch.unquiet = in_flight.Unquiet(function, _thread_names.get(thread, str(thread)), monotonic() - since)


# A C function opens the gate, so nothing can interrupt this.  A signal handler could raise in a hook in Python.
process.raise_later = _raise_after_fork
process.before_fork(process.QUIESCE, _before_fork)
process.after_fork_in_parent(in_flight.closers.clear)
process.at_fork(at_begin=_begin)
process.clear_at_begin(places, unsettled, calls_without_place, in_flight.closers, _thread_names)
