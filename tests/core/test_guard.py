"""``guard_native``: a forked child has none of its parent's connections to pcscd, and everything else."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Session
from forking import fork, in_child, in_program
from interrupts import as_of_c
from own_descriptors import descriptors as open_descriptors
from own_descriptors import is_dead
from rawscard import raw

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import connections, descriptors
from pcsc_safe.errors import SettingsError
from pcsc_safe.policy import Settings, from_environment
from pcsc_safe.testing import VirtualPcsc

pytestmark = pytest.mark.native

fork_from_c = ctypes.PyDLL(None).fork


@contextlib.contextmanager
def native_context() -> Iterator[int]:
    """Establish a context that pcsc_safe doesn't know; yield the number of its connection."""
    before = set(open_descriptors())
    hresult, context = raw.SCardEstablishContext(raw.SCARD_SCOPE_SYSTEM)
    assert hresult == raw.SCARD_S_SUCCESS
    (number,) = set(open_descriptors()) - before
    try:
        yield number
        assert not is_dead(number)
        assert raw.SCardListReaders(context, [])[0] == raw.SCARD_S_SUCCESS
    finally:
        raw.SCardReleaseContext(context)


@pytest.fixture
def number(shared_stack: VirtualPcsc) -> Iterator[int]:
    """Yield the number of a native context's connection; the context must survive the test."""
    with native_context() as number:
        yield number


def test_it_is_off_by_default(number: int) -> None:
    """No connection is touched by default, nor after the guard was switched off."""
    assert in_child(is_dead, number) is False
    pcsc_safe.configure(guard_native=True)
    assert in_child(is_dead, number) is True
    assert pcsc_safe.configure(guard_native=False).guard_native is False
    assert in_child(is_dead, number) is False


def test_every_connection_is_dead_in_every_descendant(number: int, session: Session) -> None:
    """All native connections are dead in every descendant. pcsc_safe's contexts work as the policy says."""
    pcsc_safe.configure(guard_native=True)

    def child() -> Any:
        dead = all(map(is_dead, numbers))
        return dead, safe.SCardListReaders(session.context, [])[0]

    with contextlib.ExitStack() as more:
        numbers = [number, *(more.enter_context(native_context()) for _ in range(20))]
        assert in_child(child) == (True, safe.SCARD_S_SUCCESS)
        assert in_child(lambda: in_child(child)) == (True, safe.SCARD_S_SUCCESS)


def test_a_child_has_connections_of_its_own(shared_stack: VirtualPcsc) -> None:
    """A connection that a child opens stays alive there, and is dead in the child's children."""
    pcsc_safe.configure(guard_native=True)

    def child() -> Any:
        with native_context() as own:
            safe.SCardReleaseContext(safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1])
            return is_dead(own), in_child(is_dead, own)

    assert in_child(child) == (False, True)


def test_other_threads_connections(number: int) -> None:
    """Any thread may open the connection, and any thread may fork."""
    pcsc_safe.configure(guard_native=True)
    told = []
    thread = threading.Thread(target=lambda: told.append(in_child(is_dead, number)))
    thread.start()
    thread.join()
    assert told == [True]


def others() -> list[socket.socket]:
    """Return sockets of every kind that an application has."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"\0pcsc_safe {os.getpid()}")
    listening.listen()
    abstract = socket.socket(socket.AF_UNIX)
    abstract.connect(listening.getsockname())
    internet = socket.create_server(("127.0.0.1", 0))
    connected = socket.create_connection(internet.getsockname())
    return [
        listening,
        abstract,
        listening.accept()[0],
        internet,
        connected,
        internet.accept()[0],
        *socket.socketpair(),
        *socket.socketpair(type=socket.SOCK_DGRAM),
        socket.socket(socket.AF_UNIX),
    ]


def test_nothing_else_is_touched(number: int, tmp_path: Path) -> None:
    """Sockets, pipes and files don't change, in the child and in the parent. Blocking ones stay blocking."""
    pcsc_safe.configure(guard_native=True)
    named = socket.socket(socket.AF_UNIX)
    named.bind(str(tmp_path / "pcscd.comm.of.mine"))
    named.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(named.getsockname())
    sockets = [*others(), named, client, named.accept()[0]]
    files = [*os.pipe(), os.open(tmp_path, os.O_RDONLY), os.open(os.devnull, os.O_RDWR)]
    numbers = [*(one.fileno() for one in sockets), *files]

    def state() -> Any:
        return [(os.fstat(one).st_ino, fcntl.fcntl(one, fcntl.F_GETFL)) for one in numbers]

    before = state()
    socket.setdefaulttimeout(20)  # with a default timeout, a careless check makes a socket non-blocking
    try:
        assert in_child(lambda: (is_dead(number), state())) == (True, before)
    finally:
        socket.setdefaulttimeout(None)
    assert state() == before
    for one in sockets:
        one.close()
    for file in files:
        os.close(file)


def test_the_path_of_pcscd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket at any path that PCSCLITE_CSOCK_NAME has had counts, also through a symbolic link."""
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    listening, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with listening, client:
        listening.bind(str(real / "comm"))
        listening.listen()
        client.connect(listening.getsockname())
        pcsc_safe.configure(guard_native=True)
        assert in_child(is_dead, client.fileno()) is False
        monkeypatch.setenv("PCSCLITE_CSOCK_NAME", str(tmp_path / "link" / "comm"))
        pcsc_safe.configure(guard_native=True)
        monkeypatch.setenv("PCSCLITE_CSOCK_NAME", "/nowhere")
        assert in_child(is_dead, client.fileno()) is True
        assert is_dead(client.fileno()) is False
    connections._paths.clear()


def test_handover_and_the_guard(session: Session, number: int) -> None:
    """A connection that is handed over is alive in the child, and no other is. It is dead in the child's children."""
    pcsc_safe.configure(guard_native=True)
    context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1]
    given, stays = (one._self_record.real.descriptors()[0].number for one in (context, session.context))
    read_end, write_end = os.pipe()
    with pcsc_safe.handover(context):
        pid = fork()
    if pid == 0:
        try:
            signal.alarm(20)
            dead = [is_dead(given), is_dead(stays), is_dead(number), in_child(is_dead, given)]
            os.write(write_end, json.dumps([*dead, safe.SCardListReaders(context, [])[0]]).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end) as pipe:
        assert json.load(pipe) == [False, True, True, True, safe.SCARD_S_SUCCESS]
    os.waitpid(pid, 0)
    safe.SCardReleaseContext(context)


def test_a_fork_from_c_is_guarded_at_first_use(number: int) -> None:
    """After a fork by C code, the child's first pcsc_safe call makes the parent's connections dead, not its own."""
    pcsc_safe.configure(guard_native=True)

    def child() -> Any:
        with native_context() as own:
            before = is_dead(number)
            safe.SCardReleaseContext(safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1])
            return before, is_dead(number), is_dead(own)

    assert in_child(child, fork=lambda: int(fork_from_c())) == (False, True, False)


def test_the_dead_socket_was_closed(number: int) -> None:
    """The guard works even if the application has closed the dead socket."""
    pcsc_safe.configure(guard_native=True)
    assert descriptors._dead_socket is not None
    os.close(descriptors._dead_socket.number)
    assert in_child(is_dead, number) is True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_handler_raises_in_the_middle(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of a signal handler is lost, as in every hook, but the guard still works."""
    pcsc_safe.configure(guard_native=True)
    look, interrupted = descriptors.find_others, list[int]()

    def others() -> Any:
        if not interrupted:
            interrupted.append(1)
            raise KeyboardInterrupt
        return look()

    monkeypatch.setattr(descriptors, "find_others", others)
    assert in_child(lambda: (is_dead(number), interrupted)) == (True, [1])


@pytest.mark.parametrize("free", [0, 1, 3])
def test_no_descriptor_is_free(number: int, free: int) -> None:
    """A process at its limit of open files guards its children too."""
    pcsc_safe.configure(guard_native=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filler: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 20, hard))
        with contextlib.suppress(OSError):
            while True:
                filler.append(os.dup(0))
        for _ in range(free):
            os.close(filler.pop())
        pid = fork()
        if pid == 0:
            os._exit(0 if descriptors.is_dead(number) else 1)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for one in filler:
            os.close(one)


def test_without_proc(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard tries every number if it can't list the descriptors, as in a chroot."""
    pcsc_safe.configure(guard_native=True)

    def no_proc(path: Any, *arguments: Any, **keywords: Any) -> int:
        assert path == "/proc/self/fd"
        raise FileNotFoundError(path)

    class Os:
        """The module, on a system without /proc."""

        open = staticmethod(as_of_c(no_proc))

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    monkeypatch.setattr(connections, "os", Os())
    assert in_child(lambda: descriptors.is_dead(number)) is True


def test_subprocesses_are_none_of_its_business(number: int) -> None:
    """A program that is exec'd gets the descriptors passed to it, even with a preexec_fn, for which hooks run."""
    pcsc_safe.configure(guard_native=True)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send = f"import socket; socket.socket(fileno={theirs.fileno()}).send(b'x')"
        for more in ({}, {"preexec_fn": os.getpid}):
            subprocess.run([sys.executable, "-c", send], pass_fds=[theirs.fileno()], check=True, timeout=20, **more)  # type: ignore[call-overload]
            assert ours.recv(10) == b"x"


@pytest.mark.parametrize("text", ["1", "true", "YES", "On", True, 1])
def test_how_to_say_yes(text: Any) -> None:
    assert pcsc_safe.configure(guard_native=text).guard_native is True
    assert from_environment({"PCSC_SAFE_GUARD_NATIVE": str(text)}) == Settings(guard_native=True)


@pytest.mark.parametrize("text", ["0", "false", "NO", "Off", False, 0])
def test_how_to_say_no(text: Any) -> None:
    pcsc_safe.configure(guard_native=True)
    assert pcsc_safe.configure(guard_native=text).guard_native is False
    assert from_environment({"PCSC_SAFE_GUARD_NATIVE": str(text)}) == Settings()


def test_what_is_neither_is_refused() -> None:
    """The error lists the valid values. A single context can't have the setting."""
    choices = "use one of '1', 'true', 'yes', 'on', '0', 'false', 'no', 'off'"
    with pytest.raises(SettingsError, match=f"^guard_native cannot be 'maybe'; {choices}$"):
        pcsc_safe.configure(guard_native="maybe")
    with pytest.raises(SettingsError, match=f"^PCSC_SAFE_GUARD_NATIVE cannot be '2'; {choices}$"):
        from_environment({"PCSC_SAFE_GUARD_NATIVE": "2"})
    with pytest.raises(SettingsError, match="guard_native cannot be set for one context"):
        pcsc_safe.configure(guard_native=True, context=4711)


def test_import_alone(shared_stack: VirtualPcsc) -> None:
    """With PCSC_SAFE_GUARD_NATIVE ``import pcsc_safe`` is enough. It refuses an invalid value."""
    done = in_program(only_imports, env={**shared_stack.env, "PCSC_SAFE_GUARD_NATIVE": "on"})
    assert (done.stdout, done.stderr) == ("[true, false]\n", "")
    done = in_program(only_imports, env={**shared_stack.env, "PCSC_SAFE_GUARD_NATIVE": "perhaps"})
    assert done.returncode == 1
    assert "SettingsError: PCSC_SAFE_GUARD_NATIVE cannot be 'perhaps'; use one of '1', 'true'" in done.stderr


def only_imports() -> None:
    """Print whether a connection to pcscd is dead in a child, and then whether it is dead here."""
    import pcsc_safe

    assert pcsc_safe.__version__
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["PCSCLITE_CSOCK_NAME"])
        pid = os.fork()
        if pid == 0:
            os._exit(is_dead(connection.fileno()))
        print(json.dumps([os.waitpid(pid, 0)[1] == 1 << 8, is_dead(connection.fileno())]))


def test_the_guard_loads_no_pyscard() -> None:
    """The guard imports neither pyscard nor wrapt: a program that uses only PKCS#11 needs neither."""
    code = "import sys, pcsc_safe; sys.exit(bool({'smartcard', 'wrapt'} & set(sys.modules)))"
    env = {**os.environ, "PCSC_SAFE_GUARD_NATIVE": "1"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=20)


def test_configure_alone_is_enough() -> None:
    """configure() alone guards a program that uses only PKCS#11 and never imports pcsc_safe.scard."""
    code = (
        "import sys, pcsc_safe; pcsc_safe.configure(guard_native=True); assert 'smartcard' not in sys.modules\n"
        "from pcsc_safe._core import descriptors; assert descriptors.find_others is not tuple"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
