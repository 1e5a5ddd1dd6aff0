"""The protocol between a process and its broker, with no I/O in it: messages to bytes, and back.

A connection carries one request, then one reply, and so on.  A frame is the length of its body (4 bytes, little-endian
as every number here) and the body: a byte for the kind of message, and the fields.  Values carry a tag each.  Of VERSION
1 the tests pin every byte; Hello, Welcome and Refused stay as they are in every version, for they are what peers of
different versions say to each other.

Invariant: whatever comes in, :func:`decode` and :class:`Receiver` give a message or raise WireError, in memory in
proportion to what came in, not to what it claims.  No text and no repr made here holds a byte of an argument or of a
value: there are PINs in them.

At a fork: nothing to do.  A Receiver belongs to one connection, and is dropped with it.
"""

import struct
from collections.abc import Iterable
from typing import Any, Callable, NamedTuple, NoReturn, Optional, Union

from .._calls import CALLS

__all__ = [
    "FUNCTIONS",
    "KEY_SIZE",
    "MAX_BODY",
    "MAX_DEPTH",
    "MAX_NAME",
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
"""How deep lists, tuples and dicts may be nested; PC/SC's own go to 3 in an argument, and to 4 in a result."""
MAX_NAME: int = 255
"""How many characters the name of a type may have."""
KEY_SIZE: int = 16

FUNCTIONS: tuple[str, ...] = tuple(CALLS)
"""The number of a function is its place here, so another order, or another row, is another VERSION."""
NUMBERS: dict[str, int] = {name: number for number, name in enumerate(FUNCTIONS)}

RAISABLE: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        AttributeError,
        BufferError,
        IndexError,
        MemoryError,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        SystemError,
        TypeError,
        ValueError,
    )
}
"""What a reply may raise in the other process, by name: all of them take just a text."""


class WireError(Exception):
    """A message can't be told, or what came in is none; the text holds nothing of it."""


class Hello(NamedTuple):
    """The first message of a connection; the key shows that both ends are of one family."""

    version: int
    key: bytes

    def __repr__(self) -> str:
        return f"Hello(version={self.version}, key=...)"


class Welcome(NamedTuple):
    """The answer to Hello: what the broker speaks, and which process it is."""

    version: int
    pid: int


class Request(NamedTuple):
    """A call of ``FUNCTIONS[function]``."""

    function: int
    arguments: tuple[Any, ...]

    def __repr__(self) -> str:
        name = FUNCTIONS[self.function] if self.function in _REQUESTS else self.function
        return f"Request({name}, {len(self.arguments)} arguments)"


class Describe(NamedTuple):
    """Asks for the catalogue of names.  It has no fields: as every empty tuple, it is false."""


class Result(NamedTuple):
    """What the call returned."""

    value: Any

    def __repr__(self) -> str:
        return "Result(...)"


class Raised(NamedTuple):
    """The call raised ``RAISABLE[kind](text)``: what the PC/SC module thinks of the arguments."""

    kind: str
    text: str


class Refused(NamedTuple):
    """The peer can't understand, or can't serve."""

    text: str


Message = Union[Hello, Welcome, Request, Describe, Result, Raised, Refused]


class Opaque:
    """Stands for an object of a type that PC/SC has no use for; its class has the name of that type."""

    __slots__ = ()


_MAX_OPAQUES = 256
_opaques: dict[str, Opaque] = {}
_unnamed = Opaque()


def opaque(name: str) -> Opaque:
    """An object whose type has this name, so that the error of the PC/SC module names the type that was given to it.

    The first 256 names get one; a class is a kilobyte, and a message could ask for a hundred thousand.

    :raises ValueError: no type can have this name.
    """
    found = _opaques.get(name)
    if found is None:
        found = type(name, (Opaque,), {"__slots__": ()})()
        if len(_opaques) >= _MAX_OPAQUES:
            return _unnamed
        _opaques[name] = found
    return found


# The tags of values.
_NONE, _TRUE, _FALSE, _INT, _LONG, _FLOAT, _TEXT, _BYTES, _OCTETS, _LIST, _TUPLE, _DICT, _OPAQUE = b"NTFiIfsbBltdo"
# The kinds of messages.
_HELLO, _WELCOME, _REQUEST, _DESCRIBE, _RESULT, _RAISED, _REFUSED = b"HWQDREX"

_SIZE = struct.Struct("<I")
_TAGGED_SIZE = struct.Struct("<BI")
_TAGGED_INT = struct.Struct("<Bq")
_TAGGED_FLOAT = struct.Struct("<Bd")
_INT64 = struct.Struct("<q")
_FLOAT64 = struct.Struct("<d")
_GREETING = struct.Struct(f"<BH{KEY_SIZE}s")
_WELCOMING = struct.Struct("<BHI")

# Looked up once: each is used for every value.
_pack_size, _unpack_size = _SIZE.pack, _SIZE.unpack_from
_pack_tagged_size, _pack_tagged_int = _TAGGED_SIZE.pack, _TAGGED_INT.pack
_unpack_int64 = _INT64.unpack_from


# --- values to bytes; depth is how many containers are around the value

_ATOMS = {None: bytes([_NONE]), True: bytes([_TRUE]), False: bytes([_FALSE])}
_are_all_ints = frozenset({int}).issuperset
_name_of: Callable[[type], str] = type.__dict__["__name__"].__get__  # not what a metaclass makes of it


def _tell(value: Any, depth: int) -> bytes:
    return _TELLERS.get(type(value), _tell_other)(value, depth)


def _tell_values(values: Iterable[Any], depth: int) -> bytes:
    told = []
    left = MAX_BODY  # checked here too: a list that holds one list many times, and so on, is small and yet endless
    for value in values:
        part = _TELLERS.get(type(value), _tell_other)(value, depth)
        left -= len(part)
        if left < 0:
            _refuse_length()
        told.append(part)
    return b"".join(told)


def _refuse_length() -> NoReturn:
    raise WireError(f"the message is oversized: its body would be longer than {MAX_BODY} bytes")


def _tell_atom(value: Optional[bool], _depth: int) -> bytes:
    return _ATOMS[value]


def _tell_int(value: int, _depth: int) -> bytes:
    try:
        return _pack_tagged_int(_INT, value)
    except struct.error:
        return _sized(_LONG, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _tell_float(value: float, _depth: int) -> bytes:
    return _TAGGED_FLOAT.pack(_FLOAT, value)


def _tell_text(value: str, _depth: int) -> bytes:
    return _sized(_TEXT, value.encode("utf-8", "surrogatepass"))


def _tell_bytes(value: bytes, _depth: int) -> bytes:
    return _sized(_BYTES, value)


def _tell_list(value: list[Any], depth: int) -> bytes:
    if depth >= MAX_DEPTH:
        return _tell_opaque("list")
    # bytes() would take what only looks like an int, True for one, so the types come first.
    if _are_all_ints(map(type, value)):
        try:
            octets = bytes(value)
        except ValueError:
            pass
        else:
            return _pack_tagged_size(_OCTETS, len(octets)) + octets
    values = tuple(value)  # another thread may be changing the list
    return _pack_tagged_size(_LIST, len(values)) + _tell_values(values, depth + 1)


def _tell_tuple(value: tuple[Any, ...], depth: int) -> bytes:
    if depth >= MAX_DEPTH:
        return _tell_opaque("tuple")
    return _pack_tagged_size(_TUPLE, len(value)) + _tell_values(value, depth + 1)


def _tell_dict(value: dict[Any, Any], depth: int) -> bytes:
    items = tuple(value.items())
    if depth >= MAX_DEPTH or not all(type(key) is str for key, _ in items):
        return _tell_opaque("dict")
    flat = (part for item in items for part in item)
    return _pack_tagged_size(_DICT, len(items)) + _tell_values(flat, depth + 1)


def _tell_other(value: Any, depth: int) -> bytes:
    for base, plain in _PLAIN:
        if issubclass(type(value), base):  # isinstance would believe a proxy
            return _tell(plain(value), depth)
    return _tell_opaque(_name_of(type(value)))


def _tell_opaque(name: str) -> bytes:
    return _sized(_OPAQUE, name[:MAX_NAME].encode("utf-8", "surrogatepass"))


def _sized(tag: int, data: bytes) -> bytes:
    if len(data) > MAX_BODY:
        _refuse_length()
    return _pack_tagged_size(tag, len(data)) + data


_TELLERS: dict[type, Callable[[Any, int], bytes]] = {
    type(None): _tell_atom,
    bool: _tell_atom,
    int: _tell_int,
    float: _tell_float,
    str: _tell_text,
    bytes: _tell_bytes,
    list: _tell_list,
    tuple: _tell_tuple,
    dict: _tell_dict,
}

# What C code sees of an object of a subclass, whatever the subclass makes of it.
_PLAIN: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (str, str.__str__),
    (bytes, lambda value: bytes.__getitem__(value, slice(None))),
    (list, list.copy),
    (tuple, lambda value: tuple.__getitem__(value, slice(None))),
    (dict, dict.copy),
)


# --- messages to bytes

# The start of a request, by the number of its function.
_REQUESTS = {number: bytes([_REQUEST, number]) for number in range(len(FUNCTIONS))}
_RESULT_START = bytes([_RESULT])


def _frame(body: bytes) -> bytes:
    if len(body) > MAX_BODY:
        _refuse_length()
    return _pack_size(len(body)) + body


def encode_request(number: int, arguments: tuple[Any, ...]) -> bytes:
    """The frame of a Request.

    :param number: of the function.
    :raises WireError: there is no such function, or the arguments are more than a frame holds.
    """
    start = _REQUESTS.get(number)
    if start is None:
        raise WireError("the function is unknown: its number is not in the table")
    return _frame(start + _pack_size(len(arguments)) + _tell_values(arguments, 0))


def encode_result(value: Any) -> bytes:
    """The frame of a Result.

    :raises WireError: the value is more than a frame holds.
    """
    return _frame(_RESULT_START + _tell(value, 0))


def _encode_hello(message: Hello) -> bytes:
    if len(message.key) != KEY_SIZE:
        raise WireError(f"a key has {KEY_SIZE} bytes")
    return _GREETING.pack(_HELLO, message.version, message.key)


def _encode_welcome(message: Welcome) -> bytes:
    if not 0 < message.pid <= _MAX_PID:
        raise WireError("a process has a positive number of 31 bits")
    return _WELCOMING.pack(_WELCOME, message.version, message.pid)


def _encode_raised(message: Raised) -> bytes:
    if message.kind not in RAISABLE:
        raise WireError("the exception is none of those that can be told")
    return bytes([_RAISED]) + _tell_string(message.kind) + _tell_string(message.text)


def _tell_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return _pack_size(len(data)) + data


_MAX_PID = (1 << 31) - 1
_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    Hello: _encode_hello,
    Welcome: _encode_welcome,
    Describe: lambda message: bytes([_DESCRIBE]),
    Raised: _encode_raised,
    Refused: lambda message: bytes([_REFUSED]) + _tell_string(message.text),
}


def encode(message: Message) -> bytes:
    """The frame of a message.

    :raises WireError: it is more than a frame holds, or has a field that it can't have.
    """
    if isinstance(message, Request):
        return encode_request(message.function, message.arguments)
    if isinstance(message, Result):
        return encode_result(message.value)
    encoder = _ENCODERS.get(type(message))
    if encoder is None:
        raise WireError("the message is of an unknown kind")
    try:
        return _frame(encoder(message))
    except struct.error:
        raise WireError("the message has a field that is out of its range") from None


# --- bytes to values; at is where the value starts, behind its tag.  What is too short shows in struct.error where
# numbers are read, in IndexError where a tag or a kind is, and is looked at where slices are.

_Read = tuple[Any, int]  # the value, and where it ended


def _malformed(state: str, body: bytes, at: int) -> WireError:
    return WireError(f"the message is malformed: {state} at byte {at} of {len(body)}")


def _truncated(body: bytes) -> WireError:
    return WireError(f"the message is truncated: it has {len(body)} bytes, and says that it has more")


def _read_values(body: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    (count,) = _unpack_size(body, at)
    at += 4
    if count > len(body) - at:  # a value has at least its tag
        raise _truncated(body)
    values = []
    for _ in range(count):
        value, at = _READERS[body[at]](body, at + 1, depth)
        values.append(value)
    return values, at


def _read_span(body: bytes, at: int) -> tuple[int, int]:
    """Where the bytes begin and end that have their length in front."""
    (size,) = _unpack_size(body, at)
    end = at + 4 + size
    if end > len(body):
        raise _truncated(body)
    return at + 4, end


def _read_int(body: bytes, at: int, _depth: int) -> _Read:
    return _unpack_int64(body, at)[0], at + 8


def _read_long(body: bytes, at: int, _depth: int) -> _Read:
    start, end = _read_span(body, at)
    return int.from_bytes(body[start:end], "little", signed=True), end


def _read_float(body: bytes, at: int, _depth: int) -> _Read:
    return _FLOAT64.unpack_from(body, at)[0], at + 8


def _read_text(body: bytes, at: int, _depth: int) -> tuple[str, int]:
    start, end = _read_span(body, at)
    try:
        return body[start:end].decode("utf-8", "surrogatepass"), end
    except UnicodeDecodeError:
        raise _malformed("there is a text that is not UTF-8", body, at) from None


def _read_bytes(body: bytes, at: int, _depth: int) -> _Read:
    start, end = _read_span(body, at)
    return body[start:end], end


def _read_octets(body: bytes, at: int, depth: int) -> _Read:
    (size,) = _unpack_size(body, at)  # not by _read_span: every answer of a card comes this way
    start = at + 4
    end = start + size
    if end > len(body):
        raise _truncated(body)
    if depth >= MAX_DEPTH:
        raise _too_deep(body, at)
    return [*body[start:end]], end


def _read_list(body: bytes, at: int, depth: int) -> _Read:
    if depth >= MAX_DEPTH:
        raise _too_deep(body, at)
    return _read_values(body, at, depth + 1)


def _read_tuple(body: bytes, at: int, depth: int) -> _Read:
    if depth >= MAX_DEPTH:
        raise _too_deep(body, at)
    values, end = _read_values(body, at, depth + 1)
    return tuple(values), end


def _read_dict(body: bytes, at: int, depth: int) -> _Read:
    if depth >= MAX_DEPTH:
        raise _too_deep(body, at)
    (count,) = _unpack_size(body, at)
    end = at + 4
    result = {}
    for _ in range(count):  # what it claims costs nothing: the body ends first
        if body[end] != _TEXT:
            raise _malformed("there is a key that is no text", body, end)
        key, end = _read_text(body, end + 1, depth)
        result[key], end = _READERS[body[end]](body, end + 1, depth + 1)
    if len(result) != count:
        raise _malformed("there are equal keys in what starts", body, at)
    return result, end


def _read_opaque(body: bytes, at: int, depth: int) -> _Read:
    name, end = _read_text(body, at, depth)
    if len(name) > MAX_NAME:
        raise _malformed("there is a type with an oversized name", body, at)
    try:
        return opaque(name), end
    except ValueError:
        raise _malformed("there is a type with an impossible name", body, at) from None


def _too_deep(body: bytes, at: int) -> WireError:
    return _malformed(f"there is a value that is nested deeper than {MAX_DEPTH}", body, at)


def _read_unknown(body: bytes, at: int, _depth: int) -> _Read:
    raise _malformed("there is an unknown tag", body, at - 1)


_READ: dict[int, Callable[[bytes, int, int], _Read]] = {
    _NONE: lambda body, at, depth: (None, at),
    _TRUE: lambda body, at, depth: (True, at),
    _FALSE: lambda body, at, depth: (False, at),
    _INT: _read_int,
    _LONG: _read_long,
    _FLOAT: _read_float,
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

_new_message = tuple.__new__  # what NamedTuple's own does, at half the price


def _decode_request(body: bytes) -> tuple[Message, int]:
    number = body[1]
    if number not in _REQUESTS:
        raise _malformed("there is an unknown function", body, 1)
    arguments, end = _read_values(body, 2, 0)
    return _new_message(Request, (number, tuple(arguments))), end


def _decode_result(body: bytes) -> tuple[Message, int]:
    value, end = _READERS[body[1]](body, 2, 0)
    return _new_message(Result, (value,)), end


def _decode_hello(body: bytes) -> tuple[Message, int]:
    _, version, key = _GREETING.unpack_from(body)
    return Hello(version, key), _GREETING.size


def _decode_welcome(body: bytes) -> tuple[Message, int]:
    _, version, pid = _WELCOMING.unpack_from(body)
    if not 0 < pid <= _MAX_PID:
        raise _malformed("there is an impossible process", body, 3)
    return Welcome(version, pid), _WELCOMING.size


def _decode_raised(body: bytes) -> tuple[Message, int]:
    kind, at = _read_text(body, 1, 0)
    if kind not in RAISABLE:
        raise _malformed("there is an unknown exception", body, 1)
    text, end = _read_text(body, at, 0)
    return Raised(kind, text), end


def _decode_refused(body: bytes) -> tuple[Message, int]:
    text, end = _read_text(body, 1, 0)
    return Refused(text), end


_DECODERS: dict[int, Callable[[bytes], tuple[Message, int]]] = {
    _HELLO: _decode_hello,
    _WELCOME: _decode_welcome,
    _REQUEST: _decode_request,
    _DESCRIBE: lambda body: (Describe(), 1),
    _RESULT: _decode_result,
    _RAISED: _decode_raised,
    _REFUSED: _decode_refused,
}


def decode(body: Union[bytes, memoryview]) -> Message:
    """The message that a frame carries.

    :param body: of the frame, as :class:`Receiver` gives it.
    :raises WireError: it is no message.
    """
    if len(body) > MAX_BODY:
        raise WireError(f"the message is oversized: its body is longer than {MAX_BODY} bytes")
    if type(body) is not bytes:
        body = bytes(body)
    try:
        decoder = _DECODERS.get(body[0])
        if decoder is None:
            raise WireError("the message is of an unknown kind")
        message, end = decoder(body)
    except (IndexError, struct.error):
        raise _truncated(body) from None
    if end != len(body):
        raise _malformed("there is something behind its end", body, end)
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
        """How many bytes of the frame are known to be missing, 1 at least."""
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
