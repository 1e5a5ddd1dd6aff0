"""What a fork gives to its child: sessions that are handed over, and sessions that are shared.

A session that is handed over (:func:`handover`, ``owner="child"``) is the child's from the fork on; its parent has
inherited objects then, as a child has otherwise, and the dead socket in the place of the connection.  A session that is
shared (policy ``share``) is both's; it lives in a broker.

The parent decides before the fork, with every other thread out of the way.  Whether there was a fork at all it learns
from the child, whose hook says so over a pipe: a hook in the parent isn't told, and a fork can fail.  The child takes
possession when it begins its epoch.

Invariant: of a session that is handed over one process is the owner, at every moment; if anything goes wrong before the
fork, that is the parent.
"""

from __future__ import annotations

import contextlib
import os
import threading
from types import TracebackType
from typing import Any, Optional

from ..errors import HandoverError, PcscSafeError
from ..policy import Owner, Policy, native_works_after_fork
from . import descriptors, gate, gateways, handles, inherited, log, observer, process, settings
from .calls import Kind, LostError
from .handles import Context
from .unpatched import monotonic, sleep

__all__ = ["files_to_preserve", "handover", "prepare"]


class handover:  # noqa: N801  # used as a function is, as contextlib.suppress
    """Hand sessions over to the child that is forked in this block.

    The child goes on in them: verified PIN, transaction and exclusive hold included.  The parent is the one that has
    inherited objects from then on; whatever it does with them, and whenever it exits, the child's session is not
    touched.  It is the next fork of this thread that counts, and in its child, if it is still in the block, the next
    one there: so a block around a daemon's double fork hands over to the daemon.

    What this process has itself inherited, and its policy lets it use, it first makes its own, as ``cards="reconnect"``
    does, so that the child goes on with the same cards; what it can't have it can't hand over.

    Other threads can't use PC/SC from the beginning of the block until that fork.

    :param contexts: which; all of this process if none is given.
    :raises HandoverError: when the block is entered: it can't work, or a call of another thread lasts longer than
        ``quiesce_timeout``.  When it is left: the fork handed nothing over, because it ran no hooks, or was not quiet;
        the parent has its sessions still.
    """

    def __init__(self, *contexts: Any) -> None:
        self._chosen = [_owned(context) for context in contexts] or None
        self._epoch: Optional[process.Epoch] = None
        self._done = False
        self.failure: Optional[tuple[str, str]] = None

    def __enter__(self) -> handover:
        self._epoch = here = process.current()
        self._done, self.failure = False, None
        _prepare()
        if self._chosen is None:
            for context in list(handles.contexts.values()):
                if context.owner is not here:
                    inherited.adopt(context)
        for context in self.contexts():
            why_not = _obstacle(context)
            if why_not:
                raise _error(*why_not)
        ident = threading.get_ident()
        try:
            if not gate.close_quietly():
                raise _error(
                    "calls of other threads are inside PC/SC",
                    "end them first, or configure a longer quiesce_timeout",
                )
            _blocks[ident] = (*_blocks.get(ident, ()), self)
        except BaseException:  # a signal handler's too
            if ident not in _blocks:
                gate.open_again()
            raise
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        ident = threading.get_ident()
        outer = _blocks.pop(ident, ())[:-1]
        if outer:
            _blocks[ident] = outer
        else:
            gate.open_again()
        if kind is not None or self._done:
            return
        if self.failure is not None:
            raise _error(*self.failure)
        here = process.current()
        if here is not self._epoch and self._owned_by(self._epoch):
            if here.noticed_by == "hook":
                raise _error("a signal handler raised during the fork", _AGAIN)
            raise _error(
                "the fork in this block ran none of Python's hooks", "use os.fork(); the parent is still the owner"
            )

    def contexts(self) -> list[Context]:
        """Those to hand over that this process owns."""
        return self._owned_by(process.here)

    def _owned_by(self, owner: Optional[process.Epoch]) -> list[Context]:
        chosen = self._chosen if self._chosen is not None else list(handles.contexts.values())
        return [context for context in chosen if context.owner is owner and not context.released]

    def happened(self) -> None:
        """Note that there was a fork, and it handed over."""
        self._done = True


def files_to_preserve() -> list[int]:
    """The descriptors that this process's sessions need: not to be closed by what closes all others, as daemons do.

    For python-daemon: ``DaemonContext(files_preserve=pcsc_safe.files_to_preserve())``.  The numbers stay the same when
    the sessions are handed over or shared.
    """
    here = process.current()  # first: it may be what makes contexts this process's own
    own = [context for context in list(handles.contexts.values()) if context.owner is here]
    found = [descriptor for context in own for descriptor in context.gateway.descriptors(context.real)]
    numbers = {descriptor.number for descriptor in found if descriptor is not None and descriptor.is_intact()}
    return sorted(numbers | set(gateways.brokers.files_to_preserve()))


def _owned(handle: Any) -> Context:
    record = handles.find(Kind.CONTEXT, handle)
    if not isinstance(record, Context) or record.released or record.owner is not process.current():
        raise HandoverError(
            "this is not a context that this process has",
            remedy="pass what SCardEstablishContext gave, or nothing to hand all of them over",
            pid=os.getpid(),
        )
    return record


def _obstacle(context: Context) -> Optional[tuple[str, str]]:
    """Why a context can't be handed over, and what to do; None if it can be."""
    if context.gateway is not gateways.native:
        return None
    if not native_works_after_fork():
        return "a forked process can't use PC/SC on this platform", "set broker='always' before it is established"
    # Another thread may be releasing one that is surplus.
    if not any(_are_intact(context) or sleep(_PAUSE) for _ in range(_LOOKS)):
        return f"the connection of the context of {context.established_at} isn't known", "establish it anew"
    return None


def _are_intact(context: Context) -> bool:
    """Whether all its connections are known, and there."""
    descriptors = context.gateway.descriptors(context.real)
    return bool(descriptors) and all(one is not None and one.is_intact() for one in descriptors)


def _error(problem: str, remedy: str) -> HandoverError:
    return HandoverError(f"nothing is handed over: {problem}", remedy=remedy, pid=os.getpid())


class _Will:
    """What a fork gives to its child.

    What it takes is noted here first, so that it can be given back wherever a signal handler raises.

    :ivar blocks: that it is made for, if any.
    :ivar native: contexts that are handed over with their connections.
    :ivar given: those of them that nobody in the parent can use, until it is known whether there is a child.
    :ivar in_broker: contexts that are handed over in a broker.
    :ivar shared: contexts that are shared.
    :ivar legacy: how the child reaches the latter two; None if there is none of them.
    :ivar birth: two sockets, over the second of which the child says that it was born; empty while there are none.
    :ivar is_made: the child that is forked now gets all this.
    :ivar is_born: there is that child; None until the parent knows.
    :ivar raised: by signal handlers meanwhile; it has to wait until all is settled.
    """

    def __init__(self, blocks: tuple[handover, ...]) -> None:
        self.blocks = blocks
        self.native: list[Context] = []
        self.given: list[Context] = []
        self.in_broker: list[Context] = []
        self.shared: list[Context] = []
        self.legacy: Optional[gateways.Transfer] = None
        self.birth: tuple[Any, ...] = ()
        self.is_made = False
        self.is_born: Optional[bool] = None
        self.raised: list[BaseException] = []


_GIVEN_WITHIN = 1.0  # s; for what another thread's fork has given to be its child's, or this process's again
_PAUSE = 0.001  # s
_LOOKS = 20
_blocks: dict[int, tuple[handover, ...]] = {}  # by thread; the innermost is the last
_wills: dict[int, _Will] = {}
_accepted: Optional[tuple[int, _Will]] = None  # in a child that has not begun yet: its PID, and what it gets
_is_prepared = False
_socket: Any = None


def prepare() -> None:
    """Import what a fork takes, so that nothing need be imported in a child."""
    global _socket
    import socket

    _socket = socket


def _prepare() -> None:
    """Register what only a process that hands over needs: after a fork, a Python function in the parent."""
    global _is_prepared
    prepare()
    if not _is_prepared:
        _is_prepared = True
        for _ in range(2):  # what a signal handler raises when one begins keeps that one from running
            process.after_fork_in_parent(_in_parent)


def _before() -> None:
    ident = threading.get_ident()
    blocks = _blocks.get(ident, ())
    if not blocks and not settings.gives_at_forks():
        return
    if _accepted is not None:
        process.current()  # a child that has done nothing with what it got but to fork again
    if not process.sentinel[0]:
        return
    will = _Will(blocks)
    try:
        _prepare()
        _wills[ident] = will
        why_not = _written(will, ident)
        if why_not:
            _failed(will, why_not)
    except LostError as lost:
        handles.disown(lost.gateway)
        _failed(will, "the broker has died, and the sessions with it", "establish them anew")
    except BaseException as error:
        ours = isinstance(error, PcscSafeError) or getattr(error, "errno", None) is not None
        if not will.is_made:
            _failed(will, str(error) if ours else "a signal handler raised")
        if not ours:  # the fork goes on
            will.raised.append(error)
            _wills[ident] = will


_AGAIN = "the parent is still the owner: fork again"


def _failed(will: _Will, why: str, remedy: str = _AGAIN) -> None:
    descriptors.kept.pop(threading.get_ident(), None)
    for block in will.blocks:
        block.failure = (why, remedy)
    log.warning("process %d gives nothing to the child that it forks: %s", os.getpid(), why)


def _to_give(blocks: tuple[handover, ...], owner: Owner) -> list[Context]:
    if blocks:
        return list(dict.fromkeys(context for block in blocks for context in block.contexts()))
    if owner is not Owner.CHILD:
        return []
    own = [context for context in list(handles.contexts.values()) if context.owner is process.here]
    return [context for context in own if not context.released and _obstacle(context) is None]


def _written(will: _Will, ident: int) -> Optional[str]:
    """Have a will made.

    :return: None, or why there is nothing in it that should be.
    """
    in_force, here = settings.settings(), process.here
    given = _to_give(will.blocks, in_force.owner)
    broker = gateways.brokers.usable()
    will.native = [context for context in given if context.gateway is gateways.native]
    will.in_broker = [context for context in given if context.gateway is broker]
    will.shared = [
        context
        for context in list(handles.contexts.values())
        if context.owner is here
        and not context.released
        and context not in given
        and context.gateway is broker
        and context.settings(in_force).policy is Policy.SHARE
    ]
    if not given and not will.shared:
        return None
    for context in given:  # one that is younger than the block
        why_not = _obstacle(context)
        if why_not:
            return why_not[0]
    if given and not gate.stays_quiet():
        return "a call of another thread is inside PC/SC"
    for context in will.native:
        if not _given(context):
            return "another thread hands a context over"
        will.given.append(context)
    if broker is not None and (will.in_broker or will.shared):
        will.legacy = broker.bequeath(_numbers(will.in_broker), _numbers(will.shared))
    will.birth = _socket.socketpair()
    if not process.sentinel[0] or any(context.owner is not here for context in given):
        return "a signal handler has forked"
    descriptors.kept[ident] = {
        *(descriptor.number for descriptor in _connections(will.native) if descriptor is not None),
        *(will.legacy.descriptors() if will.legacy is not None else ()),
    }
    _wills[ident] = will
    will.is_made = True
    return None


def _given(context: Context) -> bool:
    """Keep the threads of this process out of a context; False if another one's fork has done so."""
    deadline = monotonic() + _GIVEN_WITHIN
    while not context.real.give():
        if monotonic() > deadline:
            return False
        sleep(_PAUSE)
    return context.owner is process.here


def _connections(contexts: list[Context]) -> list[Optional[descriptors.Descriptor]]:
    """Those to pcscd of contexts that this process reaches natively."""
    return [descriptor for context in contexts for descriptor in context.gateway.descriptors(context.real)]


def _numbers(contexts: list[Context]) -> list[int]:
    """The real handles of contexts and their cards."""
    records: list[handles.Record] = []
    for context in contexts:
        records += [context, *list(context.cards.values())]
    return [record.real for record in records]


def _in_parent() -> None:
    will = _wills.get(threading.get_ident())
    if will is None:
        return
    while True:
        try:
            _settle(will)
            _wills.pop(threading.get_ident(), None)
            break
        except BaseException as error:  # a signal handler's
            will.raised.append(error)
    for raised in will.raised[-1:]:
        gate.raise_later(threading.get_ident(), raised)


def _settle(will: _Will) -> None:
    """In the parent: give up what the child has now; or keep it, if there is no child.

    Again from the beginning, if a signal handler has raised in the middle.
    """
    descriptors.kept.pop(threading.get_ident(), None)
    if will.is_born is None:
        will.is_born = _was_born(will)
    birth, will.birth = will.birth, ()
    for end in birth:
        end.close()
    if will.is_born and (will.native or will.in_broker):
        gone = process.Epoch(process.here, process.HANDED_OVER)
        for context in [*will.native, *will.in_broker]:
            _take(context, gone)
        descriptors.kill(_connections(will.native))
        for block in will.blocks:
            block.happened()
        observer.record("handover", contexts=len(will.native) + len(will.in_broker))
    for context in will.given:
        if not will.is_born:
            context.real.take_back()
    if will.is_born and will.shared:
        observer.record("share", contexts=len(will.shared))
    if will.legacy is not None:
        will.legacy.settle(will.is_born)


def _was_born(will: _Will) -> bool:
    """Whether there is a child: it has said so, or has the pipe and will."""
    if not will.is_made:
        return False
    ours, *theirs = will.birth
    will.birth = (ours,)
    for end in theirs:
        end.close()
    # Not select.poll or os.read, which set errno to 0: until Python 3.10 it is read after this, where fork() failed.
    try:
        return bool(ours.recv(1, _socket.MSG_DONTWAIT | _socket.MSG_PEEK))
    except BlockingIOError:
        return True


def _take(context: Context, owner: process.Epoch) -> None:
    """Make a context somebody else's, and its cards: those that have the same owner, for others are an ancestor's."""
    before = context.owner
    for card in list(context.cards.values()):
        if card.owner is before:
            card.owner = owner
    context.owner = owner


def _in_hook() -> None:
    """In the child."""
    global _accepted
    will, wills = _wills.get(threading.get_ident()), list(_wills.values())
    _wills.clear()
    _accepted = None
    if will is not None and will.is_made:
        with contextlib.suppress(OSError):
            will.birth[1].send(b"\1")
    for each in wills:
        for end in each.birth:
            end.close()
    if will is None or not will.is_made:
        return
    if will.legacy is not None:
        will.legacy.arrive()
        with contextlib.suppress(OSError):  # from a child of this one, if it is forked before this one begins
            descriptors.guard(descriptors.of(will.legacy.number))
    if will.native or will.in_broker:
        for block in will.blocks:
            block.happened()
    _accepted = (os.getpid(), will)
    for how, given in (("handover", will.native), ("handover", will.in_broker), ("share", will.shared)):
        for context in given:
            observer.record("got", context=context.key, how=how)


def _begin(epoch: process.Epoch) -> None:
    """In the child: take possession."""
    global _accepted
    accepted, _accepted = _accepted, None
    _wills.clear()
    ident = threading.get_ident()
    for other in [thread for thread in _blocks if thread != ident]:
        del _blocks[other]
    if accepted is None or accepted[0] != epoch.pid:
        return
    will = accepted[1]
    broker = gateways.brokers.usable()
    for context in [*will.native, *will.in_broker, *will.shared]:
        if context in will.native:
            # A wait for events that began at the last moment is on this connection as well, and reads from it.
            is_there = epoch.unquiet is None and _are_intact(context)
            if is_there:
                context.real.take_over(epoch)
        else:
            is_there = broker is not None
            context.gateway = broker or context.gateway
        # What the application has closed since the fork is lost: the number may be something else's by now.
        _take(context, epoch if is_there else process.Epoch(epoch, process.LOST))
        if not is_there:
            observer.record("lost", context=context.key)
        for card in list(context.cards.values()):
            if context in will.shared:
                card.transactions = 0  # what is open is its parent's


process.before_fork(_before)
process.at_fork(in_child=_in_hook, at_begin=_begin)
