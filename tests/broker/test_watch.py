"""How a broker sees ends: the same contract on Linux' epoll and, with ``--darwin`` or on a Mac, on kqueue."""

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

A_WHILE = 0.1  # s; in which it would have been told


class Told:
    """What a Watch tells, from a thread that waits all the time."""

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
        """Whether this is told next, and alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._told, ENOUGH)
            told, self._told = self._told, []
            return told == [expected]

    def is_silent(self) -> bool:
        """Whether nothing is told for a while."""
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
    """A connection: the watched end, and the other one."""
    near, far = watching._socket.socketpair()  # as pcsc_safe has them there
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
    """However it ends, and whether that was before it was asked for or while another thread waits."""
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
    """Requests, read or not and however long, are not told; and the end is told after them."""
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
    """The end is that of the last copy of the other end."""
    near, far = pair
    copy = os.dup(far.fileno())
    watch.on_end(near.fileno())
    far.close()
    assert told.is_silent()
    os.close(copy)
    assert told.comes(near.fileno())


def test_a_number_can_be_used_again(watch: Watch, told: Told, pair: Any) -> None:
    """When an end was told, the descriptor is not watched any more: it can be closed, and its number watched anew."""
    near, far = pair
    watch.on_end(near.fileno())
    far.close()
    assert told.comes(near.fileno())
    number = near.detach()
    os.close(number)
    ends = socket.socketpair()
    near, far = ends if ends[0].fileno() == number else ends[::-1]
    with near, far:  # the lowest number is free again, so one end has it
        assert near.fileno() == number
        watch.on_end(number)
        far.send(b"a request")
        assert told.is_silent()
        far.close()
        assert told.comes(number)


def test_input_is_told_as_long_as_it_is_there(watch: Watch, pair: Any) -> None:
    """Again and again until it is read; and the end of a door is input, too."""
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
    """By its PID, though it is not waited for, and other processes live."""
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
    """Where there is no such process any more, who asks hears so."""
    pid, read_end = start(os.getpid)
    os.close(read_end)
    os.waitpid(pid, 0)
    assert not watch.on_exit(pid)
    assert told.is_silent()


def of_pairs(connection: socket.socket) -> Any:
    """What a child is told of the process behind a socket pair of its parent's, and of one of its own."""
    mine, _ = pair = watching._socket.socketpair()
    try:
        return peer_pid(connection), peer_pid(mine) == os.getpid()
    finally:
        for end in pair:
            end.close()


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the kernel is not asked there")
def test_the_process_behind(pair: Any) -> None:
    """Who has made the other end of a socket pair is told by its PID."""
    assert peer_pid(pair[0]) == os.getpid()
    assert in_child(of_pairs, pair[0]) == (os.getpid(), True)
