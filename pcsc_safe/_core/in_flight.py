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

from collections.abc import Collection, Iterable
from contextvars import ContextVar
from itertools import chain, takewhile
from operator import attrgetter, ge, is_, not_
from typing import Any, Callable, Optional

from . import process
from .failures import is_ours
from .one_step import Operation, call_each, consumer, in_one_step, is_not_false
from .unpatched import RLock, get_ident, monotonic, sleep

__all__ = [
    "DOOR",
    "GIVEN",
    "IMPORTS",
    "NOT_NATIVE",
    "OPEN",
    "PAUSE",
    "RELEASED",
    "START",
    "WOKEN",
    "Entry",
    "Place",
    "Unquiet",
    "attempt",
    "calls",
    "calls_without_place",
    "client_has_hung_up",
    "closed_for",
    "closers",
    "others_are_inside",
    "places",
    "stop_locking",
    "unsettled",
    "wait_until_open",
]

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


# A signal handler may fork while this waits for another thread's call, and return in the child, which doesn't have that
# thread.
_CHECK_INTERVAL = 1.0  # s; whether this is still the same process

PAUSE = 0.001  # s
_YIELD_TIME = 0.0001  # s; longer than it takes a thread to wake up

OPEN, WOKEN, RELEASED, GIVEN = range(4)


_Steps = tuple[Callable[..., Any], Callable[[Entry], None], Callable[[Entry], None], Callable[[], Any]]
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
    :ivar state: OPEN; WOKEN: a wait there was ended from outside, and the place must not be used again; RELEASED;
        GIVEN: to a child that is being forked, until it is known whether there is a child.
    :ivar waiting: the identifiers of the threads that wait for the place, by a key for each wait.
    :ivar steps: C functions: take the place (arguments: True and a timeout), and return whether it was free; put a call
        on the list; take it off the list; release the place.
    :ivar lock: the lock that they take and release.
    """

    __slots__ = ("calls", "lock", "state", "steps", "waiting")

    def __init__(self) -> None:
        self.state = OPEN
        self.renew()

    def renew(self) -> None:
        """Forget the calls that are there: this is a new process."""
        self.lock = RLock()
        self.calls = _empty_list()
        self.waiting: dict[object, int] = {}
        self.steps: _Steps = self.lock.acquire, self.calls.append, self.calls.remove, self.lock.release

    def wait_until_free(self, timeout: float) -> None:
        """Wait until no thread is here; ``timeout`` is in seconds."""
        key, lock = object(), self.lock  # not the steps, which are replaced at interpreter exit
        try:
            self.waiting[key] = get_ident()
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


places: dict[Any, list[Entry]] = {}
"""All places of this process, each with the calls that are there now."""

unsettled: dict[Any, None] = {}
"""Places that must be settled before a fork; each has ``settle()``."""

calls_without_place: dict[object, Entry] = {}
"""Calls in progress that a fork waits for, and that have no place."""

client_has_hung_up: ContextVar[Callable[[], bool]] = ContextVar("client_has_hung_up", default=bool)
"""In a thread that waits for events for a broker's client: whether nobody will receive the result any more."""

closers: dict[int, float] = {}
"""The threads that have closed the gate, and until when: a fork closes it briefly, a block until its fork."""


_state, _steps, _cancelled = attrgetter("state"), attrgetter("steps"), attrgetter("cancelled")
_owner, _here = attrgetter("owner"), attrgetter("here")


def attempt(
    place: Place,
    owned: Any,
    function: str,
    *operations: Operation,
    wait: Any = None,
    in_turn: bool = False,
    latest_state: int = OPEN,
    needed: Iterable[Any] = (),
    gate: Optional[Collection[int]] = None,
) -> list[Any]:
    """Make a native call, in one step of C, if the place is free and nothing is in the way.

    :param owned: what the call is on; the call isn't made if this process no longer owns it.
    :param function: PC/SC's name.
    :param operations: the call, and C calls that belong to the same step.
    :param wait: the wait for events that it is part of; the call isn't made if the wait was cancelled.
    :param in_turn: wait until the gate is open, and begin the step by waiting a while for other threads' calls in the
        place.  If one step waited, and the next one took the place, this thread could lose it again and again: to one
        that makes call after call; or, if many wait, to the next one, because a lock of Python 3.14 is handed over.
    :param latest_state: the call isn't made if the place is in a later state than this.
    :param needed: what else must be true; C code evaluates it when the place is taken.
    :param gate: :func:`closed_for` the thread that makes the call; by default this one.
    :return: the results of the operations; empty if they weren't made.
    """
    ident, key, made = get_ident(), object(), list[Any]()
    if gate is None:
        gate = wait_until_open(ident) if in_turn else closed_for(ident)
    steps = acquire, enter, leave, release = place.steps
    conditions = chain(
        map(not_, (gate,)),
        map(ge, (latest_state,), map(_state, (place,))),
        () if wait is None else map(not_, map(_cancelled, (wait,))),
        needed,
        # A handler may fork while this waits, and a child that has begun its epoch has another lock and another list.
        map(is_, map(_steps, (place,)), (steps,)),
        process.is_here(),
        map(is_, map(_owner, (owned,)), map(_here, (process,))),
    )
    make = (made.extend, takewhile(is_not_false, call_each(((all, conditions), *operations))))
    entry = (function, ident, monotonic(), wait)
    free = (acquire, True, _CHECK_INTERVAL if in_turn else 0)
    whole = takewhile(is_not_false, call_each((free, (enter, entry), make, (leave, entry), (release,))))
    try:
        if in_turn:
            place.waiting[key] = ident
        consumer.extend(whole)
    finally:
        try:  # first, and without a call before leave(): so no handler can run before it
            if entry in place.calls:  # the call has raised (TypeError)
                try:
                    leave(entry)
                finally:
                    release()
        finally:
            place.waiting.pop(key, None)
    return made[1:]


def closed_for(ident: int) -> Collection[int]:
    """The threads that keep this thread out of the native library while there are any; look again just before a call.

    A thread may pass although the gate is closed if it has closed it; if it is inside, because the fork waits for it;
    or if the fork has taken too long, because a signal handler there may be waiting for this thread.  At worst the fork
    is then unquiet.
    """
    ends = list(closers.values())
    passes = ends and (ident in closers or max(ends) < monotonic() or any(call[1] == ident for call in calls()))
    return () if passes else closers


def wait_until_open(ident: int) -> Collection[int]:
    """Wait until the gate lets this thread pass.

    :return: as of :func:`closed_for`.
    """
    while gate := closed_for(ident):
        sleep(PAUSE)
    return gate


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
        _, enter, leave, _ = place.steps
        place.steps = max, enter, leave, int  # max() of True and a timeout says that the place is free
