"""``pcsc_safe.reconnecting()`` with pyscard's own connections, after install()."""

from __future__ import annotations

from typing import Any

import pytest
from programs import IS_VERIFIED, VERIFY, child, outcome, say

import pcsc_safe
from pcsc_safe.testing import VirtualPcsc

pytestmark = pytest.mark.native

ECHO = [0x80, 0x01, 0, 0, 1, 42]


def innermost(connection: Any) -> Any:
    """The connection that has the handle."""
    return innermost(connection.component) if hasattr(connection, "component") else connection


def works_after_a_reset() -> None:
    """Another application resets the card; then each kind of connection returns a response."""
    pcsc_safe.install(cards="reset")
    from smartcard.ExclusiveConnectCardConnection import ExclusiveConnectCardConnection
    from smartcard.ExclusiveTransmitCardConnection import ExclusiveTransmitCardConnection
    from smartcard.scard import SCARD_LEAVE_CARD, SCARD_RESET_CARD, SCardReconnect
    from smartcard.System import readers

    first, second = readers()
    plain = first.createConnection()
    alone = ExclusiveTransmitCardConnection(first.createConnection())
    exclusive = ExclusiveConnectCardConnection(second.createConnection())
    other = first.createConnection()
    for connection in (plain, alone, exclusive, other):
        connection.connect(disposition=SCARD_LEAVE_CARD)
    assert SCardReconnect(innermost(other).hcard, 2, 3, SCARD_RESET_CARD)[0] == 0

    def use(connection: Any) -> Any:
        restored: list[Any] = []

        def restore(given: Any) -> None:
            assert given is connection
            restored.append(given.transmit(VERIFY)[1:])

        answer = pcsc_safe.reconnecting(connection, lambda given: given.transmit(IS_VERIFIED), restore)
        return answer, restored, innermost(connection).disposition

    here = [use(plain), use(alone), use(exclusive)]
    say([here, child(lambda: [use(plain), use(alone)])])


def test_connections_of_pyscard(shared_stack: VirtualPcsc) -> None:
    """Plain and decorated connections connect again, in the owner and in a child; their disposition stays the same."""
    restored = [[[1], 0x90, 0], [[0x90, 0]], 0]
    untouched = [[[0], 0x90, 0], [], 0]
    assert outcome(works_after_a_reset, shared_stack) == [[restored, restored, untouched], [restored, restored]]


def is_not_connected() -> None:
    pcsc_safe.install()
    from smartcard.System import readers

    connection = readers()[0].createConnection()
    try:
        pcsc_safe.reconnecting(connection, lambda given: given.transmit(ECHO))
    except pcsc_safe.ReconnectError as error:
        from smartcard.Exceptions import SmartcardException

        say([isinstance(error, SmartcardException), "after install() and connect()" in error.remedy])


def test_a_connection_that_is_not_connected(shared_stack: VirtualPcsc) -> None:
    """The error names the state, and code for pyscard can catch it."""
    assert outcome(is_not_connected, shared_stack) == [True, True]
