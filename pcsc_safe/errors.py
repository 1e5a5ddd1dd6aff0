"""Every exception of pcsc_safe.

The text of an error says which object is in which state, and what to do.  The same facts are attributes, for programs.
All errors survive pickling, so a worker's error reaches its parent complete.

A fork changes nothing here.
"""

from __future__ import annotations

import sys
from typing import Any, Optional

__all__ = [
    "BrokerError",
    "ForkUnsafeError",
    "ForkedHandleError",
    "HandoverError",
    "PcscSafeError",
    "ReconnectError",
    "SettingsError",
]


class PcscSafeError(Exception):
    """The base of all errors of pcsc_safe.

    Its text is ``FUNCTION: PROBLEM; REMEDY``.  These parts and the facts are attributes, which pickling keeps.  An
    attribute that doesn't apply is None, or ``""`` for ``remedy``.

    :param problem: which object is in which state.
    :param remedy: what to do about it.
    :param function: the PC/SC function that was called.
    :param owner_pid: the PID of the process that owns the context or card.
    :param pid: the PID of the process in which the call was made.
    :param established_at: ``file:line`` where the context was established.
    """

    def __init__(
        self,
        problem: str,
        *,
        remedy: str = "",
        function: Optional[str] = None,
        owner_pid: Optional[int] = None,
        pid: Optional[int] = None,
        established_at: Optional[str] = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy
        self.function = function
        self.owner_pid = owner_pid
        self.pid = pid
        self.established_at = established_at

    def __str__(self) -> str:
        text = f"{self.function}: {self.problem}" if self.function else self.problem
        return f"{text.rstrip('.')}; {self.remedy}" if self.remedy else text  # PC/SC's texts are sentences

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (type(self), self.problem, dict(vars(self)))


def _load(kind: type[PcscSafeError], problem: str, fields: dict[str, Any]) -> PcscSafeError:
    join_pyscard()
    error = kind.__new__(kind, problem)
    error.args = (problem,)
    vars(error).update(fields)
    return error


class SettingsError(PcscSafeError, ValueError):
    """A setting can't have this value; the text says which values it can have.  It is also a ValueError."""


class ForkUnsafeError(PcscSafeError):
    """A forked process can use PC/SC only through a broker, and policy ``reestablish`` excludes a broker."""


class BrokerError(PcscSafeError):
    """The broker, the helper process that makes PC/SC calls for this one, can't be started or used."""


class HandoverError(PcscSafeError):
    """Sessions can't be handed over to a forked child, or a fork did not hand them over."""


class _CodedError(PcscSafeError):
    """An error that is also a ``smartcard.Exceptions.SmartcardException``, so that code written for pyscard catches it.

    :param hresult: the PC/SC code of this state.
    """

    def __init__(self, problem: str, *, hresult: int = -1, **fields: Any) -> None:
        PcscSafeError.__init__(self, problem, **fields)
        self.hresult = int(hresult)


class ForkedHandleError(_CodedError):
    """An inherited context or card was used under policy ``raise``, or under ``share`` without a shared session.

    A session that this process has handed over counts as inherited.

    It is also a ``smartcard.Exceptions.SmartcardException``, so code written for pyscard catches it.

    :param hresult: the PC/SC code of this state, SCARD_E_INVALID_HANDLE.
    """


class ReconnectError(_CodedError):
    """:func:`pcsc_safe.reconnecting` could not connect to the card again.

    It is also a ``smartcard.Exceptions.SmartcardException``, so code written for pyscard catches it.

    :param hresult: the PC/SC code that SCardReconnect returned, or a code that says why it was not called.
    """


def join_pyscard() -> None:
    """Make the errors with an ``hresult`` subclasses of SmartcardException, if pyscard has been imported.

    This function doesn't import pyscard, because that would load the native library.  A program that has not imported
    pyscard can't catch its exceptions.
    """
    pyscard = sys.modules.get("smartcard.Exceptions")
    base = getattr(pyscard, "SmartcardException", None)
    if base is not None and not issubclass(_CodedError, base):
        _CodedError.__bases__ = (PcscSafeError, base)
