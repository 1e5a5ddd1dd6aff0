"""A Redis server, and worker hosts of the Celery example: each has its own pcscd, and a card with its own key.

A simulated host consists of the processes of one worker, in their own session, and of one virtual stack.
`Host.vanish` ends both at the same time, as a power cut would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import redis
from places import EXAMPLES

from pcsc_safe.testing import VirtualPcsc
from pcsc_safe.testing.piv import PivCard

__all__ = ["EXAMPLES", "PIN", "Host", "a_host", "a_redis", "eventually"]

PIN = "123456"
OPTIONS = ("--concurrency", "2", "--without-mingle", "--without-gossip")  # they make the start faster


def eventually(what: Callable[[], Any], timeout: float = 30, every: float = 0.02) -> Any:
    """Wait until the condition is true, and return its value; it is about another process, so there is no event."""
    deadline = time.monotonic() + timeout
    while not (value := what()):
        assert time.monotonic() < deadline, f"not so after {timeout} s: {what}"
        time.sleep(every)
    return value


@contextlib.contextmanager
def a_redis(*config: Path) -> Iterator[tuple[redis.Redis, Path]]:
    """A redis-server on a Unix socket, in its own directory; yields a client and the directory."""
    # Not tmp_path: the path of a socket has to be short.
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        path = Path(directory)
        where = ["--port", "0", "--unixsocket", str(path / "sock"), "--dir", directory, "--save", ""]
        with open(path / "log", "wb") as log:
            server = subprocess.Popen(["redis-server", *config, *where], stdout=log, stderr=log)
        client = redis.Redis(unix_socket_path=str(path / "sock"))
        try:
            eventually(lambda: answers(client) or server.poll() is not None)
            assert server.poll() is None, (path / "log").read_text()
            yield client, path
        finally:
            client.close()
            server.kill()
            server.wait()


def answers(client: redis.Redis) -> bool:
    """Whether the server responds."""
    try:
        return bool(client.ping())
    except redis.AuthenticationError:  # this client has no password
        return True
    except redis.ConnectionError:
        return False


class SlowCard(PivCard):
    """A card that signs 50 times a second; real ones do so 2 to 20 times."""

    def apdu(self, command: bytes) -> bytes:
        """Take the time for GENERAL AUTHENTICATE."""
        if command[1] == 0x87:
            time.sleep(0.02)
        return super().apdu(command)


class Host:
    """A machine with a card and a worker.

    :param name: the name of the worker, and of the card holder.
    :param stack: has the card.
    :param log: the worker's output.
    """

    def __init__(self, name: str, stack: VirtualPcsc, log: Path) -> None:
        self.name, self.stack, self.log = name, stack, log
        self.queue = ""
        self.serves = False
        self._worker: subprocess.Popen[bytes]

    def start(self, *options: str, env: Optional[Mapping[str, str]] = None) -> None:
        """Start the worker; the test sets `serves` once the worker responds."""
        self.serves = False
        command = [sys.executable, "-X", "faulthandler", "-m", "celery", "--workdir", str(EXAMPLES)]
        command += ["-A", "celery_sign", "worker", "--hostname", self.name, *OPTIONS, *options]
        with open(self.log, "ab") as log:
            self._worker = subprocess.Popen(
                command,
                env={**self.stack.env, "PIV_PIN": PIN, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """The running processes of the worker, without its main process."""
        return [pid for pid in alive_in_session(self._worker.pid) if pid != self._worker.pid]

    def ended(self) -> int:
        """Wait for the worker's end; return its exit status; no process of it is left."""
        status = self._worker.wait(60)  # if a process is being recycled, billiard takes 30 s
        eventually(lambda: not self.processes())
        return status

    def stop(self) -> None:
        """SIGTERM."""
        self.serves = False
        self._worker.terminate()

    def vanish(self) -> None:
        """Kill worker, pool and pcscd at the same time."""
        self.serves = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._worker.pid, signal.SIGKILL)
        self.stack.kill()
        self.ended()

    def come_back(self, *options: str) -> None:
        """Restart with the same card, a new pcscd and a new worker."""
        self.stack.start()
        self.start(*options)

    def under_way(self, broker: redis.Redis) -> list[bytes]:
        """The deliveries from this card's queue that are not acknowledged yet; no other host takes from it."""
        return [tag for tag, raw in broker.hgetall("unacked").items() if json.loads(raw)[2] == self.queue]


def alive_in_session(session: int) -> list[int]:
    """The processes of a session, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def a_host(name: str, logs: Path) -> Iterator[Host]:
    """A host whose worker is not started yet; nothing of it is left at the end, and a failed test shows its log."""
    with VirtualPcsc(1, [SlowCard.personalised(name)], activate=False) as stack:
        host = Host(name, stack, logs / f"{name}.log")
        try:
            yield host
        except BaseException:
            print(f"--- log of {name}:\n{host.log.read_text()[-5000:] if host.log.exists() else ''}", file=sys.stderr)
            raise
        finally:
            if hasattr(host, "_worker"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(host._worker.pid, signal.SIGKILL)
                host.ended()
