"""The values in the messages between a process and its broker: to bytes, and back, without I/O.

A value is a tag of one byte, and then, depending on the tag: nothing; a number; a size and as many bytes; or a count
and as many values.  Numbers, sizes and counts are little-endian.  Each value has exactly one encoding.

Invariant: any object can be encoded, unless it is too large: as C code sees it, or else as the name of its type.
Whatever bytes arrive, :func:`read` returns values or raises WireError, and uses memory in proportion to what arrived,
not to what it claims.  No text made here contains a byte of a value, because values contain PINs.

At a fork: nothing to do.
"""

import struct
from collections.abc import Iterable
from itertools import repeat
from operator import is_
from typing import Any, Callable, Optional

from .._core.failures import is_ours

__all__ = [
    "INT",
    "LIST",
    "MAX_BODY",
    "MAX_DEPTH",
    "MAX_OCTETS",
    "OCTETS",
    "TUPLE",
    "Opaque",
    "WireError",
    "encode_values",
    "malformed",
    "octets_of",
    "opaque",
    "oversized",
    "read",
    "truncated",
]

MAX_BODY: int = 1 << 20
"""The maximum length of a frame's body, in bytes; the longest APDU is a sixteenth of it."""
MAX_OCTETS: int = MAX_BODY - 38
"""The maximum length of a list of bytes; the rest of the body is for the other arguments of SCardTransmit."""
MAX_DEPTH: int = 5
"""The maximum depth of lists, tuples and dicts in a field; PC/SC's arguments, and the catalogue, need 4."""


class WireError(Exception):
    """A message can't be encoded, or received bytes are not a message; the text contains nothing of it."""


class Opaque:
    """Stands for an object of a type that PC/SC has no use for; its class has the name of that type."""

    __slots__ = ()


_MAX_NAME = 255  # characters of a type's name
_MAX_OPAQUES = 256
_opaques: dict[str, Opaque] = {}
_unnamed = Opaque()


def opaque(name: str) -> Opaque:
    """An object whose type has this name, so that the PC/SC module's TypeError names the type that was passed.

    Only the first 256 names get a class: a class takes a kilobyte, and a message could have a hundred thousand names.

    :raises ValueError: no type can have this name.
    """
    found = _opaques.get(name)
    if found is None:
        if len(_opaques) >= _MAX_OPAQUES:
            return _unnamed
        found = _opaques[name] = type(name, (Opaque,), {"__slots__": ()})()
    return found


# The tags of values.
_NONE, _TRUE, _FALSE, INT, _LONG, _FLOAT, _TEXT, _BYTES, OCTETS, LIST, TUPLE, _DICT, _OPAQUE = b"NTFiIfsbBltdo"

_SIZE = struct.Struct("<I")
_INT64 = struct.Struct("<q")
_FLOAT64 = struct.Struct("<d")
_pack_size, _unpack_size, _unpack_int = _SIZE.pack, _SIZE.unpack_from, _INT64.unpack_from
_pack_tagged_size, _pack_tagged_int = struct.Struct("<BI").pack, struct.Struct("<Bq").pack


# --- values to bytes; depth is how many containers are around the value


def encode_values(values: Iterable[Any], depth: int = 0) -> bytes:
    """The bytes of these values, one after the other.

    :raises WireError: they are more than MAX_BODY.
    """
    parts = []
    remaining = (
        MAX_BODY  # checked here, because a small list that contains another one many times can have a huge encoding
    )
    for value in values:
        part = _ENCODERS.get(id(type(value)), _encode_other)(value, depth)
        remaining -= len(part)
        if remaining < 0:
            raise oversized()
        parts.append(part)
    return b"".join(parts)


def oversized() -> WireError:
    """The error for a message that is too long for a frame."""
    return WireError(f"the message is oversized: its body would be longer than {MAX_BODY} bytes")


def _sized(tag: int, data: bytes) -> bytes:
    if len(data) > MAX_BODY:
        raise oversized()
    return _pack_tagged_size(tag, len(data)) + data


def _encode_int(value: int, _depth: int) -> bytes:
    try:
        return _pack_tagged_int(INT, value)
    except struct.error:
        return _sized(_LONG, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _encode_text(value: str, _depth: int) -> bytes:
    return _sized(_TEXT, value.encode("utf-8", "surrogatepass"))


def octets_of(value: list[Any]) -> Optional[bytes]:
    """The bytes of a list; None if it contains anything but plain ints from 0 to 255, or is too long."""
    # The types are checked first, because bytes() also accepts other objects than ints, such as True.
    octets = tuple(value)  # a copy: another thread may change the list
    if len(octets) > MAX_OCTETS or not all(map(is_, map(type, octets), repeat(int))):
        return None
    try:
        return bytes(octets)
    except ValueError as error:  # an int that is not a byte
        if not is_ours(error):
            raise
        return None


def _encode_list(value: list[Any], depth: int) -> bytes:
    octets = octets_of(value) if depth < MAX_DEPTH else None
    if octets is not None:
        return _pack_tagged_size(OCTETS, len(octets)) + octets
    return _encode_container(LIST, value, tuple(value), depth)  # a copy: another thread may change the list


def _encode_dict(value: dict[Any, Any], depth: int) -> bytes:
    flat = tuple(part for item in list(value.items()) for part in item)
    if not all(type(key) is str for key in flat[::2]):
        return _encode_opaque(value)
    return _encode_container(_DICT, value, flat, depth)


def _encode_container(tag: int, container: Any, values: tuple[Any, ...], depth: int) -> bytes:
    if depth >= MAX_DEPTH:
        return _encode_opaque(container)
    return _pack_tagged_size(tag, len(values)) + encode_values(values, depth + 1)


def _encode_other(value: Any, depth: int) -> bytes:
    for base, plain in _PLAIN.items():
        if issubclass(type(value), base):  # not isinstance, which is also true for a proxy
            return _BY_TYPE[base](plain(value), depth)
    return _encode_opaque(value)


def _encode_opaque(value: Any) -> bytes:
    return _sized(_OPAQUE, _name_of(type(value))[:_MAX_NAME].encode())


_name_of: Callable[[type], str] = type.__dict__[
    "__name__"
].__get__  # the type's real name, even if a metaclass overrides __name__

_BY_TYPE: dict[type, Callable[[Any, int], bytes]] = {
    type(None): lambda value, depth: b"N",
    bool: lambda value, depth: b"T" if value else b"F",
    int: _encode_int,
    float: lambda value, depth: bytes([_FLOAT]) + _FLOAT64.pack(value),
    str: _encode_text,
    bytes: lambda value, depth: _sized(_BYTES, value),
    list: _encode_list,
    tuple: lambda value, depth: _encode_container(TUPLE, value, value, depth),
    dict: _encode_dict,
}

# By the identity of the type, because a metaclass may prevent hashing or comparing it.
_ENCODERS = {id(kind): encoder for kind, encoder in _BY_TYPE.items()}

# The plain value of an object of a subclass, as C code sees it, even if the subclass overrides methods.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    list: list.copy,
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    dict: dict.copy,
}


# --- bytes to values; at is where the value starts, behind its tag.  If a body is too short, reading a number raises
# struct.error, reading a tag raises IndexError, and the length of a slice is checked.

_Read = tuple[Any, int]  # the value, and where it ended


def read(body: bytes, at: int, count: int) -> tuple[list[Any], int]:
    """The values in a body, and where the last one ends.

    :param at: where the first one starts.
    :param count: how many there are.
    :raises WireError: the bytes are malformed.
    """
    try:
        return _read_all(body, at, count, 0)
    except (IndexError, struct.error) as error:
        if not is_ours(error):
            raise
        raise truncated(body) from None


def malformed(state: str, body: bytes, at: int) -> WireError:
    """The error for a malformed body."""
    return WireError(f"the message is malformed: {state} at byte {at} of {len(body)}")


def truncated(body: bytes) -> WireError:
    """The error for a body that ends too early."""
    return WireError(f"the message is truncated: it has {len(body)} bytes, and announces more")


def _too_deep(body: bytes, at: int) -> WireError:
    return malformed(f"a value is nested deeper than {MAX_DEPTH}", body, at)


def _read_all(body: bytes, at: int, count: int, depth: int) -> tuple[list[Any], int]:
    values = []
    for _ in range(count):
        value, at = _READERS[body[at]](body, at + 1, depth)
        values.append(value)
    return values, at


def _read_list(body: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    (count,) = _unpack_size(body, at)
    if count > len(body) - at - 4:  # a value has its tag at least
        raise truncated(body)
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
        raise malformed("a dict has invalid keys", body, at)
    return dict(zip(keys, values)), end


def _read_bytes(body: bytes, at: int, _depth: int) -> tuple[bytes, int]:
    (size,) = _unpack_size(body, at)
    start = at + 4
    end = start + size
    if end > len(body):
        raise truncated(body)
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
        raise malformed("a text is not UTF-8", body, at) from None


def _read_opaque(body: bytes, at: int, depth: int) -> _Read:
    data, end = _read_bytes(body, at, depth)
    try:
        name = data.decode()
    except UnicodeDecodeError:
        name = "\0"
    if len(name) > _MAX_NAME or "\0" in name:
        raise malformed("a type has an invalid name", body, at)
    return opaque(name), end


def _read_unknown(body: bytes, at: int, _depth: int) -> _Read:
    raise malformed("unknown tag", body, at - 1)


_READ: dict[int, Callable[[bytes, int, int], _Read]] = {
    _NONE: lambda body, at, depth: (None, at),
    _TRUE: lambda body, at, depth: (True, at),
    _FALSE: lambda body, at, depth: (False, at),
    INT: lambda body, at, depth: (_unpack_int(body, at)[0], at + 8),
    _LONG: _read_long,
    _FLOAT: lambda body, at, depth: (_FLOAT64.unpack_from(body, at)[0], at + 8),
    _TEXT: _read_text,
    _BYTES: _read_bytes,
    OCTETS: _read_octets,
    LIST: _read_list,
    TUPLE: _read_tuple,
    _DICT: _read_dict,
    _OPAQUE: _read_opaque,
}
_READERS = tuple(_READ.get(tag, _read_unknown) for tag in range(256))
