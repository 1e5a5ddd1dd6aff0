"""Django's development server, which restarts itself when a file changes: every response has the card's reply."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

from pcsc_safe.testing import VirtualPcsc

TIMEOUT = 60  # s
NOTICED = 15  # s; Django polls once a second
ASKED = 50

PROJECT = """
import sys
from django.conf import settings
from django.http import HttpResponse
from django.urls import path
{imports}

settings.configure(DEBUG=True, ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="none")
context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)[1]
reader = SCardListReaders(context, [])[1][0]
card = SCardConnect(context, reader, SCARD_SHARE_SHARED, SCARD_PROTOCOL_T1)[1]

def ask(request, number):
    hresult, answer = SCardTransmit(card, SCARD_PCI_T1, [0x80, 1, 0, 0, 1, number])
    return HttpResponse(f"version 1: {{hresult}} {{answer}}")

urlpatterns = [path("<int:number>", ask)]

if __name__ == "__main__":
    from django.core.management import execute_from_command_line
    execute_from_command_line(sys.argv)
"""
IMPORTS = {"run": "from smartcard.scard import *", "drop-in": "from pcsc_safe.scard import *"}


class Site:
    """The server.

    :ivar file: the project.
    """

    def __init__(self, directory: Path, how: str, stack: VirtualPcsc) -> None:
        self.file, self._log = directory / "project.py", directory / "log"
        self.file.write_text(PROJECT.format(imports=IMPORTS[how]))
        # Keeps the port for Django, which also sets SO_REUSEADDR.
        self.held = socket.socket()
        self.held.bind(("127.0.0.1", 0))
        self.held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port = self.held.getsockname()[1]
        launcher = ["-m", "pcsc_safe", "run"] if how == "run" else []
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, *launcher, str(self.file), "runserver", "--nothreading", f"127.0.0.1:{self.port}"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **stack.env, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """The server's output."""
        return self._log.read_text()

    def ask(self, number: int) -> tuple[str, str]:
        """The response: the version of the project, and the card's reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request("GET", f"/{number}")
            version, _, answer = connection.getresponse().read().decode().partition(": ")
        finally:
            connection.close()
        return version, answer

    def wait_for(self, version: str) -> None:
        """Wait until the server responds with this version of the project."""
        deadline = time.monotonic() + TIMEOUT
        touched = time.monotonic()
        while True:
            if time.monotonic() - touched > NOTICED:
                # Django compares with the first state that it saw, which may have been this version already.
                self.file.touch()
                touched = time.monotonic()
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask(0)[0] == version:
                    return
            time.sleep(0.05)


@pytest.fixture(params=IMPORTS)
def site(request: pytest.FixtureRequest, shared_stack: VirtualPcsc, tmp_path: Path) -> Iterator[Site]:
    if importlib.util.find_spec("django") is None:
        pytest.skip("django is not installed; it is in the extra 'hosts'")
    running = Site(tmp_path, request.param, shared_stack)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        running.held.close()


def test_every_answer_is_right(site: Site, shared_stack: VirtualPcsc) -> None:
    """Every response is right before and after each of two reloads; Ctrl-C ends all processes, without an error."""
    text = site.file.read_text()
    for version in ("version 1", "version 2", "version 3"):
        site.file.write_text(text.replace("version 1", version))
        site.wait_for(version)
        assert [site.ask(number) for number in range(ASKED)] == [
            (version, f"0 {[number, 0x90, 0]}") for number in range(ASKED)
        ]
    os.killpg(site.process.pid, signal.SIGINT)
    assert site.process.wait(TIMEOUT) in (0, 1), site.log
    assert "Traceback" not in site.log
    assert "Exception ignored" not in site.log
    shared_stack.wait_for_clients(0)
