"""The virtual stack: readers, the life of pcscd, several stacks, forks, and cleanup."""

from __future__ import annotations

import glob
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
from interrupts import Alarm
from places import ROOT, TESTS
from smartcard import scard

from pcsc_safe.testing import EchoCard, PcscStackError, VirtualPcsc, _install, _slots, _vpcd, cards
from pcsc_safe.testing._activation import VARIABLE

PRESENT, EMPTY = scard.SCARD_STATE_PRESENT, scard.SCARD_STATE_EMPTY
CLEAN = {**os.environ, "PYTHONPATH": str(ROOT)}  # for programs: this process may have an active stack


def establish() -> Any:
    """A new context."""
    hresult, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_USER)
    assert hresult == scard.SCARD_S_SUCCESS
    return context


def reader_names() -> list[str]:
    """The readers that PC/SC lists."""
    context = establish()
    hresult, names = scard.SCardListReaders(context, [])
    scard.SCardReleaseContext(context)
    assert hresult == scard.SCARD_S_SUCCESS
    return list(names)


def state(context: Any, reader: str) -> int:
    """The state of a reader, from PC/SC."""
    hresult, states = scard.SCardGetStatusChange(context, 0, [(reader, scard.SCARD_STATE_UNAWARE)])
    assert hresult == scard.SCARD_S_SUCCESS
    return int(states[0][1]) & (PRESENT | EMPTY)


def echo(reader: str, *data: int) -> list[int]:
    """Connect, have the card echo some bytes, disconnect."""
    context = establish()
    hresult, card, _ = scard.SCardConnect(context, reader, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_ANY)
    assert hresult == scard.SCARD_S_SUCCESS
    hresult, answer = scard.SCardTransmit(card, scard.SCARD_PCI_T1, [0, 1, 0, 0, len(data), *data])
    assert hresult == scard.SCARD_S_SUCCESS
    scard.SCardReleaseContext(context)
    return list(answer)


def home_of(stack: VirtualPcsc) -> str:
    """The stack's directory."""
    return os.path.dirname(stack.env["PCSCLITE_CSOCK_NAME"])


def of_mine(pid: int) -> list[str]:
    """Paths in the temporary directory that stacks of a process made."""
    return glob.glob(os.path.join(tempfile.gettempdir(), f"pcsc-safe-{pid}-*"))


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout: float = 5.0) -> bool:
    """Wait for a condition for which the operating system has no event."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def descriptors() -> set[str]:
    """The open descriptors of this process."""
    return set(os.listdir("/proc/self/fd"))


# readers and cards


def see_readers(wanted: str) -> None:
    """Program: print how many readers a stack has, and how many PC/SC lists."""
    with VirtualPcsc(int(wanted), [EchoCard() for _ in range(int(wanted))]) as stack:
        names = [reader.name for reader in stack.readers]
        listed = reader_names()
        assert listed[: len(names)] == names
        assert [echo(name, number) for number, name in enumerate(names)] == [[i, 0x90, 0] for i in range(len(names))]
        print(len(names), len(listed))


@pytest.mark.parametrize(("wanted", "listed"), [(1, 2), (2, 2), (3, 4), (8, 8), (16, 16)])
def test_number_of_readers(wanted: int, listed: int) -> None:
    """A stack has up to 16 readers; PC/SC lists them in order, and one more after them if the number is odd."""
    done = forking.in_program(see_readers, str(wanted), env=CLEAN)
    assert done.stdout == f"{wanted} {listed}\n", done.stderr


@pytest.mark.parametrize("readers", [0, -1, 17])
def test_impossible_numbers(readers: int) -> None:
    """A number of readers beyond pcscd's limit is refused before anything starts."""
    with pytest.raises(ValueError, match="1 to 16 readers"):
        VirtualPcsc(readers)
    with pytest.raises(ValueError, match="2 cards for 1 readers"):
        VirtualPcsc(1, [None, None])


class Uninitialized(EchoCard):
    """A card whose author forgot to call ``super().__init__()``."""

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("wrong", ["echo", EchoCard, 5, Uninitialized()], ids=["name", "class", "number", "bare"])
def test_what_is_no_card_is_refused(wrong: Any, pcsc_stack: VirtualPcsc) -> None:
    """What is not a card, or not yet one, is refused before anything starts, with the remedy."""
    remedy = r"is not a card; pass a VirtualCard, for example EchoCard\(\)|call super\(\).__init__\(\) first"
    with pytest.raises(PcscStackError, match=remedy):
        VirtualPcsc(cards=[wrong])
    reader = pcsc_stack.readers[1]
    card = reader.remove()
    with pytest.raises(PcscStackError, match=remedy):
        reader.insert(wrong)
    reader.insert(card)
    assert echo(reader.name, 5) == [5, 0x90, 0]


def test_remove_and_insert(pcsc_stack: VirtualPcsc) -> None:
    """When remove and insert return, PC/SC reports the new state; the other reader is not affected."""
    context = establish()
    reader, other = pcsc_stack.readers
    for _ in range(20):
        card = reader.remove()
        assert reader.card is None
        assert [state(context, r.name) for r in (reader, other)] == [EMPTY, PRESENT]
        reader.insert(card)
        assert [state(context, r.name) for r in (reader, other)] == [PRESENT, PRESENT]
    scard.SCardReleaseContext(context)
    assert echo(reader.name, 5) == [5, 0x90, 0]


def test_removal_ends_sessions(pcsc_stack: VirtualPcsc) -> None:
    """If the card is removed, each connected application gets SCARD_W_REMOVED_CARD."""
    context = establish()
    reader = pcsc_stack.readers[0]
    card = scard.SCardConnect(context, reader.name, scard.SCARD_SHARE_SHARED, 3)[1]
    reader.insert(reader.remove())
    assert scard.SCardTransmit(card, scard.SCARD_PCI_T1, [0, 1, 0, 0])[0] == scard.SCARD_W_REMOVED_CARD
    scard.SCardReleaseContext(context)


def test_removal_in_the_middle_of_a_command(pcsc_stack: VirtualPcsc) -> None:
    """A card can be removed while it processes a command."""
    reader = pcsc_stack.readers[0]
    entered = threading.Event()

    class Slow(EchoCard):
        def apdu(self, command: bytes) -> bytes:
            entered.set()
            return super().apdu(command)

    reader.remove()
    reader.insert(Slow())
    context = establish()
    card = scard.SCardConnect(context, reader.name, scard.SCARD_SHARE_SHARED, 3)[1]
    results: list[Any] = []
    command = [0, 2, 30, 0]
    thread = threading.Thread(target=lambda: results.append(scard.SCardTransmit(card, scard.SCARD_PCI_T1, command)[0]))
    thread.start()
    entered.wait(10)
    reader.remove()
    thread.join(10)
    assert results[0] != scard.SCARD_S_SUCCESS
    scard.SCardReleaseContext(context)


def test_card_that_ejects_itself() -> None:
    """A card's own code can remove the card."""

    class Jumper(EchoCard):
        def apdu(self, command: bytes) -> bytes:
            stack.readers[0].remove()
            gone.set()
            return b"\x90\x00"

    gone = threading.Event()

    with VirtualPcsc(1, [Jumper()]) as stack:
        context = establish()
        card = scard.SCardConnect(context, stack.readers[0].name, scard.SCARD_SHARE_SHARED, 3)[1]
        assert scard.SCardTransmit(card, scard.SCARD_PCI_T1, [0, 1, 0, 0])[0] != scard.SCARD_S_SUCCESS
        assert gone.wait(10)
        assert stack.readers[0].card is None
        assert state(context, stack.readers[0].name) == EMPTY
        scard.SCardReleaseContext(context)


def test_refused_insertions_and_removals(pcsc_stack: VirtualPcsc) -> None:
    """A reader holds one card, and a card is in one reader; the errors name the remedy."""
    first, second = pcsc_stack.readers
    card = first.card
    assert card is not None
    with pytest.raises(PcscStackError, match="remove\\(\\) it first"):
        first.insert(EchoCard())
    second.remove()
    with pytest.raises(PcscStackError, match="another reader"):
        second.insert(card)
    with pytest.raises(PcscStackError, match="insert\\(\\) one first"):
        second.remove()
    with pytest.raises(PcscStackError, match="insert one"):
        second.reset()


def test_reset_of_a_card_in_use(pcsc_stack: VirtualPcsc) -> None:
    """A card that an application holds exclusively can't be reset by the stack; the error gives the reason."""
    context = establish()
    reader = pcsc_stack.readers[0]
    scard.SCardConnect(context, reader.name, scard.SCARD_SHARE_EXCLUSIVE, 3)
    with pytest.raises(PcscStackError, match="exclusively"):
        reader.reset()
    scard.SCardReleaseContext(context)
    pcsc_stack.wait_for_clients(0)
    reader.reset()


# the life of pcscd


def test_kill_and_start(pcsc_stack: VirtualPcsc) -> None:
    """While pcscd is down calls fail immediately; after a start the cards are back, and new contexts work."""
    name, context, pid = pcsc_stack.readers[0].name, establish(), pcsc_stack.pid
    card = scard.SCardConnect(context, name, scard.SCARD_SHARE_SHARED, 3)[1]
    pcsc_stack.kill()
    assert not alive(pid)
    assert pcsc_stack.pid == 0
    assert scard.SCardTransmit(card, scard.SCARD_PCI_T1, [0, 1, 0, 0])[0] != scard.SCARD_S_SUCCESS
    assert scard.SCardEstablishContext(scard.SCARD_SCOPE_USER)[0] == scard.SCARD_E_NO_SERVICE
    pcsc_stack.start()
    assert pcsc_stack.pid not in (0, pid)
    assert echo(name, 1) == [1, 0x90, 0]


def test_many_restarts_with_clients(pcsc_stack: VirtualPcsc) -> None:
    """A stack can be restarted repeatedly while contexts and cards are open."""
    names = [reader.name for reader in pcsc_stack.readers]
    for turn in range(10):
        scard.SCardConnect(establish(), names[0], scard.SCARD_SHARE_SHARED, 3)
        pcsc_stack.restart()
        assert [echo(name, turn) for name in names] == [[turn, 0x90, 0]] * 2


def test_a_client_resets_a_card_that_is_gone(pcsc_stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """remove() returns only when pcscd has detected the removal, even if the client changes the state before."""
    reader, context, unplug = pcsc_stack.readers[0], establish(), _vpcd.Slot.unplug
    _, card, _ = scard.SCardConnect(context, reader.name, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_ANY)

    def unplug_and_reset(slot: _vpcd.Slot) -> None:
        unplug(slot)
        assert scard.SCardDisconnect(card, scard.SCARD_RESET_CARD) == scard.SCARD_S_SUCCESS

    monkeypatch.setattr(_vpcd.Slot, "unplug", unplug_and_reset)
    removed = reader.remove()
    monkeypatch.undo()
    reader.insert(removed)
    assert state(context, reader.name) == PRESENT
    scard.SCardReleaseContext(context)


def test_cards_change_while_pcscd_is_down(pcsc_stack: VirtualPcsc) -> None:
    """Cards can be removed and inserted while pcscd is down."""
    first, second = pcsc_stack.readers
    pcsc_stack.kill()
    card = first.remove()
    second.remove()
    second.insert(card)
    pcsc_stack.start()
    context = establish()
    assert [state(context, r.name) for r in (first, second)] == [EMPTY, PRESENT]
    scard.SCardReleaseContext(context)


def test_pcscd_dies_by_itself(pcsc_stack: VirtualPcsc) -> None:
    """If pcscd dies unexpectedly, changes raise an error, and start() restores the stack."""
    os.kill(pcsc_stack.pid, signal.SIGKILL)
    assert wait_until(lambda: not alive(pcsc_stack.pid))
    with pytest.raises(PcscStackError, match="does not serve"):
        pcsc_stack.readers[0].reset()
    pcsc_stack.start()
    assert echo(pcsc_stack.readers[0].name, 1) == [1, 0x90, 0]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (
            "cannot create {}: Permission denied",
            "without root, pcscd can't create its run directory: sudo mkdir -p {};",
        ),
        ("cannot create {}/pcscd.pid: Permission denied", "see the end of its log"),
        ("libifdvpcd.so: failed to map segment from shared object", "more than two readers need a TMPDIR"),
    ],
)
def test_a_known_cause_comes_first(monkeypatch: pytest.MonkeyPatch, line: str, hint: str) -> None:
    """If pcscd's log has a known cause, the remedy begins with it; a PID file that pcscd can't write is none."""
    installed = _install.look()
    assert isinstance(installed, _install.Installed)
    monkeypatch.setattr(VirtualPcsc, "log", line.format(installed.directory))
    with pytest.raises(PcscStackError) as failed, VirtualPcsc(activate=False)._explained():
        raise ConnectionError("no reader")
    assert failed.value.remedy.startswith(hint.format(installed.directory))


def test_clients(pcsc_stack: VirtualPcsc) -> None:
    """clients() is the number of established contexts; it never counts the stack's own."""
    assert pcsc_stack.clients() == 0
    contexts = [establish() for _ in range(3)]
    pcsc_stack.wait_for_clients(3)
    pcsc_stack.readers[0].reset()
    pcsc_stack.readers[0].remove()
    assert pcsc_stack.clients() == 3
    for context in contexts:
        scard.SCardReleaseContext(context)
    pcsc_stack.wait_for_clients(0)
    with pytest.raises(TimeoutError, match="1 clients: it has 0"):
        pcsc_stack.wait_for_clients(1, timeout=0.01)


def test_log(pcsc_stack: VirtualPcsc) -> None:
    """The log of pcscd is available to a failing test, and continues after a restart."""
    pcsc_stack.restart()
    assert pcsc_stack.log.count("daemon ready") == 2


def test_a_stack_outside_its_block() -> None:
    """Using a stack that is not running raises an error that says so."""
    stack = VirtualPcsc(1, activate=False)
    with pytest.raises(PcscStackError, match="with block"):
        _ = stack.env
    with stack, pytest.raises(PcscStackError, match="is running"):
        stack.__enter__()
    with pytest.raises(PcscStackError, match="with block"):
        stack.restart()


def test_a_stack_used_twice() -> None:
    """A stack can be entered again, with the cards that it was made with."""
    stack = VirtualPcsc(1, [EchoCard()])
    for turn in range(2):
        with stack:
            assert echo(stack.readers[0].name, turn) == [turn, 0x90, 0]


# activation


def test_activation_follows_the_stack() -> None:
    """Consecutive and nested stacks in one process are found, and the environment is restored."""
    before = os.environ.get("PCSCLITE_CSOCK_NAME")
    with VirtualPcsc(1) as first:
        path = os.environ["PCSCLITE_CSOCK_NAME"]
        context = establish()
        assert (first.clients(), len(reader_names())) == (1, 2)
        with VirtualPcsc(4) as second, VirtualPcsc(2, activate=False) as third:
            assert os.environ["PCSCLITE_CSOCK_NAME"] == path
            assert len(reader_names()) == 4
            with third.activated():
                assert len(reader_names()) == 2
            assert len(reader_names()) == 4
            with first.activated(), second.activated():
                assert len(reader_names()) == 4
        assert len(reader_names()) == 2
        scard.SCardReleaseContext(context)
    assert os.environ.get("PCSCLITE_CSOCK_NAME") == before


def test_an_interrupted_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a signal handler raises during an activation, the stack that was active before is active again."""

    def interrupt(*_: Any) -> None:
        monkeypatch.undo()
        raise Alarm

    before = os.environ.get(VARIABLE)
    with VirtualPcsc(1) as first, VirtualPcsc(1, activate=False) as second:
        for function in ("symlink", "replace"):
            monkeypatch.setattr(os, function, interrupt)
            with pytest.raises(Alarm), second.activated():
                pass
            assert os.readlink(os.environ[VARIABLE]) == first._running().path
        with second.activated():
            assert os.readlink(os.environ[VARIABLE]) == second._running().path
    assert os.environ.get(VARIABLE) == before


def see_sizes(*sizes: str) -> None:
    """Program: run stacks one after the other; print what pyscard lists in each, before and after a restart."""
    for size in sizes:
        with VirtualPcsc(int(size), activate=False) as stack, stack.activated():
            before = len(reader_names())
            stack.restart()
            print(before, len(reader_names()))


def test_stacks_of_any_sizes_follow_each_other() -> None:
    """Raw pyscard lists each stack's readers, even with pcsc-lite 2.5, whose array of readers never shrinks."""
    done = forking.in_program(see_sizes, "2", "3", "2", "6", "1", "8", "2", env=CLEAN)
    assert done.stdout.split("\n") == ["2 2", "4 4", "2 2", "6 6", "2 2", "8 8", "2 2", ""], done.stderr


def nest_a_larger_one() -> None:
    """Program: print what happens to a larger stack within a smaller one, and to one that is too small."""
    with VirtualPcsc(2) as outer, VirtualPcsc(6, activate=False) as larger:
        try:
            with larger.activated():
                print("inside", len(reader_names()))
        except PcscStackError as error:
            print(error)
        print("outside", len(reader_names()))
        small = outer
    with VirtualPcsc(2, activate=False) as small, VirtualPcsc(6):
        reader_names()
        try:
            with small.activated():
                print("inside", len(reader_names()))
        except PcscStackError as error:
            print(error)
    with VirtualPcsc(2, activate=False) as small, small.activated():
        print("restarted", len(reader_names()))


def test_what_libpcsclite_could_not_follow_is_refused() -> None:
    """With pcsc-lite 2.5 a larger stack within an active one is refused: the active one would become unusable."""
    done = forking.in_program(nest_a_larger_one, env=CLEAN)
    assert done.stderr == ""
    if slots_matter():
        larger, outside, smaller, restarted, end = done.stdout.split("\n")
        assert "the active stack has room for 4 readers only, and this one for 6: with pcsc-lite 2.5" in larger
        assert "start the outer one with 6 readers, or this one with 4 at most" in larger
        assert "this stack has room for 4 readers only, and this process has used one with room for 6" in smaller
        assert "restart() this stack before it is activated" in smaller
        assert (outside, restarted, end) == ("outside 2", "restarted 2", "")
    else:
        assert done.stdout == "inside 6\noutside 2\ninside 2\nrestarted 2\n"


def see_fewer_on_raw_pyscard(link: str, larger: str, smaller: str) -> None:
    """Program: print what pyscard returns at a pcscd with fewer slots for readers than the one before."""
    for target in (larger, smaller):
        os.symlink(target, link + ".new")
        os.replace(link + ".new", link)
        context = establish()
        hresult, names = scard.SCardListReaders(context, [])
        changed, _ = scard.SCardGetStatusChange(context, 0, [("Virtual PCD 0 00 00", scard.SCARD_STATE_UNAWARE)])
        print(f"0x{hresult & 0xFFFFFFFF:08X} {len(names)} 0x{changed & 0xFFFFFFFF:08X}")
        scard.SCardReleaseContext(context)


def test_pcsc_lites_own_fault(tmp_path: Path) -> None:
    """With raw pyscard and no fork, a process that has used a pcscd with more slots can't use one with fewer.

    Observed with pcsc-lite 2.5.3, and in the source of 2.5.0 and 2.5.1; 1.9.9 and 2.3.3 have an array of fixed size.
    """
    with VirtualPcsc(6, activate=False) as larger, VirtualPcsc(2, [EchoCard()], activate=False) as smaller:
        link, *paths = str(tmp_path / "comm"), larger.env[VARIABLE], smaller.env[VARIABLE]
        done = forking.in_program(see_fewer_on_raw_pyscard, link, *paths, env={**CLEAN, VARIABLE: link})
    fault = "0x8010001F 0 0x8010001F" if slots_matter() else "0x00000000 2 0x00000000"
    assert done.stdout == f"0x00000000 6 0x00000000\n{fault}\n", done.stderr


def slots_matter() -> bool:
    """Whether this libpcsclite has an array of readers that grows and never shrinks."""
    found = _install.look()
    assert isinstance(found, _install.Installed)
    return _slots.matter(found)


def test_environment_for_subprocesses() -> None:
    """A subprocess with the stack's env uses the stack, whether or not it is active, and beside others."""
    script = "from smartcard.scard import *; print(len(SCardListReaders(SCardEstablishContext(0)[1], [])[1]))"
    with VirtualPcsc(2, activate=False) as two, VirtualPcsc(4, activate=False) as four:
        for stack, count in ((two, "2"), (four, "4")):
            done = subprocess.run([sys.executable, "-c", script], env=stack.env, capture_output=True, text=True)
            assert done.stdout.strip() == count, done.stderr


def test_four_side_by_side() -> None:
    """Stacks have separate cards, readers and clients."""
    stacks = [VirtualPcsc(2, [EchoCard()], activate=False) for _ in range(4)]
    for stack in stacks:
        stack.__enter__()
    try:
        for stack in stacks:
            stack.readers[0].reset()
        assert [stack.readers[0].card.resets for stack in stacks if stack.readers[0].card] == [1] * 4
        stacks[0].kill()
        stacks[1].readers[0].remove()
        assert [bool(stack.pid and stack.readers[0].card) for stack in stacks] == [False, False, True, True]
        stacks[2].readers[0].reset()
    finally:
        for stack in stacks:
            stack.__exit__(None, None, None)


def start_five() -> None:
    """Program: run five stacks one after the other, and send a command through each."""
    for number in range(5):
        with VirtualPcsc(2, [EchoCard(), EchoCard()]) as stack:
            assert echo(stack.readers[1].name, number) == [number, 0x90, 0]


def test_twenty_in_parallel() -> None:
    """Twenty stacks, started from four processes at the same time, all work."""
    failures: list[str] = []

    def run() -> None:
        done = forking.in_program(start_five, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if done.returncode:
            failures.append(done.stderr)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def insert_with_many_descriptors() -> None:
    """Program: insert a card when no descriptor below 1024 is free."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2048), hard))
    with VirtualPcsc(1) as stack:
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
        stack.readers[0].insert(EchoCard())
        print(files[-1] > 1023)


def test_many_descriptors() -> None:
    """A stack can be used in a process that has more than 1024 files open."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2048:
        pytest.skip("this user may not open so many files")
    done = forking.in_program(insert_with_many_descriptors, env=CLEAN)
    assert done.stdout == "True\n", done.stderr


# cleanup


def test_nothing_is_left_behind() -> None:
    """At the end of the block pcscd, its keeper and the threads end, descriptors are closed, and files are removed."""
    with VirtualPcsc(1, activate=False):
        pass
    before = descriptors(), threading.active_count(), of_mine(os.getpid())
    with VirtualPcsc(4, [EchoCard() for _ in range(4)]) as stack:
        pid, home = stack.pid, home_of(stack)
        keeper = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        stack.readers[0].insert(stack.readers[0].remove())
        stack.restart()
    assert not alive(pid)
    assert not alive(keeper)
    assert not os.path.exists(home)
    assert (descriptors(), threading.active_count(), of_mine(os.getpid())) == before


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_behind_after_an_error(error: type[BaseException]) -> None:
    """The same is cleaned up if the block ends with an exception."""
    before = descriptors(), threading.active_count(), of_mine(os.getpid())
    stack = VirtualPcsc(1, [EchoCard()])
    pids = []

    def fail() -> None:
        pids.append(stack.pid)
        raise error

    with pytest.raises(error), stack:
        fail()
    assert not alive(pids[0])
    assert (descriptors(), threading.active_count(), of_mine(os.getpid())) == before


def test_nothing_is_left_behind_of_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """If pcscd doesn't start, the error contains its log, and nothing is left behind."""
    from pcsc_safe.testing import _daemon

    monkeypatch.setattr(_daemon.Daemon, "_command", lambda self: ["/bin/sh", "-c", "echo no such luck"])
    before = descriptors(), threading.active_count(), of_mine(os.getpid())
    with pytest.raises(PcscStackError, match="no such luck"), VirtualPcsc(1):
        pass
    assert (descriptors(), threading.active_count(), of_mine(os.getpid())) == before


def test_temporary_directory_that_is_not_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a directory can't be made, the error says what to check."""
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    before = descriptors()
    with pytest.raises(PcscStackError, match="TMPDIR"), VirtualPcsc(1, activate=False):
        pass
    assert descriptors() == before


def test_long_temporary_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A temporary directory may be too long for the path of a Unix socket."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with VirtualPcsc(1, [EchoCard()], activate=False) as stack:
        assert home_of(stack).startswith("/tmp/")


def come_to_a_sudden_end(how: str) -> None:
    """Program: start two stacks, one of them active; for SIGKILL, also a forked child that outlives this process."""
    with VirtualPcsc(2, [EchoCard()]) as stack, VirtualPcsc(2, [EchoCard()]) as other:
        child = forking.fork() if how == "SIGKILL" else 0
        if how == "SIGKILL" and not child:
            signal.pause()
        pids = [stack.pid, other.pid]
        print(json.dumps({"child": child, "pids": pids, "me": os.getpid()}), flush=True)
        if how == "exec":
            os.execv("/bin/sleep", ["sleep", "60"])
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["SIGKILL", "exec"])
def test_nothing_is_left_behind_after_a_sudden_end(how: str) -> None:
    """Daemon and files are removed when their process is killed (even if a child lives on) or execs."""
    here = [str(ROOT), str(TESTS), os.path.dirname(__file__)]
    source = f"import sys; sys.path[:0] = {here!r}; import {__name__} as test; test.come_to_a_sudden_end({how!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    try:
        assert wait_until(lambda: not any(map(alive, told["pids"])) and not of_mine(told["me"]))
        assert how == "exec" or alive(told["child"])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def die_on_an_old_kernel(keeper: str) -> None:
    """Program: start a stack whose keeper has no pidfd, and a child that lives on."""
    from pcsc_safe.testing import _daemon

    _daemon._KEEPER = keeper
    with VirtualPcsc(1, [EchoCard()]) as stack:
        child = forking.fork()
        if not child:
            signal.pause()
        print(json.dumps({"child": child, "pid": stack.pid, "me": os.getpid()}), flush=True)
        os._exit(0)


def test_keeper_without_pidfd(tmp_path: Path) -> None:
    """On a kernel without pidfd_open, the keeper still detects the death of its parent."""
    real = str(Path(cards.__file__).with_name("_keeper.py"))
    keeper = tmp_path / "keeper.py"
    keeper.write_text(f"import os, runpy\ndel os.pidfd_open\nrunpy.run_path({real!r}, run_name='__main__')\n")
    here = [str(ROOT), str(TESTS), os.path.dirname(__file__)]
    source = (
        f"import sys; sys.path[:0] = {here!r}; import {__name__} as test; test.die_on_an_old_kernel({str(keeper)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        try:
            assert wait_until(lambda: not alive(told["pid"]) and not of_mine(told["me"]))
        finally:
            os.kill(told["child"], signal.SIGKILL)


def test_pcscd_that_can_not_be_hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """If pcscd can't be woken, everything still works, only slower."""
    from pcsc_safe.testing import _stack

    monkeypatch.setattr(_stack, "nudge", lambda pid: None)
    with VirtualPcsc(1, [EchoCard()]) as stack:
        reader = stack.readers[0]
        reader.insert(reader.remove())
        assert echo(reader.name, 1) == [1, 0x90, 0]


def test_interrupt_from_the_terminal() -> None:
    """The process group of the test doesn't contain pcscd, so Ctrl-C doesn't reach it."""
    with VirtualPcsc(1, activate=False) as stack:
        assert os.getsid(stack.pid) != os.getsid(0)
        assert os.getpgid(stack.pid) != os.getpgid(0)


def ignore_and_block_signals() -> None:
    """Program: run a stack in a process that ignores SIGCHLD and blocks all signals."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    with VirtualPcsc(1, [EchoCard()]) as stack:
        stack.restart()
        assert echo(stack.readers[0].name, 1) == [1, 0x90, 0]


def test_signals_that_the_process_ignores_or_blocks() -> None:
    """The stack works whatever signals the test process ignores or blocks."""
    done = forking.in_program(ignore_and_block_signals, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


# forks


def test_forked_child_uses_the_stack(pcsc_stack: VirtualPcsc) -> None:
    """A child reaches the stack by the same path; threads of the parent serve the card."""
    names = [reader.name for reader in pcsc_stack.readers]
    card = pcsc_stack.readers[0].card
    assert card is not None
    assert forking.in_child(lambda: (reader_names(), echo(names[0], 7))) == (names, [7, 0x90, 0])
    assert card.apdus == 1
    pcsc_stack.wait_for_clients(0)
    assert forking.in_child(pcsc_stack.clients) == 0


def test_forked_child_can_do_no_harm() -> None:
    """A child that leaves the block, collects garbage, or tries to change the stack has no effect on it."""

    def child() -> list[str]:
        refused = []
        for change in (stack.kill, stack.start, stack.restart, reader.remove, reader.reset):
            try:
                change()
            except PcscStackError as error:
                refused.append(str(error))
        stack.__exit__(None, None, None)
        stack._daemon = None
        return refused

    with VirtualPcsc(1, [EchoCard()]) as stack:
        reader, pid = stack.readers[0], stack.pid
        refused = forking.in_child(child)
        assert len(refused) == 5
        assert all(f"process {os.getpid()}" in text for text in refused)
        assert stack.pid == pid
        assert alive(pid)
        assert echo(reader.name, 3) == [3, 0x90, 0]


def test_child_that_lives_on_keeps_nothing_alive() -> None:
    """A child with copies of all descriptors delays neither a removal nor the end of the stack."""
    read_end, write_end = os.pipe()
    with VirtualPcsc(1, [EchoCard()]) as stack:
        pid, home = stack.pid, home_of(stack)
        child = forking.start(lambda: (os.close(write_end), os.read(read_end, 1))[1])
        stack.readers[0].insert(stack.readers[0].remove())
        stack.restart()
        stack.readers[0].remove()
    assert not alive(pid)
    assert not os.path.exists(home)
    os.close(write_end)
    os.close(read_end)
    assert forking.wait_for(child) == b""


def test_child_with_a_stack_of_its_own() -> None:
    """A child can start its own stack; the parent's is not affected."""

    def child() -> tuple[int, int]:
        with VirtualPcsc(2, [EchoCard()], activate=False) as own:
            own.readers[0].reset()
            assert own.readers[0].card is not None
            return own.readers[0].card.resets, len(of_mine(os.getpid()))

    with VirtualPcsc(1, [EchoCard()]) as stack:
        assert forking.in_child(child) == (1, 1)
        assert echo(stack.readers[0].name, 3) == [3, 0x90, 0]


def test_forks_while_cards_come_and_go(pcsc_stack: VirtualPcsc) -> None:
    """After a fork at any moment, the child can use the stack, and the parent's stack works."""
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            pcsc_stack.readers[1].insert(pcsc_stack.readers[1].remove())

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for number in range(10):
            assert forking.in_child(echo, pcsc_stack.readers[0].name, number) == [number, 0x90, 0]
            assert forking.in_child(pcsc_stack.clients) >= 0
    finally:
        stop.set()
        thread.join()


# not root


def be_nobody() -> None:
    """Program: give up root, then use the whole stack."""
    with VirtualPcsc(4, [EchoCard()]):
        pass  # loads everything that is loaded late, while this process can still read this Python's library
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    if not os.access(sys.executable, os.X_OK):
        sys.executable = "/usr/bin/python3"
    with VirtualPcsc(4, [EchoCard() for _ in range(4)]) as stack:
        assert os.stat(f"/proc/{stack.pid}").st_uid == 65534
        stack.restart()
        stack.readers[3].insert(stack.readers[3].remove())
        stack.readers[3].reset()
        assert echo(stack.readers[3].name, 3) == [3, 0x90, 0]
        stack.wait_for_clients(0)


def test_without_root() -> None:
    """The stack needs no privileges."""
    if os.getuid():
        pytest.skip("not root, so this whole run is the test")
    if not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("needs /usr/bin/python3, a Python that nobody may run")
    done = forking.in_program(be_nobody, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
