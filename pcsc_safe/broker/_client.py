"""A broker as its client sees it: the gateway that is another process.

A process has one door to its broker, and over it passes the far ends of its connections: one that says that it lives,
and as many as it has calls under way.  A connection carries one request and its answer at a time, so no thread waits
for another, and nothing that two threads say can mix.

At a fork the connections are guarded descriptors, as those to pcscd are: dead in the child.  The door of a broker for
the whole family of processes stays open; there a child becomes a client of its own.  Any other door dies too, and the
child has a broker of its own at its first need.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import struct
import threading
from collections.abc import Mapping
from typing import Any, Callable, Optional

from .. import _descriptors, _events, _gate, _log, _process
from .._calls import CALLS, Keep, LostError
from .._settings import settings
from ..errors import BrokerError
from ..policy import Broker as When
from . import _start, _wire

__all__ = ["Broker", "Legacy", "describe", "files_to_preserve", "functions", "mine", "prepare", "prestart", "usable"]

_READY_WITHIN = 30.0  # s; from its start
_MOST_IDLE = 16  # connections that are kept for the next calls
_AT_ONCE = 1 << 16  # bytes
_LONGEST_APDU = 65544  # bytes; MAX_BUFFER_SIZE_EXTENDED of pcsc-lite's reader.h
_socket: Any = None
_silently = 0  # MSG_NOSIGNAL: no SIGPIPE, whatever the application does with that


class _Connection:
    """One connection to a broker, used by one thread at a time."""

    __slots__ = ("_receive", "_receiver", "_send", "_socket", "descriptor")

    def __init__(self, ours: Any) -> None:
        self._socket = ours
        self._send: Callable[[bytes, int], object] = ours.sendall
        self._receive: Callable[[int], bytes] = ours.recv
        self._receiver = _wire.Receiver()
        self.descriptor = _descriptors.of(ours.fileno())

    def send(self, frame: bytes) -> None:
        """Send a request.

        :raises OSError: the broker is gone, and has not got it.
        """
        self._send(frame, _silently)

    def pass_on(self, message: bytes, number: int) -> None:
        """Send a descriptor with a message."""
        rights = struct.pack("i", number)
        self._socket.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)], _silently)

    def receive(self) -> bytes:
        """The body of the answer.

        :raises OSError, EOFError: the broker went before it answered.
        :raises WireError: the answer is none.
        """
        receive, feed = self._receive, self._receiver.feed
        while True:
            data = receive(_AT_ONCE)
            if not data:
                raise EOFError
            body = feed(data)
            if body is not None:
                return body

    def wait_at_most(self, seconds: Optional[float]) -> None:
        """How long an answer may take."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Close it, if the descriptor is still this connection and not something of the application's."""
        mine = self.descriptor.is_intact()
        _descriptors.unguard(self.descriptor)
        number = self._socket.detach()
        if mine and number >= 0:
            os.close(number)

    def abandon(self) -> None:
        """In a child: forget it; what is in its place is a dead socket, or none of our business."""
        number = self._socket.detach()
        if number >= 0 and _descriptors.is_dead(number):
            os.close(number)

    def go_on_at_exit(self) -> None:
        """At interpreter exit: Python would close it, and complain, before the last finalizers have used it."""
        number = self._socket.detach()
        self._send = lambda frame, _: _write_all(number, frame)
        self._receive = lambda size: os.read(number, size)


def _write_all(number: int, data: bytes) -> None:
    while data:
        data = data[os.write(number, data) :]


class Broker:
    """A broker that this process is a client of; a :class:`_calls.Gateway`.

    :ivar epoch: of the process.
    :ivar for_family: forked children inherit the door.
    :ivar lost: it is no more.
    """

    def __init__(
        self,
        door: _Connection,
        helper: _start.Helper,
        epoch: _process.Epoch,
        *,
        for_family: bool,
        key: Optional[bytes] = None,
        presence: Optional[_Connection] = None,
    ) -> None:
        self.epoch = epoch
        self.for_family = for_family
        self.lost = False
        self.functions: Mapping[str, Callable[..., Any]] = {
            name: self._function(number) for name, number in _wire.NUMBERS.items()
        }
        self._door = door
        self._helper = helper
        self.key = key or os.urandom(16)
        self._presence = presence
        self._arriving = threading.RLock()
        self._idle: list[_Connection] = []
        self._connections = {presence.descriptor.number: presence} if presence is not None else {}
        self._accepted: Optional[tuple[int, Legacy]] = None

    def enter(self, function: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """``call(*arguments)``; nothing native is entered, so no fork need wait for it."""
        return call(*arguments)

    def establish(self, scope: Any, keep: Keep) -> Any:
        """SCardEstablishContext; see :class:`_calls.Gateway`."""
        # libpcsclite looks at the environment each time, and the broker's is that of its start.
        result = self.functions["SCardEstablishContext"](scope, os.environ.get(_start.SOCKET_NAME))
        if result[0] == 0:
            result[1] = keep(result[1], None, self.epoch, self)
        return result

    def _function(self, number: int) -> Callable[..., Any]:
        encode, decode, ask = _wire.encode_request, _wire.decode, self._ask

        def function(*arguments: Any) -> Any:
            try:
                frame = encode(number, arguments)
            except _wire.WireError as error:
                raise BrokerError(
                    f"the arguments can't be told to the broker: {error}",
                    remedy=f"they may have {_wire.MAX_BODY} bytes; an APDU has {_LONGEST_APDU} at most",
                    function=_wire.FUNCTIONS[number],
                    pid=os.getpid(),
                ) from error
            try:
                reply = decode(ask(frame))
            except _wire.WireError as error:
                raise _misunderstood(error) from error
            return reply.value if type(reply) is _wire.Result else self._unusual(reply)

        return function

    def describe(self) -> Any:
        """The names of its pyscard; see :func:`_pyscard.catalogue`."""
        return self._told(self._ask(_wire.encode(_wire.Describe())))

    def inherit(self, key: bytes, contexts: list[int], *, keeps: bool) -> Any:
        """Get contexts, and their cards, of another client.

        :param key: the other's.
        :param contexts: real handles.
        :param keeps: the other has them as well then.
        :return: the handles that were got, without those that it had no more.
        """
        return self._told(self._ask(_wire.encode(_wire.Inherit(key, tuple(contexts), keeps))))

    def _told(self, body: bytes) -> Any:
        reply = _wire.decode(body)
        return reply.value if isinstance(reply, _wire.Result) else self._unusual(reply)

    def _unusual(self, reply: _wire.Message) -> Any:
        if isinstance(reply, _wire.Raised):
            raise getattr(builtins, reply.kind)(reply.text)
        raise _misunderstood(reply.text if isinstance(reply, _wire.Refused) else "it answered something else")

    def _ask(self, frame: bytes) -> bytes:
        """One exchange, on a connection that no other thread is using."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            if connection.descriptor.is_intact():
                break
            self._drop(connection)  # the application has closed it: what has the number now is not ours
        sent = False
        try:
            connection.send(frame)
            sent = True
            body = connection.receive()
        except (OSError, EOFError) as error:
            self._drop(connection)
            raise self._lost(under_way=sent) from error
        except BaseException:
            self._drop(connection)  # a signal handler's; the answer to this request is not to be that to another
            raise
        if len(self._idle) < _MOST_IDLE:
            self._idle.append(connection)
        else:
            self._drop(connection)
        return body

    def _connect(self) -> _Connection:
        if self._presence is None:
            with self._arriving:
                if self._presence is None:
                    self._presence = self._arrive()
        elif not self._presence.descriptor.is_intact():
            raise self._lost(under_way=False)  # the application has closed it, and the broker our sessions
        return self._greeted()

    def _arrive(self) -> _Connection:
        """The connection that says that this process lives: the first one, which carries no calls."""
        presence = self._greeted()
        self._helper = self._helper.heard()
        _log.info("process %d does PC/SC through the broker %d", self.epoch.pid, self.helper_pid)
        return presence

    @property
    def helper_pid(self) -> int:
        """The PID of the broker."""
        return self._helper.pid

    def _greeted(self, key: Optional[bytes] = None) -> _Connection:
        """A new connection, of which the broker has said that it is welcome.

        :param key: of the client that it is for, if not this one.
        """
        if not self._door.descriptor.is_intact():
            raise self._lost(under_way=False)
        try:
            connection: _Connection = _gate.enter("the broker's door", self._passed)
        except OSError as error:
            if isinstance(error, ConnectionError):
                raise self._gone_at_the_door() from error
            raise BrokerError(
                f"no connection to the broker can be made in process {os.getpid()}: {error.strerror}",
                remedy="each takes a descriptor, and each call under way a connection",
                pid=os.getpid(),
            ) from error
        welcome: Optional[_wire.Message] = None
        try:
            connection.wait_at_most(_READY_WITHIN)
            connection.send(_wire.encode(_wire.Hello(_wire.VERSION, key or self.key)))
            welcome = _wire.decode(connection.receive())
            connection.wait_at_most(None)
        except (OSError, EOFError) as error:
            raise self._gone_at_the_door() from error
        except _wire.WireError as error:
            raise _misunderstood(error) from error
        finally:
            if not isinstance(welcome, _wire.Welcome):
                self._drop(connection)
        if not isinstance(welcome, _wire.Welcome) or welcome.version != _wire.VERSION:
            raise _misunderstood("it is of another version of pcsc_safe")
        return connection

    def _passed(self) -> _Connection:
        """A connection whose far end was passed through the door."""
        ours, theirs = _socket.socketpair()
        try:
            connection = _guarded(ours)
            self._connections[connection.descriptor.number] = connection
            try:
                self._door.pass_on(_start.FOR_FAMILY if self.for_family else _start.FOR_ONE, theirs.fileno())
            except BaseException:
                self._drop(connection)
                raise
            return connection
        finally:
            theirs.close()

    def _gone_at_the_door(self) -> Exception:
        """What to raise when the broker has not let us in: it never began, or it is gone."""
        if self.epoch is not _process.current():
            return LostError(self, under_way=False)
        if self._helper.errors is None or self._helper.parent != os.getpid():
            return self._lost(under_way=False)
        why = self._helper.why_not()
        self._lost(under_way=False)
        return BrokerError(
            f"the broker of process {os.getpid()} can't begin: {why}",
            remedy="try what it runs: PYTHON -m pcsc_safe.broker --help; PCSC_SAFE_BROKER_PYTHON chooses the Python",
            pid=os.getpid(),
        )

    def _lost(self, *, under_way: bool) -> LostError:
        """Note that this broker is no more.

        :return: what to raise.
        """
        if self.epoch is not _process.current():
            return LostError(self, under_way=False)
        if not self.lost:
            self.lost = True
            _log.warning("process %d has lost the broker %d, and its sessions", self.epoch.pid, self.helper_pid)
        for connection in [*self._idle, *filter(None, [self._presence]), self._door]:
            self._drop(connection)
        del self._idle[:]
        self._helper = self._helper.heard()
        self._helper.reap()
        return LostError(self, under_way=under_way)

    def _drop(self, connection: _Connection) -> None:
        self._connections.pop(connection.descriptor.number, None)
        connection.close()

    # At a fork, and at exit.

    def heir(self, epoch: _process.Epoch) -> Optional[Broker]:
        """In a child: leave the parent's connections; the child's own way to the same broker, if there is one."""
        for connection in [*self._connections.values()]:
            connection.abandon()
        if self._accepted is not None and self._accepted[0] == epoch.pid:
            legacy = self._accepted[1]
            if not self.for_family:
                _descriptors.guard(self._door.descriptor)
            presence = _guarded(_socket.socket(fileno=legacy.number))
            return Broker(
                self._door, self._helper, epoch, for_family=self.for_family, key=legacy.key, presence=presence
            )
        if self.for_family and not self.lost:
            return Broker(self._door, self._helper, epoch, for_family=True)
        self._door.abandon()
        self._helper = self._helper.heard()
        return None

    def bequeath(self, given: list[int], shared: list[int]) -> Legacy:
        """Have a client made for the child that is about to be forked, and give contexts to it.

        :param given: those that this process has no more then.
        :param shared: those that it goes on having.
        :raises LostError, BrokerError: it can't be.
        """
        if self._presence is None:
            self._idle.append(self._connect())
        key = os.urandom(16)
        connection = self._greeted(key)
        try:
            for contexts, keeps in ((given, False), (shared, True)):
                if contexts:
                    connection.send(_wire.encode(_wire.Inherit(self.key, tuple(contexts), keeps)))
                    self._told(connection.receive())
        except (OSError, EOFError) as error:
            self._drop(connection)
            raise self._lost(under_way=False) from error
        except BaseException:
            self._drop(connection)
            raise
        assert self._presence is not None
        return Legacy(self, key, connection, self._presence.descriptor.number, given)

    def files_to_preserve(self) -> list[int]:
        """The descriptors without which it is lost."""
        needed = [self._door, *filter(None, [self._presence])]
        return [connection.descriptor.number for connection in needed if connection.descriptor.is_intact()]

    def go_on_at_exit(self) -> None:
        """At interpreter exit: stay usable for the last finalizers."""
        for connection in [*self._connections.values()]:
            connection.go_on_at_exit()


class Legacy:
    """What a client gets that is not born yet.

    :ivar key: the client's.
    :ivar number: the descriptor of the connection by which it lives; the same as its parent's, so that who closes all
        descriptors but some can know which.
    """

    def __init__(self, broker: Broker, key: bytes, connection: _Connection, number: int, given: list[int]) -> None:
        self.key = key
        self.number = number
        self._broker = broker
        self._connection = connection
        self._given = given

    def descriptors(self) -> set[int]:
        """Those that the child is to have."""
        return {self._connection.descriptor.number, *self._broker.files_to_preserve()}

    def arrive(self) -> None:
        """In the child, in its hook: take the parent's place."""
        with contextlib.suppress(OSError):
            os.dup2(self._connection.descriptor.number, self.number, inheritable=False)
            os.close(self._connection.descriptor.number)
            self._broker._accepted = (os.getpid(), self)

    def settle(self, born: bool) -> None:
        """In the parent: leave it to the child; or take back what was given, if there is none."""
        if self._given and not born:
            with contextlib.suppress(LostError, BrokerError):
                self._broker.inherit(self.key, self._given, keeps=False)
        self._broker._drop(self._connection)


def _guarded(ours: Any) -> _Connection:
    connection = _Connection(ours)
    _descriptors.guard(connection.descriptor)
    if hasattr(_socket, "SO_NOSIGPIPE"):
        ours.setsockopt(_socket.SOL_SOCKET, _socket.SO_NOSIGPIPE, 1)  # macOS
    return connection


def _misunderstood(why: object) -> BrokerError:
    return BrokerError(
        f"process {os.getpid()} and its broker don't understand each other: {why}",
        remedy="both have to run the same version of pcsc_safe",
        pid=os.getpid(),
    )


# The one of this process.

_mine: Optional[Broker] = None
_starting = threading.RLock()


def mine() -> Broker:
    """The broker of this process; it is started if there is none.

    :raises BrokerError: it can't be.
    """
    global _mine
    prepare()
    with _starting:
        if not _usable(_mine):
            _mine = _started(for_family=settings().broker is When.ALWAYS)
        assert _mine is not None
        return _mine


def _usable(broker: Optional[Broker]) -> bool:
    return broker is not None and not broker.lost and broker.epoch is _process.current()


def usable() -> Optional[Broker]:
    """The broker of this process, if it has one; also while its epoch begins."""
    return _mine if _mine is not None and not _mine.lost else None


def files_to_preserve() -> list[int]:
    """The descriptors without which this process loses its broker."""
    broker = usable()
    return broker.files_to_preserve() if broker is not None else []


def prestart() -> None:
    """Start a broker now, for this process and the children that it forks from here on.

    It doesn't wait until the broker is ready.  Each of these processes is a client of its own there; one that needs no
    broker leaves it alone.

    :raises BrokerError: it can't be started.
    """
    global _mine
    prepare()
    with _starting:
        if not _usable(_mine):
            _mine = _started(for_family=True)


def _started(for_family: bool) -> Broker:
    return _gate.enter("the start of a broker", _start_one, for_family)  # type: ignore[no-any-return]


def _start_one(for_family: bool) -> Broker:
    epoch = _process.current()
    try:
        ours, theirs = _socket.socketpair()
    except OSError as error:
        raise BrokerError(
            f"the broker can't be started in process {os.getpid()}: {error.strerror}", pid=os.getpid()
        ) from error
    door = _Connection(ours) if for_family else _guarded(ours)
    try:
        helper = _start.spawn(theirs.fileno(), settings().broker_python)
    except BaseException:
        door.close()
        raise
    finally:
        theirs.close()
    _events.record("broker", broker=helper.pid)
    return Broker(door, helper, epoch, for_family=for_family)


_ATTEMPTS = 3


def _persistently(ask: Callable[[Broker], Any]) -> Any:
    """What needs no session, asked of whatever broker this process has; of another if one dies meanwhile."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(LostError):
            return ask(mine())
    raise died_too_often()


def died_too_often() -> BrokerError:
    """What to raise when new brokers die as well."""
    return BrokerError(
        f"the brokers of process {os.getpid()} die as soon as they have begun, {_ATTEMPTS} of them",
        remedy="see the system's log for what kills them",
        pid=os.getpid(),
    )


def _function(name: str) -> Callable[..., Any]:
    return lambda *arguments: _persistently(lambda broker: broker.functions[name](*arguments))


functions: Mapping[str, Callable[..., Any]] = {name: _function(name) for name in CALLS}
"""Those of whatever broker this process has at the time."""


def describe() -> Any:
    """What a broker says of its pyscard; see :func:`_pyscard.catalogue`."""
    return _persistently(Broker.describe)


def prepare() -> None:
    """Import what a broker takes, so that nothing need be imported in a child or at interpreter exit."""
    global _socket, _silently
    if _socket is not None:
        return
    import socket

    _silently = getattr(socket, "MSG_NOSIGNAL", 0)
    _socket = socket
    _descriptors.prepare()
    atexit.register(_at_exit)


def _at_exit() -> None:
    if _mine is not None and _mine.epoch is _process.current():
        _mine.go_on_at_exit()


def _begin(epoch: _process.Epoch) -> None:
    global _mine, _starting
    _starting = threading.RLock()
    if _mine is not None:
        _mine = _mine.heir(epoch)


_process.at_fork(at_begin=_begin)
