"""``pcsc_safe.handover()``: give sessions to the child that is forked next.

Afterwards the parent is the process with the inherited objects.  :mod:`transfer` does the work at the fork; at that
moment nothing happens here.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Optional

from ..errors import HandoverError
from . import gate, gateways, handles, in_flight, inherited, log, one_step, process, sessions, transfer
from .calls import Kind
from .handles import Context
from .unpatched import get_ident

__all__ = ["files_to_preserve", "handover"]


class handover:  # noqa: N801  # used as a function is, as contextlib.suppress
    """Hand the sessions of this process over to the child that is forked in this block.

    The child continues the sessions, with verified PIN, transaction and exclusive hold.  For the parent they are then
    like inherited sessions: nothing that the parent does, not even its exit, affects the child's sessions.

    The next ``os.fork()`` of this thread hands over.  If the child is still in the block, its next fork hands over,
    too.  A block around a daemon's double fork therefore hands over to the daemon.

    Without arguments, sessions that this process has inherited are first connected again, as with
    ``cards="reconnect"``.  PC/SC calls of other threads block from the beginning of the block until the fork; those
    through a broker may return earlier.

    A block logs a warning if it is inside another block, or if it does nothing: if this process has no context, or if
    nothing was forked.

    :param contexts: the contexts to hand over, as SCardEstablishContext returned them; if none are given, all contexts
        of this process.
    :raises HandoverError: on entry, before a fork: a handover is not possible on this platform, or with these contexts,
        or PC/SC calls of other threads take longer than ``quiesce_timeout``.  On exit: the fork handed nothing over,
        and the parent still owns its sessions.
    """

    def __init__(self, *contexts: Any) -> None:
        self._chosen = [_owned(context) for context in contexts] or None
        self._epoch: Optional[process.Epoch] = None
        self._done = False
        self._thread = 0
        self.failure: Optional[tuple[str, str]] = None
        self._depths: list[int] = []  # the number of blocks around it; several, because a block can be inside itself

    def __enter__(self) -> handover:
        self._epoch = here = process.current()
        self._done, self.failure = False, None
        transfer.register_hooks()
        if get_ident() in transfer.blocks:
            log.warning(
                "nested-handover",
                "process %(pid)d has a handover() block inside another one, and a fork there hands over the contexts "
                "of both: pass all contexts to one block",
            )
        if self._chosen is None:
            for context in list(handles.contexts.values()):
                if context.owner is not here:
                    inherited.adopt(context)
        if not self.contexts():
            _warn("it has no PC/SC context at the beginning of its handover() block; establish one before the block")
        for context in self.contexts():
            obstacle = transfer.obstacle(context)
            if obstacle:
                raise _error(*obstacle)
        ident = self._thread = get_ident()
        self._depths.append(len(transfer.blocks.get(ident, ())))
        try:
            if not gate.close_if_quiet():
                raise _error(
                    "other threads are inside PC/SC calls",
                    "end these calls first, or configure a longer quiesce_timeout",
                )
            transfer.blocks[ident] = (*transfer.blocks.get(ident, ()), self)
        except BaseException:  # a signal handler's too
            try:
                self._leave()
            finally:
                self._depths.pop()
            raise
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        try:  # first: no signal handler may come before it
            self._leave()
        except BaseException:  # a signal handler's
            self._leave()
            raise
        finally:
            self._depths.pop()
        if kind is not None or self._done:
            return
        if self.failure is not None:
            raise _error(*self.failure)
        here = process.current()
        if not self._owned_by(self._epoch):
            return
        if here is self._epoch:
            _warn("this thread has not called os.fork() in its handover() block")
        elif here.noticed_by == "hook":
            raise _error("a signal handler raised an exception during the fork", transfer.FORK_AGAIN)
        else:
            raise _error(
                "the fork in this block ran none of Python's at-fork hooks",
                "use os.fork(); the parent is still the owner",
            )

    def _leave(self) -> None:
        """Leave the block, and open the gate with the last one; a second time changes nothing."""
        ident = self._thread
        outer = transfer.blocks.get(ident, ())[: self._depths[-1]]
        if outer:
            transfer.blocks[ident] = outer
        else:
            one_step.in_one_step((transfer.blocks.pop, ident, None), (in_flight.closers.pop, ident, None))

    def contexts(self) -> list[Context]:
        """The contexts to hand over that this process owns."""
        return self._owned_by(process.here)

    def _owned_by(self, owner: Optional[process.Epoch]) -> list[Context]:
        chosen = self._chosen if self._chosen is not None else list(handles.contexts.values())
        return [context for context in chosen if context.owner is owner and not context.released]

    def note_handover(self) -> None:
        """Note that a fork has handed over."""
        self._done = True


def files_to_preserve() -> list[int]:
    """The file descriptors that the sessions of this process need.

    A program that closes all file descriptors, as daemons do, must keep these open.  For python-daemon:
    ``DaemonContext(files_preserve=pcsc_safe.files_to_preserve())``.  The numbers stay the same when sessions are handed
    over or shared.

    :return: their numbers, in ascending order; an empty list if this process has no context, not even an inherited one,
        and no broker.
    """
    here = process.current()  # first: it may be what makes contexts this process's own
    owned = [context for context in list(handles.contexts.values()) if context.owner is here]
    found = [descriptor for context in owned for descriptor in context.gateway.descriptors(context.real)]
    numbers = {descriptor.number for descriptor in found if descriptor is not None and descriptor.is_intact()}
    numbers.update(number for number in (sessions.descriptor(),) if number is not None and handles.contexts)
    return sorted(numbers | set(gateways.brokers.files_to_preserve()))


def _owned(handle: Any) -> Context:
    record, here = handles.find(Kind.CONTEXT, handle), process.current()
    if not isinstance(record, Context) or record.released or record.owner is not here:
        raise HandoverError(
            f"process {os.getpid()} doesn't own this context: it is released, inherited, or not a context",
            remedy="pass contexts that SCardEstablishContext returned in this process, or no argument, which hands "
            "over all contexts",
            pid=os.getpid(),
        )
    return record


def _warn(why: str) -> None:
    log.warning("no-handover", "process %(pid)d hands nothing over: %(why)s", why=why)


def _error(problem: str, remedy: str) -> HandoverError:
    return HandoverError(f"nothing is handed over: {problem}", remedy=remedy, pid=os.getpid())
