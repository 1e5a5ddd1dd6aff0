"""Hazards on a simulated macOS (see :mod:`macos`): raw pyscard has them, pcsc_safe prevents them.

The first tests check the simulation: with raw pyscard it behaves as macOS does according to the reports, and in no
other way.  Then come programs, the demo's and new ones.  Each also runs on raw pyscard, because a test of a hazard
that doesn't occur proves nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import forking
import pytest
from calling import Calling, until, waits_on
from cforks import c_fork
from conftest import ECHO, IS_VERIFIED, VERIFY
from forking import ChildFailedError, in_child, in_program, start, wait_for
from macos import OnMacos

from pcsc_safe._core.calls import CALLS
from pcsc_safe._native.pyscard import raw
from pcsc_safe.demo import _run
from pcsc_safe.demo._judge import Outcome, Verdict, conclude
from pcsc_safe.demo._stage import PCSCD
from pcsc_safe.demo.hazards import load
from pcsc_safe.scard import SCARD_STATE_CHANGED, SCARD_STATE_EMPTY
from pcsc_safe.testing import VirtualPcsc

RAW, SAFE = "smartcard.scard", "pcsc_safe.scard"
DEATH = f"the child said nothing and ended with status {-signal.SIGSEGV}"
ENOUGH = 20  # s; longer than anything takes
REMOVED = [0, SCARD_STATE_EMPTY | SCARD_STATE_CHANGED]


def told(function: Callable[..., None], *arguments: str, env: Mapping[str, str]) -> Any:
    """Return what a program printed as JSON; its exit status must be 0."""
    done = in_program(function, *arguments, env=dict(env))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# What the programs do.  They import the module under test by name, because there are two.


def establish(scard: Any) -> Any:
    hresult, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    assert hresult == 0, scard.SCardGetErrorMessage(hresult)
    return context


def connect(scard: Any, context: Any, share_mode: str = "SHARED") -> Any:
    """Return a connection to the first reader's card, with a verified PIN."""
    reader = scard.SCardListReaders(context, [])[1][0]
    mode = getattr(scard, f"SCARD_SHARE_{share_mode}")
    hresult, card, _ = scard.SCardConnect(context, reader, mode, scard.SCARD_PROTOCOL_T1)
    assert hresult == 0, scard.SCardGetErrorMessage(hresult)
    assert transmit(scard, card, VERIFY) == [0, [0x90, 0x00]]
    return card


def transmit(scard: Any, card: Any, command: list[int]) -> Any:
    return scard.SCardTransmit(card, scard.SCARD_PCI_T1, command)


def outcome(wait: Callable[..., Any], child: Any) -> Any:
    """Return what a forked child returned, or how it failed.

    :param wait: ``in_child``, or ``wait_for`` if it was started already.
    """
    try:
        return wait(child)
    except ChildFailedError as error:
        return str(error)


# The simulation.

CALLS_WITH_A_HANDLE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "SCardReleaseContext": lambda scard, context, card: scard.SCardReleaseContext(context),
    "SCardIsValidContext": lambda scard, context, card: scard.SCardIsValidContext(context),
    "SCardListReaders": lambda scard, context, card: scard.SCardListReaders(context, []),
    "SCardListReaderGroups": lambda scard, context, card: scard.SCardListReaderGroups(context),
    "SCardGetStatusChange": lambda scard, context, card: scard.SCardGetStatusChange(context, 0, []),
    "SCardCancel": lambda scard, context, card: scard.SCardCancel(context),
    "SCardConnect": lambda scard, context, card: scard.SCardConnect(context, "a reader", 2, 3),
    "SCardReconnect": lambda scard, context, card: scard.SCardReconnect(card, 2, 3, 0),
    "SCardDisconnect": lambda scard, context, card: scard.SCardDisconnect(card, scard.SCARD_UNPOWER_CARD),
    "SCardBeginTransaction": lambda scard, context, card: scard.SCardBeginTransaction(card),
    "SCardEndTransaction": lambda scard, context, card: scard.SCardEndTransaction(card, scard.SCARD_RESET_CARD),
    "SCardStatus": lambda scard, context, card: scard.SCardStatus(card),
    "SCardTransmit": lambda scard, context, card: transmit(scard, card, ECHO),
    "SCardControl": lambda scard, context, card: scard.SCardControl(card, 1, []),
    "SCardGetAttrib": lambda scard, context, card: scard.SCardGetAttrib(card, scard.SCARD_ATTR_ATR_STRING),
    "SCardSetAttrib": lambda scard, context, card: scard.SCardSetAttrib(card, scard.SCARD_ATTR_ATR_STRING, [0]),
}


def every_call_in_a_child() -> None:
    """Call each function in its own child, with handles that the parent still uses; then use them in the parent."""
    scard = importlib.import_module(RAW)
    context = establish(scard)
    card = connect(scard, context)
    ends = {
        name: outcome(in_child, lambda call=call: call(scard, context, card))
        for name, call in CALLS_WITH_A_HANDLE.items()
    }
    fresh = outcome(in_child, lambda: scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)[0])
    message = outcome(in_child, lambda: scard.SCardGetErrorMessage(scard.SCARD_E_NO_SERVICE))
    session = [transmit(scard, card, IS_VERIFIED), scard.SCardReleaseContext(context)]
    print(json.dumps([ends, fresh == scard.SCARD_E_NO_SERVICE, message, session]))


def test_a_forked_child_dies_of_sigsegv(shared_stack: VirtualPcsc, on_macos: OnMacos) -> None:
    """Raw: every call on an inherited handle kills the child, a new context is refused, and the parent continues."""
    ends, refused, message, session = told(every_call_in_a_child, env=on_macos(shared_stack))
    assert ends == dict.fromkeys(CALLS_WITH_A_HANDLE, DEATH)
    assert refused
    assert message == "Service not available."
    assert session == [[0, [1, 0x90, 0x00]], 0]


def test_no_call_is_left_out() -> None:
    """The test above has every function of pyscard that takes a handle and calls libpcsclite."""
    without_pcsc = {
        name for name in raw if name.endswith("Group") or name in ("SCardIntroduceReader", "SCardForgetReader")
    }
    assert set(CALLS_WITH_A_HANDLE) == {name for name in raw if CALLS[name].takes is not None} - without_pcsc


def exec_in_a_child() -> None:
    """A forked child execs a program that uses PC/SC, while the parent has a context."""
    scard = importlib.import_module(RAW)
    context = establish(scard)
    pid = os.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, forking.__file__, __file__, "list_readers"])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert scard.SCardListReaders(context, [])[0] == 0


def list_readers() -> None:
    scard = importlib.import_module(RAW)
    print(json.dumps(scard.SCardListReaders(establish(scard), [])), flush=True)


def test_an_execed_child_works(shared_stack: VirtualPcsc, on_macos: OnMacos) -> None:
    """Raw: exec, Apple's advice in the reports, works on the simulation too."""
    assert told(exec_in_a_child, env=on_macos(shared_stack)) == [0, [reader.name for reader in shared_stack.readers]]


def test_a_child_that_loads_pcsc_itself_is_refused(
    shared_stack: VirtualPcsc, on_macos: OnMacos, tmp_path: Path
) -> None:
    """Raw: a forked child is refused even if its parent never used PC/SC."""
    # A separate script, because this module imports pyscard.
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "assert 'smartcard' not in sys.modules\n"
        "if os.fork() == 0:\n"
        "    from smartcard.scard import *\n"
        "    sys.exit(SCardEstablishContext(SCARD_SCOPE_SYSTEM)[0] != SCARD_E_NO_SERVICE)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    done = subprocess.run([sys.executable, script], env=on_macos(shared_stack), timeout=ENOUGH, check=False)
    assert done.returncode == 0


def test_python_is_told_and_sys_platform_is_not(shared_stack: VirtualPcsc, on_macos: OnMacos) -> None:
    """pcsc_safe takes the machine for a Mac. The standard library works as on Linux."""
    code = "import sys, pcsc_safe.policy; print(sys.platform, pcsc_safe.policy.PLATFORM)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=on_macos(shared_stack), capture_output=True, text=True, timeout=ENOUGH)
    assert done.stdout.split() == [sys.platform, "darwin"]


# The demo's programs.

SHOWN_RAW = {
    "1": "the child died of SIGSEGV",
    "6": "a new context was refused: SCARD_E_NO_SERVICE",
    "7": "still frozen",  # no fork, so macOS doesn't matter; and pcsc_safe must not need a fork to prevent it
    "9": "the daemon died of SIGSEGV",
    "11": "returned memory of the process",  # after pcscd died; the child that drops its copy was killed by SIGSEGV
}
"""What the demo says of raw pyscard on the simulated macOS.

Not 2 and 5: there the owner of the context is a forked process itself, which on raw pyscard gets no context to begin
with.  Not 10: the demo doesn't judge a child that died before it could report.  Programs of our own are below.
"""


def demonstrate(number: str, module: str, stack: VirtualPcsc, env: Mapping[str, str]) -> Verdict:
    """Return the demo's verdict on a hazard's program."""
    (hazard,) = load([number])
    run = _run._run_disposable(hazard, module, {**env, PCSCD: str(stack.pid)}, threading.Event())
    return conclude(hazard.judge(run), run)


@pytest.mark.parametrize("number", SHOWN_RAW)
def test_the_demo_shows_hazards_raw(pcsc_stack: VirtualPcsc, on_macos: OnMacos, number: str) -> None:
    """Raw: hazards that are a wrong result or a hang on Linux are crashes and refusals on macOS."""
    verdict = demonstrate(number, RAW, pcsc_stack, on_macos(pcsc_stack))
    assert verdict.outcome is Outcome.HAZARD
    assert SHOWN_RAW[number] in verdict.says


@pytest.mark.parametrize("number", [hazard.NUMBER for hazard in load()])
def test_the_demo_shows_none_on_pcsc_safe(pcsc_stack: VirtualPcsc, on_macos: OnMacos, number: str) -> None:
    """Every program of the demo is as safe on macOS as on Linux."""
    verdict = demonstrate(number, SAFE, pcsc_stack, on_macos(pcsc_stack))
    assert verdict.outcome is Outcome.SAFE, verdict.says


# The test's own programs: each prints what it saw, and the tests below say what that must be.

EXCHANGES, CHILDREN = 25, 4


def cross_talk(module: str) -> None:
    """Hazard 2: a parent and its children use one connection at once; print how many responses were right for each."""
    scard = importlib.import_module(module)
    card = connect(scard, establish(scard))
    children = [start(lambda: exchange(scard, card)) for _ in range(CHILDREN)]
    right = exchange(scard, card)
    print(json.dumps([right, [outcome(wait_for, child) for child in children]]))


def exchange(scard: Any, card: Any) -> int:
    """Exchange bytes that no other process sends. After a reset, reconnect."""
    right = 0
    for number in range(EXCHANGES):
        data = [*os.getpid().to_bytes(4, "big"), number]
        command = [0x80, 0x01, 0x00, 0x00, len(data), *data]
        answer = transmit(scard, card, command)
        if number == 0 and answer[0] == scard.SCARD_W_RESET_CARD:
            scard.SCardReconnect(card, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1, scard.SCARD_LEAVE_CARD)
            answer = transmit(scard, card, command)
        right += answer == [0, [*data, 0x90, 0x00]]
    return right


def child_cleans_up(module: str) -> None:
    """Hazard 3: a child cleans up everything that it inherited. Print the codes, and whether the PIN is verified."""
    scard = importlib.import_module(module)
    context = establish(scard)
    card = connect(scard, context)
    child = outcome(
        in_child,
        lambda: [scard.SCardDisconnect(card, scard.SCARD_UNPOWER_CARD), scard.SCardReleaseContext(context)],
    )
    print(json.dumps([child, transmit(scard, card, IS_VERIFIED)]))


def owner_dies(module: str) -> None:
    """Hazard 5: an owner with an exclusive connection is killed, while its child has used PC/SC and is idle.

    Print what the child's call returned, and whether the card is free for others.
    """
    command = [sys.executable, forking.__file__, __file__, "hold_exclusively", module]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        used, idle = json.loads(owner.stdout.readline())
        owner.kill()
    try:
        print(json.dumps([used, is_free_soon(importlib.import_module(module))]))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(idle, signal.SIGKILL)


def hold_exclusively(module: str) -> None:
    """The owner: print what its child got on the inherited context, and the child's PID; then wait."""
    scard = importlib.import_module(module)
    context = establish(scard)
    connect(scard, context, "EXCLUSIVE")
    answered, answer = os.pipe()

    def child() -> None:
        os.write(answer, json.dumps(scard.SCardListReaders(context, [])[0]).encode())
        os.close(1)
        signal.pause()

    pid, _ = start(child)
    os.close(answer)
    used = os.read(answered, 100)
    print(json.dumps([json.loads(used) if used else "nothing", pid]), flush=True)
    signal.pause()


def is_free_soon(scard: Any) -> bool:
    """Return whether the first reader's card can be connected, now or soon."""
    context = establish(scard)
    reader = scard.SCardListReaders(context, [])[1][0]
    deadline = time.monotonic() + ENOUGH / 2
    while time.monotonic() < deadline:
        if scard.SCardConnect(context, reader, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)[0] == 0:
            return True
        time.sleep(0.01)
    return False


def wait_for_events(module: str, ready: str) -> None:
    """Hazard 8: a thread waits for an event while its process forks; the child waits for one too.

    Print both results, as code and state of the reader.

    :param ready: the file to create as soon as the event may come.
    """
    scard = importlib.import_module(module)
    context = establish(scard)
    waiter = Calling(await_change, scard, context, known(scard, context))
    until(lambda: waits_on(waiter), "the parent waits")

    def child() -> Any:
        try:
            own = establish(scard)
            states = known(scard, own)
        finally:
            Path(ready).touch()
        return await_change(scard, own, states)

    seen = outcome(in_child, child)
    print(json.dumps([waiter.answer(), seen]))


def known(scard: Any, context: Any) -> Any:
    """Return the first reader with its current state, for a wait."""
    reader = scard.SCardListReaders(context, [])[1][0]
    hresult, states = scard.SCardGetStatusChange(context, 0, [(reader, scard.SCARD_STATE_UNAWARE)])
    assert hresult == 0
    return [(reader, states[0][1] & ~scard.SCARD_STATE_CHANGED)]


def await_change(scard: Any, context: Any, states: Any) -> Any:
    hresult, now = scard.SCardGetStatusChange(context, 1000 * ENOUGH, states)
    return [hresult, now[0][1] & 0xFFFF]


def fork_from_c(module: str) -> None:
    """Hazard 10: a child of a fork in C uses the context, a new one and the card; then the parent does."""
    scard = importlib.import_module(module)
    context = establish(scard)
    card = connect(scard, context)

    def child() -> Any:
        return [scard.SCardListReaders(context, [])[0], scard.SCardReleaseContext(establish(scard)), use(scard, card)]

    seen = outcome(lambda child: in_child(child, fork=c_fork), child)
    print(json.dumps([seen, transmit(scard, card, IS_VERIFIED)]))


def use(scard: Any, card: Any) -> Any:
    """Reconnect an inherited card and exchange an APDU."""
    scard.SCardReconnect(card, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1, scard.SCARD_LEAVE_CARD)
    return transmit(scard, card, ECHO)


VERIFIED, ECHOED = [0, [1, 0x90, 0x00]], [0, [1, 2, 3, 0x90, 0x00]]
PROGRAMS: dict[Callable[[str], None], tuple[Any, Any]] = {
    # program: what it prints on raw pyscard, and on pcsc_safe
    cross_talk: ([EXCHANGES, [DEATH] * CHILDREN], [EXCHANGES, [EXCHANGES] * CHILDREN]),
    child_cleans_up: ([DEATH, VERIFIED], [[0, 0], VERIFIED]),
    owner_dies: (["nothing", True], [0, True]),
    fork_from_c: ([DEATH, VERIFIED], [[0, 0, ECHOED], VERIFIED]),
}
programs = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)


@programs
def test_the_program_shows_its_hazard_raw(
    pcsc_stack: VirtualPcsc, on_macos: OnMacos, program: Callable[[str], None]
) -> None:
    """Raw: the children die, and their parents are not affected otherwise."""
    assert told(program, RAW, env=on_macos(pcsc_stack)) == PROGRAMS[program][0]


@programs
def test_the_program_is_safe_on_pcsc_safe(
    pcsc_stack: VirtualPcsc, on_macos: OnMacos, program: Callable[[str], None]
) -> None:
    """Policy auto: the children use PC/SC through a broker, and the parents' sessions continue."""
    assert told(program, SAFE, env=on_macos(pcsc_stack)) == PROGRAMS[program][1]


def events(module: str, stack: VirtualPcsc, env: Mapping[str, str], ready: Path) -> Any:
    """Return what :func:`wait_for_events` prints if the card is removed while parent and child wait."""
    program = Calling(lambda: told(wait_for_events, module, str(ready), env=env), name="program")
    until(lambda: ready.exists() or not program.is_alive(), "the program waits for the event")
    stack.readers[0].remove()
    return program.answer()


def test_waits_for_events_raw(pcsc_stack: VirtualPcsc, on_macos: OnMacos, tmp_path: Path) -> None:
    """Raw: the child gets no context for a wait. The parent's wait continues."""
    parent, child = events(RAW, pcsc_stack, on_macos(pcsc_stack), tmp_path / "ready")
    assert parent == REMOVED
    assert "Service not available" in child


def test_waits_for_events_on_pcsc_safe(pcsc_stack: VirtualPcsc, on_macos: OnMacos, tmp_path: Path) -> None:
    """Policy auto: the child gets the event on its own context, and the parent's wait gets it too."""
    assert events(SAFE, pcsc_stack, on_macos(pcsc_stack), tmp_path / "ready") == [REMOVED, REMOVED]
