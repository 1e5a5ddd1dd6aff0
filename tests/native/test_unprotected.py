"""A program that mixes pcsc_safe.scard with pyscard's classes, without install(), gets a warning at its first fork."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
from forking import in_child, in_program

from pcsc_safe.testing import VirtualPcsc

REMEDY = (
    "which pcsc_safe doesn't protect: call pcsc_safe.install() before you use pyscard's classes, or start the program "
    "with 'python -m pcsc_safe run'"
)

pytestmark = pytest.mark.native  # the programs don't change the settings


def told(program: Callable[..., Any], *arguments: str, stack: VirtualPcsc) -> Any:
    """Return what the parent logged at each fork; its children log nothing."""
    done = in_program(program, *arguments, env={**os.environ, **stack.env})
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


class Log(logging.Handler):
    """Collects the warnings about unprotected objects."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        logging.getLogger("pcsc_safe").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "pcsc_event", "") == "unprotected":
            self.said.append(record.getMessage().replace(str(os.getpid()), "PID"))

    def at_forks(self, number: int) -> list[list[str]]:
        """Return what the parent logs at each of so many forks."""
        before, said = len(self.said), []
        for _ in range(number):
            assert in_child(lambda: len(self.said)) == len(self.said)
            said.append(self.said[before:])
            before = len(self.said)
        return said


def a_connection() -> Any:
    from smartcard.System import readers

    connection = readers()[1].createConnection()
    connection.connect(disposition=0)
    return connection


def three_connections() -> Any:
    from smartcard.System import readers

    return [readers()[0].createConnection() for _ in range(3)]


def a_derived_connection() -> Any:
    from smartcard.pcsc.PCSCCardConnection import PCSCCardConnection
    from smartcard.System import readers

    class Mine(PCSCCardConnection):  # type: ignore[misc]
        pass

    return Mine(str(readers()[0]))


def a_request() -> Any:
    from smartcard.CardRequest import CardRequest

    return CardRequest(timeout=1)


class Incomparable(type):
    """A metaclass whose classes can't be compared or hashed."""

    def __eq__(cls, other: object) -> bool:
        raise AttributeError(other)

    def __hash__(cls) -> int:
        raise RuntimeError(cls)


def a_connection_and_an_object_of_any_class() -> Any:
    return a_connection(), Incomparable("Any", (list,), {})([1])


OPENED: dict[str, tuple[Callable[[], Any], str]] = {
    "a connection": (a_connection, "PCSCCardConnection to Virtual PCD 0 00 01 is open, "),
    "three": (three_connections, "PCSCCardConnection to Virtual PCD 0 00 00 is open (and 2 more), "),
    "one of a derived class": (a_derived_connection, "Mine to Virtual PCD 0 00 00 is open, "),
    "a request": (a_request, "PCSCCardRequest is open, "),
    "one beside any object": (
        a_connection_and_an_object_of_any_class,
        "PCSCCardConnection to Virtual PCD 0 00 01 is open, ",
    ),
}


@pytest.mark.parametrize("what", OPENED)
def test_the_first_fork_tells(shared_stack: VirtualPcsc, what: str) -> None:
    """The first fork with something open logs one warning, in the parent: what is open, and the remedy."""
    expected = f"process PID forks while {OPENED[what][1]}{REMEDY}"
    assert told(mixed, what, stack=shared_stack) == [[[], []], [[expected], []], [[]]]


def mixed(what: str) -> None:
    from pcsc_safe import scard as safe

    log = Log()
    before = log.at_forks(2)
    context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1]
    opened = OPENED[what][0]()
    said = log.at_forks(2)
    more = OPENED[what][0]()
    print(json.dumps([before, said, log.at_forks(1)]))
    safe.SCardReleaseContext(context)
    del opened, more


def only_ours() -> Any:
    from pcsc_safe import scard as safe

    return safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)


def installed() -> Any:
    import pcsc_safe

    pcsc_safe.install()
    return [a_connection(), a_request()]


def installed_late() -> Any:
    import pcsc_safe

    opened = [a_connection(), a_request()]
    pcsc_safe.install()
    return opened


def released() -> None:
    a_connection()


def functions_of_somebody_else() -> Any:
    """Like a PKCS#11 module, whose connections to pcscd don't concern pcsc_safe."""
    import smartcard.scard as raw

    return raw.SCardEstablishContext(raw.SCARD_SCOPE_SYSTEM)


NOT_MIXED: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (only_ours, installed, installed_late, released, functions_of_somebody_else)
}


@pytest.mark.parametrize("what", NOT_MIXED)
def test_others_are_told_nothing(shared_stack: VirtualPcsc, what: str) -> None:
    """Nothing is logged after install(), for closed objects, for one library alone, or for other code's connections."""
    if what == "released" and importlib.util.find_spec("smartcard.pcsc.PCSCContext"):
        pytest.skip("before pyscard 2.3 its one context is never released")
    assert told(not_mixed, what, stack=shared_stack) == [[], []]


def not_mixed(what: str) -> None:
    from pcsc_safe import scard as safe

    log = Log()
    context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1]
    opened = NOT_MIXED[what]()
    print(json.dumps(log.at_forks(2)))
    safe.SCardReleaseContext(context)
    del opened
