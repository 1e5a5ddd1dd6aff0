"""Virtual cards: what is in the virtual readers, scripted in Python.

Invariant: whatever a card's own code does, the reader gets a response, and `VirtualCard.errors` has the exceptions.  No
APDU is kept, logged or shown.

At a fork: a card runs in the process that started the stack.  A child has a copy that nothing serves; its counts can be
read there, and stay as they were when the process forked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Optional, Union

from ._errors import PcscStackError

__all__ = ["DEFAULT_ATR", "CardEvent", "EchoCard", "VirtualCard"]

DEFAULT_ATR = bytes.fromhex("3B80800101")
"""The shortest ATR that offers T=0 and T=1."""

# vpcd's messages carry their length in two bytes
LONGEST_MESSAGE = 0xFFFF
_FAILED = b"\x6f\x00"
_WRONG_LENGTH = b"\x67\x00"


class CardEvent(Enum):
    """What can happen to a card.

    A card that is removed, or whose pcscd dies, loses its power.  This is also a POWER_OFF, if the card had power.
    """

    POWER_ON = "power-on"
    POWER_OFF = "power-off"
    RESET = "reset"
    APDU = "apdu"


class VirtualCard:
    """A card: give it a function, or subclass it and override `apdu`.

    :param atr: answer to reset, 2 to 33 bytes.
    :param apdu: takes a command APDU and returns the response APDU, status word included.  A thread of the stack
        calls it, for one command after another.
    :raises ValueError: the ATR has an invalid length.

    If the card's code raises, the reader gets the status word 6F00, and `errors` gets the exception.

    vpcd carries at most 65,535 bytes in each direction, status word included.  A command of one byte doesn't reach the
    card: the reader gets the status word 6700.  But vpcd takes the bytes 00, 01, 02 and 04 for its control messages:
    after 00, 01 and 02 SCardTransmit never returns, and after 04 it returns the ATR.  pcscd powers a card off that no
    application has used for about 400 ms.
    """

    def __init__(self, atr: bytes = DEFAULT_ATR, apdu: Optional[Callable[[bytes], bytes]] = None) -> None:
        if not 2 <= len(atr) <= 33:
            raise ValueError(f"an ATR has 2 to 33 bytes, not {len(atr)}; DEFAULT_ATR is one")
        self.atr = bytes(atr)
        self.errors: list[BaseException] = []
        """The exceptions of the card's own code, in order.  Leaving the stack raises PcscStackError if there are any;
        a test that expects errors clears the list."""
        self._script = apdu
        self._record: list[CardEvent] = []
        self._changed = threading.Condition()
        self._powered = False

    def apdu(self, command: bytes) -> bytes:
        """Return the response to one command APDU; override it.

        :param command: the APDU as the application sent it, at least two bytes.
        :return: the response: data and status word, 2 to 65,535 bytes.
        """
        return b"\x6d\x00" if self._script is None else self._script(command)

    def power_on(self) -> None:
        """Called when the reader powers the card up; override it."""

    def power_off(self) -> None:
        """Called when the card loses its power; override it."""

    def reset(self) -> None:
        """Called at a warm reset; override it."""

    @property
    def record(self) -> tuple[CardEvent, ...]:
        """Everything that happened to the card, in order."""
        return tuple(self._record)

    def count(self, event: CardEvent) -> int:
        """How many times an event happened to the card."""
        return self.record.count(event)

    @property
    def power_ons(self) -> int:
        """How many times the card was powered up."""
        return self.count(CardEvent.POWER_ON)

    @property
    def power_offs(self) -> int:
        """How many times the card lost its power."""
        return self.count(CardEvent.POWER_OFF)

    @property
    def resets(self) -> int:
        """How many warm resets the card had."""
        return self.count(CardEvent.RESET)

    @property
    def apdus(self) -> int:
        """How many commands the card has responded to."""
        return self.count(CardEvent.APDU)

    def wait_for(self, event: Union[CardEvent, str], count: int = 1, timeout: float = 10.0) -> None:
        """Wait until an event has happened to the card.

        :param event: a CardEvent, or its value ("power-on", "power-off", "reset", "apdu").
        :param count: the total number of these events since the card was created.
        :param timeout: seconds.
        :raises TimeoutError: the event has not happened ``count`` times; the text lists the events of the card.
        """
        event = CardEvent(event)
        with self._changed:
            if not self._changed.wait_for(lambda: self.count(event) >= count, timeout):
                raise TimeoutError(f"waited {timeout:g} s for {event.value} number {count}: {self!r}")

    def __repr__(self) -> str:
        counts = ", ".join(f"{event.value} {self.count(event)}" for event in CardEvent)
        return f"<{type(self).__name__}: {counts}>"

    def _respond(self, message: bytes) -> Optional[bytes]:
        """The response to one vpcd message: bytes, or nothing."""
        if len(message) != 1:
            answer = self._guard(lambda: self._checked(self.apdu(message)), _FAILED)
            self._happened(CardEvent.APDU)
            return answer
        if message == b"\x04":
            return self.atr
        if message == b"\x00":
            self._lose_power()
        elif message == b"\x01":
            self._guard(self.power_on, None)
            self._powered = True
            self._happened(CardEvent.POWER_ON)
        elif message == b"\x02":
            self._guard(self.reset, None)
            self._happened(CardEvent.RESET)
        else:
            return _WRONG_LENGTH
        return None

    def _lose_power(self) -> None:
        if self._powered:
            self._powered = False
            self._guard(self.power_off, None)
            self._happened(CardEvent.POWER_OFF)

    def _checked(self, response: object) -> bytes:
        if not isinstance(response, (bytes, bytearray)):
            raise PcscStackError(f"apdu() returned {type(response).__name__}", remedy="return bytes")
        if not 2 <= len(response) <= LONGEST_MESSAGE:
            remedy = f"return data and status word, 2 to {LONGEST_MESSAGE} bytes"
            raise PcscStackError(f"apdu() returned {len(response)} bytes", remedy=remedy)
        return bytes(response)

    def _guard(self, code: Callable[[], Optional[bytes]], otherwise: Optional[bytes]) -> Optional[bytes]:
        try:
            return code()
        # pytest.fail() and the like are no Exceptions; the test shall see them anyway
        except BaseException as error:
            self.errors.append(error)
            return otherwise

    def _happened(self, event: CardEvent) -> None:
        with self._changed:
            self._record.append(event)
            self._changed.notify_all()


class EchoCard(VirtualCard):
    """A card that returns the data that it is sent.  It ignores the class byte, and takes short and extended length.

    | INS | what it returns before the status word 9000 |
    |---|---|
    | 01 | the data of the command |
    | 02 | the same, after P1 times 10 milliseconds |
    | 20 | nothing: "verify PIN", and any PIN is right |
    | 30 | 01 if a PIN was verified since the card was last powered or reset, otherwise 00 |
    | 40 | P1*256+P2 bytes, counting 00, 01, ... FF, 00, ...; instead of more than 65,533 only the status word 6700 |
    | other | only the status word 6D00 |
    """

    def __init__(self, atr: bytes = DEFAULT_ATR) -> None:
        super().__init__(atr)
        self.verified = False

    def apdu(self, command: bytes) -> bytes:
        """Return the response to one command; see the class."""
        if len(command) < 4:
            return b"\x67\x00"
        ins, p1, p2 = command[1:4]
        data = _data_of(command)
        if ins == 0x02:
            time.sleep(p1 * 0.01)
        elif ins == 0x20:
            self.verified, data = True, b""
        elif ins == 0x30:
            data = bytes([self.verified])
        elif ins == 0x40:
            return _counting(p1 << 8 | p2)
        elif ins != 0x01:
            return b"\x6d\x00"
        return data + b"\x90\x00"

    def power_on(self) -> None:
        """Forget the PIN."""
        self.verified = False

    power_off = reset = power_on


def check_card(card: object) -> None:
    """Refuse what can't be put into a reader.

    :raises PcscStackError: it is not a card, or its class doesn't call ``VirtualCard.__init__()``.
    """
    if not isinstance(card, VirtualCard):
        raise PcscStackError(f"{card!r} is not a card", remedy="pass a VirtualCard, for example EchoCard()")
    if not hasattr(card, "_powered"):
        problem = f"this {type(card).__name__} has not been initialized"
        raise PcscStackError(problem, remedy="call super().__init__() first")


def _counting(length: int) -> bytes:
    if length + 2 > LONGEST_MESSAGE:
        return b"\x67\x00"
    return (bytes(range(256)) * (length // 256 + 1))[:length] + b"\x90\x00"


def _data_of(command: bytes) -> bytes:
    """The data field of a command APDU (ISO 7816-4), short or extended length."""
    body = command[4:]
    if len(body) <= 1:
        return b""
    if body[0]:
        return body[1 : 1 + body[0]]
    # 00 Le Le is case 2E, no data; anything longer starts with 00 Lc Lc
    return body[3 : 3 + int.from_bytes(body[1:3], "big")] if len(body) > 3 else b""
