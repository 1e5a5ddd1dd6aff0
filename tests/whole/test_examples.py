"""The examples do what their headers say, on the virtual stack."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

import pytest
from places import EXAMPLES

from pcsc_safe.testing import VirtualPcsc


def command(name: str, *arguments: str) -> list[str]:
    """A program that dumps its stacks on SIGABRT, which its watchdog sends."""
    return [sys.executable, "-X", "faulthandler", str(EXAMPLES / name), *arguments]


def run(stack: VirtualPcsc, name: str, *arguments: str) -> tuple[int, str, str]:
    """Run an example to its end; after 20 s, it and its children dump their stacks and are killed."""
    process = subprocess.Popen(
        command(name, *arguments),
        env=stack.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(20, os.killpg, (process.pid, signal.SIGABRT))
    watchdog.start()
    try:
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err
    finally:
        watchdog.cancel()
        watchdog.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_report_2015(pcsc_stack: VirtualPcsc) -> None:
    """With the report of 2015, child and parent list the readers, no process crashes, and nothing is left at pcscd."""
    readers = [reader.name for reader in pcsc_stack.readers]
    status, out, err = run(pcsc_stack, "report_2015.py")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"child: Command successful. {readers}",
        "child ended with 0",
        f"parent: Command successful. {readers}",
    ]


class Daemon:
    """The example daemon, and a conversation with it."""

    def __init__(self, pid: int, path: str) -> None:
        self.pid = pid
        self.path = path
        self.end = os.pidfd_open(pid)

    def ask(self, *lines: str) -> list[str]:
        """The daemon's responses to these lines, in one connection."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(self.path)
            client.sendall("".join(f"{line}\n" for line in lines).encode())
            client.shutdown(socket.SHUT_WR)
            with client.makefile(encoding="ascii") as answers:
                return answers.read().splitlines()

    def stop(self) -> bool:
        """Send SIGTERM; return whether the daemon ended within 20 s."""
        os.kill(self.pid, signal.SIGTERM)
        return bool(select.select([self.end], [], [], 20)[0])


@pytest.fixture
def daemon(pcsc_stack: VirtualPcsc) -> Iterator[Daemon]:
    """The example daemon in the background; ended after the test."""
    if not hasattr(os, "pidfd_open"):
        pytest.skip("the end of a process that is not our child can't be awaited here")
    # Not tmp_path: the path of a socket has to be short.
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "card.sock")
        status, out, err = run_daemon(pcsc_stack, path)
        assert (status, err) == (0, "")
        daemon = Daemon(int(out), path)
        try:
            yield daemon
        finally:
            # By the descriptor: another process may have the PID by now.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(daemon.end, signal.SIGKILL)
            os.close(daemon.end)


def run_daemon(stack: VirtualPcsc, path: str) -> tuple[int, str, str]:
    """Start the daemon; return when the program in the foreground has ended."""
    done = subprocess.run(
        command("card_daemon.py", path), env=stack.env, capture_output=True, text=True, timeout=30, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_daemon(pcsc_stack: VirtualPcsc, daemon: Daemon) -> None:
    """The daemon uses the readers that it opened before it forked, and ends on SIGTERM with nothing left behind."""
    assert daemon.ask("80010000021234", "80010000025678") == ["12349000", "56789000"]
    assert daemon.ask("nonsense") == ["error: not a command in hex"]
    assert pcsc_stack.clients() == 1
    assert daemon.stop()
    assert not os.path.exists(daemon.path)
    pcsc_stack.wait_for_clients(0)


def test_daemon_goes_on_after_a_reset_by_somebody_else(pcsc_stack: VirtualPcsc, daemon: Daemon) -> None:
    """The daemon reconnects after a reset by another application as it does after the fork."""
    assert daemon.ask("80010000021234") == ["12349000"]
    pcsc_stack.readers[0].reset()
    assert daemon.ask("80010000025678") == ["56789000"]


def test_daemon_without_a_card_fails_in_the_foreground(pcsc_stack: VirtualPcsc) -> None:
    """A missing card is reported on the terminal, and no daemon is left."""
    pcsc_stack.readers[0].remove()
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "card.sock")
        status, out, err = run(pcsc_stack, "card_daemon.py", path)
        assert (status, out) == (1, "")
        assert err.startswith("SCardConnect: ")
        assert not os.path.exists(path)
