"""``pcsc_safe.handover()``: give sessions to the child that is forked next.

Afterwards the parent is the process with the inherited objects.  :mod:`transfer` does the work at the fork; at that
moment nothing happens here.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Any, Optional

from ..errors import HandoverError
from . import gate, gateways, handles, inherited, process, sessions, transfer
from .calls import Kind
from .handles import Context

__all__ = ["files_to_preserve", "handover"]


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
        transfer.begin()
        if self._chosen is None:
            for context in list(handles.contexts.values()):
                if context.owner is not here:
                    inherited.adopt(context)
        for context in self.contexts():
            why_not = transfer.obstacle(context)
            if why_not:
                raise _error(*why_not)
        ident = threading.get_ident()
        try:
            if not gate.close_quietly():
                raise _error(
                    "calls of other threads are inside PC/SC",
                    "end them first, or configure a longer quiesce_timeout",
                )
            transfer.blocks[ident] = (*transfer.blocks.get(ident, ()), self)
        except BaseException:  # a signal handler's too
            if ident not in transfer.blocks:
                gate.open_again()
            raise
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        ident = threading.get_ident()
        outer = transfer.blocks.pop(ident, ())[:-1]
        if outer:
            transfer.blocks[ident] = outer
        else:
            gate.open_again()
        if kind is not None or self._done:
            return
        if self.failure is not None:
            raise _error(*self.failure)
        here = process.current()
        if here is not self._epoch and self._owned_by(self._epoch):
            if here.noticed_by == "hook":
                raise _error("a signal handler raised during the fork", transfer.AGAIN)
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
    numbers.update(number for number in (sessions.descriptor(),) if number is not None and own)
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


def _error(problem: str, remedy: str) -> HandoverError:
    return HandoverError(f"nothing is handed over: {problem}", remedy=remedy, pid=os.getpid())
