"""``pcsc_safe.reconnecting()``: work on a card is done within one session, whoever resets the card."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ECHO, IS_VERIFIED, VERIFY, Session
from forking import in_child, start, wait_for

import pcsc_safe
from pcsc_safe import ReconnectError
from pcsc_safe import scard as safe
from pcsc_safe._core import process
from pcsc_safe.testing import VirtualPcsc

OK = safe.SCARD_S_SUCCESS
ECHOED = [OK, [1, 2, 3, 0x90, 0x00]]
VERIFIED = [OK, [1, 0x90, 0x00]]
NO_CARD = {safe.SCARD_W_REMOVED_CARD, safe.SCARD_E_NO_SMARTCARD}


@pytest.fixture
def stack(pcsc_stack: VirtualPcsc) -> VirtualPcsc:
    """A stack whose cards may be reset and removed."""
    return pcsc_stack


@pytest.fixture
def own(stack: VirtualPcsc) -> Iterator[Session]:
    """The test's own session."""
    session = Session()
    yield session
    session.close()


def send(command: list[int]) -> Any:
    """Return work that sends a command."""
    return lambda card: safe.SCardTransmit(card, safe.SCARD_PCI_T1, command)


def verify(card: Any) -> None:
    """Restore the application's session."""
    assert send(VERIFY)(card) == [OK, [0x90, 0x00]]


def test_nothing_is_done_twice_without_a_reset(own: Session) -> None:
    """Without a reset work is called once. Its result and its error are the caller's; on_reset is not called."""
    calls = []
    assert pcsc_safe.reconnecting(own.card, lambda card: calls.append(card) or "done", pytest.fail) == "done"
    assert calls == [own.card]
    with pytest.raises(ZeroDivisionError):
        pcsc_safe.reconnecting(own.card, lambda card: 1 // 0, pytest.fail)


@pytest.mark.parametrize("how", ["returned", "hidden", "raised"])
def test_after_a_reset(own: Session, stack: VirtualPcsc, how: str) -> None:
    """After a reset work is called again in a new session with a verified PIN, whatever work did with the code."""
    stack.readers[0].reset()

    def work(card: Any) -> Any:
        hresult, answer = send(IS_VERIFIED)(card)
        if how == "raised" and hresult != OK:
            raise ValueError("the application's own words")
        return answer if how == "hidden" else [hresult, answer]

    expected = VERIFIED[1] if how == "hidden" else VERIFIED
    assert pcsc_safe.reconnecting(own.card, work, verify) == expected


def test_a_reset_while_the_session_is_restored(own: Session, stack: VirtualPcsc) -> None:
    """A reset during on_reset leads to another attempt."""
    resets = [stack.readers[0].reset] * 2
    resets.pop()()

    def restore(card: Any) -> None:
        if resets:
            resets.pop()()
        verify(card)

    assert pcsc_safe.reconnecting(own.card, send(IS_VERIFIED), restore) == VERIFIED
    assert resets == []


def test_a_card_that_is_always_reset(own: Session, stack: VirtualPcsc) -> None:
    """The number of attempts is limited. The error says what happened, and its cause is what work raised."""
    calls: list[Any] = []

    def work(card: Any) -> None:
        calls.append(card)
        stack.readers[0].reset()
        assert send(ECHO)(card)[0] == OK

    with pytest.raises(ReconnectError, match=r"the card in '.*' was reset in each of 3 attempts; use a ") as caught:
        pcsc_safe.reconnecting(own.card, work)
    assert len(calls) == 3
    assert caught.value.hresult == safe.SCARD_W_RESET_CARD
    assert isinstance(caught.value.__cause__, AssertionError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert send(ECHO)(own.card)[0] == safe.SCARD_W_RESET_CARD


def test_a_wrong_pin_is_sent_once(own: Session, stack: VirtualPcsc) -> None:
    """An exception of on_reset reaches the caller, and on_reset is not called again."""
    stack.readers[0].reset()
    tries = []

    def refused(card: Any) -> None:
        tries.append(card)
        raise PermissionError

    with pytest.raises(PermissionError):
        pcsc_safe.reconnecting(own.card, send(ECHO), refused)
    assert len(tries) == 1


def test_a_card_that_is_gone(own: Session, stack: VirtualPcsc) -> None:
    """The error says that the card can't be connected, and has the code."""
    card = stack.readers[0].remove()
    with pytest.raises(
        ReconnectError, match=r"can't be connected again: .*[^.]; put the card in the reader and try again$"
    ) as caught:
        pcsc_safe.reconnecting(own.card, send(ECHO))
    assert caught.value.hresult in NO_CARD
    assert isinstance(caught.value, pcsc_safe.PcscSafeError)
    stack.readers[0].insert(card)
    assert pcsc_safe.reconnecting(own.card, send(ECHO)) == ECHOED


def refusal(card: Any) -> str:
    """Return the text of the error in a process that can't connect to the card again."""
    with pytest.raises(ReconnectError) as caught:
        pcsc_safe.reconnecting(card, send(ECHO))
    return str(caught.value)


def test_a_card_that_another_process_holds(own: Session) -> None:
    """The error of a child whose parent holds the card exclusively says so, and what helps."""
    assert safe.SCardReconnect(own.card, safe.SCARD_SHARE_EXCLUSIVE, 3, safe.SCARD_LEAVE_CARD)[0] == OK
    assert in_child(refusal, own.card) == (
        f"the card in {own.reader!r} can't be connected again: Sharing violation; an exclusive connection excludes all "
        "others: disconnect the other process, or, if it is the parent, use pcsc_safe.handover() or policy 'share'"
    )


def test_a_pcscd_that_has_ended(own: Session, stack: VirtualPcsc) -> None:
    """The error names no remedy that doesn't fit the code."""
    stack.readers[0].reset()

    def work(card: Any) -> Any:
        answer = send(ECHO)(card)
        stack.kill()
        return answer

    with pytest.raises(ReconnectError, match=r"can't be connected again: .*[^.]; see the return code$"):
        pcsc_safe.reconnecting(own.card, work)
    stack.start()


@pytest.mark.parametrize("cards", ["auto", "reset", "reconnect"])
def test_in_a_child(own: Session, cards: Any) -> None:
    """A child that continues its parent's session restores nothing. Any other child restores on its connection."""

    def child() -> Any:
        pcsc_safe.configure(cards=cards)
        restored: list[Any] = []
        first = pcsc_safe.reconnecting(own.card, send(IS_VERIFIED), lambda card: restored.append(verify(card)))
        return first, len(restored), own.transmit(ECHO)

    assert in_child(child) == (VERIFIED, 1 if cards == "reset" else 0, ECHOED)
    assert own.transmit(IS_VERIFIED) == VERIFIED


def test_in_a_child_that_outlives_the_session(own: Session) -> None:
    """A child restores the session if the owner has disconnected since the fork."""

    def child() -> Any:
        restored: list[Any] = []
        return pcsc_safe.reconnecting(own.card, send(IS_VERIFIED), lambda card: restored.append(verify(card))), restored

    read_end, write_end = os.pipe()

    def waits_for_it() -> Any:
        os.read(read_end, 1)
        return child()

    started = start(waits_for_it)
    assert safe.SCardDisconnect(own.card, safe.SCARD_LEAVE_CARD) == OK
    os.write(write_end, b"1")
    assert wait_for(started) == (VERIFIED, [None])
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("policy", ["raise", "invalid"])
def test_where_the_policy_forbids_it(own: Session, policy: Any) -> None:
    """The result is the policy's. No card is connected behind its back."""

    def child() -> Any:
        pcsc_safe.configure(policy=policy)
        try:
            return pcsc_safe.reconnecting(own.card, send(ECHO), pytest.fail)
        except pcsc_safe.ForkedHandleError as error:
            return error.function

    assert in_child(child) == ("SCardTransmit" if policy == "raise" else [safe.SCARD_E_INVALID_HANDLE, []])


@pytest.mark.parametrize("wrong", [None, 12345, "context", "released"])
def test_what_is_no_card(own: Session, wrong: Any) -> None:
    """Anything but a card is refused before work is called. The error says what to pass."""
    if wrong == "context":
        wrong = own.context
    elif wrong == "released":
        _, wrong, _ = safe.SCardConnect(own.context, own.reader, safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_ANY)
        safe.SCardDisconnect(wrong, safe.SCARD_LEAVE_CARD)
    with pytest.raises(ReconnectError, match=r"is not a card that this process is connected to .* pass what SCardConn"):
        pcsc_safe.reconnecting(wrong, pytest.fail)


def test_a_number_of_attempts_that_makes_no_sense(own: Session) -> None:
    """The number of attempts must be at least 1."""
    with pytest.raises(ValueError, match="attempts must be 1 or more, not 0"):
        pcsc_safe.reconnecting(own.card, pytest.fail, attempts=0)


def test_it_leaves_the_card_as_it_is(own: Session) -> None:
    """In a child, SCardReconnect resets nothing: the parent's PIN stays verified, and the share mode is kept."""

    def child() -> Any:
        pcsc_safe.configure(cards="reset")
        return pcsc_safe.reconnecting(own.card, send(IS_VERIFIED))

    assert in_child(child) == VERIFIED
    assert own.transmit(IS_VERIFIED) == VERIFIED


def test_where_there_is_no_fork(own: Session, stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without records of cards, as on Windows, the return code or the exception's ``hresult`` shows the reset."""
    monkeypatch.setattr(process, "FORKS", False)
    number = int(own.card)
    stack.readers[0].reset()
    assert pcsc_safe.reconnecting(number, send(IS_VERIFIED), verify) == VERIFIED
    stack.readers[0].reset()

    class CardError(Exception):
        hresult = safe.SCARD_W_RESET_CARD

    def work(card: Any) -> Any:
        if send(ECHO)(card)[0] != OK:
            raise CardError
        return "done"

    assert pcsc_safe.reconnecting(number, work, verify) == "done"


def test_it_is_there_before_pyscard() -> None:
    """``from pcsc_safe import reconnecting`` needs no earlier import, and loads no native library."""
    code = "import sys; from pcsc_safe import reconnecting; sys.exit('smartcard' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
