"""The calls that are inside the native library, and the gate that a fork closes before it.

libpcsclite has locks of its own.  A child that was forked while another thread held one hangs in its first call, for
ever; so a fork waits until nobody is inside (it is *quiet*), at most for :data:`quiesce_timeout`, and keeps newcomers
out meanwhile.  Threads that wait for events are cancelled, again and again until they are out: a cancel that comes
before the wait has begun is lost.  :mod:`_turns` sends them back in afterwards.

Invariant: a thread is in :data:`inside` while it is in the native library, and only then; also if a signal handler
raises in the middle, which is why nothing here is a context manager written in Python.  The child judges by its copy of
that table whether its fork was quiet, so a fork that ran no hook is judged too.  An unquiet child never enters the
native library.  In a child nothing here stays closed or held.
"""

import threading
import time
from _thread import _count as _count_threads  # of Python's threads, without the main one
from _thread import start_new_thread
from typing import Any, Callable, NamedTuple, Optional, Protocol

from . import _process

__all__ = [
    "IMPORTS",
    "InFlight",
    "Unquiet",
    "close_quietly",
    "closers",
    "enter",
    "inside",
    "let_pass",
    "open_again",
    "others_are_inside",
    "raise_later",
    "stays_quiet",
    "through",
    "wait_until_open",
]


class Interruptible(Protocol):
    """A wait for events, as a fork sees it."""

    def interrupt(self) -> None:
        """Have it leave the native library, for now."""


InFlight = tuple[str, float, Optional[Interruptible]]
"""A call that is inside: PC/SC's name, ``time.monotonic()`` when it began, and what to interrupt if it is a wait."""


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
"""How long a fork waits, in seconds; set by :func:`pcsc_safe.configure`."""

IMPORTS = "an import"
"""In the place of a function: who imports what PC/SC takes is inside as well, for a child in which a module is half
imported has its lock held for ever."""

inside: dict[int, InFlight] = {}
"""Who is inside, by the thread's identifier."""

closers: dict[int, bool] = {}
"""The threads that have closed the gate; nobody else may enter. True: it is forking; False: it will, at some time."""

_PAUSE = 0.001  # s
_AT_ONCE = 0.05  # s
_thread_names: dict[int, str] = {}


def through(ident: int, entry: InFlight) -> None:
    """Enter, as soon as no fork is pending; for a thread that has entered itself in :data:`inside` and found it closed.

    A thread that is itself forking passes: it may be in another library's hook, and it can't be inside at the fork.
    """
    while closers and ident not in closers:
        inside.pop(ident, None)
        wait_until_open(ident)
        inside[ident] = entry


def wait_until_open(ident: int) -> None:
    """Wait until no other thread is about to fork."""
    while closers and ident not in closers:
        time.sleep(_PAUSE)


def enter(function: str, native: Callable[..., Any], *arguments: Any, wait: Optional[Interruptible] = None) -> Any:
    """``native(*arguments)``, which is inside the native library.

    :param function: PC/SC's name of the call.
    :param wait: what can be interrupted, if it is a wait for events.
    """
    ident = threading.get_ident()
    before = inside.get(ident)  # a finalizer may make a call in the middle of another
    try:
        inside[ident] = entry = (function, time.monotonic(), wait)
        if closers:
            through(ident, entry)
        return native(*arguments)
    finally:
        if before is None:
            inside.pop(ident, None)
        else:
            inside[ident] = before


def _others(ident: int) -> list[InFlight]:
    return [entry for thread, entry in list(inside.items()) if thread != ident]


def close_quietly() -> bool:
    """Close the gate until the next fork, or :func:`open_again`.

    The fork of another thread doesn't wait for ours: it may hold locks by now that we need to get there, as logging's.
    It opens the gate, and ours closes it once more.

    :return: whether nobody else is inside; if somebody is, the gate is open.
    """
    _close()
    if others_are_inside():
        open_again()
        return False
    closers[threading.get_ident()] = False
    return True


def open_again() -> None:
    """Open the gate, if this thread has closed it."""
    closers.pop(threading.get_ident(), None)


def let_pass() -> None:
    """Let those in that wait at the gate, and close it again when they are out; for a thread that has closed it."""
    closed_for = closers.pop(threading.get_ident(), True)
    time.sleep(2 * _PAUSE)
    _close()
    closers[threading.get_ident()] = closed_for


def others_are_inside() -> bool:
    """Whether a call of another thread is inside the native library."""
    return bool(_others(threading.get_ident()))


def stays_quiet() -> bool:
    """Whether nobody else is inside, but who finds the gate closed and leaves at once."""
    deadline = time.monotonic() + _AT_ONCE
    while others_are_inside():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


def _before_fork() -> None:
    if inside or _count_threads():
        _close()


def _close() -> None:
    if not _process.sentinel[0]:
        return  # a child that never used PC/SC: whoever is in the table was inside in its parent
    ident = threading.get_ident()
    deadline = time.monotonic() + quiesce_timeout
    while _another_forks(ident) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    closers[ident] = True
    try:
        _quiesce(ident, deadline)
    except BaseException as error:
        # A signal handler's, as KeyboardInterrupt. A hook can't raise: the fork goes on at once, and it comes after it.
        raise_later(ident, error)
    finally:
        closers[ident] = True
        if _others(ident):
            _thread_names.update({thread.ident or 0: thread.name for thread in threading.enumerate()})


def _another_forks(ident: int) -> bool:
    return any(forks for thread, forks in list(closers.items()) if thread != ident)


def _quiesce(ident: int, deadline: float) -> None:
    """Wait until nobody else is inside, or time is up."""
    interrupter = None
    try:
        while _others(ident) and time.monotonic() < deadline:
            if interrupter is None and any(wait for _, _, wait in _others(ident)):
                interrupter = _Interrupter(ident)
                start_new_thread(interrupter.run, ())
            time.sleep(_PAUSE)
            closers[ident] = True  # a signal handler may have forked meanwhile
    finally:
        if interrupter is not None:
            interrupter.stopped = True
    while _others(ident) and time.monotonic() < deadline:
        time.sleep(_PAUSE)  # the interrupter, on its way out


class _Interrupter:
    """Interrupts the waits for events.

    In a thread of its own, since SCardCancel asks pcscd, which may not answer, and a fork waits no longer than it says.
    """

    def __init__(self, forking: int) -> None:
        self._forking = forking
        self.stopped = False

    def run(self) -> None:
        """Interrupt whoever waits, until stopped."""
        ident = threading.get_ident()
        while not self.stopped:
            for wait in [wait for _, _, wait in _others(self._forking) if wait is not None]:
                # Entered before the look, as everybody does: a fork that does not see us will be seen.
                inside[ident] = ("SCardCancel", time.monotonic(), None)
                try:
                    if not self.stopped:
                        wait.interrupt()
                finally:
                    inside.pop(ident, None)
            time.sleep(_PAUSE)


def raise_later(ident: int, error: BaseException) -> None:
    """Raise ``error`` in the thread ``ident``, after its fork."""
    start_new_thread(_raise_later, (ident, error))


def _raise_later(ident: int, error: BaseException) -> None:
    import ctypes

    while closers:
        time.sleep(_PAUSE)
    # What is raised in another thread is a class, without arguments: one that makes the very instance.
    carrier = type(type(error).__name__, (type(error),), {"__new__": lambda kind: error})
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(carrier))


def _in_hook() -> None:
    if inside:
        inside.pop(threading.get_ident(), None)  # the fork was made in the middle of a call, by a finalizer


def _begin(epoch: _process.Epoch) -> None:
    """Judge whether the fork was quiet, and open the gate."""
    # Whoever is in the table: a thread of this process may have got the number of one of its parent's.
    for thread, (function, since, _) in inside.items():
        if epoch.unquiet is None or function == IMPORTS:
            epoch.unquiet = Unquiet(function, _thread_names.get(thread, str(thread)), time.monotonic() - since)
    for table in (inside, closers, _thread_names):
        table.clear()


# To open is one step that nothing can interrupt. A hook in Python could be left by what a signal handler raises.
_process.around_fork(_before_fork, closers.clear)
_process.at_fork(in_hook=_in_hook, at_begin=_begin)
