"""How a broker starts: who starts it and when, with which interpreter, and what the error says if it can't start."""

from __future__ import annotations

import errno
import json
import multiprocessing
import multiprocessing.spawn
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from brokers import (
    ENOUGH,
    Client,
    Link,
    broker,
    brokers,
    by_broker,
    children,
    descriptors,
    imports,
    looks_into_brokers,
    script,
    stack,
    stack_to_hold,
)
from calling import Calling
from conftest import ECHO, Session
from forking import in_child, in_program
from interrupts import Alarm, raise_alarm
from places import PYTHON, TESTS

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe.broker import client, family, start
from pcsc_safe.errors import BrokerError
from pcsc_safe.testing import VirtualPcsc

__all__ = ["stack"]

pytestmark = pytest.mark.native  # each client here chooses its own way to PC/SC

OK = safe.SCARD_S_SUCCESS
ECHOED = [OK, [1, 2, 3, 0x90, 0x00]]


@pytest.fixture(scope="module")
def module_stack() -> Iterator[VirtualPcsc]:
    """A stack for this module only. This process has used it, so its children have nothing left to import."""
    with stack_to_hold() as stack:
        assert safe.SCardReleaseContext(establish()) == OK
        yield stack


def establish() -> Any:
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    assert hresult == OK
    return context


def told(function: Callable[..., None], *arguments: str, env: dict[str, str]) -> Any:
    """Return what a program printed as JSON; it must succeed, and print nothing else."""
    done = in_program(function, *arguments, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


# Its start.


def first_need() -> None:
    """Fork after the first call; only the child needs a broker."""
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
        threads = [Calling(safe.SCardListReaders, context, []) for _ in range(8)]
        answers = {thread.answer()[0] for thread in threads}
        command = Path(f"/proc/{broker()}/cmdline").read_bytes().split(b"\0")
        return before, [*answers], hooks == ran, command[0].decode(), brokers(os.getppid())

    print(json.dumps([in_child(child), brokers()]))


def test_it_is_execd_by_the_process_that_needs_it_when_it_does(stack: VirtualPcsc) -> None:
    """A child starts its broker at its first call, one for all threads. No at-fork hook runs; the parent gets none."""
    (before, answers, no_hook_ran, interpreter, of_parent), after = told(first_need, env=stack.env)
    assert (before, answers, no_hook_ran) == ([], [OK], True)
    assert interpreter == sys.executable
    assert (of_parent, after) == ([], [])


def ahead() -> None:
    """Start a broker ahead; the parent uses PC/SC natively, its children through the broker."""
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
    """Each child is a separate client of the broker started ahead: no process reaches the handles of another."""
    hooks_run, native, first, second, parent = told(ahead, env=stack.env)
    assert (hooks_run, native) == (0, True)
    assert first == [OK, OK, []]
    assert second == [[[safe.SCARD_E_INVALID_HANDLE, []], safe.SCARD_E_INVALID_HANDLE], OK, [], True]
    assert parent == OK


@looks_into_brokers
def test_it_can_be_reached_by_nobody_else(stack: VirtualPcsc) -> None:
    """A broker has only unnamed sockets, and none of them listens."""

    def child() -> Any:
        establish()
        sockets = {link[8:-1] for link in descriptors(broker()).values() if link.startswith("socket:")}
        with open("/proc/net/unix") as table:
            unix = [line.split() for line in table if line.split()[6] in sockets]
        listening = [row for row in unix if int(row[3], 16) & 0x10000]
        return len(sockets) - len(unix), listening, [row[7:] for row in unix if row[7:]]

    assert in_child(by_broker(child)) == (0, [], [])


# Its interpreter.


@pytest.mark.not_on_macos("the simulation of macOS is a sitecustomize")
def test_no_sitecustomize_runs_in_it(stack: VirtualPcsc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker runs no sitecustomize, unless the settings name its interpreter, which may need one."""
    ran = tmp_path / "ran"
    (tmp_path / "sitecustomize.py").write_text(f"open({str(ran)!r}, 'a')")
    places = filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))

    def has_run(python: str) -> bool:
        pcsc_safe.configure(policy="broker", broker_python=python)
        establish()
        return ran.exists()

    assert in_child(has_run, "") is False
    assert in_child(has_run, sys.executable) is True


def test_it_leaves_out_what_it_does_not_use(stack: VirtualPcsc) -> None:
    """A broker imports nothing that it doesn't use, because its first client waits for its start."""
    asks = "import sys; from pcsc_safe.broker import __main__ as it; it._leave_out_classes(); import smartcard.scard; "
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"{asks}print(*sys.modules)"],
        env={**stack.env, "PYTHONPATH": os.pathsep.join(start._import_directories())},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=ENOUGH,
    )
    loaded = {*done.stdout.split()}
    assert "smartcard.scard._scard" in loaded
    assert loaded & {"smartcard.Session", "smartcard.Exceptions", "socket", "runpy", "wrapt", "logging"} == set()


def test_its_interpreter_can_be_named(stack: VirtualPcsc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PCSC_SAFE_BROKER_PYTHON sets the interpreter, otherwise multiprocessing's set_executable()."""
    python = script(tmp_path / "snake", f'echo "$0" >> {shlex.quote(str(tmp_path))}/used\nexec {PYTHON} "$@"')

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
        ("/usr/bin/uwsgi", False, "'/usr/bin/uwsgi', which embeds Python", "set PCSC_SAFE_BROKER_PYTHON to"),
        (None, False, "'', which embeds Python", "set PCSC_SAFE_BROKER_PYTHON to"),
        (
            "/opt/app/app",
            True,
            "'/opt/app/app' is a frozen program",
            "call pcsc_safe.freeze_support() at the beginning",
        ),
    ],
)
def test_where_there_is_no_python_the_error_says_so(
    stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch, executable: Any, frozen: bool, why: str, remedy: str
) -> None:
    """The error of a program without an interpreter, embedded or frozen, has the remedy."""

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
    """The main module of a program that seems to be frozen."""
    sys.frozen = True  # type: ignore[attr-defined]
    sys.executable = executable
    pcsc_safe.freeze_support()

    def child() -> Any:
        session = Session()
        return session.transmit(ECHO), Path(f"/proc/{broker()}/cmdline").read_bytes().split(b"\0")[-2].decode()

    pcsc_safe.configure(policy="broker")
    print(json.dumps([in_child(child), brokers()]))


def test_a_frozen_program_is_its_own_broker(stack: VirtualPcsc, tmp_path: Path) -> None:
    """A program that calls freeze_support() needs no interpreter: it is its own broker (simulated by a script)."""
    program = tmp_path / "program"
    main = tmp_path / "main.py"
    main.write_text(
        f"import sys\nsys.path[:0] = {[str(Path(__file__).parent), str(TESTS)]!r}\n"
        f"import test_broker_start\ntest_broker_start.frozen({str(program)!r})\n"
    )
    script(program, f'exec {PYTHON} {shlex.quote(str(main))} "$@"')
    done = subprocess.run([program], env=stack.env, capture_output=True, text=True, timeout=ENOUGH, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [[ECHOED, "--pcsc-safe-broker"], []]


def interrupted() -> None:
    """Start brokers that signal handlers interrupt; print how many, and the descriptors and children that are left."""
    pcsc_safe.configure(broker_python=shutil.which("true"))
    family.prepare()

    def start_one() -> Any:
        started: list[Any] = []
        family._start_one(False, started)
        return started[0]

    signal.signal(signal.SIGALRM, raise_alarm)
    start_one().discard()
    before, alarms, began = len(descriptors(os.getpid())), 0, time.monotonic()
    while alarms < 100 and time.monotonic() < began + 10:
        started: list[Any] = []
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(50e-6, 2500e-6))
            started.append(start_one())
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Alarm:
            alarms += 1
        for each in started:
            each.discard()
    print(json.dumps([alarms, len(descriptors(os.getpid())) - before, children()]))


@pytest.mark.not_on_macos("its simulation starts processes in Python, where a handler can raise")
@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="CPython 3.10 also runs signal handlers between the end of a function and its caller's next step",
)
def test_a_handler_that_raises_during_the_start(stack: VirtualPcsc) -> None:
    """Nothing is left of a broker whose start a signal handler has interrupted: no descriptor, and no process."""
    alarms, descriptors_left, children_left = told(interrupted, env=stack.env)
    assert (alarms >= 20, descriptors_left, children_left) == (True, 0, [])


# A broker can't start.

RUN = f'exec {PYTHON} "$@"'
NO_INTERPRETER = "set PCSC_SAFE_BROKER_PYTHON to the path of the Python interpreter that has pcsc_safe"


def fails(python: str, within: float = 30.0) -> tuple[list[str], int, list[int], bool]:
    """Return a child's errors with this interpreter, what is left of the broker, and whether a right one then works.

    :param within: seconds in which a broker must be ready.
    """

    def told() -> str:
        with pytest.raises(BrokerError) as caught:
            establish()
        return str(caught.value)

    def child() -> Any:
        pcsc_safe.configure(broker_python=python)
        client._READY_TIMEOUT, start._EXIT_TIMEOUT = within, min(within, start._EXIT_TIMEOUT)
        messages = [told()]
        before = len(descriptors(os.getpid()))
        messages += [told(), told()]
        left = len(descriptors(os.getpid())) - before, children()
        pcsc_safe.configure(broker_python="")
        client._READY_TIMEOUT = 30.0
        return (messages, *left, bool(establish()))

    answer: tuple[list[str], int, list[int], bool] = in_child(by_broker(child))
    return answer


@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        (None, 0, ["No such file or directory", NO_INTERPRETER]),
        (f"#!/bin/sh\n{RUN}", 0o644, ["Permission denied", NO_INTERPRETER]),
        ("no program", 0o755, ["Exec format error", NO_INTERPRETER]),
        ("#!/no/such/shell", 0o755, ["No such file or directory", NO_INTERPRETER]),
        ("#!/bin/sh\nexec true", 0o755, ["it ended with status 0"]),
        ('#!/bin/sh\nexec cat "$@"', 0o755, ["cat", "it ended with status 1"]),
        ("#!/bin/sh\nexec sleep 1000", 0o755, ["it was not ready in time"]),
        ("#!/bin/sh\necho no; echo the cause >&2; exit 7", 0o755, ["the cause; it ended with status 7"]),
        ("#!/bin/sh\nkill -9 $$", 0o755, ["signal 9 ended it"]),
        (f'#!/bin/sh\nexec {PYTHON} -I -S "$@"', 0o755, ["No module named", "pcsc_safe", "status 1"]),
        (f"#!/bin/sh\nulimit -v 20000; {RUN}", 0o755, ["; it ended with status"]),
        (f"#!/bin/sh\nulimit -n 5; {RUN}", 0o755, ["; it ended with status"]),
    ],
    ids=[
        *("none", "not executable", "no program", "no shell", "true", "cat", "sleep", "says why", "killed"),
        *("no pcsc_safe", "no memory", "no descriptors"),
    ],
)
def test_no_broker_and_why(stack: VirtualPcsc, tmp_path: Path, text: Any, mode: int, expected: list[str]) -> None:
    """Each BrokerError has the cause and the remedy. Nothing is left of the broker, and a right one then works."""
    python = tmp_path / "python"
    if text is not None:
        python.write_text(text + "\n")
        python.chmod(mode)
    messages, *left_and_then = fails(str(python), within=0.3 if "sleep" in str(text) else 30.0)
    if NO_INTERPRETER not in expected:  # the error has the interpreter's own path, to copy into a shell
        expected = [*expected, f"run {python} -m pcsc_safe.broker --help to see why"]
    for message in messages:
        assert [part for part in (*expected, "PCSC_SAFE_BROKER_PYTHON") if part not in message] == [], message
    assert left_and_then == [0, [], True]


def test_a_broker_of_another_version(stack: VirtualPcsc, tmp_path: Path) -> None:
    """The error says that the versions differ. The broker is not left alive."""
    code = "from pcsc_safe.broker import wire, __main__; wire.VERSION = 999; __main__.main([])"
    messages, *left_and_then = fails(script(tmp_path / "python", f'exec {PYTHON} -c "{code}"'))
    assert all("both have to run the same version of pcsc_safe" in message for message in messages)
    assert left_and_then == [0, [], True]


def test_brokers_that_die_again_and_again(stack: VirtualPcsc, tmp_path: Path) -> None:
    """After several attempts BrokerError is raised, also by ``import pcsc_safe.scard``."""
    dies = "from pcsc_safe._core import library; library.catalogue = lambda: __import__('os')._exit(1); "
    code = f"{dies}from pcsc_safe.broker import __main__; __main__.main([])"
    python = script(tmp_path / "python", f'exec {PYTHON} -c "{code}"')
    env = {**stack.env, "PCSC_SAFE_BROKER": "always", "PCSC_SAFE_BROKER_PYTHON": python}
    done = in_program(imports, env=env)
    message, left = json.loads(done.stdout)
    assert "ended as soon as they had started" in message
    assert left == []


def attempt(limit: int, value: int) -> Any:
    """Establish a context under a limit of this process; return the outcome, and what is left of it if it failed."""
    soft, hard = resource.getrlimit(limit)
    before = len(descriptors(os.getpid()))
    resource.setrlimit(limit, (value, hard))
    try:
        answer: Any = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    except BrokerError as error:
        answer = str(error)
    finally:
        resource.setrlimit(limit, (soft, hard))
    if isinstance(answer, str):
        return answer, len(descriptors(os.getpid())) - before, children() == brokers()
    return answer[0]


def test_no_descriptor_to_be_had(stack: VirtualPcsc) -> None:
    """With any number of free descriptors there is a BrokerError that says so, or a broker, and none is leaked."""

    def child() -> Any:
        family.prepare()
        before = len(descriptors(os.getpid()))
        outcomes = [attempt(resource.RLIMIT_NOFILE, limit) for limit in range(before, before + 50)]
        return outcomes, len(brokers())

    outcomes, alive = in_child(by_broker(child))
    failed = [outcome for outcome in outcomes if outcome != OK]
    assert len(failed) > 3
    assert [outcome for outcome in failed if outcome[1:] != [0, True] and outcome[1:] != (0, True)] == []
    assert {word for text, *_ in failed for word in ("Too many open files", "Invalid argument") if word in text}
    assert outcomes[-10:] == [OK] * 10
    assert alive == 1


def test_no_process_to_be_had(stack: VirtualPcsc) -> None:
    """BrokerError says that no process can be started, and nothing is leaked."""

    def child() -> Any:
        if not os.getuid():
            os.setresuid(65534, 65534, 65534)  # root has no limit
        return attempt(resource.RLIMIT_NPROC, 0)

    text, leaked, no_zombies = in_child(by_broker(child))
    assert os.strerror(errno.EAGAIN) in text
    assert (leaked, no_zombies) == (0, True)


def test_no_memory_to_be_had(stack: VirtualPcsc) -> None:
    """BrokerError says that there is no memory, and nothing is leaked."""

    def child() -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return attempt(resource.RLIMIT_AS, pages * resource.getpagesize())

    text, leaked, no_zombies = in_child(by_broker(child))
    assert os.strerror(errno.ENOMEM) in text
    assert (leaked, no_zombies) == (0, True)
