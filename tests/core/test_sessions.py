"""``cards="auto"``: a child continues an inherited session only if that session still exists."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cforks import c_fork
from conftest import ECHO, IS_VERIFIED, VERIFY, Session
from forking import in_child, start, wait_for

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import handles, sessions
from pcsc_safe._core.calls import ByDefault
from pcsc_safe.testing import EchoCard, VirtualPcsc

REESTABLISH = pytest.mark.not_on_macos("policy 'reestablish' has no library there to re-establish anything in")
OK, RESET = safe.SCARD_S_SUCCESS, safe.SCARD_W_RESET_CARD
LEAVE, SHARED, EXCLUSIVE = safe.SCARD_LEAVE_CARD, safe.SCARD_SHARE_SHARED, safe.SCARD_SHARE_EXCLUSIVE
ECHOED = [OK, [1, 2, 3, 0x90, 0x00]]
VERIFIED = [OK, [1, 0x90, 0x00]]


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """What other tests have left connected would count as a use of the reader."""
    for context in list(handles.contexts):
        safe.SCardReleaseContext(context)
    yield
    for context in list(handles.contexts):
        safe.SCardReleaseContext(context)


@pytest.mark.parametrize("fork", [os.fork, c_fork], ids=["fork", "fork-in-c"])
@pytest.mark.parametrize("policy", ["auto", pytest.param("reestablish", marks=REESTABLISH), "broker"])
def test_the_owner_idles(session: Session, policy: str, fork: Callable[[], int]) -> None:
    """Every generation's first call is made in the owner's session, whose PIN is verified."""

    def child(depth: int) -> list[Any]:
        pcsc_safe.configure(policy=policy)
        answers = [session.transmit(IS_VERIFIED), session.transmit(ECHO)]
        return [*answers, *(in_child(child, depth - 1) if depth else [])]

    assert in_child(child, 2, fork=fork) == [VERIFIED, ECHOED] * 3


def ends_by_disconnecting(session: Session) -> None:
    assert safe.SCardDisconnect(session.card, LEAVE) == OK


def ends_by_releasing(session: Session) -> None:
    assert safe.SCardReleaseContext(session.context) == OK


def ends_by_a_reset(session: Session) -> None:
    assert safe.SCardReconnect(session.card, SHARED, 3, safe.SCARD_RESET_CARD)[0] == OK


def ends_by_a_reset_after_a_transaction(session: Session) -> None:
    assert safe.SCardBeginTransaction(session.card) == OK
    assert safe.SCardEndTransaction(session.card, safe.SCARD_RESET_CARD) == OK


def becomes_exclusive(session: Session) -> None:
    assert safe.SCardReconnect(session.card, EXCLUSIVE, 3, LEAVE)[0] == OK


def begins_a_transaction(session: Session) -> None:
    assert safe.SCardBeginTransaction(session.card) == OK


def closes_all_descriptors(session: Session) -> None:
    number = sessions.descriptor()
    assert number is not None
    os.close(number)


@pytest.mark.parametrize(
    "end",
    [
        ends_by_disconnecting,
        ends_by_releasing,
        ends_by_a_reset,
        ends_by_a_reset_after_a_transaction,
        becomes_exclusive,
        begins_a_transaction,
        closes_all_descriptors,
    ],
    ids=lambda end: end.__name__,
)
def test_it_has_ended_since_the_fork(pcsc_stack: VirtualPcsc, end: Callable[[Session], None]) -> None:
    """The child's call returns SCARD_W_RESET_CARD."""
    go_end, go = os.pipe()

    def child(session: Session) -> Any:
        os.read(go_end, 1)
        return session.transmit(ECHO), session.transmit(ECHO)

    def owner() -> Any:
        session = Session()
        waiting = start(child, session)
        end(session)
        os.write(go, b".")
        return wait_for(waiting)

    assert in_child(owner) == ([RESET, []], [RESET, []])
    os.close(go_end)
    os.close(go)


def test_the_owner_is_killed(pcsc_stack: VirtualPcsc) -> None:
    """A killed owner is noticed although its child has inherited all its descriptors."""
    ready_end, ready = os.pipe()
    go_end, go = os.pipe()
    answer_end, answer = os.pipe()

    def orphan(session: Session) -> None:
        os.write(ready, b".")
        os.read(go_end, 1)
        os.write(answer, repr(session.transmit(ECHO)).encode())

    def owner() -> None:
        start(orphan, Session())
        signal.pause()

    pid, _ = start(owner)
    os.read(ready_end, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.write(go, b".")
    assert os.read(answer_end, 100).decode() == repr([RESET, []])
    for end in (ready_end, ready, go_end, go, answer_end, answer):
        os.close(end)


def test_a_child_drops_the_inherited_handle(pcsc_stack: VirtualPcsc) -> None:
    """The child's own connection to the card still keeps its parent's default from powering the card off."""
    session = Session()
    ready_end, ready = os.pipe()
    go_end, go = os.pipe()

    def child() -> Any:
        own = Session()
        assert safe.SCardDisconnect(session.card, LEAVE) == OK
        os.write(ready, b".")
        os.read(go_end, 1)
        return own.transmit(ECHO)

    waiting = start(child)
    os.read(ready_end, 1)
    assert safe.SCardDisconnect(session.card, ByDefault(safe.SCARD_UNPOWER_CARD)) == OK
    os.write(go, b".")
    assert wait_for(waiting) == ECHOED
    for end in (ready_end, ready, go_end, go):
        os.close(end)


def test_a_transaction_that_ends(session: Session) -> None:
    """During the owner's transaction a child gets SCARD_W_RESET_CARD. After its end the child continues the session."""
    assert safe.SCardBeginTransaction(session.card) == OK
    assert in_child(session.transmit, ECHO) == [RESET, []]
    assert safe.SCardEndTransaction(session.card, LEAVE) == OK
    assert in_child(session.transmit, ECHO) == ECHOED


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("SCardDisconnect", (99,), safe.SCARD_E_INVALID_VALUE),
        ("SCardReconnect", (SHARED, 3, 99), [safe.SCARD_E_INVALID_VALUE, 0]),
        ("SCardEndTransaction", (safe.SCARD_RESET_CARD,), safe.SCARD_E_SHARING_VIOLATION),
    ],
)
def test_a_reset_that_pcscd_refuses(pcsc_stack: VirtualPcsc, name: str, arguments: Any, expected: Any) -> None:
    """The session has not ended: not for its owner, and not for a child, also one that was forked before."""
    session = Session()
    go_end, go = os.pipe()
    other = safe.SCardConnect(session.context, session.reader, SHARED, 3)[1]

    def child() -> Any:
        os.read(go_end, 1)
        return session.transmit(IS_VERIFIED)

    before = start(child)
    assert safe.SCardBeginTransaction(other) == OK
    assert getattr(safe, name)(session.card, *arguments) == expected
    assert safe.SCardEndTransaction(other, LEAVE) == OK
    assert pcsc_safe.reconnecting(session.card, lambda card: session.transmit(IS_VERIFIED), pytest.fail) == VERIFIED
    os.write(go, b"!!")
    assert wait_for(before) == in_child(child) == VERIFIED


def test_a_transaction_that_outlasts_a_reset(session: Session) -> None:
    """A child's call doesn't wait for the transaction."""
    assert safe.SCardBeginTransaction(session.card) == OK
    assert safe.SCardReconnect(session.card, SHARED, 3, safe.SCARD_RESET_CARD)[0] == OK
    assert in_child(session.transmit, ECHO)[0] == RESET
    assert safe.SCardEndTransaction(session.card, LEAVE) == OK
    assert session.transmit(VERIFY)[0] == OK


def test_an_exclusive_hold(shared_stack: VirtualPcsc) -> None:
    """A child never continues a session with an exclusive connection."""
    session = Session(EXCLUSIVE)
    assert in_child(session.transmit, ECHO) == [RESET, []]
    session.assert_untouched()
    session.close()


@pytest.mark.not_on_macos("macOS has no counter of a card's insertions")
def test_the_card_was_changed(pcsc_stack: VirtualPcsc, caplog: pytest.LogCaptureFixture) -> None:
    """If the card was removed and inserted while the owner was idle, the child doesn't continue the session."""
    removed = "the card was removed, or pcscd was restarted or replaced, after process "
    session = Session()
    reader = pcsc_stack.readers[0]
    card = reader.remove()
    reader.insert(card)
    assert in_child(reset_line, session, caplog).startswith(removed)
    assert session.transmit(ECHO)[0] == safe.SCARD_W_REMOVED_CARD
    session.close()


def test_pcscd_was_restarted(pcsc_stack: VirtualPcsc) -> None:
    """The card has lost its power, although its owner doesn't know it."""
    session = Session()
    pcsc_stack.kill()
    pcsc_stack.start()
    assert in_child(session.transmit, ECHO) == [RESET, []]


def test_the_owner_was_told_of_a_reset(pcsc_stack: VirtualPcsc) -> None:
    """After another process's reset, the owner's SCardReconnect begins a session that children can continue."""
    session, other = Session(), Session()
    assert safe.SCardDisconnect(other.card, safe.SCARD_RESET_CARD) == OK
    assert session.transmit(ECHO)[0] == RESET
    assert in_child(session.transmit, ECHO) == [RESET, []]
    assert safe.SCardReconnect(session.card, SHARED, 3, LEAVE)[0] == OK
    assert in_child(session.transmit, ECHO) == ECHOED


@pytest.mark.not_on_macos("the native library's contexts can't be handed over there")
def test_after_a_handover(pcsc_stack: VirtualPcsc) -> None:
    """The child is the owner, and its children continue its session. The parent doesn't."""
    session = Session()

    def fork() -> int:
        with pcsc_safe.handover():
            return os.fork()

    def child() -> Any:
        return [session.transmit(IS_VERIFIED), in_child(session.transmit, IS_VERIFIED)]

    assert in_child(child, fork=fork) == [VERIFIED, VERIFIED]
    assert session.transmit(ECHO) == [RESET, []]


def test_a_child_without_the_descriptor(session: Session) -> None:
    """A child that has closed all descriptors can't check the session, and gets SCARD_W_RESET_CARD."""

    def child() -> Any:
        closes_all_descriptors(session)
        return session.transmit(ECHO)

    assert in_child(child) == [RESET, []]


def test_the_log_says_it_once(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    """The log has one line for each card and process."""

    def child() -> list[str]:
        with caplog.at_level(logging.INFO, "pcsc_safe"):
            for _ in range(3):
                assert session.transmit(ECHO) == ECHOED
        return [record.getMessage() for record in caplog.records if "continues" in record.getMessage()]

    (line,) = in_child(child)
    assert f"continues process {os.getpid()}'s session with the card in {session.reader}" in line


def reset_line(session: Session, caplog: pytest.LogCaptureFixture) -> str:
    """In a child: make a call that returns SCARD_W_RESET_CARD, and return why it does, and the remedy, from the log."""
    caplog.clear()
    assert session.transmit(ECHO) == [RESET, []]
    (line,) = [each.getMessage() for each in caplog.records if getattr(each, "pcsc_event", "") == "reset"]
    return line.partition(f"{os.getpid()} for the card in {session.reader}, because ")[2]


def nothing(session: Session) -> None:
    """Do nothing."""


def closes_and_connects(session: Session) -> None:
    closes_all_descriptors(session)
    Session()  # opens another file


RECONNECT = "call SCardReconnect (pcsc_safe.reconnecting() does)"
EITHER = f"{RECONNECT}, or configure cards='reconnect'"
NOT_ALONE = (
    "use pcsc_safe.handover() or policy 'share', or call SCardReconnect when the other process has disconnected from "
    "the card"
)
KEPT = "OWNER, from which it was forked (cards='reset')"
WAS_BUSY = "OWNER, from which it was forked, was in a transaction when it forked (SCardReconnect waits for its end)"
IS_BUSY = "OWNER, from which it was forked, is in a transaction (SCardReconnect waits for its end)"
HELD_ALONE = "OWNER, from which it was forked, held the card exclusively when it forked"
CLOSED = (
    "the file descriptor with which it checks whether OWNER, from which it was forked, still has its session is not "
    "open (a program that closes all file descriptors must keep those of pcsc_safe.files_to_preserve())"
)
ENDED = (
    "OWNER, from which it was forked, has ended its session, has closed a file descriptor of "
    "pcsc_safe.files_to_preserve(), or is not connected in shared mode (SCardReconnect fails while it holds "
    "the card exclusively)"
)


@pytest.mark.parametrize(
    ("cards", "share_mode", "before", "after", "by_child", "expected"),
    [
        ("reset", SHARED, nothing, nothing, nothing, f"the session is that of {KEPT}: {EITHER}"),
        ("reset", EXCLUSIVE, nothing, nothing, nothing, f"the session is that of {KEPT}: {NOT_ALONE}"),
        ("reset", SHARED, begins_a_transaction, nothing, nothing, f"the session is that of {KEPT}: {RECONNECT}"),
        ("reconnect", SHARED, begins_a_transaction, nothing, nothing, f"{WAS_BUSY}: {RECONNECT}"),
        ("reconnect", SHARED, begins_a_transaction, ends_by_disconnecting, nothing, f"{WAS_BUSY}: {RECONNECT}"),
        ("reconnect", EXCLUSIVE, begins_a_transaction, nothing, nothing, f"{WAS_BUSY}: {NOT_ALONE}"),
        ("auto", SHARED, begins_a_transaction, nothing, nothing, f"{IS_BUSY}: {RECONNECT}"),
        ("auto", SHARED, nothing, begins_a_transaction, nothing, f"{IS_BUSY}: {EITHER}"),
        ("auto", EXCLUSIVE, nothing, nothing, nothing, f"{HELD_ALONE}: {NOT_ALONE}"),
        ("auto", SHARED, nothing, nothing, closes_all_descriptors, f"{CLOSED}: {EITHER}"),
        ("auto", SHARED, nothing, nothing, closes_and_connects, f"{CLOSED}: {EITHER}"),
        ("auto", SHARED, closes_all_descriptors, nothing, nothing, f"{CLOSED}: {EITHER}"),
        ("auto", SHARED, nothing, closes_all_descriptors, nothing, f"{ENDED}: {EITHER}"),
        ("auto", SHARED, nothing, becomes_exclusive, nothing, f"{ENDED}: {EITHER}"),
        ("auto", SHARED, nothing, ends_by_disconnecting, nothing, f"{ENDED}: {EITHER}"),
        ("auto", safe.SCARD_SHARE_DIRECT, nothing, nothing, nothing, f"{ENDED}: {EITHER}"),
    ],
    ids=lambda value: getattr(value, "__name__", "") or ("" if isinstance(value, str) and " " in value else None),
)
def test_the_log_says_why_and_what_helps(
    pcsc_stack: VirtualPcsc,
    caplog: pytest.LogCaptureFixture,
    cards: str,
    share_mode: int,
    before: Callable[[Session], None],
    after: Callable[[Session], None],
    by_child: Callable[[Session], None],
    expected: str,
) -> None:
    """The reason is true, and the remedy helps, whatever the owner does before and after the fork, and its child."""
    go_end, go = os.pipe()

    def child(session: Session) -> str:
        os.read(go_end, 1)
        by_child(session)
        return reset_line(session, caplog)

    def owner() -> str:
        pcsc_safe.configure(cards=cards)
        session = Session()
        assert safe.SCardReconnect(session.card, share_mode, 3, LEAVE)[0] == OK
        before(session)
        waiting = start(child, session)
        after(session)
        os.write(go, b".")
        return str(wait_for(waiting)).replace(f"process {os.getpid()}", "OWNER")

    assert in_child(owner) == expected
    os.close(go_end)
    os.close(go)


def powered(card: Any) -> int:
    assert isinstance(card, EchoCard)
    return int(card.resets + card.power_ons)


@pytest.mark.parametrize("cards", ["auto", "reset", "reconnect"])
def test_a_child_that_reconnects_resets_no_card_of_its_owner(
    session: Session, shared_stack: VirtualPcsc, cards: str
) -> None:
    """A child's SCardReconnect gives it a connection, and doesn't reset a card with which its owner has a session."""
    pcsc_safe.configure(cards=cards)
    before = powered(shared_stack.readers[0].card)
    answer = in_child(safe.SCardReconnect, session.card, SHARED, 3, safe.SCARD_RESET_CARD)
    assert answer == [OK, 2]
    assert powered(shared_stack.readers[0].card) == before


def test_it_does_where_the_owner_has_none(pcsc_stack: VirtualPcsc) -> None:
    """SCardReconnect resets the card if its owner has no session."""
    session = Session()
    go_end, go = os.pipe()

    def child() -> Any:
        os.read(go_end, 1)
        return safe.SCardReconnect(session.card, SHARED, 3, safe.SCARD_RESET_CARD)

    waiting = start(child)
    assert safe.SCardDisconnect(session.card, LEAVE) == OK
    before = powered(pcsc_stack.readers[0].card)
    os.write(go, b".")
    assert wait_for(waiting) == [OK, 2]
    assert powered(pcsc_stack.readers[0].card) == before + 1
    os.close(go_end)
    os.close(go)
