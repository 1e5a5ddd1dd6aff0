"""PC/SC in this process: the native gateway.

At a fork nothing changes here; see :mod:`contexts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional

from .._core import connections, gate, process
from .._core.calls import CALLS, STALE, Call, FollowUp, Keep, Kind
from .._core.descriptors import Descriptor
from .._core.library import SUCCESS
from . import connecting, pyscard, waits
from .card_calls import card_call
from .contexts import NativeContexts, native_contexts_of
from .pyscard import raw

__all__ = ["gateway"]


def _without_disclosure(call: Call, native: Callable[..., Any]) -> Callable[..., Any]:
    """``native``, but a failed call returns only what pyscard got from PC/SC (hazard 11)."""

    def checked(*arguments: Any) -> Any:
        result = native(*arguments)
        return result if result[0] == SUCCESS else call.failure(result[0])

    return checked


_functions: dict[str, Callable[..., Any]] = {
    name: _without_disclosure(CALLS[name], native) if CALLS[name].discloses else native for name, native in raw.items()
}
"""The functions of the native gateway: those of pyscard, except that a failed call discloses no memory."""


class _NewContext:
    """A PC/SC context that is being established."""

    def __init__(self, contexts: NativeContexts, here: process.Epoch) -> None:
        self.owner = here
        self.real = contexts
        self.released = False


def _check_reader_count(contexts: NativeContexts, new_context: _NewContext, outgrown: int) -> int:
    result = contexts.call(new_context, "SCardListReaders", [])
    return outgrown if result is not STALE and result[0] == outgrown else SUCCESS


def _context_call(name: str) -> Callable[[Any, tuple[Any, ...]], Any]:
    return lambda context, arguments: native_contexts_of(context).call(context, name, *arguments)


def _release(context: Any, arguments: tuple[Any, ...]) -> Any:
    real = context.real
    return real.release(context, context.forget) if isinstance(real, NativeContexts) else STALE


def _cancel(context: Any, arguments: tuple[Any, ...]) -> Any:
    return native_contexts_of(context).cancel(context)


class _Native:
    """The gateway to the native library in this process."""

    functions: Mapping[str, Callable[..., Any]] = _functions

    def is_loaded(self) -> bool:
        """Whether the native library is loaded in this process."""
        return pyscard.is_loaded()

    def prepare(self) -> None:
        """Import what it requires, so that a child need not import anything."""
        connections.prepare()

    def caller(self, call: Call, follow_up: Optional[FollowUp] = None) -> Callable[[Any, tuple[Any, ...]], Any]:
        """The function that makes a call on a record; see :class:`pcsc_safe._core.gateways.NativeGateway`."""
        if call.takes is Kind.CARD:
            return card_call(call.name, follow_up)
        special = {"SCardReleaseContext": _release, "SCardCancel": _cancel}
        return special.get(call.name) or _context_call(call.name)

    def await_change(
        self, context: Any, is_owned: Callable[[], bool], timeout: int, states: Any, cancelled: Any
    ) -> Any:
        """SCardGetStatusChange; see :func:`waits.await_change`."""
        return waits.await_change(context, is_owned, timeout, states, cancelled)

    def enter(self, function: str, *arguments: Any) -> Any:
        """Make a call of the native library; see :class:`calls.Gateway`."""
        return gate.call_inside(function, self.functions[function], *arguments)

    def establish(self, scope: Any, keep: Keep, here: process.Epoch, outgrown: Optional[int] = None) -> Any:
        """SCardEstablishContext; see :class:`calls.Gateway`."""
        contexts = NativeContexts(scope, here)
        new_context = _NewContext(contexts, here)
        try:
            hresult = contexts.establish(new_context)
            if hresult == SUCCESS and outgrown is not None:
                hresult = _check_reader_count(contexts, new_context, outgrown)
            if hresult != SUCCESS:
                return [hresult, 0]
            kept = keep(contexts, next(iter(contexts.natives)).handle, new_context.owner, self)
            new_context.released = True  # from now on it is kept
            return [hresult, kept]
        finally:
            if not new_context.released:
                contexts.release(new_context, lambda: setattr(new_context, "released", True))

    def abandon(self, real: Any) -> None:
        """Note that something has replaced ``real`` in a PC/SC context, perhaps while threads were using it.

        :param real: native contexts; or a handle of a broker, for which nothing needs to be done.
        """
        if isinstance(real, NativeContexts):
            real.abandon()

    def connect(self, context: Any, arguments: Sequence[Any], keep: Callable[..., Any]) -> Any:
        """SCardConnect; see :class:`calls.Gateway`."""
        return connecting.connect(native_contexts_of(context), context, arguments, keep)

    def descriptors(self, real: Any) -> Sequence[Optional[Descriptor]]:
        """The connections of its native contexts; see :class:`calls.Gateway`."""
        contexts: NativeContexts = real
        return contexts.descriptors()


gateway = _Native()
