"""PC/SC of a simulated macOS: calls that last, cancels that fail and a service that ends.

Each program runs natively and with ``broker="always"``, where the broker uses this PC/SC.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

import macos
import pytest
from brokers import Program, held_card, module_stack, stack, until
from calling import ENOUGH, HELD, Calling
from conftest import ECHO, VERIFY
from forking import in_child, start, wait_for
from macos import OnMacos

import pcsc_safe
from pcsc_safe.testing import VirtualPcsc

__all__ = ["module_stack", "stack"]

pytestmark = pytest.mark.native  # each program chooses its own way to PC/SC

RAW, SAFE = "smartcard.scard", "pcsc_safe.scard"
NEW_READERS = "\\\\?PnP?\\Notification"
BOUNDED = 3.0  # s; longer than any wait for something that may not come
OK, GONE, RESET = "SCARD_S_SUCCESS", "SCARD_E_NO_SERVICE", "SCARD_W_RESET_CARD"
ways = pytest.mark.parametrize("way", ["native", "broker"])


def environment(stack: VirtualPcsc, on_macos: OnMacos, way: str, **more: str) -> dict[str, str]:
    """Return a program's environment."""
    return {**on_macos(stack), **({"PCSC_SAFE_BROKER": "always"} if way == "broker" else {}), **more}


class Card:
    """A context, and a connection to a reader's card."""

    def __init__(self, module: str, number: int = 0, share_mode: str = "SHARED") -> None:
        self.scard: Any = importlib.import_module(module)
        self.context = self.scard.SCardEstablishContext(self.scard.SCARD_SCOPE_SYSTEM)[1]
        self.reader = self.scard.SCardListReaders(self.context, [])[1][number]
        mode = getattr(self.scard, f"SCARD_SHARE_{share_mode}")
        self.code, self.card, _ = self.scard.SCardConnect(self.context, self.reader, mode, self.scard.SCARD_PROTOCOL_T1)

    def transmit(self, command: list[int], handle: Any = None) -> Any:
        return self.scard.SCardTransmit(handle or self.card, self.scard.SCARD_PCI_T1, command)

    def state(self) -> int:
        states = self.scard.SCardGetStatusChange(self.context, 0, [(self.reader, self.scard.SCARD_STATE_UNAWARE)])[1]
        return int(states[0][1]) & ~int(self.scard.SCARD_STATE_CHANGED)

    def wait(self, known: Optional[int] = None) -> Any:
        """Wait until the reader has another state than this one; return the code, and whether the card is present."""
        known = self.state() if known is None else known
        hresult, states = self.scard.SCardGetStatusChange(self.context, self.scard.INFINITE, [(self.reader, known)])
        return [self.name(hresult), bool(states[0][1] & self.scard.SCARD_STATE_PRESENT)]

    def name(self, hresult: int) -> str:
        names = [name for name in vars(self.scard) if name.startswith(("SCARD_S_", "SCARD_E_", "SCARD_W_", "SCARD_F_"))]
        return next(name for name in sorted(names) if getattr(self.scard, name) == hresult)


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)


def hear(program: Program) -> Any:
    return json.loads(program.hear())


# Forks.


def forks_beside_an_exchange(handle: str) -> None:
    """A program that forks while a thread is in an exchange. It prints if that was quick, and what its child got."""
    pcsc_safe.configure(quiesce_timeout=10)
    card = Card(SAFE)
    exchange = Calling(card.transmit, HELD, Card(RAW).card if handle == "raw" else None)
    say("it begins")
    sys.stdin.read()
    began = time.monotonic()
    child = start(lambda: card.scard.SCardListReaders(card.context, [])[0])
    took = time.monotonic() - began
    say([took < 5, wait_for(child), exchange.is_alive()])
    say(exchange.answer())


@pytest.mark.parametrize(("way", "handle"), [("native", "own"), ("native", "raw"), ("broker", "own")])
def test_a_fork_waits_for_no_exchange(stack: VirtualPcsc, on_macos: OnMacos, way: str, handle: str) -> None:
    """A fork waits for no exchange, not even raw pyscard's: the child can't use the native library anyway."""
    with Program(forks_beside_an_exchange, handle, env=environment(stack, on_macos, way)) as program:
        hear(program)
        assert held_card(stack).reached.wait(ENOUGH)
        program.let_go()
        assert hear(program) == [True, 0, True]
        held_card(stack).go.set()
        assert hear(program) == [0, [7, 8, 9, 0x90, 0x00]]
        assert (program.ends(), program.errors()) == (0, "")


FORKED_FIRST = """
import os, sys
if os.fork() == 0:
    import pcsc_safe.scard as scard
    print([name for name in ("SCARD_S_SUCCESS", "SCARD_E_NO_SERVICE")
           if getattr(scard, name) == scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)[0]], flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(("way", "told"), [("native", GONE), ("broker", OK)])
def test_a_process_that_was_forked_before_the_import(
    stack: VirtualPcsc, on_macos: OnMacos, way: str, told: str
) -> None:
    """A process forked before the import can't be detected as forked, as docs/limits.md says. A broker helps."""
    command = [sys.executable, "-c", FORKED_FIRST]
    done = subprocess.run(
        command, env=environment(stack, on_macos, way), capture_output=True, text=True, timeout=ENOUGH, check=True
    )
    assert done.stdout == f"['{told}']\n"
    assert ("SCardEstablishContext returns SCARD_E_NO_SERVICE" in done.stderr) is (told == "SCARD_E_NO_SERVICE")


# Waits for events.


def cancels(module: str, until_it_ends: str = "") -> None:
    """A program that cancels a wait. It prints whether the cancel returned in time, and what the wait returned."""
    card = Card(module)
    waiting = Calling(card.wait, card.state())
    time.sleep(0.3)  # now it waits, except on a slow machine
    began = time.monotonic()
    cancelled = card.scard.SCardCancel(card.context)
    say([cancelled, time.monotonic() - began < BOUNDED])
    while until_it_ends and waiting.is_alive():
        waiting.join(0.1)
        card.scard.SCardCancel(card.context)
    say(waiting.answer())


@ways
def test_a_cancel_that_does_nothing(stack: VirtualPcsc, on_macos: OnMacos, tmp_path: Path, way: str) -> None:
    """An SCardCancel without effect returns nevertheless. The wait continues, and gets its event, as on raw pyscard."""
    (tmp_path / macos.CANCELS_FAIL).touch()
    env = environment(stack, on_macos, way, **{macos.SWITCHES: str(tmp_path)})
    for module in (RAW, SAFE):
        with Program(cancels, module, env=env) as program:
            assert hear(program) == [0, True]
            card = stack.readers[0].card
            stack.readers[0].remove()
            ended = hear(program)
            assert card is not None
            stack.readers[0].insert(card)
            assert ended[1] is False
            assert module == SAFE or ended[0] == "SCARD_S_SUCCESS"
            assert program.ends() == 0


@ways
def test_a_cancel_that_works(stack: VirtualPcsc, on_macos: OnMacos, way: str) -> None:
    """A working SCardCancel ends the wait."""
    with Program(cancels, SAFE, "until it ends", env=environment(stack, on_macos, way)) as program:
        assert hear(program) == [0, True]
        assert hear(program) == ["SCARD_E_CANCELLED", True]
        assert program.ends() == 0


def dies_in_a_wait() -> None:
    """A program with a child that is killed while it waits for an event and has another card exclusively."""
    pcsc_safe.prestart_broker()
    read_end, write_end = os.pipe()

    def child() -> None:
        card, held = Card(SAFE), Card(SAFE, 2, "EXCLUSIVE")
        Calling(card.wait)
        time.sleep(0.3)
        os.write(write_end, b"1")
        time.sleep(ENOUGH)
        assert held

    pid, _ = start(child)
    os.read(read_end, 1)
    before = Card(SAFE, 2)
    say(before.name(before.code))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    scard, context, reader = before.scard, before.context, before.reader
    connect = [context, reader, scard.SCARD_SHARE_EXCLUSIVE, scard.SCARD_PROTOCOL_T1]
    until(lambda: scard.SCardConnect(*connect)[0] == 0, "the card is free")
    say("the card is free")


def test_a_client_that_dies_in_a_wait_that_cannot_be_cancelled(
    stack: VirtualPcsc, on_macos: OnMacos, tmp_path: Path
) -> None:
    """The dead client's other card becomes free, and the broker continues."""
    (tmp_path / macos.CANCELS_FAIL).touch()
    env = environment(stack, on_macos, "broker", **{macos.SWITCHES: str(tmp_path)})
    with Program(dies_in_a_wait, env=env) as program:
        assert hear(program) == "SCARD_E_SHARING_VIOLATION"
        assert hear(program) == "the card is free"
        assert (program.ends(), program.errors()) == (0, "")


def asks_for_new_readers(module: str) -> None:
    """A program that waits for new readers, with and without a timeout, and once more after the result."""
    card = Card(module)
    scard, known = card.scard, (card.reader, card.state())
    began = time.monotonic()
    told = []
    for timeout, state in ((0, 0), (10_000, 0), (300, scard.SCARD_STATE_UNKNOWN)):
        hresult, states = scard.SCardGetStatusChange(card.context, timeout, [known, (NEW_READERS, state)])
        told.append([card.name(hresult), bool(states[1][1] & scard.SCARD_STATE_UNKNOWN)])
    say([told, time.monotonic() - began < BOUNDED])


@ways
def test_there_is_no_reader_for_new_readers(stack: VirtualPcsc, on_macos: OnMacos, way: str) -> None:
    """A wait for new readers returns "unknown" immediately, and only once, as on raw pyscard."""
    for module in (RAW, SAFE):
        with Program(asks_for_new_readers, module, env=environment(stack, on_macos, way)) as program:
            assert hear(program) == [[[OK, True], [OK, True], ["SCARD_E_TIMEOUT", True]], True]


def waits_while_others_fork(module: str) -> None:
    """A program that waits for events while another thread forks again and again."""
    card = Card(module)
    known = card.state()

    def waits() -> list[Any]:
        removed = card.wait(known)
        say("removed")
        return [removed, card.wait(card.scard.SCARD_STATE_EMPTY)]

    waiting = Calling(waits)
    time.sleep(0.3)  # now it waits, except on a slow machine
    say("it waits")
    while waiting.is_alive():
        in_child(int)
    say([waiting.answer(), card.state() >> 16])


@ways
def test_forks_cost_a_wait_no_event(stack: VirtualPcsc, on_macos: OnMacos, way: str) -> None:
    """A wait beside forks gets both events of a card that is removed and inserted. States have no counter here."""
    with Program(waits_while_others_fork, SAFE, env=environment(stack, on_macos, way)) as program:
        assert hear(program) == "it waits"
        card = stack.readers[0].card
        assert card is not None
        stack.readers[0].remove()
        assert hear(program) == "removed"
        time.sleep(0.2)  # now it waits again, except on a slow machine
        stack.readers[0].insert(card)
        assert hear(program) == [[["SCARD_S_SUCCESS", False], ["SCARD_S_SUCCESS", True]], 0]
        assert (program.ends(), program.errors()) == (0, "")


# The service that ends when idle.


def is_idle(module: str, service: str, recover: str) -> None:
    """A program whose service ends. It prints what it gets afterwards, in itself and in a child.

    :param service: the file that ends the service.
    """
    if recover:
        pcsc_safe.configure(recover=True)
    card = Card(module)
    scard = card.scard
    assert card.transmit(VERIFY)[0] == 0
    with open(service, "a") as file:
        file.write("1")
    codes = [scard.SCardListReaders(card.context, [])[0], card.transmit(ECHO)[0]]
    codes.append(scard.SCardReconnect(card.card, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1, 0)[0])
    codes += [card.transmit(ECHO)[0], Card(module).code]
    say([card.name(code) for code in codes])
    if module == SAFE:
        say(card.name(in_child(lambda: scard.SCardListReaders(card.context, [])[0])))


@pytest.fixture
def service(tmp_path: Path) -> str:
    """Return the path of the file that ends the service."""
    return str(tmp_path / macos.SERVICE_ENDS)


@ways
@pytest.mark.parametrize(
    ("module", "recover", "codes"),
    [
        (RAW, "", [GONE, GONE, GONE, GONE, OK]),
        (SAFE, "", [GONE, GONE, GONE, GONE, OK]),
        (SAFE, "recover", [OK, RESET, OK, OK, OK]),
    ],
    ids=["raw", "off", "recover"],
)
def test_the_service_ends_when_it_is_idle(
    stack: VirtualPcsc, on_macos: OnMacos, service: str, way: str, module: str, recover: str, codes: list[str]
) -> None:
    """As on raw pyscard older contexts are lost for ever. With ``recover`` they are re-established.

    For its application the card is reset, because the session has ended.  A child has its own context anyway.
    """
    env = environment(stack, on_macos, way, **{macos.SWITCHES: str(Path(service).parent)})
    with Program(is_idle, module, service, recover, env=env) as program:
        assert hear(program) == codes
        if module == SAFE:
            assert hear(program) == OK
        assert program.ends() == 0
        assert ("SCARD_W_RESET_CARD" in program.errors()) == bool(recover)
