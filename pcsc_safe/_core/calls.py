"""The table of PC/SC functions, and the Protocol of a gateway.

A new SCard function needs a row in this table.  At a fork nothing changes here, and nothing here can block.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol

from ..policy import Role
from .descriptors import Descriptor
from .process import Epoch

__all__ = [
    "CALLS",
    "KEEP_FILES",
    "LOST_REASON",
    "NO_HANDLE",
    "STALE",
    "TRANSACTIONS_BEGUN",
    "ByDefault",
    "Call",
    "FollowUp",
    "Gateway",
    "Keep",
    "KeepCard",
    "Kind",
    "LostError",
]

TRANSACTIONS_BEGUN = {"SCardBeginTransaction": 1, "SCardEndTransaction": -1}
"""By how many a successful call changes the number of the card's open transactions."""

FollowUp = Callable[[Any, "tuple[Any, ...]", Any], Any]
"""What follows a call, and updates the record; takes the record, the arguments after the handle, and the result."""


class Kind(enum.Enum):
    """What a handle stands for."""

    CONTEXT = "SCARDCONTEXT"
    CARD = "SCARDHANDLE"


class Call:
    """One PC/SC function.

    :ivar name: as PC/SC spells it.
    :ivar takes: what its first argument is a handle of; None if it is not a handle.
    :ivar failed: what a failed call returns beside the code; None if it returns the code alone.
    :ivar role: what the function means in a process that inherited the handle.
    :ivar discloses: whether a failed call of pyscard can return uninitialised memory (hazard 11 of the demo).
    """

    def __init__(
        self,
        name: str,
        takes: Optional[Kind],
        failed: Optional[tuple[Any, ...]] = None,
        role: Role = Role.USE,
        discloses: bool = False,
    ) -> None:
        self.name = name
        self.takes = takes
        self.failed = failed
        self.role = role
        self.discloses = discloses

    def failure(self, hresult: int, arguments: Sequence[Any] = ()) -> Any:
        """What a call that failed with ``hresult`` returns, in the same form as pyscard.

        :param hresult: the PC/SC code.
        :param arguments: those after the handle; SCardGetStatusChange returns the states that it was given.
        """
        if self.failed is None:
            return hresult
        if self.name == "SCardGetStatusChange":
            return [hresult, _unchanged(arguments[-1])]
        return [hresult, *(list(value) if isinstance(value, list) else value for value in self.failed)]


def _unchanged(states: Any) -> list[tuple[Any, ...]]:
    """The states that were passed in, as pyscard returns them: no event, and the same ATR."""
    if not isinstance(states, list):
        return []
    return [(state[0], 0, list(state[2]) if len(state) > 2 else []) for state in states if isinstance(state, tuple)]


def _context(
    name: str, failed: Optional[tuple[Any, ...]] = None, role: Role = Role.USE, discloses: bool = False
) -> Call:
    return Call(name, Kind.CONTEXT, failed, role, discloses)


def _card(name: str, failed: Optional[tuple[Any, ...]] = None, role: Role = Role.USE, discloses: bool = False) -> Call:
    return Call(name, Kind.CARD, failed, role, discloses)


CALLS: dict[str, Call] = {
    call.name: call
    for call in (
        Call("SCardEstablishContext", None, (0,)),
        Call("SCardGetErrorMessage", None),
        Call("SCARD_CTL_CODE", None),
        _context("SCardIsValidContext", role=Role.VALIDITY),
        _context("SCardReleaseContext", role=Role.CLEANUP),
        _context("SCardCancel", role=Role.CANCEL),
        _context("SCardListReaders", ([],)),
        _context("SCardListReaderGroups", ([],)),
        _context("SCardGetStatusChange", ([],)),
        _context("SCardConnect", (0, 0), discloses=True),
        _context("SCardAddReaderToGroup"),
        _context("SCardForgetReader"),
        _context("SCardForgetReaderGroup"),
        _context("SCardIntroduceReader"),
        _context("SCardIntroduceReaderGroup"),
        _context("SCardRemoveReaderFromGroup"),
        _card("SCardReconnect", (0,), Role.RECONNECT, discloses=True),
        _card("SCardDisconnect", role=Role.CLEANUP),
        _card("SCardBeginTransaction"),
        _card("SCardEndTransaction", role=Role.CLEANUP),
        _card("SCardStatus", ("", 0, 0, []), discloses=True),
        _card("SCardTransmit", ([],), discloses=True),
        _card("SCardControl", ([],), discloses=True),
        _card("SCardGetAttrib", ([],), discloses=True),
        _card("SCardSetAttrib"),
    )
}


class ByDefault(int):
    """What a call does to a card (SCARD_*_CARD) if the application has not specified it."""


if TYPE_CHECKING:  # as in in_flight

    class Keep(Protocol):
        """Records a new context before another thread can fork; a child would keep using one that is not recorded."""

        def __call__(self, real: Any, number: int, owner: Epoch, gateway: Gateway, /) -> Any:
            """Record it.

            :param real: the context, as the gateway knows it.
            :param number: the integer that the application sees.
            :param owner: the epoch in which it was established.
            :param gateway: through which it was established.
            """

    class KeepCard(Protocol):
        """Records a new connection to a card."""

        def __call__(self, real: int, native: Any, protocol: int, /) -> Any:
            """Record it.

            :param real: the card, as the gateway knows it.
            :param native: the native context that it belongs to, if any.
            :param protocol: SCARD_PROTOCOL_*.
            """

    class Gateway(Protocol):
        """A way to reach PC/SC.

        :ivar functions: by PC/SC's name; they take real handles and return what pyscard's functions return.  Those of
            another gateway than the native one also take ``made``, a list that gets the result as soon as the call
            stands; so the caller has it even if a signal handler raises then.
        """

        @property
        def functions(self) -> Mapping[str, Callable[..., Any]]: ...

        def enter(self, function: str, *arguments: Any) -> Any:
            """Call one of :attr:`functions`; a fork waits for it if it is inside the native library."""

        def establish(self, scope: Any, keep: Keep, here: Epoch, outgrown: Optional[int] = None) -> Any:
            """SCardEstablishContext.

            :param scope: SCARD_SCOPE_*.
            :param here: the process for which this gateway was chosen.  A child that a signal handler forks during the
                call, and that continues, doesn't use the native library.  It gets a code that isn't SCARD_S_SUCCESS,
                and chooses its own gateway.
            :param outgrown: the code of SCardListReaders that means that the library can't use this pcscd.  A context
                that gets this code is released again.
            :return: pyscard's result, with what ``keep`` returned instead of the context; or ``outgrown``.
            :raises LostError: instead of returning ``outgrown``, if another gateway of this kind can use this pcscd.
            """

        def connect(self, context: Any, arguments: Sequence[Any], keep: KeepCard) -> Any:
            """SCardConnect.

            :param context: the record of the PC/SC context.
            :param arguments: reader, share mode, protocols.
            :return: pyscard's result, with what ``keep`` returned instead of the card; or :data:`STALE`.
            """

        def descriptors(self, real: Any) -> Sequence[Optional[Descriptor]]:
            """The connections to pcscd that a context has in this process; None for one that is not known."""

else:
    Keep = KeepCard = Gateway = object


NO_HANDLE = -1
"""Passed instead of a handle that is released, or of the wrong kind: the library finds no context or card.

libpcsclite frees a context while other threads may wait for it, and its number can still be known then.  pyscard
accepts this number, unlike 0.
"""

STALE = object()
"""The result of a call that was not made, or was undone, because its handle no longer belongs to this process."""


LOST_REASON = "the broker has ended, or the file descriptors of the connection to it were closed"
"""Why a gateway is lost."""

KEEP_FILES = "a program that closes all file descriptors must keep those of pcsc_safe.files_to_preserve()"
"""A remedy."""


class LostError(Exception):
    """A gateway is lost, and with it every context that was established through it.

    :ivar in_progress: whether the call may have been executed.
    """

    def __init__(self, gateway: Gateway, *, in_progress: bool) -> None:
        super().__init__(gateway, in_progress)
        self.gateway = gateway
        self.in_progress = in_progress
