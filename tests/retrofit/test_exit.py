"""The end of the interpreter: what is collected there says nothing, and does what it would have done before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pcsc_safe.testing import VirtualPcsc

KEPT = """
import atexit, builtins, sys, threading
from smartcard.System import readers
from smartcard.CardRequest import CardRequest
from smartcard.CardType import AnyCardType

def connected():
    connection = readers()[0].createConnection()
    connection.connect()
    return connection

a_global = connected()
in_a_cycle = connected()
in_a_cycle.me = in_a_cycle
builtins.connection = connected()
local = threading.local()
local.connection = connected()
atexit.register(lambda kept=connected(): None)
sys.kept = connected()
try:
    unconnected = readers()[0].createConnection()
    unconnected.transmit([0])
except Exception as error:
    raised = error
    raised.me = [raised, connected(), unconnected]
request = CardRequest(timeout=5, cardType=AnyCardType())
service = request.waitforcard()
service.me = service, request
service.connection.connect()
"""

WATCHED = """
from smartcard.CardMonitoring import CardMonitor, CardObserver
from smartcard.CardRequest import CardRequest
from smartcard.CardType import AnyCardType

class Observer(CardObserver):
    def update(self, observable, handlers): pass

monitor, observer = CardMonitor(), Observer()
monitor.addObserver(observer)
service = CardRequest(timeout=5, cardType=AnyCardType()).waitforcard()
service.connection.connect()
monitor.deleteObserver(observer)
"""


@pytest.mark.parametrize("options", [[], ["--broker", "always"]], ids=["native", "broker"])
@pytest.mark.parametrize("program", [KEPT, WATCHED], ids=["kept", "watched"])
def test_the_end_is_silent(shared_stack: VirtualPcsc, program: str, options: list[str]) -> None:
    """Connections in globals, cycles, builtins, exceptions and the like end with the program, without a word."""
    command = [sys.executable, "-m", "pcsc_safe", "run", *options, "-c", program]
    env = {**os.environ, **shared_stack.env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shared_stack.wait_for_clients(0)
