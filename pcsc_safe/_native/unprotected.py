"""What pyscard's own classes have open in a program that uses :mod:`pcsc_safe.scard`, and has not called ``install()``.

Such a program has both: its own calls are protected, and its connections, requests and monitors are not.  The first
fork with one of these open says so, in the log of the parent.  For that nothing is imported or replaced.  Nor does it
cost a fork much: each object refers to its class, so while the number of references is what it was, nobody looks.

At a fork a child inherits whether it was said.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

from .._core import connections, gate, log, process
from .._core.unpatched import get_ident

__all__ = ["opened"]

_CLASSES = (
    ("smartcard.pcsc.PCSCCardConnection", "PCSCCardConnection"),
    ("smartcard.pcsc.PCSCCardRequest", "PCSCCardRequest"),
)
_SINGLETON = "smartcard.pcsc.PCSCContext", "PCSCContext"  # before pyscard 2.3 everything has the context of this one

_is_told = False
_watched: tuple[type, ...] = ()
_last_signs = -1  # when there was nothing to tell


def opened() -> list[str]:
    """What has a context that is pyscard's own: the class, and the reader if there is one."""
    classes = tuple(_classes())
    found = [each for each in gc.get_objects() if issubclass(type(each), classes)]
    told = [_described(each) for each in found if _has_context(each)]
    return told or ([_SINGLETON[1]] if _has_context(_singleton()) else [])


def _has_context(instance: Any) -> bool:
    return type(getattr(instance, "hcontext", None)) is int  # ours is a proxy


def _described(instance: Any) -> str:
    reader = getattr(instance, "reader", None)
    return type(instance).__name__ if reader is None else f"{type(instance).__name__} to {reader}"


def _classes() -> Iterator[type]:
    for module, name in _CLASSES:
        found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, type):
            yield from _with_derived(found)


def _with_derived(one: type) -> Iterator[type]:
    yield one
    derived: list[type] = one.__subclasses__()
    for each in derived:
        yield from _with_derived(each)


def _singleton() -> Any:
    return getattr(getattr(sys.modules.get(_SINGLETON[0]), _SINGLETON[1], None), "instance", None)


def _before_fork() -> None:
    if _is_told:
        return
    try:
        _tell_if_new()
    except BaseException as error:  # a signal handler's; a hook can't raise
        gate.raise_later(get_ident(), error)


def _signs() -> int:
    """Another number, if there is more or less than there was: of classes, of what refers to them."""
    loaded = sum(module in sys.modules for module, _ in _CLASSES)
    return loaded + sum(map(sys.getrefcount, _watched)) + _has_context(_singleton())


def _tell_if_new() -> None:
    global _is_told, _last_signs, _watched
    if _watched and _signs() == _last_signs:
        return
    _watched = tuple(_classes())  # a derived class refers to its base, so that it is noticed, too
    _last_signs = _signs()
    connections.prepare()
    if connections.ARE_INHERITED and not connections.connections():
        return
    found = opened()
    if found:
        _is_told = True
        log.prepare()
        log.warning(
            "unprotected",
            "process %(pid)d forks while %(object)s is open%(more)s, which pcsc_safe doesn't protect: call "
            "pcsc_safe.install() before you use pyscard's classes, or start the program with 'python -m pcsc_safe run'",
            object=found[0],
            more=f" (and {len(found) - 1} more)" if len(found) > 1 else "",
        )


process.before_fork(_before_fork)
