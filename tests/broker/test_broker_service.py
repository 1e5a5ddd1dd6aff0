"""What a broker guarantees: threads don't block each other, no native library is needed, no secret is disclosed."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from brokers import (
    ENOUGH,
    Client,
    ComesInBetweenError,
    Link,
    Program,
    broker,
    brokers,
    by_broker,
    descriptors,
    held_card,
    looks_into_brokers,
    module_stack,
    script,
    stack,
    stopped,
    until,
    without_native,
)
from calling import HELD, Calling
from conftest import ECHO, Session
from forking import in_child, in_program
from interrupts import as_of_c
from places import PYTHON

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import gate
from pcsc_safe.broker import __main__ as main
from pcsc_safe.broker import start, wire
from pcsc_safe.testing import DEFAULT_ATR, VirtualPcsc

__all__ = ["module_stack", "stack"]

pytestmark = pytest.mark.native  # each client here chooses its own way to PC/SC

OK = safe.SCARD_S_SUCCESS
ECHOED = [OK, [1, 2, 3, 0x90, 0x00]]


def establish() -> Any:
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    assert hresult == OK
    return context


# Threads.


def test_no_thread_waits_for_another(stack: VirtualPcsc) -> None:
    """Beside an APDU and a wait for events other threads' calls return, also on the context that waits."""

    def child(link: Link) -> Any:
        busy, other, waiting = establish(), establish(), establish()
        names = safe.SCardListReaders(busy, [])[1]
        card = safe.SCardConnect(busy, names[0], safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_T1)[1]
        exchange = Calling(safe.SCardTransmit, card, safe.SCARD_PCI_T1, HELD)
        link.say("in an APDU")
        link.hear()
        state = safe.SCardGetStatusChange(waiting, 0, [(names[2], 0)])[1][0][1]
        waiter = Calling(safe.SCardGetStatusChange, waiting, safe.INFINITE, [(names[2], state)])
        until(lambda: waiter.waits, "it waits")
        answers = [safe.SCardListReaders(context, []) == [OK, names] for context in (other, waiting) * 10]
        connected = safe.SCardConnect(other, names[2], safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_T1)[1]
        answers += [safe.SCardTransmit(connected, safe.SCARD_PCI_T1, ECHO) == ECHOED for _ in range(10)]
        answers += [safe.SCardIsValidContext(context) == OK for context in (busy, other, waiting)]
        still = exchange.is_alive(), waiter.is_alive()
        cancelled = Calling(safe.SCardCancel, waiting).answer(), waiter.answer()[0]
        link.say("release the card")
        return answers, still, cancelled, exchange.answer()

    with Client(by_broker(child)) as client:
        client.hear()
        assert held_card(stack).reached.wait(ENOUGH)
        client.say("it is")
        client.hear()
        held_card(stack).go.set()
        answers, still, cancelled, exchange = client.result()
    assert all(answers)
    assert still == (True, True)
    assert cancelled == (OK, safe.SCARD_E_CANCELLED)
    assert exchange == [OK, [7, 8, 9, 0x90, 0x00]]


def test_many_threads_get_their_own_answers(stack: VirtualPcsc) -> None:
    """Each of many threads, more than connections are kept, has its own context and gets only its own results."""

    def thread(number: int, reader: str) -> bool:
        context = establish()
        card = safe.SCardConnect(context, reader, safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_T1)[1]
        data = [number, 255 - number]
        command = [0x80, 1, 0, 0, 2, *data]
        right = all(safe.SCardTransmit(card, 2, command) == [OK, [*data, 0x90, 0x00]] for _ in range(20))
        return right and safe.SCardReleaseContext(context) == OK

    def child() -> Any:
        context = establish()
        before = len(descriptors(os.getpid()))
        threads = [Calling(thread, number, stack.readers[1 + number % 2].name) for number in range(30)]
        answers = [each.answer() for each in threads]
        return answers, len(descriptors(os.getpid())) - before < 20, len(brokers()), bool(context)

    assert in_child(by_broker(child)) == ([True] * 30, True, 1, True)


def test_a_transaction_and_exchanges_beside_it(stack: VirtualPcsc) -> None:
    """Two threads use two connections to one card on one context, one of them in transactions, and both continue."""

    def child() -> Any:
        pcsc_safe.configure(broker="always")
        context = establish()
        names = safe.SCardListReaders(context, [])[1]
        cards = [safe.SCardConnect(context, names[0], safe.SCARD_SHARE_SHARED, 3)[1] for _ in range(2)]

        def in_transactions() -> set[Any]:
            begin, end = safe.SCardBeginTransaction, safe.SCardEndTransaction
            return {(begin(cards[0]), end(cards[0], safe.SCARD_LEAVE_CARD)) for _ in range(1000)}

        transactions = Calling(in_transactions)
        exchanges = 0
        while transactions.is_alive():
            assert safe.SCardTransmit(cards[1], safe.SCARD_PCI_T1, ECHO) == ECHOED
            exchanges += 1
        return transactions.answer(), exchanges > 0

    assert in_child(child) == ({(OK, OK)}, True)


def test_what_a_signal_handler_raises_ends_a_call(stack: VirtualPcsc) -> None:
    """A signal handler's exception ends a call immediately. No later call gets the result of that call."""

    def child(link: Link) -> Any:
        in_call = threading.Event()

        def comes_in_between(number: int, frame: Any) -> None:
            if in_call.is_set():
                in_call.clear()
                raise ComesInBetweenError

        def signals() -> None:
            while in_call.is_set():  # more than one signal: one just before a system call would not interrupt it
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.01)

        session = Session()
        signal.signal(signal.SIGUSR1, comes_in_between)
        link.say("ready")
        for call in (
            lambda: session.transmit(HELD),
            lambda: safe.SCardGetStatusChange(session.context, safe.INFINITE, [(session.reader, 0x22)]),
        ):
            in_call.set()
            timer = threading.Timer(0.5, signals)  # a busy machine may take long to get into the call
            timer.start()
            with pytest.raises(ComesInBetweenError):
                call()
            timer.join()  # before in_call is set again
        link.say("ended")
        link.hear()
        return session.transmit(ECHO), session.transmit(ECHO)

    with Client(by_broker(child)) as client:
        client.hear()
        assert held_card(stack).reached.wait(ENOUGH)
        assert client.hear() == "ended"
        held_card(stack).go.set()
        client.say("the card has answered")
        assert client.result() == (ECHOED, ECHOED)


FEED = wire.Receiver.feed


def raised_by_a_handler() -> TimeoutError:
    try:
        raise TimeoutError(errno.ETIMEDOUT, "the application's")
    except TimeoutError as error:
        return error


RAISED = raised_by_a_handler()


def sends_a_class(receiver: wire.Receiver, data: bytes) -> Any:
    """What runs when a reply has arrived."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(TimeoutError))
    return FEED(receiver, data)


def sends_what_a_handler_raised(receiver: wire.Receiver, data: bytes) -> Any:
    """The same, with an exception that a handler has raised during a fork."""
    gate._raise_later(threading.get_ident(), RAISED)
    return FEED(receiver, data)


@pytest.mark.parametrize("sends", [sends_a_class, sends_what_a_handler_raised])
def test_what_another_thread_sends_ends_a_call(stack: VirtualPcsc, sends: Any) -> None:
    """A TimeoutError that arrives in a thread together with the broker's reply is no failure of the broker."""

    def child() -> Any:
        session = Session()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wire.Receiver, "feed", as_of_c(sends))
            with pytest.raises(TimeoutError):
                session.transmit(ECHO)
        session.assert_untouched()
        return session.transmit(ECHO)

    assert in_child(by_broker(child)) == ECHOED


# broker="always".


@pytest.mark.parametrize("how", ["environment", "configure"])
def test_always_keeps_the_native_library_out(stack: VirtualPcsc, how: str) -> None:
    """Neither the process nor its children load the native library. Everything works, and a fork waits for no call."""
    env = {**stack.env, **({"PCSC_SAFE_BROKER": "always"} if how == "environment" else {})}
    with Program(without_native, how, env=env) as program:
        assert json.loads(program.hear()) == [stack.readers[0].name, 2, list(DEFAULT_ATR)]
        assert held_card(stack).reached.wait(ENOUGH)
        program.let_go()
        assert json.loads(program.hear()) == [[True, False], True, True, 1]
        held_card(stack).go.set()
        assert json.loads(program.hear()) == [[OK, [7, 8, 9, 0x90, 0x00]], False, False, False]
        assert (program.ends(), program.errors()) == (0, "")


# Security.

_NEEDS = start._NEEDED | {"PYTHONNOUSERSITE", "PYTHONSAFEPATH"}


@looks_into_brokers
def test_it_gets_no_secret_of_the_environment(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker gets only the variables that it needs, and none of pcsc_safe's settings, which are for its client."""
    for name in ("SECRET", "AWS_SECRET_ACCESS_KEY", "PYTHONSTARTUP", "PCSC_SAFE_POLICY"):
        monkeypatch.setenv(name, "auto")
    monkeypatch.setenv("LC_TIME", "C")

    def child() -> Any:
        establish()
        variables = Path(f"/proc/{broker()}/environ").read_bytes().decode().split("\0")[:-1]
        return [variable.partition("=")[0] for variable in variables]

    names = in_child(by_broker(child))
    assert {"PATH", "LC_TIME", "PCSCLITE_CSOCK_NAME", "PYTHONSAFEPATH"} <= {*names}
    assert [name for name in names if name not in _NEEDS and not name.startswith(start._NEEDED_PREFIXES)] == []


@looks_into_brokers
def test_it_gets_no_descriptor(stack: VirtualPcsc) -> None:
    """A broker closes the descriptors that its client's C code leaves inheritable. Its standard ones are /dev/null."""

    def child() -> Any:
        read_end, write_end = os.pipe()
        for number in (write_end, 3, 63):
            os.dup2(write_end, number, inheritable=True)
        establish()
        found = descriptors(broker())
        for number in (write_end, 3, 63):
            os.close(number)
        os.set_blocking(read_end, False)
        return [found.pop(number, "") for number in range(4)], {*found.values()}, os.read(read_end, 1)

    (*standard, door), others, end_of_file = in_child(by_broker(child))
    assert standard == ["/dev/null"] * 3
    assert door.startswith("socket:")
    assert [link for link in others if not link.startswith("socket:") and not _is_opened_by_the_broker(link)] == []
    assert end_of_file == b""


def without_a_list_of_descriptors(limit: str) -> None:
    """Become what a broker has to be in a chroot without /dev/fd, under a limit that no test can set."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    os.dup2(1, 63)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "listdir", lambda path: os.open(f"/nowhere/{path}", os.O_RDONLY))
        patch.setattr(os, "sysconf", lambda name: int(limit))
        main._stand_alone()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(63)


@pytest.mark.parametrize("limit", [-1, 1 << 30], ids=["none", "the highest"])
def test_it_closes_descriptors_that_it_can_not_list(stack: VirtualPcsc, limit: int) -> None:
    """Without /dev/fd a broker closes descriptors too, at the cost of some thousand numbers whatever the limit is."""
    done = in_program(without_a_list_of_descriptors, str(limit), env=stack.env)
    assert (done.returncode, done.stderr) == (0, "")


def _is_opened_by_the_broker(link: str) -> bool:
    # libffi 3.5, of Debian sid, keeps its own library open, from which it maps the code of callbacks
    return link in ("anon_inode:[eventpoll]", "anon_inode:[pidfd]") or os.path.basename(link).startswith("libffi.so.")


def test_it_leaves_no_core_dump(stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A broker leaves no core dump, even if its client does. Other processes of the user can't read its memory."""
    monkeypatch.chdir(tmp_path)

    def child() -> Any:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
        Session()
        pid = broker()
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        (cores,) = (line.split()[4:6] for line in limits if line.startswith("Max core file size"))
        os.kill(pid, signal.SIGSEGV)
        return cores, os.WCOREDUMP(os.waitpid(pid, 0)[1]), os.listdir()

    def like_a_broker() -> int:
        main._leave_no_trace()
        return int(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE

    assert in_child(by_broker(child)) == (["0", "0"], False, [])
    assert in_child(like_a_broker) == 0


PIN = [0x31, 0x37, 0x31, 0x37, 0x39, 0x39, 0x35, 0x33]


def tells_its_pin() -> None:
    """A program that logs as much as possible, and whose brokers are killed during calls."""
    logging.basicConfig(level=logging.DEBUG)
    pcsc_safe.configure(broker="always")
    session = Session()
    for command in ([0x80, 0x20, 0, 0, 8, *PIN], [0x80, 0x01, 0, 0, 8, *PIN], [0x80, 0x01, 0, 0, 300, *PIN]):
        try:
            print(session.transmit(command)[0])
        except Exception as error:
            print(error)
    with stopped(broker()):
        exchange = Calling(session.transmit, [0x80, 0x01, 0, 0, 8, *PIN])
        until(lambda: exchange.waits, "it waits")
    print(exchange.answer(), session.transmit([0x80, 0x01, 0, 0, 8, *PIN]))


def test_nothing_says_what_is_in_an_apdu(stack: VirtualPcsc) -> None:
    """No byte of an APDU is in the client's log, at any level, or in anything that a broker writes."""
    done = in_program(tells_its_pin, env=stack.env)
    assert done.returncode == 0, done.stderr
    assert "has lost its sessions in broker" in done.stderr
    said = done.stdout + done.stderr
    for shape in (", ".join(map(str, PIN)), bytes(PIN).hex(), bytes(PIN).hex(" "), bytes(PIN).decode(), "0x37"):
        assert shape not in said


@pytest.mark.parametrize("safe_path", [True, False], ids=["PYTHONSAFEPATH", "older Python"])
@pytest.mark.parametrize("configured", [True, False], ids=["configured", "this Python"])
def test_it_imports_nothing_from_the_current_directory(
    stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configured: bool, safe_path: bool
) -> None:
    """A broker imports no module from the current directory, with any Python version (an older one is simulated)."""
    planted = tmp_path / "planted"
    for name in ("pcsc_safe", "smartcard", "socket", "runpy", "select", "sitecustomize"):
        (planted / name).mkdir(parents=True)
        (planted / name / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})")
    unset = "" if safe_path else "unset PYTHONSAFEPATH; "
    python = script(tmp_path / "python", f'{unset}exec {PYTHON} "$@"')

    def child() -> Any:
        os.chdir(planted)
        sys.path.insert(0, "")
        if configured:
            pcsc_safe.configure(broker_python=python)
        else:
            monkeypatch.setattr(sys, "executable", python)
            if not safe_path:
                monkeypatch.setattr(sys, "version_info", (3, 9, 18))
        return Session().transmit(ECHO)

    assert in_child(by_broker(child)) == ECHOED
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("options", [[], ["-I"]], ids=["the current directory", "PYTHONPATH and python -I"])
def test_it_imports_no_planted_pyscard(stack: VirtualPcsc, tmp_path: Path, options: list[str]) -> None:
    """With broker="always" only the broker imports pyscard, and only from places that its client trusts."""
    (tmp_path / "smartcard").mkdir()
    (tmp_path / "smartcard" / "__init__.py").write_text("raise SystemExit('planted')")
    program = "import pcsc_safe.scard; print(pcsc_safe.scard.SCardEstablishContext(0)[0])"
    env = {**stack.env, "PCSC_SAFE_BROKER": "always", **({"PYTHONPATH": str(tmp_path)} if options else {})}
    command = [sys.executable, *options, "-c", program]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=ENOUGH, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_it_imports_nothing_of_a_relative_pythonpath(stack: VirtualPcsc, tmp_path: Path) -> None:
    """PYTHONPATH=. means the directory in which the client was started, not the one in which it starts its broker."""
    planted, program = tmp_path / "planted", tmp_path / "program.py"
    planted.mkdir()
    for name in ("pcsc_safe", "signal"):
        (planted / f"{name}.py").write_text("raise SystemExit('planted')")
    program.write_text(
        "import os, pcsc_safe; os.chdir('planted'); from pcsc_safe.scard import *; print(SCardEstablishContext(0)[0])"
    )
    path = os.pathsep.join([".", *start._import_directories()])
    env = {**stack.env, "PCSC_SAFE_BROKER": "always", "PYTHONPATH": path}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=ENOUGH, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
