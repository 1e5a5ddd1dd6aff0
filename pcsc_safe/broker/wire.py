"""The protocol between a process and its broker, without I/O: messages to bytes, and back.

A connection carries one request, then one reply, and so on.  A frame is the length of its body (4 bytes, little-endian
like every number here) and the body: a byte for the kind of message, then its fields, each a value in the encoding of
``values``.  The tests compare the bytes.  Hello, Welcome and Refused stay as they are in every version, because peers
of different versions exchange them.

Invariant: whatever arrives, :func:`decode` and :class:`Receiver` return a message or raise WireError, and use memory in
proportion to what arrived, not to what it claims.  No text and no repr made here contains a byte of an argument or of a
result, because these contain PINs.

At a fork: nothing to do.  A Receiver belongs to one connection, and ends with it.
"""

import struct
from typing import Any, Callable, NamedTuple, Optional, Union

from .._core.calls import CALLS
from .values import (
    INT,
    LIST,
    MAX_BODY,
    MAX_DEPTH,
    OCTETS,
    TUPLE,
    Opaque,
    WireError,
    encode_values,
    malformed,
    octets_of,
    opaque,
    oversized,
    read,
    truncated,
)

__all__ = [
    "FUNCTIONS",
    "HEADER",
    "MAX_BODY",
    "MAX_DEPTH",
    "NUMBERS",
    "RAISABLE",
    "REFUSED",
    "VERSION",
    "Describe",
    "Hello",
    "Inherit",
    "Message",
    "Opaque",
    "Raised",
    "Receiver",
    "Refused",
    "Request",
    "Result",
    "TakeBack",
    "Undo",
    "Welcome",
    "WireError",
    "decode",
    "encode",
    "encode_request",
    "encode_result",
    "opaque",
]

VERSION: int = 3
HEADER: int = 4
"""The length of a frame's head, in bytes; the head is the length of the body."""

FUNCTIONS: tuple[str, ...] = tuple(CALLS)
"""The number of a function is its index here, so another order, or another row, needs another VERSION."""
NUMBERS: dict[str, int] = {name: number for number, name in enumerate(FUNCTIONS)}

_ERRORS = (TypeError, ValueError, OverflowError, SystemError, MemoryError, AttributeError, RuntimeError)
RAISABLE: dict[str, type[Exception]] = {error.__name__: error for error in _ERRORS}
"""The exceptions that a reply can raise in the other process, by name; each takes only a text."""


class Hello(NamedTuple):
    """The first message of a connection; the key identifies the client."""

    version: int
    key: bytes

    def __repr__(self) -> str:
        return f"Hello(version={self.version!r}, key=...)"


class Welcome(NamedTuple):
    """The reply to Hello: the broker's version, and its PID."""

    version: int
    pid: int


class Request(NamedTuple):
    """A call of ``FUNCTIONS[function]``."""

    function: int
    arguments: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"Request(function={self.function!r}, arguments=...)"


class Describe(NamedTuple):
    """Asks for the catalogue of names.  It has no fields, and is false as every empty tuple is."""


class Inherit(NamedTuple):
    """Asks for contexts and cards that another client has.

    :ivar key: of the other client.
    :ivar handles: of the contexts and cards.
    :ivar keeps: whether the other client keeps them, too.
    """

    key: bytes
    handles: tuple[int, ...]
    keeps: bool

    def __repr__(self) -> str:
        return f"Inherit(key=..., handles={self.handles!r}, keeps={self.keeps!r})"


class TakeBack(NamedTuple):
    """Asks to end a client that no process has become, and to get contexts and cards of it.

    :ivar key: of that client.
    :ivar handles: of the contexts and cards.
    """

    key: bytes
    handles: tuple[int, ...]

    def __repr__(self) -> str:
        return f"TakeBack(key=..., handles={self.handles!r})"


class Undo(NamedTuple):
    """Asks to undo the last call on this connection, because its result is not kept.  It has no fields."""


class Result(NamedTuple):
    """What the call returned."""

    value: Any

    def __repr__(self) -> str:
        return "Result(value=...)"


class Raised(NamedTuple):
    """The call raised ``RAISABLE[kind](text)``, because the PC/SC module refused the arguments."""

    kind: str
    text: str


class Refused(NamedTuple):
    """The peer did not understand a message, or can't serve it."""

    text: str


Message = Union[Hello, Welcome, Request, Describe, Inherit, TakeBack, Undo, Result, Raised, Refused]


class _Kind(NamedTuple):
    """A kind of message: the first byte of its body, and a function that checks its fields."""

    letter: bytes
    message: type[Any]
    fields: int
    fits: Callable[..., bool]


def _is_in(value: Any, numbers: range) -> bool:
    return type(value) is int and value in numbers


_VERSIONS = range(1, 1 << 16)
_PIDS = range(1, 1 << 31)
_NUMBERS = range(len(FUNCTIONS))
_KEY_SIZE = 16

REFUSED = b"X"
"""The beginning of the body of a Refused."""

_KINDS = (
    _Kind(b"H", Hello, 2, lambda version, key: _is_in(version, _VERSIONS) and _is_key(key)),
    _Kind(b"W", Welcome, 2, lambda version, pid: _is_in(version, _VERSIONS) and _is_in(pid, _PIDS)),
    _Kind(b"Q", Request, 2, lambda function, arguments: _is_in(function, _NUMBERS) and isinstance(arguments, tuple)),
    _Kind(b"D", Describe, 0, lambda: True),
    _Kind(b"I", Inherit, 3, lambda key, handles, keeps: _is_key(key) and _are_handles(handles) and type(keeps) is bool),
    _Kind(b"B", TakeBack, 2, lambda key, handles: _is_key(key) and _are_handles(handles)),
    _Kind(b"U", Undo, 0, lambda: True),
    _Kind(b"R", Result, 1, lambda value: True),
    _Kind(b"E", Raised, 2, lambda kind, text: isinstance(kind, str) and kind in RAISABLE and isinstance(text, str)),
    _Kind(REFUSED, Refused, 1, lambda text: isinstance(text, str)),
)
_KIND_OF = {kind.message: kind for kind in _KINDS}
_KIND_BY_NUMBER = {kind.letter[0]: kind for kind in _KINDS}


def _are_handles(handles: Any) -> bool:
    return type(handles) is tuple and all(type(handle) is int for handle in handles)


def _is_key(key: Any) -> bool:
    return isinstance(key, bytes) and len(key) == _KEY_SIZE


_SIZE = struct.Struct("<I")
_pack_size, _unpack_size = _SIZE.pack, _SIZE.unpack_from

# The two messages of an APDU exchange are each encoded and decoded by one call, which takes half the time.  The bytes
# are the same as in the general encoding: a request with two ints and a list of bytes, and a result that is a list of
# an int and a list of bytes.  They fit into a frame, because octets_of returns MAX_OCTETS at most.
_COMMAND_KIND, _RESPONSE_KIND = b"QR"
_COMMAND = struct.Struct("<BBqBIBqBqBI")
_RESPONSE = struct.Struct("<BBIBqBI")
_pack_command, _pack_response = struct.Struct("<IBBqBIBqBqBI").pack, struct.Struct("<IBBIBqBI").pack
_unpack_command, _COMMAND_SIZE = _COMMAND.unpack_from, _COMMAND.size
_unpack_response, _RESPONSE_SIZE = _RESPONSE.unpack_from, _RESPONSE.size
_COMMAND_TAGS, _RESPONSE_TAGS = (INT, TUPLE, 3, INT, INT, OCTETS), (LIST, 2, INT, OCTETS)


# --- messages to bytes


def encode(message: Message) -> bytes:
    """The frame of a message.

    :raises WireError: it is too long for a frame, or has a field that is not allowed.
    """
    kind = _KIND_OF.get(type(message))
    if kind is None or not kind.fits(*message):
        raise WireError("the message is of an unknown kind, or has a field that is not allowed")
    body = kind.letter + encode_values(message)
    if len(body) > MAX_BODY:
        raise oversized()
    return _pack_size(len(body)) + body


def encode_request(number: int, arguments: tuple[Any, ...]) -> bytes:
    """The frame of a Request.

    :param number: of the function.
    :raises WireError: there is no such function, or the arguments are too long for a frame.
    """
    if len(arguments) == 3 and number in _NUMBERS:
        card, code, command = arguments
        octets = octets_of(command) if type(card) is type(code) is int and type(command) is list else None
        if octets is not None:
            size = len(octets)
            try:
                head = _pack_command(
                    _COMMAND_SIZE + size, _COMMAND_KIND, INT, number, TUPLE, 3, INT, card, INT, code, OCTETS, size
                )
                return head + octets
            except struct.error:  # an int of more than 64 bits
                pass
    return encode(Request(number, arguments))


def encode_result(value: Any) -> bytes:
    """The frame of a Result.

    :raises WireError: the value is too long for a frame.
    """
    if type(value) is list and len(value) == 2:
        hresult, response = value
        octets = octets_of(response) if type(hresult) is int and type(response) is list else None
        if octets is not None:
            size = len(octets)
            try:
                head = _pack_response(_RESPONSE_SIZE + size, _RESPONSE_KIND, LIST, 2, INT, hresult, OCTETS, size)
                return head + octets
            except struct.error:
                pass
    return encode(Result(value))


# --- bytes to messages

_new = tuple.__new__  # what a NamedTuple's own does, at half the price


def decode(body: Union[bytes, memoryview]) -> Message:
    """The message that a frame carries.

    :param body: of the frame, as :class:`Receiver` returns it.
    :raises WireError: it is not a message.
    """
    if len(body) > MAX_BODY:
        raise WireError(f"the message is oversized: its body is longer than {MAX_BODY} bytes")
    if type(body) is not bytes:
        body = bytes(body)
    size = len(body)
    if size >= _COMMAND_SIZE and body[0] == _COMMAND_KIND:
        _, t0, number, t1, count, t2, card, t3, code, t4, octets = _unpack_command(body)
        is_command = (t0, t1, count, t2, t3, t4) == _COMMAND_TAGS and number in _NUMBERS
        if is_command and octets == size - _COMMAND_SIZE:
            return _new(Request, (number, (card, code, [*body[_COMMAND_SIZE:]])))
    elif size >= _RESPONSE_SIZE and body[0] == _RESPONSE_KIND:
        _, t0, count, t1, hresult, t2, octets = _unpack_response(body)
        if (t0, count, t1, t2) == _RESPONSE_TAGS and octets == size - _RESPONSE_SIZE:
            return _new(Result, ([hresult, [*body[_RESPONSE_SIZE:]]],))
    return _decode_any(body)


def _decode_any(body: bytes) -> Message:
    if not body:
        raise truncated(body)
    kind = _KIND_BY_NUMBER.get(body[0])
    if kind is None:
        raise WireError("the message is of an unknown kind")
    fields, end = read(body, 1, kind.fields)
    if end != len(body):
        raise malformed("data after its end", body, end)
    if not kind.fits(*fields):
        raise WireError(f"the message is malformed: its fields are not those of {kind.message.__name__}")
    message: Message = kind.message(*fields)
    return message


class Receiver:
    """Makes frames from the bytes of one connection.  After a WireError the connection can't be used any more."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Optional[bytes]:
        """The body of the frame, once it is complete; None before.

        :param data: the received bytes.  None may belong to a next frame, because a peer waits for the reply first.
            Only Undo doesn't wait: if it arrives together with its request, both are refused, and nothing is executed.
        :raises WireError: the frame is malformed.
        """
        # Nearly all frames arrive in one piece, and alone.
        if not self._held and len(data) > 4 and _unpack_size(data)[0] == len(data) - 4 <= MAX_BODY:
            return data[4:]
        self._held += data
        missing = self._missing()
        if missing > 0:
            return None
        if missing < 0:
            raise WireError("the frame is followed by more data")
        body = bytes(self._held[4:])
        self._held.clear()
        return body

    def needed(self) -> int:
        """How many bytes of the frame are known to be missing, 1 at least.

        :raises WireError: the frame was refused because of its length.
        """
        return max(1, self._missing())

    def _missing(self) -> int:
        held = len(self._held)
        if held < 4:
            return 4 - held
        (length,) = _unpack_size(self._held)
        if not length:
            raise WireError("the frame is empty: its body has no bytes")
        if length > MAX_BODY:
            raise WireError(f"the frame is oversized: its body would be longer than {MAX_BODY} bytes")
        return 4 + int(length) - held
