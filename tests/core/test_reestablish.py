"""A signal handler runs while an inherited context or card is replaced: it raises, or waits for another thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from calling import until
from conftest import ECHO, Session
from forking import in_child

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import gateways
from pcsc_safe.testing import VirtualPcsc

ANSWER = [safe.SCARD_S_SUCCESS, [1, 2, 3, 0x90, 0x00]]


def interrupt_once(
    monkeypatch: pytest.MonkeyPatch, gateway: Any, method: str, handler: Callable[[], None], *, late: bool = False
) -> None:
    """Run a signal handler in the gateway's method, before its result is recorded; only in the first call.

    :param late: run it just after the result is recorded.
    """
    original, handled = getattr(gateway, method), list[None]()

    def handle(number: int, frame: Any) -> None:
        handled.append(None)
        handler()

    def interrupted(*arguments: Any) -> Any:
        *most, keep = arguments if method == "connect" else (arguments[0], *arguments[2:], arguments[1])

        def kept(*what: Any) -> Any:
            if not handled and not late:
                signal.raise_signal(signal.SIGUSR1)
            result = keep(*what)
            if not handled:
                signal.raise_signal(signal.SIGUSR1)
            return result

        return original(*most, kept) if method == "connect" else original(most[0], kept, *most[1:])

    signal.signal(signal.SIGUSR1, handle)
    monkeypatch.setattr(gateway, method, interrupted)


def joined(function: Callable[[], Any], results: list[Any]) -> Callable[[], None]:
    """Return a handler that waits for a thread."""

    def handle() -> None:
        thread = threading.Thread(target=lambda: results.append(function()))
        thread.start()
        thread.join()

    return handle


@pytest.mark.parametrize("policy", ["reestablish", "broker"])
@pytest.mark.parametrize("method", ["establish", "connect"])
def test_a_handler_waits_for_a_thread_that_wants_the_same(
    session: Session, shared_stack: VirtualPcsc, policy: str, method: str
) -> None:
    """Both threads get results, the process gets one context and one connection, and pcscd keeps no other client."""

    def child() -> Any:
        pcsc_safe.configure(policy=policy, cards="reconnect")
        results: list[Any] = []
        with pytest.MonkeyPatch.context() as monkeypatch:
            gateway = gateways.native if policy == "reestablish" else gateways.brokers.get()
            interrupt_once(monkeypatch, gateway, method, joined(lambda: session.transmit(ECHO), results))
            results.append(session.transmit(ECHO))
        results.append(session.transmit(ECHO))
        # One idle native context is kept.
        until(lambda: shared_stack.clients() - clients in (1, 2), "what one thread too many has got is released")
        return results

    clients = shared_stack.clients()
    assert in_child(child) == [ANSWER] * 3


@pytest.mark.parametrize("policy", ["reestablish", "broker"])
def test_a_handler_releases_what_is_being_established(session: Session, shared_stack: VirtualPcsc, policy: str) -> None:
    """The handle is then invalid, and pcscd keeps no additional client."""

    def child() -> Any:
        pcsc_safe.configure(policy=policy)
        results: list[Any] = []
        with pytest.MonkeyPatch.context() as monkeypatch:
            gateway = gateways.native if policy == "reestablish" else gateways.brokers.get()
            release = joined(lambda: safe.SCardReleaseContext(session.context), results)
            interrupt_once(monkeypatch, gateway, "establish", release)
            results.append(safe.SCardListReaders(session.context, [])[0])
        shared_stack.wait_for_clients(clients)
        return results

    clients = shared_stack.clients()
    assert in_child(child) == [safe.SCARD_S_SUCCESS, safe.SCARD_E_INVALID_HANDLE]


@pytest.mark.parametrize("policy", ["reestablish", "broker"])
@pytest.mark.parametrize("method", ["establish", "connect"])
@pytest.mark.parametrize("late", [False, True], ids=["before it is recorded", "when it is"])
def test_a_handler_raises(session: Session, shared_stack: VirtualPcsc, policy: str, method: str, late: bool) -> None:
    """The next call gets what it needs, and pcscd keeps no other client."""

    def child() -> Any:
        pcsc_safe.configure(policy=policy, cards="reconnect")

        def handler() -> None:
            raise ZeroDivisionError

        with pytest.MonkeyPatch.context() as monkeypatch:
            gateway = gateways.native if policy == "reestablish" else gateways.brokers.get()
            interrupt_once(monkeypatch, gateway, method, handler, late=late)
            with pytest.raises(ZeroDivisionError):
                session.transmit(ECHO)
        answers = [session.transmit(ECHO), session.transmit(ECHO)]
        until(lambda: shared_stack.clients() - clients in (1, 2), "what the first call got is released")
        return answers

    clients = shared_stack.clients()
    assert in_child(child) == [ANSWER] * 2
