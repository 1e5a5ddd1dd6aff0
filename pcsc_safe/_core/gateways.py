"""The gateways of this process.  The core knows them only by their protocol.

:mod:`pcsc_safe._gateways` puts them here before they are used.  A test can put others here; the core sees no
difference.  At a fork nothing changes: :mod:`inherited` decides at the first use of each object what a child may use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol

from ..errors import BrokerError
from .calls import Call, FollowUp, Gateway

__all__ = [
    "BROKER_ATTEMPTS",
    "BrokerGateway",
    "Brokers",
    "InheritedConnection",
    "NativeGateway",
    "brokers",
    "compose",
    "native",
    "repeated_death_error",
]


if TYPE_CHECKING:  # as in in_flight

    class NativeGateway(Gateway, Protocol):
        """The gateway to the native library in this process.

        Its object for a PC/SC context (``real``) lives in this process, and can be handed over at a fork: it has
        ``release_idle()``, ``give(by)``, ``give_latest(by)``, ``take_back(by)``, ``give_up(epoch)``,
        ``take_over(epoch)``, ``cut_connections()`` and ``release_dead()``.
        """

        def is_loaded(self) -> bool:
            """Whether the native library is loaded in this process."""

        def prepare(self) -> None:
            """Import what it requires, so that a child need not import anything."""

        def caller(self, call: Call, follow_up: Optional[FollowUp] = None) -> Callable[[Any, tuple[Any, ...]], Any]:
            """The function that makes a call on a record that this process owns.

            :param follow_up: is called after a call on a card that remains connected, also if a signal handler raises
                when the call has been made, and then perhaps twice.  The open transactions have been counted before.
            :return: takes the record and the arguments after the handle; returns pyscard's result, or ``calls.STALE``.
            """

        def await_change(
            self, context: Any, is_owned: Callable[[], bool], timeout: int, states: Any, cancelled: Any
        ) -> Any:
            """SCardGetStatusChange with a timeout; see :func:`pcsc_safe._native.waits.await_change`."""

        def abandon(self, real: Any) -> None:
            """Note that something has replaced ``real`` in a PC/SC context, perhaps while threads were using it."""

    class InheritedConnection(Protocol):
        """The connection by which a child reaches what its parent gives it in a broker.

        :ivar number: of the descriptor in the child.
        """

        number: int

        def descriptors(self) -> set[int]:
            """The descriptors that the child keeps."""

        def give(self, given: list[int], shared: list[int], /) -> None:
            """In the parent: give the child these contexts and cards; keep the shared ones, too."""

        def take_over(self) -> None:
            """In the child, in its hook: take the parent's place."""

        def settle(self, has_child: bool, /) -> None:
            """In the parent: leave it to the child; or, if there is no child, take back what was given."""

    class BrokerGateway(Gateway, Protocol):
        """The gateway that is another process."""

        @property
        def key(self) -> bytes:
            """Identifies this client to the broker."""

        def forget(self, real: int) -> None:
            """Release a context that is no longer needed."""

        def inherit(self, key: bytes, handles: list[int], *, keeps: bool) -> Any:
            """Get contexts and cards of another client; return those that the broker gave."""

        def prepare_child(self) -> InheritedConnection:
            """Create a client for the child that is about to be forked."""

    class Brokers(Protocol):
        """The brokers of this process and its family."""

        def prepare(self) -> None:
            """Import what they require, so that a child need not import anything."""

        def get(self) -> BrokerGateway:
            """The broker of this process, started if necessary.

            :raises BrokerError: it can't be started.
            """

        def existing(self) -> Optional[BrokerGateway]:
            """The broker of this process, if it has one."""

        def as_broker(self, gateway: object) -> Optional[BrokerGateway]:
            """The gateway, if it is a broker."""

        def files_to_preserve(self) -> Sequence[int]:
            """The descriptors without which this process loses its broker."""

else:
    NativeGateway = InheritedConnection = BrokerGateway = Brokers = object


native: NativeGateway
"""The :class:`NativeGateway` of this process."""

brokers: Brokers
"""Its :class:`Brokers`."""


BROKER_ATTEMPTS = 3
"""How many brokers are tried, one after the other, if each dies."""


def repeated_death_error() -> BrokerError:
    """The error to raise if new brokers die, too."""
    return BrokerError(
        f"{BROKER_ATTEMPTS} brokers of process {os.getpid()} ended as soon as they had started",
        remedy="see the system log for what kills them",
        pid=os.getpid(),
    )


def compose(of_process: NativeGateway, of_family: Brokers) -> None:
    """Set the gateways of this process."""
    global native, brokers
    native, brokers = of_process, of_family
