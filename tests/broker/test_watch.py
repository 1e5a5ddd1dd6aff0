"""How a broker detects ends: one contract for epoll on Linux and, with ``--darwin`` or on a Mac, for kqueue."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from calling import ENOUGH, Calling
from forking import in_child, start

from pcsc_safe.broker import watch as watching
from pcsc_safe.broker.watch import Watch, peer_pid

A_WHILE = 0.1  # s; enough for a report


class Told:
    """What a Watch reports to a thread that always waits."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._told: list[int] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            told = self._watch.wait()
            with self._changed:
                self._told += told
                self._changed.notify_all()

    def comes(self, expected: int) -> bool:
        """Return whether this is the next report, alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._told, ENOUGH)
            told, self._told = self._told, []
            return told == [expected]

    def is_silent(self) -> bool:
        """Return whether there is no report for a while."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._told, A_WHILE)


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def told(watch: Watch) -> Told:
    return Told(watch)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield a connection: the watched end and the other one."""
    near, far = watching._socket.socketpair()  # with the module that pcsc_safe uses
    yield near, far
    near.close()
    far.close()


def close(near: socket.socket, far: socket.socket) -> None:
    far.close()


def close_with_something_unread(near: socket.socket, far: socket.socket) -> None:
    near.sendall(b"a request")
    far.sendall(b"an answer")
    far.close()


def shut_down(near: socket.socket, far: socket.socket) -> None:
    far.shutdown(socket.SHUT_RDWR)


def shut_down_here(near: socket.socket, far: socket.socket) -> None:
    near.shutdown(socket.SHUT_RDWR)


HOW = [close, close_with_something_unread, shut_down, shut_down_here]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("when", ["before", "while it waits"])
def test_the_end_of_a_connection_is_told_once(watch: Watch, told: Told, pair: Any, when: str, how: Any) -> None:
    """The end of a connection is reported once, of whatever kind, before the watch begins or during a wait."""
    near, _ = pair
    if when == "before":
        how(*pair)
        watch.on_end(near.fileno())
    else:
        watch.on_end(near.fileno())
        how(*pair)
    assert told.comes(near.fileno())
    assert told.is_silent()


@pytest.mark.parametrize("size", [1, 100_000])
def test_what_is_sent_is_no_end(watch: Watch, told: Told, pair: Any, size: int) -> None:
    """Data, read or unread and of any length, is not reported. The end after it is."""
    near, far = pair
    watch.on_end(near.fileno())
    for _ in range(10):
        sending = Calling(far.sendall, bytes(size))
        left = size
        while left:
            left -= len(near.recv(left))
        sending.answer()
    far.send(b"unread")
    assert told.is_silent()
    far.close()
    assert told.comes(near.fileno())
    assert told.is_silent()


def test_a_copy_keeps_a_connection_alive(watch: Watch, told: Told, pair: Any) -> None:
    """A connection ends with the last copy of its other end."""
    near, far = pair
    copy = os.dup(far.fileno())
    watch.on_end(near.fileno())
    far.close()
    assert told.is_silent()
    os.close(copy)
    assert told.comes(near.fileno())


def test_a_number_can_be_used_again(watch: Watch, told: Told, pair: Any) -> None:
    """After the report the descriptor is no longer watched: it can be closed, and its number watched again."""
    near, far = pair
    watch.on_end(near.fileno())
    far.close()
    assert told.comes(near.fileno())
    number = near.detach()
    os.close(number)
    ends = socket.socketpair()
    near, far = ends if ends[0].fileno() == number else ends[::-1]
    with near, far:  # one end has this number, because it was the lowest free one
        assert near.fileno() == number
        watch.on_end(number)
        far.send(b"a request")
        assert told.is_silent()
        far.close()
        assert told.comes(number)


def test_input_is_told_as_long_as_it_is_there(watch: Watch, pair: Any) -> None:
    """Input is reported until it is read. The end of a connection counts as input."""
    near, far = pair
    watch.on_input(near.fileno())
    far.send(b"ab")
    for _ in range(2):
        assert watch.wait() == [near.fileno()]
        near.recv(1)
    far.close()
    for _ in range(2):
        assert watch.wait() == [near.fileno()]


def test_the_end_of_a_process_is_told_once(watch: Watch, told: Told) -> None:
    """The end of a process is reported once, as its PID, before it is waited for. Other processes don't matter."""
    pid, read_end = start(signal.pause)
    other, other_end = start(signal.pause)
    try:
        assert watch.on_exit(pid)
        assert watch.on_exit(other)
        assert told.is_silent()
        os.kill(pid, signal.SIGKILL)
        assert told.comes(-pid)
        assert told.is_silent()
    finally:
        for number in (read_end, other_end):
            os.close(number)
        os.kill(other, signal.SIGKILL)
        for one in (pid, other):
            os.waitpid(one, 0)


def test_a_process_that_has_ended(watch: Watch, told: Told) -> None:
    """on_exit() returns false for a process that no longer exists."""
    pid, read_end = start(os.getpid)
    os.close(read_end)
    os.waitpid(pid, 0)
    assert not watch.on_exit(pid)
    assert told.is_silent()


def of_pairs(connection: socket.socket) -> Any:
    """Return, in a child, the process behind its parent's socket pair, and whether its own pair is its own."""
    mine, _ = pair = watching._socket.socketpair()
    try:
        return peer_pid(connection), peer_pid(mine) == os.getpid()
    finally:
        for end in pair:
            end.close()


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the kernel doesn't report it")
def test_the_process_behind(pair: Any) -> None:
    """peer_pid() returns the PID of the process that made the other end of a socket pair."""
    assert peer_pid(pair[0]) == os.getpid()
    assert in_child(of_pairs, pair[0]) == (os.getpid(), True)
