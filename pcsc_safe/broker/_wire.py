"""The protocol between a process and its broker, with no I/O in it: messages to bytes, and back.

A connection carries one request, then one reply, and so on.  A frame is the length of its body (4 bytes, little-endian
as every number here) and the body: a byte for the kind of message, then its fields, each a value with a tag in front.
The tests pin the bytes.  Hello, Welcome and Refused stay as they are in every version, for they are what peers of
different versions say to each other.

Invariant: whatever comes in, :func:`decode` and :class:`Receiver` give a message or raise WireError, in memory in
proportion to what came in, not to what it claims.  No text and no repr made here holds a byte of an argument or of a
result: there are PINs in them.

At a fork: nothing to do.  A Receiver belongs to one connection, and is dropped with it.
"""

import struct
from collections.abc import Iterable
from typing import Any, Callable, NamedTuple, Optional, Union

from .._calls import CALLS

__all__ = [
    "FUNCTIONS",
    "MAX_BODY",
    "MAX_DEPTH",
    "NUMBERS",
    "RAISABLE",
    "VERSION",
    "Describe",
    "Hello",
    "Message",
    "Opaque",
    "Raised",
    "Receiver",
    "Refused",
    "Request",
    "Result",
    "Welcome",
    "WireError",
    "decode",
    "encode",
    "encode_request",
    "encode_result",
    "opaque",
]

VERSION: int = 1
MAX_BODY: int = 1 << 20
"""How long the body of a frame may be, in bytes; the longest APDU is a sixteenth of it."""
MAX_DEPTH: int = 5
"""How deep lists, tuples and dicts may be nested in a field; PC/SC's own, and the catalogue, go to 4."""

FUNCTIONS: tuple[str, ...] = tuple(CALLS)
"""The number of a function is its place here, so another order, or another row, is another VERSION."""
NUMBERS: dict[str, int] = {name: number for number, name in enumerate(FUNCTIONS)}

_ERRORS = (TypeError, ValueError, OverflowError, SystemError, MemoryError, AttributeError, RuntimeError)
RAISABLE: dict[str, type[Exception]] = {error.__name__: error for error in _ERRORS}
"""What a reply may raise in the other process, by name; each takes just a text."""


class WireError(Exception):
    """A message can't be told, or what came in is none; the text holds nothing of it."""


class Hello(NamedTuple):
    """The first message of a connection; the key tells whose it is."""

    version: int
    key: bytes

    def __repr__(self) -> str:
        return f"Hello(version={self.version!r}, key=...)"


class Welcome(NamedTuple):
    """The answer to Hello: what the broker speaks, and which process it is."""

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


class Result(NamedTuple):
    """What the call returned."""

    value: Any

    def __repr__(self) -> str:
        return "Result(value=...)"


class Raised(NamedTuple):
    """The call raised ``RAISABLE[kind](text)``: what the PC/SC module thinks of the arguments."""

    kind: str
    text: str


class Refused(NamedTuple):
    """The peer can't understand, or can't serve."""

    text: str


Message = Union[Hello, Welcome, Request, Describe, Result, Raised, Refused]


class _Kind(NamedTuple):
    """A kind of message: the first byte of its body, and whether it can have these fields."""

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

_KINDS = (
    _Kind(b"H", Hello, 2, lambda version, key: _is_in(version, _VERSIONS) and _is_key(key)),
    _Kind(b"W", Welcome, 2, lambda version, pid: _is_in(version, _VERSIONS) and _is_in(pid, _PIDS)),
    _Kind(b"Q", Request, 2, lambda function, arguments: _is_in(function, _NUMBERS) and isinstance(arguments, tuple)),
    _Kind(b"D", Describe, 0, lambda: True),
    _Kind(b"R", Result, 1, lambda value: True),
    _Kind(b"E", Raised, 2, lambda kind, text: isinstance(kind, str) and kind in RAISABLE and isinstance(text, str)),
    _Kind(b"X", Refused, 1, lambda text: isinstance(text, str)),
)
_KIND_OF = {kind.message: kind for kind in _KINDS}
_KIND_BY_NUMBER = {kind.letter[0]: kind for kind in _KINDS}


def _is_key(key: Any) -> bool:
    return isinstance(key, bytes) and len(key) == _KEY_SIZE


class Opaque:
    """Stands for an object of a type that PC/SC has no use for; its class has the name of that type."""

    __slots__ = ()


_MAX_NAME = 255  # characters of a type's name
_MAX_OPAQUES = 256
_opaques: dict[str, Opaque] = {}
_unnamed = Opaque()


def opaque(name: str) -> Opaque:
    """An object whose type has this name, so that the error of the PC/SC module names the type that was given to it.

    Only the first 256 names get one: a class takes a kilobyte, and a message could ask for a hundred thousand.

    :raises ValueError: no type can have this name.
    """
    found = _opaques.get(name)
    if found is None:
        if len(_opaques) >= _MAX_OPAQUES:
            return _unnamed
        found = _opaques[name] = type(name, (Opaque,), {"__slots__": ()})()
    return found


# The tags of values.
_NONE, _TRUE, _FALSE, _INT, _LONG, _FLOAT, _TEXT, _BYTES, _OCTETS, _LIST, _TUPLE, _DICT, _OPAQUE = b"NTFiIfsbBltdo"

_SIZE = struct.Struct("<I")
_INT64 = struct.Struct("<q")
_FLOAT64 = struct.Struct("<d")
_pack_size, _unpack_size, _unpack_int = _SIZE.pack, _SIZE.unpack_from, _INT64.unpack_from
_pack_tagged_size, _pack_tagged_int = struct.Struct("<BI").pack, struct.Struct("<Bq").pack

# The exchange of an APDU is told and read by one call a message, at half the price.  The bytes are those of the general
# way: of a request with two ints and a list of bytes, and of a result that is a list of an int and a list of bytes.
_COMMAND_KIND, _ANSWER_KIND = b"QR"
_COMMAND = struct.Struct("<BBqBIBqBqBI")
_ANSWER = struct.Struct("<BBIBqBI")
_pack_command, _pack_answer = struct.Struct("<IBBqBIBqBqBI").pack, struct.Struct("<IBBIBqBI").pack
_unpack_command, _COMMAND_SIZE = _COMMAND.unpack_from, _COMMAND.size
_unpack_answer, _ANSWER_SIZE = _ANSWER.unpack_from, _ANSWER.size
_COMMAND_TAGS, _ANSWER_TAGS = (_INT, _TUPLE, 3, _INT, _INT, _OCTETS), (_LIST, 2, _INT, _OCTETS)
_MAX_OCTETS = MAX_BODY - _COMMAND_SIZE


# --- values to bytes; depth is how many containers are around the value


def _tell_all(values: Iterable[Any], depth: int) -> bytes:
    told = []
    left = MAX_BODY  # looked at here, for a list that holds one list many times, and so on, is small and yet endless
    for value in values:
        part = _TELLERS.get(type(value), _tell_other)(value, depth)
        left -= len(part)
        if left < 0:
            raise _oversized()
        told.append(part)
    return b"".join(told)


def _oversized() -> WireError:
    return WireError(f"the message is oversized: its body would be longer than {MAX_BODY} bytes")


def _sized(tag: int, data: bytes) -> bytes:
    if len(data) > MAX_BODY:
        raise _oversized()
    return _pack_tagged_size(tag, len(data)) + data


def _tell_int(value: int, _depth: int) -> bytes:
    try:
        return _pack_tagged_int(_INT, value)
    except struct.error:
        return _sized(_LONG, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _tell_text(value: str, _depth: int) -> bytes:
    return _sized(_TEXT, value.encode("utf-8", "surrogatepass"))


def _octets(value: list[Any]) -> Optional[bytes]:
    """The bytes that a list is made of; None if there is anything in it but plain ints from 0 to 255, or too much."""
    # bytes() would also take what can be made an int of, True for one, so the types come first.
    count = len(value)
    if [*map(type, value)].count(int) != count or count > _MAX_OCTETS:
        return None
    try:
        return bytes(value)
    except (ValueError, TypeError):  # the latter: another thread has changed the list
        return None


def _tell_list(value: list[Any], depth: int) -> bytes:
    octets = _octets(value) if depth < MAX_DEPTH else None
    if octets is not None:
        return _pack_tagged_size(_OCTETS, len(octets)) + octets
    return _tell_container(_LIST, value, tuple(value), depth)  # a copy: another thread may change the list


def _tell_dict(value: dict[Any, Any], depth: int) -> bytes:
    flat = tuple(part for item in list(value.items()) for part in item)
    if not all(type(key) is str for key in flat[::2]):
        return _tell_opaque(value)
    return _tell_container(_DICT, value, flat, depth)


def _tell_container(tag: int, container: Any, values: tuple[Any, ...], depth: int) -> bytes:
    if depth >= MAX_DEPTH:
        return _tell_opaque(container)
    return _pack_tagged_size(tag, len(values)) + _tell_all(values, depth + 1)


def _tell_other(value: Any, depth: int) -> bytes:
    for base, plain in _PLAIN.items():
        if issubclass(type(value), base):  # isinstance would believe a proxy
            return _TELLERS[base](plain(value), depth)
    return _tell_opaque(value)


def _tell_opaque(value: Any) -> bytes:
    return _sized(_OPAQUE, _name_of(type(value))[:_MAX_NAME].encode())


_name_of: Callable[[type], str] = type.__dict__["__name__"].__get__  # not what a metaclass makes of it

_TELLERS: dict[type, Callable[[Any, int], bytes]] = {
    type(None): lambda value, depth: b"N",
    bool: lambda value, depth: b"T" if value else b"F",
    int: _tell_int,
    float: lambda value, depth: bytes([_FLOAT]) + _FLOAT64.pack(value),
    str: _tell_text,
    bytes: lambda value, depth: _sized(_BYTES, value),
    list: _tell_list,
    tuple: lambda value, depth: _tell_container(_TUPLE, value, value, depth),
    dict: _tell_dict,
}

# What C code sees of an object of a subclass, whatever the subclass makes of it.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    list: list.copy,
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    dict: dict.copy,
}


# --- messages to bytes


def encode(message: Message) -> bytes:
    """The frame of a message.

    :raises WireError: it is more than a frame holds, or has a field that it can't have.
    """
    kind = _KIND_OF.get(type(message))
    if kind is None or not kind.fits(*message):
        raise WireError("the message is of an unknown kind, or has a field that it can't have")
    body = kind.letter + _tell_all(message, 0)
    if len(body) > MAX_BODY:
        raise _oversized()
    return _pack_size(len(body)) + body


def encode_request(number: int, arguments: tuple[Any, ...]) -> bytes:
    """The frame of a Request.

    :param number: of the function.
    :raises WireError: there is no such function, or the arguments are more than a frame holds.
    """
    if len(arguments) == 3 and number in _NUMBERS:
        card, code, command = arguments
        octets = _octets(command) if type(card) is type(code) is int and type(command) is list else None
        if octets is not None:
            size = len(octets)
            try:
                head = _pack_command(
                    _COMMAND_SIZE + size, _COMMAND_KIND, _INT, number, _TUPLE, 3, _INT, card, _INT, code, _OCTETS, size
                )
                return head + octets
            except struct.error:  # an int of more than 64 bits
                pass
    return encode(Request(number, arguments))


def encode_result(value: Any) -> bytes:
    """The frame of a Result.

    :raises WireError: the value is more than a frame holds.
    """
    if type(value) is list and len(value) == 2:
        hresult, answer = value
        octets = _octets(answer) if type(hresult) is int and type(answer) is list else None
        if octets is not None:
            size = len(octets)
            try:
                head = _pack_answer(_ANSWER_SIZE + size, _ANSWER_KIND, _LIST, 2, _INT, hresult, _OCTETS, size)
                return head + octets
            except struct.error:
                pass
    return encode(Result(value))


# --- bytes to values; at is where the value starts, behind its tag.  A body that is too short shows in struct.error
# where numbers are read, in IndexError where a tag or a kind is, and slices are looked at.

_Read = tuple[Any, int]  # the value, and where it ended


def _malformed(state: str, body: bytes, at: int) -> WireError:
    return WireError(f"the message is malformed: {state} at byte {at} of {len(body)}")


def _truncated(body: bytes) -> WireError:
    return WireError(f"the message is truncated: it has {len(body)} bytes, and says that there are more")


def _too_deep(body: bytes, at: int) -> WireError:
    return _malformed(f"there is a value nested deeper than {MAX_DEPTH}", body, at)


def _read_all(body: bytes, at: int, count: int, depth: int) -> tuple[list[Any], int]:
    values = []
    for _ in range(count):
        value, at = _READERS[body[at]](body, at + 1, depth)
        values.append(value)
    return values, at


def _read_list(body: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    (count,) = _unpack_size(body, at)
    if count > len(body) - at - 4:  # a value has its tag at least
        raise _truncated(body)
    if depth >= MAX_DEPTH:
        raise _too_deep(body, at)
    return _read_all(body, at + 4, count, depth + 1)


def _read_tuple(body: bytes, at: int, depth: int) -> _Read:
    values, end = _read_list(body, at, depth)
    return tuple(values), end


def _read_dict(body: bytes, at: int, depth: int) -> _Read:
    flat, end = _read_list(body, at, depth)
    keys, values = flat[::2], flat[1::2]
    if not all(type(key) is str for key in keys) or not len({*keys}) == len(keys) == len(values):
        raise _malformed("there is a dict with impossible keys", body, at)
    return dict(zip(keys, values)), end


def _read_bytes(body: bytes, at: int, _depth: int) -> tuple[bytes, int]:
    (size,) = _unpack_size(body, at)
    start = at + 4
    end = start + size
    if end > len(body):
        raise _truncated(body)
    return body[start:end], end


def _read_octets(body: bytes, at: int, depth: int) -> _Read:
    if depth >= MAX_DEPTH:
        raise _too_deep(body, at)
    octets, end = _read_bytes(body, at, depth)
    return [*octets], end


def _read_long(body: bytes, at: int, depth: int) -> _Read:
    data, end = _read_bytes(body, at, depth)
    return int.from_bytes(data, "little", signed=True), end


def _read_text(body: bytes, at: int, depth: int) -> _Read:
    data, end = _read_bytes(body, at, depth)
    try:
        return data.decode("utf-8", "surrogatepass"), end
    except UnicodeDecodeError:
        raise _malformed("there is a text that is not UTF-8", body, at) from None


def _read_opaque(body: bytes, at: int, depth: int) -> _Read:
    data, end = _read_bytes(body, at, depth)
    try:
        name = data.decode()
    except UnicodeDecodeError:
        name = "\0"
    if len(name) > _MAX_NAME or "\0" in name:
        raise _malformed("there is a type with an impossible name", body, at)
    return opaque(name), end


def _read_unknown(body: bytes, at: int, _depth: int) -> _Read:
    raise _malformed("there is an unknown tag", body, at - 1)


_READ: dict[int, Callable[[bytes, int, int], _Read]] = {
    _NONE: lambda body, at, depth: (None, at),
    _TRUE: lambda body, at, depth: (True, at),
    _FALSE: lambda body, at, depth: (False, at),
    _INT: lambda body, at, depth: (_unpack_int(body, at)[0], at + 8),
    _LONG: _read_long,
    _FLOAT: lambda body, at, depth: (_FLOAT64.unpack_from(body, at)[0], at + 8),
    _TEXT: _read_text,
    _BYTES: _read_bytes,
    _OCTETS: _read_octets,
    _LIST: _read_list,
    _TUPLE: _read_tuple,
    _DICT: _read_dict,
    _OPAQUE: _read_opaque,
}
_READERS = tuple(_READ.get(tag, _read_unknown) for tag in range(256))


# --- bytes to messages

_new = tuple.__new__  # what a NamedTuple's own does, at half the price


def decode(body: Union[bytes, memoryview]) -> Message:
    """The message that a frame carries.

    :param body: of the frame, as :class:`Receiver` gives it.
    :raises WireError: it is no message.
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
    elif size >= _ANSWER_SIZE and body[0] == _ANSWER_KIND:
        _, t0, count, t1, hresult, t2, octets = _unpack_answer(body)
        if (t0, count, t1, t2) == _ANSWER_TAGS and octets == size - _ANSWER_SIZE:
            return _new(Result, ([hresult, [*body[_ANSWER_SIZE:]]],))
    return _decode_any(body)


def _decode_any(body: bytes) -> Message:
    try:
        kind = _KIND_BY_NUMBER.get(body[0])
        if kind is None:
            raise WireError("the message is of an unknown kind")
        fields, end = _read_all(body, 1, kind.fields, 0)
    except (IndexError, struct.error):
        raise _truncated(body) from None
    if end != len(body):
        raise _malformed("there is something behind its end", body, end)
    if not kind.fits(*fields):
        raise WireError(f"the message is malformed: it is no {kind.message.__name__}")
    message: Message = kind.message(*fields)
    return message


class Receiver:
    """Makes frames of what comes in on one connection.  After a WireError the connection is of no use any more."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Optional[bytes]:
        """The body of the frame, once it is complete; None before.

        :param data: what has come in; none of it may belong to a next frame, for a peer awaits the answer first.
        :raises WireError: the frame can't be one.
        """
        # As nearly all come: at once, and alone.
        if not self._held and len(data) > 4 and _unpack_size(data)[0] == len(data) - 4 <= MAX_BODY:
            return data[4:]
        self._held += data
        missing = self._missing()
        if missing > 0:
            return None
        if missing < 0:
            raise WireError("the frame has something behind its end")
        body = bytes(self._held[4:])
        self._held.clear()
        return body

    def needed(self) -> int:
        """How many bytes of the frame are known to be missing, 1 at least.

        :raises WireError: the frame has been refused for its length.
        """
        return max(1, self._missing())

    def _missing(self) -> int:
        held = len(self._held)
        if held < 4:
            return 4 - held
        (length,) = _unpack_size(self._held)
        if not length:
            raise WireError("the frame is empty: its body has no byte")
        if length > MAX_BODY:
            raise WireError(f"the frame is oversized: its body would be longer than {MAX_BODY} bytes")
        return 4 + int(length) - held
