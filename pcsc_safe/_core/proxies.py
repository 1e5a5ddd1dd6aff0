"""The wrapt proxies that an application holds instead of integers.

They behave like the integer, except for ``repr()``, and record which process owns the handle.  wrapt takes longer to
import than pyscard, so this module is imported when the first context is established, which is before any child can
need it.  A fork changes nothing in a proxy.  pyscard refuses a proxy (TypeError, because it is no int), so a proxy that
reaches pyscard by mistake does no harm.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Callable

import wrapt

from . import handles, process

__all__ = ["SafeCard", "SafeContext"]

if TYPE_CHECKING:
    _IntegerProxy = wrapt.ObjectProxy[int]
else:
    _IntegerProxy = wrapt.ObjectProxy  # generic since wrapt 2.0


class _SafeHandle(_IntegerProxy):
    """An integer that has a record."""

    __slots__ = ("_self_record",)

    def __init__(self, record: handles.Record) -> None:
        super().__init__(record.number)
        self._self_record = record

    @property
    def owner_pid(self) -> int:
        """The PID of the process that owns it."""
        process.current()  # first: it may be what makes the handle this process's own
        return int(self._self_record.owner.pid)

    @property
    def established_at(self) -> str:
        """``file:line`` where its context was established."""
        return str(self._self_record.established_at)

    def __repr__(self) -> str:
        process.current()  # as in owner_pid
        record = self._self_record
        of = f"context={record.context.number} reader={record.reader!r} " if isinstance(record, handles.Card) else ""
        return f"<{record.kind.value} {record.number} {of}owner_pid={record.owner.pid} state={_state(record)!r}>"

    def __format__(self, specification: str) -> str:
        return format(self._self_record.number, specification)  # wrapt before 1.15 has none

    def __copy__(self) -> _SafeHandle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _SafeHandle:
        return self

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        record = self._self_record
        description = f"{record.kind.value} {record.number} of process {record.owner.pid}"
        return handles.load, (handles.family, record.kind, record.key, description)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.__reduce_ex__(2)


def _state(record: handles.Record) -> str:
    """The state of a handle in this process, in a word or two."""
    owner = record.owner
    if record.released:
        return "released"
    if owner is process.current():
        return "open"
    return _STATES.get(owner.noticed_by, "inherited")


_STATES = {
    process.LOST: "lost with its broker",
    process.SERVICE_LOST: "lost with pcscd",
    process.HANDED_OVER: "handed over",
}


class SafeContext(_SafeHandle):
    """A SCARDCONTEXT."""

    __slots__ = ()


class SafeCard(_SafeHandle):
    """A SCARDHANDLE."""

    __slots__ = ()


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    # wrapt's own would change the wrapped integer, and with it everybody's handle.
    return lambda self, other: operation(self.__wrapped__, other)


for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"):
    _operation = getattr(operator, f"__{_name}__")
    setattr(_SafeHandle, f"__i{_name}__", _in_place(_operation))
