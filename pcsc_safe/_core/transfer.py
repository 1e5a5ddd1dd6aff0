"""What a fork transfers to its child, in three steps: plan, confirm, transfer.

- *Plan*, in the parent before the fork, when the gate is closed: :func:`_plan_before_fork`.
- *Confirm*, in the child's hook: the child says over a socket pair that it exists, :func:`_confirm_in_child`.  Then, in
  the parent after the fork: the parent gives up what the child has now, or keeps everything,
  :func:`_settle_in_parent`.  A hook in the parent doesn't learn whether there is a child, and a fork can fail.
- *Transfer*: the child takes possession when it begins its epoch, :func:`_take_possession`.

A session that is handed over belongs to the child from the fork on.  A session that is shared belongs to both.

Invariant: at every moment exactly one process owns a session that is handed over.  If anything fails before the fork,
this is the parent.
"""

from __future__ import annotations

import _socket  # the module that Python's own is made of: eventlet and gevent patch that one
from typing import TYPE_CHECKING, Any, Optional

from ..errors import PcscSafeError
from ..policy import Owner, Policy, native_works_after_fork
from . import descriptors, failures, gate, gateways, handles, log, observer, process, settings
from .calls import KEEP_FILES, LOST_REASON, LostError
from .failures import is_ours
from .handles import Context
from .in_flight import PAUSE
from .unpatched import get_ident, monotonic, sleep

if TYPE_CHECKING:
    from .handover import handover

__all__ = ["FORK_AGAIN", "blocks", "obstacle", "register_hooks", "settle_early", "wait_while_given"]


blocks: dict[int, tuple[handover, ...]] = {}
"""The blocks that each thread is in, the innermost last."""


def obstacle(context: Context) -> Optional[tuple[str, str]]:
    """Why a context can't be handed over, and what to do; None if it can be."""
    if context.gateway is not gateways.native:
        return None
    if not native_works_after_fork():
        return (
            "a forked process can't use PC/SC on this platform",
            "set broker='always' before you establish the context",
        )
    context.real.release_idle()
    # Another thread may be releasing one that is surplus.
    if not any(has_intact_connections(context) or sleep(PAUSE) for _ in range(_INTACT_CHECKS)):
        return (
            f"the context of {context.established_at} has a connection to pcscd that is closed or unknown",
            "establish the context again",
        )
    return None


def has_intact_connections(context: Context) -> bool:
    """Whether all its connections are known and open."""
    found = context.gateway.descriptors(context.real)
    return bool(found) and all(one is not None and one.is_intact() for one in found)


class Plan:
    """What a fork gives to its child.

    What it reserves is noted here first, so that it can be released wherever a signal handler raises.

    :ivar blocks: the blocks that it is made for, if any.
    :ivar child: stands for the child, in the parent.
    :ivar native: contexts that are handed over with their connections.
    :ivar real: for each context that is handed over, what the child gets.
    :ivar given: the native contexts that no thread of the parent can use, until it is known whether there is a child.
    :ivar connections: those that ``native`` has to pcscd.
    :ivar in_broker: contexts that are handed over in a broker.
    :ivar shared: contexts that are shared.
    :ivar inherited_connection: how the child reaches ``in_broker`` and ``shared``; None if both are empty.
    :ivar start_signal: a socket pair; over its second end the child says that it has started.  Empty at first.
    :ivar is_complete: whether the child that is forked now gets all this.
    :ivar decided: whether there is this child; empty until the parent knows.  The first item counts: a signal handler
        may decide in the middle.
    :ivar raised: the exceptions of signal handlers, which are raised again when all is settled.
    """

    def __init__(self, blocks: tuple[handover, ...]) -> None:
        self.blocks = blocks
        self.child = process.Epoch(process.here, process.HANDED_OVER)
        self.native: list[Context] = []
        self.real: dict[Context, Any] = {}
        self.given: list[Any] = []
        self.connections: list[Optional[descriptors.Descriptor]] = []
        self.in_broker: list[Context] = []
        self.shared: list[Context] = []
        self.inherited_connection: Optional[gateways.InheritedConnection] = None
        self.start_signal: tuple[Any, ...] = ()
        self.is_complete = False
        self.decided: list[bool] = []
        self.raised: list[BaseException] = []

    def handed_over(self) -> list[Context]:
        """All contexts that are handed over."""
        return [*self.native, *self.in_broker]


_GIVEN_TIMEOUT = 1.0  # s; that another thread's fork has to decide: in a signal handler, it may wait for this thread
_ATTEMPTS = 100  # to settle: a signal handler can raise in each, but not for ever
_INTACT_CHECKS = 20
_plans: dict[int, Plan] = {}
_received: Optional[tuple[tuple[int, int], Plan]] = None
"""In a child that has not begun yet: its ``process_key()``, and what it gets."""

_is_registered = False


def register_hooks() -> None:
    """Register this module's functions for forks; until then a fork costs nothing more."""
    global _is_registered
    if not _is_registered:  # if a signal handler raises here, they are registered again, which does no harm
        process.before_fork(process.TRANSFER, _plan_before_fork)
        process.at_fork(in_child=_confirm_in_child, at_begin_last=_take_possession)
        for _ in range(2):  # twice: an exception of a signal handler can prevent one of them from running
            process.after_fork_in_parent(_settle_in_parent)
        _is_registered = True


def _plan_before_fork() -> None:
    ident = get_ident()
    of_thread = blocks.get(ident, ())
    if not of_thread and not settings.gives_at_forks():
        return
    if _received is not None:
        process.current()  # a child that forks before it has used the sessions that it was given
    if not process.sentinel[0]:
        return
    if ident in _plans:
        _settle_now(_plans[ident])  # this fork is a signal handler's, in the middle of another fork of this thread
    plan = Plan(of_thread)
    try:
        _plans[ident] = plan
        reason = _complete(plan, ident)
        if reason:
            _note_failure(plan, reason)
    except LostError as lost:
        handles.mark_gateway_lost(lost.gateway)
        _note_failure(plan, LOST_REASON, f"establish a new context; {KEEP_FILES}")
    except BaseException as error:
        ours = isinstance(error, (PcscSafeError, OSError)) and is_ours(error)
        if not plan.is_complete:
            _note_failure(plan, str(error) if ours else "a signal handler raised an exception")
        if not ours:  # the process forks anyway
            plan.raised.append(error)
    finally:
        _plans[ident] = plan  # again: a signal handler may have forked


FORK_AGAIN = "the parent is still the owner: fork again"
_USED = "a signal handler or an at-fork hook of the application has used it"


def _note_failure(plan: Plan, why: str, remedy: str = FORK_AGAIN) -> None:
    descriptors.kept_by_child.pop(get_ident(), None)
    for block in plan.blocks:
        block.failure = (why, remedy)
    log.warning(
        "no-handover",
        "process %(pid)d hands nothing over to the child that it forks: %(why)s; %(remedy)s",
        why=why,
        remedy=remedy,
    )


def _contexts_to_give(of_thread: tuple[handover, ...], owner: Owner) -> list[Context]:
    if of_thread:
        return list(dict.fromkeys(context for block in of_thread for context in block.contexts()))
    if owner is not Owner.CHILD:
        return []
    owned = [context for context in list(handles.contexts.values()) if context.owner is process.here]
    return [context for context in owned if not context.released and obstacle(context) is None]


def _complete(plan: Plan, ident: int) -> Optional[str]:
    """Choose what the child gets, and reserve it.

    :return: None, or the reason why the child does not get what it should get.
    """
    _choose(plan)
    if not plan.handed_over() and not plan.shared:
        return None
    reason = _find_obstacle(plan) or _reserve(plan)
    if reason:
        return reason
    plan.connections = _connections(plan.native)
    descriptors.kept_by_child[ident] = {
        *(descriptor.number for descriptor in plan.connections if descriptor is not None),
        *(plan.inherited_connection.descriptors() if plan.inherited_connection is not None else ()),
    }
    plan.is_complete = not plan.decided
    return None if plan.is_complete else _USED


def _choose(plan: Plan) -> None:
    in_force = settings.settings()
    given = _contexts_to_give(plan.blocks, in_force.owner)
    broker = gateways.brokers.existing()
    plan.native = [context for context in given if context.gateway is gateways.native]
    plan.in_broker = [context for context in given if context.gateway is broker]
    plan.real = {context: context.real for context in plan.handed_over()}
    owned = [context for context in list(handles.contexts.values()) if context.owner is process.here]
    plan.shared = [
        context
        for context in owned
        if not context.released
        and context not in given
        and context.gateway is broker
        and context.settings(in_force).policy is Policy.SHARE
    ]


def _find_obstacle(plan: Plan) -> Optional[str]:
    """Why nothing can be handed over now; None if nothing prevents it."""
    for context in plan.handed_over():  # one that is younger than the block
        found = obstacle(context)
        if found:
            return found[0]
    return None


def _reserve(plan: Plan) -> Optional[str]:
    """Keep this process's threads out of what is handed over, and have the broker prepare for the child."""
    here = process.here
    for context in plan.native:
        plan.given.append(plan.real[context])  # first: a signal handler may raise in the middle
        if not _keep_threads_out(context, plan):
            return "another thread is handing over a context"
    if plan.handed_over() and not gate.wait_until_quiet():
        return "another thread is inside a PC/SC call"
    for real in plan.given:
        real.give_latest(plan)
    broker = gateways.brokers.existing()
    handles.given.update(dict.fromkeys(plan.in_broker))
    if broker is not None and (plan.in_broker or plan.shared):
        plan.inherited_connection = broker.prepare_child()  # first: a signal handler may raise while it gives
        plan.inherited_connection.give(_real_handles(plan.in_broker), _real_handles(plan.shared))
    for context in plan.shared:
        for card in list(context.cards.values()):
            card.session.join()
    plan.start_signal = _socket.socketpair()
    for end in plan.start_signal:
        end.settimeout(None)  # whatever socket.setdefaulttimeout() says
    if not process.sentinel[0] or any(context.owner is not here for context in plan.handed_over()):
        return "a signal handler has forked"
    return None


def _keep_threads_out(context: Context, plan: Plan) -> bool:
    """Keep the threads of this process out of a context; False if another thread's fork has done so."""
    deadline = monotonic() + _GIVEN_TIMEOUT
    while not plan.real[context].give(plan):
        if monotonic() > deadline:
            return False
        sleep(PAUSE)
    return context.owner is process.here


def _connections(contexts: list[Context]) -> list[Optional[descriptors.Descriptor]]:
    """The connections to pcscd of contexts in this process's native library."""
    return [descriptor for context in contexts for descriptor in context.gateway.descriptors(context.real)]


def _real_handles(contexts: list[Context]) -> list[int]:
    """The real handles of contexts and their cards."""
    records: list[handles.Record] = []
    for context in contexts:
        records += [context, *list(context.cards.values())]
    return [record.real for record in records]


def _settle_in_parent() -> None:
    plan = _plans.get(get_ident())
    if plan is None:
        return
    for _ in range(_ATTEMPTS):
        try:
            _settle_once(plan)
            break
        except BaseException as error:  # a signal handler's
            plan.raised.append(error)
    _plans.pop(get_ident(), None)
    for raised in plan.raised[-1:]:
        gate.raise_later(get_ident(), raised)


def _settle_once(plan: Plan) -> None:
    """In the parent: give up what the child has now; or keep it, if there is no child.

    If a signal handler raises during this function, it is called again from the beginning.
    """
    descriptors.kept_by_child.pop(get_ident(), None)
    if not plan.decided:
        plan.decided.append(_child_has_started(plan))
    _close(plan.start_signal)
    _change_owners(plan)
    has_child = plan.decided[0]
    if has_child and plan.handed_over():
        for block in plan.blocks:
            block.note_handover()
        observer.record("handover", contexts=len(plan.handed_over()))
    if has_child and plan.shared:
        observer.record("share", contexts=len(plan.shared))
    if plan.inherited_connection is not None:
        plan.inherited_connection.settle(has_child)
    handles.note_settled(plan.in_broker)  # after that: a call of another thread is repeated now


def _change_owners(plan: Plan) -> None:
    """In the parent, when it is known whether there is a child: make the right process the owner."""
    if not plan.decided[0]:
        for real in plan.given:
            real.take_back(plan)
        return
    # Before another thread can re-establish the contexts that were handed over.
    descriptors.replace_with_dead(plan.connections)
    for connection in plan.connections:
        descriptors.unguard(connection)
    for real in plan.given:
        real.give_up(plan.child)
    for context, real in plan.real.items():
        if context.real is real:  # otherwise it was re-established meanwhile
            _change_owner(context, plan.child)
            for card in list(context.cards.values()):
                card.session.end()


def settle_early(context: Context) -> None:
    """Settle a fork that is giving a context to its child, if possible, for a call on this context.

    The caller can be a signal handler or a hook in the thread that forks, or a thread for which such a handler waits.
    """
    ident = get_ident()
    for thread, plan in list(_plans.items()):
        if context not in plan.real:
            continue
        if thread == ident:
            _settle_now(plan)
        elif not plan.decided and _child_says_so(plan):
            plan.decided.append(True)
        if plan.decided:
            _change_owners(plan)


def _settle_now(plan: Plan) -> None:
    """Settle a fork of this thread; if it hasn't forked yet, it hands nothing over."""
    _settle_once(plan)
    if plan.is_complete and not plan.decided[0]:
        plan.is_complete = False
        _note_failure(plan, _USED)


def wait_while_given(context: Context) -> None:
    """Wait until it is known whether a fork has given this context to its child; a second at most.

    :param context: in a broker.
    """
    deadline = monotonic() + _GIVEN_TIMEOUT
    while context in handles.given and context.owner is process.here and monotonic() < deadline:
        settle_early(context)
        sleep(PAUSE)


def _child_has_started(plan: Plan) -> bool:
    """Whether there is a child: it has said so, or still has its end of the socket pair."""
    if not plan.is_complete:
        return False
    _close(plan.start_signal[1:])
    return _child_says_so(plan, otherwise=True)


def _child_says_so(plan: Plan, *, otherwise: bool = False) -> bool:
    """Whether the child has said that it has started.

    :param otherwise: what to return if it hasn't said anything yet.
    """
    if not plan.is_complete:
        return False
    # Not select.poll or os.read, which set errno to 0: until Python 3.10 it is read after this, where fork() failed.
    try:
        return bool(plan.start_signal[0].recv(1, _socket.MSG_DONTWAIT | _socket.MSG_PEEK))
    except OSError as error:
        if not is_ours(error):
            raise
        return otherwise  # nothing is there yet; or a hook has closed it, and two processes must not have one session


def _close(ends: tuple[Any, ...]) -> None:
    """Close these, unless they are closed."""
    for end in ends:
        with failures.suppress(OSError):  # the application has closed the descriptor
            end.close()


def _change_owner(context: Context, owner: process.Epoch) -> None:
    """Change the owner of a context and its cards, except for cards of another owner, which are an ancestor's."""
    before = context.owner
    for card in list(context.cards.values()):
        if card.owner is before:
            card.owner = owner
    context.owner = owner


def _confirm_in_child() -> None:
    """In the child's hook: tell the parent that there is a child, and take over the connection to the broker."""
    plan = _plans.get(get_ident())
    if plan is not None and plan.is_complete:
        _receive(plan)
    descriptors.kept_by_child.clear()
    for each in list(_plans.values()):
        _close(each.start_signal)
    _plans.clear()  # last: until then this function can be called again


def _receive(plan: Plan) -> None:
    global _received
    # First: the parent gives up what the child gets even if it only finds the other end of the socket pair open.
    _received = (process.process_key(), plan)
    with failures.suppress(OSError):
        plan.start_signal[1].send(b"\1")
    if plan.inherited_connection is not None:
        plan.inherited_connection.take_over()
        with failures.suppress(OSError):  # from a child of this one, if it is forked before this one begins
            descriptors.guard(descriptors.of(plan.inherited_connection.number))
    if plan.handed_over():
        for block in plan.blocks:
            block.note_handover()
    for how, given in (("handover", plan.handed_over()), ("share", plan.shared)):
        for context in given:
            for card in list(context.cards.values()):
                card.session.show_use()  # this child may make its first call much later
            observer.record("got", context=context.key, how=how)


def _take_possession(epoch: process.Epoch) -> None:
    """In the child, when its epoch begins: become the owner."""
    global _received
    _plans.clear()
    ident = get_ident()
    for other in [thread for thread in blocks if thread != ident]:
        del blocks[other]
    pid, namespace = process.process_key()
    if _received is not None and _received[0] in ((pid, namespace), (pid, namespace or _received[0][1])):
        _take(_received[1], epoch)
    _received = None  # last: until then this function can be called again


def _take(plan: Plan, epoch: process.Epoch) -> None:
    broker = gateways.brokers.existing()
    for context in [*plan.handed_over(), *plan.shared]:
        if process.here is epoch:
            break  # the call of a signal handler, in the middle of this, has done it
        if context in plan.native:
            # A wait for events that began at the last moment is on this connection as well, and reads from it.
            is_there = epoch.unquiet is None and has_intact_connections(context)
            if is_there:
                context.real.take_over(epoch)
        else:
            is_there = broker is not None
            context.gateway = broker or context.gateway
        # What the application has closed since the fork is lost: the number may be something else's by now.
        _change_owner(context, epoch if is_there else process.Epoch(epoch, process.LOST))
        if not is_there:
            observer.record("lost", context=context.key)
            for card in list(context.cards.values()):
                card.session.end()
        for card in list(context.cards.values()):
            if context in plan.shared:
                card.transactions = 0  # what is open is its parent's
            if card.owner is epoch:
                card.session = card.session.taken_over(card.transactions > 0)
