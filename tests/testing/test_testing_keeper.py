"""The keeper of a virtual stack: what it doesn't change, and how its death is reported."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forking import in_program
from interrupts import Alarm
from places import ROOT

from pcsc_safe.testing import PcscStackError, VirtualPcsc, _daemon, _install, _keeper

NOBODY = 65534

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the virtual PC/SC stack runs on Linux")


# The process id of the system's pcscd.


def fake_pcscd(tmp_path: Path, body: str) -> tuple[str, ...]:
    """A shell script with this body, to be run as pcscd."""
    path = tmp_path / "fake-pcscd"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return (str(path),)


WRITES = 'printf "$$\\n\\0" 1<> {}; exec sleep 60'
FAILS = "rm -f {}; exit 1"  # it has also written to the file, but the keeper may not have seen that
FAILS_LATER = 'printf "$$\\n\\0" 1<> {0}; until [ -e {1} ]; do sleep 0.01; done; rm {0}; exit 1'


def may_mount() -> bool:
    """Whether this machine lets pcscd have its own mount namespace."""
    return os.geteuid() == 0 and _keeper.run(*_keeper.in_mount_namespace("/tmp", "/tmp"), "true")


needs_mount = pytest.mark.skipif(not may_mount(), reason="no mount namespace as this user, or in this chroot")


@pytest.fixture(params=[pytest.param("hidden", marks=needs_mount), "put back"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the file is protected: by a mount namespace, or by putting it back where a mount is not permitted."""
    if request.param == "put back":
        monkeypatch.setattr(_keeper, "run", lambda *_: False)
    return str(request.param)


def a_keeper(tmp_path: Path, before: bytes | None, body: str) -> tuple[_keeper.Keeper, Path]:
    """A keeper whose pcscd is a shell script, and the PID file of the system's pcscd."""
    system, home = tmp_path / "run", tmp_path / "home"
    system.mkdir()
    home.mkdir()
    file = system / _keeper.PID_NAME
    if before is not None:
        file.write_bytes(before)
    command = fake_pcscd(tmp_path, body.format(file))
    return _keeper.Keeper(str(home), str(tmp_path / "link"), str(system), command), file


@pytest.mark.parametrize("before", [b"1\n\0", b"1234567890\n\0", None])
@pytest.mark.usefixtures("way")
def test_the_pid_file_is_put_back(tmp_path: Path, before: bytes | None) -> None:
    """When a start or a restart returns, the PID file of another pcscd has its old content again."""
    keeper, file = a_keeper(tmp_path, before, WRITES)
    for _ in range(2):
        pid = keeper.start()
        assert (file.read_bytes() if file.exists() else None) == before
        os.kill(pid, 0)
    keeper.clean_up()
    assert (file.read_bytes() if file.exists() else None) == before
    assert list(file.parent.iterdir()) == ([] if before is None else [file])


@pytest.mark.usefixtures("way")
def test_a_pcscd_that_ends_or_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start doesn't wait for a pcscd that writes no PID file, and removes nothing but pcscd's own number."""
    home = tmp_path / "home"
    home.mkdir()
    file = tmp_path / _keeper.PID_NAME
    file.write_bytes(b"1\n\0")
    monkeypatch.setattr(_keeper, "TIMEOUT", 0.05)
    for body in ("exit 1", "exec sleep 60"):
        keeper = _keeper.Keeper(str(home), str(tmp_path / "link"), str(tmp_path), fake_pcscd(tmp_path, body))
        keeper.start()
        keeper.kill()
        assert file.read_bytes() == b"1\n\0"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("before", [b"1\n\0", None])
def test_a_pcscd_that_fails_to_start(tmp_path: Path, before: bytes | None) -> None:
    """A pcscd that fails to start removes the PID file as it ends; the keeper restores the system's."""
    keeper, file = a_keeper(tmp_path, before, FAILS)
    keeper.start()
    os.waitid(os.P_PID, keeper.pid, os.WEXITED | os.WNOWAIT)
    assert _keeper.content(str(file)) == before
    keeper.clean_up()
    assert _keeper.content(str(file)) == before


@needs_mount
def test_a_pcscd_that_fails_later(tmp_path: Path) -> None:
    """A pcscd that fails later removes only its own PID file."""
    home, file = tmp_path / "home", tmp_path / _keeper.PID_NAME
    home.mkdir()
    file.write_bytes(b"1\n\0")
    body = FAILS_LATER.format(file, home / "go")
    keeper = _keeper.Keeper(str(home), str(tmp_path / "link"), str(tmp_path), fake_pcscd(tmp_path, body))
    keeper.start()
    (home / "go").touch()
    os.waitid(os.P_PID, keeper.pid, os.WEXITED | os.WNOWAIT)
    assert file.read_bytes() == b"1\n\0"
    keeper.clean_up()


def systems_pid_file() -> bytes | None:
    """The content of the file, read while no keeper on this machine is starting a pcscd."""
    installed = _install.look()
    assert isinstance(installed, _install.Installed)
    lock = os.open(_keeper.nearest(installed.directory), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return _keeper.content(os.path.join(installed.directory, _keeper.PID_NAME))
    finally:
        os.close(lock)


def test_the_systems_pid_file() -> None:
    """A stack doesn't change the PID file of the system's pcscd, even if it runs as root."""
    before = systems_pid_file()
    with VirtualPcsc(activate=False) as stack, VirtualPcsc(activate=False):
        assert systems_pid_file() == before
        stack.restart()
        assert systems_pid_file() == before
    assert systems_pid_file() == before


SYSTEMS = b"1234567\n\0"


def program_with_stacks() -> None:
    """Print whether the PID file of the system's pcscd is unchanged, during and after each possible end of a stack."""
    file = installed_pid_file()
    file.write_bytes(SYSTEMS)
    seen = {}

    def look(when: str) -> None:
        seen[when] = _keeper.content(str(file)) == SYSTEMS

    with VirtualPcsc(activate=False) as stack:
        look("a stack")
        os.kill(stack.pid, signal.SIGTERM)
        until_gone(Path(f"/proc/{stack.pid}/stat"))
        look("pcscd ended by SIGTERM")
        stack.restart()
        look("a restart")
    look("after a stack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_daemon.Daemon, "_command", lambda self: ["/bin/sh", "-c", FAILS.format(file)])
        with pytest.raises(PcscStackError), VirtualPcsc(activate=False):
            pass
    look("a start that failed")
    kill_a_program_with_a_stack()
    look("a program that was killed")
    print(json.dumps(seen))


def installed_pid_file() -> Path:
    installed = _install.look()
    assert isinstance(installed, _install.Installed)
    return Path(installed.directory, _keeper.PID_NAME)


def until_gone(path: Path) -> None:
    """Wait until a path is removed, or is that of a zombie process."""
    for _ in range(1000):
        if not path.exists() or (path.name == "stat" and path.read_text().rpartition(")")[2].split()[0] == "Z"):
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def kill_a_program_with_a_stack() -> None:
    source = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pcsc_safe.testing import VirtualPcsc
with VirtualPcsc(activate=False) as stack:
    print(stack._daemon.home, flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        home = process.stdout.readline().strip()
        process.kill()
    until_gone(Path(home))


@needs_mount
def test_the_systems_pid_file_whatever_happens() -> None:
    """As root, the PID file is unchanged during and after a stack that is killed, ends or fails."""
    directory = installed_pid_file().parent
    if not directory.is_dir():
        pytest.skip(f"there is no {directory}")
    script = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
    prefix = ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(directory))
    done = in_program(program_with_stacks, prefix=prefix)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) == 6
    assert all(seen.values()), seen


# What an interrupted request leaves.


def test_replies_that_nobody_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a signal handler raises while the stack waits for the keeper, the next request gets the reply to itself."""

    def interrupt() -> None:
        raise Alarm

    with VirtualPcsc(activate=False) as stack:
        assert stack._daemon is not None
        with monkeypatch.context() as patch:
            patch.setattr(stack._daemon, "_reply", interrupt)
            for change in (stack.kill, stack.start, stack.restart):
                with pytest.raises(Alarm):
                    change()
        stack.start()
        assert Path(f"/proc/{stack.pid}/cmdline").read_bytes().count(stack._daemon.home.encode())
        pid = stack.pid
        stack.kill()
        assert not Path(f"/proc/{pid}").exists()


# How it ends.


def test_signals_while_the_keeper_cleans_up() -> None:
    """However many signals end the keeper, it kills pcscd and removes the directory; systemd sends two at once."""
    with VirtualPcsc(activate=False) as stack:
        assert stack._daemon is not None
        keeper, pid, home = stack._daemon._process, stack.pid, stack._daemon.home
        while keeper.poll() is None:
            keeper.send_signal(signal.SIGTERM)
            keeper.send_signal(signal.SIGHUP)
        assert not Path(home).exists()
        assert not Path(f"/proc/{pid}").exists()


# How its death is reported.


def refusal(monkeypatch: pytest.MonkeyPatch, keeper: Path) -> str:
    monkeypatch.setattr(_daemon, "_KEEPER", str(keeper))
    with pytest.raises(PcscStackError) as raised, VirtualPcsc(activate=False):
        pass
    return str(raised.value)


@pytest.mark.parametrize(
    ("source", "problem", "remedy"),
    [
        ("raise MemoryError('no room')", "(exit status 1: MemoryError: no room)", "Traceback"),
        ("import os; os.kill(os.getpid(), 9)", "(signal 9)", "what killed it"),
        ("raise SystemExit(3)", "(exit status 3)", "report this"),
    ],
)
def test_why_the_keeper_died(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, problem: str, remedy: str
) -> None:
    """The error says how the keeper ended, and contains its output."""
    keeper = tmp_path / "keeper.py"
    keeper.write_text(source)
    said = refusal(monkeypatch, keeper)
    assert f"the process that supervises pcscd has died {problem}" in said
    assert remedy in said


def test_a_keeper_that_dies_later() -> None:
    """If the keeper is killed while the stack runs, the error says so."""
    with VirtualPcsc(activate=False) as stack:
        assert stack._daemon is not None
        os.kill(stack._daemon._process.pid, signal.SIGKILL)
        os.kill(stack.pid, signal.SIGKILL)  # the keeper can't do it any more
        for _ in range(2):
            with pytest.raises(PcscStackError, match=r"has died \(signal 9\)"):
                stack.kill()
        shutil.rmtree(stack._daemon.home)


def test_a_keeper_that_this_user_can_not_read(tmp_path: Path) -> None:
    """If a user can't read the checkout, the error names it and the remedy."""
    keeper = tmp_path / "keeper.py"
    keeper.write_text("raise SystemExit(0)")
    keeper.chmod(0)
    source = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pcsc_safe.testing import VirtualPcsc, PcscStackError, _daemon
_daemon._KEEPER = {str(keeper)!r}
if not os.geteuid():
    os.setuid({NOBODY})
try:
    VirtualPcsc(activate=False).__enter__()
except PcscStackError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert "Permission denied" in done.stdout
    remedies = (f"let this user read {keeper}", "check that this user may run")
    assert any(remedy in done.stdout for remedy in remedies)


def test_a_python_that_can_not_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If a user can't run this Python, the error names it."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(PcscStackError, match=r"can't be started: .*No such file.*; check that this user may run"):
        VirtualPcsc(activate=False).__enter__()


def test_a_directory_that_can_not_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If the stack's directory can't be made, the error names TMPDIR."""
    monkeypatch.setattr(_daemon, "short_temporary_path", lambda: str(tmp_path / "none" / "stack"))
    with pytest.raises(PcscStackError, match="TMPDIR"):
        VirtualPcsc(activate=False).__enter__()
