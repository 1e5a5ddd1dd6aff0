"""A broker's end: it leaves nothing, however its client ends and whatever the client forked before.

The forked children here use PC/SC through a broker, as on macOS; so do the programs, or with ``broker="always"``.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
from brokers import (
    ENOUGH,
    SOON,
    Client,
    Link,
    Program,
    Watch,
    broker,
    brokers,
    by_broker,
    held_card,
    module_stack,
    stack,
    until,
    watched,
)
from calling import HELD, Calling
from cforks import SYS_CLONE, c_fork, raw_clone
from conftest import ECHO, IS_VERIFIED, Session
from forking import in_child

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe.testing import VirtualPcsc

__all__ = ["module_stack", "stack"]

pytestmark = pytest.mark.native  # each client here chooses its own way to PC/SC

OK = safe.SCARD_S_SUCCESS
ECHOED = [OK, [1, 2, 3, 0x90, 0x00]]
C_FORKS = [c_fork, pytest.param(raw_clone, marks=pytest.mark.skipif(SYS_CLONE is None, reason="clone(2) is unknown"))]


def establish() -> Any:
    hresult, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    assert hresult == OK
    return context


# Its end.


def begins(doing: str) -> Session:
    """Open a session, and begin what the test asks for."""
    session = Session()
    if doing == "wait":
        (name, state, _), *_ = safe.SCardGetStatusChange(session.context, 0, [(session.reader, 0)])[1]
        waiter = Calling(safe.SCardGetStatusChange, session.context, safe.INFINITE, [(name, state)])
        until(lambda: waiter.waits, "it waits")
    elif doing == "apdu":
        Calling(session.transmit, HELD)
    elif doing == "transaction":
        assert safe.SCardBeginTransaction(session.card) == OK
    return session


def in_the_middle(link: Link, doing: str) -> None:
    """A client that reports its broker's PID, and ends on request."""
    session = begins(doing)
    link.say(broker())
    link.hear()
    os._exit(0 if session else 1)


def exits_in_the_middle(doing: str) -> None:
    """Like :func:`in_the_middle`, but it exits as a Python program does."""
    session = begins(doing)
    print(broker(), flush=True)
    sys.stdin.read()
    assert session


DOING = ["nothing", "wait", "apdu", "transaction"]


def see_it_end(stack: VirtualPcsc, watch: Watch) -> None:
    """Assert that the broker ends in a second, and its sessions too: the card can be connected exclusively."""
    assert watch.ends(SOON)
    held_card(stack).go.set()  # pcscd itself waits for the card's response
    stack.wait_for_clients(0)
    context = establish()
    connect = [context, stack.readers[0].name, safe.SCARD_SHARE_EXCLUSIVE, safe.SCARD_PROTOCOL_ANY]
    try:
        until(lambda: safe.SCardConnect(*connect)[0] == OK, "pcscd has ended the session on the card")
    finally:
        safe.SCardReleaseContext(context)


@pytest.mark.parametrize("doing", DOING)
@pytest.mark.parametrize("how", ["os._exit", "SIGKILL"])
def test_it_ends_with_its_client(stack: VirtualPcsc, how: str, doing: str) -> None:
    """A broker and its sessions end within a second after its client dies, whatever the client was doing."""
    with Client(by_broker(in_the_middle), doing) as client, watched(client.hear()) as watch:
        if doing == "apdu":
            assert held_card(stack).reached.wait(ENOUGH)
        assert not watch.ends(0)
        if how == "SIGKILL":
            client.kill()
        else:
            client.say("end")
            with pytest.raises(forking.ChildFailedError, match="status 0"):
                client.result()
        see_it_end(stack, watch)


@pytest.mark.parametrize("doing", DOING)
def test_it_ends_when_its_client_exits(stack: VirtualPcsc, doing: str) -> None:
    """A broker ends without an error message when its client returns from its main function, beside a call too."""
    env = {**stack.env, "PCSC_SAFE_BROKER": "always"}
    with Program(exits_in_the_middle, doing, env=env) as program, watched(int(program.hear())) as watch:
        if doing == "apdu":
            assert held_card(stack).reached.wait(ENOUGH)
        program.let_go()
        assert (program.ends(), program.errors()) == (0, "")
        see_it_end(stack, watch)


def left_alone(link: Link, fork: Callable[[], int], family: bool) -> None:
    """A client with an idle child of a fork in C."""
    if family:
        pcsc_safe.prestart_broker()
    session = begins("transaction")
    idle = fork()
    if not idle:
        time.sleep(ENOUGH)
        os._exit(0)
    link.say((broker(), idle))
    link.hear()
    assert session


@pytest.mark.parametrize("fork", C_FORKS)
@pytest.mark.parametrize("family", [False, True], ids=["one", "family"])
def test_it_ends_though_an_idle_child_lives(stack: VirtualPcsc, fork: Callable[[], int], family: bool) -> None:
    """A client's sessions end with it although an idle child, of a fork that ran no hook, has copies of its sockets.

    The client's broker ends too.  A broker for a family of processes ends with the last of them.
    """
    with Client(by_broker(left_alone), fork, family) as client:
        pid, idle = client.hear()
        with watched(pid) as watch, watched(idle) as of_idle:
            client.kill()
            stack.wait_for_clients(0, timeout=SOON)
            assert watch.ends(SOON) if not family else not watch.ends(0)
            assert not of_idle.ends(0)
            os.kill(idle, signal.SIGKILL)
            see_it_end(stack, watch)


def one_of_a_family(link: Link, third_reader: str) -> None:
    """A client of a shared broker, with one context in an APDU and another that has a card exclusively."""
    begins("apdu")
    card = safe.SCardConnect(establish(), third_reader, safe.SCARD_SHARE_EXCLUSIVE, safe.SCARD_PROTOCOL_T1)[1]
    link.say(safe.SCardTransmit(card, safe.SCARD_PCI_T1, ECHO))
    link.hear()


def test_the_sessions_of_one_end_without_the_others(stack: VirtualPcsc) -> None:
    """In a broker for a family a dead client's sessions end independently. The other clients' sessions continue."""

    def survivor(link: Link) -> Any:
        pcsc_safe.prestart_broker()
        own = establish()
        with Client(one_of_a_family, stack.readers[2].name) as client:
            assert client.hear() == ECHOED
            link.say(broker())
            link.hear()
            client.kill()
        link.say("killed")
        link.hear()
        return safe.SCardListReaders(own, [])[0], brokers()

    with Client(by_broker(survivor)) as client:
        pid = client.hear()
        assert held_card(stack).reached.wait(ENOUGH)
        client.say("it is in an APDU")
        client.hear()
        # pcscd itself waits for the card's response, and serves that context until then.
        stack.wait_for_clients(2, timeout=SOON)
        held_card(stack).go.set()
        stack.wait_for_clients(1, timeout=SOON)
        client.say("go on")
        assert client.result() == (OK, [pid])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change the root")
def test_a_family_reaches_it_from_anywhere(stack: VirtualPcsc, tmp_path: Path) -> None:
    """A child uses the broker started ahead, even after it changed its root and its user and could start none."""

    def child(link: Link) -> Any:
        pcsc_safe.prestart_broker()
        session = Session()

        def jailed() -> Any:
            os.chroot(tmp_path)
            os.setgroups([])
            os.setresuid(65534, 65534, 65534)
            pcsc_safe.configure(cards="reconnect")
            return session.transmit(IS_VERIFIED), os.getuid(), os.path.exists("/usr")

        return in_child(jailed), session.transmit(IS_VERIFIED)

    with Client(by_broker(child)) as client:
        assert client.result() == (([OK, [1, 0x90, 0x00]], 65534, False), [OK, [1, 0x90, 0x00]])


def at_the_terminal(when: str) -> None:
    """A program that uses the card once more when Ctrl-C ends it."""
    os.open(os.ttyname(0), os.O_RDWR)  # this makes it the controlling terminal
    signal.signal(signal.SIGQUIT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    pcsc_safe.configure(broker="always")
    try:
        pcsc_safe.prestart_broker()
        if when == "start":
            print(broker(), flush=True)
            until(lambda: False, "Ctrl-C")  # not one long sleep: a signal just before it would not interrupt it
        session = Session()
        print(broker(), flush=True)
        (name, state, _), *_ = safe.SCardGetStatusChange(session.context, 0, [(session.reader, 0)])[1]
        safe.SCardGetStatusChange(session.context, safe.INFINITE, [(name, state)])
    except KeyboardInterrupt:
        session = session if when == "call" else Session()
        print(json.dumps([session.transmit(ECHO), session.transmit(IS_VERIFIED)]), flush=True)
        raise SystemExit(3) from None


@pytest.mark.parametrize("when", ["start", "call"])
@pytest.mark.parametrize("what", ["\x03", "\x1c", "hangup"], ids=["Ctrl-C", "Ctrl-backslash", "hangup"])
def test_ctrl_c_ends_the_client_in_its_own_way(stack: VirtualPcsc, when: str, what: str) -> None:
    """A broker ignores signals of the terminal, during a call and as it starts. It ends with its client."""
    master, slave = pty.openpty()
    with (
        Program(at_the_terminal, when, env=stack.env, terminal=slave) as program,
        watched(int(program.hear())) as watch,
    ):
        os.close(slave)
        os.write(master, what.encode()) if what != "hangup" else os.close(master)
        assert json.loads(program.hear()) == [ECHOED, [OK, [1, 0x90, 0x00]]]
        assert (program.ends(), program.errors()) == (3, "")
        see_it_end(stack, watch)
    if what != "hangup":
        os.close(master)


# Forks again.


def grandparent(link: Link, fork: Callable[[], int]) -> Any:
    """A child with a broker, whose own child gets another one."""
    session = Session()
    mine = broker()

    def grandchild(link: Link) -> Any:
        link.hear()
        link.say(brokers())
        link.hear()
        answers = [session.transmit(ECHO)[0], safe.SCardReconnect(session.card, safe.SCARD_SHARE_SHARED, 3, 0)[0]]
        link.say((broker(), [*answers, session.transmit(IS_VERIFIED)]))
        return link.hear()

    with Client(grandchild, fork=fork) as client:
        link.say((client.pid, mine))
        for _ in range(2):  # the test's requests to the grandchild, and its replies
            client.say(link.hear())
            link.say(client.hear())
            session.assert_untouched()
        link.hear()
        return None


@pytest.mark.parametrize("fork", [forking.fork, *C_FORKS])
def test_a_grandchild_gets_a_broker_of_its_own(stack: VirtualPcsc, fork: Callable[[], int]) -> None:
    """A grandchild starts its own broker on first use. Its parent's session continues, and ends with the parent."""
    with Client(by_broker(grandparent), fork) as client:
        pid, parents = client.hear()
        client.say("what do you have")
        assert client.hear() == []
        client.say("use the card")
        own, answers = client.hear()
        assert answers == [OK, OK, [OK, [1, 0x90, 0x00]]]
        assert own != parents
        with watched(parents) as of_parent, watched(own) as of_child, watched(pid) as child:
            client.kill()
            assert of_parent.ends(SOON)
            stack.wait_for_clients(1)
            assert not child.ends(0)
            assert not of_child.ends(0)
            os.kill(pid, signal.SIGKILL)
            assert of_child.ends(SOON)


def test_a_broker_does_not_outlive_its_client_for_a_hooked_child(stack: VirtualPcsc) -> None:
    """An idle child of os.fork() that never uses PC/SC keeps no broker and no session of its parent alive."""

    def child(link: Link) -> None:
        begins("wait")
        link.say((broker(), forking.fork() or time.sleep(ENOUGH)))
        link.hear()

    with Client(by_broker(child)) as client:
        pid, idle = client.hear()
        with watched(pid) as watch:
            client.kill()
            see_it_end(stack, watch)
        os.kill(idle, signal.SIGKILL)
