"""One connection to a broker, on the client's side: a stream socket that carries one request, then its reply.

At a fork it is a guarded file descriptor, if it was made so: a dead socket replaces it in the child.  There the object
must be abandoned and never closed, because the number may stand for another file.
"""

from __future__ import annotations

import _socket  # the module that Python's own is made of: eventlet and gevent patch that one
import os
import struct
import time
from functools import partial
from typing import Any, Optional

from .._core import descriptors, failures, one_step
from .._core.failures import is_ours
from . import wire

__all__ = ["Connection", "adopt", "from_numbers", "keep_open_at_exit", "pair"]

_READ_SIZE = 1 << 16  # bytes
_PAUSE = 0.002  # s
_CHECK_INTERVAL = 0.05  # s
_no_sigpipe = getattr(_socket, "MSG_NOSIGNAL", 0)  # no SIGPIPE, whatever the application does with that
_dont_wait = getattr(_socket, "MSG_DONTWAIT", 0)


class _Socket(_socket.socket):
    __slots__ = ()


def keep_open_at_exit() -> None:
    """At interpreter exit: from now on Python closes no connection to which nothing refers.

    It finalizes objects in any order then, and finalizers of the application may still make PC/SC calls.
    """
    # A C function that changes nothing.  In a Python function, an exception of a signal handler would be lost.
    _Socket.__del__ = _socket.socket.fileno  # type: ignore[attr-defined]


class Connection:
    """A connection to a broker, used by one thread at a time.

    It is closed when nothing refers to it any more, for example because a signal handler has raised.

    :ivar descriptor: the descriptor when it was made; an application may have closed it since.
    """

    __slots__ = ("__weakref__", "_receive", "_receiver", "_send", "_socket", "descriptor")

    def __init__(self, ours: Any) -> None:
        self._socket = ours
        self._send = ours.send  # not sendall: a signal handler can raise in it although all has been sent
        self._receive = ours.recv
        self._receiver = wire.Receiver()
        self.descriptor = descriptors.of(ours.fileno())

    def send(self, frame: bytes, sent: Optional[list[int]] = None) -> None:
        """Send a request.

        :param sent: gets the numbers of bytes that were sent, each in one step with the sending.
        :raises OSError: the broker has ended without receiving it.
        """
        if sent is None:
            sent = []
        sent.extend(one_step.call_each(((self._send, frame, _no_sigpipe),)))
        while sum(sent) < len(frame):  # a long frame
            sent.extend(one_step.call_each(((self._send, memoryview(frame)[sum(sent) :], _no_sigpipe),)))

    def receive(self) -> bytes:
        """The body of the reply.

        :raises OSError, EOFError: the broker ended before it replied.
        :raises WireError: the reply is malformed.
        """
        receive, feed = self._receive, self._receiver.feed
        while True:
            data = receive(_READ_SIZE)
            if not data:
                raise EOFError("the broker has closed the connection")
            body = feed(data)
            if body is not None:
                return body

    def receive_first(self, door: Connection, timeout: float) -> bytes:
        """The body of the broker's first reply; this process has a copy of the far end, so there is no end of file.

        :param door: shows whether the broker has ended.
        :param timeout: the timeout in seconds.
        :raises OSError, EOFError: the broker ended before it replied, or took too long.
        :raises WireError: the reply is malformed.
        """
        deadline = time.monotonic() + timeout
        try:
            self._socket.settimeout(_CHECK_INTERVAL)
            while True:
                try:
                    return self.receive()
                except _socket.timeout as error:
                    if not is_ours(error):
                        raise
                    if not door.is_alive(0):
                        raise EOFError("the broker has ended") from None
                    if time.monotonic() >= deadline:
                        raise
        finally:
            self._socket.settimeout(None)

    def send_descriptor(self, message: bytes, number: int) -> None:
        """Send a descriptor with a message."""
        rights = struct.pack("i", number)
        self._socket.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)], _no_sigpipe)

    def is_alive(self, timeout: float) -> bool:
        """Whether the broker still has the other end of a connection without a call in progress.

        :param timeout: seconds to wait for its end; a process that dies closes one descriptor after the other.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                return bool(self._socket.recv(1, _socket.MSG_PEEK | _dont_wait))
            except BlockingIOError as error:
                if not is_ours(error):
                    raise
                if time.monotonic() >= deadline:
                    return True
            except OSError as error:
                if not is_ours(error):
                    raise
                return False
            time.sleep(_PAUSE)

    def close(self, last: bytes = b"") -> None:
        """Close it, unless the application has closed it, and the number stands for another file.

        :param last: a frame to send before.
        """
        mine = self.descriptor.is_intact()
        try:
            if mine and last:
                with failures.suppress(OSError):
                    self.send(last)
        finally:
            if mine or descriptors.is_dead(self.descriptor.number):
                self._socket.close()
            else:
                self._socket.detach()
            descriptors.unguard(self.descriptor)  # not before: another thread may fork

    def abandon(self) -> None:
        """In a child: forget it; its number stands for a dead socket, or for a file of the application."""
        number = self._socket.detach()
        if number >= 0 and descriptors.is_dead(number):
            os.close(number)


_detached = partial(map, _socket.socket.detach)
from_numbers = partial(map, partial(_Socket, -1, -1, -1))
"""The sockets with these descriptors.  Each must be recorded in the step that makes it: one that nothing refers to is
closed."""


def pair(*, guarded: bool) -> tuple[Connection, Any]:
    """A new connection, and the far end of it.

    :param guarded: whether a dead socket replaces it in a forked child.
    :raises OSError: no file descriptor is free.
    """
    # In one step of C, so that no signal handler can raise in between.
    ours, theirs = from_numbers(_detached(_socket.socketpair()))
    try:
        for end in (ours, theirs):
            end.settimeout(None)  # whatever socket.setdefaulttimeout() says: the flag would go with the descriptor
        return adopt(ours, guarded=guarded), theirs
    except BaseException:
        ours.close()
        theirs.close()
        raise


def adopt(ours: Any, *, guarded: bool) -> Connection:
    """The connection whose near end is this socket."""
    connection = Connection(ours)
    if guarded:
        descriptors.guard(connection.descriptor)
    if hasattr(_socket, "SO_NOSIGPIPE"):
        ours.setsockopt(_socket.SOL_SOCKET, _socket.SO_NOSIGPIPE, 1)  # macOS
    return connection
