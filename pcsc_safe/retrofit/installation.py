"""Makes pyscard itself fork-safe, for programs whose imports can't be edited.

:func:`install` replaces pyscard's functions by pcsc_safe's, and makes pyscard's classes (connections, requests,
monitors) usable in a forked child.  :func:`uninstall` restores all of it.  :data:`PATCHES` lists what is patched, by
module.  A module that has not been imported is patched whenever it is; no module is imported for this.

Invariant: nothing of pyscard is patched unless :func:`install` was called, and everything that is patched can be
restored.  Both functions can be called again to complete what an exception of a signal handler has interrupted.  At a
fork nothing happens here: a child renews what it must at its first use.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any, Callable, Optional

from .._core import process
from .._core.configure import configure
from .._core.one_step import call_in_turn
from .._core.unpatched import RLock
from . import framework, monitors, scard
from .patches import Patch, Patches

if TYPE_CHECKING:
    from typing import TypeVar

    from typing_extensions import ParamSpec

    _Settings = ParamSpec("_Settings")
    _Result = TypeVar("_Result")

__all__ = ["PATCHES", "install", "uninstall"]

PATCHES: dict[str, Callable[[Any], list[Patch]]] = {
    "smartcard.scard": scard.functions,
    "smartcard.Synchronization": framework.synchronization,
    "smartcard.CardService": framework.card_service,
    "smartcard.pcsc.PCSCContext": framework.pcsc_context,
    "smartcard.pcsc.PCSCCardConnection": framework.pcsc_card_connection,
    "smartcard.pcsc.PCSCCardRequest": framework.pcsc_card_request,
    "smartcard.CardMonitoring": monitors.card_monitoring,
    "smartcard.ReaderMonitoring": monitors.reader_monitoring,
}
"""What is patched, by module: owner, name and replacement, as rows of :class:`Patch`."""

_applied = Patches()
_installing = RLock()  # held while modules are imported, so no import may wait for it


def _taking(like: Callable[_Settings, Any]) -> Callable[[Callable[..., _Result]], Callable[_Settings, _Result]]:
    """For type checkers: declare that a function takes the keywords of another one."""
    return lambda function: function


@_taking(configure)
def install(**settings: Any) -> None:
    """Make pyscard itself fork-safe, in this process and its children.

    It applies to every name by which pyscard's functions and classes are imported, before the call or after it.  Call
    it before the program establishes its first context.  A context that is already open works in this process as
    before; in a forked child, calls on it return SCARD_E_INVALID_HANDLE.  A second call only changes the settings.

    With ``broker="always"``, pyscard is imported without its native library from now on.

    :param settings: as for :func:`pcsc_safe.configure`, which is called first; without arguments, settings stay as they
        are.
    :raises SettingsError: a setting can't have this value; pyscard is then not changed.
    :raises BrokerError: ``broker="always"``, pyscard is already imported, and no broker can be started.
    """
    if settings:
        configure(**settings)
    process.current()
    call_in_turn(_installing, _install)


def _install() -> None:
    from wrapt import register_post_import_hook

    had_begun = _applied.wanted
    try:
        _applied.wanted = True
        scard.begin(_applied.finish)
        for name in PATCHES:
            if name in sys.modules:
                _imported(sys.modules[name])
            elif _finder not in sys.meta_path:
                register_post_import_hook(_imported, name)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)  # before wrapt's, which the first registration has inserted
        scard.guard_earlier()
    except BaseException:
        if not had_begun:
            uninstall()
        raise


def uninstall() -> None:
    """Undo :func:`install`.

    Open contexts and cards continue to work: pyscard's own C functions are restored when the last of them has been
    released.  Only the PCSCContext that pyscard's classes share before pyscard 2.3 is released now.  Its classes are
    restored immediately.  If pyscard was imported without its native library, the library is loaded now.  Settings stay
    as they are.
    """
    process.current()
    call_in_turn(_installing, _uninstall)


def _uninstall() -> None:
    scard.end()
    _applied.undo(scard.still_needed)
    scard.stand_in.replace_by_native(_applied.put)
    scard.unguard_earlier()
    framework.renew_pcsc_context()


class _Finder:
    """A finder that sees which modules are imported, and finds none: it has wrapt report each import.

    wrapt reports only one import for each registration.  But a module is imported again if a signal handler has raised
    in the first import, or if the program has removed the module.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if fullname in PATCHES and _applied.wanted and fullname not in sys.modules:
            from wrapt import register_post_import_hook

            with suppress(KeyError):  # wrapt 1.14 reports only the first import of a module
                register_post_import_hook(_imported, fullname)
        return None


_finder: Any = _Finder()


def _imported(module: Any) -> None:
    """Whether a module is imported, or is being imported by another thread."""
    name = module.__name__
    if not _applied.wanted:
        return
    module = import_module(name)  # waits for the other thread
    if not _applied.has(name, module):
        _applied.apply(name, module, PATCHES[name](module))


def _begin(epoch: process.Epoch) -> None:
    global _installing
    _installing = RLock()


process.at_fork(at_begin=_begin)
