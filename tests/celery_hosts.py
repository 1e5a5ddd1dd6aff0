"""A Redis, and worker hosts of the Celery example: each has a pcscd of its own, and a card with a key of its own.

What a host is here: the processes of one worker, in a session of their own, and one virtual stack.  `Host.vanish` takes
both away at once, as a power cut would.
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
OPTIONS = ("--concurrency", "2", "--without-mingle", "--without-gossip")  # without: starts sooner


def eventually(what: Callable[[], Any], timeout: float = 30, every: float = 0.02) -> Any:
    """What it returns, once that is true; what is asked is another process's, and has no event."""
    deadline = time.monotonic() + timeout
    while not (value := what()):
        assert time.monotonic() < deadline, f"not so after {timeout} s: {what}"
        time.sleep(every)
    return value


@contextlib.contextmanager
def a_redis(*config: Path) -> Iterator[tuple[redis.Redis, Path]]:
    """A redis-server on a Unix socket, in a directory of its own; a client of it, and the directory."""
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
    """Whether the server is there."""
    try:
        return bool(client.ping())
    except redis.AuthenticationError:  # not for us
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

    :param name: the worker's, and the card holder's.
    :param stack: with the card.
    :param log: what the worker says.
    """

    def __init__(self, name: str, stack: VirtualPcsc, log: Path) -> None:
        self.name, self.stack, self.log = name, stack, log
        self.queue = ""
        self.serves = False
        self._worker: subprocess.Popen[bytes]

    def start(self, *options: str, env: Optional[Mapping[str, str]] = None) -> None:
        """Start the worker; `serves` is for whoever sees it answer."""
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
        """Those of the worker that live, without its main process."""
        return [pid for pid in alive_in_session(self._worker.pid) if pid != self._worker.pid]

    def ended(self) -> int:
        """The worker's exit status, once it has ended; nothing of it is left then."""
        status = self._worker.wait(60)  # a process that is just being recycled takes billiard 30
        eventually(lambda: not self.processes())
        return status

    def stop(self) -> None:
        """SIGTERM."""
        self.serves = False
        self._worker.terminate()

    def vanish(self) -> None:
        """Everything at once: worker, pool and pcscd."""
        self.serves = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._worker.pid, signal.SIGKILL)
        self.stack.kill()
        self.ended()

    def come_back(self, *options: str) -> None:
        """The same card, a new pcscd, a new worker."""
        self.stack.start()
        self.start(*options)

    def under_way(self, broker: redis.Redis) -> list[bytes]:
        """The deliveries, not acknowledged yet, from this card's queue, which no other host serves."""
        return [tag for tag, raw in broker.hgetall("unacked").items() if json.loads(raw)[2] == self.queue]


def alive_in_session(session: int) -> list[int]:
    """The processes of a session, without those that have ended and are not waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def a_host(name: str, logs: Path) -> Iterator[Host]:
    """A host whose worker is not started yet; nothing of it is left, and its log is shown if a test fails."""
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
