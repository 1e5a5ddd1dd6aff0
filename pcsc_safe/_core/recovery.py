"""Detects that pcscd has ended, and continues waits for events when it is back (setting ``recover``).

For a context the end of pcscd is like a fork: the context belongs to a pcscd that no longer exists, and
:mod:`inherited` decides what its next use gets.

The code that libpcsclite returns (1.9.9 to 2.5.3) says whether pcscd has received a call:

- SCARD_E_NO_SERVICE: libpcsclite could not send it.  pcscd itself never returns this code.
- SCARD_W_SECURITY_VIOLATION: pcscd ended before it had read the whole call, and the kernel reset the connection.  pcscd
  itself returns this code only from SCardConnect, if polkit forbids the card.
- SCARD_F_COMM_ERROR: no response arrived; the call may have been executed.  The next call returns SCARD_E_NO_SERVICE.

A call with the first or the second code was not executed, and can be repeated.  A call with the third can be repeated
if it changes nothing.  Codes from re-establishing a context or a connection go to the application as they are.
SCardIsValidContext, SCardListReaderGroups and SCardCancel detect nothing.

At a fork: a child counts its own attempts.  It inherits what its parent has lost like anything else.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Optional

from ..policy import Role
from . import handles, log, process
from .calls import CALLS, Call
from .handles import Context, Record
from .library import SUCCESS, constant
from .reader_states import CANCELLED, CHANGED, INFINITE, TIMED_OUT, is_for_new_readers
from .settings import settings
from .unpatched import get_ident

__all__ = [
    "NO_SERVICE",
    "REPEATABLE_CODES",
    "SERVICE_LOST_CODES",
    "cancel",
    "continue_wait",
    "note_loss",
    "recovers",
    "repeat",
    "warn_of_no_service",
    "was_lost_since",
    "was_replaced",
]

NO_SERVICE: int = constant("SCARD_E_NO_SERVICE")
_RESET: int = constant("SCARD_W_SECURITY_VIOLATION")
_COMM_ERROR: int = constant("SCARD_F_COMM_ERROR")
_INVALID_HANDLE: int = constant("SCARD_E_INVALID_HANDLE")
SERVICE_LOST_CODES = (NO_SERVICE, _RESET, _COMM_ERROR)
"""What a call returns that pcscd has not received or not completed."""


def _repeatable_after(call: Call) -> tuple[int, ...]:
    if call.name == "SCardReleaseContext":
        return ()  # libpcsclite has dropped its context anyway
    if call.name == "SCardGetStatusChange":
        return ()  # only continue_wait() continues waits
    if call.name == "SCardConnect":
        return (NO_SERVICE,)
    return SERVICE_LOST_CODES if call.role is Role.CLEANUP or call.name == "SCardListReaders" else (NO_SERVICE, _RESET)


REPEATABLE_CODES = {name: _repeatable_after(call) for name, call in CALLS.items()}
"""The codes after which a call can be repeated, by PC/SC's name."""

_ATTEMPTS = 3
_POLL = 0.05  # s; for pcscd to be back
_CANCEL_TIMEOUT = 1.0  # s

_attempts: dict[int, int] = {}  # to make one call, by thread


_warned_epoch: Optional[process.Epoch] = None


def warn_of_no_service(function: str) -> None:
    """Log once per process that a function found no pcscd, with the command that examines the machine."""
    global _warned_epoch
    if _warned_epoch is not process.current():
        _warned_epoch = process.current()
        log.warning(
            "no-service",
            "%(function)s returns SCARD_E_NO_SERVICE to process %(pid)d, because pcscd doesn't run, was restarted, or "
            "refuses this process: run 'python -m pcsc_safe doctor' to see which, and what to do",
            function=function,
        )


def recovers(record: Record) -> bool:
    """Whether a context or card that was lost with pcscd should be re-established."""
    return record.context.settings(settings()).recover


def note_loss(record: Record, real: int, hresult: int) -> bool:
    """Note that pcscd has ended, if ``recover`` is set.

    :param record: of a call that can be repeated.
    :param real: its real handle in that call; another thread may have replaced it since.
    :param hresult: what the call returned, one of :data:`REPEATABLE_CODES`.
    :return: whether to repeat the call, by :func:`repeat`.
    """
    if not recovers(record):
        return False
    if hresult != _COMM_ERROR:
        handles.mark_lost(record, real, process.SERVICE_LOST)
    return True


def was_lost_since(record: Record, real: int) -> bool:
    """Whether, since a call was made, another thread has detected that the call's object is lost.

    :param real: the real handle in that call.
    """
    return was_replaced(record, real) and recovers(record)


def was_replaced(record: Record, real: int) -> bool:
    """Whether something else is behind a handle since a call was made, or belongs to another process.

    :param real: the handle in that call.
    """
    return not record.released and not (record.real == real and record.owner is process.current())


def repeat(call: Call, attempt: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
    """Repeat a call that pcscd has not received.

    :param attempt: makes the call; if it fails in the same way, it calls this function again.
    """
    ident = get_ident()
    attempts = _attempts.get(ident, 0)
    if attempts >= _ATTEMPTS:  # contexts can be established, but not used
        return call.failure(NO_SERVICE, arguments)
    try:
        _attempts[ident] = attempts + 1
        return attempt()
    finally:
        if attempts:
            _attempts[ident] = attempts
        else:
            _attempts.pop(ident, None)


def continue_wait(
    call: Call,
    wait: Callable[[Any, int, Any], Any],
    list_readers: Callable[[Any, Any], Any],
    context: Context,
    timeout: int,
    states: Any,
    began: float,
    cancels: int,
) -> Any:
    """Continue a wait for events over an end of pcscd, until pcscd is back and has an event.

    :param call: SCardGetStatusChange.
    :param wait: makes the call while pcscd runs.
    :param list_readers: SCardListReaders, which detects a loss, and re-establishes the context.
    :param context: the context of the wait.
    :param timeout: of the whole wait, in ms; 0 if the call doesn't wait, but asks for the states.
    :param began: when the wait began, by ``time.monotonic()``.
    :param cancels: how often waits on the context had been cancelled by then.
    :return: the result.
    """
    safe, here = context.safe, process.current()

    def remaining() -> int:
        return INFINITE if timeout == INFINITE else max(0, timeout - round((time.monotonic() - began) * 1000))

    refusals, key = 0, object()
    try:
        context.continued_waits[key] = get_ident()
        while not context.released and here is process.current():
            hresult = list_readers(safe, [])[0]
            refusals = refusals + 1 if hresult == _RESET else 0
            # After so many refusals it is polkit that forbids it, and not a missing pcscd.
            is_back = hresult not in SERVICE_LOST_CODES or refusals == _ATTEMPTS
            if context.cancels != cancels:
                return call.failure(CANCELLED, (timeout, states))
            if is_back:
                result = wait(safe, 0, states)
                if result[0] == TIMED_OUT and remaining():
                    # Whether they are the same readers is not known.
                    result = _with_new_readers(result[1]) or wait(safe, remaining(), states)
                is_replaced = result[0] == CANCELLED and context.cancels == cancels  # as in the router
                if not is_replaced and (result[0] not in SERVICE_LOST_CODES or refusals):
                    return result
            elif not remaining():
                return call.failure(TIMED_OUT if timeout else hresult, (timeout, states))
            time.sleep(_POLL)
        return wait(safe, remaining() or 1, states)  # the context was released, or this is a child
    finally:
        context.continued_waits.pop(key, None)


def _with_new_readers(states: list[Any]) -> Any:
    """The result that says that the list of readers has changed; None if the call did not ask for that."""
    if not any(is_for_new_readers(name) for name, *_ in states):
        return None
    return [
        SUCCESS,
        [(name, state | CHANGED if is_for_new_readers(name) else state, atr) for name, state, atr in states],
    ]


def cancel(context: Context, cancel_once: Callable[[], Any]) -> Any:
    """SCardCancel on a context that may have a wait between two runs of pcscd.

    :param cancel_once: cancels the waits that are in pcscd now.
    """
    context.cancels += 1
    ident = get_ident()
    waits = [key for key, thread in list(context.continued_waits.items()) if thread != ident]
    result = cancel_once()
    if result == _INVALID_HANDLE and not context.released and recovers(context):
        result = SUCCESS  # the code of another pcscd than the context's; the waits check the count of cancels
    # Again, because a wait that is about to enter PC/SC can't be cancelled yet.  With a time limit, because if this is
    # a signal handler, the wait may need the code that this handler has interrupted.
    deadline = time.monotonic() + _CANCEL_TIMEOUT
    while any(key in context.continued_waits for key in waits) and time.monotonic() < deadline:
        time.sleep(_POLL / 10)
        cancel_once()
    return result


process.clear_at_begin(_attempts)
