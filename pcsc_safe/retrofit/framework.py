"""pyscard's classes in a forked child: their locks, and their finalizers.

A lock that another thread held at the fork stays locked in the child for ever.  So a child replaces each lock at its
first use of it.  It never releases one, because the lock is another thread's.  A lock that the forking thread itself
holds stays: this thread will release it.  The finalizer of an inherited connection does nothing and prints nothing.

Invariant: in a process that never forks every attribute here reads as it did.  No lock is held here, because a signal
handler may raise, or wait for a thread that uses the same attribute.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any, Callable

from .._core import process
from .._core.calls import ByDefault
from .._core.settings import settings
from .patches import MISSING, Patch

__all__ = [
    "SharedLock",
    "card_service",
    "pcsc_card_connection",
    "pcsc_card_request",
    "pcsc_context",
    "renew_pcsc_context",
    "synchronization",
]


def _held_here(lock: Any) -> bool:
    """Whether this is the thread that forked, and it holds the lock; others may reuse a dead thread's number."""
    if threading.get_ident() != threading.main_thread().ident:
        return False
    is_owned = getattr(lock, "_is_owned", None)  # a Lock has none, and it is not held where it is asked for
    return is_owned is not None and bool(is_owned())


class _PerProcessAttribute:
    """An attribute of instances that differs in each process; a data descriptor over the instance's dictionary.

    :param name: of the attribute.
    :param make: makes the new value in a child.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self._name = name
        self._of = f"_pcsc_safe_epoch_of_{name}"
        self._make = make
        self._since = process.current()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        values = vars(instance)
        if self._name not in values:
            raise AttributeError(f"{type(instance).__name__!r} object has no attribute {self._name!r}")
        if values.get(self._of, self._since) is not process.current():
            self._renew(values)
        return values[self._name]

    def __set__(self, instance: Any, value: Any) -> None:
        values = vars(instance)
        values[self._of] = process.current()
        values[self._name] = value

    def __delete__(self, instance: Any) -> None:
        vars(instance).pop(self._of, None)
        if vars(instance).pop(self._name, MISSING) is MISSING:
            raise AttributeError(self._name)

    def _renew(self, values: dict[str, Any]) -> None:
        epoch = process.current()
        old = values[self._name]
        new = old if _held_here(old) else self._make()
        # dict.setdefault is atomic: of several threads, or a thread and its signal handler, the first decides.
        values[self._name] = values.setdefault(f"{self._of}_{epoch.number}", new)
        values[self._of] = epoch


class SharedLock:
    """A lock of a class, in its dictionary; each process has its own.

    :param lock: the original lock.
    :param make: makes the new lock in a child.
    :param in_child: called in a child, with the new lock in place; several threads may call it.
    """

    def __init__(self, lock: Any, make: Callable[[], Any], in_child: Callable[[], None] = lambda: None) -> None:
        self._lock = lock
        self._make = make
        self._in_child = in_child
        self._epoch = process.current()
        self._renewed: dict[process.Epoch, Any] = {}

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if self._epoch is not process.current():
            self._renew()
        return self._lock

    def _renew(self) -> None:
        epoch = process.current()
        new = self._lock if _held_here(self._lock) else self._make()
        self._lock = self._renewed.setdefault(epoch, new)  # the first decides, as above
        self._in_child()
        self._epoch = epoch

    def restored_value(self, original: object) -> Any:
        """The lock to restore in the end: not one that is held for ever."""
        return self.__get__(None)


def synchronization(module: Any) -> list[Patch]:
    """The lock of everything that can be observed: connections, monitors."""
    return [Patch(module.Synchronization, "mutex", _PerProcessAttribute("mutex", threading.RLock))]


def pcsc_context(module: Any) -> list[Patch]:
    """The lock of the singleton of pyscard before 2.3, whose context is like any other.

    pyscard renews the singleton when pcscd has ended.  This releases the context of all cards, and leaves a released
    context if no new one can be established.  With ``recover`` pyscard's renewal is not needed.
    """
    singleton = module.PCSCContext
    renew = singleton.renewContext

    def in_child() -> None:
        old = singleton.instance
        if old is not None and type(old.hcontext) is int and singleton.instance is old:
            singleton.instance = None  # established before install(), so this process doesn't own it

    def renew_context() -> Any:
        instance = singleton.instance
        record = getattr(instance and instance.hcontext, "_self_record", None)
        if settings().recover and record is not None and not record.released:
            return instance.hcontext
        return renew()

    return [
        Patch(singleton, "mutex", SharedLock(singleton.mutex, threading.RLock, in_child)),
        Patch(singleton, "renewContext", staticmethod(renew_context)),
    ]


def renew_pcsc_context() -> None:
    """At the end of the retrofit: if that singleton has one of our contexts, let pyscard make a new one.

    pyscard itself does this when pcscd was restarted.
    """
    singleton = getattr(sys.modules.get("smartcard.pcsc.PCSCContext"), "PCSCContext", None)
    if singleton is None:
        return
    with singleton.mutex:
        old = singleton.instance
        if getattr(old and old.hcontext, "_self_record", None) is not None:
            singleton.instance = None
            old.releaseContext()


def pcsc_card_connection(module: Any) -> list[Patch]:
    """Its finalizer; and its default dispositions, marked so that they differ from what the application specifies."""
    connection = module.PCSCCardConnection
    defaults = {"connect": module.SCARD_UNPOWER_CARD, "reconnect": module.SCARD_RESET_CARD}
    return _finalizer(connection) + [
        Patch(connection, name, _with_default(vars(connection)[name], ByDefault(value)))
        for name, value in defaults.items()
        if name in vars(connection)
    ]


def _with_default(method: Any, default: ByDefault) -> Any:
    """``method``, with the documented default of its last argument marked as a default."""

    @functools.wraps(method)
    def replacement(self: Any, protocol: Any = None, mode: Any = None, disposition: Any = None) -> Any:
        return method(self, protocol, mode, default if disposition is None else disposition)

    return replacement


def card_service(module: Any) -> list[Patch]:
    """Its finalizer, which disconnects."""
    return _finalizer(module.CardService)


def pcsc_card_request(module: Any) -> list[Patch]:
    """Its finalizer and, in some versions, its event, whose lock a waiting thread may have held at the fork."""
    request = module.PCSCCardRequest
    event = [Patch(request, "evt", _PerProcessAttribute("evt", threading.Event))]
    return _finalizer(request) + (event if "evt" in request.__init__.__code__.co_names else [])


def _finalizer(owner: Any) -> list[Patch]:
    finalize = vars(owner).get("__del__")
    if finalize is None:
        return []
    current = process.current  # at the end of the interpreter a module's globals may be None

    def __del__(self: Any) -> None:  # noqa: N807  # it is one
        try:
            finalize(self)
        except Exception:
            if current().parent is None:
                raise
            # In a forked process: what was opened before install() refuses to be closed, and needn't be.

    return [Patch(owner, "__del__", __del__)]
