"""The client's side of a broker: the gateway to another process.

A process has one door to its broker, a socket.  It passes the far ends of its connections through it: one connection
that exists as long as the process, and one for each call in progress.  A connection carries one request and its reply
at a time, so no thread waits for another, and the calls of two threads can't mix.

At a fork the connections are guarded file descriptors, like those to pcscd: a dead socket replaces each in the child.
The door of a broker that serves the whole family of processes stays open, and the child becomes a separate client.  Any
other door is replaced, too, and the child starts its own broker when it first needs one.
"""

from __future__ import annotations

import builtins
import os
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Callable, NamedTuple, Optional

from .._core import descriptors, failures, gate, in_flight, log, one_step, process
from .._core.calls import KEEP_FILES, LOST_REASON, STALE, Keep, KeepCard, LostError
from .._core.failures import is_ours
from .._core.unpatched import RLock
from ..errors import BrokerError
from . import start, wire
from .connection import Connection, adopt, from_numbers, pair

__all__ = ["Broker", "InheritedConnection"]

_READY_TIMEOUT = 30.0  # s; from its start
_MOST_IDLE = 16  # connections that are kept for the next calls
_DEATH_TIMEOUT = 0.1  # s
_UNDO = wire.encode(wire.Undo())
_BEGIN = wire.NUMBERS["SCardBeginTransaction"]
_KeepResult = Callable[[Any], Any]
_LONGEST_APDU = 65544  # bytes; MAX_BUFFER_SIZE_EXTENDED of pcsc-lite's reader.h


class _StaleError(Exception):
    """The context has another handle by now."""


class _Presence(NamedTuple):
    """The connection that exists as long as a client, and the client's key.

    The broker makes a client of the first connection that brings a key.  So each candidate brings a key of its own, and
    a connection that doesn't become this process's presence is another client's, which has nothing.
    """

    connection: Connection
    key: bytes


class Broker:
    """A broker that this process is a client of; a :class:`calls.Gateway`.

    :ivar epoch: of the process.
    :ivar for_family: whether forked children inherit the door.
    :ivar lost: whether this process has lost it.
    """

    def __init__(
        self,
        door: Connection,
        helper: start.Helper,
        epoch: process.Epoch,
        *,
        for_family: bool,
        presence: Optional[_Presence] = None,
    ) -> None:
        self.epoch = epoch
        self.for_family = for_family
        self.lost = False
        self.functions: Mapping[str, Callable[..., Any]] = {
            name: partial(self._call, number) for name, number in wire.NUMBERS.items()
        }
        self._door = door
        self._helper = helper
        self._presence = presence
        self._presence_turn = RLock()
        self._idle: list[Connection] = []
        self._connections: dict[weakref.ref[Connection], None] = {}
        for lasting, _ in filter(None, [presence]):
            self._register(lasting)
        self._inherited_connection: Optional[tuple[int, InheritedConnection]] = None

    def enter(self, function: str, *arguments: Any) -> Any:
        """Make a call through the broker: not inside the native library, so no fork needs to wait for it."""
        return self.functions[function](*arguments)

    def establish(self, scope: Any, keep: Keep, here: process.Epoch, outgrown: Optional[int] = None) -> Any:
        """SCardEstablishContext; see :class:`calls.Gateway`."""
        # The broker's environment is that of its start.  Its libpcsclite reads the variable at the first context.
        where = os.environ.get(start.SOCKET_NAME)
        if where and not os.path.isabs(where):
            where = os.path.abspath(where)

        def keep_result(result: Any) -> Any:
            if result[0] == 0:
                if outgrown is not None:
                    self._check_reader_count(result[1], outgrown)
                result[1] = keep(result[1], result[1], self.epoch, self)
            return result

        return self._exchange(_frame_of(wire.NUMBERS["SCardEstablishContext"], (scope, where)), keep_result)

    def _check_reader_count(self, real: int, outgrown: int) -> None:
        if self.functions["SCardListReaders"](real, [])[0] == outgrown:
            log.info(
                "broker-left",
                "process %(pid)d starts a new broker, which replaces broker %(broker_pid)d, "
                "because pcscd had more readers before "
                "it was restarted",
                broker_pid=self.helper_pid,
            )
            raise self._mark_lost(in_progress=False, warn=False)  # a new broker has seen no other pcscd

    def connect(self, context: Any, arguments: Sequence[Any], keep: KeepCard) -> Any:
        """SCardConnect; see :class:`calls.Gateway`."""
        real = context.real
        if context.gateway is not self:
            return STALE

        def keep_result(result: Any) -> Any:
            if result[0] == 0:
                if context.real != real:  # another thread has re-established it
                    raise _StaleError
                result[1] = keep(result[1], None, result[2])
            return result

        try:
            return self._exchange(_frame_of(wire.NUMBERS["SCardConnect"], (real, *arguments)), keep_result)
        except _StaleError:
            return STALE

    def descriptors(self, real: Any) -> Sequence[Any]:
        """None: the broker has them."""
        return ()

    def forget(self, real: int) -> None:
        """Release a context of this process that is no longer needed; does nothing in a child."""
        if self.epoch is process.current() and not self.lost:
            with failures.suppress(LostError, BrokerError):
                self.functions["SCardReleaseContext"](real)

    def discard(self) -> None:
        """Give this broker up, because this process has another one."""
        self._mark_lost(in_progress=False, warn=False)

    def _call(self, number: int, *arguments: Any, made: Optional[list[Any]] = None) -> Any:
        return self._exchange(_frame_of(number, arguments), made=made, can_be_undone=number == _BEGIN)

    def request_catalogue(self) -> Any:
        """The names of its pyscard; see :func:`library.catalogue`."""
        return self._exchange(wire.encode(wire.Describe()))

    def inherit(self, key: bytes, handles: list[int], *, keeps: bool) -> Any:
        """Get contexts and cards of another client.

        :param key: of the other client.
        :param handles: real handles.
        :param keeps: whether the other client keeps them, too.
        :return: the handles that this client got, without those that the other no longer had.
        """
        return self._exchange(wire.encode(wire.Inherit(key, tuple(handles), keeps)))

    def take_back(self, key: bytes, handles: list[int]) -> None:
        """End another client, which no process has become, and get contexts and cards of it.

        :param key: of the other client.
        :param handles: real handles.
        """
        self._exchange(wire.encode(wire.TakeBack(key, tuple(handles))))

    def _exchange(
        self,
        frame: bytes,
        keep: Optional[_KeepResult] = None,
        made: Optional[list[Any]] = None,
        can_be_undone: bool = False,
    ) -> Any:
        """The result of one request, on a connection that no other thread is using.

        :param keep: called with the result; if it raises, or is never called, the broker undoes the call.
        :param made: gets the result in the step from which on the broker doesn't undo the call; so the caller has it
            even if a signal handler raises then.
        :param can_be_undone: whether the broker can undo the call; otherwise it completes a call that was sent.
        """
        if made is None:
            made = []
        connection: Optional[Connection] = None
        sent: list[int] = []
        undone: list[int] = []
        idle, is_reusable = self._idle, False
        try:
            connection = self._get_connection()
            connection.send(frame, sent)
            reply = wire.decode(connection.receive())
            is_reusable = type(reply) is wire.Raised  # Refused: the broker may have hung up
            result = _result_of(reply)
            if keep is not None:
                result = self._keep(keep, result, connection, undone)
            made[:], is_reusable = (result,), True  # nothing comes between
            return result
        except (OSError, EOFError) as error:
            if not is_ours(error):
                raise
            raise self._mark_lost(in_progress=sum(sent) == len(frame)) from error
        except wire.WireError as error:
            raise _protocol_error(error) from error
        finally:
            # Not kept if a signal handler raised, because the next request would get the reply to this one.  After
            # keep() nothing is called here, so no signal handler can run, and the result isn't lost.
            if is_reusable and not self.lost:
                idle += [connection]  # type: ignore[list-item]  # there is one
            elif connection is not None:
                is_due = (keep is not None or can_be_undone) and not (is_reusable or undone)
                is_due = is_due and sum(sent) == len(frame) and self._is_mine(connection)
                connection.close(_UNDO if is_due else b"")

    def _keep(self, keep: _KeepResult, result: Any, connection: Connection, undone: list[int]) -> Any:
        """What ``keep`` returns; if it raises, undo the call."""
        try:
            return keep(result)
        except BaseException:
            if self._is_mine(connection):
                with failures.suppress(OSError, EOFError, wire.WireError):
                    connection.send(_UNDO, undone)
                    connection.receive()
            raise

    def _is_mine(self, connection: Connection) -> bool:
        """Whether a connection belongs to this process; a child that a handler has forked by C code has a copy."""
        return bool(process.sentinel[0]) and self.epoch is process.here and connection.descriptor.is_intact()

    def _get_connection(self) -> Connection:
        """A connection that is idle, or a new one."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError as error:
                if not is_ours(error):
                    raise
                return self._connect()
            if connection.descriptor.is_intact() and len(self._idle) < _MOST_IDLE:
                return connection
            connection.close()  # there are enough; or the application has closed it, and the number is another file's

    def _connect(self) -> Connection:
        if self._presence is None:
            one_step.call_in_turn(self._presence_turn, self._make_presence)
        elif not self._presence.connection.descriptor.is_intact():
            raise self._mark_lost(in_progress=False)  # the application has closed it, and the broker our sessions
        return self._open_connection(self.key)

    def _make_presence(self) -> None:
        if self._presence is not None:
            return
        key = os.urandom(16)
        presence = _Presence(self._open_connection(key), key)
        if self._presence is not None:
            presence.connection.close()
            return
        self._presence = presence  # nothing comes between that look and this line
        self._close_errors()
        log.info("broker", "broker %(broker_pid)d makes the PC/SC calls of process %(pid)d", broker_pid=self.helper_pid)

    @property
    def key(self) -> bytes:
        """The key of this client; empty if it has had no connection yet."""
        return self._presence.key if self._presence is not None else b""

    @property
    def helper_pid(self) -> int:
        """The PID of the broker."""
        return self._helper.pid

    def _open_connection(self, key: bytes) -> Connection:
        """A new connection that the broker has accepted.

        :param key: of the client that it is for.
        """
        if not self._door.descriptor.is_intact():
            raise self._mark_lost(in_progress=False)
        connection: Optional[Connection] = None
        far_end: Optional[Connection] = None
        is_welcome = False
        try:
            hello = wire.encode(wire.Hello(wire.VERSION, key))
            connection, far_end = gate.call_inside(in_flight.DOOR, self._pass_far_end, hello)
            reply = wire.decode(connection.receive_first(self._door, _READY_TIMEOUT))
            is_welcome = isinstance(reply, wire.Welcome) and reply.version == wire.VERSION
        except (OSError, EOFError) as error:
            if not is_ours(error):
                raise
            raise self._refusal_error(error) from error
        except wire.WireError as error:
            raise _protocol_error(error) from error
        finally:
            if far_end is not None:
                far_end.close()
            if connection is not None and not is_welcome:
                connection.close()
        if not is_welcome:
            # So that it ends, and the next use starts the one that is configured then.
            self._mark_lost(in_progress=False)
            raise _protocol_error("it has another version of pcsc_safe")
        assert connection is not None
        return connection

    def _pass_far_end(self, hello: bytes) -> tuple[Connection, Connection]:
        """A connection, and a copy of its far end, which was passed through the door with a message already in it.

        The copy is kept until the broker has replied: macOS can flush a socket that is being passed if no process has
        it open.  No child may keep the copy, so it is guarded, too.
        """
        ours, theirs = pair(guarded=True)
        mine = [ours]
        try:
            mine.append(adopt(theirs, guarded=True))
            for end in mine:
                self._register(end)
            # If a signal handler has forked and this is the child, the parent passes the far end.
            if self.epoch is not process.current():
                raise LostError(self, in_progress=False)
            ours.send(hello)  # before, so that the broker doesn't have to wait for it
            self._door.send_descriptor(
                start.FOR_FAMILY if self.for_family else start.FOR_ONE, mine[1].descriptor.number
            )
            return mine[0], mine[1]
        except BaseException:
            for end in mine:
                end.close()
            theirs.close()
            raise

    def _refusal_error(self, error: Exception) -> Exception:
        """The error if the broker accepts no connection: it never started, has ended, or has no free resources."""
        if self.epoch is not process.current():
            return LostError(self, in_progress=False)
        is_local = isinstance(error, OSError) and not isinstance(error, ConnectionError)
        timeout = 0.0 if is_local else _DEATH_TIMEOUT
        if self._presence is not None and not self.lost and self._presence.connection.is_alive(timeout):
            reason = (is_local and getattr(error, "strerror", None)) or "the broker accepts no more connections"
            return BrokerError(
                f"process {os.getpid()} can't make another connection to its broker: {reason}",
                remedy="each PC/SC call in progress needs a connection, and a file descriptor in both processes: raise "
                "the limit (ulimit -n), or use fewer threads",
                pid=os.getpid(),
            )
        never_started = self._helper.errors is not None and self._helper.parent == os.getpid()
        why = self._helper.failure_reason() if never_started else ""
        lost = self._mark_lost(in_progress=False, warn=not never_started)
        if not never_started:
            return lost
        if is_local:
            why = getattr(error, "strerror", None) or why
        return BrokerError(
            f"the broker of process {os.getpid()} doesn't start: {why}",
            remedy=f"run {self._helper.attempt} to see why; PCSC_SAFE_BROKER_PYTHON chooses another interpreter",
            pid=os.getpid(),
        )

    def _mark_lost(self, *, in_progress: bool, warn: bool = True) -> LostError:
        """Note that this process has lost this broker.

        :param warn: whether to log it.
        :return: the error to raise.
        """
        if self.epoch is not process.current():
            return LostError(self, in_progress=False)
        was_lost, self.lost = self.lost, True
        if warn and not was_lost:
            log.warning(
                "broker-lost",
                "process %(pid)d has lost its sessions in broker %(broker_pid)d, because %(why)s: pcsc_safe "
                "re-establishes the contexts, but under policy 'share' you must establish new ones; %(keep_files)s",
                broker_pid=self.helper_pid,
                why=LOST_REASON,
                keep_files=KEEP_FILES,
            )
        for connection in [*self._idle, *self._lasting()]:
            connection.close()
        del self._idle[:]
        self._close_errors()
        self._helper.reap()
        return LostError(self, in_progress=in_progress)

    def _close_errors(self) -> None:
        """Stop reading the broker's messages about its start."""
        helper = self._helper
        silent = helper._replace(errors=None)
        if self._helper is helper:  # one thread closes it
            self._helper = silent
            helper.close_errors()

    # At a fork.

    def _register(self, connection: Connection) -> None:
        """Remember a connection for the next fork, as long as something else refers to it."""
        self._connections[weakref.ref(connection, self._connections.pop)] = None

    def after_fork_in_child(self, epoch: process.Epoch) -> Optional[Broker]:
        """In a child: abandon the parent's connections; return its own client of the same broker, if there is one."""
        for connection in filter(None, [reference() for reference in list(self._connections)]):
            connection.abandon()
        if self._inherited_connection is not None and self._inherited_connection[0] == epoch.pid:
            inherited_connection = self._inherited_connection[1]
            if not self.for_family:
                descriptors.guard(self._door.descriptor)
            if inherited_connection.descriptor is not None and inherited_connection.descriptor.is_intact():
                presence = _Presence(inherited_connection.adopt(), inherited_connection.key)
                return Broker(self._door, self._helper, epoch, for_family=self.for_family, presence=presence)
        elif self.for_family and not self.lost:
            return Broker(self._door, self._helper, epoch, for_family=True)
        self._door.abandon()
        self._close_errors()
        return None

    def prepare_child(self) -> InheritedConnection:
        """Create a client for the child that is about to be forked.

        :raises LostError, BrokerError: this is not possible.
        """
        if self._presence is None:
            self._idle.append(self._connect())
        assert self._presence is not None
        lasting = self._presence.connection.descriptor
        if not lasting.is_intact():  # the application has closed it; the number may be another file's in the child
            raise self._mark_lost(in_progress=False)
        key = os.urandom(16)
        return InheritedConnection(self, key, self._open_connection(key), lasting.number)

    def files_to_preserve(self) -> list[int]:
        """The descriptors without which this process loses the broker."""
        return [each.descriptor.number for each in self._lasting() if each.descriptor.is_intact()]

    def _lasting(self) -> list[Connection]:
        """The connections without which this process loses the broker."""
        return [*(each for each, _ in filter(None, [self._presence])), self._door]


class InheritedConnection:
    """The connection of a client that has not been forked yet.

    :ivar key: of the client.
    :ivar number: the descriptor of the connection that exists as long as the client.  It is the same as in its parent,
        so that a program that closes all descriptors but some can know which to keep.
    :ivar descriptor: the same descriptor, as it is in the child.
    """

    def __init__(self, broker: Broker, key: bytes, connection: Connection, number: int) -> None:
        self.key = key
        self.number = number
        self._broker = broker
        self.descriptor: Optional[descriptors.Descriptor] = None
        self._connection = connection
        self._given: list[int] = []
        self._adopted: list[Any] = []

    def give(self, given: list[int], shared: list[int]) -> None:
        """In the parent: give the client contexts and cards; :meth:`settle` takes back what an interrupted call gave.

        :param given: those that this process then no longer has.
        :param shared: those that this process keeps, too.
        :raises LostError, BrokerError: this is not possible.
        """
        self._given = given  # first: a signal handler may raise
        try:
            for handles, keeps in ((given, False), (shared, True)):
                if handles:
                    self._connection.send(wire.encode(wire.Inherit(self._broker.key, tuple(handles), keeps)))
                    _result_of(wire.decode(self._connection.receive()))
        except (OSError, EOFError) as error:
            if not is_ours(error):
                raise
            raise self._broker._mark_lost(in_progress=False) from error

    def descriptors(self) -> set[int]:
        """The descriptors that the child keeps."""
        return {self._connection.descriptor.number, *self._broker.files_to_preserve()}

    def take_over(self) -> None:
        """In the child, in its hook: take the parent's place; again, if a signal handler has raised."""
        given = self._connection.descriptor
        taken = given._replace(number=self.number)
        with failures.suppress(OSError):
            if given.is_intact():
                os.dup2(given.number, self.number, inheritable=False)
                os.close(given.number)
            if taken.is_intact():
                self.descriptor = taken
                self._broker._inherited_connection = (os.getpid(), self)

    def adopt(self) -> Connection:
        """In the child, at its first use of PC/SC: the connection; again, if a signal handler has raised."""
        if not self._adopted:
            self._adopted.extend(from_numbers((self.number,)))
        self._adopted[0].settimeout(None)
        return adopt(self._adopted[0], guarded=True)

    def settle(self, has_child: bool) -> None:
        """In the parent: leave it to the child; or, if there is no child, take back what was given."""
        if self._given and not has_child:
            with failures.suppress(LostError, BrokerError):
                self._broker.take_back(self.key, self._given)
        self._connection.close()


def _frame_of(number: int, arguments: tuple[Any, ...]) -> bytes:
    """The request for a call.

    :param number: of the function.
    """
    try:
        return wire.encode_request(number, arguments)
    except wire.WireError as error:
        raise BrokerError(
            f"the arguments can't be sent to the broker: {error}",
            remedy=f"pass at most {wire.MAX_BODY} bytes in all arguments, and at most {_LONGEST_APDU} in an APDU",
            function=wire.FUNCTIONS[number],
            pid=os.getpid(),
        ) from error


def _result_of(reply: wire.Message) -> Any:
    if isinstance(reply, wire.Result):
        return reply.value
    if isinstance(reply, wire.Raised):
        raise getattr(builtins, reply.kind)(reply.text)
    raise _protocol_error(reply.text if isinstance(reply, wire.Refused) else "it sent an unexpected message")


def _protocol_error(why: object) -> BrokerError:
    return BrokerError(
        f"process {os.getpid()} and its broker don't understand each other: {why}",
        remedy="restart the program: both have to run the same version of pcsc_safe",
        pid=os.getpid(),
    )
