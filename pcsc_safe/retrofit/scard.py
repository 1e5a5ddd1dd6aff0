"""The functions that replace pyscard's, in the C module in which every import style ends.

``smartcard/scard/scard.py`` looks each function up in the extension module ``_scard`` when it is called, so they are
replaced there.  With ``broker="always"`` the extension module is not loaded at all: a module of ours replaces it, made
of the names that the broker reports.

A handle that was opened before ``install()`` is a plain number that nothing here knows.  In the process in which the
functions were replaced it goes to the C function, as before.  In a forked child it returns SCARD_E_INVALID_HANDLE, and
its connection is dead.

Invariant: a number that pcsc_safe did not create reaches the native library of the process that may have opened it, and
nothing else.
"""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, Callable, Optional

from .._core import connections, descriptors, gate, handles, in_flight, library, process
from .._core.calls import CALLS, Call
from .._core.settings import settings
from .._core.unpatched import monotonic
from ..policy import Broker
from .patches import Patch

__all__ = ["begin", "end", "functions", "guard_earlier", "stand_in", "still_needed", "unguard_earlier"]

_NATIVE = "smartcard.scard._scard"
_Function = Callable[..., Any]


def functions(module: Any) -> list[Patch]:
    """The rows for ``smartcard.scard``.

    :param module: ``smartcard.scard``, of which only the C module is used.
    """
    native = sys.modules.get(_NATIVE)
    return [] if native is None or native is stand_in.module or not process.FORKS else _rows(native)


def _rows(native: Any) -> list[Patch]:
    return [Patch(native, name, _replacement(name, native)) for name in _NAMES if name in vars(native)]


_ESTABLISH = "SCardEstablishContext"
_NAMES = [name for name, call in CALLS.items() if call.takes is not None] + [_ESTABLISH]
"""What is replaced.  The last is restored first, so that no new handles are returned after that."""


# The functions that replace pyscard's.  They look up the router at the first call, because the router imports pyscard,
# and may be importing it now.

_in_force = False
_open_contexts: set[object] = set()
"""The contexts that pyscard's functions have returned and that are not released, and those being established."""

_on_all_released: Callable[[], None] = lambda: None  # noqa: E731


def begin(on_all_released: Callable[[], None]) -> None:
    """Begin to replace the functions.

    :param on_all_released: called whenever the last context that pyscard's functions returned is released.
    """
    global _in_force, _on_all_released
    _on_all_released = on_all_released
    _in_force = True
    stand_in.add_finder()


def end() -> None:
    """Stop replacing the functions; the originals are restored after this."""
    global _in_force
    _in_force = False


def still_needed(row: Patch) -> bool:
    """Whether a replacement must stay, for handles that are still open."""
    return row.owner is sys.modules.get(_NATIVE) and row.name != _ESTABLISH and _any_open()


def _replacement(name: str, native: Any) -> _Function:
    """Pass a handle of ours to the router, and any other number to where it belongs.

    :param native: the C module; None if there is none.
    """
    original = _replaced_by(vars(native)[name]) if native is not None else None
    if original is not None:
        # Only the first: another tool's wrapper around our function must not be what pcsc_safe itself calls.
        library.replaced.setdefault(name, original)
    if name == _ESTABLISH:
        return _with_name(name, _establishing(native, original), original)
    call, kind, since = CALLS[name], CALLS[name].takes, process.current()
    assert kind is not None
    find = handles.find

    def function(handle: Any, *arguments: Any) -> Any:
        if type(handle) is int and find(kind, handle) is None:
            return _call_on_earlier_handle(call, original, since, handle, *arguments)
        return (_public or _load())[name](handle, *arguments)

    def releasing(handle: Any) -> Any:
        record = handles.find(kind, handle)
        try:
            return function(handle)
        finally:
            if record is not None and record.released:
                _note_released(record)

    return _with_name(name, releasing if name == "SCardReleaseContext" else function, original)


_public: dict[str, Any] = {}


def _load() -> dict[str, Any]:
    """The functions of the drop-in, by name.

    They are loaded from the first context on, because a finalizer can't import at interpreter exit.
    """
    from .._gateways import public  # loads the native library; here the application has asked for it

    _public.update(public)
    return _public


def _call_on_earlier_handle(call: Call, original: Optional[_Function], since: process.Epoch, *arguments: Any) -> Any:
    """For a number that pcsc_safe has not returned."""
    if original is None or (_in_force and process.current() is not since):
        return call.failure((_public or _load())["SCARD_E_INVALID_HANDLE"], arguments[1:])
    result = gate.call_inside(call.name, original, *arguments)
    return call.failure(result[0]) if call.discloses and result[0] != library.SUCCESS else result


def _establishing(native: Any, original: Optional[_Function]) -> _Function:
    def function(scope: Any) -> Any:
        route = (_public or _load())[_ESTABLISH]
        in_progress = object()
        _open_contexts.add(
            in_progress
        )  # before the check below: either a thread that restores functions sees this, or the check fails
        try:
            if original is not None and not _in_force:
                return original(scope)
            result = route(scope)
            record = getattr(result[1], "_self_record", None)
            if record is not None:
                _open_contexts.add(record)
            return result
        finally:
            _note_released(in_progress)

    return function


def _note_released(context: object) -> None:
    _open_contexts.discard(context)
    if not _in_force and not _any_open():
        _on_all_released()


def _any_open() -> bool:
    """Whether any context is open; a signal handler may have kept a released one from being noted as such."""
    return any(not getattr(context, "released", False) for context in list(_open_contexts))


def _replaced_by(function: Any) -> Any:
    """What one of our functions replaces; any other function is returned itself, also if it wraps one of ours."""
    is_ours = type(function) is FunctionType and function.__globals__ is globals()
    return function.__wrapped__ if is_ours else function


def _with_name(name: str, function: _Function, original: Optional[_Function]) -> _Function:
    function.__name__ = function.__qualname__ = name
    if original is not None:
        function.__doc__ = original.__doc__
        function.__wrapped__ = original  # type: ignore[attr-defined]
    return function


# Without the native library.


class _StandIn:
    """A finder and loader of the module that replaces the C module if a broker makes all calls.

    :ivar module: that module, once it is imported.
    """

    def __init__(self) -> None:
        self.module: Optional[ModuleType] = None

    def add_finder(self) -> None:
        """Add this finder to Python's finders.

        It is never removed, because another thread's import may be going through the list.
        """
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: object, target: object = None) -> Optional[ModuleSpec]:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if fullname != _NATIVE or not _in_force:
            return None
        if settings().broker is not Broker.ALWAYS:
            return None
        return ModuleSpec(fullname, self, origin="pcsc_safe")  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module with all names of the broker's pyscard."""
        public = _load()
        self.module = ModuleType(_NATIVE, "pyscard's functions and constants, by a broker; see pcsc_safe.install().")
        vars(self.module).update(public)
        vars(self.module).update({name: _replacement(name, None) for name in _NAMES if name in public})
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is complete."""

    def replace_by_native(self, put: Callable[[list[Patch]], None]) -> None:
        """Replace this module by the C module.

        :param put: puts replacements in force, for handles that are still open.
        """
        module, package, scard = self.module, *map(sys.modules.get, ("smartcard.scard", "smartcard.scard.scard"))
        if module is None:
            return
        if sys.modules.get(_NATIVE) is module:
            del sys.modules[_NATIVE]
        if package is not None and scard is not None:
            try:
                native = import_module(_NATIVE)
            finally:
                sys.modules.setdefault(_NATIVE, module)  # if there is no C module
            put([row for row in _rows(native) if still_needed(row)])
            vars(scard)["_scard"] = native
            for holder in (package, scard):
                if "error" in vars(holder):
                    vars(holder)["error"] = vars(native)["error"]
        self.module = None  # only now: what an exception has interrupted, the next uninstall() completes


stand_in = _StandIn()


# Connections that were opened before install(), and calls that are still in progress.

_earlier_connections: list[Any] = []
_guards_earlier = False


def guard_earlier() -> None:
    """Keep children from using what was opened before ``install()``, if anything was."""
    global _guards_earlier
    native = sys.modules.get(_NATIVE)
    if not (_guards_earlier or native is None or native is stand_in.module or not process.FORKS):
        _guard_earlier()
    _guards_earlier = True  # what is open later is not earlier


def _guard_earlier() -> None:
    descriptors.prepare()
    connections.prepare()
    _note_threads_inside()
    for connection in connections.connections():
        _earlier_connections.append(connection)
        descriptors.guard(connection)


def _note_threads_inside() -> None:
    """Enter the threads that are now in one of the C functions in the list of calls in flight."""
    wrappers = getattr(sys.modules.get("smartcard.scard.scard"), "__file__", None)
    for ident, frame in sys._current_frames().items():
        code = frame.f_code
        if ident != threading.get_ident() and code.co_filename == wrappers and code.co_name in CALLS:
            call_in_progress = _CallInProgress(ident, frame)
            in_flight.calls_without_place[call_in_progress] = (code.co_name, ident, monotonic(), call_in_progress)


class _CallInProgress:
    """A thread that was in a C function at ``install()``; nothing reports its return, so a fork must check.

    The frame itself is not kept, because it would keep the variables of all its callers.  A new frame may have the
    number of one that is gone.  If it is of the same function, that function now calls pcsc_safe, and the thread is in
    a frame of pcsc_safe.
    """

    def __init__(self, ident: int, frame: FrameType) -> None:
        self._ident = ident
        self._frame = self._key(frame)

    @staticmethod
    def _key(frame: FrameType) -> tuple[int, CodeType]:
        return id(frame), frame.f_code

    def interrupt(self) -> None:
        """Remove it from the list if it has returned.  It can't be interrupted, because its caller would see that."""
        frame = sys._current_frames().get(self._ident)
        if frame is None or self._key(frame) != self._frame:
            in_flight.calls_without_place.pop(self, None)


def unguard_earlier() -> None:
    """Let children inherit what was opened before ``install()``, as without pcsc_safe."""
    global _guards_earlier
    _guards_earlier = False
    for connection in list(_earlier_connections):
        descriptors.unguard(connection)
    _earlier_connections.clear()
