"""Tells a broker that a connection or a client's process has ended.

One interface, :class:`Watch`, for two kernels.  Linux has epoll, which reports a hang-up in any case, and file
descriptors of processes.  macOS and the BSDs have kqueue.  Their ``poll`` can't be used: macOS doesn't look at a
descriptor for which no event is requested, and never reports its end.

Invariant: each end is reported once, even if it happened before it was registered.  A thread may register while another
one waits.  Nothing here forks.
"""

from __future__ import annotations

import _socket  # as in __main__
import os
import select
import struct
import sys

__all__ = ["Watch", "peer_pid"]

_MAX_EVENTS = 64

if sys.platform == "linux":

    def peer_pid(connection: _socket.socket) -> int:
        """The PID of the process that created the other end of a socket pair; 0 if it is unknown."""
        try:
            credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return 0
        return int(_CREDENTIALS.unpack(credentials)[0])

    _CREDENTIALS = struct.Struct("iII")  # struct ucred

    class Watch:
        """Reports input, and the ends of connections and processes."""

        def __init__(self) -> None:
            self._epoll = select.epoll()
            self._processes: dict[int, int] = {}  # the PIDs, by the descriptor of each

        def on_input(self, number: int) -> None:
            """Report whenever there is something to read from a descriptor."""
            self._epoll.register(number, select.EPOLLIN)

        def on_end(self, number: int) -> None:
            """Report when a connection has ended."""
            self._epoll.register(number, 0)  # a hang-up is always reported

        def on_exit(self, pid: int) -> bool:
            """Report when a process has ended, if the kernel can.

            :return: False if it has already ended; this is then not reported.
            """
            try:
                process = os.pidfd_open(pid)
            except ProcessLookupError:
                return False
            except (AttributeError, OSError):  # neither this kernel nor this Python need have it
                return True
            self._processes[process] = pid
            self._epoll.register(process, select.EPOLLIN)
            return True

        def wait(self) -> list[int]:
            """Wait until there is something to report.

            :return: descriptors, and the PIDs of processes that have ended, as negative numbers.
            """
            return [self._report(number, events) for number, events in self._epoll.poll(maxevents=_MAX_EVENTS)]

        def _report(self, number: int, events: int) -> int:
            pid = self._processes.pop(number, None)
            if pid is not None:
                os.close(number)
                return -pid
            if not events & select.EPOLLIN:
                self._epoll.unregister(number)
            return number

elif sys.platform != "win32":

    def peer_pid(connection: _socket.socket) -> int:
        """The PID of the process that last used the other end of a socket pair; 0 if it is unknown."""
        if sys.platform != "darwin":
            return 0
        try:
            return connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID)
        except OSError:
            return 0

    _SOL_LOCAL, _LOCAL_PEERPID = 0, 2  # sys/un.h
    _A_FULL_BUFFER = 1 << 30  # bytes; the kernel takes the buffer's size where that is less

    class Watch:
        """Reports input, and the ends of connections and processes."""

        def __init__(self) -> None:
            self._queue = select.kqueue()
            self._inputs: set[int] = set()

        def on_input(self, number: int) -> None:
            """Report whenever there is something to read from a descriptor."""
            self._inputs.add(number)
            self._register(select.kevent(number, select.KQ_FILTER_READ, select.KQ_EV_ADD))

        def on_end(self, number: int) -> None:
            """Report when a connection has ended."""
            # The end is always reported.  The low-water mark of a full buffer prevents reports of requests.
            flags = select.KQ_EV_ADD | select.KQ_EV_CLEAR
            self._register(select.kevent(number, select.KQ_FILTER_READ, flags, select.KQ_NOTE_LOWAT, _A_FULL_BUFFER))

        def on_exit(self, pid: int) -> bool:
            """Report when a process has ended, if the kernel can.

            :return: False if it has already ended; this is then not reported.
            """
            flags = select.KQ_EV_ADD | select.KQ_EV_ONESHOT
            try:
                self._register(select.kevent(pid, select.KQ_FILTER_PROC, flags, select.KQ_NOTE_EXIT))
            except ProcessLookupError:
                return False
            except OSError:  # not ours to watch
                pass
            return True

        def _register(self, event: select.kevent) -> None:
            self._queue.control([event], 0)

        def wait(self) -> list[int]:
            """Wait until there is something to report.

            :return: descriptors, and the PIDs of processes that have ended, as negative numbers.
            """
            reports = []
            for event in self._queue.control(None, _MAX_EVENTS):
                if event.filter == select.KQ_FILTER_PROC:
                    reports.append(-event.ident)
                elif event.ident in self._inputs:
                    reports.append(event.ident)
                elif event.flags & select.KQ_EV_EOF:
                    self._register(select.kevent(event.ident, select.KQ_FILTER_READ, select.KQ_EV_DELETE))
                    reports.append(event.ident)
            return reports
