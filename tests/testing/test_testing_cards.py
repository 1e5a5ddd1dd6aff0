"""Virtual cards, used through raw smartcard.scard."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from smartcard import scard

from pcsc_safe.testing import CardEvent, EchoCard, PcscStackError, VirtualCard, VirtualPcsc

OK = [0x90, 0x00]


class Connection:
    """A context and a connection to the first reader."""

    def __init__(self, reader: str) -> None:
        hresult, self.context = scard.SCardEstablishContext(scard.SCARD_SCOPE_USER)
        assert hresult == scard.SCARD_S_SUCCESS
        self.reader = reader
        self.card = self.connect()

    def connect(self) -> Any:
        """Connect to the reader's card."""
        hresult, card, _ = scard.SCardConnect(self.context, self.reader, scard.SCARD_SHARE_SHARED, 3)
        assert hresult == scard.SCARD_S_SUCCESS
        return card

    def transmit(self, *command: int) -> Any:
        """Send a command that must succeed; return the response."""
        hresult, answer = scard.SCardTransmit(self.card, scard.SCARD_PCI_T1, list(command))
        assert hresult == scard.SCARD_S_SUCCESS
        return answer

    def close(self) -> None:
        """End the session."""
        scard.SCardReleaseContext(self.context)


@pytest.fixture
def connection(pcsc_stack: VirtualPcsc) -> Iterator[Connection]:
    """A connection to the EchoCard in the first reader."""
    connection = Connection(pcsc_stack.readers[0].name)
    yield connection
    connection.close()


def answers(card: VirtualCard, *command: int) -> Any:
    """The response of a user-defined card to one command."""
    stack = VirtualPcsc(1, [card])
    with stack:
        connection = Connection(stack.readers[0].name)
        try:
            return connection.transmit(*command)
        finally:
            connection.close()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ([0, 1, 0, 0], OK),
        ([0, 1, 0, 0, 0], OK),
        ([0, 1, 0, 0, 2, 7, 8], [7, 8, *OK]),
        ([0, 1, 0, 0, 2, 7, 8, 0], [7, 8, *OK]),
        ([0x80, 2, 1, 0, 1, 9], [9, *OK]),
        ([0, 1, 0, 0, 0, 0, 3, 4, 5, 6], [4, 5, 6, *OK]),
        ([0, 1, 0, 0, 0, 0, 3, 4, 5, 6, 0, 0], [4, 5, 6, *OK]),
        ([0, 1, 0, 0, 0, 1, 0], OK),
        ([0, 0x40, 0, 3], [0, 1, 2, *OK]),
        ([0, 0x40, 0xFF, 0xFE], [0x67, 0x00]),
        ([0, 0xEE, 0, 0], [0x6D, 0x00]),
        ([0, 1], [0x67, 0x00]),
    ],
)
def test_echo_card_commands(command: list[int], answer: list[int]) -> None:
    """EchoCard understands short and extended length, and responds as documented."""
    assert list(EchoCard().apdu(bytes(command))) == answer


@pytest.mark.parametrize("command", [0x03, 0x80, 0xFF])
def test_a_command_of_one_byte(connection: Connection, pcsc_card: VirtualCard, command: int) -> None:
    """A command of one byte gets "wrong length", except for vpcd's control messages; the card continues to work."""
    assert pcsc_card._respond(bytes([command])) == bytes([0x67, 0x00])  # if not, SCardTransmit would never return
    assert connection.transmit(command) == [0x67, 0x00]
    assert connection.transmit(0, 1, 0, 0, 1, 7) == [7, *OK]
    assert pcsc_card.apdus == 1


@pytest.mark.parametrize("length", [254, 255, 256, 257, 0x7FFF, 65533])
def test_extended_answers(connection: Connection, length: int) -> None:
    """Responses of up to 65,533 bytes and a status word arrive complete."""
    assert connection.transmit(0, 0x40, length >> 8, length & 0xFF) == [i % 256 for i in range(length)] + OK


@pytest.mark.parametrize("length", [255, 256, 65528])
def test_extended_commands(connection: Connection, length: int) -> None:
    """Commands of up to 65,535 bytes in total arrive complete."""
    data = [i % 251 for i in range(length)]
    assert connection.transmit(0, 1, 0, 0, 0, length >> 8, length & 0xFF, *data) == data + OK


def test_pin_is_forgotten(connection: Connection, pcsc_stack: VirtualPcsc) -> None:
    """A reset by another application clears "verified"; this application gets SCARD_W_RESET_CARD."""
    connection.transmit(0, 0x20, 0, 0)
    assert connection.transmit(0, 0x30, 0, 0) == [1, *OK]
    pcsc_stack.readers[0].reset()
    hresult, _ = scard.SCardTransmit(connection.card, scard.SCARD_PCI_T1, [0, 0x30, 0, 0])
    assert hresult == scard.SCARD_W_RESET_CARD
    connection.card = connection.connect()
    assert connection.transmit(0, 0x30, 0, 0) == [0, *OK]


def test_record(pcsc_card: VirtualCard, connection: Connection, pcsc_stack: VirtualPcsc) -> None:
    """The card's record holds what happened, in order; a response is recorded when the application has received it."""
    connection.transmit(0, 1, 0, 0)
    assert pcsc_card.apdus == 1
    pcsc_stack.readers[0].reset()
    pcsc_stack.readers[0].remove()
    assert pcsc_card.resets == 1
    assert pcsc_card.power_ons == pcsc_card.power_offs
    assert pcsc_card.record[0] is CardEvent.POWER_ON
    assert pcsc_card.record[-3:] == (CardEvent.APDU, CardEvent.RESET, CardEvent.POWER_OFF)


def test_wait_for(pcsc_card: VirtualCard, connection: Connection) -> None:
    """wait_for returns when the event happens; on a timeout it raises an error with the card's record."""
    waiting = threading.Thread(target=pcsc_card.wait_for, args=("apdu", 2))
    waiting.start()
    connection.transmit(0, 1, 0, 0)
    connection.transmit(0, 1, 0, 0)
    waiting.join(10)
    assert not waiting.is_alive()
    with pytest.raises(TimeoutError, match=r"apdu number 3: <EchoCard.* apdu 2>"):
        pcsc_card.wait_for(CardEvent.APDU, 3, timeout=0.01)
    with pytest.raises(ValueError, match="nonsense"):
        pcsc_card.wait_for("nonsense")


def test_card_from_a_function() -> None:
    """A card can be made from a function and an ATR."""
    card = VirtualCard(bytes.fromhex("3B800181"), lambda command: command[::-1] + b"\x90\x00")
    stack = VirtualPcsc(1, [card])
    with stack:
        connection = Connection(stack.readers[0].name)
        assert connection.transmit(1, 2, 3, 4) == [4, 3, 2, 1, *OK]
        assert scard.SCardStatus(connection.card)[4] == [0x3B, 0x80, 0x01, 0x81]
        connection.close()


def test_hooks_of_a_subclass() -> None:
    """power_on, reset and power_off are called when the card is powered on, reset and powered off."""
    called = []

    class Card(VirtualCard):
        def power_on(self) -> None:
            called.append("on")

        def reset(self) -> None:
            called.append("reset")

        def power_off(self) -> None:
            called.append("off")

    with VirtualPcsc(1, [Card()], activate=False) as stack:
        stack.readers[0].reset()
        stack.readers[0].remove()
    assert called[0] == "on"
    assert called[-2:] == ["reset", "off"]


class Broken(VirtualCard):
    """Fails in the way that the first data byte of the command selects."""

    def apdu(self, command: bytes) -> Any:
        """Fail."""
        kind = command[2]
        if kind == 0:
            raise RuntimeError("my card has a bug")
        if kind == 1:
            pytest.fail("wrong command")
        return [None, "text", b"", b"\x90", b"x" * 65536][kind - 2]


@pytest.mark.parametrize("kind", range(7))
def test_errors_of_a_card(kind: int) -> None:
    """A bug in a card gives the status word 6F00, and is raised at the end of the stack's block, with its cause."""
    card = Broken()
    with pytest.raises(PcscStackError, match=r"Broken raised .* see the cause") as raised:
        assert answers(card, 0, 0, kind, 0) == [0x6F, 0x00]
    assert raised.value.__cause__ is card.errors[0]
    assert len(card.errors) == 1


def test_expected_errors() -> None:
    """If a test clears a card's errors, they aren't raised; the card works after an error."""
    card = Broken()
    with VirtualPcsc(1, [card]) as stack:
        connection = Connection(stack.readers[0].name)
        assert connection.transmit(0, 0, 0, 0) == connection.transmit(0, 0, 0, 0) == [0x6F, 0x00]
        assert len(card.errors) == 2
        card.errors.clear()
        connection.close()


def test_errors_do_not_hide_the_test_s_own() -> None:
    """If the block itself fails, its error is raised, not the card's."""
    card = Broken()
    card.errors.append(RuntimeError())
    with pytest.raises(ZeroDivisionError), VirtualPcsc(1, [card], activate=False):
        _ = 1 / 0


def test_errors_of_a_hook() -> None:
    """An error in a hook is reported like one in apdu, and the card continues to work."""

    class Card(EchoCard):
        def power_on(self) -> None:
            raise RuntimeError

    card = Card()
    with pytest.raises(PcscStackError):
        assert answers(card, 0, 1, 0, 0) == OK
    assert card.power_ons == len(card.errors) > 0


@pytest.mark.parametrize("atr", [b"", b"\x3b", bytes(34)])
def test_impossible_atr(atr: bytes) -> None:
    """An ATR of a length that no card has is refused."""
    with pytest.raises(ValueError, match="2 to 33 bytes"):
        VirtualCard(atr)


def test_repr_holds_no_apdu(pcsc_card: VirtualCard, connection: Connection, pcsc_stack: VirtualPcsc) -> None:
    """No APDU appears in a repr or in pcscd's log."""
    secret = b"no secret"  # letters: the log may contain a short number as a time in microseconds
    connection.transmit(0, 1, 0, 0, len(secret), *secret)
    for text in (repr(pcsc_card), repr(pcsc_stack.readers), pcsc_stack.log):
        assert secret.decode() not in text
        assert secret.hex(" ").upper() not in text.upper()
