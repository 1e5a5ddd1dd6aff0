"""pyscard's monitors in a forked child, and while there is no pcscd.

CardMonitor and ReaderMonitor are singletons with a thread, and that thread is in the parent.  A child restarts them, as
a new process would: at its first use of a monitor, not at the fork, so that a child without monitors pays nothing and
has no thread.  The parent's observers are not notified in the child; deleting one there succeeds.

With the setting ``recover`` their threads don't end when pcscd has ended.  While there is no pcscd there are no
readers, and the list of cards stays as it was.

Invariant: nothing here uses what the dead thread may have left locked.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from typing import Any, Callable

from .._core import process
from .._core.one_step import call_in_turn
from .._core.settings import settings
from .._core.unpatched import RLock
from .framework import SharedLock
from .patches import Patch

__all__ = ["card_monitoring", "reader_monitoring"]


_Found = tuple[Any, Any, list[Any]]


class _Renewal:
    """Drops what a process inherited of a monitor, once.

    :param find: returns the monitor and its thread, as they are now, and the list of observers.
    :param drop: drops what was found, each of it only if it is still there.
    :ivar inherited: the parent's observers, which are not notified here.
    """

    def __init__(self, find: Callable[[], _Found], drop: Callable[[Any, Any, list[Any]], None]) -> None:
        self._find, self._drop = find, drop
        self._epoch = process.current()
        self._turns: dict[process.Epoch, Any] = {}
        self._found: dict[process.Epoch, _Found] = {}
        self.inherited: list[Any] = []

    def is_due(self) -> bool:
        """Whether this process still has something to drop."""
        return self._epoch is not process.current()

    def __call__(self) -> None:
        if self.is_due():
            epoch = process.current()
            call_in_turn(self._turns.setdefault(epoch, RLock()), lambda: self._drop_once(epoch))

    def _drop_once(self, epoch: process.Epoch) -> None:
        # The first look decides what is inherited: a signal handler may make a new monitor in the middle of this.
        found = self._found.setdefault(epoch, self._find())
        if self.is_due():
            self.inherited = list(found[2])
            self._drop(*found)
            self._epoch = epoch
        self._found.pop(epoch, None)

    def deleting(self, delete: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``delete``, which also succeeds for an observer of the parent."""

        def delete_observer(observer: Any) -> Any:
            try:
                return delete(observer)
            except ValueError:
                if observer not in self.inherited:
                    raise
                return None

        return delete_observer


_CHECK_INTERVAL = 0.2  # s; whether pcscd is back


def _is_outage(error: Any) -> bool:
    """Whether a monitor should continue after this exception of pyscard, because pcscd may return."""
    if not settings().recover:
        return False
    from .._core.recovery import SERVICE_LOST_CODES  # PC/SC's constants are not known while pyscard is being imported

    # By its name: in pyscard 2.0 it has no code.
    return (
        type(error).__name__ == "CardServiceNotFoundException" or getattr(error, "hresult", None) in SERVICE_LOST_CODES
    )


def _recovering_request(module: Any) -> Any:
    """The request that a CardMonitoringThread waits with: while there is no pcscd, its cards stay as they were."""

    class CardRequest(module.CardRequest):  # type: ignore[misc]
        _last: Any = ()

        def waitforcardevent(self) -> Any:
            try:
                if settings().recover:
                    self._look_for_pcscd()
                self._last = super().waitforcardevent()
            except Exception as error:
                if not _is_outage(error):
                    raise
                time.sleep(_CHECK_INTERVAL)
            return self._last

        def _look_for_pcscd(self) -> None:
            """Check that pcscd runs: if it doesn't, pyscard releases its context, and gets no other."""
            request, scard = self.pcsccardrequest, sys.modules["smartcard.scard"]
            hresult = scard.SCARD_S_SUCCESS
            if request.hcontext == 0:
                hresult, request.hcontext = scard.SCardEstablishContext(scard.SCARD_SCOPE_USER)
            if hresult == scard.SCARD_S_SUCCESS:
                hresult, _ = scard.SCardListReaders(request.hcontext, [])
            if hresult == scard.SCARD_E_NO_SERVICE:
                raise sys.modules["smartcard.Exceptions"].CardConnectionException(hresult=hresult)

    return CardRequest


def _recovering_list_readers(list_readers: Callable[..., Any]) -> Callable[..., Any]:
    """``list_readers``, which returns no readers while there is no pcscd."""

    def list_or_nothing(*arguments: Any) -> Any:
        try:
            return list_readers(*arguments)
        except Exception as error:
            if not _is_outage(error):
                raise
            return []

    return list_or_nothing


def card_monitoring(module: Any) -> list[Patch]:
    """CardMonitor, and the thread behind it."""
    monitor, thread = module.CardMonitor, module.CardMonitoringThread
    construct, construct_thread = monitor.__init__, thread.__init__

    def find() -> _Found:
        old = monitor.instance
        return old, thread.instance, [] if old is None else old.obs

    def drop(old: Any, old_thread: Any, observers: list[Any]) -> None:
        if monitor.instance is old:
            monitor.instance = None
        if thread.instance is old_thread:
            thread.instance = None

    renewal = _Renewal(find, drop)

    @functools.wraps(construct)
    def __init__(self: Any) -> None:  # noqa: N807
        renewal()
        construct(self)

    def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807
        if renewal.is_due() and not name.startswith("__"):
            renewal()
        if monitor.instance is None and not name.startswith("__"):
            return _unused_attribute(self, name)
        if name == "deleteObserver" and renewal.inherited:
            return renewal.deleting(getattr(monitor.instance, name))
        return object.__getattribute__(self, name)

    def _unused_attribute(self: Any, name: str) -> Any:
        """The state of a monitor that this process has inherited, and not used."""
        if name == "countObservers":
            return lambda: 0
        if name == "deleteObservers":
            return lambda: None
        if name == "deleteObserver":
            return renewal.deleting([].remove)
        construct(self)
        return getattr(self, name)

    @functools.wraps(construct_thread)
    def __init_of_thread(self: Any, observable: Any) -> None:
        renewal()
        construct_thread(self, observable)

    locks = [
        Patch(owner, "lock", SharedLock(owner.lock, threading.Lock))
        for owner in (monitor, thread)
        if hasattr(owner, "lock")
    ]
    return [
        *locks,
        Patch(monitor, "__init__", __init__),
        Patch(monitor, "__getattribute__", __getattribute__),
        Patch(thread, "__init__", __init_of_thread),
        Patch(module, "CardRequest", _recovering_request(module)),
    ]


def reader_monitoring(module: Any) -> list[Patch]:
    """ReaderMonitor; its instances share one state, and so do those of its thread."""
    monitor = module.ReaderMonitor
    state = vars(monitor)["_ReaderMonitor__shared_state"]

    def find() -> _Found:
        return monitor, state.get("rmthread"), state.get("obs", [])

    def drop(old: Any, old_thread: Any, observers: list[Any]) -> None:
        if "obs" in state and state["obs"] is observers:
            state["obs"] = []
        if "rmthread" in state and state["rmthread"] is old_thread:
            state["rmthread"], state["changed"] = None, 0

    renewal = _Renewal(find, drop)

    def renewed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def first_renew(self: Any, *arguments: Any, **named: Any) -> Any:
            renewal()
            return method(self, *arguments, **named)

        return first_renew

    def add(self: Any, observer: Any) -> Any:
        if not self.startOnDemand and self.rmthread is None:
            self.rmthread = module.ReaderMonitoringThread(self, self.readerProc, self.period)
            self.rmthread.start()
        return add_observer(self, observer)

    def delete(self: Any, observer: Any) -> Any:
        return renewal.deleting(functools.partial(delete_observer, self))(observer)

    @functools.wraps(module.ReaderMonitoringThread.__init__)
    def __init_of_thread(self: Any, observable: Any, readerProc: Any, period: Any) -> None:  # noqa: N803  # pyscard's
        construct_thread(self, observable, _recovering_list_readers(readerProc), period)

    add_observer, delete_observer = monitor.addObserver, monitor.deleteObserver
    construct_thread = module.ReaderMonitoringThread.__init__
    return [
        Patch(module.ReaderMonitoringThread, "__init__", __init_of_thread),
        Patch(monitor, "__init__", renewed(monitor.__init__)),
        Patch(monitor, "addObserver", renewed(functools.wraps(add_observer)(add))),
        Patch(monitor, "deleteObserver", renewed(functools.wraps(delete_observer)(delete))),
        Patch(monitor, "deleteObservers", renewed(monitor.deleteObservers)),
        Patch(monitor, "countObservers", renewed(monitor.countObservers)),
    ]
