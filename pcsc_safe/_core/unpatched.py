"""Threads as the interpreter knows them: locks, identifiers and sleep that no library has replaced.

gevent and eventlet replace functions of :mod:`threading`, :mod:`_thread` and :mod:`time` by versions that switch
greenlets.  A native call blocks a whole thread, so the lock that protects it has to belong to that thread.  A module
that the interpreter creates again from its built-in code has its original functions, whatever was or will be patched.

Nothing here changes at a fork.
"""

from __future__ import annotations

from importlib.machinery import BuiltinImporter
from importlib.util import module_from_spec
from typing import Any

__all__ = [
    "RLock",
    "allocate_lock",
    "count_threads",
    "get_ident",
    "get_native_id",
    "monotonic",
    "sleep",
    "start_new_thread",
]


def _from_scratch(name: str) -> Any:
    spec = BuiltinImporter.find_spec(name)
    assert spec is not None
    module = module_from_spec(spec)
    BuiltinImporter.exec_module(module)
    return module


_thread, _time = _from_scratch("_thread"), _from_scratch("time")

RLock = _thread.RLock
allocate_lock = _thread.allocate_lock
get_ident = _thread.get_ident
get_native_id = _thread.get_native_id
start_new_thread = _thread.start_new_thread
count_threads = _thread._count
"""How many threads that Python has started are running, without the main thread."""

sleep = _time.sleep
monotonic = _time.monotonic
