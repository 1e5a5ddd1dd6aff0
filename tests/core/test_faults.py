"""pcscd ends or the card is removed: the codes are raw pyscard's, nothing hangs, and the next context works."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from conftest import ECHO, Session
from forking import in_child, in_program, start, wait_for
from lives import AGAIN, OK, USES, outcome

import pcsc_safe.policy
from pcsc_safe import scard as safe
from pcsc_safe.errors import ForkUnsafeError, SettingsError
from pcsc_safe.testing import EchoCard, VirtualPcsc


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        (["kill"], ["wait", "establish", "list", "release"]),
        (["kill", "start"], ["wait", "establish", "wait", *AGAIN]),
        (["kill"], ["establish", "connect", "wait", *USES, "establish"]),
        (["kill"], ["establish", "connect", "wait", "release", "transmit"]),
        (["kill", "start"], ["establish", "connect", "wait", "transmit", "wait", *USES, *AGAIN]),
        (["restart"], ["establish", "connect", "begin", "wait", *USES, *AGAIN]),
        (["restart"], ["establish", "wait", "valid", "list", "list", "release", *AGAIN]),
        (["pull"], ["establish", "connect", "wait", *USES, *AGAIN]),
        (
            ["pull", "insert"],
            ["establish", "connect", "wait", "transmit", "wait", "transmit", "reconnect", *USES, *AGAIN],
        ),
        (["reset"], ["establish", "connect", "wait", "transmit", "begin", "reconnect", *USES, *AGAIN]),
        (["pull"], ["establish", "wait", "change", "connect", "release"]),
    ],
    ids=lambda value: "-".join(value) if "wait" not in value else "",
)
def test_a_fault_is_what_it_is_on_raw_pyscard(pcsc_stack: VirtualPcsc, changes: list[str], steps: list[str]) -> None:
    """The same faults at the same moments give the same codes as on raw pyscard."""
    reader = pcsc_stack.readers[0]
    make = {
        "kill": pcsc_stack.kill,
        "start": pcsc_stack.start,
        "restart": pcsc_stack.restart,
        "pull": reader.remove,
        "insert": lambda: reader.insert(EchoCard()),
        "reset": reader.reset,
    }
    answers = []
    for module in ("smartcard.scard", "pcsc_safe.scard"):
        answers.append(outcome(pcsc_stack, module, [make[change] for change in changes], steps))
        if not pcsc_stack.pid:
            pcsc_stack.start()
        if reader.card is None:
            reader.insert(EchoCard())
        reader.remove()
        reader.insert(EchoCard())
    assert answers[1] == answers[0]


def test_a_child_meets_a_dead_pcscd(pcsc_stack: VirtualPcsc) -> None:
    """A failed re-establishment returns PC/SC's code. The next use tries again, and succeeds."""
    session = Session()
    tried_end, tried = os.pipe()
    go, go_end = os.pipe()

    def child() -> Any:
        os.read(go, 1)
        down = [
            safe.SCardListReaders(session.context, []),
            safe.SCardIsValidContext(session.context),
            session.transmit(ECHO),
            safe.SCardReconnect(session.card, safe.SCARD_SHARE_SHARED, 3, safe.SCARD_LEAVE_CARD),
        ]
        descriptors = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            safe.SCardListReaders(session.context, [])
        down.append(len(os.listdir("/proc/self/fd")) - descriptors)
        os.write(tried, b".")
        os.read(go, 1)
        up = [
            safe.SCardListReaders(session.context, [])[0],
            safe.SCardReconnect(session.card, safe.SCARD_SHARE_SHARED, 3, safe.SCARD_LEAVE_CARD)[0],
            session.transmit(ECHO),
        ]
        return down, up

    started = start(child)
    pcsc_stack.kill()
    os.write(go_end, b".")
    os.read(tried_end, 1)
    pcsc_stack.start()
    os.write(go_end, b".")
    gone = safe.SCARD_E_NO_SERVICE
    assert wait_for(started) == (
        [[gone, []], gone, [gone, []], [gone, 0], 0],
        [OK, OK, [OK, [1, 2, 3, 0x90, 0x00]]],
    )
    for end in (tried_end, tried, go, go_end):
        os.close(end)


def test_a_wait_ends_when_pcscd_dies(pcsc_stack: VirtualPcsc) -> None:
    """A wait for events ends when pcscd dies, and the process can continue."""
    _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    name = pcsc_stack.readers[0].name
    _, states = safe.SCardGetStatusChange(context, 0, [(name, safe.SCARD_STATE_UNAWARE)])
    answers: list[Any] = []
    known = [(name, states[0][1])]
    waiter = threading.Thread(
        target=lambda: answers.append(safe.SCardGetStatusChange(context, safe.INFINITE, known)), daemon=True
    )
    waiter.start()
    waiter.join(0.2)
    assert not answers
    pcsc_stack.kill()
    waiter.join(20)
    assert answers[0][0] != OK
    pcsc_stack.start()
    session = Session()
    session.assert_untouched()
    session.close()


def test_the_reader_of_an_inherited_card_is_gone(pcsc_stack: VirtualPcsc) -> None:
    """If the card was removed after the fork, the child's reconnection returns PC/SC's code."""
    session = Session()
    go, go_end = os.pipe()

    def child() -> Any:
        os.read(go, 1)
        pcsc_safe.configure(cards="reconnect")
        return session.transmit(ECHO)

    started = start(child)
    pcsc_stack.readers[0].remove()
    os.write(go_end, b".")
    assert wait_for(started) == [safe.SCARD_E_NO_SMARTCARD, []]
    os.close(go)
    os.close(go_end)


def test_settings_that_make_no_sense_are_refused_at_the_first_context(shared_stack: VirtualPcsc) -> None:
    """The first context in the owner, not a later child, raises an error that names the wrong setting."""
    done = in_program(establishes, env={**shared_stack.env, "PCSC_SAFE_CARDS": "keep"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "SettingsError: PCSC_SAFE_CARDS cannot be 'keep'; use one of 'auto', 'reset', 'reconnect'"
    )


def establishes() -> None:
    """Establish a context."""
    safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)


def test_on_macos_a_child_is_refused_clearly(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a broker a child gets a ForkUnsafeError with the remedy, and cleanup succeeds (simulated)."""
    monkeypatch.setattr(pcsc_safe.policy, "PLATFORM", "darwin")
    pcsc_safe.configure(policy="reestablish")

    def child() -> Any:
        told = []
        for call in (
            lambda: safe.SCardListReaders(session.context, []),
            lambda: safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM),
            lambda: safe.SCardReconnect(session.card, 2, 3, 0),
            lambda: session.transmit(ECHO),
        ):
            with pytest.raises(ForkUnsafeError) as caught:
                call()
            told.append((caught.value.function, caught.value.owner_pid, caught.value.pid == os.getpid()))
        answers = [
            safe.SCardIsValidContext(session.context),
            safe.SCardCancel(session.context),
            safe.SCardDisconnect(session.card, safe.SCARD_UNPOWER_CARD),
            safe.SCardReleaseContext(session.context),
        ]
        return told, str(caught.value), answers

    told, text, answers = in_child(child)
    me = os.getpid()
    assert told == [
        ("SCardListReaders", me, True),
        ("SCardEstablishContext", None, True),
        ("SCardReconnect", me, True),
        ("SCardTransmit", me, True),
    ]
    assert "on darwin" in text
    assert "use policy 'auto', which uses a broker here" in text
    assert answers == [safe.SCARD_E_INVALID_HANDLE, OK, OK, OK]
    monkeypatch.undo()
    with pytest.raises(SettingsError):
        pcsc_safe.configure(policy="brokre")
