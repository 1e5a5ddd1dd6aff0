"""A broker's server in states that its clients cause only by chance: each one is made here, in a child of the test."""

from __future__ import annotations

import _socket
import os
import resource
import struct
from collections.abc import Callable
from typing import Any

import pytest
from brokers import module_stack, stack
from calling import Calling
from forking import in_child, start, wait_for

from pcsc_safe import scard as safe
from pcsc_safe._core import router
from pcsc_safe.broker import served, server, sharing, watch, wire
from pcsc_safe.broker import start as starting
from pcsc_safe.testing import VirtualPcsc

__all__ = ["module_stack", "stack"]

pytestmark = pytest.mark.native  # the child is the broker

OK = safe.SCARD_S_SUCCESS
KEY, OTHER_KEY = bytes(16), bytes(range(16))


def in_broker(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function(server, door, *arguments)`` in a child; the door is the end that clients have."""

    def child() -> Any:
        theirs, ours = _socket.socketpair()
        return function(server.Server(ours), theirs, *arguments)

    return in_child(child)


def connection(of: server.Server) -> served.Connection:
    """Return a connection whose client has sent its greeting, and has ended."""
    ours, theirs = _socket.socketpair()
    theirs.send(wire.encode(wire.Hello(wire.VERSION, KEY)))
    theirs.close()
    return served.Connection(of, ours)


def test_it_survives_its_descriptor_limit(stack: VirtualPcsc) -> None:
    """A connection for which no descriptor is free is not served; the next one is."""

    def passes(door: Any) -> None:
        ours, theirs = _socket.socketpair()
        rights = struct.pack("i", theirs.fileno())
        door.sendmsg([starting.FOR_FAMILY], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        theirs.close()
        ours.detach()

    def child(broker: server.Server, door: Any) -> Any:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        passes(door)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        at_limit = broker._accept(), len(broker._connections)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        passes(door)
        return at_limit, (broker._accept(), len(broker._connections))

    assert in_broker(child) == ((True, 0), (True, 1))


def test_a_process_that_has_ended_when_no_thread_can_be_started(
    stack: VirtualPcsc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that finds out removes the client itself, and blocks nobody."""
    dead = start(os.getpid)
    pid = wait_for(dead)

    def starts_none(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    def child(broker: server.Server, door: Any) -> Any:
        monkeypatch.setattr(watch, "peer_pid", lambda connection: pid)
        monkeypatch.setattr(served, "start_new_thread", starts_none)
        first, second = connection(broker), connection(broker)
        broker.welcome(KEY, first)
        return Calling(broker.welcome, KEY, second).answer().has_ended, len(broker._clients)

    assert in_broker(child) == (True, 0)


def test_a_client_that_ends_before_it_is_welcome(stack: VirtualPcsc) -> None:
    """The broker doesn't keep it, although the end of its connection is noticed before its greeting is read."""

    def child(broker: server.Server, door: Any) -> Any:
        only = connection(broker)
        broker._clean_up(only)
        only.run()
        return len(broker._clients)

    assert in_broker(child) == 0


def two_clients(broker: server.Server) -> tuple[served.Client, served.Client, sharing.Handle]:
    """Two clients of a broker, and a context that the first has."""
    giver, taker = (broker.welcome(key, connection(broker)) for key in (KEY, OTHER_KEY))
    _, context = served._establish(giver, safe.SCARD_SCOPE_SYSTEM, os.environ.get(starting.SOCKET_NAME))
    return giver, taker, context


@pytest.mark.not_on_macos("a forked process can't establish a context there")
@pytest.mark.parametrize("keeps", [True, False])
def test_what_is_given_to_the_dead(stack: VirtualPcsc, keeps: bool) -> None:
    """A client that has ended gets no session: the giver keeps it."""

    def child(broker: server.Server, door: Any) -> Any:
        giver, taker, context = two_clients(broker)
        taker.release()
        given = broker.give(taker, KEY, (int(context),), keeps)
        return given, [*taker.handles], router.public["SCardIsValidContext"](context), [*giver.handles] == [context]

    assert in_broker(child) == ([], [], OK, True)


@pytest.mark.not_on_macos("a forked process can't establish a context there")
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("order", ["in order", "too late"])
def test_what_is_taken_back(stack: VirtualPcsc, order: str, keeps: bool) -> None:
    """A client takes back what it gave to one that no process has become, even if the giving arrives later."""

    def child(broker: server.Server, door: Any) -> Any:
        giver, taker, context = two_clients(broker)
        steps = [
            lambda: broker.give(taker, KEY, (int(context),), keeps),
            lambda: broker.take_back(giver, OTHER_KEY, () if keeps else (int(context),)),
        ]
        for step in steps if order == "in order" else reversed(steps):
            step()
        taker.release()
        return [*taker.handles], router.public["SCardIsValidContext"](context), [*giver.handles] == [context]

    assert in_broker(child) == ([], OK, True)


@pytest.mark.not_on_macos("a forked process can't establish a context there")
def test_what_was_shared_is_not_taken_back(stack: VirtualPcsc) -> None:
    """A context that its client has released since it was shared ends with the other client."""

    def child(broker: server.Server, door: Any) -> Any:
        giver, taker, context = two_clients(broker)
        broker.give(taker, KEY, (int(context),), keeps=True)
        sharing.drop(giver, context)
        broker.take_back(giver, OTHER_KEY, ())
        taker.release()
        return [*giver.handles], [*taker.handles], router.public["SCardIsValidContext"](context)

    assert in_broker(child) == ([], [], safe.SCARD_E_INVALID_HANDLE)
