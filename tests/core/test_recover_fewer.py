"""``recover`` if the new pcscd has fewer readers than the old one, which pcsc-lite 2.5 does not support.

Its client library has one array of readers for the whole process (``readerStates`` in winscard_clnt.c), with as many
elements as pcscd has slots.  The array grows but never shrinks.  With a pcscd that has fewer slots, SCardListReaders,
SCardStatus and SCardGetStatusChange return SCARD_E_UNSUPPORTED_FEATURE in every context of the process.

Each story is a program: a forked child would inherit the test's array.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from brokers import Program, brokers, until
from calling import Calling, waits_on
from conftest import ECHO
from forking import in_child
from places import ROOT

import pcsc_safe
from pcsc_safe.testing import EchoCard, VirtualPcsc, _install, _slots

NEW_READERS = "\\\\?PnP?\\Notification"
READER = "Virtual PCD 0 00 00"
OK, UNSUPPORTED = "0x00000000", "0x8010001F"
FAULT = [UNSUPPORTED, 0, UNSUPPORTED, OK, UNSUPPORTED, OK]
MORE_BEFORE = "pcscd had more readers before it was restarted"
DEFAULTS = {"way": "native", "policy": "auto"}

pytestmark = pytest.mark.not_on_macos("the fault is pcsc-lite's")
NATIVE = pytest.param("native", marks=pytest.mark.native)
by_either_way = pytest.mark.parametrize("way", [NATIVE, "broker"])


class Shrinking:
    """A stack whose pcscd is restarted with a given number of readers.

    :ivar stack: the stack; a program gets its ``env``.
    """

    def __init__(self, stack: VirtualPcsc) -> None:
        self.stack, self._readers = stack, stack.readers

    def restart(self, readers: int) -> None:
        """Start a new pcscd with so many of the readers."""
        self.stack.kill()
        self.stack._count, self.stack.readers = readers, self._readers[:readers]
        self.stack.start()

    def told(self, story: Callable[..., None], *sizes: int, **options: str) -> list[Any]:
        """Return the lines of a program; after each line pcscd is restarted with the next of the sizes."""
        env = {**self.stack.env, "PYTHONPATH": str(ROOT)}
        with Program(story, json.dumps({**DEFAULTS, **options}), env=env) as program:
            assert program.process.stdin is not None
            heard = []
            for size in sizes:
                heard.append(json.loads(program.hear()))
                self.restart(size)
                program.process.stdin.write("restarted\n")
                program.process.stdin.flush()
            heard.append(json.loads(program.hear()))
            program.let_go()
            assert program.ends() == 0, program.errors()
            return heard


@pytest.fixture
def shrinking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shrinking]:
    """Six readers, and a pcscd that has slots for its readers only."""
    if isinstance(found := _install.look(), _install.Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    monkeypatch.setattr(_slots, "wanted", lambda devices: 2 * devices)
    with VirtualPcsc(6, [EchoCard()], activate=False) as stack:
        yield Shrinking(stack)


def version() -> str:
    """Return pcsc-lite's version if its array of readers never shrinks, otherwise an empty string."""
    found = _install.look()
    assert isinstance(found, _install.Installed)
    return found.version if _slots.matter(found) else ""


def say(value: Any) -> bool:
    """Print a line and wait for the reply; return False if there are no more."""
    print(json.dumps(value), flush=True)
    return bool(sys.stdin.readline())


def code(hresult: int) -> str:
    return f"0x{hresult & 0xFFFFFFFF:08X}"


def seen(scard: Any, context: Any) -> list[Any]:
    """Return what each call on a context returns."""
    listed, names = scard.SCardListReaders(context, [])
    changed, _ = scard.SCardGetStatusChange(context, 0, [(READER, scard.SCARD_STATE_UNAWARE)])
    connected, card, _ = scard.SCardConnect(context, READER, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)
    status = scard.SCardStatus(card)[0]
    transmitted, _ = scard.SCardTransmit(card, scard.SCARD_PCI_T1, ECHO)
    scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD)
    return [code(listed), len(names), *map(code, (changed, connected, status, transmitted))]


def all_well(readers: int) -> list[Any]:
    return [OK, readers, OK, OK, OK, OK]


# 1. pcsc-lite's defect.


def on_raw_pyscard(options: str) -> None:
    """Program: a new context for each pcscd."""
    from smartcard import scard

    while True:
        context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)[1]
        answers = seen(scard, context)
        scard.SCardReleaseContext(context)
        if not say(answers):
            break


@pytest.mark.native
def test_pcsc_lites_own_fault(shrinking: Shrinking) -> None:
    """Raw pyscard, no fork: after a restart with fewer readers the calls fail until there are as many again.

    Observed in pcsc-lite 2.5.3, and read in the source of 2.5.0, where the array came, and 2.5.1.  The array of 1.9.9
    and 2.3.3 has a fixed size.
    """
    if not version():
        pytest.skip("before pcsc-lite 2.5 the client library's array of readers has a fixed size")
    heard = shrinking.told(on_raw_pyscard, 2, 4, 6)
    assert heard == [all_well(6), FAULT, FAULT, all_well(6)]


# 2. With recover.


def configure(options: str) -> dict[str, str]:
    """Make the story's settings."""
    given: dict[str, str] = json.loads(options)
    broker = "always" if given["way"] == "broker" else "on-fork"
    pcsc_safe.configure(recover=True, broker=broker, policy=given["policy"])
    return given


def goes_on(options: str) -> None:
    """Program: one context and card for all rounds, and a new context in each."""
    configure(options)
    from pcsc_safe import scard

    context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)[1]
    card = scard.SCardConnect(context, READER, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)[1]
    while True:
        fresh = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)[1]
        reconnected = scard.SCardReconnect(card, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1, 0)[0]
        status, echoed = scard.SCardStatus(card), scard.SCardTransmit(card, scard.SCARD_PCI_T1, ECHO)
        on_card = [code(reconnected), code(status[0]), status[1], echoed[1]]
        answers = [seen(scard, context), seen(scard, fresh), on_card, len(brokers())]
        scard.SCardReleaseContext(fresh)
        if not say(answers):
            break


@by_either_way
def test_a_process_goes_on(shrinking: Shrinking, way: str) -> None:
    """Old and new contexts and cards work with fewer readers, with more, and with fewer again."""
    heard = shrinking.told(goes_on, 2, 6, 2, 4, way=way)
    card = [OK, OK, READER, [1, 2, 3, 0x90, 0x00]]
    assert [answers[:3] for answers in heard] == [[all_well(n), all_well(n), card] for n in (6, 2, 6, 2, 4)]
    # A process that uses PC/SC natively switches to a broker if necessary; one with a broker switches to another.
    expected = [1] * 5 if way == "broker" else [0, 1, 1, 1, 1] if version() else [0] * 5
    assert [answers[3] for answers in heard] == expected


def waits(options: str) -> None:
    """Program: a thread waits for new readers while pcscd is restarted."""
    configure(options)
    from pcsc_safe import scard

    context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)[1]
    wanted = [(READER, scard.SCARD_STATE_PRESENT), (NEW_READERS, 0)]
    answers: list[Any] = []
    while True:
        waiting = Calling(scard.SCardGetStatusChange, context, scard.INFINITE, wanted)
        until(lambda: waits_on(waiting), "it waits")  # noqa: B023
        if not say(answers):
            os._exit(0)
        hresult, states = waiting.answer()
        changed = any(state & scard.SCARD_STATE_CHANGED for _, state, _ in states)
        answers = [code(hresult), changed, *seen(scard, context)]


@by_either_way
def test_a_wait_goes_on(shrinking: Shrinking, way: str) -> None:
    """A wait for new readers ends when pcscd is back, and so does the next one, on the re-established context."""
    heard = shrinking.told(waits, 2, 6, 4, way=way)
    assert heard == [[], *([OK, True, *all_well(readers)] for readers in (2, 6, 4))]


def threads(options: str) -> None:
    """Program: eight threads use one context and one card."""
    configure(options)
    from pcsc_safe import scard

    context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)[1]
    card = scard.SCardConnect(context, READER, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)[1]

    def use() -> list[Any]:
        answers = []
        for _ in range(20):
            listed, names = scard.SCardListReaders(context, [])
            answers.append(("listed", code(listed), len(names)))
            changed, _ = scard.SCardGetStatusChange(context, 1, [(READER, scard.SCARD_STATE_PRESENT)])
            connected, own, _ = scard.SCardConnect(context, READER, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)
            scard.SCardDisconnect(own, scard.SCARD_LEAVE_CARD)
            is_right = changed in (scard.SCARD_S_SUCCESS, scard.SCARD_E_TIMEOUT)  # others may use the card now
            answers.append(("used", is_right or code(changed), code(connected)))
        return answers

    while True:
        callers = [Calling(use) for _ in range(8)]
        answers = sorted({each for caller in callers for each in caller.answer()}, key=str)
        scard.SCardReconnect(card, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1, scard.SCARD_LEAVE_CARD)
        if not say(answers):
            break


@by_either_way
def test_threads_go_on(shrinking: Shrinking, way: str) -> None:
    """One thread re-establishes the context, for all. The card needs SCardReconnect."""
    heard = shrinking.told(threads, 2, 6, 2, way=way)
    assert heard == [[["listed", OK, readers], ["used", True, OK]] for readers in (6, 2, 6, 2)]


def forks(options: str) -> None:
    """Program: one child inherits a context before pcscd is restarted, another one afterwards."""
    configure(options)
    from pcsc_safe import scard

    context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)[1]

    def child(restarts: bool) -> Any:
        before = seen(scard, context)
        if restarts:
            say(before)
            before = seen(scard, context)
        return before

    older = in_child(child, True)
    own = seen(scard, context)
    say([older, own, in_child(child, False)])


WAYS = [pytest.param("native", "auto", marks=pytest.mark.native), ("broker", "auto"), ("broker", "share")]


@pytest.mark.parametrize(("way", "policy"), WAYS)
def test_forked_children_go_on(shrinking: Shrinking, way: str, policy: str) -> None:
    """Children inherit the array, and the connection to the broker that has one."""
    heard = shrinking.told(forks, 2, way=way, policy=policy)
    assert heard == [all_well(6), [all_well(2)] * 3]


def says_so(options: str) -> None:
    """Program: report what is logged."""
    configure(options)
    from pcsc_safe import scard

    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logging.getLogger("pcsc_safe").addHandler(handler)
    logging.getLogger("pcsc_safe").setLevel("INFO")
    context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)[1]
    say([seen(scard, context), [], os.getpid()])
    say([seen(scard, context), lines, os.getpid()])


@pytest.mark.native
def test_what_is_logged(shrinking: Shrinking) -> None:
    """The log says that a broker is used, or replaced by another. It warns if policy 'reestablish' forbids that."""
    if not version():
        pytest.skip("before pcsc-lite 2.5 nothing has to be done")
    (_, (answers, lines, pid)) = shrinking.told(says_so, 2)
    assert answers == all_well(2)
    assert lines[0] == f"INFO process {pid} needs a broker, because {MORE_BEFORE}"
    shrinking.restart(6)
    (_, (answers, lines, pid)) = shrinking.told(says_so, 2, way="broker")
    assert answers == all_well(2)
    left = [line for line in lines if line.endswith(MORE_BEFORE)]
    begins = f"INFO process {pid} starts a new broker, which replaces broker "
    assert [line.startswith(begins) for line in left] == [True], lines
    shrinking.restart(6)
    (_, (answers, lines, pid)) = shrinking.told(says_so, 2, policy="reestablish")
    assert answers == FAULT
    assert lines[0].startswith(f"WARNING process {pid} can't list readers or wait for events, because {MORE_BEFORE}")
