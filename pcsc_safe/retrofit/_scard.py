"""pyscard's functions: what takes their place, in the C module that every import style ends in.

``smartcard/scard/scard.py`` looks each function up in the extension module ``_scard`` when it is called, so that is
where they are replaced.  With ``broker="always"`` the extension module is not loaded at all: a module of ours stands in
for it, made of what the broker says of its own.

A handle that was opened before is a plain number that nobody here knows.  In the process in which the functions were
replaced it goes to the C function, as ever; in a forked child it is SCARD_E_INVALID_HANDLE, and its connection dead.

Invariant: a number that pcsc_safe did not give out reaches the native library of the process that may have opened it,
and nothing else.
"""

from __future__ import annotations

import sys
import threading
import time
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Callable, Optional

from .. import _gate, _process
from .._calls import CALLS
from .._settings import settings
from ..policy import Broker
from ._framework import here
from ._patches import Patch, Patches

__all__ = ["functions", "leave", "stand_in", "take_over"]

_NATIVE = "smartcard.scard._scard"
_Function = Callable[..., Any]


def functions(module: Any) -> list[Patch]:
    """The rows for ``smartcard.scard``.

    :param module: that; only its C module is looked at.
    """
    native = sys.modules[_NATIVE]
    _farewell.undo()
    if native is stand_in.module or not _process.FORKS:
        return []
    return [Patch(native, name, _replacement(name, getattr(native, name))) for name in _replaced() if name in vars(native)]


def _replaced() -> list[str]:
    return [name for name, call in CALLS.items() if call.takes is not None or name == "SCardEstablishContext"]


# What takes a function's place. The router is looked up at the first call: it imports pyscard, and may be the one who
# is importing it now.

_given: set[Any] = set()
"""The contexts that were given out by pyscard's functions, and not yet released."""


def _replacement(name: str, original: Optional[_Function]) -> _Function:
    """Take a handle of ours to the router, and any other number where it belongs.

    :param original: the C function; None if there is no native library.
    """
    if name == "SCardEstablishContext":
        return _establishing(original)
    call, since = CALLS[name], here()

    def opened_before(*arguments: Any) -> Any:
        from .._inherited import INVALID_HANDLE

        if original is None or here() is not since:
            return call.failure(INVALID_HANDLE, arguments[1:])
        result = _gate.enter(name, original, *arguments)
        return call.failure(result[0]) if call.discloses and result[0] != 0 else result

    return _sorting(name, opened_before, original)


def _sorting(
    name: str, elsewhere: _Function, original: Optional[_Function], then: Callable[[], None] = lambda: None
) -> _Function:
    """A function that takes our handles to the router, and plain numbers that are none ``elsewhere``.

    :param original: what it replaces.
    :param then: called when a context was released.
    """
    kind = CALLS[name].takes
    assert kind is not None
    find: Any = None
    route: Any = None

    def function(handle: Any, *arguments: Any) -> Any:
        nonlocal find, route
        if route is None:
            from .. import _handles, _router

            find, route = _handles.find, _router.public[name]
        if type(handle) is int and find(kind, handle) is None:
            return elsewhere(handle, *arguments)
        return route(handle, *arguments)

    def releasing(handle: Any) -> Any:
        from .. import _handles

        record = _handles.find(kind, handle)
        result = function(handle)
        if record is not None and record.released:
            _given.discard(record)
            then()
        return result

    return _named(name, releasing if name == "SCardReleaseContext" else function, original)


def _establishing(original: Optional[_Function]) -> _Function:
    route: Any = None

    def function(scope: Any) -> Any:
        nonlocal route
        if route is None:
            from .._router import public

            route = public["SCardEstablishContext"]
        result = route(scope)
        record = getattr(result[1], "_self_record", None)
        if record is not None:
            _given.add(record)
        return result

    return _named("SCardEstablishContext", function, original)


def _named(name: str, function: _Function, original: Optional[_Function]) -> _Function:
    function.__name__ = function.__qualname__ = name
    if original is not None:
        function.__doc__ = original.__doc__
        function.__wrapped__ = original  # type: ignore[attr-defined]
    return function


# Without the native library.


class _StandIn:
    """What is imported in the place of the C module, if a broker is to do all the work; a finder and its loader.

    :ivar module: that module, once it was asked for.
    """

    def __init__(self) -> None:
        self.module: Optional[ModuleType] = None

    def offer(self) -> None:
        """From now on be asked."""
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]  # a finder needs no base class

    def withdraw(self) -> None:
        """Be asked no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)  # type: ignore[arg-type]

    def find_spec(self, fullname: str, path: object, target: object = None) -> Optional[ModuleSpec]:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if fullname != _NATIVE:
            return None
        if settings().broker is not Broker.ALWAYS:
            return None
        return ModuleSpec(fullname, self, origin="pcsc_safe")  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Of all that the broker's pyscard has."""
        from .._router import public

        self.module = ModuleType(_NATIVE, "pyscard's functions and constants, by a broker; see pcsc_safe.install().")
        vars(self.module).update(public)
        vars(self.module).update({name: _replacement(name, None) for name in _replaced() if name in public})
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""

    def give_way(self) -> None:
        """Put the C module in its place."""
        module, self.module = self.module, None
        if module is None or sys.modules.get(_NATIVE) is not module:
            return
        del sys.modules[_NATIVE]
        package, scard = sys.modules.get("smartcard.scard"), sys.modules.get("smartcard.scard.scard")
        if package is None or scard is None:
            return
        vars(package).pop("_scard", None)
        vars(scard)["_scard"] = native = import_module(_NATIVE)
        for holder in (package, scard):
            if "error" in vars(holder):
                vars(holder)["error"] = vars(native)["error"]


stand_in = _StandIn()


# What there is already when we come, and what there is still when we go.

_strangers: list[Any] = []


def take_over() -> None:
    """Keep children away from what was opened before, if anything was."""
    native = sys.modules.get(_NATIVE)
    if native is None or native is stand_in.module or not _process.FORKS:
        return
    from .. import _descriptors, _native

    _descriptors.prepare()
    _native.prepare()
    _note_threads_inside()
    for connection in _native.connections():
        _strangers.append(connection)
        _descriptors.guard(connection)


def _note_threads_inside() -> None:
    """Enter the threads that are in one of the C functions now in the table of those."""
    wrappers = getattr(sys.modules.get("smartcard.scard.scard"), "__file__", None)
    for ident, frame in sys._current_frames().items():
        code = frame.f_code
        if ident != threading.get_ident() and code.co_filename == wrappers and code.co_name in CALLS:
            _gate.inside.setdefault(ident, (code.co_name, time.monotonic(), _Straggler(ident, id(frame))))


class _Straggler:
    """A thread that went in before we came, so nothing tells when it comes out: a fork has to look."""

    def __init__(self, ident: int, frame: int) -> None:
        self._ident = ident
        self._frame = frame

    def interrupt(self) -> None:
        """Strike it off if it is out. It can't be interrupted: its caller would notice."""
        frame = sys._current_frames().get(self._ident)
        entry = _gate.inside.get(self._ident)
        if entry is not None and entry[2] is self and (frame is None or id(frame) != self._frame):
            _gate.inside.pop(self._ident, None)


_farewell = Patches()


def leave() -> None:
    """When everything was put back: stay in reach of the handles that were given out, as long as there are any."""
    stand_in.withdraw()
    stand_in.give_way()
    native = sys.modules.get(_NATIVE)
    if "pcsc_safe._router" not in sys.modules or native is None:
        return
    from .. import _descriptors

    while _strangers:
        _descriptors.unguard(_strangers.pop())
    if _given:
        names = [name for name in _replaced() if name in vars(native) and name != "SCardEstablishContext"]
        rows = [Patch(native, name, _sorting(name, getattr(native, name), getattr(native, name), _last_farewell)) for name in names]
        _farewell.wanted = True
        _farewell.apply(_NATIVE, native, rows)


def _last_farewell() -> None:
    if not _given:
        _farewell.undo()
