"""At the end of the interpreter, collected objects print nothing, and their sessions are ended.

If a process dies, pcscd resets the cards of its sessions.  If it ends its sessions, the cards are left as they are,
because these programs ask for that.  So a card shows whether a session was not ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from calling import OK, establish, transmit
from conftest import ECHO

from pcsc_safe import scard as safe
from pcsc_safe.testing import EchoCard, VirtualPcsc

pytestmark = pytest.mark.native  # each test sets what its programs use

MAKES = """
import os, sys
{before}

def made():
    from smartcard.CardConnectionObserver import CardConnectionObserver
    from smartcard.CardMonitoring import CardMonitor, CardObserver
    from smartcard.CardRequest import CardRequest
    from smartcard.CardType import AnyCardType
    from smartcard.ExclusiveConnectCardConnection import ExclusiveConnectCardConnection
    from smartcard.ExclusiveTransmitCardConnection import ExclusiveTransmitCardConnection
    from smartcard.PassThruCardService import PassThruCardService
    from smartcard.ReaderMonitoring import ReaderMonitor
    from smartcard.Session import Session
    from smartcard.System import readers

    class Silent(CardConnectionObserver, CardObserver):
        def update(self, *arguments): pass

    def connected(connection):
        connection.connect(disposition=0)
        assert connection.transmit([0x80, 1, 0, 0, 1, 7]) == ([7], 0x90, 0)
        return connection

    first, second = readers()
    observed = connected(first.createConnection())
    observed.addObserver(Silent())
    request = CardRequest(timeout=5, readers=[first], cardType=AnyCardType())
    requested = request.waitforcard()
    connected(requested.connection)
    session = Session(str(first))
    session.cs.connection.component.disposition = 0
    alone = connected(ExclusiveConnectCardConnection(second.createConnection()))
    alone.component.component.disposition = 0
    try:
        first.createConnection().transmit([0])
    except Exception as error:
        refused = error
    things = [
        connected(first.createConnection()),
        first.createConnection(),
        observed,
        connected(ExclusiveTransmitCardConnection(first.createConnection())),
        alone,
        PassThruCardService(connected(first.createConnection())),
        request,
        requested,
        session,
        refused,
    ]
    monitor, observer = CardMonitor(), Silent()
    monitor.addObserver(observer)
    {then}
    return [*things, monitor, observer]

def forks():
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
    else:
        import signal
        signal.alarm(20)
        sys.exit()
"""

KEPT = {
    "a global": "kept = made()",
    "a cycle": "kept = made(); kept.append(kept); [setattr(each, 'me', (each, kept)) for each in kept[:-1]]; del kept",
    "builtins": "import builtins; builtins.kept = made()",
    "sys": "sys.kept = made()",
    "a module": "import types; sys.modules['kept'] = types.ModuleType('kept'); sys.modules['kept'].kept = made()",
    "a class": "class Kept: kept = made()",
    "a thread's own": "import threading; local = threading.local(); local.kept = made()",
    "an exception": """
try:
    raise KeyError(made())
except KeyError as error:
    raised = error
    raised.me = raised
""",
    "atexit": "import atexit; atexit.register(lambda kept=made(): None)",
    "a finalizer": "import weakref; kept = made(); weakref.finalize(kept[0], lambda kept: kept, kept[1:])",
    "a generator": """
def generate(kept):
    try:
        yield
    finally:
        kept.clear()
generator = generate(made())
next(generator)
""",
    "beside every module": "import builtins; builtins.modules = dict(sys.modules); kept = made()",
    "a daemon thread": """
import threading, time
def keep(kept, ready):
    ready.set()
    while True:
        time.sleep(0.001)
ready = threading.Event()
threading.Thread(target=keep, args=(made(), ready), daemon=True).start()
ready.wait()
""",
}
"""Where objects are referenced at the end."""

NEVER_COLLECTED = {"sys", "a daemon thread"}  # on raw pyscard, these are not collected either

WAYS = {
    "run": ["-m", "pcsc_safe", "run"],
    "run broker": ["-m", "pcsc_safe", "run", "--broker", "always"],
    "install": [],
    "install broker": [],
}
BEFORE = {
    "install": "import pcsc_safe; pcsc_safe.install()",
    "install broker": "import pcsc_safe; pcsc_safe.configure(broker='always'); pcsc_safe.install()",
}


@pytest.fixture(scope="module")
def stack() -> Iterator[VirtualPcsc]:
    with VirtualPcsc(2, [EchoCard(), EchoCard()]) as running:
        yield running


PYTHONS_OWN = "ignore:This process:DeprecationWarning,ignore:remaining subinterpreters:RuntimeWarning"
"""The warnings of Python 3.12 about a fork with threads, and of 3.14 about subinterpreters."""


def ends(stack: VirtualPcsc, way: str, program: str) -> tuple[int, str, int]:
    """How a program ends: its status, its output, and how often a card was reset."""
    before = resets(stack)
    command = [sys.executable, *WAYS.get(way, []), "-c", program]
    env = {**os.environ, **stack.env, "PYTHONWARNINGS": PYTHONS_OWN}
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
    )
    stack.wait_for_clients(0)
    for slot in stack.readers:
        settle(slot.name)
    return done.returncode, done.stdout, resets(stack) - before


def settle(reader: str) -> None:
    """Wait until pcscd has done what it does with a card whose process has died."""
    context = establish()
    answer: Any = [None, None]
    while answer[0] != OK:
        answer = safe.SCardConnect(context, reader, safe.SCARD_SHARE_EXCLUSIVE, safe.SCARD_PROTOCOL_T1)
    assert transmit(answer[1], ECHO)[0] == OK
    assert safe.SCardDisconnect(answer[1], safe.SCARD_LEAVE_CARD) == OK
    assert safe.SCardReleaseContext(context) == OK


def resets(stack: VirtualPcsc) -> int:
    return sum(slot.card.resets for slot in stack.readers if slot.card is not None)


def program(way: str, where: str, *more: str, then: str = "monitor.deleteObserver(observer)") -> str:
    return "\n".join([MAKES.format(before=BEFORE.get(way, ""), then=then), KEPT[where], *more])


def test_a_death_is_seen(stack: VirtualPcsc) -> None:
    """The control: if a process ends without its finalizers, pcscd resets its cards."""
    status, said, resets = ends(stack, "run", program("run", "a global", "os._exit(0)"))
    assert (status, said) == (0, "")
    assert resets > 0


@pytest.mark.parametrize("way", ["run", *(pytest.param(way, marks=pytest.mark.long) for way in WAYS if way != "run")])
@pytest.mark.parametrize("where", KEPT)
def test_the_end_is_silent(stack: VirtualPcsc, where: str, way: str) -> None:
    """Every object, wherever it is kept, is finalized at the end without output, and its session is ended."""
    status, said, resets = ends(stack, way, program(way, where))
    assert (status, said) == (0, "")
    assert resets == 0 or where in NEVER_COLLECTED


@pytest.mark.parametrize("way", ["run", *(pytest.param(way, marks=pytest.mark.long) for way in WAYS if way != "run")])
@pytest.mark.parametrize("where", KEPT)
def test_the_end_of_a_child_is_silent(stack: VirtualPcsc, where: str, way: str) -> None:
    """A child, and its parent after it, end without output; the end of the child affects no session."""
    status, said, resets = ends(stack, way, program(way, where, "forks()"))
    assert (status, said) == (0, "")
    assert resets == 0 or where in NEVER_COLLECTED


@pytest.mark.parametrize("way", WAYS)
def test_observers_that_stay(stack: VirtualPcsc, way: str) -> None:
    """The threads of monitors end with the program; what they refer to is not collected, as on raw pyscard."""
    status, said, _ = ends(stack, way, program(way, "a global", then="ReaderMonitor().addObserver(Silent())"))
    assert (status, said) == (0, "")


BLOCKED = """
import os, signal, sys, threading, time
import smartcard.scard as scard
from smartcard.System import readers

kept = readers()[0].createConnection()
kept.connect(disposition=scard.SCARD_LEAVE_CARD)
begun, begin = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os.read(begun, 1)
    # The thread knows the handle only: it keeps nobody from being collected.
    arguments = kept.component.hcard, scard.SCARD_PCI_T1, [0x80, 1, 0, 0, 1, 7]
    threading.Thread(target=scard.SCardTransmit, args=arguments, daemon=True).start()
    time.sleep(0.3)
    sys.exit()
assert scard.SCardBeginTransaction(kept.component.hcard) == 0
os.write(begin, b"!")
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_thread_that_holds_what_a_finalizer_wants(stack: VirtualPcsc) -> None:
    """A child ends while one of its threads connects a card again, and waits for its parent's transaction."""
    command = [sys.executable, *WAYS["run"], "--cards", "reconnect", "-c", BLOCKED]
    env = {**os.environ, **stack.env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    stack.wait_for_clients(0)


SUBINTERPRETER = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
if sys.version_info >= (3, 13):
    made = interpreters.create("legacy")
else:
    made = interpreters.create(**({{"isolated": False}} if sys.version_info >= (3, 12) else {{}}))
run = getattr(interpreters, "run_string", None) or interpreters.exec
assert not run(made, {inner!r})
{outer}
{then}
"""


@pytest.mark.parametrize("way", ["run", "run broker"])
@pytest.mark.parametrize("then", ["", "interpreters.destroy(made)"], ids=["stays", "is ended before"])
def test_a_subinterpreter(stack: VirtualPcsc, then: str, way: str) -> None:
    """A subinterpreter has its own connection, which ends with it and without output."""
    inner = """
from smartcard.System import readers
kept = readers()[0].createConnection()
kept.connect(disposition=0)
assert kept.transmit([0x80, 1, 0, 0, 1, 7]) == ([7], 0x90, 0)
"""
    text = SUBINTERPRETER.format(inner=inner, outer=inner, then=then)
    assert ends(stack, way, text) == (0, "", 0)


DROP_IN = """
import functools, logging, os, sys, threading, time
import pcsc_safe
logging.disable()  # the child is told that the session is not its own
{before}
from pcsc_safe.scard import *

context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)[1]
reader = SCardListReaders(context, [])[1][0]
card = SCardConnect(context, reader, SCARD_SHARE_SHARED, SCARD_PROTOCOL_T1)[1]
exchange = functools.partial(SCardTransmit, card, SCARD_PCI_T1, [0x80, 1, 0, 0, 1, 7])
assert exchange() == [SCARD_S_SUCCESS, [7, 0x90, 0]]

def exchanges():
    while exchange():
        pass

wait = functools.partial(SCardGetStatusChange, context, INFINITE, [(reader, SCARD_STATE_PRESENT)])
for call in exchanges, wait:
    threading.Thread(target=call, daemon=True).start()
time.sleep(0.1)

class Ends:
    calls = (
        exchange,
        functools.partial(SCardDisconnect, card, SCARD_LEAVE_CARD),
        functools.partial(SCardReleaseContext, context),
    )

    def __del__(self):
        for call in self.calls:
            call()

{ends}
if os.fork() == 0:
    import signal
    signal.alarm(20)
    assert SCardListReaders(context, [])[0] == SCARD_S_SUCCESS
    sys.exit()
assert os.wait()[1] == 0
"""


@pytest.mark.parametrize("gateway", ["native", "broker"])
@pytest.mark.parametrize("where", ["a global", "builtins", "atexit"])
def test_the_drop_in_ends_silently(stack: VirtualPcsc, where: str, gateway: str) -> None:
    """At the end, finalizers of the application can use PC/SC while daemon threads are in calls, also in a child."""
    keeps = {
        "a global": "kept = Ends()",
        "builtins": "import builtins; builtins.kept = Ends()",
        "atexit": "import atexit; atexit.register(Ends().__del__)",
    }
    before = "pcsc_safe.configure(broker='always')" if gateway == "broker" else ""
    status, said, _ = ends(stack, "drop-in", DROP_IN.format(before=before, ends=keeps[where]))
    assert (status, said) == (0, "")
