"""What each function does with an inherited handle, under every policy; the owner's session continues."""

from __future__ import annotations

import os
import pickle
import re
from typing import Any

import calling
import pytest
from conftest import ECHO, IS_VERIFIED, VERIFY, Session
from forking import in_child, start, wait_for
from inherited_calls import INVALID, OK, RESET, TABLE, Row

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core.calls import CALLS
from pcsc_safe.errors import ForkedHandleError, PcscSafeError
from pcsc_safe.policy import Cards, Policy
from pcsc_safe.testing import EchoCard, VirtualPcsc

REESTABLISH = pytest.mark.not_on_macos("policy 'reestablish' has no library there to re-establish anything in")
CASES = [
    *(
        pytest.param(policy, cards, "own" if cards is Cards.RESET else "again", marks=marks)
        for policy, marks in (("auto", ()), ("reestablish", REESTABLISH))
        for cards in Cards
    ),
    *(("raise", cards, "raising") for cards in Cards),
    *(("invalid", cards, "invalid") for cards in Cards),
]


def attempt(row: Row, session: Session) -> Any:
    """Return the call's outcome in a comparable form: "handle" for a handle, the class's name for an error."""
    try:
        result = getattr(safe, row.name)(getattr(session, row.handle), *row.arguments)
    except PcscSafeError as error:
        return type(error).__name__
    if row.name == "SCardConnect" and result[0] == OK:
        assert result[1].owner_pid == os.getpid()
        safe.SCardDisconnect(result[1], safe.SCARD_LEAVE_CARD)
        return [result[0], "handle", result[2]]
    if row.name == "SCardBeginTransaction" and result == OK:
        # pcscd resets the card of a process that ends inside a transaction.
        assert safe.SCardEndTransaction(session.card, safe.SCARD_LEAVE_CARD) == OK
    if row.name == "SCardStatus" and result[0] == OK:
        return [*result[:2], "state", *result[3:]]
    return result


def test_every_function_on_a_handle_has_a_row() -> None:
    """The table has a row for every function that takes a handle."""
    assert sorted(row.name for row in TABLE) == sorted(call.name for call in CALLS.values() if call.takes)


@pytest.mark.parametrize("row", [row for row in TABLE if hasattr(safe, row.name)], ids=lambda row: row.name)
@pytest.mark.parametrize(("policy", "cards", "column"), CASES, ids=lambda value: getattr(value, "value", value))
def test_the_table(session: Session, row: Row, policy: str, cards: Cards, column: str) -> None:
    """Each cell is the function's result. The owner's session and its PIN are untouched (the fixture asserts it)."""

    def child() -> Any:
        pcsc_safe.configure(policy=policy, cards=cards)
        return attempt(row, session)

    assert in_child(child) == getattr(row, column)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy, marks=REESTABLISH if policy is Policy.REESTABLISH else ())
        for policy in Policy
        if policy is not Policy.SHARE
    ],
)
def test_a_child_may_always_begin_afresh(session: Session, policy: Policy) -> None:
    """A context that the child establishes is its own, whatever the policy."""

    def child() -> Any:
        pcsc_safe.configure(policy=policy)
        own = Session()
        own.assert_untouched()
        safe.SCardDisconnect(own.card, safe.SCARD_LEAVE_CARD)
        return safe.SCardReleaseContext(own.context), safe.SCardGetErrorMessage(OK)

    assert in_child(child) == (OK, safe.SCardGetErrorMessage(OK))


def test_settings_are_inherited_and_the_childs_own(session: Session) -> None:
    """The parent's settings hold in the child. The child's settings don't affect the parent."""
    pcsc_safe.configure(policy="invalid")

    def child() -> Any:
        inherited = safe.SCardListReaders(session.context, [])[0]
        pcsc_safe.configure(policy="broker", cards="reconnect")
        return inherited, session.transmit(ECHO)[0], pcsc_safe.settings()[:2]

    assert in_child(child) == (INVALID, OK, (Policy.BROKER, Cards.RECONNECT))
    assert pcsc_safe.settings()[:2] == (Policy.INVALID, Cards.AUTO)


def test_the_environment_counts_until_configure(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """PCSC_SAFE_POLICY sets the policy without a call of configure()."""
    monkeypatch.setenv("PCSC_SAFE_POLICY", "invalid")
    pcsc_safe._core.settings._settings = None  # type: ignore[attr-defined]
    assert in_child(safe.SCardListReaders, session.context, []) == [INVALID, []]


def test_one_context_can_have_settings_of_its_own(session: Session) -> None:
    """A context's own settings hold for it and its cards, in the child too. Other contexts don't change."""
    other = Session()
    assert pcsc_safe.configure(context=session.context, policy="invalid")[:2] == (Policy.INVALID, Cards.AUTO)
    assert pcsc_safe.settings()[:2] == (Policy.AUTO, Cards.AUTO)

    def child() -> Any:
        return session.transmit(ECHO)[0], safe.SCardListReaders(session.context, [])[0], other.transmit(ECHO)[0]

    assert in_child(child) == (INVALID, INVALID, OK)
    pcsc_safe.configure(cards="reset")
    pcsc_safe.configure(context=session.context, cards="reconnect", policy="auto")
    assert in_child(child) == (OK, OK, RESET)
    safe.SCardDisconnect(other.card, safe.SCARD_LEAVE_CARD)
    safe.SCardReleaseContext(other.context)


# Cards.


@pytest.mark.parametrize("cards", Cards)
def test_a_childs_connection_is_a_session_of_its_own(session: Session, cards: Cards) -> None:
    """A child's connection works, after SCardReconnect if ``cards`` is ``reset``."""

    def child() -> list[Any]:
        pcsc_safe.configure(cards=cards)
        if cards is Cards.RESET:
            assert session.transmit(ECHO)[0] == RESET
            assert session.transmit(ECHO)[0] == RESET
            assert safe.SCardReconnect(session.card, safe.SCARD_SHARE_SHARED, 3, safe.SCARD_LEAVE_CARD) == [OK, 2]
        answers = [session.transmit(ECHO), safe.SCardBeginTransaction(session.card)]
        answers += [session.transmit(ECHO), safe.SCardEndTransaction(session.card, safe.SCARD_LEAVE_CARD)]
        return [*answers, safe.SCardDisconnect(session.card, safe.SCARD_LEAVE_CARD), session.transmit(ECHO)]

    echoed = [OK, [1, 2, 3, 0x90, 0x00]]
    assert in_child(child) == [echoed, OK, echoed, OK, OK, [INVALID, []]]


def test_reconnect_honours_initialization(pcsc_stack: VirtualPcsc) -> None:
    """With ``spare_cards=False`` SCARD_RESET_CARD on an inherited handle resets the card; SCARD_LEAVE_CARD doesn't."""
    pcsc_safe.configure(spare_cards=False)
    session = Session()
    virtual = pcsc_stack.readers[0].card
    assert isinstance(virtual, EchoCard)
    before = virtual.resets + virtual.power_ons
    assert in_child(safe.SCardReconnect, session.card, 2, 3, safe.SCARD_LEAVE_CARD) == [OK, 2]
    assert virtual.resets + virtual.power_ons == before
    session.assert_untouched()
    assert in_child(safe.SCardReconnect, session.card, 2, 3, safe.SCARD_RESET_CARD) == [OK, 2]
    assert virtual.resets + virtual.power_ons == before + 1
    assert session.transmit(ECHO)[0] == RESET


class PipedCard(EchoCard):
    """An EchoCard whose reset says so over a pipe, and lasts until something comes over another."""

    def __init__(self) -> None:
        super().__init__()
        (self.reached, self._is_reset), (self._may_end, self.go) = os.pipe(), os.pipe()

    def reset(self) -> None:
        os.write(self._is_reset, b"!")
        os.read(self._may_end, 1)
        super().reset()


@pytest.mark.pcsc(cards=[PipedCard, "echo", "echo", "echo"])  # the third reader is another device
def test_reconnect_takes_its_turn(pcsc_stack: VirtualPcsc) -> None:
    """While a child's first SCardReconnect resets a card, other calls on it wait, and hold up nothing else."""
    pcsc_safe.configure(spare_cards=False, cards=Cards.RESET)
    session, virtual = Session(), pcsc_stack.readers[0].card
    assert isinstance(virtual, PipedCard)

    def child() -> Any:
        other = calling.connect(calling.establish(), pcsc_stack.readers[2].name)
        reconnects = calling.Calling(safe.SCardReconnect, session.card, 2, 3, safe.SCARD_RESET_CARD)
        os.read(virtual.reached, 1)
        waiting = []
        for _ in range(20):
            waiting.append(calling.Calling(safe.SCardStatus, session.card))
            assert calling.Calling(calling.transmit, other, ECHO).answer()[0] == OK
        os.write(virtual.go, b"!")
        return reconnects.answer(), {thread.answer()[0] for thread in waiting}

    assert in_child(child) == ([OK, 2], {OK})


def test_reconnect_honours_share_mode(pcsc_stack: VirtualPcsc) -> None:
    """SCardReconnect refuses an exclusive connection while the parent is connected. Then the handle is invalid."""
    session = Session()

    def child() -> Any:
        return safe.SCardReconnect(session.card, safe.SCARD_SHARE_EXCLUSIVE, 3, safe.SCARD_LEAVE_CARD)

    assert in_child(child) == [safe.SCARD_E_SHARING_VIOLATION, 0]
    assert session.transmit(IS_VERIFIED) == [OK, [1, 0x90, 0x00]]
    safe.SCardDisconnect(session.card, safe.SCARD_LEAVE_CARD)
    assert in_child(child) == [INVALID, 0]


def test_an_exclusive_card_is_not_to_be_had_twice(pcsc_stack: VirtualPcsc) -> None:
    """``cards='reconnect'`` keeps the share mode, so it returns PC/SC's code until the owner has disconnected."""
    pcsc_safe.configure(cards="reconnect")
    session = Session(safe.SCARD_SHARE_EXCLUSIVE)
    tried_end, tried = os.pipe()
    go, go_end = os.pipe()

    def child() -> Any:
        first = session.transmit(ECHO)
        os.write(tried, b".")
        os.read(go, 1)
        return first, session.transmit(ECHO)

    started = start(child)
    os.read(tried_end, 1)
    session.assert_untouched()
    safe.SCardDisconnect(session.card, safe.SCARD_LEAVE_CARD)
    os.write(go_end, b".")
    assert wait_for(started) == ([safe.SCARD_E_SHARING_VIOLATION, []], [OK, [1, 2, 3, 0x90, 0x00]])
    for end in (tried_end, tried, go, go_end):
        os.close(end)


def test_a_transaction_is_not_reconnected(session: Session) -> None:
    """In the owner's transaction ``cards='reconnect'`` returns SCARD_W_RESET_CARD, and the transaction continues."""
    pcsc_safe.configure(cards="reconnect")
    assert safe.SCardBeginTransaction(session.card) == OK

    def child() -> Any:
        first = session.transmit(ECHO)[0]
        return first, safe.SCardEndTransaction(session.card, safe.SCARD_RESET_CARD)

    assert in_child(child) == (RESET, OK)
    assert session.transmit(IS_VERIFIED) == [OK, [1, 0x90, 0x00]]
    assert safe.SCardEndTransaction(session.card, safe.SCARD_LEAVE_CARD) == OK
    assert in_child(session.transmit, ECHO) == [OK, [1, 2, 3, 0x90, 0x00]]


def test_the_child_can_verify_its_own_pin(pcsc_stack: VirtualPcsc) -> None:
    """Parent and children exchange at the same time over their own connections, and each gets its own responses."""
    pcsc_safe.configure(cards="reconnect")
    session = Session()

    def exchange(who: int) -> int:
        session.transmit(VERIFY)
        wrong = 0
        for number in range(300):
            data = [who, number >> 8, number & 255]
            wrong += session.transmit([0x80, 1, 0, 0, 3, *data]) != [OK, [*data, 0x90, 0x00]]
        return wrong

    children = [start(exchange, who) for who in (1, 2, 3)]
    assert exchange(0) == 0
    assert [wait_for(child) for child in children] == [0, 0, 0]


# Errors.


def test_the_error_names_state_and_remedy(session: Session) -> None:
    """Text and fields of the error have the function, the owner, the place and this process."""

    def child() -> Any:
        pcsc_safe.configure(policy="raise")
        with pytest.raises(ForkedHandleError) as caught:
            session.transmit(ECHO)
        error = caught.value
        return (
            os.getpid(),
            str(error),
            (error.function, error.owner_pid, error.pid, error.established_at, error.hresult),
        )

    pid, text, fields = in_child(child)
    place = session.context.established_at
    assert re.search(r"conftest\.py:\d+$", place)
    assert fields == ("SCardTransmit", os.getpid(), pid, place, INVALID)
    assert text == (
        f"SCardTransmit: this card handle's PC/SC context was established by process {os.getpid()} ({place}) and "
        f"this is its forked child {pid}; establish a context in this process, or use policy 'auto'"
    )


@pytest.mark.native  # the exceptions of pyscard load the native library
def test_the_error_is_pyscards_too_and_survives_pickling(session: Session) -> None:
    """Code written for pyscard catches the error. A pickled error keeps all its fields."""
    import smartcard.Exceptions

    def child() -> Any:
        pcsc_safe.configure(policy="raise")
        try:
            safe.SCardListReaders(session.context, [])
        except smartcard.Exceptions.SmartcardException as error:
            return pickle.dumps(error)
        return None

    error = pickle.loads(in_child(child))
    assert isinstance(error, ForkedHandleError)
    assert isinstance(error, PcscSafeError)
    assert (error.function, error.owner_pid, error.hresult) == ("SCardListReaders", os.getpid(), INVALID)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def test_nothing_secret_is_in_an_error(session: Session) -> None:
    """The bytes of a refused APDU are not in the error."""

    def child() -> Any:
        pcsc_safe.configure(policy="raise")
        with pytest.raises(ForkedHandleError) as caught:
            session.transmit([0, 0x20, 0, 0x80, 8, *b"a secret"])
        return str(caught.value), repr(caught.value)

    for text in in_child(child):
        assert "97, 32" not in text
        assert "a secret" not in text
