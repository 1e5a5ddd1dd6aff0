"""What pyscard's classes have open in a program that uses :mod:`pcsc_safe.scard` and has not called ``install()``.

pcsc_safe protects the calls of such a program, but not pyscard's connections, requests and monitors.  The first fork
with one of these open logs a warning in the parent.  This module imports and replaces nothing, and costs a fork little:
each object refers to its class, so the objects are counted only if the number of references to the class has changed.

At a fork a child inherits whether the warning was logged.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from sys import getrefcount, modules
from typing import Any

from .._core import connections, log, process

__all__ = ["opened"]

_CLASSES = (
    ("smartcard.pcsc.PCSCCardConnection", "PCSCCardConnection"),
    ("smartcard.pcsc.PCSCCardRequest", "PCSCCardRequest"),
)
_SINGLETON = (
    "smartcard.pcsc.PCSCContext",
    "PCSCContext",
)  # before pyscard 2.3 all objects use the context of this singleton

_watched: tuple[type, ...] = ()
_last_reference_count = 0  # when there was nothing to report
_count_of_modules = 0


def opened() -> list[str]:
    """The objects of pyscard that have their own context: the class of each, and the reader if there is one."""
    classes = set(map(id, _classes()))  # issubclass() calls code of a metaclass: pyscard's, and the application's
    found = [each for each in gc.get_objects() if id(type(each)) in classes]
    open_objects = [_described(each) for each in found if _has_context(each)]
    return open_objects or ([_SINGLETON[1]] if _has_context(_singleton()) else [])


def _has_context(instance: Any) -> bool:
    return type(getattr(instance, "hcontext", None)) is int  # ours is a proxy


def _described(instance: Any) -> str:
    reader = getattr(instance, "reader", None)
    return type(instance).__name__ if reader is None else f"{type(instance).__name__} to {reader}"


def _classes() -> Iterator[type]:
    for module, name in _CLASSES:
        found = getattr(modules.get(module), name, None)
        if isinstance(found, type):
            yield from _with_derived(found)


def _with_derived(one: type) -> Iterator[type]:
    yield one
    derived: list[type] = one.__subclasses__()
    for each in derived:
        yield from _with_derived(each)


def _singleton() -> Any:
    return getattr(getattr(modules.get(_SINGLETON[0]), _SINGLETON[1], None), "instance", None)


def _before_fork() -> None:
    if len(modules) != _count_of_modules or _reference_count() != _last_reference_count:
        _warn_if_new()


def _reference_count() -> int:
    """A number that changes when the number of references to the classes changes."""
    references = sum(map(getrefcount, _watched))  # a derived class refers to its base, so that it is noticed, too
    return references + _has_context(_singleton()) if _SINGLETON[0] in modules else references


def _warn_if_new() -> None:
    global _count_of_modules, _last_reference_count, _watched
    _count_of_modules, watched = len(modules), tuple(_classes())
    if [*map(id, watched)] == [*map(id, _watched)] and _reference_count() == _last_reference_count:
        return
    _watched = watched
    del watched  # which refers to them
    _last_reference_count = _reference_count()
    connections.prepare()
    if connections.ARE_INHERITED and not connections.connections():
        return
    found = opened()
    if found:
        process.before_fork(process.WARN, None)
        log.warning(
            "unprotected",
            "process %(pid)d forks while %(object)s is open%(more)s, which pcsc_safe doesn't protect: call "
            "pcsc_safe.install() before you use pyscard's classes, or start the program with 'python -m pcsc_safe run'",
            object=found[0],
            more=f" (and {len(found) - 1} more)" if len(found) > 1 else "",
        )


process.before_fork(process.WARN, _before_fork)
