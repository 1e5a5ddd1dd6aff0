"""One private pcscd: its directory, its configuration, and the keeper that runs it.

Invariant: the directory, pcscd and the keeper no longer exist when `Daemon.close` has returned, or soon after this
process has died without calling it.

At a fork: only the process that made a Daemon talks to the keeper; the child's copy of the connection is never used.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import _keeper, _slots
from ._errors import PcscStackError
from ._install import Installed

_SUN_PATH_MAX = 107
_NO_PORT = "0x1" + "0" * 32  # vpcd refuses what no number type has room for
_KEEPER = os.path.abspath(_keeper.__file__)


def short_temporary_path() -> str:
    """A path that no other process uses, short enough for a socket in it; nothing is created."""
    name = f"pcsc-safe-{os.getpid()}-{secrets.token_hex(4)}"
    usual = os.path.join(tempfile.gettempdir(), name)
    return usual if len(os.fsencode(usual)) + 16 <= _SUN_PATH_MAX else os.path.join("/tmp", name)  # noqa: S108 - the name is a secret, and mkdir refuses one that exists


class Daemon:
    """A pcscd that can be started, killed and started again.

    :param installed: the programs.
    :param link: the symbolic link that may point to this daemon's socket later; it is removed when this process dies.
    :param timeout: seconds that the keeper may take for each request.
    """

    def __init__(self, installed: Installed, link: str, timeout: float) -> None:
        self.home = short_temporary_path()
        self.path = os.path.join(self.home, _keeper.SOCKET_NAME)
        self.pid = 0
        self._installed = installed
        self._requests = 0
        # Messages, not a stream: an exception of a signal handler must not separate the parts of a reply.
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(timeout)
        try:
            self._process = self._start_keeper(theirs.fileno(), link)
        except OSError as error:
            self._control.close()
            problem = f"the process that supervises pcscd can't be started: {error}"
            raise PcscStackError(problem, remedy=f"check that this user may run {sys.executable}") from error
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        try:
            self._reply()
        except BaseException:
            self.close()
            raise

    def _start_keeper(self, control: int, link: str) -> subprocess.Popen[bytes]:
        more = [self.home, link, self._installed.directory, str(os.getpid()), *self._command()]
        return subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-I", "-S", _KEEPER, *more],
            stdin=control,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # out of reach of the terminal's Ctrl-C, which is for the test to handle first
            start_new_session=True,
        )

    def configure(
        self, devices: Sequence[tuple[str, int]], hidden: Sequence[int] = (), *, refused: bool = False
    ) -> None:
        """Write reader.conf.d.

        :param devices: friendly name and first TCP port of each vpcd device.
        :param hidden: first TCP ports of devices that pcscd should add and remove again, see :mod:`_slots`.
        :param refused: whether there should be one more device that can't be opened.
        """
        config = self._config
        config.mkdir(exist_ok=True)
        entries = [_entry(name, f"{port:#x}", port, self._driver(at)) for at, (name, port) in enumerate(devices)]
        channel = 1  # all one, no other device's
        for at, port in enumerate(hidden, len(devices)):
            entries.append(_entry(_slots.HIDDEN, f"{port:#x}", channel, self._driver(at)))
        if refused or hidden:
            entries.append(_entry(_slots.HIDDEN, _NO_PORT, channel, self._driver(0)))
        Path(config, "vpcd").write_text("\n".join(entries))

    def settle(self) -> None:
        """Remove reader.conf.d: pcscd has read it, and would try again at each :func:`nudge` what it has refused."""
        Path(self._config, "vpcd").unlink()

    def start(self) -> None:
        """Start pcscd; one that runs is killed first."""
        self.pid = 0
        self.pid = int(self._request("start").split()[1])

    def kill(self) -> None:
        """SIGKILL pcscd and wait for its end."""
        self.pid = 0
        self._request("kill")

    def log(self) -> str:
        """What pcscd has logged, over all its starts."""
        try:
            return Path(self.home, _keeper.LOG_NAME).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def close(self) -> None:
        """Kill pcscd, remove the directory, wait for the keeper."""
        self.pid = 0
        # the end of the connection is the end of the keeper, also where a child holds a copy of it
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait()
        finally:
            self._control.close()
            assert self._process.stderr is not None
            self._process.stderr.close()

    @property
    def _config(self) -> Path:
        return Path(self.home, "reader.conf.d")

    def _command(self) -> list[str]:
        command = [self._installed.pcscd, "--foreground", "--info", "--config", str(self._config)]
        # the user who runs the tests may use their readers
        return [*command, "--disable-polkit"] if self._installed.polkit else command

    def _driver(self, number: int) -> str:
        """The driver has room for one device, so each device after the first gets a separate copy."""
        if not number:
            return self._installed.driver
        copy = os.path.join(self.home, f"libifdvpcd-{number}.so")
        if not os.path.exists(copy):
            shutil.copyfile(self._installed.driver, copy)
        return copy

    def _request(self, request: str) -> str:
        self._requests += 1
        with contextlib.suppress(ConnectionError):  # the keeper is dead, as the answer shows
            self._control.sendall(f"{self._requests} {request}".encode())
        return self._reply()

    def _reply(self) -> str:
        """The reply to the last request; replies to earlier ones, which were interrupted, are dropped."""
        number = answer = ""
        while number != str(self._requests):
            try:
                message = self._control.recv(4096)
            except ConnectionError:
                message = b""
            if not message:
                raise self._death_error()
            number, _, answer = message.decode().partition(" ")
        if answer.startswith("error"):
            raise PcscStackError(
                f"the process that supervises pcscd reported: {answer}", remedy="set TMPDIR to a writable directory"
            )
        return answer

    def _death_error(self) -> PcscStackError:
        """The error for a keeper that has closed the connection: how it ended, and its last message."""
        assert self._process.stderr is not None
        try:
            status = self._process.wait(self._control.gettimeout())
        except subprocess.TimeoutExpired:
            return PcscStackError("the process that supervises pcscd hangs", remedy=f"kill process {self._process.pid}")
        output = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        problem = f"the process that supervises pcscd has died ({how}{f': {output[-1]}' if output else ''})"
        return PcscStackError(problem, remedy=_remedy(status, output))


def _remedy(status: int, output: Sequence[str]) -> str:
    """What to do about a keeper that died.

    :param output: the lines that it wrote.
    """
    if not os.access(_KEEPER, os.R_OK):
        return f"let this user read {_KEEPER}, or install pcsc-safe where this user can read it"
    if status < 0:
        return "leave the with block, and find out what killed it (the kernel does when memory runs out)"
    return "leave the with block, and report this with the complete output:\n" + "\n".join(output)


def _entry(name: str, port: str, channel: int, driver: str) -> str:
    # LIBPATH last: with name, device and library pcscd takes an entry for complete, and the channel for the next one's
    return f'FRIENDLYNAME "{name}"\nDEVICENAME /dev/null:{port}\nCHANNELID {channel:#x}\nLIBPATH {driver}\n'
