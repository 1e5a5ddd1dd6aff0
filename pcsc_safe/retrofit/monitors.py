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

from .._core.settings import settings
from .framework import SharedLock, here, renewing
from .patches import Patch

__all__ = ["card_monitoring", "reader_monitoring"]


class _Renewal:
    """Drops what a process inherited of a monitor, once.

    :param drop: does it, and returns the parent's observers.
    :ivar inherited: the parent's observers, which are not notified here.
    """

    def __init__(self, drop: Callable[[], list[Any]]) -> None:
        self._drop = drop
        self._epoch = here()
        self.inherited: list[Any] = []

    def is_due(self) -> bool:
        """Whether this process still has something to drop."""
        return self._epoch is not here()

    def __call__(self) -> None:
        if not self.is_due():
            return
        with renewing.lock:
            if self.is_due():
                self.inherited = list(self._drop())
                self._epoch = here()

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

    def drop() -> list[Any]:
        old, monitor.instance, thread.instance = monitor.instance, None, None
        return [] if old is None else list(old.obs)

    renewal = _Renewal(drop)

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

    def drop() -> list[Any]:
        observers, state["obs"] = state.get("obs", []), []
        if "rmthread" in state:
            state["rmthread"], state["changed"] = None, 0
        return list(observers)

    renewal = _Renewal(drop)

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
    def __init_of_thread(self: Any, observable: Any, list_readers: Any, period: Any) -> None:
        construct_thread(self, observable, _recovering_list_readers(list_readers), period)

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
