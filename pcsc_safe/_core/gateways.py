"""The gateways of this process.  The core knows them only by their protocol.

:mod:`pcsc_safe._gateways` puts them here before anything uses them.  A test can put others here, and the core sees no
difference.  At a fork nothing changes: :mod:`inherited` decides at each first use what a child may use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol

from .calls import Call, Gateway

__all__ = ["BrokerGateway", "Brokers", "InheritedConnection", "NativeGateway", "brokers", "compose", "native"]


if TYPE_CHECKING:  # as in in_flight

    class NativeGateway(Gateway, Protocol):
        """The gateway that is this process's own native library.

        What it knows a PC/SC context by (``real``) lives in this process, and can be handed over at a fork: it has
        ``tidy()``, ``give(by)``, ``give_latest()``, ``take_back(by)``, ``take_over(epoch)`` and ``release_dead()``.
        """

        def is_loaded(self) -> bool:
            """Whether there is a native library in this process at all."""

        def prepare(self) -> None:
            """Import what it takes, so that nothing need be imported in a child."""

        def caller(self, call: Call) -> Callable[[Any, tuple[Any, ...]], Any]:
            """What makes a call on a record that this process owns.

            :return: takes the record and the arguments behind the handle; returns pyscard's result, or ``calls.STALE``.
            """

        def await_change(
            self, context: Any, alive: Callable[[], bool], timeout: int, states: Any, cancelled: Any
        ) -> Any:
            """SCardGetStatusChange with a timeout; see :func:`pcsc_safe._native.waits.await_change`."""

        def leave(self, real: Any) -> None:
            """Something else is behind the PC/SC context now; threads may not have known it when they used this."""

    class InheritedConnection(Protocol):
        """How a child reaches what its parent gives it in a broker.

        :ivar number: the descriptor's in the child.
        """

        number: int

        def descriptors(self) -> set[int]:
            """Those that the child is to have."""

        def arrive(self) -> None:
            """In the child, in its hook: take the parent's place."""

        def settle(self, born: bool, /) -> None:
            """In the parent: leave it to the child; or take back what was given, if there is none."""

    class BrokerGateway(Gateway, Protocol):
        """The gateway that is another process.

        :ivar key: what tells it from the broker's other clients.
        """

        key: bytes

        def forget(self, real: int) -> None:
            """Have a context released that is of no more use."""

        def inherit(self, key: bytes, handles: list[int], *, keeps: bool) -> Any:
            """Get contexts and cards of another client; returns those that were got."""

        def prepare_child(self, given: list[int], shared: list[int]) -> Any:
            """Prepare a client for the child that is about to be forked, with these contexts and cards."""

    class Brokers(Protocol):
        """The brokers of this process and its family."""

        def prepare(self) -> None:
            """Import what they take, so that nothing need be imported in a child."""

        def get(self) -> BrokerGateway:
            """The one of this process, started if need be.

            :raises BrokerError: it can't be started.
            """

        def existing(self) -> Optional[BrokerGateway]:
            """The one of this process, if it has one."""

        def as_broker(self, gateway: object) -> Optional[BrokerGateway]:
            """The gateway, if it is a broker."""

        def files_to_preserve(self) -> Sequence[int]:
            """The descriptors without which this process loses its broker."""

        def died_too_often(self) -> Exception:
            """What to raise when new brokers die as well."""

else:
    NativeGateway = InheritedConnection = BrokerGateway = Brokers = object


class _NotYet:
    """In the place of gateways, until :mod:`pcsc_safe._gateways` is imported."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


_not_yet: Any = _NotYet()

native: NativeGateway = _not_yet
"""The :class:`NativeGateway` of this process."""

brokers: Brokers = _not_yet
"""Its :class:`Brokers`."""


def compose(of_process: NativeGateway, of_family: Brokers) -> None:
    """Say which gateways there are."""
    global native, brokers
    native, brokers = of_process, of_family
