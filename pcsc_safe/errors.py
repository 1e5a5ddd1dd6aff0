"""Every exception of pcsc_safe.

The text of an error says object, state and remedy.  The same facts are fields, so that a program can act on them.  All
errors survive pickling: a worker's error reaches its parent complete.

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
    "SettingsError",
]


class PcscSafeError(Exception):
    """The base of every error that pcsc_safe raises itself.

    :param problem: which object is in which state.
    :param remedy: what to do about it.
    :param function: the PC/SC function that was called.
    :param owner_pid: the process that owns the context or card.
    :param pid: the process in which the call was made.
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
        return f"{text}; {self.remedy}" if self.remedy else text

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (type(self), self.problem, dict(vars(self)))


def _load(kind: type[PcscSafeError], problem: str, fields: dict[str, Any]) -> PcscSafeError:
    join_pyscard()
    error = kind.__new__(kind, problem)
    error.args = (problem,)
    vars(error).update(fields)
    return error


class SettingsError(PcscSafeError, ValueError):
    """A setting has a value that makes no sense; the text lists those that do."""


class ForkUnsafeError(PcscSafeError):
    """PC/SC cannot be used in this forked process at all, not even with a context of its own."""


class BrokerError(PcscSafeError):
    """The helper process that is to do PC/SC for this one can't be started, or can't be understood."""


class HandoverError(PcscSafeError):
    """A session can't be handed over to a forked child, or was not."""


class ForkedHandleError(PcscSafeError):
    """An inherited context or card was used under policy ``raise``.

    Also a ``smartcard.Exceptions.SmartcardException``, so that code written for pyscard catches it.

    :param hresult: the PC/SC code of this state, SCARD_E_INVALID_HANDLE.
    """

    def __init__(self, problem: str, *, hresult: int = -1, **fields: Any) -> None:
        PcscSafeError.__init__(self, problem, **fields)
        self.hresult = int(hresult)


def join_pyscard() -> None:
    """Make ForkedHandleError a SmartcardException, once pyscard has been imported.

    Not before: to import pyscard is to load the native library.  Who has not imported it can't be catching its errors.
    """
    pyscard = sys.modules.get("smartcard.Exceptions")
    base = getattr(pyscard, "SmartcardException", None)
    if base is not None and not issubclass(ForkedHandleError, base):
        ForkedHandleError.__bases__ = (PcscSafeError, base)
