"""Where a process's Unix sockets lead, and who connected them.

The kernel reports the other end of each socket over netlink (sock_diag), to every user.  If netlink isn't available, a
file descriptor is borrowed (pidfd_getfd) from a process that we may trace.  /proc/net/unix alone pairs no sockets.

Nothing here changes anything: a borrowed descriptor is only used to read its name or its credentials, and closed.

Nothing here forks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple, Optional

__all__ = ["Socket", "accepted", "connected_by", "leads_to", "table"]

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP = 4, 20, 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SHOW_NAME_AND_PEER = 0x1 | 0x4
_NAME, _PEER = 0, 2
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIII8s")
_MESSAGE = struct.Struct("=BBBBI8s")
_PIDFD_GETFD = 438  # the same on every architecture; since Linux 5.6
_ESTABLISHED = 1  # of the kernel's states of a socket
_SS_CONNECTED = 3  # of those in /proc/net/unix


class Socket(NamedTuple):
    """A Unix socket of this network namespace.

    :ivar connected: whether it is connected, or was until its other end was closed.
    :ivar path: the path that it, or the listening socket that accepted it, was bound to.
    :ivar peer: the inode of its other end; 0 if there is none, or if it is unknown.
    """

    inode: int
    connected: bool
    path: str
    peer: int


def table() -> tuple[dict[int, Socket], bool]:
    """The Unix sockets by inode, and whether their other ends are known."""
    # What a server has not accepted yet has no inode: 0 stands for them all.
    with contextlib.suppress(OSError, AttributeError, struct.error):
        return {each.inode: each for each in _ask_kernel() if each.inode}, True
    return {each.inode: each for each in _listed() if each.inode}, False


def _ask_kernel() -> Iterator[Socket]:
    if sys.platform != "linux":
        return
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_NAME_AND_PEER, b"\xff" * 8)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(5)
        kernel.send(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + request)
        while True:
            data = kernel.recv(1 << 18)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", data, _HEADER.size)[0], "sock_diag")
                yield _parsed(data[_HEADER.size : length])
                data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _parsed(message: bytes) -> Socket:
    _, _, state, _, inode, _ = _MESSAGE.unpack_from(message)
    path, peer, rest = "", 0, message[_MESSAGE.size :]
    while len(rest) >= 4:
        length, kind = struct.unpack_from("=HH", rest)
        value = rest[4:length]
        if kind == _NAME:
            path = os.fsdecode(value.rstrip(b"\0"))
        elif kind == _PEER:
            peer = struct.unpack_from("=I", value)[0]
        rest = rest[_aligned(length) :]
    return Socket(inode, state == _ESTABLISHED, path, peer)


def _listed() -> Iterator[Socket]:
    with contextlib.suppress(OSError), open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as lines:
        next(lines, None)
        for line in lines:
            row = line.rstrip("\n").split(maxsplit=7)
            yield Socket(int(row[6]), int(row[5], 16) == _SS_CONNECTED, row[7] if len(row) > 7 else "", 0)


def accepted(path: str) -> Optional[int]:
    """How many clients the server of a path has; None if that is not visible here.

    :param path: the path to which the server is bound.
    """
    try:
        return sum(each.path == path and each.connected for each in _listed()) or None
    except (ValueError, IndexError):
        return None


def leads_to(pid: int, number: int) -> str:
    """The path that a descriptor of another process is connected to; empty if it is unknown."""
    with contextlib.suppress(OSError, AttributeError), _borrowed(pid, number) as connection:
        peer = connection.getpeername()
        return peer if isinstance(peer, str) else ""
    return ""


def connected_by(server: int, number: int) -> Optional[int]:
    """The process that made the connection which a server has accepted; None if it is unknown.

    :param server: the server's PID.
    :param number: its descriptor.
    """
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, AttributeError), _borrowed(server, number) as connection:
        pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid or None
    return None


@contextlib.contextmanager
def _borrowed(pid: int, number: int) -> Iterator[socket.socket]:
    """A copy of another process's socket, for a moment.

    :raises OSError: this process may not copy it, or the kernel can't.
    """
    if sys.platform != "linux":
        raise OSError("only Linux lends descriptors")
    process = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, number, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        with socket.socket(fileno=copy) as connection:
            yield connection
    finally:
        os.close(process)
