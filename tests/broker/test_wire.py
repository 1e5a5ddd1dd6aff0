"""The protocol between a process and its broker: rows of data in both directions, and hostile peers."""

from __future__ import annotations

import enum
import re
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pcsc_safe._core.calls import CALLS
from pcsc_safe.broker import values
from pcsc_safe.broker.wire import (
    FUNCTIONS,
    MAX_BODY,
    MAX_DEPTH,
    NUMBERS,
    RAISABLE,
    VERSION,
    Describe,
    Hello,
    Inherit,
    Message,
    Opaque,
    Raised,
    Receiver,
    Refused,
    Request,
    Result,
    TakeBack,
    Undo,
    Welcome,
    WireError,
    decode,
    encode,
    encode_request,
    encode_result,
    opaque,
)

KEY = bytes(range(16))
TRANSMIT = NUMBERS["SCardTransmit"]
COMMAND = Request(21, (0x12345678, 2, [0x80, 1, 0, 0, 3, 1, 2, 255]))
ANSWER = Result([0, [1, 2, 255, 0x90, 0]])

# fmt: off
MESSAGES: list[tuple[Message, bytes]] = [
    (Hello(1, KEY), b"H" b"i\1\0\0\0\0\0\0\0" b"b\x10\0\0\0" + KEY),
    (Hello(65535, KEY), b"H" b"i\xff\xff\0\0\0\0\0\0" b"b\x10\0\0\0" + KEY),
    (Welcome(1, 4711), b"W" b"i\1\0\0\0\0\0\0\0" b"i\x67\x12\0\0\0\0\0\0"),
    (Describe(), b"D"),
    (Undo(), b"U"),
    (TakeBack(KEY, (7,)), b"B" b"b\x10\0\0\0" + KEY + b"t\1\0\0\0" b"i\7\0\0\0\0\0\0\0"),
    (Request(0, (2,)), b"Q" b"i\0\0\0\0\0\0\0\0" b"t\1\0\0\0" b"i\2\0\0\0\0\0\0\0"),
    (Request(3, ()), b"Q" b"i\3\0\0\0\0\0\0\0" b"t\0\0\0\0"),
    (COMMAND, b"Q" b"i\x15\0\0\0\0\0\0\0" b"t\3\0\0\0" b"i\x78\x56\x34\x12\0\0\0\0" b"i\2\0\0\0\0\0\0\0"
              b"B\x08\0\0\0" b"\x80\1\0\0\3\1\2\xff"),
    (Request(8, (7, -1, [("R", 16, [59])])),
     b"Q" b"i\x08\0\0\0\0\0\0\0" b"t\3\0\0\0" b"i\7\0\0\0\0\0\0\0" b"i\xff\xff\xff\xff\xff\xff\xff\xff"
     b"l\1\0\0\0" b"t\3\0\0\0" b"s\1\0\0\0R" b"i\x10\0\0\0\0\0\0\0" b"B\1\0\0\0\x3b"),
    (ANSWER, b"R" b"l\2\0\0\0" b"i\0\0\0\0\0\0\0\0" b"B\5\0\0\0" b"\1\2\xff\x90\0"),
    (Result(0), b"R" b"i\0\0\0\0\0\0\0\0"),
    (Raised("TypeError", "no \xe9"), b"E" b"s\x09\0\0\0TypeError" b"s\5\0\0\0no \xc3\xa9"),
    (Refused("no"), b"X" b"s\2\0\0\0no"),
    (Inherit(KEY, (7,), True), b"I" b"b\x10\0\0\0" + KEY + b"t\1\0\0\0" b"i\7\0\0\0\0\0\0\0" b"T"),
]
"""Every kind of message with its body."""

VALUES: list[tuple[Any, bytes]] = [
    (None, b"N"),
    (True, b"T"),
    (False, b"F"),
    (1, b"i\1\0\0\0\0\0\0\0"),
    ((1 << 63) - 1, b"i\xff\xff\xff\xff\xff\xff\xff\x7f"),
    (-(1 << 63), b"i\0\0\0\0\0\0\0\x80"),
    (1 << 63, b"I\x09\0\0\0" b"\0\0\0\0\0\0\0\x80\0"),
    (-(1 << 63) - 1, b"I\x09\0\0\0" b"\xff\xff\xff\xff\xff\xff\xff\x7f\xff"),
    (1.5, b"f\0\0\0\0\0\0\xf8\x3f"),
    ("", b"s\0\0\0\0"),
    ("\xe9\u20ac\U0001f600", b"s\x09\0\0\0" b"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"),
    ("\ud83d\ude00\udcff", b"s\x09\0\0\0" b"\xed\xa0\xbd\xed\xb8\x80\xed\xb3\xbf"),
    (b"\0\xff", b"b\2\0\0\0" b"\0\xff"),
    ([], b"B\0\0\0\0"),
    ([0, 255], b"B\2\0\0\0" b"\0\xff"),
    ([256], b"l\1\0\0\0" b"i\0\1\0\0\0\0\0\0"),
    ([-1], b"l\1\0\0\0" b"i\xff\xff\xff\xff\xff\xff\xff\xff"),
    ([1, True], b"l\2\0\0\0" b"i\1\0\0\0\0\0\0\0" b"T"),
    ([1.0], b"l\1\0\0\0" b"f\0\0\0\0\0\0\xf0\x3f"),
    (["1", None], b"l\2\0\0\0" b"s\1\0\0\0001" b"N"),
    ((), b"t\0\0\0\0"),
    ((1, [2]), b"t\2\0\0\0" b"i\1\0\0\0\0\0\0\0" b"B\1\0\0\0\2"),
    ({}, b"d\0\0\0\0"),
    ({"a": 1, "b": {}}, b"d\4\0\0\0" b"s\1\0\0\0a" b"i\1\0\0\0\0\0\0\0" b"s\1\0\0\0b" b"d\0\0\0\0"),
    ([[[[[]]]]], b"l\1\0\0\0" b"l\1\0\0\0" b"l\1\0\0\0" b"l\1\0\0\0" b"B\0\0\0\0"),
]
"""Every kind of value, in its only form."""
# fmt: on

BODIES = [body for _, body in MESSAGES] + [b"R" + told for _, told in VALUES] + [b"Ro\6\0\0\0object"]
ONE = b"i\1\0\0\0\0\0\0\0"
TOO_MANY = struct.pack("<I", 1 << 31)

leaves: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 255)
    | st.floats()
    | st.text(st.characters() | st.sampled_from("\ud800\udbff\udc00\udfff"))
    | st.binary()
    | st.lists(st.integers(0, 255))
)
told = leaves
for _ in range(MAX_DEPTH - 2):
    told = (
        leaves
        | st.lists(told, max_size=4)
        | st.lists(told, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), told, max_size=3)
    )


@pytest.fixture(autouse=True)
def no_opaques_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts like a new process."""
    monkeypatch.setattr(values, "_opaques", {})


def body_of(frame: bytes) -> bytes:
    """Return what follows the length; the length must be right."""
    assert struct.unpack("<I", frame[:4]) == (len(frame) - 4,)
    return frame[4:]


def same(one: Any, other: Any) -> bool:
    """Return whether both are equal, with the same types in all parts; floats are compared bit by bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    return bool(one == other)


def there_and_back(value: Any) -> Any:
    """Return what the other process gets for a value."""
    result = decode(body_of(encode_result(value)))
    assert isinstance(result, Result)
    return result.value


def nested(depth: int, inner: Any = ()) -> Any:
    """Return ``inner`` in so many lists."""
    for _ in range(depth):
        inner = [inner]
    return inner


# --- rows


def test_the_functions_have_their_numbers() -> None:
    """The table is that of version 3. A change needs a new VERSION, or a broker would call another function."""
    assert VERSION == 3
    assert list(CALLS) == list(FUNCTIONS)
    assert dict(enumerate(FUNCTIONS)) == {number: name for name, number in NUMBERS.items()}
    assert FUNCTIONS == (
        "SCardEstablishContext",
        "SCardGetErrorMessage",
        "SCARD_CTL_CODE",
        "SCardIsValidContext",
        "SCardReleaseContext",
        "SCardCancel",
        "SCardListReaders",
        "SCardListReaderGroups",
        "SCardGetStatusChange",
        "SCardConnect",
        "SCardAddReaderToGroup",
        "SCardForgetReader",
        "SCardForgetReaderGroup",
        "SCardIntroduceReader",
        "SCardIntroduceReaderGroup",
        "SCardRemoveReaderFromGroup",
        "SCardReconnect",
        "SCardDisconnect",
        "SCardBeginTransaction",
        "SCardEndTransaction",
        "SCardStatus",
        "SCardTransmit",
        "SCardControl",
        "SCardGetAttrib",
        "SCardSetAttrib",
    )


@pytest.mark.parametrize(("message", "body"), MESSAGES)
def test_a_message_is_these_bytes(message: Message, body: bytes) -> None:
    """The bytes of version 1 are fixed, in both directions: releases with the same version understand each other."""
    assert encode(message) == struct.pack("<I", len(body)) + body
    assert same(decode(body), message)
    assert same(decode(memoryview(body)), message)


@pytest.mark.parametrize(("value", "told"), VALUES)
def test_a_value_is_these_bytes(value: Any, told: bytes) -> None:
    """The bytes of every kind of value are fixed too."""
    assert body_of(encode_result(value)) == b"R" + told
    assert same(decode(b"R" + told), Result(value))


def test_every_exception_that_can_be_told_comes_back() -> None:
    """The PC/SC module's exceptions reach the caller by name."""
    assert set(RAISABLE) >= {"TypeError", "ValueError", "OverflowError", "SystemError", "MemoryError", "RuntimeError"}
    for name, kind in RAISABLE.items():
        raised = Raised(name, "why \udcff")
        assert same(decode(body_of(encode(raised))), raised)
        assert kind.__name__ == name
        assert str(kind(raised.text)) == raised.text


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_a_request_for_each_function(number: int) -> None:
    """There is a request for each function of the table."""
    assert same(decode(body_of(encode_request(number, (1, "a")))), Request(number, (1, "a")))


# --- there and back


@settings(deadline=None)
@given(told)
@example([1 << 63, [1, 2]])
@example([True, [1, 2]])
@example([0, [True]])
@example([0, [256]])
@example([0, (1, 2)])
@example((0, [1, 2]))
@example([0, []])
def test_a_result_comes_back_as_it_was(value: Any) -> None:
    """Values and the types of all their parts survive. The fast path makes the same bytes as the general one."""
    assert encode_result(value) == encode(Result(value))
    assert same(there_and_back(value), value)


@settings(deadline=None)
@given(st.integers(0, len(FUNCTIONS) - 1), st.lists(told, max_size=4).map(tuple))
@example(TRANSMIT, (1, 2, []))
@example(TRANSMIT, (1 << 63, 2, [1]))
@example(TRANSMIT, (1, -1 << 64, [1]))
@example(TRANSMIT, (True, 2, [1]))
@example(TRANSMIT, (1, True, [1]))
@example(TRANSMIT, (1, 2.0, [1]))
@example(TRANSMIT, (1, 2, [False]))
@example(TRANSMIT, (1, 2, (1,)))
@example(TRANSMIT, (1, 2, b"1"))
@example(TRANSMIT, (1, 2, [1], 4))
def test_a_request_comes_back_as_it_was(number: int, arguments: tuple[Any, ...]) -> None:
    """The arguments of a call survive too."""
    frame = encode_request(number, arguments)
    assert frame == encode(Request(number, arguments))
    assert same(decode(body_of(frame)), Request(number, arguments))


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65544])
def test_a_command_of_any_length(size: int) -> None:
    """Short and extended APDUs survive, in both directions."""
    apdu = [index & 255 for index in range(size)]
    assert same(decode(body_of(encode_request(TRANSMIT, (1, 2, apdu)))), Request(TRANSMIT, (1, 2, apdu)))
    assert same(there_and_back([0, apdu]), [0, apdu])


@pytest.mark.parametrize("number", [1 << 64, -1 << 64, 1 << 1000, (1 << 8000) - 1, -(1 << 8000)])
def test_an_int_of_any_size(number: int) -> None:
    """An int of any size survives: the PC/SC module, not the wire, refuses one that is too large."""
    assert there_and_back(number) == number
    assert there_and_back([number, 1]) == [number, 1]


class Number(int):
    """An int, like pcsc_safe's handles, that hides it."""

    def __index__(self) -> int:
        return 99

    __int__ = __index__


class Text(str):
    """A str that hides it."""

    __slots__ = ()

    def __str__(self) -> str:
        return "other"


class Items(list):  # type: ignore[type-arg]
    """A list that looks empty to Python, but not to C."""

    def __iter__(self) -> Any:
        return iter(())


class Colour(enum.IntEnum):
    """An int with a name."""

    RED = 1


class Unhashable(type):
    """A metaclass whose classes can be compared with each other, and so, in Python, not hashed."""

    def __eq__(cls, other: object) -> bool:
        return bool(cls.__dict__ == other.__dict__)


class Incomparable(type):
    """A metaclass whose classes can be compared with no other class."""

    def __eq__(cls, other: object) -> bool:
        raise AttributeError(other)

    def __hash__(cls) -> int:
        raise RuntimeError(cls)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Number(5), 5),
        ([Number(5)], [5]),
        ([0, Number(5)], [0, 5]),
        (Number(1 << 70), 1 << 70),
        (Colour.RED, 1),
        (Text("a"), "a"),
        (Items([1, 2]), [1, 2]),
        ([0, Items([1, 2])], [0, [1, 2]]),
        (type("B", (bytes,), {})(b"ab"), b"ab"),
        (type("T", (tuple,), {})((1, "a")), (1, "a")),
        (type("F", (float,), {})(1.5), 1.5),
        (type("D", (dict,), {})({"a": 1}), {"a": 1}),
        (Unhashable("U", (int,), {})(5), 5),
        (Incomparable("I", (list,), {})([1]), [1]),
    ],
)
def test_a_subclass_goes_as_its_base(value: Any, plain: Any) -> None:
    """The value is what C code sees of the object. No method of a subclass is called."""
    assert same(there_and_back(value), plain)
    request = decode(body_of(encode_request(TRANSMIT, (value, 2, value))))
    assert same(request, Request(TRANSMIT, (plain, 2, plain)))


# --- objects that PC/SC has no use for


class Proxy:
    """Claims to be an int, like a wrapt proxy."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int

    def __index__(self) -> int:
        return 5


class Nameless(type):
    """A metaclass that hides the class's name."""

    __name__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (object(), "object"),
        (bytearray(b"secret"), "bytearray"),
        ({1, 2}, "set"),
        (1j, "complex"),
        (int, "type"),
        (len, "builtin_function_or_method"),
        ({1: 2}, "dict"),
        pytest.param(Proxy(), "Proxy", id="a proxy"),  # its repr would not be the same in each run
        (Nameless("Thing", (), {})(), "Thing"),
        (Unhashable("Thing", (), {})(), "Thing"),
        (Incomparable("Thing", (), {})(), "Thing"),
        (type("Größe", (), {})(), "Größe"),
        (type("", (), {})(), ""),
        (type("x" * 300, (), {})(), "x" * 255),
    ],
)
def test_any_other_object_is_an_opaque_of_that_name(value: Any, name: str) -> None:
    """In a TypeError the PC/SC module names the type of the application's argument, in any position."""
    for got in (
        there_and_back(value),
        there_and_back([0, [value]])[1][0],
        decode(body_of(encode_request(TRANSMIT, (1, value, [value])))).arguments[1],  # type: ignore[union-attr]
    ):
        assert isinstance(got, Opaque)
        assert type(got).__name__ == name
        assert type(got) is not Opaque
    assert encode_result(there_and_back(value)) == encode_result(value)


def test_an_opaque_can_do_nothing() -> None:
    """An opaque object is no int, no sequence and no buffer."""
    thing: Any = opaque("Thing")
    for use in (int, float, iter, len, bytes, "".join):
        with pytest.raises(TypeError):
            use(thing)


def test_the_names_of_opaques_are_bounded() -> None:
    """A peer that invents names fills 256 places. Names already there stay."""
    first = there_and_back(object())
    crowd = [type(f"T{index}", (), {})() for index in range(1000)]
    got = there_and_back(crowd)
    assert [type(thing).__name__ for thing in got[:255]] == [type(thing).__name__ for thing in crowd[:255]]
    assert len({type(thing) for thing in got}) == 256
    assert all(isinstance(thing, Opaque) for thing in got)
    assert len(values._opaques) == 256
    assert there_and_back(object()) is first


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: {"a": x}])
def test_what_is_nested_too_deep_is_opaque(wrap: Any) -> None:
    """MAX_DEPTH nested containers survive. The next one is an opaque object with its type's name."""
    value = wrap(1)
    for _ in range(MAX_DEPTH - 1):
        value = wrap(value)
    assert same(there_and_back(value), value)
    inner = there_and_back(wrap(value))
    for _ in range(MAX_DEPTH):
        inner = inner["a"] if isinstance(inner, dict) else inner[0]
    assert isinstance(inner, Opaque)
    assert type(inner).__name__ == type(value).__name__


def test_a_list_that_contains_itself_ends() -> None:
    """Such a list is sent to the same depth as any other."""
    endless: list[Any] = [1]
    endless.append(endless)
    got = there_and_back(endless)
    for _ in range(MAX_DEPTH - 1):
        assert got[0] == 1
        got = got[1]
    assert type(got[1]).__name__ == "list"
    assert isinstance(got[1], Opaque)


# --- what can't be sent


@pytest.mark.parametrize(
    "message",
    [
        Hello(1, KEY[:-1]),
        TakeBack(KEY[:-1], (7,)),
        TakeBack(KEY, [7]),  # type: ignore[arg-type]
        Inherit(KEY[:-1], (7,), True),
        Inherit(KEY, (7, "8"), True),  # type: ignore[arg-type]
        Inherit(KEY, [7], True),  # type: ignore[arg-type]
        Inherit(KEY, (7,), 1),  # type: ignore[arg-type]
        Hello(1, KEY + b"x"),
        Hello(1, "k" * 16),  # type: ignore[arg-type]
        Hello(0, KEY),
        Hello(65536, KEY),
        Hello(True, KEY),
        Welcome(1, 0),
        Welcome(1, 1 << 31),
        Welcome(-1, 1),
        Request(-1, ()),
        Request(len(FUNCTIONS), ()),
        Request(1, [2]),  # type: ignore[arg-type]
        Raised("KeyboardInterrupt", ""),
        Raised("WireError", ""),
        Raised(["TypeError"], ""),  # type: ignore[arg-type]
        Raised("TypeError", None),  # type: ignore[arg-type]
        Refused(b"no"),  # type: ignore[arg-type]
        "no message",
        (1, KEY),
        None,
    ],
)
def test_a_field_that_cannot_be_is_not_told(message: Any) -> None:
    """encode() refuses what decode() would refuse."""
    with pytest.raises(WireError, match="unknown kind, or has a field that is not allowed"):
        encode(message)


@pytest.mark.parametrize("number", [-1, len(FUNCTIONS), 1 << 64])
def test_an_unknown_function_is_not_told(number: int) -> None:
    """encode_request() refuses an unknown function, on the fast path too."""
    for arguments in ((), (1, 2, [3])):
        with pytest.raises(WireError):
            encode_request(number, arguments)


def a_list_of_lists() -> Any:
    """Return a list that is small here, but has 10**15 values on the wire."""
    value: Any = ["x"] * 1000
    for _ in range(MAX_DEPTH - 1):
        value = [value] * 1000
    return value


@pytest.mark.parametrize(
    "value",
    [
        bytes(MAX_BODY),
        "x" * MAX_BODY,
        "\u20ac" * (MAX_BODY // 2),
        [0] * MAX_BODY,
        [None] * MAX_BODY,
        [bytes(MAX_BODY // 2)] * 3,
        [bytes(MAX_BODY - 10)],
        1 << (8 * MAX_BODY),
        {"a": bytes(MAX_BODY)},
        a_list_of_lists(),
    ],
    ids=["bytes", "ascii", "text", "octets", "list", "parts", "framing", "int", "dict", "lists"],
)
def test_what_is_too_large_is_not_told(value: Any) -> None:
    """A body has at most MAX_BODY bytes, and encoding stops soon after that."""
    for result in (value, [0, value]):
        with pytest.raises(WireError, match="oversized"):
            encode_result(result)
    with pytest.raises(WireError, match="oversized"):
        encode_request(TRANSMIT, (1, 2, value))


def test_the_largest_body() -> None:
    """Exactly MAX_BODY bytes are sent and received. One more byte is refused on both sides."""
    room = MAX_BODY - 1 - 5  # the kind; a tag and a size
    frame = encode_result(bytes(room))
    assert len(frame) == 4 + MAX_BODY
    assert Receiver().feed(frame) == frame[4:]
    assert decode(frame[4:]) == Result(bytes(room))
    with pytest.raises(WireError, match="oversized"):
        encode_result(bytes(room + 1))
    with pytest.raises(WireError, match="oversized"):
        decode(b"Rb" + struct.pack("<I", room + 1) + bytes(room + 1))


def test_the_largest_command() -> None:
    """The fast path fills a frame to the last byte, and refuses one byte more, like the general path."""
    command = [1] * values.MAX_OCTETS
    frame = encode_request(TRANSMIT, (1, 2, command))
    assert len(frame) == 4 + MAX_BODY
    assert frame == encode(Request(TRANSMIT, (1, 2, command)))
    assert same(decode(body_of(frame)), Request(TRANSMIT, (1, 2, command)))
    with pytest.raises(WireError, match="oversized"):
        encode_request(TRANSMIT, (1, 2, [*command, 1]))


# --- hostile peers


@pytest.mark.parametrize("body", BODIES)
def test_a_truncated_message_is_refused(body: bytes) -> None:
    """A message that is cut at any byte is refused, and not taken for a shorter one."""
    for size in range(len(body)):
        with pytest.raises(WireError, match="truncated"):
            decode(body[:size])


@pytest.mark.parametrize("body", BODIES)
def test_trailing_bytes_are_refused(body: bytes) -> None:
    """Bytes after the end of a message are refused."""
    for more in (b"\0", b"N", body):
        with pytest.raises(WireError, match="data after its end"):
            decode(body + more)


@pytest.mark.parametrize("kind", sorted(set(range(256)) - set(b"HWQDIBUREX")))
def test_unknown_kinds_are_refused(kind: int) -> None:
    """Every byte that is no kind is refused."""
    for rest in (b"", ONE, MESSAGES[7][1][1:]):
        with pytest.raises(WireError, match="unknown kind"):
            decode(bytes([kind]) + rest)


@pytest.mark.parametrize("tag", sorted(set(range(256)) - set(b"NTFiIfsbBltdo")))
def test_unknown_tags_are_refused(tag: int) -> None:
    """Every byte that is no tag is refused, at the top and in a list."""
    for before in (b"R", b"Rl\1\0\0\0", b"Rl\2\0\0\0N"):
        with pytest.raises(WireError, match="unknown tag"):
            decode(before + bytes([tag]) + ONE)


@pytest.mark.parametrize(
    "body",
    [
        b"H" + ONE + b"b\x0f\0\0\0" + KEY[1:],
        b"H" + ONE + b"b\x11\0\0\0" + KEY + b"x",
        b"H" + ONE + b"s\x10\0\0\0" + b"k" * 16,
        b"H" + ONE + b"B\x10\0\0\0" + KEY,
        b"HT" + b"b\x10\0\0\0" + KEY,
        b"Hi\0\0\0\0\0\0\0\0" + b"b\x10\0\0\0" + KEY,
        b"Hi\0\0\1\0\0\0\0\0" + b"b\x10\0\0\0" + KEY,
        b"W" + ONE + b"i\0\0\0\0\0\0\0\0",
        b"W" + ONE + b"i\xff\xff\xff\xff\xff\xff\xff\xff",
        b"W" + ONE + b"i\0\0\0\x80\0\0\0\0",
        b"W" + ONE + b"N",
        b"Q" + b"i\x19\0\0\0\0\0\0\0" + b"t\0\0\0\0",
        b"Q" + b"i\xff\xff\xff\xff\xff\xff\xff\xff" + b"t\0\0\0\0",
        b"Q" + b"i\x19\0\0\0\0\0\0\0" + MESSAGES[7][1][10:],
        b"Q" + b"i\xff\xff\xff\xff\xff\xff\xff\xff" + MESSAGES[7][1][10:],
        b"QT" + b"t\0\0\0\0",
        b"Q" + b"s\1\0\0\0a" + b"t\0\0\0\0",
        b"Q" + ONE + b"l\0\0\0\0",
        b"Q" + ONE + b"N",
        b"E" + b"s\x09\0\0\0Exception" + b"s\0\0\0\0",
        b"E" + b"s\x0a\0\0\0SystemExit" + b"s\0\0\0\0",
        b"E" + b"s\0\0\0\0" + b"s\0\0\0\0",
        b"E" + b"l\0\0\0\0" + b"s\0\0\0\0",
        b"E" + b"s\x09\0\0\0TypeError" + b"b\0\0\0\0",
        b"XN",
        b"Xb\2\0\0\0no",
    ],
)
def test_fields_of_the_wrong_type_or_range_are_refused(body: bytes) -> None:
    """A decoded message has the fields of its class."""
    with pytest.raises(
        WireError, match=r"malformed: its fields are not those of (Hello|Welcome|Request|Raised|Refused)"
    ):
        decode(body)


@pytest.mark.parametrize(
    ("told", "state"),
    [
        (b"s\1\0\0\0\xff", "not UTF-8"),
        (b"s\2\0\0\0\xc0\x80", "not UTF-8"),
        (b"s\3\0\0\0\xed\xa0\x20", "not UTF-8"),
        (b"o\1\0\0\0\xff", "invalid name"),
        (b"o\3\0\0\0a\0b", "invalid name"),
        (b"o\3\0\0\0\xed\xa0\x80", "invalid name"),
        (b"o\0\1\0\0" + b"x" * 256, "invalid name"),
        (b"d\2\0\0\0" + ONE + b"N", "invalid keys"),
        (b"d\2\0\0\0" + b"l\0\0\0\0" + b"N", "invalid keys"),
        (b"d\4\0\0\0" + b"s\1\0\0\0aN" * 2, "invalid keys"),
        (b"d\1\0\0\0" + b"s\1\0\0\0a", "invalid keys"),
        (b"l\1\0\0\0" * 5 + b"B\0\0\0\0", "nested deeper than 5"),
        (b"l\1\0\0\0" * 5 + b"l\0\0\0\0", "nested deeper than 5"),
        (b"t\1\0\0\0" * 5 + b"t\0\0\0\0", "nested deeper than 5"),
        (b"l\1\0\0\0" * 5 + b"d\0\0\0\0", "nested deeper than 5"),
        (b"l\1\0\0\0" * 100000 + b"N", "nested deeper than 5"),
        (b"l\2\0\0\0" + ONE + b"B\5\0\0\0" + b"1234", "truncated"),
        (b"l\2\0\0\0" + ONE + b"B\3\0\0\0" + b"1234", "data after its end"),
    ],
)
def test_values_that_cannot_be_are_refused(told: bytes, state: str) -> None:
    """The error says what is wrong with the value."""
    with pytest.raises(WireError, match=state):
        decode(b"R" + told)


def peak_of(body: bytes) -> int:
    """Return how many bytes are allocated at most while it is decoded."""
    decode(BODIES[0])  # allocates everything that is allocated only once
    tracemalloc.start()
    try:
        try:
            message = decode(body)
        except WireError:
            message = None
        del message
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tag", [bytes([tag]) for tag in b"IsbBltdo"])
@pytest.mark.parametrize("rest", [b"", bytes(1000), b"N" * 1000, ONE * 100], ids=["empty", "zeros", "nones", "ints"])
@pytest.mark.parametrize("before", [b"R", b"Rl\2\0\0\0" + ONE, b"Q" + ONE, b"Q" + ONE + b"t\3\0\0\0" + ONE * 2])
def test_a_claim_of_any_size_costs_nothing(tag: bytes, rest: bytes, before: bytes) -> None:
    """A peer that announces 2**31 items or bytes, and sends a few, is refused at the cost of the few."""
    body = before + tag + TOO_MANY + rest
    with pytest.raises(WireError, match="truncated"):
        decode(body)
    assert peak_of(body) < len(body) + (1 << 20)


@pytest.mark.parametrize(
    "item",
    [b"N", ONE, b"B\0\0\0\0", b"t\0\0\0\0", b"d\0\0\0\0", b"f\0\0\0\0\0\0\0\0", b"s\2\0\0\0ab", b"l\1\0\0\0N"],
)
def test_the_cost_is_in_proportion(item: bytes) -> None:
    """The worst body costs less than 64 times its size."""
    count = (1 << 16) // len(item)
    body = b"Rl" + struct.pack("<I", count) + item * count
    assert isinstance(decode(body), Result)
    assert peak_of(body) < 64 * len(body)


def test_made_up_names_cost_no_more() -> None:
    """Invented names cost no more: there isn't a type for each of them."""
    names = b"".join(b"o\4\0\0\0%04d" % index for index in range(7000))
    body = b"Rl" + struct.pack("<I", 7000) + names
    assert isinstance(decode(body), Result)
    values._opaques.clear()
    assert peak_of(body) < 64 * len(body)


def decoded_or_refused(body: bytes) -> None:
    """Decode; a message that is accepted can be encoded again, to the same bytes."""
    try:
        message = decode(body)
    except WireError:
        return
    assert isinstance(message, (Hello, Welcome, Request, Describe, Inherit, TakeBack, Undo, Result, Raised, Refused))
    frame = encode(message)
    assert encode(decode(body_of(frame))) == frame


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_refused(body: bytes) -> None:
    """The result is a message or WireError."""
    decoded_or_refused(body)


pieces = st.sampled_from(
    [bytes([letter]) for letter in b"HWQDREXNTFiIfsbBltdo"]
    + [struct.pack("<I", count) for count in (0, 1, 2, 3, 5, 255, 1 << 31, (1 << 32) - 1)]
    + [told for _, told in VALUES]
    + [ONE, KEY, b"TypeError"]
)


@settings(deadline=None, max_examples=500)
@given(st.sampled_from([b"R", b"Q" + ONE, b"E", b"H", b""]), st.lists(pieces, max_size=12))
def test_pieces_of_messages_are_a_message_or_refused(start: bytes, rest: list[bytes]) -> None:
    """The result is a message or WireError, for bytes that are similar to a message too."""
    decoded_or_refused(start + b"".join(rest))


@pytest.mark.parametrize("body", BODIES)
def test_altered_bytes_are_a_message_or_refused(body: bytes) -> None:
    """The result is a message or WireError, for every message with any byte altered."""
    for at in range(len(body)):
        for byte in (*b"HQRNiIsbBltdo", 0, 1, 2, 5, 127, 128, 255):
            decoded_or_refused(body[:at] + bytes([byte]) + body[at + 1 :])


# --- secrets

SECRET = [201, 202, 203, 204, 205, 206, 207, 208, 209, 210]


@pytest.mark.parametrize(
    "body",
    [
        encode_request(TRANSMIT, (1, 2, SECRET))[4:],
        encode_request(TRANSMIT, (1, 2, SECRET, bytes(SECRET), bytes(SECRET).decode("latin-1")))[4:],
        encode_result([0, SECRET])[4:],
        encode_result((0, {"a": SECRET, "b": bytes(SECRET)}))[4:],
    ],
)
def test_no_byte_of_an_apdu_is_in_an_error(body: bytes) -> None:
    """However a message is damaged, the error has limits and positions, but never its content."""
    assert len(body) < min(SECRET)
    broken = [body[:size] for size in range(len(body))]
    broken += [body + bytes(SECRET)]
    broken += [body[:at] + bytes([byte]) + body[at + 1 :] for at in range(len(body)) for byte in (*b"ilsdoR", 0, 9)]
    broken += [body[:at] + body[at + 1 :] for at in range(len(body))]
    for malformed in broken:
        try:
            decode(malformed)
        except WireError as error:
            text = str(error)
            numbers = {int(number) for number in re.findall(r"\d+", text)}
            assert numbers <= {*range(len(malformed) + 1), MAX_BODY, MAX_DEPTH}, text
            assert not numbers & {*SECRET} or len(malformed) in SECRET, text
            assert re.fullmatch(r"[ -~]+", text)
            assert "\\x" not in text


def test_no_repr_shows_what_a_message_carries() -> None:
    """The repr of a message shows no argument, no result and no key, as in a log or a traceback."""
    secret = "PIN 1234"
    for message in (Request(TRANSMIT, (secret, SECRET)), Result([0, secret, SECRET]), Hello(1, secret.encode() * 2)):
        for text in (repr(message), str(message), f"{message}", repr([message])):
            assert not re.search("1234|201|PIN", text)
    assert repr(Request(TRANSMIT, (SECRET,))) == "Request(function=21, arguments=...)"
    assert repr(Result(SECRET)) == "Result(value=...)"
    assert repr(Hello(1, KEY)) == "Hello(version=1, key=...)"
    assert repr(TakeBack(KEY, (7,))) == "TakeBack(key=..., handles=(7,))"
    assert repr(Inherit(KEY, (7,), True)) == "Inherit(key=..., handles=(7,), keeps=True)"


def test_nothing_too_large_is_in_its_error() -> None:
    """The error for a value that is too large to send doesn't show it."""
    for value in ("1234" * MAX_BODY, [0, b"1234" * MAX_BODY]):
        with pytest.raises(WireError) as caught:
            encode_result(value)
        assert "1234" not in str(caught.value)


# --- frames


def test_a_frame_at_once() -> None:
    """A whole frame gives a body, and the receiver is ready for the next one."""
    receiver = Receiver()
    for message, body in MESSAGES * 2:
        assert receiver.needed() == 4
        assert receiver.feed(encode(message)) == body


@settings(deadline=None)
@given(st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=4), st.lists(st.integers(1, 50), min_size=1))
def test_a_frame_in_chunks(messages: list[tuple[Message, bytes]], sizes: list[int]) -> None:
    """Frames in chunks of any size give the same bodies, each with its last byte and not before."""
    receiver = Receiver()
    turn = 0
    for message, body in messages:
        left = encode(message)
        while left:
            size = min(sizes[turn % len(sizes)], len(left))
            turn += 1
            got = receiver.feed(left[:size])
            left = left[size:]
            assert got == (None if left else body)
            if left:
                assert 1 <= receiver.needed() <= len(left)
        assert type(got) is bytes


@pytest.mark.parametrize(("message", "body"), MESSAGES)
def test_what_is_needed_is_enough(message: Message, body: bytes) -> None:
    """Reading exactly what is needed gives the body in two steps. An empty read changes nothing."""
    frame, receiver = encode(message), Receiver()
    assert receiver.feed(b"") is None
    assert receiver.feed(frame[: receiver.needed()]) is None
    assert receiver.feed(b"") is None
    assert receiver.needed() == len(frame) - 4
    assert receiver.feed(frame[4:]) == body


@pytest.mark.parametrize("length", [0, MAX_BODY + 1, 1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("more", [b"", b"D", bytes(100)])
def test_a_frame_of_a_bad_length_is_refused_at_once(length: int, more: bytes) -> None:
    """The fourth byte of a bad length is refused, in any chunk, and so is everything after it."""
    start = struct.pack("<I", length)
    with pytest.raises(WireError, match=r"empty|oversized"):
        Receiver().feed(start + more)
    if length == MAX_BODY + 1:
        with pytest.raises(WireError, match="oversized"):
            Receiver().feed(start + bytes(length))
    receiver = Receiver()
    assert receiver.feed(start[:3]) is None
    assert receiver.needed() == 1
    for chunk in (start[3:] + more, b"", b"D"):
        with pytest.raises(WireError, match=r"empty|oversized"):
            receiver.feed(chunk)


@pytest.mark.parametrize(("message", "body"), MESSAGES)
def test_nothing_may_follow_a_frame(message: Message, body: bytes) -> None:
    """One request, one reply: data after a frame is refused."""
    frame = encode(message)
    for more in (b"\0", frame):
        with pytest.raises(WireError, match="followed by more data"):
            Receiver().feed(frame + more)
        receiver = Receiver()
        assert receiver.feed(frame[:-1]) is None
        for chunk in (frame[-1:] + more, b""):
            with pytest.raises(WireError, match="followed by more data"):
                receiver.feed(chunk)
        assert receiver.needed() == 1


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=20))
def test_a_receiver_takes_anything(chunks: list[bytes]) -> None:
    """The result is a body, None or WireError."""
    receiver = Receiver()
    for chunk in chunks:
        try:
            body = receiver.feed(chunk)
        except WireError:
            return
        assert body is None or type(body) is bytes
        assert receiver.needed() >= 1
