"""The first PC/SC call of a process: imports what PC/SC requires; in a forked process, logs how the fork was noticed.

A forked process imports nothing that its parent has imported.
"""

from __future__ import annotations

from typing import Optional

from ..policy import Way, choose_way, native_works_after_fork
from . import descriptors, gate, gateways, handles, in_flight, log, observer, process, readiness, reestablish, sessions
from .settings import settings

__all__ = ["current_epoch", "prepare"]

_is_prepared = False


def _import_all() -> None:
    """Import what PC/SC requires, so that a child need not import anything."""
    global _is_prepared
    if not handles.has_proxies():
        from . import proxies  # wrapt takes longer to import than all the rest, and a broker needs none

        handles.set_proxies(proxies.SafeContext, proxies.SafeCard)
    for part in (descriptors, sessions, gateways.native, readiness):
        part.prepare()
    _is_prepared = True


def prepare() -> None:
    """Before a context is established: import what PC/SC requires.

    :raises ForkUnsafeError: this process was forked while another thread was importing it.
    """
    here = current_epoch()
    if not _is_prepared and here.unquiet is not None and here.unquiet.function == in_flight.IMPORTS:
        raise reestablish.unsafe_error("SCardEstablishContext", None)
    if not _is_prepared:
        gate.call_inside(in_flight.IMPORTS, _import_all)


_logged_epoch: Optional[process.Epoch] = None


def current_epoch() -> process.Epoch:
    """The epoch of this process; logs once which layer detected its beginning."""
    global _logged_epoch
    here = process.current()
    if here is not _logged_epoch:
        _logged_epoch = here
        if here.parent is not None and handles.contexts:
            observer.record("fork", parent=here.parent.pid)
            log.debug(
                "fork",
                "process %(pid)d was forked from process %(owner_pid)d, detected by %(layer)s",
                owner_pid=here.parent.pid,
                layer=here.noticed_by,
            )
            if here.unquiet is not None and native_works_after_fork():
                _warn_of_unquiet(here)
    return here


def _warn_of_unquiet(here: process.Epoch) -> None:
    """Log why a process can't use the native library, and what it uses instead."""
    is_served = choose_way(settings(), forked=True, native_works=False) is Way.BROKER
    without = "a broker makes its PC/SC calls" if is_served else "use policy 'auto', which uses a broker here"
    log.warning(
        "unquiet-fork",
        "process %(pid)d was forked while thread %(thread)s was inside %(function)s, and can't use the native PC/SC "
        "library: %(without)s",
        function=here.unquiet.function,
        thread=here.unquiet.thread,
        without=without,
    )
