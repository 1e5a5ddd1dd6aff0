"""SCardConnect on one of the native contexts behind a PC/SC context.

The step of C that connects to the card also enters the connection in the list of its native context, and the call in
:data:`in_flight.calls_without_place`: for a fork, the call lasts until the card is recorded.  A signal handler can
interrupt what follows; the connection is then ended, because the application doesn't get it.

At a fork nothing changes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

from .._core import in_flight, process
from .._core.calls import STALE
from .._core.in_flight import GIVEN, RELEASED, WOKEN, attempt
from .._core.library import SUCCESS, constant
from .._core.one_step import Operation
from .._core.unpatched import get_ident, monotonic
from .contexts import NativeContexts
from .native_context import NativeContext, wait_while_given
from .pyscard import raw
from .releasing import awaiting_release, release_waiting

__all__ = ["connect"]

_LEAVE_CARD: int = constant("SCARD_LEAVE_CARD")
_Keep = Callable[[int, NativeContext, int], Any]


def connect(contexts: NativeContexts, owned: Any, arguments: Sequence[Any], keep: _Keep) -> Any:
    """SCardConnect, on a native context without a card.

    :param owned: the PC/SC context.
    :param arguments: reader, share mode, protocols.
    :param keep: records a new card; called with its native handle, its native context, and its protocol.
    :return: pyscard's result, with what ``keep`` returned instead of the card; or :data:`STALE`.
    """
    native, connected, chosen = raw["SCardConnect"], list[Any](), list[NativeContext]()
    operands = [(argument,) for argument in arguments]
    recording, inside = object(), in_flight.calls_without_place
    entry = ("SCardConnect", get_ident(), monotonic(), None)

    def call(context: NativeContext, is_bare: bool) -> tuple[Operation, ...]:
        chosen[:] = [context]
        # Counts as a card from now on, so that a thread that needs a context without a card doesn't use this one.
        count = (context.cards.append, connected)
        record = (inside.__setitem__, recording, entry)
        return (connected.extend, map(native, (context.handle,), *operands)), count, record

    try:
        result = contexts.use(owned, "SCardConnect", tuple(arguments), call, without_cards=True)
        if result is not STALE and connected:
            result = _keep(contexts, owned, connected[0], chosen[0], keep)
        _finish(contexts, owned, connected, chosen, keeps=result is not STALE)
        inside.pop(recording, None)
        if awaiting_release:
            release_waiting()
        return result  # after the last call, which a signal handler could interrupt: the card is kept, or it is ended
    except BaseException:
        try:
            _finish(contexts, owned, connected, chosen, keeps=False)
        finally:
            inside.pop(recording, None)
        raise


def _keep(contexts: NativeContexts, owned: Any, connected: Sequence[int], context: NativeContext, keep: _Keep) -> Any:
    hresult, handle, protocol = connected
    if hresult != SUCCESS:
        return [hresult, 0, 0]
    if contexts.is_outdated(owned):
        return STALE
    context.cards.append(handle)
    return [hresult, keep(handle, context, protocol), protocol]


def _finish(
    contexts: NativeContexts, owned: Any, connected: list[Any], chosen: list[NativeContext], *, keeps: bool
) -> None:
    """The end of SCardConnect; it can be called again if a signal handler has interrupted it.

    :param keeps: whether a new card stays connected.
    """
    for context in chosen:
        if not keeps and connected and connected[0][0] == SUCCESS:
            handle = connected[0][1]
            _disconnect(owned, context, handle)
            context.forget_card(handle)
        context.forget_card(connected)
        if not context.cards:
            contexts.release_idle()


def _disconnect(owned: Any, context: NativeContext, handle: int) -> None:
    """Disconnect a card that is not recorded, unless its native context is released or belongs to another process."""
    call = (raw["SCardDisconnect"], handle, _LEAVE_CARD)
    while not attempt(context, context, "SCardDisconnect", call, in_turn=True):
        if not context.is_ours() or owned.owner is not process.current() or context.state in (WOKEN, RELEASED):
            break
        if context.state == GIVEN:
            wait_while_given(owned)
