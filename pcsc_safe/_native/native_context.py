"""One context of libpcsclite, with its connection to pcscd.

The step of C in which libpcsclite makes it also enters it in the lists that know it.  Shutting its connection down ends
a wait for events in it at any moment; SCardCancel can't do that at any moment.

Invariant: the process that established it, or to which it was handed over, is its ``owner``, and alone may release it.
At a fork it stays the parent's.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress
from operator import contains, itemgetter, not_
from typing import Any, Callable, Optional

from .._core import connections, descriptors, in_flight, process, transfer
from .._core.descriptors import Descriptor
from .._core.failures import suppress
from .._core.in_flight import OPEN, PAUSE, WOKEN, Place, attempt
from .._core.library import SUCCESS
from .._core.one_step import Operation, call_each, in_one_step
from .._core.unpatched import monotonic, sleep
from .pyscard import raw

__all__ = ["NativeContext", "cancel_natively", "establishing", "wait_while_given"]

_SHUTDOWN_TIMEOUT = 0.1  # s; that pcscd has to end a conversation
_LONGEST_PAUSE = 0.1  # s


establishing = Place()
"""Where native contexts are established: one at a time, so that the descriptor of each can be identified."""

in_flight.places[establishing] = establishing.calls


class NativeContext(Place):
    """A context of libpcsclite.

    :ivar owner: the process that established it, or that it was handed over to; only this process may release it.
    :ivar handle: libpcsclite's handle; 0 until it is known.
    :ivar began: when the last call on a card there began, by ``monotonic()``.
    :ivar descriptor: its connection to pcscd, if it is known.
    :ivar woken: when its end was first requested, by ``monotonic()``.
    :ivar wakers: one key for each thread that is ending a wait there, or is using the connection.  While there is one,
        it isn't released, unless its connection is dead.
    :ivar cards: the native handles of its cards, and the results of SCardConnect that are not recorded yet.
    """

    __slots__ = (
        "began",
        "cards",
        "connection_finder",
        "descriptor",
        "established",
        "handle",
        "owner",
        "wakers",
        "woken",
    )

    def __init__(self) -> None:
        super().__init__()
        self.owner = process.current()
        self.handle = 0
        self.began = self.woken = 0.0
        self.descriptor: Optional[Descriptor] = None
        self.wakers: dict[object, None] = {}
        self.cards: list[Any] = []
        self.established: list[Any] = []  # what SCardEstablishContext returned
        self.connection_finder = connections.ConnectionFinder()

    def if_established(self) -> Iterator[tuple[NativeContext, Any]]:
        """An entry for a table, if pcscd has not refused it by the time the iterator is used."""
        return compress([(self, self.calls)], map(not_, map(itemgetter(0), self.established)))

    def settle(self) -> None:
        """Note what libpcsclite has made; any thread may do it, and a second time changes nothing."""
        if not self.handle and self.established and self.established[0][0] == SUCCESS:
            descriptor = self.connection_finder.connection()
            if descriptor is not None and self.is_ours():
                descriptors.guard(descriptor)
                self.descriptor = descriptor
            elif descriptor is not None:
                # A finalizer has forked in the middle, and this is the child.
                descriptors.replace_with_dead([descriptor])
            self.handle = self.established[0][1]
        in_flight.unsettled.pop(self, None)

    def is_ours(self) -> bool:
        """Whether this process owns it: not in a child, and not if a finalizer forked while it was established."""
        return self.owner is process.current()

    def forget_card(self, card: Any) -> None:
        """Take a card off the list, if it is there."""
        with suppress(ValueError):
            self.cards.remove(card)

    def wake(self, wait: Any) -> bool:
        """End the native call of a wait for events that is here; if there is none, do nothing.

        Shutting the connection down ends it at any moment, which SCardCancel doesn't.  This also ends the native
        context, so there must be another one: the process may since have lost the right to connect to pcscd.

        Where a card lives, the wait isn't ended, because the card's session would end, too.  Such a wait is short.

        :return: False if it must be done again, because SCardCancel couldn't be called yet.
        """
        latest = self.calls[-1:]
        if self.cards or not latest or latest[0][3] is not wait:
            return True
        (call,) = latest
        is_known = self.descriptor is not None and self.descriptor.is_intact()
        if is_known and self.state == OPEN and not wait.has_spare(self):
            is_known = False
        if self.state == OPEN:
            self.woken = monotonic()
        key = object()
        try:
            self.wakers[key] = None  # while there is a key, the connection isn't closed, so its number isn't reused
            is_there, note = (contains, self.calls, call), (setattr, wait, "was_ended", True)
            if not is_known:
                return bool(cancel_natively(self, note, needed=call_each((is_there,))))
            in_one_step(is_there, note, (setattr, self, "state", WOKEN))  # a thread that comes next sees the state
            if self.state == WOKEN:
                connections.shut_down(self.descriptor, both_directions=monotonic() - self.woken > _SHUTDOWN_TIMEOUT)
            return True
        finally:
            self.wakers.pop(key, None)

    def end(self, wait: Any, deadline: float = float("inf")) -> None:
        """Wake a wait until it has left.

        :param deadline: when to give up, by ``monotonic()``; but not before it was woken once.
        """
        pause = PAUSE
        # SCardCancel has no effect on a wait that hasn't begun, and pcscd may not respond.  A child that a handler has
        # forked doesn't have the thread that waits.
        while any(call[3] is wait for call in list(self.calls)) and self.is_ours():
            if self.wake(wait) and monotonic() > deadline:
                break
            sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def end_connection(self, how: Callable[[Optional[Descriptor]], None], *, with_wait: bool) -> None:
        """Call ``how`` with its connection, unless the connection is being released.

        :param with_wait: also if a wait for events is here.
        """
        key = object()
        try:
            self.wakers[key] = None  # as in wake()
            if not any(call[0] == "SCardReleaseContext" or (call[3] and not with_wait) for call in list(self.calls)):
                how(self.descriptor)
        finally:
            self.wakers.pop(key, None)

    def is_dead(self) -> bool:
        """Whether pcscd has closed the connection."""
        # Checked before and after, because a release closes the connection, too.
        return self._is_idle() and connections.is_hung_up(self.descriptor) and self._is_idle()

    def _is_idle(self) -> bool:
        return self.state == OPEN and not self.calls


def cancel_natively(context: NativeContext, *first: Operation, needed: Iterator[Any]) -> list[Any]:
    """SCardCancel, which uses a separate connection to pcscd for a moment.

    :param first: C calls in the same step, before it.
    :param needed: as of :func:`in_flight.attempt`.
    :return: pyscard's result in a list; empty if it wasn't called.
    """
    operations = connections.FORGET_LATEST, *first, (raw["SCardCancel"], context.handle)
    return attempt(establishing, context, "SCardCancel", *operations, in_turn=True, needed=needed)[-1:]


def wait_while_given(owned: Any) -> None:
    """Wait a moment, because a fork is giving native contexts to its child; callers then look again.

    :param owned: the PC/SC context that they belong to.
    """
    transfer.settle_early(owned)
    sleep(PAUSE)
