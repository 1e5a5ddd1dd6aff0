"""PC/SC in this process: the native gateway, and which connection of libpcsclite's is that of which context.

:mod:`_descriptors` has to know it: in a forked child a dead socket takes its place.
"""

import contextlib
import threading
from collections.abc import Mapping
from typing import Any, Callable, Optional

from . import _descriptors, _gate, _pcscd, _process
from ._calls import CALLS, Call, Keep
from ._descriptors import Descriptor
from ._pyscard import SUCCESS, raw

__all__ = ["SUCCESS", "exit_without_turns", "functions", "gateway", "raw", "release_dead"]


def _silenced(call: Call, native: Callable[..., Any]) -> Callable[..., Any]:
    """``native``, but a failed call answers nothing that pyscard did not get from PC/SC (hazard 11)."""

    def silenced(*arguments: Any) -> Any:
        result = native(*arguments)
        return result if result[0] == SUCCESS else call.failure(result[0])

    return silenced


functions: dict[str, Callable[..., Any]] = {
    name: _silenced(CALLS[name], native) if CALLS[name].discloses else native for name, native in raw.items()
}
"""The functions of the native gateway: those of pyscard, but for what a failed call discloses."""


_ATTEMPTS_TO_FIND_ONE = 20
_establishing = threading.RLock()


class _Native:
    """The gateway that is this process's own native library."""

    functions: Mapping[str, Callable[..., Any]] = functions

    def enter(self, function: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """``call(*arguments)``, inside the native library."""
        return _gate.enter(function, call, *arguments)

    def establish(self, scope: Any, keep: Keep) -> Any:
        """SCardEstablishContext; see :class:`_calls.Gateway`."""
        # libpcsclite serialises this call too; ours also covers the look at the descriptors, so that two don't mix.
        with _establishing:
            return _gate.enter("SCardEstablishContext", _establish, scope, keep)


gateway = _Native()


def _establish(scope: Any, keep: Keep) -> Any:
    owner = _process.current()
    before = _pcscd.open_numbers()
    result = functions["SCardEstablishContext"](scope)
    if result[0] == SUCCESS:
        connection = _new_connection(before)
        forked = _process.current() is not owner  # in a signal handler since, and this is the child
        if connection is not None:
            _descriptors.guard(connection)
            if forked:
                _descriptors.disarm()
                _descriptors.unguard(connection)
        result[1] = keep(result[1], connection, owner, gateway)
    return result


def _new_connection(before: set[str]) -> Optional[Descriptor]:
    """The connection to pcscd that was not there before."""
    found: list[tuple[bool, Descriptor]] = []
    for _ in range(_ATTEMPTS_TO_FIND_ONE):
        now = _pcscd.open_numbers()
        found = _pcscd.strangers(now - before) or _pcscd.strangers(
            now
        )  # the latter: the number was in use, and freed since
        # Another thread's SCardCancel has a connection of its own, for a moment.
        if sum(likely for likely, _ in found) == 1 or len(found) == 1:
            break
    return max(found)[1] if found else None


def release_dead(real: int, inherited: Optional[Descriptor]) -> bool:
    """Free what libpcsclite keeps for an inherited context, and its descriptor.

    Without this a chain of forks would gather one dead descriptor a generation.  libpcsclite closes the number it
    knows, so it may only be asked while the dead socket is there.

    :param real: the inherited native context.
    :param inherited: its connection, as the owner recorded it.
    :return: whether libpcsclite has forgotten the context and its cards.
    """
    if inherited is None or not _descriptors.is_dead(inherited.number):
        return False
    _gate.enter("SCardReleaseContext", functions["SCardReleaseContext"], real)
    return True


def exit_without_turns() -> None:
    """At interpreter exit: a thread that establishes may never run again."""
    global _establishing
    _establishing = contextlib.nullcontext()  # type: ignore[assignment]  # it is entered and left, no more


def _begin(epoch: _process.Epoch) -> None:
    global _establishing
    _establishing = threading.RLock()


_process.at_fork(at_begin=_begin)
