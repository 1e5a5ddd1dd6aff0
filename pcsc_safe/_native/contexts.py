"""The native contexts behind one PC/SC context of the application.

libpcsclite lets one thread at a time use a context.  A thread that needs a busy one waits for it while it holds the
lock of the whole process: one thread that waits for events then blocks every other thread.  So no thread here ever
calls libpcsclite on a busy context.  A PC/SC context has as many native ones as calls that run at the same time:

- each card has one to itself, and calls on that card take turns;
- a wait for events has one without a card, for as long as it lasts;
- any other call uses an idle one, or a new one.  Idle ones are released, except for one.

The step of C in which libpcsclite makes a native context, or a connection to a card, also enters it in the lists of
this module.  So whatever a signal handler interrupts can be finished, or undone, by the next thread that comes here.

At a fork everything here stays the parent's.  A child gets new native contexts, or those that were handed over to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, is_, not_
from typing import Any, Callable, Optional

from .._core import connections, descriptors, failures, gate, in_flight, log, process
from .._core.calls import CALLS, STALE
from .._core.descriptors import Descriptor
from .._core.failures import is_ours
from .._core.in_flight import GIVEN, OPEN, RELEASED, WOKEN, attempt
from .._core.library import SUCCESS, constant
from .._core.one_step import Operation, in_one_step
from .._core.unpatched import get_ident, monotonic, sleep
from . import interruptible
from .native_context import NativeContext, cancel_natively, establishing, wait_while_given
from .pyscard import raw
from .releasing import awaiting_release, mark_released, release_native, release_waiting, release_when_open

__all__ = ["NativeContexts", "native_contexts_of"]

NO_SERVICE: int = constant("SCARD_E_NO_SERVICE")
_32_BITS = 0xFFFFFFFF
_SHORT = 100  # ms; a wait for events that has to use the native context of a card, because pcscd refuses another one
_WAIT = "SCardGetStatusChange"
_READER_CALLS = frozenset((_WAIT, "SCardListReaders"))
_DOUBTFUL_CODES = constant("SCARD_E_UNSUPPORTED_FEATURE"), constant("SCARD_E_UNKNOWN_READER")
_MOST_AVOIDED = 2
_RETRY = object()
_ATTEMPTS_TO_FIND = 10  # the connection of a new native context
_CANCEL_TIMEOUT = 1.0  # s
_RELEASE_TIMEOUT = 1.0  # s
_BUSY_INTERVAL = 0.01  # s
_real, _released, _state = attrgetter("real"), attrgetter("released"), attrgetter("state")
_Call = Callable[[NativeContext, bool], tuple[Operation, ...]]


class NativeContexts:
    """The native contexts behind one PC/SC context.

    :ivar scope: SCARD_SCOPE_*.
    :ivar owner: the process in which more can be established; None for none, and once they are given to a child that
        is being forked.
    :ivar natives: the native contexts.
    :ivar waits: the waits for events on the PC/SC context, each over all its native calls.
    """

    __slots__ = ("_given_by", "_is_refused", "natives", "owner", "scope", "waits")

    def __init__(self, scope: Any, owner: Optional[process.Epoch] = None) -> None:
        self.scope = scope
        self.owner = owner
        self._given_by: object = None
        self._is_refused = False  # whether pcscd has refused the last one
        self.natives: dict[NativeContext, Any] = {}  # in the order in which they were established
        self.waits: dict[Any, None] = {}

    # Calls.

    def call(self, owned: Any, function: str, *arguments: Any) -> Any:
        """Make a short call on the PC/SC context itself.

        :param owned: the PC/SC context.
        :return: pyscard's result, or :data:`STALE`.
        """
        native = raw[function]
        return self.use(owned, function, arguments, lambda context, _: ((native, context.handle, *arguments),))

    def wait(self, owned: Any, wait: Any, timeout: int, states: Any) -> Any:
        """SCardGetStatusChange, on a native context without a card.

        :param wait: the wait that this native call is part of.
        :return: pyscard's result, or :data:`STALE`.
        """
        native = raw[_WAIT]

        def call(context: NativeContext, is_bare: bool) -> tuple[Operation, ...]:
            # A card lives there only if pcscd refuses another native context.
            limit = timeout if is_bare else min(timeout, _SHORT)
            return ((native, context.handle, limit, states),)

        return self.use(owned, _WAIT, (timeout, states), call, wait=wait, without_cards=True)

    def cancel(self, owned: Any, thread: Optional[int] = None) -> Any:
        """SCardCancel: ends every wait for events on the PC/SC context, even one that is between two native calls.

        :param thread: only the waits of this thread.
        :return: pyscard's result, or :data:`STALE`.
        """
        waits = [wait for wait in list(self.waits) if thread in (None, wait.thread)]
        for wait in waits:
            wait.cancelled = True
        self._wake(waits)
        if waits or thread is not None:
            return SUCCESS
        while self.is_current(owned):
            usable = self.usable()
            if not usable:
                return SUCCESS
            if usable[0].state == GIVEN:
                wait_while_given(owned)
                continue
            is_open = map(is_, map(_state, usable[:1]), (OPEN,))
            if made := cancel_natively(usable[0], needed=chain(self._is_still_current(owned), is_open)):
                return made[0]
        return STALE

    def ensure_spare(self, owned: Any, context: NativeContext) -> int:
        """Ensure that there is another native context without a wait.

        :return: SCARD_S_SUCCESS, or the code of the failure.
        """
        others = [other for other in self.usable() if other is not context and not any(c[3] for c in list(other.calls))]
        return SUCCESS if others else self.establish(owned)

    def _wake(self, waits: Sequence[Any]) -> None:
        """End the native calls of these waits."""
        deadline = monotonic() + _CANCEL_TIMEOUT
        for context in list(self.natives):
            for wait in waits:
                context.end(wait, deadline)

    # Which native context.

    def use(
        self, owned: Any, function: str, arguments: Any, call: _Call, *, wait: Any = None, without_cards: bool = False
    ) -> Any:
        """Make a call on any free native context, or on a new one.

        :param arguments: those after the handle, of the application's call.
        :param call: the operations, in a native context; and whether it certainly has no card.
        """
        busy: Optional[NativeContext] = None  # to be waited for, because pcscd refuses another one
        avoided: list[NativeContext] = []
        try:
            while self.is_current(owned) and not (wait is not None and wait.cancelled):
                insists = without_cards and busy is None
                for context in self._candidates(avoided, without_cards=insists):
                    context.yield_to_waiters()
                    # A wait beside a card must be short; any other must find no card there.
                    is_bare = insists or (wait is not None and not context.cards and context is not busy)
                    needed = chain(self._is_still_current(owned), map(not_, [context.cards] if is_bare else []))
                    lasts = is_bare and wait is not None and interruptible.is_wanted(arguments[0])
                    make: Any = interruptible.attempt if lasts else attempt
                    looks = {"wait": wait, "in_turn": context is busy, "needed": needed}
                    if made := make(context, owned, function, *call(context, is_bare), **looks):
                        result = self._check_result(owned, function, made[0], context, avoided)
                        if context.state == WOKEN or len(self.natives) > 1:
                            self.release_idle()
                        if result is not _RETRY:
                            return result
                if any(context.state == GIVEN for context in list(self.natives)):
                    wait_while_given(owned)
                elif in_flight.closed_for(get_ident()):
                    in_flight.wait_until_open(get_ident())
                else:
                    refused = self.establish(owned)
                    busy = self._busy(avoided) if refused != SUCCESS else None
                    if refused != SUCCESS and busy is None and self.is_current(owned):
                        return CALLS[function].failure(refused, arguments)
                    if busy is not None and not _is_usable(busy, avoided):
                        sleep(_BUSY_INTERVAL)  # there is nothing to wait for
            return STALE
        finally:
            if awaiting_release:
                release_waiting()

    def _is_still_current(self, owned: Any) -> Iterator[Any]:
        """:meth:`is_current`, without the owner, for a step of C; a child that a handler forks may continue here."""
        return chain(map(is_, map(_real, (owned,)), (self,)), map(not_, map(_released, (owned,))))

    def _candidates(self, avoided: Sequence[NativeContext], *, without_cards: bool) -> Iterator[NativeContext]:
        """The native contexts that a call may use, each looked at just before it is used."""
        for context in self.usable():
            if _is_usable(context, avoided) and not (without_cards and context.cards):
                yield context

    def _busy(self, avoided: Sequence[NativeContext]) -> Optional[NativeContext]:
        """A native context that will be free soon, if possible one to be used then; None if there is none."""
        # A call ends by itself, and so does a wait for events where a card lives (_SHORT).
        soon = [one for one in self.usable() if one.cards or not any(call[3] for call in list(one.calls))]
        return next((one for one in soon if _is_usable(one, avoided)), soon[0] if soon else None)

    def _check_result(
        self, owned: Any, function: str, result: Any, context: NativeContext, avoided: list[NativeContext]
    ) -> Any:
        """The result of a call; _RETRY if the result of this native context may be wrong.

        pcsc-lite 2.5 reads an event that comes at the wrong moment as the size of its array of readers.  The call then
        returns a code that it can't otherwise return, or that there is no such reader.
        """
        if function not in _READER_CALLS or result[0] not in _DOUBTFUL_CODES or len(avoided) == _MOST_AVOIDED:
            return result
        refused = self.ensure_spare(owned, context)
        if refused == SUCCESS:
            avoided.append(context)
            # In one step, because another thread may be connecting there.  Its cards stay there, as on raw pyscard.
            attempt(context, owned, _WAIT, (setattr, context, "state", WOKEN), needed=map(not_, [context.cards]))
            return _RETRY
        if not self.is_current(owned):
            return STALE
        # pcscd has ended, or accepts no more connections, so no other native context can be asked.
        return [refused, *result[1:]] if refused == NO_SERVICE else result

    def is_current(self, owned: Any) -> bool:
        """Whether these are still the native contexts of the PC/SC context in this process."""
        return not owned.released and owned.owner is process.current() and owned.real is self

    def is_outdated(self, owned: Any) -> bool:
        """Whether the PC/SC context is released, or has other native contexts now, perhaps of another pcscd."""
        return owned.owner is process.current() and not self.is_current(owned)

    def release_idle(self) -> None:
        """Release all native contexts but one that are idle and without a card.

        If possible, the one that is kept has a known connection, so that it can be handed over.
        """
        idle = [context for context in list(self.natives) if context.handle and not context.cards and not context.calls]
        woken = [context for context in idle if context.state == WOKEN]
        usable = sorted([context for context in idle if context.state == OPEN], key=lambda one: one.descriptor is None)
        for context in [*woken, *usable[1:]]:
            release_native(context, self.natives)

    # The life of a PC/SC context.

    def establish(self, owned: Any) -> int:
        """SCardEstablishContext: add one native context.

        :return: pyscard's result.
        """
        if any(context.is_dead() for context in list(self.natives)):
            return NO_SERVICE  # a new one would be one of another pcscd's
        for attempts_left in reversed(range(_ATTEMPTS_TO_FIND)):
            # The quick look fails if other threads open files, the thorough one if they open contexts.
            context = self._establish_one(owned, thoroughly=attempts_left % 2 == 0)
            if context is None:
                return NO_SERVICE
            hresult = int(context.established[0][0])
            if hresult != SUCCESS:
                self._warn_if_full(hresult)
                return hresult
            self._is_refused = False
            is_known = context.descriptor is not None or not connections.ARE_INHERITED
            if is_known or not context.is_ours() or not attempts_left:
                break
            # Its connection is unknown, because other threads have opened or closed files.
            release_native(context, self.natives)
        if self.is_outdated(owned):
            self.abandon(owned)
        return SUCCESS

    def _establish_one(self, owned: Any, *, thoroughly: bool) -> Optional[NativeContext]:
        """A native context, or the code of the failure; None if this process no longer owns what it is for."""
        while owned.owner is process.current() and self.owner is process.current():
            context = NativeContext()
            before, after = context.connection_finder.operations(thoroughly)
            establish: list[Operation] = [
                (context.established.extend, map(raw["SCardEstablishContext"], (self.scope,))),
                *[
                    (table.update, context.if_established())
                    for table in (self.natives, in_flight.places, in_flight.unsettled)
                ],
            ]
            try:
                operations = [*before, *establish, *after]
                attempt(establishing, self, "SCardEstablishContext", *operations, in_turn=True)
            except OSError as error:
                if not is_ours(error):
                    raise
                # Looking at the descriptors failed: no descriptor is free, or the one that was looked at is closed.
                if not context.established:
                    attempt(establishing, self, "SCardEstablishContext", *establish, in_turn=True)
            if context.established:
                context.settle()
                return context
        return None

    def _warn_if_full(self, hresult: int) -> None:
        """Log that pcscd refuses more connections; once, until it accepts one."""
        # libpcsclite has several codes for that, and one of them also says that pcscd has ended.
        natives = list(self.natives)
        if natives and not self._is_refused and not any(connections.is_hung_up(one.descriptor) for one in natives):
            self._is_refused = True
            log.warning(
                "pcscd-full",
                "pcscd refuses more connections from process %(pid)d (%(code)s): PC/SC calls of its threads wait for "
                "each other; close contexts that are not needed, or start pcscd with a greater --max-thread",
                code=hex(hresult & _32_BITS),
            )

    def release(self, owned: Any, forget: Callable[[], None]) -> Any:
        """SCardReleaseContext: end the waits, and release every native context; a busy one when it is free.

        :param forget: forgets the PC/SC context, after it was marked as released.
        :return: pyscard's result, or :data:`STALE`.
        """
        try:
            if not mark_released(owned, lambda: self.is_current(owned), self._established):
                return STALE
        finally:
            if owned.released:
                waits = list(self.waits)  # no other begins
                for wait in waits:
                    wait.cancelled = True
                forget()
        natives = self._established()
        for context in natives:
            awaiting_release.setdefault(context, True)  # one that another thread has established since
            context.cards.clear()
        self._wake(waits)
        # The others have lost their connections when their waits were ended.
        sound = [context for context in natives if context.state == OPEN]
        results = [made[0] for context in sound if (made := release_when_open(context, self.natives))]
        release_waiting()
        return int(results[0]) if results else SUCCESS

    def end_long_calls(self) -> None:
        """End long calls, as the death of the process would; SCardCancel ends waits for events."""
        for context in self.usable():
            context.end_connection(partial(connections.shut_down, both_directions=True), with_wait=False)

    def abandon(self, owned: Any = None) -> None:
        """Release native contexts that a thread has established here after this object was replaced.

        :param owned: the PC/SC context, if it may also have been released.
        """
        ours = [context for context in list(self.natives) if context.is_ours()]
        for context in ours:
            context.settle()
        # release_dead() releases those that have lost their connections.
        unreleased = [one for one in ours if one.handle and (one.descriptor is None or one.descriptor.is_intact())]
        if unreleased:
            for context in unreleased:
                awaiting_release.setdefault(context, owned is not None and owned.released)
                context.cards.clear()  # they are on another one by now
            self._wake(list(self.waits))
            release_waiting()

    def _established(self) -> list[NativeContext]:
        """The native contexts that libpcsclite has made, and not released."""
        for context in list(self.natives):
            if not context.handle:
                context.settle()
        return [context for context in list(self.natives) if context.handle]

    def usable(self) -> list[NativeContext]:
        """The native contexts that are in use or can be used."""
        return [context for context in self._established() if context.state in (OPEN, GIVEN)]

    def descriptors(self) -> list[Optional[Descriptor]]:
        """Their connections to pcscd; None for one that is not known."""
        return [context.descriptor for context in self.usable()]

    def cut_connections(self) -> None:
        """Replace the connections to pcscd by dead sockets, because pcscd has ended."""
        for context in self.usable():
            context.end_connection(_cut, with_wait=True)

    def give(self, by: object) -> bool:
        """Keep all threads out, while the child that gets them is being forked.

        :param by: who does so.
        :return: False if another thread has done so.
        """
        if self.owner is None:
            return self._given_by is by
        self._given_by, self.owner = by, None
        self.give_latest(by)
        return True

    def give_latest(self, by: object) -> None:
        """The same for those that were established in the meantime; called when no thread is inside any more."""
        if self._given_by is by:
            for context in self.usable():
                context.state = GIVEN

    def take_back(self, by: object) -> None:
        """There is no child: let threads in again, if ``by`` has kept them out."""
        if self._given_by is not by:
            return
        self.owner = process.current()
        for context in self.usable():
            context.state = OPEN
        self._given_by = None

    def give_up(self, child: process.Epoch) -> None:
        """There is a child: it is the owner now, and no thread of this process waits for them any more.

        :param child: stands for the child in this process.
        """
        for context in self.usable():
            context.owner = child

    def take_over(self, here: process.Epoch) -> None:
        """In a child: make this process the owner of what was handed over."""
        self.owner = here
        self.natives = dict.fromkeys(self.usable())
        self.waits.clear()
        for context in self.natives:
            context.renew()
            context.wakers.clear()
            context.owner, context.state = here, OPEN
            in_flight.places[context] = context.calls
            if context.descriptor is not None:
                descriptors.guard(context.descriptor)

    def release_dead(self) -> bool:
        """Free libpcsclite's memory for inherited contexts, and their descriptors.

        Without this, a chain of forks would accumulate dead descriptors.  libpcsclite closes the number that it knows,
        so it may be called only while the dead socket has that number.

        :return: whether libpcsclite has forgotten all of them.
        """
        self.abandon()
        natives = [context for context in list(self.natives) if context.handle and context.state != RELEASED]
        for context in natives:
            if context.descriptor is not None and descriptors.is_dead(context.descriptor.number):
                if context.is_ours():  # otherwise its lock may be another process's
                    context.wait_until_free(_RELEASE_TIMEOUT)
                in_flight.places.pop(context, None)
                with failures.suppress(KeyError):  # another thread has done it
                    release = (raw["SCardReleaseContext"], context.handle)
                    gate.call_inside("SCardReleaseContext", in_one_step, (self.natives.pop, context), release)
        return not any(context in self.natives for context in natives)


def _cut(connection: Optional[Descriptor]) -> None:
    descriptors.replace_with_dead([connection])
    descriptors.unguard(connection)


def _is_usable(context: NativeContext, avoided: Sequence[NativeContext]) -> bool:
    # Not one where a thread is ending a wait by SCardCancel, which could end the next wait.
    return not (context in avoided or context.wakers)


def native_contexts_of(context: Any) -> NativeContexts:
    """The native contexts behind a PC/SC context; none if another thread has just re-established it in a broker.

    A call on none returns :data:`STALE`.
    """
    real = context.real
    return real if isinstance(real, NativeContexts) else NativeContexts(context.scope)


def _begin(epoch: process.Epoch) -> None:
    if process.here is not epoch:  # as in process.clear_at_begin()
        establishing.renew()
    in_flight.places[establishing] = establishing.calls


process.at_fork(at_begin=_begin)
