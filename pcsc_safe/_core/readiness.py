"""Imports what a broker requires, before a child can need it.

A child must not be the first process to import a module if another thread may have held an import lock at its fork.
Signal handlers and finalizers must never be the first.  So what a broker requires is imported when a process uses PC/SC
for the first time, or when the settings say that it needs a broker.  If a signal handler has prevented that, the next
call or the next fork does it; if there are other threads, in a separate thread, in which no code of the application
runs.

Invariant: a child whose fork was not quiet has nothing left to import, unless it was forked during these imports.  In
that case it uses no broker.
"""

from __future__ import annotations

import atexit
from typing import Any

from ..policy import Broker, Owner, Policy, Settings, native_works_after_fork
from . import gate, gateways, in_flight, process
from .failures import is_ours
from .one_step import in_one_step
from .unpatched import allocate_lock, count_threads, get_ident, monotonic, start_new_thread

__all__ = ["begin", "consider", "is_on", "is_ready", "lacks_broker", "prepare"]

is_on = True
"""Whether this process can have children, or use a broker; a broker does neither."""

is_ready = True
"""Whether nothing is left to import; also true before the first use of PC/SC, and if this process must not import."""

_is_prepared = False

lacks_broker = False
"""Whether this process was forked during these imports."""

_importing: set[int] = set()  # the threads that are at it
_aside: dict[Any, None] = {}  # a lock that is held while a thread of its own is at it
_WAITED_FOR = 1.0  # s; an import of the application's that a handler has interrupted may keep that thread
_ATTEMPTS = 3


def consider(settings: Settings) -> None:
    """Import what this process, or a child, needs in any case according to these settings."""
    if settings.owner is Owner.CHILD or settings.policy is Policy.SHARE:
        from . import transfer  # not for processes that give their children nothing

        transfer.begin()
    always = settings.broker is Broker.ALWAYS or settings.policy is Policy.BROKER
    if always or settings.recover or not native_works_after_fork():
        gate.during(in_flight.IMPORTS, _import)


def begin() -> None:
    """Note that this process uses PC/SC from now on; called where a fork waits for imports."""
    global is_ready
    is_ready = _is_prepared or not is_on
    if is_ready:
        return
    gate.before_waiting = _before_fork
    atexit.register(_leave_it)  # finalizers that come later import nothing
    _import()  # not later, in a call beside other threads: it would hold locks of modules while a handler runs


def prepare() -> None:
    """Import what is left; for calls and forks in a process with other threads."""
    gate.during(in_flight.IMPORTS, _import_aside)


def _import_aside() -> None:
    """Import in a separate thread, and wait for it."""
    if get_ident() in _importing:
        return None  # a finalizer, in that thread
    over = allocate_lock()
    over.acquire()
    try:
        if not _aside:
            in_one_step((_aside.setdefault, over), (start_new_thread, _import_and_say, (over,)))
    except RuntimeError as error:  # there is no thread to be had
        if not is_ours(error):
            raise
        _aside.pop(over, None)
        return _import()
    for running in list(_aside):
        if running.acquire(True, _WAITED_FOR):
            running.release()
        else:
            _aside.pop(running, None)  # the next call tries again
    return None


def _import_and_say(over: Any) -> None:
    key = object()
    try:
        in_flight.elsewhere[key] = (in_flight.IMPORTS, get_ident(), monotonic(), None)
        _import()
    finally:
        in_flight.elsewhere.pop(key, None)
        _aside.pop(over, None)
        over.release()


def _import() -> None:
    global _is_prepared
    ident = get_ident()
    if ident in _importing:
        return  # a signal handler or a finalizer, in the middle of it
    try:
        _importing.add(ident)
        if not _is_prepared:
            gateways.brokers.prepare()
    except (AttributeError, ImportError):
        return  # a signal handler, in the middle of another import of the same: the next call tries again
    finally:
        _importing.discard(ident)
    _is_prepared = True
    _leave_it()


def _leave_it() -> None:
    """Stop importing."""
    global is_ready
    is_ready = True
    gate.before_waiting = bool


def _before_fork() -> None:
    for _ in range(_ATTEMPTS):
        try:
            return prepare()
        except BaseException as error:  # a signal handler's; a hook can't raise
            gate.raise_later(get_ident(), error)
    return None


def _begin(epoch: process.Epoch) -> None:
    global lacks_broker
    if not is_ready and epoch.unquiet is not None and epoch.unquiet.function == in_flight.IMPORTS:
        lacks_broker = True
    _importing.clear()
    _aside.clear()
    if epoch.noticed_by != "hook" and count_threads():
        _leave_it()  # another thread may have been importing


process.at_fork(at_begin=_begin)
