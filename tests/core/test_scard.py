"""The drop-in: in a single process that never forks, pcsc_safe.scard behaves like smartcard.scard."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rawscard import raw

from pcsc_safe import scard as safe
from pcsc_safe._core.calls import CALLS, Kind
from pcsc_safe.testing import EchoCard, VirtualPcsc

NAMES = [
    name for name in vars(raw) if not name.startswith("_") and not isinstance(getattr(raw, name), types.ModuleType)
]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(raw, name))]


def test_every_public_name_is_exported() -> None:
    """Functions, constants, ``error`` and the module itself as ``scard``, and nothing else, also by ``import *``."""
    namespace: dict[str, Any] = {}
    exec("from pcsc_safe.scard import *", namespace)
    del namespace["__builtins__"]
    assert sorted(namespace) == sorted([*NAMES, "scard"]) == sorted(safe.__all__)
    assert namespace["scard"] is safe


def test_constants_are_the_same_objects() -> None:
    """A constant, and ``error``, is the same object as pyscard's, or an equal one if that is elsewhere."""
    for name in set(NAMES) - set(FUNCTIONS):
        ours, theirs = getattr(safe, name), getattr(raw, name)
        if raw.__name__ == "smartcard.scard":
            assert ours is theirs, name
        else:
            assert ours == theirs or (name, ours.__name__, ours.__mro__[1:]) == ("error", "error", theirs.__mro__[1:])


def test_every_function_that_pyscard_has_is_in_the_table() -> None:
    """The position of the handle is known for each function. A new function of pyscard fails this test."""
    assert sorted(FUNCTIONS) == sorted(name for name in CALLS if hasattr(raw, name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_pyscards_signature(name: str) -> None:
    """Parameter names and docstrings are pyscard's, and a wrong call raises Python's error with the same text."""
    ours, theirs = getattr(safe, name), getattr(raw, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert (ours.__name__, ours.__qualname__, ours.__doc__) == (theirs.__name__, theirs.__qualname__, theirs.__doc__)
    for arguments, keywords in (((), {}), ((1,) * 9, {}), ((), {"nonsense": 1})):
        words = []
        for function in (ours, theirs):
            with pytest.raises(TypeError) as caught:
                function(*arguments, **keywords)
            words.append(str(caught.value))
        assert words[0] == words[1]


@pytest.mark.parametrize("name", [call.name for call in CALLS.values() if call.takes and hasattr(raw, call.name)])
def test_a_failed_answer_has_pyscards_shape(name: str, shared_stack: VirtualPcsc) -> None:
    """A result that pcsc_safe makes up for an inherited handle has the same form as pyscard's.

    In a process that never had a context libpcsclite 2 has not loaded its other half, and fails without setting the
    output parameters: pyscard then returns whatever was in memory.
    """
    hresult, context = raw.SCardEstablishContext(raw.SCARD_SCOPE_SYSTEM)
    assert hresult == raw.SCARD_S_SUCCESS
    assert raw.SCardReleaseContext(context) == raw.SCARD_S_SUCCESS
    arguments: dict[str, list[Any]] = {
        "SCardListReaders": [[]],
        "SCardGetStatusChange": [0, [("reader", 16), ("other", 0, [0x3B, 0])]],
        "SCardConnect": ["reader", 2, 3],
        "SCardReconnect": [2, 3, 0],
        "SCardDisconnect": [0],
        "SCardEndTransaction": [0],
        "SCardTransmit": [2, [0, 0]],
        "SCardControl": [1, [1]],
        "SCardGetAttrib": [1],
        "SCardSetAttrib": [1, [1]],
    }
    parameters = list(inspect.signature(getattr(raw, name)).parameters)
    rest = arguments.get(name, ["name"] * (len(parameters) - 1))
    theirs = getattr(raw, name)(12345, *rest)
    hresult = theirs[0] if isinstance(theirs, list) else theirs
    ours = CALLS[name].failure(hresult, rest)
    if name in ("SCardConnect", "SCardReconnect"):  # pyscard returns what was on the stack there (hazard 11)
        assert ours[:-1] == theirs[:-1]
        assert ours[-1] == 0
    else:
        assert ours == theirs
    assert type(ours) is type(theirs)


def test_a_failed_answer_holds_no_memory(shared_stack: VirtualPcsc) -> None:
    """Hazard 11: a call that fails before PC/SC writes anything returns ``[]``, raw pyscard 64 KiB of the heap."""
    _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    _, card, _ = safe.SCardConnect(context, shared_stack.readers[0].name, safe.SCARD_SHARE_SHARED, 3)
    # pyscard's own code, so the one of its build: also on a simulated macOS, where others have 32 bits
    refused = [[safe.SCARD_E_INVALID_PARAMETER, []], [safe.SCARD_E_INVALID_PARAMETER & 0xFFFFFFFF, []]]
    for _ in range(20):
        secret = bytearray(b"KEY=topsecret;" * 4600)
        del secret
        assert safe.SCardTransmit(card, 9, [0, 0]) in refused
        assert safe.SCardTransmit(card, 2, []) in refused
        assert safe.SCardConnect(12345, "reader", 2, 3) == [safe.SCARD_E_INVALID_HANDLE, 0, 0]
        assert safe.SCardReconnect(12345, 2, 3, 0) == [safe.SCARD_E_INVALID_HANDLE, 0]
    safe.SCardReleaseContext(context)


# The differential test: the same random calls on both modules.

HANDLES = st.one_of(
    st.tuples(st.just("context"), st.integers(0, 3)),
    st.tuples(st.just("card"), st.integers(0, 3)),
)
WRONG = st.sampled_from([0, 12345, -1, True, 5.0, None, "handle", b"handle", [], (), 1j])
CONTEXT = st.one_of(st.tuples(st.just("context"), st.integers(0, 3)), HANDLES, WRONG)
CARD = st.one_of(st.tuples(st.just("card"), st.integers(0, 3)), HANDLES, WRONG)
# pyscard 2.3.1 frees an uninitialised pointer when it refuses an argument of these three functions, and may die of
# SIGSEGV, so there is nothing to compare: they get integers only.
INTEGERS = st.one_of(HANDLES, st.sampled_from([12345, -1, True]))
READER_NAME = "Virtual PCD 0 00 00"
READER = st.sampled_from([READER_NAME, "Virtual PCD 0 00 01", "No Such Reader", "", "\0", 7, None])
SMALL = st.sampled_from([0, 1, 2, 3, 4, 99, -1, "1", None, 2**40])
# At least two bytes: vpcd takes a single byte for a change of the card's power, not for a command.
BYTES = st.one_of(
    st.sampled_from(
        [[0x80, 1, 0, 0, 2, 9, 8], [0x80, 0x20, 0, 0, 0], [0x80, 0x30, 0, 0, 0], [], [0, 0], ["a"], "", None]
    ),
    st.lists(st.integers(0, 255), min_size=2, max_size=5),
)
SHARE = st.sampled_from([1, 2, 2, 2, 3, 0, "x"])
PROTOCOLS = st.sampled_from([1, 2, 3, 3, 3, 0, 4, None])
STATES = st.sampled_from([[], [("Virtual PCD 0 00 00", 0)], [("No Such Reader", 0)], [("a", 0), "b"], None, [(1, 2)]])
CALL = st.one_of(
    st.tuples(st.just("SCardEstablishContext"), st.sampled_from([0, 1, 2, 2, 2, 99, -1, "x", None])),
    st.tuples(st.just("SCardConnect"), st.tuples(st.just("context"), st.integers(0, 3)), READER, SHARE, PROTOCOLS),
    st.tuples(st.just("SCardConnect"), CONTEXT, READER, SHARE, PROTOCOLS),
    st.tuples(st.just("SCardListReaders"), INTEGERS, st.sampled_from([[], ["SCard$AllReaders"]])),
    st.tuples(st.just("SCardListReaderGroups"), INTEGERS),
    st.tuples(st.just("SCardGetStatusChange"), CONTEXT, st.sampled_from([0, 1, "x"]), STATES),
    st.tuples(st.just("SCardIsValidContext"), CONTEXT),
    st.tuples(st.just("SCardReleaseContext"), CONTEXT),
    st.tuples(st.just("SCardCancel"), CONTEXT),
    st.tuples(st.just("SCardTransmit"), CARD, st.sampled_from([1, 2, 4, 9, "x"]), BYTES),
    st.tuples(st.just("SCardControl"), CARD, SMALL, BYTES),
    st.tuples(st.just("SCardStatus"), INTEGERS),
    st.tuples(st.just("SCardGetAttrib"), CARD, SMALL),
    st.tuples(st.just("SCardSetAttrib"), CARD, SMALL, BYTES),
    st.tuples(st.just("SCardReconnect"), CARD, SHARE, PROTOCOLS, SMALL),
    st.tuples(st.just("SCardBeginTransaction"), CARD),
    st.tuples(st.just("SCardEndTransaction"), CARD, SMALL),
    st.tuples(st.just("SCardDisconnect"), CARD, SMALL),
    st.tuples(st.just("SCardGetErrorMessage"), st.sampled_from([0, raw.SCARD_E_INVALID_HANDLE, 77, "x"])),
)


class Run:
    """A sequence of calls on one module. A handle is identified by the order in which it was returned."""

    def __init__(self, scard: Any) -> None:
        self.scard = scard
        self.handles: dict[str, list[Any]] = {"context": [], "card": []}
        self.transaction: Any = None

    def call(self, name: str, *arguments: Any) -> Any:
        """Return the call's outcome in a form that is comparable between the modules."""
        if not hasattr(self.scard, name):
            return "not in this pyscard"
        values = [self.value(argument) for argument in arguments]
        if self.transaction is not None and name in ("SCardConnect", "SCardBeginTransaction", "SCardReleaseContext"):
            return "would wait for its own transaction"
        if self.transaction is not None and CALLS[name].takes is Kind.CARD and values[0] is not self.transaction:
            return "would wait for its own transaction"
        try:
            result = getattr(self.scard, name)(*values)
        except (TypeError, ValueError, OverflowError, SystemError, MemoryError) as error:
            # pyscard returns NULL without an exception for the handle 0; the text of Python's error for that varies.
            return type(error), "" if isinstance(error, SystemError) else str(error)
        return self.comparable(name, values, result)

    def value(self, argument: Any) -> Any:
        if isinstance(argument, tuple) and argument and argument[0] in self.handles:
            known = self.handles[argument[0]]
            return known[argument[1] % len(known)] if known else 54321
        return argument

    def comparable(self, name: str, values: list[Any], result: Any) -> Any:
        hresult = result[0] if isinstance(result, list) else result
        if name == "SCardBeginTransaction" and hresult == 0:
            self.transaction = values[0]
        if name in ("SCardEndTransaction", "SCardDisconnect") and hresult == 0:
            self.transaction = None
        if hresult != 0 and CALLS[name].discloses:
            return [hresult, "whatever was there"]
        if name == "SCardEstablishContext" and hresult == 0:
            self.handles["context"].append(result[1])
            return [0, "context"]
        if name == "SCardConnect" and hresult == 0:
            self.handles["card"].append(result[1])
            return [0, "card", result[2]]
        if name == "SCardStatus" and hresult == 0:
            return [*result[:2], "state", *result[3:]]
        if name == "SCardGetStatusChange" and result[1]:
            return [hresult, [(reader, "state", atr) for reader, _, atr in result[1]]]
        return result

    def close(self) -> None:
        if self.transaction is not None:
            self.scard.SCardEndTransaction(self.transaction, self.scard.SCARD_LEAVE_CARD)
        for card in self.handles["card"]:
            self.scard.SCardDisconnect(card, self.scard.SCARD_UNPOWER_CARD)
        for context in self.handles["context"]:
            self.scard.SCardReleaseContext(context)


def outcome(scard: Any, stack: VirtualPcsc, calls: list[tuple[Any, ...]]) -> list[Any]:
    for reader in stack.readers:  # pcscd keeps the negotiated protocol until the card is removed
        reader.remove()
        reader.insert(EchoCard())
    run = Run(scard)
    try:
        first = run.call("SCardEstablishContext", 2), run.call("SCardConnect", ("context", 0), READER_NAME, 2, 3)
        return [*first, *(run.call(*call) for call in calls)]
    finally:
        run.close()


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(CALL, min_size=1, max_size=25))
def test_random_calls_give_the_same_on_both(pcsc_stack: VirtualPcsc, calls: list[tuple[Any, ...]]) -> None:
    """Good and bad handles, wrong types, released contexts, unknown readers: same results, codes and exceptions."""
    assert outcome(safe, pcsc_stack, calls) == outcome(raw, pcsc_stack, calls)


def test_handles_mix_with_plain_integers(shared_stack: VirtualPcsc) -> None:
    """A handle that an application kept as a plain integer works like the proxy."""
    _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    plain = int(context)
    assert type(plain) is int
    _, card, _ = safe.SCardConnect(plain, shared_stack.readers[0].name, safe.SCARD_SHARE_SHARED, 3)
    assert safe.SCardTransmit(int(card), 2, [0x80, 1, 0, 0, 1, 7]) == [0, [7, 0x90, 0]]
    assert safe.SCardDisconnect(int(card), safe.SCARD_LEAVE_CARD) == 0
    assert safe.SCardReleaseContext(plain) == 0
    assert safe.SCardIsValidContext(context) == safe.SCARD_E_INVALID_HANDLE


def test_nothing_is_kept_of_what_was_released(shared_stack: VirtualPcsc) -> None:
    """The registry has the handles that libpcsclite has, and no others."""
    from pcsc_safe._core import handles

    before, clients = (len(handles.contexts), len(handles.cards)), shared_stack.clients()
    for _ in range(50):
        _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
        for _ in range(2):
            safe.SCardConnect(context, shared_stack.readers[1].name, safe.SCARD_SHARE_SHARED, 3)
        safe.SCardReleaseContext(context)
    assert (len(handles.contexts), len(handles.cards)) == before
    shared_stack.wait_for_clients(clients)


@pytest.mark.pcsc(readers=1)
def test_an_extended_apdu_passes_whole(pcsc_stack: VirtualPcsc) -> None:
    """A response of 64 KiB is returned to the last byte."""
    assert isinstance(pcsc_stack.readers[0].card, EchoCard)
    _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    _, card, _ = safe.SCardConnect(context, pcsc_stack.readers[0].name, safe.SCARD_SHARE_SHARED, 3)
    hresult, answer = safe.SCardTransmit(card, 2, [0x80, 0x40, 0xFF, 0xF0])
    assert (hresult, len(answer), answer[-2:]) == (0, 0xFFF0 + 2, [0x90, 0])
    safe.SCardReleaseContext(context)
