"""Python on macOS, simulated for pcsc_safe on Linux; :mod:`macos` loads this module when an interpreter starts.

Only the modules of pcsc_safe get their own ``__builtins__``.  Their ``import`` returns versions of ``os``, ``socket``,
``select`` and others that lack what macOS lacks and behave like XNU:

- no pidfd, no SO_PEERCRED, no epoll, no /proc, no MADV_WIPEONFORK; ``sys.platform`` is "darwin";
- XNU's ``poll``: with an empty event mask it reports nothing, not even POLLHUP; with POLLHUP alone it reports nothing
  more in this call once data has arrived;
- ``kqueue`` with EVFILT_READ and EVFILT_PROC, and LOCAL_PEERPID;
- a socket that was passed by SCM_RIGHTS is flushed if its sender closes it before its receiver has it: the receiver
  reads the end of the stream.  XNU may do so, the simulation always does;
- socket buffers of 8 KiB.

pcsc_safe.testing and pcsc_safe.demo see Linux, because they run the virtual stack, which doesn't exist on macOS.  So do
the standard library and the tests.  The behaviour of macOS is taken from XNU's source, and was not compared with a Mac.

A fork changes nothing here, except that a child can't use a kqueue.
"""

from __future__ import annotations

import _socket
import builtins
import contextlib
import ctypes
import errno
import fcntl
import importlib
import importlib._bootstrap as bootstrap
import mmap
import os
import runpy
import select
import signal
import socket
import struct
import sys
import termios
import threading
import time
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

__all__ = ["install"]

_LINUX = ("pcsc_safe.testing", "pcsc_safe.demo")
_BUFFER = 4096  # bytes; Linux doubles it
_WHOLE_BUFFER = 8192
_SOL_LOCAL, _LOCAL_PEERPID = 0, 2  # sys/un.h
_SIOCOUTQ = 0x5411  # bytes that were sent and not received yet
_PT_DENY_ATTACH = 31  # sys/ptrace.h
_PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)

_HIDDEN = {
    "os": """pidfd_open pipe2 memfd_create eventfd eventfd_read eventfd_write splice waitid copy_file_range
        posix_fallocate posix_fadvise fdatasync getrandom setns unshare sched_getaffinity sched_setaffinity
        getresuid getresgid setresuid setresgid O_PATH O_TMPFILE O_NOATIME O_DIRECT O_LARGEFILE O_RSYNC getxattr
        setxattr listxattr removexattr P_PIDFD P_PID P_PGID P_ALL sched_setscheduler sched_getscheduler preadv2
        RTLD_DEEPBIND""",
    "socket": """SOCK_CLOEXEC SOCK_NONBLOCK MSG_CMSG_CLOEXEC MSG_NOSIGNAL MSG_ERRQUEUE MSG_MORE MSG_CONFIRM SO_PEERCRED
        SO_PASSCRED SO_PEERSEC SO_DOMAIN SO_PROTOCOL AF_NETLINK AF_PACKET AF_VSOCK AF_ALG SCM_CREDENTIALS TCP_QUICKACK
        TCP_CORK TCP_USER_TIMEOUT""",
    "select": "epoll EPOLLIN EPOLLOUT EPOLLHUP EPOLLRDHUP EPOLLET EPOLLONESHOT EPOLL_CLOEXEC POLLRDHUP POLLMSG",
    "mmap": """MAP_POPULATE MAP_DENYWRITE MAP_EXECUTABLE MAP_STACK MADV_WIPEONFORK MADV_DONTFORK MADV_DOFORK MADV_REMOVE
        MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_DONTDUMP MADV_MERGEABLE""",
    "signal": "pidfd_send_signal sigtimedwait sigwaitinfo SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL SIGCLD",
}
_HIDDEN["_socket"] = _HIDDEN["socket"]


class Facade(types.ModuleType):
    """A module as on macOS."""

    def __init__(self, real: types.ModuleType, given: dict[str, Any]) -> None:
        hidden = frozenset(_HIDDEN.get(real.__name__, "").split())
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(given, _real=real, _hidden=hidden)

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(f"module {self._real.__name__!r} has no attribute {name!r}")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._real, name)


# Files.


def _without_proc(real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes a path, without /proc."""

    def function(path: Any = ".", *arguments: Any, **named: Any) -> Any:
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return real(path, *arguments, **named)

    return function


def _close(number: int) -> None:
    _flush_if_in_flight(number)
    os.close(number)


# Sockets.

_Identity = tuple[int, int]
_in_flight: dict[_Identity, int] = {}
"""The file descriptors over which sockets were sent, by the sent sockets' identity."""
_other_ends: dict[_Identity, _Identity] = {}
"""The other socket of each pair, by identity."""
_have_sent: set[_Identity] = set()
"""The sockets over which something was sent."""


def _identity(number: int) -> _Identity:
    status = os.fstat(number)
    return status.st_dev, status.st_ino


def _note_sent(sender: Any) -> None:
    with contextlib.suppress(OSError):  # another thread has closed it
        _have_sent.add(_identity(sender.fileno()))


def _flush_if_in_flight(number: int) -> None:
    """If a socket that was sent and not received yet is about to be closed, shut it down."""
    with contextlib.suppress(OSError):
        door = _in_flight.pop(_identity(number), None) if _in_flight and number >= 0 else None
        if door is None or door < 0 or not _asked(door, _SIOCOUTQ):
            return  # everything that was sent has been received
        is_read = _other_ends.get(_identity(number)) in _have_sent and not _asked(number, termios.FIONREAD)
        if not is_read:
            flushed = socket.socket(fileno=os.dup(number))
            with flushed:
                flushed.shutdown(socket.SHUT_RDWR)


def _asked(number: int, what: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(number, what, b"\0" * 4))[0])


def _darwins(base: Any) -> Any:
    """A class of sockets that behaves like XNU's."""

    class Socket(base):  # type: ignore[misc]
        def sendmsg(self, buffers: Any, ancdata: Any = (), *more: Any) -> int:
            sent = []
            for level, kind, rights in ancdata:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    (number,) = struct.unpack("i", rights)  # one descriptor per message
                    sent.append(_identity(number))
                    _in_flight[sent[-1]] = self.fileno()
            try:
                return int(base.sendmsg(self, buffers, ancdata, *more))
            except BaseException:  # nothing was sent: this socket can be closed, and then has no number
                for identity in sent:
                    _in_flight.pop(identity, None)
                raise

        def send(self, *arguments: Any) -> int:
            sent = int(base.send(self, *arguments))
            _note_sent(self)
            return sent

        def sendall(self, *arguments: Any) -> None:
            base.sendall(self, *arguments)
            _note_sent(self)

        def close(self) -> None:
            _flush_if_in_flight(self.fileno())
            base.close(self)

        def getsockopt(self, level: int, option: int, *size: int) -> Any:
            if (level, option) != (_SOL_LOCAL, _LOCAL_PEERPID):
                return base.getsockopt(self, level, option, *size)
            pid = base.getsockopt(self, socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4]
            return pid if size else struct.unpack("i", pid)[0]

        def setsockopt(self, level: int, option: int, *value: Any) -> None:
            if (level, option) != (socket.SOL_SOCKET, _SO_NOSIGPIPE):
                base.setsockopt(self, level, option, *value)

    return Socket


_SO_NOSIGPIPE = 0x1022


def _pair_of(kind: Any) -> Callable[..., Any]:
    def socketpair(*arguments: Any) -> tuple[Any, Any]:
        ends = tuple(kind(fileno=end.detach()) for end in _socket.socketpair(*arguments))
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        one, other = (_identity(end.fileno()) for end in ends)
        _other_ends.update({one: other, other: one})
        _have_sent.difference_update((one, other))  # other sockets may have had these inodes
        return ends  # type: ignore[return-value]

    return socketpair


# Waiting.


def _number(one: Any) -> int:
    return one if isinstance(one, int) else int(one.fileno())


class Poll:
    """``select.poll`` of XNU, which is based on its kqueue."""

    def __init__(self) -> None:
        self._asked: dict[int, int] = {}

    def register(self, one: Any, events: int = select.POLLIN | select.POLLPRI | select.POLLOUT) -> None:
        self._asked[_number(one)] = events

    def modify(self, one: Any, events: int) -> None:
        if _number(one) not in self._asked:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._asked[_number(one)] = events

    def unregister(self, one: Any) -> None:
        del self._asked[_number(one)]

    def poll(self, timeout: Optional[float] = None) -> list[tuple[int, int]]:
        registered = {number: events for number, events in self._asked.items() if events}
        deadline = None if timeout is None or timeout < 0 else time.monotonic() + timeout / 1000
        while True:
            real = select.poll()
            for number, events in registered.items():
                real.register(number, events | (select.POLLIN if events == select.POLLHUP else 0))
            left = None if deadline is None else max(0, deadline - time.monotonic()) * 1000
            told = real.poll(left)
            found = [(number, event & (self._asked[number] | ~select.POLLIN)) for number, event in told]
            if any(event for _, event in found) or not told:
                return [(number, event) for number, event in found if event]
            for number, _ in told:  # data, where only POLLHUP was requested
                del registered[number]


KQ_FILTER_READ, KQ_FILTER_PROC = -1, -5
KQ_EV_ADD, KQ_EV_DELETE, KQ_EV_ONESHOT, KQ_EV_CLEAR, KQ_EV_EOF = 0x1, 0x2, 0x10, 0x20, 0x8000
KQ_NOTE_LOWAT, KQ_NOTE_EXIT = 0x1, 0x80000000


class kevent:  # noqa: N801
    """``select.kevent``."""

    def __init__(
        self,
        ident: Any,
        filter: int = KQ_FILTER_READ,  # noqa: A002  # as in Python
        flags: int = KQ_EV_ADD,
        fflags: int = 0,
        data: int = 0,
        udata: int = 0,
    ) -> None:
        self.ident = _number(ident)
        self.filter, self.flags, self.fflags, self.data, self.udata = filter, flags, fflags, data, udata


class kqueue:  # noqa: N801
    """``select.kqueue`` for EVFILT_READ, with and without EV_CLEAR, and EVFILT_PROC with NOTE_EXIT."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._reads: dict[int, kevent] = {}
        self._exits: dict[int, kevent] = {}  # by the pidfd of the process
        self._changing = threading.Lock()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        for process in self._exits:
            os.close(process)
        self._exits.clear()
        self._epoll.close()

    def control(self, changes: Optional[Iterable[kevent]], most: int, timeout: Optional[float] = None) -> list[kevent]:
        with self._changing:
            for change in changes or ():
                self._change(change)
        deadline = None if timeout is None else time.monotonic() + timeout
        found: list[kevent] = []
        while most and not found:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            told = self._epoll.poll(left, most)
            found = [event for number, events in told for event in self._events(number, events)]
            if not told and left is not None:
                break
        return found

    def _change(self, change: kevent) -> None:
        if change.filter == KQ_FILTER_PROC:
            assert change.flags & KQ_EV_ADD
            assert change.fflags == KQ_NOTE_EXIT
            try:
                process = os.pidfd_open(change.ident)
            except OSError:
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
            self._exits[process] = change
            self._epoll.register(process, select.EPOLLIN | select.EPOLLONESHOT)
            return
        assert change.filter == KQ_FILTER_READ
        if change.flags & KQ_EV_DELETE:
            if self._reads.pop(change.ident, None) is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._epoll.unregister(change.ident)
            return
        # Without EV_CLEAR epoll would report data below the low-water mark, immediately and repeatedly.
        assert change.flags & KQ_EV_CLEAR or not change.fflags
        self._reads[change.ident] = change
        edge = select.EPOLLET if change.flags & KQ_EV_CLEAR else 0
        self._epoll.register(change.ident, select.EPOLLIN | select.EPOLLRDHUP | edge)

    def _events(self, number: int, events: int) -> Iterable[kevent]:
        with self._changing:
            asked, ended = self._reads.get(number), self._exits.pop(number, None)
        if ended is not None:
            os.close(number)
            yield kevent(ended.ident, KQ_FILTER_PROC, KQ_EV_EOF | KQ_EV_ONESHOT, KQ_NOTE_EXIT)
        elif asked is not None:
            is_end = events & (select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR)
            data = _asked(number, termios.FIONREAD)
            mark = min(asked.data, _WHOLE_BUFFER) if asked.fflags & KQ_NOTE_LOWAT else 1
            if is_end or data >= mark:
                yield kevent(number, KQ_FILTER_READ, asked.flags | (KQ_EV_EOF if is_end else 0), 0, data, asked.udata)


# The C library.


class _Library:
    """``ctypes.CDLL(None)`` without prctl, and with another ptrace."""

    def __getattr__(self, name: str) -> Any:
        if name in ("prctl", "syscall", "clone", "unshare"):
            raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
        return getattr(_libc, name)

    @staticmethod
    def ptrace(request: int, pid: int, address: Any, data: int) -> int:
        if request != _PT_DENY_ATTACH:
            raise NotImplementedError(request)
        return int(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def _library(name: Optional[str], *arguments: Any, **named: Any) -> Any:
    return _Library() if name is None else ctypes.CDLL(name, *arguments, **named)


def _spawn(program: str, arguments: Sequence[str], *more: Any, **named: Any) -> int:
    # Without -S, which would keep brokers from loading the simulation.
    return os.posix_spawn(program, [argument for argument in arguments if argument != "-S"], *more, **named)


# The replacements.


def _facades() -> dict[str, Facade]:
    sockets = {module.__name__: _darwins(module.socket) for module in (socket, _socket)}
    files = {name: _without_proc(getattr(os, name)) for name in ("stat", "lstat", "readlink", "listdir", "scandir")}
    files |= {name: _without_proc(getattr(os, name)) for name in ("open", "access")}
    queue = {name: value for name, value in globals().items() if name.startswith("KQ_")}
    given: dict[types.ModuleType, dict[str, Any]] = {
        sys: {"platform": "darwin"},
        os: {**files, "close": _close, "posix_spawn": _spawn},
        mmap: {},
        signal: {},
        ctypes: {"CDLL": _library},
        select: {**queue, "poll": Poll, "kqueue": kqueue, "kevent": kevent},
    }
    for module in (socket, _socket):
        kind = sockets[module.__name__]
        given[module] = {"socket": kind, "socketpair": _pair_of(kind), "SO_NOSIGPIPE": _SO_NOSIGPIPE}
    given[_socket]["SocketType"] = sockets["_socket"]
    return {module.__name__: Facade(module, values) for module, values in given.items()}


def _is_in_scope(name: str) -> bool:
    return (name == "pcsc_safe" or name.startswith("pcsc_safe.")) and not name.startswith(_LINUX)


def _with_32_bits() -> None:
    """On macOS pyscard's codes have 32 bits, so error codes are negative, and SCARD_PROTOCOL_UNSET is ANY."""
    module = importlib.import_module("smartcard.scard._scard")
    for name, value in list(vars(module).items()):
        if isinstance(value, int) and name.startswith(("SCARD_", "INVALID_")) and value >> 16 == 0x8010:
            setattr(module, name, value - (1 << 32))
        elif callable(value) and name.startswith("SCard") and name.endswith(("Group", "Reader")):  # not on macOS
            setattr(module, name, _narrowed(value))
    module.SCARD_PROTOCOL_UNSET = module.SCARD_PROTOCOL_ANY  # type: ignore[attr-defined]


def _narrowed(function: Callable[..., int]) -> Callable[..., int]:
    return lambda *arguments: function(*arguments) - (1 << 32)


def install() -> None:
    """From now on, give the modules of pcsc_safe that are imported what macOS has."""
    facades = _facades()

    def import_(name: str, namespace: Any = None, local: Any = None, wanted: Any = (), level: int = 0) -> Any:
        module = builtins.__import__(name, namespace, local, wanted, level)
        return module if level else facades.get(module.__name__, module)

    darwins = {**vars(builtins), "__import__": import_, "open": _without_proc(open)}
    begin, run = bootstrap._init_module_attrs, runpy._run_code  # type: ignore[attr-defined]

    # Every loader of modules, such as pytest's hook, initializes the module's attributes with this function.
    def begin_module(spec: Any, module: Any, **named: Any) -> Any:
        begin(spec, module, **named)
        if _is_in_scope(spec.name):
            module.__dict__["__builtins__"] = darwins
        elif spec.name == "smartcard.scard.scard":
            _with_32_bits()
        return module

    def run_code(code: Any, namespace: dict[str, Any], init: Any = None, mod_name: Any = None, *more: Any) -> Any:
        spec = more[0] if more else None
        if spec is not None and _is_in_scope(spec.name):  # python -m
            namespace["__builtins__"] = darwins
        return run(code, namespace, init, mod_name, *more)

    bootstrap._init_module_attrs = begin_module  # type: ignore[attr-defined]
    runpy._run_code = run_code  # type: ignore[attr-defined]


__name__ = "pcsc_safe.darwin"  # these functions simulate C functions; see pcsc_safe._core.failures
