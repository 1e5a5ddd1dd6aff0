"""The broker of this process: at most one, started when it is first needed, or earlier by ``prestart_broker()``.

At a fork the child has none, or the same one as a separate client.  The first thread that asks for the broker begins
the new epoch before it looks.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from typing import Any, Callable, Optional

from .._core import descriptors, failures, gate, gateways, in_flight, observer, one_step, process
from .._core.calls import CALLS, LostError
from .._core.failures import is_ours
from .._core.settings import settings
from .._core.unpatched import RLock
from ..errors import BrokerError
from ..policy import Broker as When
from . import connection, start
from .client import Broker

__all__ = [
    "as_broker",
    "existing",
    "files_to_preserve",
    "functions",
    "get",
    "prepare",
    "prestart",
    "request_catalogue",
]

_broker: Optional[Broker] = None
_starting = RLock()


def get() -> Broker:
    """The broker of this process; it is started if there is none.

    :raises BrokerError: it can't be started.
    """
    return _get_or_start(for_family=settings().broker is When.ALWAYS)


def existing() -> Optional[Broker]:
    """The broker of this process, if it has one; for callers that know that the epoch has begun, or is beginning."""
    return _broker if _broker is not None and not _broker.lost else None


def as_broker(gateway: object) -> Optional[Broker]:
    """The gateway, if it is a broker."""
    return gateway if isinstance(gateway, Broker) else None


def files_to_preserve() -> list[int]:
    """The descriptors without which this process loses its broker."""
    broker = existing()
    return broker.files_to_preserve() if broker is not None else []


def prestart() -> None:
    """Start a broker now, for this process and the children that it forks afterwards.

    The first call that needs a broker then finds it running.  The function returns before the broker is ready, after
    some milliseconds.  A process that needs no broker doesn't use it.

    :raises BrokerError: it can't be started.
    """
    _get_or_start(for_family=True)


def _get_or_start(for_family: bool) -> Broker:
    """The broker of this process; it is started if there is none."""
    prepare()
    here = process.current()  # first of all: what is locked or closed may be so in the parent

    def start_once() -> Broker:
        global _broker
        former = _broker
        if former is not None and not former.lost and former.epoch is here:
            return former
        started: list[Broker] = []
        try:
            gate.call_inside(in_flight.START, _start_one, for_family, started)
            if _broker is former:  # nothing comes between this look and the next line
                _broker = started[0]
                return started[0]
        finally:  # also if a signal handler raises
            for broker in started:
                if broker is not _broker:
                    broker.discard()
        return _get_or_start(for_family)

    return one_step.call_in_turn(_starting, start_once)


def _start_one(for_family: bool, started: list[Broker]) -> None:
    """Start a broker, and append it to a list."""
    epoch = process.current()
    try:
        door, theirs = connection.pair(guarded=not for_family)
    except OSError as error:
        if not is_ours(error):
            raise
        raise BrokerError(
            f"process {os.getpid()} can't start a broker: {error.strerror}",
            remedy="close file descriptors, or raise the limit (ulimit -n)",
            pid=os.getpid(),
        ) from error
    helper: Optional[start.Helper] = None
    try:
        helper = start.spawn(theirs.fileno(), settings().broker_python)
        theirs.close()
        observer.record("broker", broker=helper.pid)
        observer.process_started(helper.pid, "broker", "PC/SC broker")
        started.append(Broker(door, helper, epoch, for_family=for_family))
    except BaseException:
        theirs.close()
        door.close()
        if helper is not None:
            helper.close_errors()
            helper.kill()
        raise


def _retry_in_new_broker(request: Callable[[Broker], Any]) -> Any:
    """Ask the broker of this process for something that needs no session; if it dies before it replies, ask another."""
    for _ in range(gateways.BROKER_ATTEMPTS):
        with failures.suppress(LostError):
            return request(get())
    raise gateways.repeated_death_error()


def _function(name: str) -> Callable[..., Any]:
    return lambda *arguments: _retry_in_new_broker(lambda broker: broker.functions[name](*arguments))


functions: Mapping[str, Callable[..., Any]] = {name: _function(name) for name in CALLS}
"""The functions of PC/SC, each of the broker that this process has at the time of the call."""


def request_catalogue() -> Any:
    """A broker's catalogue of its pyscard; see :func:`library.catalogue`."""
    return _retry_in_new_broker(Broker.request_catalogue)


_is_prepared = False


def prepare() -> None:
    """Import what a broker requires, so that nothing need be imported in a child or at interpreter exit."""
    global _is_prepared
    if not _is_prepared:
        descriptors.prepare()
        atexit.register(connection.keep_open_at_exit)
        _is_prepared = True


def _begin(epoch: process.Epoch) -> None:
    global _broker, _starting
    _starting = RLock()
    if _broker is not None and _broker.epoch is not epoch:
        _broker = _broker.after_fork_in_child(epoch)


process.at_fork(at_begin=_begin)
