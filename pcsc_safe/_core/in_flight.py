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
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from itertools import chain as all_of
from itertools import takewhile
from operator import attrgetter, is_, not_
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol

from . import process
from .failures import is_ours
from .one_step import Operation, call_each, consumer, in_one_step, is_not_false
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
    "attempt_in_turn",
    "calls",
    "calls_without_place",
    "client_has_hung_up",
    "closers",
    "conditions",
    "others_are_inside",
    "places",
    "stop_locking",
    "unsettled",
    "wait_and_attempt",
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

DOOR, START = "a connection to a broker", "the start of a broker"
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
            lock = self.lock  # not self.release, which is replaced at interpreter exit
            in_one_step((lock.acquire, True, timeout), (lock.release,))
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


class _Nothing:
    cancelled, real = False, None


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
    behind: Any = None,
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
    :param behind: the call isn't made if ``owned.real`` is something else by now: it was re-established, perhaps by a
        child that a signal handler has forked, and that continues here.
    :param may_pass: the call is made even if the gate is closed.
    :return: the results of the call and of what belongs to it; empty if they weren't made.
    """
    entry = (function, get_ident(), monotonic(), wait)
    steps: list[Any] = []
    operations = ((place.acquire, False), (place.enter, entry), call, *more, (place.leave,), (place.release,))
    chain = takewhile(is_not_false, call_each(operations))
    closed = () if may_pass else closers
    cards = place.cards if without_cards else ()
    cancellable: Any = _Nothing if wait is None else wait
    established: Any = _Nothing if behind is None else owned
    try:
        # From the first of these looks to the call of extend() no other code runs, of this thread or of any other.
        # Python 3.10 can run some at a jump, so there is no `or` here, and no condition within another one.
        if (
            process.sentinel[0]
            and owned.owner is process.here
            and not owned.released
            and not closed
            and place.state <= latest_state
            and not cards
            and not unless
            and not cancellable.cancelled
            and established.real is behind
        ):
            steps.extend(chain)
    finally:
        try:  # first, and without a call before leave(): so no handler can run before it
            if entry in place.calls:  # the call has raised (TypeError)
                try:
                    place.leave()
                finally:
                    place.release()
        finally:
            made = steps[2:-2]
    return made


_owner, _released, _here = attrgetter("owner"), attrgetter("released"), attrgetter("here")
_state, _cards, _cancelled = attrgetter("state"), attrgetter("cards"), attrgetter("cancelled")
_lock, _real = attrgetter("lock"), attrgetter("real")


def conditions(place: Place, owned: Owned, may_pass: bool) -> Iterator[Any]:
    """What must be true for a call in turn; arguments as of :func:`attempt`.

    :return: an iterator of C functions, to be evaluated when the place is free.
    """
    return all_of(
        (may_pass,) if may_pass else map(not_, (closers,)),
        map(not_, map(_state, (place,))),
        process.is_here(),
        map(is_, map(_owner, (owned,)), map(_here, (process,))),
    )


def attempt_in_turn(place: Place, entry: Entry, needed: Iterable[Any], *operations: Operation) -> list[Any]:
    """Make native calls in one step of C that begins by waiting for the calls of other threads in the place.

    A thread that waited in one step, and took the place in the next, could lose it again and again: to a thread that
    makes call after call; or, if many threads wait, to the next one, because a lock of Python 3.14 is handed over.

    :param needed: what must be true; C code evaluates it when the place is free.
    :param operations: the calls, and what belongs to the same step.
    :return: their results; empty if they weren't made: something needed is not true, or the place has not become free
        in time (:data:`CHECK_INTERVAL`).
    """
    made: list[Any] = []
    key = object()
    # Not place.acquire and place.release, which are replaced at interpreter exit.
    lock = place.lock
    # A signal handler may fork during the wait.  A child that has begun its epoch has another lock, and another list.
    is_same = map(is_, map(_lock, (place,)), (lock,))
    calls = takewhile(is_not_false, call_each(((all, all_of(is_same, needed)), *operations)))
    free = (lock.acquire, True, CHECK_INTERVAL)
    whole = (free, (place.enter, entry), (made.extend, calls), (place.leave,), (lock.release,))
    try:
        place.waiting[key] = entry[1]
        consumer.extend(takewhile(is_not_false, call_each(whole)))
    finally:
        try:  # as in attempt()
            if entry in place.calls:
                try:
                    place.leave()
                finally:
                    lock.release()
        finally:
            place.waiting.pop(key, None)
    return made[1:]


def wait_and_attempt(
    place: Place,
    owned: Owned,
    function: str,
    *operations: Operation,
    wait: Any = None,
    without_cards: bool = False,
    behind: Any = None,
    may_pass: bool = False,
) -> list[Any]:
    """Make native calls in one step of C, as soon as the place is free; arguments as of :func:`attempt`.

    :return: as of :func:`attempt_in_turn`.
    """
    looks: dict[str, Any] = {"wait": wait, "without_cards": without_cards, "behind": behind, "may_pass": may_pass}
    made = attempt(place, owned, function, *operations, **looks)
    if made:
        return made
    needed = all_of(
        conditions(place, owned, may_pass),
        map(not_, map(_released, (owned,))),
        map(not_, map(_cards, (place,))) if without_cards else (),
        map(not_, map(_cancelled, (wait,))) if wait is not None else (),
        map(is_, map(_real, (owned,)), (behind,)) if behind is not None else (),
    )
    return attempt_in_turn(place, (function, get_ident(), monotonic(), wait), needed, *operations)


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
