"""The example under uWSGI, which forks without Python's at-fork hooks: real server, clients and pcscd; workers die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from servers import (
    RECYCLE_AFTER,
    Clients,
    DeadlyCard,
    card,
    certificate_of,
    documented,
    raw_pyscard,
    serving,
    sign_while_workers_die,
    stack,
)

from pcsc_safe.testing import VirtualPcsc

__all__ = ["card", "stack"]  # fixtures

THREADS = ("--enable-threads", "--threads", "2")
HOOKS = ("--py-call-uwsgi-fork-hooks",)
RUNS = [
    pytest.param(100, THREADS, id="threads"),
    pytest.param(1000, THREADS, id="threads-1000", marks=pytest.mark.long),
    pytest.param(1000, (), id="single-1000", marks=pytest.mark.long),
    pytest.param(1000, HOOKS, id="hooks-1000", marks=pytest.mark.long),
]


def uwsgi(*options: str, setting: str = "") -> list[str]:
    """The documented command, with more options."""
    return [*documented("hosts/uwsgi.md", "uwsgi", "{path}", setting), "--forkbomb-delay", "0", *options]


@pytest.mark.parametrize(("count", "options"), RUNS)
def test_every_signature_is_right(stack: VirtualPcsc, card: DeadlyCard, count: int, options: tuple[str, ...]) -> None:
    """Signatures are right while workers die in a transaction, are recycled, or reload; nothing is left in the end."""
    with serving(uwsgi("--max-requests", RECYCLE_AFTER, "--min-worker-lifetime", "0", *options), stack) as server:
        sign_while_workers_die(server, card, count, lambda: server.tell(signal.SIGHUP))
        server.tell(signal.SIGTERM)
        assert server.status() == 0
        assert server.log.count("*** Starting uWSGI") == 2
        assert "Traceback" not in server.log
        assert os.listdir(server.directory) == ["http"]  # uWSGI doesn't remove its socket
    assert card.verifications > 2  # the card was reset when the process that used it died


def test_stop_in_the_middle_of_a_signature(stack: VirtualPcsc, card: DeadlyCard) -> None:
    """SIGHUP with ``--exit-on-reload`` waits for a signature in progress; SIGTERM and SIGINT would not."""
    with serving(uwsgi("--exit-on-reload", *THREADS), stack) as server:
        certificate = certificate_of(server)
        card.on_signature = lambda number: server.tell(signal.SIGHUP)
        clients = Clients(server, certificate, 1)
        clients.finish()
        assert (clients.right, clients.wrong, clients.broken) == (1, [], 0)
        assert server.status() == 0


@pytest.mark.long
def test_one_session_for_all_workers(stack: VirtualPcsc, card: DeadlyCard) -> None:
    """With policy share each master gives the PIN to the card once: after the start, and after the reload."""
    with serving(uwsgi(*THREADS, setting="POLICY=share"), stack) as server:
        sign_while_workers_die(server, card, 1000, lambda: server.tell(signal.SIGHUP))
        server.tell(signal.SIGTERM)
        assert server.status() == 0
        assert "SCARD_W_RESET_CARD" not in server.log
    assert card.verifications == 2


def test_raw_pyscard_signs_wrong(stack: VirtualPcsc, tmp_path: Path) -> None:
    """On smartcard.scard the same program refuses requests, or signs wrongly; requests that are late don't count."""
    with serving(uwsgi(), stack, **raw_pyscard(tmp_path)) as server:
        certificate = certificate_of(server)
        for _ in range(5):  # one worker may serve all of them before the other has started
            clients = Clients(server, certificate, 100, timeout=1)
            clients.finish()
            if clients.wrong:
                break
        assert clients.wrong
    stack.restart()  # the fixture shouldn't check what processes that share one connection leave in pcscd
