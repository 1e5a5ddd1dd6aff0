"""The proxies: they behave like integers, know their owner, and are refused in processes that don't share them."""

from __future__ import annotations

import copy
import json
import multiprocessing
import operator
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from conftest import Session
from forking import in_child
from handovers import handing_over
from places import ROOT
from rawscard import raw

from pcsc_safe import scard as safe
from pcsc_safe._core import handles
from pcsc_safe._core.calls import Kind
from pcsc_safe.errors import PcscSafeError
from pcsc_safe.testing import VirtualPcsc


@pytest.fixture(params=["context", "card"])
def handle(request: pytest.FixtureRequest, session: Session) -> Any:
    """Return a context's proxy and a card's, one after the other."""
    return getattr(session, request.param)


def test_it_counts_as_its_integer(handle: Any) -> None:
    """Comparison, hash, conversion, format, arithmetic and isinstance are those of the integer."""
    number = int(handle)
    assert type(number) is int
    assert handle == number
    assert number == handle
    assert (handle != number) is False
    assert handle != number + 1
    assert handle < number + 1
    assert handle >= number
    assert hash(handle) == hash(number)
    assert {number: "found"}[handle] == {handle: "found"}[number] == "found"
    assert isinstance(handle, int)
    assert bool(handle) is True
    assert (str(handle), f"{handle}", f"{handle} {handle:d}", f"{handle:x}", f"{handle:d}", hex(handle)) == (
        str(number),
        str(number),
        f"{number} {number}",
        f"{number:x}",
        f"{number:d}",
        hex(number),
    )
    assert (handle + 1, 1 + handle, handle & 0xFFFF, -handle, handle >> 8) == (
        number + 1,
        1 + number,
        number & 0xFFFF,
        -number,
        number >> 8,
    )
    assert struct.pack("Q", handle) == struct.pack("Q", number)
    assert handle.bit_length() == number.bit_length()


BINARY = ["add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"]


@pytest.mark.parametrize("name", [f"i{name}" for name in BINARY])
def test_an_in_place_operation_leaves_the_handle_alone(handle: Any, name: str) -> None:
    """``handle += 1`` returns a new integer, as for an integer."""
    number = int(handle)
    result = getattr(operator, name)(handle, 2)
    assert type(result) in (int, float)
    assert result == getattr(operator, name)(number, 2)
    assert int(handle) == number


def test_it_knows_its_owner(handle: Any) -> None:
    """A proxy has the owner's PID and the place where its context was established, in a child too."""
    assert handle.owner_pid == os.getpid()
    file, line = handle.established_at.rsplit(":", 1)
    assert Path(file).name == "conftest.py"
    assert "SCardEstablishContext" in Path(file).read_text().splitlines()[int(line) - 1]
    assert in_child(lambda: (handle.owner_pid, handle.established_at)) == (os.getpid(), handle.established_at)


def test_repr_tells_what_it_is(session: Session) -> None:
    """repr() has the kind and the number, a card's context and reader, the owner, and the state in this process."""
    context, card, pid = int(session.context), int(session.card), os.getpid()
    of_card = f"<SCARDHANDLE {card} context={context} reader={session.reader!r} owner_pid={pid} state="
    assert repr(session.context) == f"<SCARDCONTEXT {context} owner_pid={pid} state='open'>"
    assert repr(session.card) == f"{of_card}'open'>"

    def child() -> tuple[str, str, int]:
        before = repr(session.card)
        session.transmit([0x80, 0x01, 0, 0, 0])
        return before, repr(session.card), os.getpid()

    before, after, childs_pid = in_child(child)
    assert before == f"{of_card}'inherited'>"
    assert after == f"{of_card}'open'>".replace(f"owner_pid={pid}", f"owner_pid={childs_pid}")
    _, other = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    safe.SCardReleaseContext(other)
    assert repr(other).endswith("state='released'>")


@pytest.mark.not_on_macos("there handover() needs broker='always'")
@pytest.mark.parametrize("first", ["repr", "owner_pid"])
def test_a_child_that_was_given_it_owns_it(shared_stack: VirtualPcsc, first: str) -> None:
    """In the child of a handover, the first repr() and the first owner_pid already have the child as the owner."""

    def child(own: Session) -> Any:
        if first == "owner_pid":
            return own.context.owner_pid == os.getpid()
        return f"owner_pid={os.getpid()} state='open'" in repr(own.context)

    assert in_child(lambda: in_child(child, Session(), fork=handing_over))


def test_json_and_pyscard_name_the_page(handle: Any) -> None:
    """docs/errors.md has json's error message for a handle. ``int(handle)`` is the remedy."""
    with pytest.raises(TypeError) as caught:
        json.dumps({"handle": handle})
    page = " ".join((ROOT / "docs" / "errors.md").read_text().split())
    assert str(caught.value) in page
    assert json.loads(json.dumps(int(handle))) == handle


def test_a_copy_is_the_handle_itself(handle: Any) -> None:
    """A copy of a proxy is the proxy itself."""
    assert copy.copy(handle) is handle
    assert copy.deepcopy([handle])[0] is handle


def test_it_comes_back_from_a_pickle(handle: Any) -> None:
    """Pickled and loaded in one process, a proxy is the same object, with every protocol."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(handle, protocol)) is handle


def test_a_pickle_gives_a_child_its_own_proxy(session: Session) -> None:
    """A pickle loaded in a forked child is the proxy that the child inherited, whether used before or after."""
    data = pickle.dumps((session.context, session.card))

    def child() -> tuple[bool, bool, int]:
        context, card = pickle.loads(data)
        return context is session.context, card is session.card, safe.SCardListReaders(context, [])[0]

    assert in_child(child) == (True, True, safe.SCARD_S_SUCCESS)


def test_a_childs_handle_is_refused_in_its_parent(session: Session) -> None:
    """A process that did not inherit a context cannot load its pickle, and the error says so."""

    def child() -> bytes:
        _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
        return pickle.dumps(context)

    data = in_child(child)
    with pytest.raises(
        PcscSafeError, match=r"SCARDCONTEXT \d+ of process \d+ is unknown in process \d+: it was released"
    ) as caught:
        pickle.loads(data)
    assert "establish a context here" in str(caught.value)


def _load(data: bytes) -> str:
    try:
        pickle.loads(data)
    except PcscSafeError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_another_family_refuses_a_pickle(session: Session, method: str) -> None:
    """A process that was spawned, or forked by a fork server, can't load a pickle, and the error says so."""
    with multiprocessing.get_context(method).Pool(1) as pool:
        text = pool.apply(_load, (pickle.dumps(session.card),))
    name = f"SCARDHANDLE {int(session.card)} of process {os.getpid()}"
    assert re.match(rf"{name} is unknown in process \d+, which was not forked from that process; ", text)


def test_a_released_handle_is_not_loaded(session: Session) -> None:
    """The pickle of a released handle can't be loaded."""
    _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    data = pickle.dumps(context)
    safe.SCardReleaseContext(context)
    with pytest.raises(PcscSafeError, match="it was released"):
        pickle.loads(data)


@pytest.mark.native
@pytest.mark.parametrize(
    ("name", "which", "arguments"),
    [
        ("SCardListReaderGroups", "context", []),
        ("SCardIsValidContext", "context", []),
        ("SCardReleaseContext", "context", []),
        ("SCardCancel", "context", []),
        ("SCardTransmit", "card", [2, [0, 0, 0, 0]]),
        ("SCardDisconnect", "card", [0]),
    ],
)
def test_the_raw_module_refuses_it(session: Session, name: str, which: str, arguments: list[Any]) -> None:
    """The raw module raises TypeError for a proxy, with the words of the page. The session is untouched."""
    with pytest.raises(TypeError, match=r"Expected a python long as SCARD(CONTEXT|HANDLE)") as caught:
        getattr(raw, name)(getattr(session, which), *arguments)
    page = (ROOT / "docs" / "errors.md").read_text()
    assert str(caught.value).replace("SCARDHANDLE", "SCARDCONTEXT") in page


def test_it_keeps_its_identity_over_a_re_establishment(session: Session) -> None:
    """In the child a proxy is the same object with the same number and hash, though its native context is new."""
    before = (int(session.context), hash(session.context), id(session.context))

    def child() -> tuple[Any, ...]:
        assert safe.SCardListReaders(session.context, [])[0] == safe.SCARD_S_SUCCESS
        record = handles.find(Kind.CONTEXT, session.context)
        assert record is not None
        assert record.real != record.number
        assert session.context.owner_pid == os.getpid()
        return int(session.context), hash(session.context), id(session.context)

    assert in_child(child) == before


def test_a_plain_integer_leads_a_child_to_its_own_context(session: Session) -> None:
    """An application that kept ``int(handle)`` is as safe as one that kept the handle."""
    plain = int(session.context)
    assert in_child(lambda: safe.SCardListReaders(plain, []))[0] == safe.SCARD_S_SUCCESS


def test_a_handle_of_the_other_kind_is_invalid(session: Session) -> None:
    """A card is no valid context and a context no valid card, in the owner and in a child."""
    assert safe.SCardListReaders(session.card, []) == [safe.SCARD_E_INVALID_HANDLE, []]
    assert safe.SCardStatus(session.context) == [safe.SCARD_E_INVALID_HANDLE, "", 0, 0, []]
    assert safe.SCardDisconnect(session.context, 0) == safe.SCARD_E_INVALID_HANDLE
    assert in_child(lambda: safe.SCardReleaseContext(session.card)) == safe.SCARD_E_INVALID_HANDLE
    assert in_child(lambda: safe.SCardDisconnect(session.context, 0)) == safe.SCARD_E_INVALID_HANDLE
