"""When modules are imported: none that isn't needed, and none for the first time where that could hang or fail."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any, Callable

import pytest
from cforks import c_fork
from forking import fork, in_child, in_program

from pcsc_safe.testing import VirtualPcsc

pytestmark = [pytest.mark.native, pytest.mark.not_on_macos("there a child always needs a broker")]

BROKER = "pcsc_safe.broker.client"
ECHO = [0x00, 0x01, 0x00, 0x00, 0x03, 1, 2, 3]


def told(program: Callable[..., None], *arguments: str, stack: VirtualPcsc, **env: str) -> Any:
    """Return what a program printed as JSON; it prints nothing else."""
    done = in_program(program, *arguments, env={**os.environ, **stack.env, **env})
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def say(*words: Any) -> None:
    print(json.dumps(words))


def session() -> tuple[Any, Any]:
    """Return ``pcsc_safe.scard`` and a card."""
    import pcsc_safe.scard as scard

    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    _, readers = scard.SCardListReaders(context, [])
    _, card, _ = scard.SCardConnect(context, readers[0], scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)
    return scard, card


def exchange(scard: Any, card: Any) -> Any:
    return scard.SCardTransmit(card, scard.SCARD_PCI_T1, ECHO)[0]


def is_there() -> bool:
    return BROKER in sys.modules


def other_thread() -> Callable[[], None]:
    """Start a thread that does nothing; return a function that ends it."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end


@pytest.mark.parametrize("env", [{"PCSC_SAFE_POLICY": "broker"}, {"PCSC_SAFE_RECOVER": "1"}])
def test_settings_that_need_a_broker(shared_stack: VirtualPcsc, env: dict[str, str]) -> None:
    """A setting that needs a broker imports it, with pcsc_safe.scard or when a program changes the setting later."""
    assert told(imports_only, stack=shared_stack, **env) == [True]
    assert told(imports_only, *env, *env.values(), stack=shared_stack) == [False, True]


def imports_only(variable: str = "", value: str = "") -> None:
    import pcsc_safe.scard

    seen = [is_there()]
    if variable:
        pcsc_safe.configure(**{variable[len("PCSC_SAFE_") :].lower(): value})
        seen.append(is_there())
    say(*seen)


@pytest.mark.parametrize(("how", "expected"), [("os.fork", [True, True, 0, True]), ("C", [True, True, 0, True])])
def test_a_fork_beside_another_thread(shared_stack: VirtualPcsc, how: str, expected: list[Any]) -> None:
    """A parent with another thread has imported everything before the fork, with or without hooks."""
    assert told(forks_beside_a_thread, how, stack=shared_stack) == expected


def forks_beside_a_thread(how: str) -> None:
    scard, card = session()
    end, before = other_thread(), is_there()

    def child() -> Any:
        had = is_there()
        end_of_own = other_thread()
        hresult = exchange(scard, card)
        end_of_own()
        return had, hresult, is_there()

    say(before, *in_child(child, fork=fork if how == "os.fork" else c_fork))
    end()


def test_a_child_of_one_thread_gets_a_broker(shared_stack: VirtualPcsc) -> None:
    """A child has imported what a broker needs before it asks for one."""
    assert told(child_asks, stack=shared_stack) == [True, 0, True]


def child_asks() -> None:
    scard, card = session()

    def child() -> Any:
        import pcsc_safe

        had = is_there()
        pcsc_safe.configure(policy="broker")
        return had, exchange(scard, card), is_there()

    say(*in_child(child))


def test_a_warning_where_nobody_imports_logging(shared_stack: VirtualPcsc) -> None:
    """A warning goes to stderr as logging would write it. Nothing else does, and logging isn't imported."""
    done = in_program(warns, env={**os.environ, **shared_stack.env})
    assert (done.returncode, done.stdout, done.stderr) == (0, "[false]\n", "pcsc_safe: it costs 7\n")


def warns() -> None:
    import pcsc_safe.scard  # noqa: F401
    from pcsc_safe._core import log

    for name in [each for each in sys.modules if each.partition(".")[0] == "logging"]:
        del sys.modules[name]
    log.debug("test", "nobody hears this")
    log.info("test", "nor this")
    log.warning("test", "it costs %(price)d", price=7)
    say("logging" in sys.modules)
