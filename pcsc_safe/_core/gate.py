"""The calls that are inside the native library, and the gate that a fork closes before it.

libpcsclite has locks of its own.  A child that was forked while another thread held one hangs in its first call, for
ever; so a fork waits until nobody is inside (it is *quiet*), at most for :data:`quiesce_timeout`, and keeps newcomers
out until then.

A thread is inside at a :class:`Place`.  To take the place, to enter the call in its list, the call itself, and to give
the place back are one step of C (:func:`attempt`): no signal handler, no other thread's exception and, from Python 3.12
on, no finalizer can run in between.  So no place is ever held while code of the application runs, a handler that
raises leaves nothing behind, and who waits for a place waits for C code only.

Invariant: a call is in the list of its place while its thread is in the native library, and only then.  The child
judges by its copy of these lists whether its fork was quiet, so a fork that ran no hook is judged too.  An unquiet
child never enters the native library.  In a child nothing here stays closed or held.
"""

from __future__ import annotations

import math
import operator
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import starmap, takewhile
from typing import Any, Callable, NamedTuple, Protocol, TypeVar

from ..policy import Policy, Settings, native_works_after_fork
from . import process
from .settings import when_changed
from .unpatched import RLock, count_threads, get_ident, monotonic, sleep, start_new_thread

__all__ = [
    "IMPORTS",
    "InFlight",
    "Operation",
    "Owned",
    "Place",
    "Unquiet",
    "attempt",
    "called",
    "close_quietly",
    "closers",
    "during",
    "elsewhere",
    "exclusively",
    "in_flight",
    "in_one_step",
    "is_not_false",
    "made",
    "nowhere",
    "open_again",
    "others_are_inside",
    "places",
    "raise_later",
    "stays_quiet",
    "stop_locking",
    "wait_for",
    "wait_until_open",
]


class Owned(Protocol):
    """What a call is made on: live in one process, that whose epoch is its owner."""

    owner: process.Epoch
    released: bool


class InFlight(NamedTuple):
    """A call that is inside.

    :ivar function: PC/SC's name.
    :ivar thread: the identifier of the thread.
    :ivar since: ``monotonic()`` when it began.
    :ivar wait: the wait for events that it is part of, if any.
    """

    function: str
    thread: int
    since: float
    wait: Any = None


Entry = tuple[str, int, float, Any]
"""The same, as it is noted: a plain tuple takes less time to make."""


class Unquiet(NamedTuple):
    """Why a process cannot use the native library: who was inside when it was forked.

    :ivar function: PC/SC's name of the call.
    :ivar thread: the name of the thread, or its number where the name could not be had.
    :ivar seconds: how long it had been inside.
    """

    function: str
    thread: str
    seconds: float


quiesce_timeout = 1.0
"""How long a fork waits, in seconds; a setting."""

IMPORTS = "an import"
"""In the place of a function: who imports what PC/SC takes is inside as well, for a child in which a module is half
imported has its lock held for ever."""

may_child_use_native: Callable[[], bool] = partial(bool, 1)
"""Whether a child may use the native library at all; if not, a fork waits for no native call."""

_Result = TypeVar("_Result")
_PAUSE = 0.001  # s
_WAKE_AGAIN = 0.01  # s; a wait that can't be ended for good may have begun since
_LONG_WAIT = 0.001  # s
_GIVE_WAY = 0.0001  # s; longer than it takes a thread to wake up
_GRACE = 1.0  # s; longer than a fork takes that waited for quiesce_timeout

Operation = tuple[Any, ...]
"""A C function and its arguments."""


def _called(operations: Iterable[Operation]) -> Iterator[Any]:
    return map(_call_a_partial, starmap(partial, operations))


_call_a_partial: Any = partial.__call__
_call: Any = getattr(operator, "call", None)  # since Python 3.11
called: Callable[[Iterable[Operation]], Iterator[Any]] = partial(starmap, _call) if _call else _called
"""What these return, each called when the iterator comes to it: by C alone, if C is what goes through it."""

is_not_false = partial(operator.is_not, False)
nowhere: deque[Any] = deque(maxlen=0)
"""Takes what C functions return that nobody wants."""


def in_one_step(*operations: Operation) -> None:
    """Call each of these without returning to the interpreter in between.

    One that returns False ends it.
    """
    nowhere.extend(takewhile(is_not_false, called(operations)))


OPEN, WOKEN, RELEASED, GIVEN = range(4)


class Place:
    """Where one thread at a time is in the native library.

    :ivar calls: the calls that are there now: one, or more of the same thread where a finalizer runs in the middle.
    :ivar cards: what lives there; a call that wants the place bare isn't made while there is any.
    :ivar state: OPEN; WOKEN: the wait that was there has been ended, and the place is of no more use; RELEASED; GIVEN:
        to a child that is being forked, or has just been, which is decided in a moment.
    :ivar waiting: since when threads wait for the place, by ``monotonic()``.
    :ivar acquire: takes the place, if it is free, and says whether it was; its argument is False: don't wait.
    :ivar enter: puts a call on the list.
    :ivar release: gives the place back.
    :ivar leave: takes the last call off the list, and returns it.
    """

    __slots__ = ("acquire", "calls", "cards", "enter", "leave", "lock", "release", "state", "waiting")

    def __init__(self) -> None:
        self.state = OPEN
        self.cards: list[Any] = []
        self.renew()

    def renew(self) -> None:
        """Forget who is there: this is a new process."""
        self.lock = RLock()
        self.calls: list[Entry] = []
        self.waiting: dict[object, float] = {}
        self.acquire: Callable[[bool], Any] = self.lock.acquire
        self.enter = self.calls.append
        self.release: Callable[[], Any] = self.lock.release
        self.leave = self.calls.pop

    def wake(self, wait: Any, *, may_pass: bool = False) -> None:
        """End the native call of a wait for events that is here, if it can be ended.

        :param may_pass: although the gate is closed.
        """

    def wait_until_free(self, timeout: float = -1) -> None:
        """Wait until nobody is here.

        :param timeout: in seconds; negative: for ever.
        """
        key = object()
        try:
            self.waiting[key] = monotonic()
            in_one_step((self.lock.acquire, True, timeout), (self.release,))
        finally:
            self.waiting.pop(key, None)

    def give_way(self) -> None:
        """Before a call: let a thread go first that has waited for long.

        A thread that makes one call after the other would else be back before one that waits has woken up.
        """
        if any(monotonic() - since > _LONG_WAIT for since in list(self.waiting.values())):
            sleep(_GIVE_WAY)


places: dict[Place, None] = {}
"""All of this process."""

unsettled: dict[Any, None] = {}
"""Places about which something is to be noted before a fork; each has ``settle()``."""

elsewhere: dict[object, Entry] = {}
"""What goes on that a fork waits for, and that has no place."""

closers: dict[int, float] = {}
"""The threads that have closed the gate, and until when: a thread that forks, not for long; a block, until its fork."""

_thread_names: dict[int, str] = {}
_forked_by = 0


def attempt(
    place: Place,
    owned: Owned,
    function: str,
    call: Operation,
    *more: Operation,
    wait: Any = None,
    bare: bool = False,
    most: int = OPEN,
    may_pass: bool = False,
) -> list[Any]:
    """Make a native call, in one step of C, if the place is free and nothing is in the way.

    :param owned: what the call is on; it isn't made if that is no more this process's.
    :param function: PC/SC's name.
    :param call: the call.
    :param more: what belongs to the same step, after it.
    :param wait: the wait for events that it is part of; it isn't made if that was cancelled.
    :param bare: it isn't made if a card lives there.
    :param most: nor if the place is in a later state.
    :param may_pass: it is made although the gate is closed.
    :return: empty if the call wasn't made; else :func:`made` has the result.
    """
    entry = (function, get_ident(), monotonic(), wait)
    steps: list[Any] = []
    operations = ((place.acquire, False), (place.enter, entry), call, *more, (place.release,), (place.leave,))
    chain = takewhile(is_not_false, called(operations))
    try:
        # From the first of these looks to the call of extend() no other code runs, of this thread or of any other.
        if (
            (may_pass or not closers)
            and place.state <= most
            and not (bare and place.cards)
            and not (wait is not None and wait.cancelled)
            and process.sentinel[0]
            and owned.owner is process.here
        ):
            steps.extend(chain)
    except BaseException:
        # Raised by the call itself (TypeError), or by a handler after the last step.  Each of the calls below is the
        # first in its block, so no handler comes before it.
        if steps and steps[-1] is not entry:
            try:
                place.leave()
            finally:
                place.release()
        raise
    return steps


def made(steps: list[Any]) -> Any:
    """What the call of :func:`attempt` returned."""
    return steps[2]


def wait_for(place: Place, may_pass: bool = False) -> bool:
    """Wait for what may have kept a call from being made: a closed gate, or another thread's call.

    :param may_pass: the gate was no obstacle.
    :return: whether the next attempt may pass a closed gate.
    """
    ident = get_ident()
    if may_pass or not closers or ident in closers:
        place.wait_until_free()
        return may_pass or ident in closers
    return wait_until_open(ident)


def wait_until_open(ident: int) -> bool:
    """Wait until no other thread is about to fork.

    A handler that interrupted that thread may be waiting for this one, so a gate that a fork has closed is passed
    after a while; the fork is unquiet then, at worst.

    :return: whether the gate may be passed although it is closed: by the thread that closed it, or by anybody.
    """
    while closers and ident not in closers:
        if all(until < monotonic() for until in list(closers.values())):
            return True
        sleep(_PAUSE)
    return ident in closers


def during(function: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """``call(*arguments)``, which a fork waits for, and which has no place.

    :param function: PC/SC's name of the call, or another one.
    """
    key = object()
    ident = get_ident()
    try:
        elsewhere[key] = entry = (function, ident, monotonic(), None)
        while closers and ident not in closers:
            elsewhere.pop(key, None)
            may_pass = wait_until_open(ident)
            elsewhere[key] = entry
            if may_pass:
                break
        return call(*arguments)
    finally:
        elsewhere.pop(key, None)


def exclusively(lock: Any, function: Callable[[], _Result]) -> _Result:
    """``function()`` with a lock held, and not left held by a handler that raises."""
    held: list[bool] = []
    try:
        held.extend(called(((lock.acquire,),)))
        return function()
    finally:
        if held:
            lock.release()


def in_flight() -> list[InFlight]:
    """What is inside now."""
    found = [call for place in list(places) if place.calls for call in list(place.calls)]
    return [InFlight._make(call) for call in (*found, *list(elsewhere.values()))]


def others_are_inside() -> bool:
    """Whether a call of another thread is inside the native library."""
    ident = get_ident()
    return any(call.thread != ident for call in in_flight())


def stop_locking() -> None:
    """At interpreter exit: threads that are inside may never come out, so nobody waits for them."""
    for place in list(places):
        place.acquire = operator.not_  # it says that the place is free
        place.release = int


# The gate.


def close_quietly() -> bool:
    """Close the gate until the next fork, or :func:`open_again`.

    The fork of another thread doesn't wait for ours: it may hold locks by now that we need to get there, as logging's.
    It opens the gate, and ours closes it once more.

    :return: whether nobody else is inside; if somebody is, the gate is open.
    """
    _close(everything=True)
    if others_are_inside():
        open_again()
        return False
    closers[get_ident()] = math.inf
    return True


def open_again() -> None:
    """Open the gate, if this thread has closed it."""
    closers.pop(get_ident(), None)


def stays_quiet() -> bool:
    """Whether nobody else is inside."""
    _quiesce(get_ident(), monotonic() + quiesce_timeout, everything=True)
    return not others_are_inside()


def _before_fork() -> None:
    if count_threads() or in_flight():
        _close(everything=may_child_use_native())
    for place in list(unsettled):
        place.settle()


def _close(*, everything: bool) -> None:
    if not process.sentinel[0]:
        return  # a child that never used PC/SC: whoever is in the table was inside in its parent
    ident = get_ident()
    deadline = monotonic() + quiesce_timeout
    while _another_forks(ident) and monotonic() < deadline:
        sleep(_PAUSE)
    until = deadline + _GRACE
    closers[ident] = until
    try:
        _quiesce(ident, deadline, everything=everything)
    except BaseException as error:
        # A signal handler's, as KeyboardInterrupt. A hook can't raise: the fork goes on at once, and it comes after it.
        raise_later(ident, error)
    finally:
        closers[ident] = until
        if others_are_inside():
            _thread_names.update({thread.ident or 0: thread.name for thread in threading.enumerate()})


def _another_forks(ident: int) -> bool:
    return any(until < math.inf for thread, until in list(closers.items()) if thread != ident)


def _quiesce(ident: int, deadline: float, *, everything: bool) -> None:
    """Wait until nobody else is inside, or time is up.

    :param everything: wait for native calls, too, and end waits for events.
    """
    ending: list[_Ending] = []
    try:
        _await_others(ident, deadline, everything, ending)
    finally:
        for one in ending:
            one.stopped = True


def _await_others(ident: int, deadline: float, everything: bool, ending: list[_Ending]) -> None:
    while (left := deadline - monotonic()) > 0:
        busy = [place for place in list(places) if everything and any(call[1] != ident for call in list(place.calls))]
        others = [call for call in list(elsewhere.values()) if call[1] != ident]
        if not busy and not others:
            return
        if not ending and any(call[3] is not None for place in busy for call in list(place.calls)):
            ending.append(_Ending(ident))
            start_new_thread(ending[0].run, ())
        for call in others:
            if call[3] is not None:
                call[3].interrupt()
        if busy:
            busy[0].wait_until_free(left)
        else:
            sleep(_PAUSE)
        closers.setdefault(ident, deadline + _GRACE)  # a signal handler may have forked meanwhile


class _Ending:
    """Ends the native calls of waits for events, for a fork.

    In a thread of its own, since it may have to ask pcscd, which may not answer, and a fork waits no longer than it
    says.
    """

    def __init__(self, forking: int) -> None:
        self._forking = forking
        self.stopped = False

    def run(self) -> None:
        """End them, and those that have begun since, until stopped."""
        while not self.stopped:
            for place in list(places):
                for call in list(place.calls):
                    if call[3] is not None and call[1] != self._forking and not self.stopped:
                        place.wake(call[3], may_pass=True)
            sleep(_WAKE_AGAIN)


def raise_later(ident: int, error: BaseException) -> None:
    """Raise ``error`` in the thread ``ident``, after its fork."""
    start_new_thread(_raise_later, (ident, error))


def _raise_later(ident: int, error: BaseException) -> None:
    import ctypes  # rarely needed

    while closers:
        sleep(_PAUSE)
    # What is raised in another thread is a class, without arguments: one that makes the very instance.
    carrier = type(type(error).__name__, (type(error),), {"__new__": lambda kind: error})
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(carrier))


def _in_hook() -> None:
    global _forked_by
    _forked_by = get_ident()  # if it is inside, the fork was made in the middle of a call, by a finalizer


def _begin(epoch: process.Epoch) -> None:
    """Judge whether the fork was quiet, and open the gate."""
    global _forked_by
    # Whoever is in the table: a thread of this process may have got the number of one of its parent's.
    for function, thread, since, _ in in_flight():
        if thread != _forked_by and (epoch.unquiet is None or function == IMPORTS):
            epoch.unquiet = Unquiet(function, _thread_names.get(thread, str(thread)), monotonic() - since)
    _forked_by = 0
    places.clear()
    unsettled.clear()
    for table in (elsewhere, closers, _thread_names):
        table.clear()


# To open is one step that nothing can interrupt. A hook in Python could be left by what a signal handler raises.
process.around_fork(_before_fork, closers.clear)
process.at_fork(in_hook=_in_hook, at_begin=_begin)


def _configured(settings: Settings) -> None:
    global quiesce_timeout, may_child_use_native
    quiesce_timeout = settings.quiesce_timeout
    may_child_use_native = lambda: settings.policy is not Policy.BROKER and native_works_after_fork()  # noqa: E731


when_changed(_configured)
