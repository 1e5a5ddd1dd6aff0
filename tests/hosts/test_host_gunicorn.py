"""The example under gunicorn, with real server, clients and pcscd, while workers die and are replaced."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from servers import (
    RECYCLE_AFTER,
    ROOT,
    Clients,
    DeadlyCard,
    card,
    certificate_of,
    code_of,
    documented,
    raw_pyscard,
    serving,
    sign_while_workers_die,
    stack,
)

from pcsc_safe.testing import VirtualPcsc

__all__ = ["card", "stack"]  # fixtures

THREADS = ("--threads", "4")
GEVENT, EVENTLET = ("--worker-class", "gevent"), ("--worker-class", "eventlet")
RUNS = [
    pytest.param(100, THREADS, id="gthread"),
    pytest.param(100, GEVENT, id="gevent"),
    pytest.param(1000, GEVENT, id="gevent-1000", marks=pytest.mark.long),
    pytest.param(100, EVENTLET, id="eventlet"),
    pytest.param(1000, EVENTLET, id="eventlet-1000", marks=pytest.mark.long),
    pytest.param(1000, THREADS, id="gthread-1000", marks=pytest.mark.long),
    pytest.param(1000, (), id="sync-1000", marks=pytest.mark.long),
]


def gunicorn(*options: str, setting: str = "") -> list[str]:
    """The documented command, with more options."""
    *command, application = documented("hosts/gunicorn.md", "gunicorn", "unix:{path}", setting)
    # A worker that is sent SIGTERM before it handles signals ignores it; gunicorn kills it after 30 s.
    return [*command, "--graceful-timeout", "5", *options, application]


def needs(options: tuple[str, ...]) -> None:
    """Skip the test if that kind of worker is not available."""
    for name, module in (("gevent", "ggevent"), ("eventlet", "geventlet")):
        if name in options and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; it is in the extra 'hosts'")
        if name in options and importlib.util.find_spec(f"gunicorn.workers.{module}") is None:
            pytest.skip(f"this gunicorn has no {name} worker")


@pytest.mark.parametrize(("count", "options"), RUNS)
def test_every_signature_is_right(stack: VirtualPcsc, card: DeadlyCard, count: int, options: tuple[str, ...]) -> None:
    """Signatures are right while workers die in a transaction, are recycled, or reload; nothing is left in the end.

    The workers of gevent and eventlet patch the standard library when they start, long after the card was opened.
    """
    needs(options)
    with serving(gunicorn("--max-requests", RECYCLE_AFTER, *options), stack) as server:
        sign_while_workers_die(server, card, count, lambda: server.tell(signal.SIGHUP))
        server.tell(signal.SIGTERM)
        assert server.status() == 0
        assert server.log.count("Autorestarting") > 0
        assert "Traceback" not in server.log
        assert os.listdir(server.directory) == []
    assert card.verifications > 1  # the card was reset when the process that used it died


def test_reload_and_stop(stack: VirtualPcsc, card: DeadlyCard) -> None:
    """SIGHUP replaces the workers, even if they have lost their card; SIGTERM waits for a signature in progress."""
    with serving(gunicorn(*THREADS), stack) as server:
        certificate = certificate_of(server)
        stack.readers[0].remove()
        status, reason = server.request("POST", "/sign", b"message")
        assert (status, reason.startswith(b"SCard")) == (503, True)
        stack.readers[0].insert(card)
        old = set(server.workers())
        server.tell(signal.SIGHUP)
        server.wait_until(lambda: len(server.workers()) == 2 and not old & set(server.workers()), "for new workers")
        card.on_signature = lambda number: number == 20 and server.tell(signal.SIGTERM)
        clients = Clients(server, certificate, 20)
        clients.finish()
        assert (clients.right, clients.wrong, clients.broken) == (20, [], 0)
        assert server.status() == 0


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_one_session_for_all_workers(stack: VirtualPcsc, card: DeadlyCard, tmp_path: Path, count: int) -> None:
    """With policy share the card gets the PIN once, and the program discards it before it forks a worker."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "config.py").write_text(code_of("hosts/gunicorn.md", "def when_ready"))
    with serving(gunicorn(*THREADS, setting="POLICY=share"), stack, cwd=tmp_path) as server:
        sign_while_workers_die(server, card, count, lambda: server.tell(signal.SIGHUP))
        server.tell(signal.SIGTERM)
        assert server.status() == 0
        assert "SCARD_W_RESET_CARD" not in server.log
    assert card.verifications == 1


def test_raw_pyscard_signs_wrong(stack: VirtualPcsc, tmp_path: Path) -> None:
    """On smartcard.scard the same program refuses requests, or signs wrongly; requests that are late don't count."""
    # gunicorn puts this directory before PYTHONPATH, so ROOT would hide what raw_pyscard() makes.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with serving(gunicorn(), stack, cwd=tmp_path, **raw_pyscard(tmp_path)) as server:
        certificate = certificate_of(server)
        for _ in range(5):  # one worker may serve all of them before the other has started
            clients = Clients(server, certificate, 100, timeout=1)
            clients.finish()
            if clients.wrong:
                break
        assert clients.wrong
    stack.restart()  # the fixture shouldn't check what processes that share one connection leave in pcscd


def test_bad_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Incomplete, too long and unknown requests are not signed; a failure of the card is reported."""
    application = wsgi_sign(monkeypatch).application
    answers: dict[str, int] = {}

    def ask(name: str, method: str = "POST", path: str = "/sign", length: str = "3", body: bytes = b"abc") -> None:
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "CONTENT_LENGTH": length, "wsgi.input": BytesIO(body)}
        application(environ, lambda status, headers: answers.setdefault(name, int(status[:3])))

    ask("good", body=b"abcd")
    ask("length unknown", length="")
    ask("cut short", length="4")
    ask("too long", length=str(1 << 30))
    ask("no service", path="/")
    ask("card", method="GET", path="/certificate")
    expected = {"good": 200, "length unknown": 411, "cut short": 400, "too long": 413, "no service": 404, "card": 503}
    assert answers == expected


def wsgi_sign(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example without a card: its signature is the digest."""

    def no_card() -> None:
        raise LookupError

    signer = SimpleNamespace(sign=lambda digest: digest, certificate=no_card)
    piv = SimpleNamespace(Signer=lambda pin: signer, pin=str, CardError=LookupError)
    monkeypatch.setitem(sys.modules, "piv", piv)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module("wsgi_sign")
    monkeypatch.delitem(sys.modules, "wsgi_sign")
    return module
