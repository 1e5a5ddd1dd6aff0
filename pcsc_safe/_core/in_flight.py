"""The calls that are inside the native library.

A thread that is inside occupies a :class:`Place`.  One step of C (:func:`attempt`) takes the place, adds the call to
its list, makes the call, and releases the place.  During the step no signal handler, no other thread's exception and,
from Python 3.12, no finalizer can run.  So no place is occupied while code of the application runs.  A handler that
raises leaves nothing behind, and a thread that waits for a place waits for C code only.

Invariant: a call is in the list of its place while its thread is in the native library, and only then.  A child decides
from its copy of these lists whether its fork was quiet, so this works for a fork that ran no hook, too; see
:mod:`gate`.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from contextvars import ContextVar
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol

from . import process
from .failures import is_ours
from .one_step import Operation, call_each, in_one_step, is_not_false
from .unpatched import RLock, get_ident, monotonic, sleep

__all__ = [
    "CHECK_INTERVAL",
    "DOOR",
    "GIVEN",
    "IMPORTS",
    "NOT_NATIVE",
    "OPEN",
    "RELEASED",
    "START",
    "WOKEN",
    "Entry",
    "Owned",
    "Place",
    "Unquiet",
    "attempt",
    "calls",
    "calls_without_place",
    "client_has_hung_up",
    "closers",
    "others_are_inside",
    "places",
    "result_of",
    "stop_locking",
    "unsettled",
]


if TYPE_CHECKING:  # not at run time, where a Protocol takes each program its part of a millisecond

    class Owned(Protocol):
        """What a call is made on; it is live only in the process whose epoch is its owner."""

        @property
        def owner(self) -> Optional[process.Epoch]: ...

        @property
        def released(self) -> bool: ...

else:
    Owned = object

Entry = tuple[str, int, float, Any]
"""A call that is inside: PC/SC's name of the function; the identifier of the thread; when it began, by ``monotonic()``;
the wait for events that it is part of, if any."""


class Unquiet:
    """Why a process cannot use the native library: the call that was inside when it was forked.

    :ivar function: PC/SC's name of the call.
    :ivar thread: the name of the thread, or its number if the name is unknown.
    :ivar seconds: how long the call had lasted.
    """

    def __init__(self, function: str, thread: str, seconds: float) -> None:
        self.function = function
        self.thread = thread
        self.seconds = seconds


IMPORTS = "an import"
"""Used like a function's name: a thread that imports what PC/SC requires is also inside, because in a child with a
half-imported module the module's lock stays locked for ever."""

DOOR, START = "the broker's door", "the start of a broker"
"""The same for a thread that passes a connection to a broker, or starts one: a child must not have the other end."""

NOT_NATIVE = frozenset((IMPORTS, DOOR, START))
"""What a fork waits for even if its child can't use the native library."""


CHECK_INTERVAL = 1.0  # s
"""How long to wait at most for another thread's call before looking again whether this is still the same process.

A signal handler may fork during the wait, and return in the child, which doesn't have that thread.
"""

_YIELD_TIME = 0.0001  # s; longer than it takes a thread to wake up

OPEN, WOKEN, RELEASED, GIVEN = range(4)


_stock: list[list[Entry]] = []


def _empty_list() -> list[Entry]:
    """An empty list from a stock, in which all lists lie beside each other in memory.

    Each fork reads all of them, and pays for every page of memory that they are in.
    """
    try:
        return _stock.pop()
    except IndexError as error:
        if not is_ours(error):
            raise
        _stock.extend([] for _ in range(50))
        return []


class Place:
    """A place in the native library for one thread at a time.

    :ivar calls: the calls that are there now: one, or several of the same thread if a finalizer runs during a call.
    :ivar cards: the cards there; a call with ``without_cards`` isn't made while there are any.
    :ivar state: OPEN; WOKEN: a wait there was ended from outside, and the place must not be used again; RELEASED;
        GIVEN: to a child that is being forked, until it is known whether there is a child.
    :ivar waiting: the identifiers of the threads that wait for the place, by a key for each wait.
    :ivar acquire: takes the place if it is free, and returns whether it was; its argument is False: don't wait.
    :ivar enter: puts a call on the list.
    :ivar release: releases the place.
    :ivar leave: takes the last call off the list, and returns it.
    """

    __slots__ = ("acquire", "calls", "cards", "enter", "leave", "lock", "release", "state", "waiting")

    def __init__(self) -> None:
        self.state = OPEN
        self.cards: list[Any] = []
        self.renew()

    def renew(self) -> None:
        """Forget the calls that are there: this is a new process."""
        self.lock = RLock()
        self.calls = _empty_list()
        self.waiting: dict[object, int] = {}
        self.acquire: Callable[[bool], Any] = self.lock.acquire
        self.enter = self.calls.append
        self.release: Callable[[], Any] = self.lock.release
        self.leave = self.calls.pop

    def wake(self, wait: Any, *, may_pass: bool = False) -> None:
        """End the native call of a wait for events that is here, if possible.

        :param may_pass: even if the gate is closed.
        """

    def wait_until_free(self, timeout: float = -1) -> None:
        """Wait until no thread is here.

        :param timeout: in seconds; negative: for ever.
        """
        key = object()
        try:
            self.waiting[key] = get_ident()
            in_one_step((self.lock.acquire, True, timeout), (self.release,))
        finally:
            self.waiting.pop(key, None)

    def yield_to_waiters(self) -> None:
        """Before a call: let another thread that waits go first.

        Otherwise a thread that makes one call after the other would be back before a waiting thread has woken up.  What
        waits in this thread is what the signal handler that makes this call has interrupted: it gets no further anyway.
        """
        ident = get_ident()
        if self.waiting and any(other != ident for other in list(self.waiting.values())):
            sleep(_YIELD_TIME)


places: dict[Place, list[Entry]] = {}
"""All places of this process, each with the calls that are there now."""

unsettled: dict[Any, None] = {}
"""Places that must be settled before a fork; each has ``settle()``."""

calls_without_place: dict[object, Entry] = {}
"""Calls in progress that a fork waits for, and that have no place."""

client_has_hung_up: ContextVar[Callable[[], bool]] = ContextVar("client_has_hung_up", default=bool)
"""In a thread that waits for events for a broker's client: whether nobody will receive the result any more."""

closers: dict[int, float] = {}
"""The threads that have closed the gate, and until when: a fork closes it briefly, a block until its fork."""


def attempt(
    place: Place,
    owned: Owned,
    function: str,
    call: Operation,
    *more: Operation,
    wait: Any = None,
    without_cards: bool = False,
    unless: Collection[object] = (),
    latest_state: int = OPEN,
    may_pass: bool = False,
) -> list[Any]:
    """Make a native call, in one step of C, if the place is free and nothing is in the way.

    :param owned: what the call is on; the call isn't made if this process no longer owns it, or has released it.
    :param function: PC/SC's name.
    :param call: the call.
    :param more: C calls that belong to the same step, after it.
    :param wait: the wait for events that it is part of; the call isn't made if the wait was cancelled.
    :param without_cards: the call isn't made if there is a card.
    :param unless: the call isn't made if there is anything in it.
    :param latest_state: the call isn't made if the place is in a later state than this.
    :param may_pass: the call is made even if the gate is closed.
    :return: empty if the call wasn't made; otherwise :func:`result_of` returns its result.
    """
    entry = (function, get_ident(), monotonic(), wait)
    steps: list[Any] = []
    operations = ((place.acquire, False), (place.enter, entry), call, *more, (place.leave,), (place.release,))
    chain = takewhile(is_not_false, call_each(operations))
    try:
        # From the first of these looks to the call of extend() no other code runs, of this thread or of any other.
        if (
            process.sentinel[0]
            and owned.owner is process.here
            and not owned.released
            and (may_pass or not closers)
            and place.state <= latest_state
            and not (without_cards and place.cards)
            and not unless
            and not (wait is not None and wait.cancelled)
        ):
            steps.extend(chain)
    except BaseException:
        # Raised by the call itself (TypeError), or by a handler after the last step.  Each of the calls below is the
        # first in its block, so no handler comes before it.
        if 0 < len(steps) < len(operations):
            try:
                place.leave()
            finally:
                place.release()
        raise
    return steps


def result_of(steps: list[Any]) -> Any:
    """The result of the call that :func:`attempt` made."""
    return steps[2]


def calls() -> list[Entry]:
    """The calls that are inside now."""
    found = [call for place in list(places) if place.calls for call in list(place.calls)]
    return [*found, *list(calls_without_place.values())]


def others_are_inside() -> bool:
    """Whether a call of another thread is inside the native library."""
    ident = get_ident()
    return any(call[1] != ident for call in calls())


def stop_locking() -> None:
    """At interpreter exit: wait for no thread any more; one that is inside, or forks, may never return."""
    closers.clear()
    for place in list(places):
        place.acquire = operator.not_  # it says that the place is free
        place.release = int
