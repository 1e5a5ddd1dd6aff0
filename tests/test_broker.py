"""A broker's life: who starts it and when, whom it serves, and that nothing of it is left when its client is gone.

The forked children here do PC/SC through a broker, as on macOS; the programs do, too, or with ``broker="always"``.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.spawn
import os
import pty
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forking
import pytest
from brokers import (
    ENOUGH,
    SOON,
    Client,
    Link,
    Program,
    Watch,
    broker,
    brokers,
    by_broker,
    descriptors,
    held_card,
    let_go,
    script,
    stack_to_hold,
    until,
    watched,
)
from conftest import ECHO, IS_VERIFIED, Session
from forking import in_child, in_program
from test_detection import SYS_CLONE, c_fork, raw_clone
from test_threads import HELD, Calling

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe.errors import BrokerError
from pcsc_safe.testing import VirtualPcsc

OK = safe.SCARD_S_SUCCESS
ECHOED = [OK, [1, 2, 3, 0x90, 0x00]]
C_FORKS = [c_fork, pytest.param(raw_clone, marks=pytest.mark.skipif(SYS_CLONE is None, reason="no clone number"))]


@pytest.fixture(scope="module")
def module_stack() -> Iterator[VirtualPcsc]:
    """Only this module has contexts there."""
    with stack_to_hold() as stack:
        yield stack


@pytest.fixture
def stack(module_stack: VirtualPcsc) -> Iterator[VirtualPcsc]:
    """That stack; when the test is over nobody has a context there."""
    yield module_stack
    let_go(module_stack)


def told(function: Callable[..., None], *arguments: str, env: dict[str, str]) -> Any:
    """What a program printed as JSON; it must end well, and say nothing else."""
    done = in_program(function, *arguments, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def establish() -> Any:
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    assert hresult == OK
    return context


# Its start.


def first_need() -> None:
    """Fork after the first call; the child needs a broker, its parent doesn't."""
    hooks: list[str] = []
    os.register_at_fork(
        before=lambda: hooks.append("before"),
        after_in_parent=lambda: hooks.append("parent"),
        after_in_child=lambda: hooks.append("child"),
    )
    pcsc_safe.configure(policy="broker")
    context = establish()

    def child() -> Any:
        ran, before = list(hooks), brokers()
        answers = [safe.SCardListReaders(context, [])[0] for _ in range(2)]
        in_thread = Calling(safe.SCardEstablishContext, safe.SCARD_SCOPE_SYSTEM).answer()[0]
        command = Path(f"/proc/{broker()}/cmdline").read_bytes().split(b"\0")
        return before, answers, in_thread, hooks == ran, command[0].decode(), brokers(os.getppid())

    print(json.dumps([in_child(child), brokers()]))


def test_it_is_execd_by_the_process_that_needs_it_when_it_does(stack: VirtualPcsc) -> None:
    """Not at the fork but at the child's first call, one for all threads; no at-fork hook runs; the parent has none."""
    (before, answers, in_thread, no_hook_ran, interpreter, of_parent), after = told(first_need, env=stack.env)
    assert (before, answers, in_thread, no_hook_ran) == ([], [OK, OK], OK, True)
    assert interpreter == sys.executable
    assert (of_parent, after) == ([], [])


def ahead() -> None:
    """Start a broker ahead; the parent does PC/SC itself, its children through it."""
    hooks: list[str] = []
    os.register_at_fork(before=lambda: hooks.append("before"))
    pcsc_safe.configure(policy="broker")
    pcsc_safe.prestart_broker()
    pcsc_safe.prestart_broker()
    mine = broker()
    ran = len(hooks)
    context = establish()
    native = "libpcsclite" in Path("/proc/self/maps").read_text()

    def first(link: Link) -> Any:
        own = establish()
        link.say(int(own))
        link.hear()
        return safe.SCardListReaders(own, [])[0], safe.SCardListReaders(context, [])[0], brokers()

    def second(number: int) -> Any:
        answers = [safe.SCardListReaders(number, []), safe.SCardReleaseContext(number)]
        return answers, safe.SCardListReaders(context, [])[0], brokers(), broker(os.getppid()) == mine

    with Client(first) as client:
        told = in_child(second, client.hear())
        client.say("go on")
        print(json.dumps([ran, native, client.result(), told, safe.SCardListReaders(context, [])[0]]))


def test_it_can_be_started_ahead_for_a_family(stack: VirtualPcsc) -> None:
    """One broker for all children, each a client of its own: no process reaches what another has there."""
    hooks_run, native, first, second, parent = told(ahead, env=stack.env)
    assert (hooks_run, native) == (0, True)
    assert first == [OK, OK, []]
    assert second == [[[safe.SCARD_E_INVALID_HANDLE, []], safe.SCARD_E_INVALID_HANDLE], OK, [], True]
    assert parent == OK


def test_it_can_be_reached_by_nobody_else(stack: VirtualPcsc) -> None:
    """It has sockets without a name, none of which listens, and no other."""

    def child() -> Any:
        establish()
        sockets = {link[8:-1] for link in descriptors(broker()).values() if link.startswith("socket:")}
        with open("/proc/net/unix") as table:
            unix = [line.split() for line in table if line.split()[6] in sockets]
        listening = [row for row in unix if int(row[3], 16) & 0x10000]
        return len(sockets) - len(unix), listening, [row[7:] for row in unix if row[7:]]

    assert in_child(by_broker(child)) == (0, [], [])


# Its end.


def begins(doing: str) -> Session:
    """Have a session, and be in the middle of something."""
    session = Session()
    if doing == "wait":
        (name, state, _), *_ = safe.SCardGetStatusChange(session.context, 0, [(session.reader, 0)])[1]
        waiter = Calling(safe.SCardGetStatusChange, session.context, safe.INFINITE, [(name, state)])
        until(lambda: waiter.waits, "it waits")
    elif doing == "apdu":
        Calling(session.transmit, HELD)
    elif doing == "transaction":
        assert safe.SCardBeginTransaction(session.card) == OK
    return session


def in_the_middle(link: Link, doing: str) -> None:
    """A client that tells of its broker, and ends when it is told to."""
    session = begins(doing)
    link.say(broker())
    link.hear()
    os._exit(0 if session else 1)


def exits_in_the_middle(doing: str) -> None:
    """The same, that ends as a Python program does."""
    session = begins(doing)
    print(broker(), flush=True)
    sys.stdin.read()
    assert session


DOING = ["nothing", "wait", "apdu", "transaction"]


def see_it_end(stack: VirtualPcsc, watch: Watch) -> None:
    """It ends in a second, and with it what it held: the card can be had exclusively."""
    assert watch.ends(SOON)
    held_card(stack).go.set()  # pcscd itself waits for the card's answer
    stack.wait_for_clients(0)
    exclusive = Session(safe.SCARD_SHARE_EXCLUSIVE)
    exclusive.assert_untouched()
    exclusive.close()


@pytest.mark.parametrize("doing", DOING)
@pytest.mark.parametrize("how", ["os._exit", "SIGKILL"])
def test_it_ends_with_its_client(stack: VirtualPcsc, how: str, doing: str) -> None:
    """However its client dies and in the middle of what, a broker is gone in a second, and every session ended."""
    with Client(by_broker(in_the_middle), doing) as client, watched(client.hear()) as watch:
        if doing == "apdu":
            assert held_card(stack).reached.wait(ENOUGH)
        assert not watch.ends(0)
        if how == "SIGKILL":
            client.kill()
        else:
            client.say("end")
            with pytest.raises(forking.ChildFailedError, match="status 0"):
                client.result()
        see_it_end(stack, watch)


@pytest.mark.parametrize("doing", DOING)
def test_it_ends_when_its_client_exits(stack: VirtualPcsc, doing: str) -> None:
    """The same for a program that returns from its main function, with a thread in a call; which is no error."""
    env = {**stack.env, "PCSC_SAFE_BROKER": "always"}
    with Program(exits_in_the_middle, doing, env=env) as program, watched(int(program.hear())) as watch:
        if doing == "apdu":
            assert held_card(stack).reached.wait(ENOUGH)
        program.let_go()
        assert (program.ends(), program.errors()) == (0, "")
        see_it_end(stack, watch)


def left_alone(link: Link, fork: Callable[[], int], family: bool) -> None:
    """A client that leaves an idle child behind, made by C code."""
    if family:
        pcsc_safe.prestart_broker()
    session = begins("transaction")
    idle = fork()
    if not idle:
        time.sleep(ENOUGH)
        os._exit(0)
    link.say((broker(), idle))
    link.hear()
    assert session


@pytest.mark.parametrize("fork", C_FORKS)
@pytest.mark.parametrize("family", [False, True], ids=["one", "family"])
def test_it_ends_though_an_idle_child_lives(stack: VirtualPcsc, fork: Callable[[], int], family: bool) -> None:
    """A child that no hook has seen has copies of the client's sockets; the client's sessions end with it all the same.

    So does its broker; one for a family of processes when the last of them is gone.
    """
    with Client(by_broker(left_alone), fork, family) as client:
        pid, idle = client.hear()
        with watched(pid) as watch, watched(idle) as of_idle:
            client.kill()
            stack.wait_for_clients(0, timeout=SOON)
            assert watch.ends(SOON) if not family else not watch.ends(0)
            assert not of_idle.ends(0)
            os.kill(idle, signal.SIGKILL)
            see_it_end(stack, watch)


def at_the_terminal(when: str) -> None:
    """A program whose way to end at Ctrl-C is to use the card once more."""
    os.open(os.ttyname(0), os.O_RDWR)  # the terminal that controls it from now on
    signal.signal(signal.SIGQUIT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    pcsc_safe.configure(broker="always")
    try:
        pcsc_safe.prestart_broker()
        if when == "start":
            print(broker(), flush=True)
            until(lambda: False, "Ctrl-C")  # not one long sleep: a signal that comes just before it would not end it
        session = Session()
        print(broker(), flush=True)
        (name, state, _), *_ = safe.SCardGetStatusChange(session.context, 0, [(session.reader, 0)])[1]
        safe.SCardGetStatusChange(session.context, safe.INFINITE, [(name, state)])
    except KeyboardInterrupt:
        session = session if when == "call" else Session()
        print(json.dumps([session.transmit(ECHO), session.transmit(IS_VERIFIED)]), flush=True)
        raise SystemExit(3) from None


@pytest.mark.parametrize("when", ["start", "call"])
@pytest.mark.parametrize("what", ["\x03", "\x1c", "hangup"], ids=["Ctrl-C", "Ctrl-backslash", "hangup"])
def test_ctrl_c_ends_the_client_in_its_own_way(stack: VirtualPcsc, when: str, what: str) -> None:
    """What the terminal sends to all of its processes a broker ignores, in a call and as it starts; then it ends."""
    master, slave = pty.openpty()
    with (
        Program(at_the_terminal, when, env=stack.env, terminal=slave) as program,
        watched(int(program.hear())) as watch,
    ):
        os.close(slave)
        os.write(master, what.encode()) if what != "hangup" else os.close(master)
        assert json.loads(program.hear()) == [ECHOED, [OK, [1, 0x90, 0x00]]]
        assert (program.ends(), program.errors()) == (3, "")
        see_it_end(stack, watch)
    if what != "hangup":
        os.close(master)


# Its interpreter.


def test_its_interpreter_can_be_named(stack: VirtualPcsc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PCSC_SAFE_BROKER_PYTHON, or else what multiprocessing was told by set_executable()."""
    python = script(tmp_path / "snake", f'echo "$0" >> {tmp_path}/used\nexec {sys.executable} "$@"')

    def configured() -> Any:
        pcsc_safe.configure(policy="broker")
        return safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[0], len(brokers())

    def of_multiprocessing() -> Any:
        named = Path(python).rename(tmp_path / "python")
        monkeypatch.delenv("PCSC_SAFE_BROKER_PYTHON")
        multiprocessing.set_executable(str(named))
        monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")
        return configured()

    monkeypatch.setenv("PCSC_SAFE_BROKER_PYTHON", python)
    assert in_child(configured) == (OK, 1)
    assert in_child(of_multiprocessing) == (OK, 1)
    assert (tmp_path / "used").read_text().splitlines() == [python, str(tmp_path / "python")]


@pytest.mark.parametrize(
    ("executable", "frozen", "why", "remedy"),
    [
        ("/usr/bin/uwsgi", False, "'/usr/bin/uwsgi', which is no Python", "set PCSC_SAFE_BROKER_PYTHON to"),
        (None, False, "'', which is no Python", "set PCSC_SAFE_BROKER_PYTHON to"),
        ("/opt/app/app", True, "'/opt/app/app' is a frozen program", "call pcsc_safe.freeze_support() first thing"),
    ],
)
def test_where_there_is_no_python_the_error_says_so(
    stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch, executable: Any, frozen: bool, why: str, remedy: str
) -> None:
    """UWSGI and other programs that embed Python, and frozen ones that don't call freeze_support(): what to do."""

    def child() -> str:
        monkeypatch.setattr(sys, "executable", executable)
        monkeypatch.setattr(sys, "frozen", frozen, raising=False)
        monkeypatch.setattr(multiprocessing.spawn, "_python_exe", executable)
        with pytest.raises(BrokerError) as caught:
            establish()
        assert brokers() == []
        return str(caught.value)

    text = in_child(by_broker(child))
    assert why in text
    assert remedy in text


def frozen(executable: str) -> None:
    """The main module of a program that thinks it is frozen."""
    sys.frozen = True  # type: ignore[attr-defined]
    sys.executable = executable
    pcsc_safe.freeze_support()

    def child() -> Any:
        session = Session()
        return session.transmit(ECHO), Path(f"/proc/{broker()}/cmdline").read_bytes().split(b"\0")[-2].decode()

    pcsc_safe.configure(policy="broker")
    print(json.dumps([in_child(child), brokers()]))


def test_a_frozen_program_is_its_own_broker(stack: VirtualPcsc, tmp_path: Path) -> None:
    """With freeze_support() first thing in its main module; there is no other interpreter (simulated by a script)."""
    program = tmp_path / "program"
    main = tmp_path / "main.py"
    main.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import test_broker\ntest_broker.frozen({str(program)!r})\n"
    )
    script(program, f'exec {sys.executable} {main} "$@"')
    done = forking.subprocess.run([program], env=stack.env, capture_output=True, text=True, timeout=ENOUGH, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [[ECHOED, "--pcsc-safe-broker"], []]


# Forks again.


def grandparent(link: Link, fork: Callable[[], int]) -> Any:
    """A child with a broker, whose child gets one of its own."""
    session = Session()
    mine = broker()

    def grandchild(link: Link) -> Any:
        link.hear()
        link.say(brokers())
        link.hear()
        answers = [session.transmit(ECHO)[0], safe.SCardReconnect(session.card, safe.SCARD_SHARE_SHARED, 3, 0)[0]]
        link.say((broker(), [*answers, session.transmit(IS_VERIFIED)]))
        return link.hear()

    with Client(grandchild, fork=fork) as client:
        link.say((client.pid, mine))
        for _ in range(2):  # what the test says to the grandchild, and what that answers
            client.say(link.hear())
            link.say(client.hear())
            session.assert_untouched()
        link.hear()
        return None


@pytest.mark.parametrize("fork", [forking.fork, *C_FORKS])
def test_a_grandchild_gets_a_broker_of_its_own(stack: VirtualPcsc, fork: Callable[[], int]) -> None:
    """At its first need, and never uses its parent's, whose session goes on, and whose broker ends with it."""
    with Client(by_broker(grandparent), fork) as client:
        pid, parents = client.hear()
        client.say("what do you have")
        assert client.hear() == []
        client.say("use the card")
        own, answers = client.hear()
        assert answers == [safe.SCARD_W_RESET_CARD, OK, [OK, [1, 0x90, 0x00]]]
        assert own != parents
        with watched(parents) as of_parent, watched(own) as of_child, watched(pid) as child:
            client.kill()
            assert of_parent.ends(SOON)
            stack.wait_for_clients(1)
            assert not child.ends(0)
            assert not of_child.ends(0)
            os.kill(pid, signal.SIGKILL)
            assert of_child.ends(SOON)


def test_a_broker_does_not_outlive_its_client_for_a_hooked_child(stack: VirtualPcsc) -> None:
    """An idle child of os.fork() keeps nothing of its parent's alive either, though it never calls anything."""

    def child(link: Link) -> None:
        begins("wait")
        link.say((broker(), forking.fork() or time.sleep(ENOUGH)))
        link.hear()

    with Client(by_broker(child)) as client:
        pid, idle = client.hear()
        with watched(pid) as watch:
            client.kill()
            see_it_end(stack, watch)
        os.kill(idle, signal.SIGKILL)
