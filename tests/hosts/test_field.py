"""Programs of other frameworks work with the default settings, whether the parent is idle or busy."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import field
import pytest
from servers import Connection, serving

from pcsc_safe.testing import VirtualPcsc

NEEDED = {"pebble": ["pebble"], "billiard": ["billiard"], "huey": ["huey"], "rq": ["rq", "redis"]}


SOME = [
    (3, "busy"),
    pytest.param(1, "idle", marks=pytest.mark.long),
    pytest.param(1, "busy", marks=pytest.mark.long),
    pytest.param(3, "idle", marks=pytest.mark.long),
]
BIN, FIELD = str(Path(sys.executable).parent), Path(field.__file__).parent


@pytest.mark.parametrize(("workers", "parent"), SOME)
@pytest.mark.parametrize("host", field.HOSTS)
def test_every_answer_is_right(shared_stack: VirtualPcsc, tmp_path: Path, host: str, workers: int, parent: str) -> None:
    """Every task's response and the parent's own are right; stderr is empty."""
    missing = [name for name in NEEDED.get(host, []) if importlib.util.find_spec(name) is None]
    if missing or (host == "rq" and shutil.which("redis-server") is None):
        pytest.skip(f"{', '.join(missing) or 'redis-server'} is not installed")
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-m", "pcsc_safe", "run"]
    done = subprocess.run(
        [*command, field.__file__, host, str(workers), parent, str(tmp_path)],
        env=shared_stack.env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1:] == [f"{{'right': {field.TASKS}}} ['parent: right']"], done.stderr
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("workers", "parent"), SOME)
def test_gunicorn_with_uvicorn_workers(shared_stack: VirtualPcsc, workers: int, parent: str) -> None:
    """200 requests of four clients each get their own response."""
    if importlib.util.find_spec("uvicorn_worker") is None or shutil.which("gunicorn", path=BIN) is None:
        pytest.skip("gunicorn or uvicorn-worker is not installed")
    command = [sys.executable, "-m", "pcsc_safe", "run", "-m", "gunicorn", "--preload", "--workers", str(workers)]
    command += ["--worker-class", "uvicorn_worker.UvicornWorker", "--bind", "unix:{path}", "field_asgi:application"]
    with serving(command, shared_stack, FIELD, FIELD_PARENT=parent) as server:

        def ask(client: int) -> list[bytes]:
            with contextlib.closing(Connection(server.path)) as connection:
                return [connection.ask("GET", f"/{client * 50 + number}")[1] for number in range(50)]

        with ThreadPoolExecutor(4) as clients:
            told = [answer for answers in clients.map(ask, range(4)) for answer in answers]
        assert Counter(told) == {b"right": 200}
        server.tell(signal.SIGTERM)
        assert server.status() == 0
