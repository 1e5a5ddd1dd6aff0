"""A client of a broker, and its connections: its requests, and their replies.

A client is a process.  It has the handles that it was given, and can't reach another client's.  The calls go through
pcsc_safe's own functions, which know how threads share contexts.  Nothing here forks.
"""

from __future__ import annotations

import _socket  # as in __main__
import contextlib
import os
import threading
from _thread import start_new_thread  # as in server
from typing import TYPE_CHECKING, Any, Callable, Optional

from .._core import calls, gateways, handles, in_flight, library, process, router
from . import sharing, start, wire
from .sharing import Handle

if TYPE_CHECKING:
    from .server import Server

__all__ = ["Client", "Connection", "run_in_thread"]

_READ_SIZE = 1 << 16  # bytes
_SHARING_VIOLATION = library.constant("SCARD_E_SHARING_VIOLATION")
_EXCHANGES = {
    wire.NUMBERS[name]: (gateways.native.caller(calls.CALLS[name]), calls.CALLS[name])
    for name in ("SCardTransmit", "SCardControl")
}
_INVALID_HANDLE = library.constant("SCARD_E_INVALID_HANDLE")
_CARD = calls.Kind.CARD
_LEAVE_CARD = library.constant("SCARD_LEAVE_CARD")
_UNDOING = {
    "SCardEstablishContext": "SCardReleaseContext",
    "SCardConnect": "SCardDisconnect",
    "SCardBeginTransaction": "SCardEndTransaction",
}
_NOTHING: tuple[wire.Message, bytes] = (wire.Describe(), b"")
"""In place of a call that can be undone, and its reply."""
_BRACKETS = frozenset(("SCardBeginTransaction", "SCardEndTransaction"))
_32_BITS = 0xFFFFFFFF
_LONG_BITS = 64


class Client:
    """A process that is served.

    :ivar handles: the contexts and cards that it was given, by number.
    :ivar connections: its connections, without the first.
    :ivar process: its PID; 0 until it is known.
    """

    def __init__(self, key: bytes, presence: Connection) -> None:
        self.key = key
        self.presence = presence
        self.connections: set[Connection] = set()
        self.handles: dict[int, Handle] = {}
        self.process = 0
        self.is_watched = False
        self.has_ended = False

    def release(self) -> None:
        """End the sessions that no other client has, including one that is being established."""
        sharing.end(self)
        contexts = [handle for handle in list(self.handles.values()) if isinstance(handle.record, handles.Context)]
        left = [sharing.drop(self, handle) for handle in contexts]
        ended = [handle for handle, cards in zip(contexts, left) if cards is None]
        shared = [card for cards in left for card in cards or ()]  # each may wait for a long call of this client
        last = [card for card in shared if not _starts_in_thread(sharing.leave, self, *card)]
        # pcscd detects this immediately, as it detects the death of a process, so a long call delays no other context.
        for handle in ended:
            handle.record.context.real.end_long_calls()
        for connection in list(self.connections):
            connection.shut_down()
        # Contexts without waits first, because on macOS a wait may continue although it is cancelled.
        for handle in sorted(ended, key=lambda handle: bool(handle.record.context.real.waits)):
            router.public["SCardReleaseContext"](handle)
        for connection in list(self.connections):  # waits on contexts that other clients also have
            connection.hang_up()
        for card in last:
            sharing.leave(self, *card)


class Connection:
    """One connection of a client; carries one call at a time.

    :ivar socket: the broker's end.
    :ivar client: the client that it belongs to; None until the server has set it.
    :ivar unwatched: set when its end is no longer watched; until then its number must not be reused.
    """

    def __init__(self, server: Server, ours: _socket.socket) -> None:
        self._server = server
        self.socket = ours
        self.client: Optional[Client] = None
        self._waits_on: Optional[handles.Context] = None
        self._thread = 0
        self._last = _NOTHING
        self._ended_before = 0  # how many transactions of the card had ended at its latest call
        self._has_hung_up = False
        self.unwatched = threading.Event()

    def run(self) -> None:
        """Serve it until it is closed, or sends a malformed message."""
        self._thread = threading.get_ident()
        in_flight.client_has_hung_up.set(lambda: self._has_hung_up)
        try:
            self._serve()
        except (OSError, EOFError):
            pass
        except wire.WireError as error:
            with contextlib.suppress(OSError):
                self.socket.sendall(wire.encode(wire.Refused(str(error))))
        finally:
            self.hang_up()  # the server, which watches the connection, detects this
            self.unwatched.wait()
            self.socket.close()

    def shut_down(self) -> None:
        """End it, because the other end has ended or is no longer wanted."""
        self._has_hung_up = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(_socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """End it, and its wait for events."""
        self.shut_down()
        if self._thread != threading.get_ident():
            self.cancel_wait()  # a wait that begins later checks whether the client has hung up

    def _serve(self) -> None:
        receiver = wire.Receiver()
        hello = wire.decode(self._receive(receiver))
        if not isinstance(hello, wire.Hello) or hello.version != wire.VERSION:
            raise wire.WireError("the first frame is not a greeting of this version")
        client = self._server.welcome(hello.key, self)
        self.socket.sendall(wire.encode(wire.Welcome(wire.VERSION, os.getpid())))
        while True:
            self._serve_one(client, receiver)

    def _serve_one(self, client: Client, receiver: wire.Receiver) -> None:
        """Serve one request; nothing of it is kept while the connection is idle, because it may contain a PIN."""
        message = wire.decode(self._receive(receiver))
        reply = self._reply_to(client, message)
        is_undoable = isinstance(message, wire.Request) and wire.FUNCTIONS[message.function] in _UNDOING
        self._last = (message, reply) if is_undoable else _NOTHING
        try:
            self.socket.sendall(reply)
        except OSError:
            self._undo_last(client)
            raise

    def _receive(self, receiver: wire.Receiver) -> bytes:
        while True:
            data = self.socket.recv(_READ_SIZE)
            if not data:
                raise EOFError
            body = receiver.feed(data)
            if body is not None:
                return body

    def _reply_to(self, client: Client, request: wire.Message) -> bytes:
        if not isinstance(request, wire.Request):
            return self._reply_to_other(client, request)
        try:
            result = self._transmit_if_idle(client, request)
            if result is None:
                name = wire.FUNCTIONS[request.function]
                result = self._call(client, calls.CALLS[name], request.arguments)
        except Exception as error:
            kind = next(kind for kind in type(error).__mro__ if kind is Exception or kind.__name__ in wire.RAISABLE)
            text = str(error) if kind is not Exception else f"{type(error).__name__}: {error}"
            return wire.encode(wire.Raised(kind.__name__ if kind is not Exception else "RuntimeError", text))
        try:
            return wire.encode_result(result)
        except wire.WireError as error:
            return wire.encode(wire.Refused(f"the result can't be sent: {error}"))

    def _reply_to_other(self, client: Client, request: wire.Message) -> bytes:
        result: Any = None
        if isinstance(request, wire.Describe):
            result = library.catalogue()
        elif isinstance(request, wire.Inherit):
            result = self._server.give(client, *request)
        elif isinstance(request, wire.TakeBack):
            self._server.take_back(client, *request)
        elif isinstance(request, wire.Undo):
            self._undo_last(client)
        else:
            raise wire.WireError("not a request")
        return wire.encode(wire.Result(result))

    def _undo_last(self, client: Client) -> None:
        """Undo a call whose result the client doesn't keep: a signal handler interrupted the caller, or it died."""
        request, reply = self._last
        if not isinstance(request, wire.Request):
            return
        name, arguments = wire.FUNCTIONS[request.function], request.arguments
        decoded = wire.decode(reply[wire.HEADER :])
        result = decoded.value if isinstance(decoded, wire.Result) else None
        undoing = _UNDOING.get(name)
        if undoing is None or (result[0] if isinstance(result, list) else result) != library.SUCCESS:
            return
        if isinstance(result, list):
            call = calls.CALLS[undoing]
            self._call(client, call, (result[1], *([_LEAVE_CARD] if call.takes is _CARD else [])))
            return
        handle = client.handles.get(arguments[0])
        if handle is not None:
            with handle.free:
                # Not if another thread of the client has ended that transaction, and may have begun the next one.
                if handle.transactions_ended == self._ended_before:
                    self._call(client, calls.CALLS[undoing], (handle, _LEAVE_CARD))

    def _transmit_if_idle(self, client: Client, request: wire.Request) -> Any:
        """Transmit to a card whose context is idle, in as few steps as possible; None if this is another call."""
        number, arguments = request
        exchange = _EXCHANGES.get(number)
        if exchange is None or not arguments or type(arguments[0]) is not int:
            return None
        handle = client.handles.get(arguments[0])
        if handle is None or handle.holders:
            return None
        record = handle.record
        if record.kind is not _CARD:
            return None
        make, call = exchange
        result = make(record, arguments[1:])
        if result is calls.STALE:
            return None
        return result if result[0] == library.SUCCESS else call.failure(result[0])

    def _call(self, client: Client, call: calls.Call, arguments: Any) -> Any:
        name = call.name
        if name == "SCardEstablishContext":
            return _establish(client, *arguments)
        function = router.public.get(name)
        if function is None:
            raise AttributeError(f"module 'smartcard.scard' has no attribute {name!r}")
        if call.takes is None or not arguments:
            return function(*arguments)
        handle, *rest = arguments
        if type(handle) is int:
            known = client.handles.get(handle)
            # A number that the client doesn't have may be another client's handle, or that of a context that is being
            # released; C code may also cut a longer number to such a handle (macOS).
            is_number = handle & _32_BITS and handle.bit_length() <= _LONG_BITS  # the others are refused by pyscard
            handle = known if known is not None else calls.NO_HANDLE if is_number else handle
        if type(handle) is Handle and name == "SCardGetStatusChange":
            return self._wait(function, handle, rest)
        # A call that begins or ends a transaction may take long, and the card may become shared in this time.
        if type(handle) is Handle and (handle.holders or name in _BRACKETS):
            result = self._call_shared(client, call, function, handle, rest)
        else:
            result = function(handle, *rest)
        if name == "SCardConnect" and result[0] == library.SUCCESS:
            client.handles[int(result[1])] = result[1]
            if int(handle) not in client.handles:  # another process has the context by now
                client.handles.pop(int(result[1]), None)
                router.public["SCardDisconnect"](result[1], _LEAVE_CARD)
                return call.failure(_INVALID_HANDLE, rest)
        elif name in ("SCardDisconnect", "SCardReleaseContext") and type(handle) is Handle:
            _forget_released(client, handle)
        return result

    def _call_shared(self, client: Client, call: calls.Call, function: Any, handle: Handle, arguments: Any) -> Any:
        """A call on a handle that other clients also have."""
        name = call.name
        if name == "SCardCancel":  # of this client's waits, not of the others'
            for connection in list(client.connections):
                connection.cancel_wait(handle.record)
            return library.SUCCESS
        if name in ("SCardDisconnect", "SCardReleaseContext"):
            left = sharing.drop(client, handle)
            if left is not None:  # the other clients continue
                for card in left:
                    sharing.leave(client, *card)
                return library.SUCCESS
            result = function(handle, *arguments)
            if not handle.record.released:  # refused
                client.handles[int(handle)] = handle
            return result
        if handle.record.kind is calls.Kind.CONTEXT:
            return function(handle, *arguments)

        def call_and_note(handle: Handle, *arguments: Any) -> Any:
            result = function(handle, *arguments)
            self._ended_before = handle.transactions_ended  # no other thread can begin or end one at this moment
            return result

        result = sharing.call_on_card(client, name, handle, call_and_note, arguments)
        return result if result is not None else call.failure(_SHARING_VIOLATION, arguments)

    def cancel_wait(self, context: Optional[handles.Record] = None) -> None:
        """End its wait for events, if any.

        :param context: only if it waits on this one.
        """
        waits_on = self._waits_on
        if waits_on is not None and context in (None, waits_on):
            waits_on.real.cancel(waits_on, self._thread)

    def _wait(self, function: Any, handle: Handle, arguments: Any) -> Any:
        record = handle.record
        try:
            self._waits_on = record if isinstance(record, handles.Context) else None
            return function(handle, *arguments)
        finally:
            self._waits_on = None


_establishing = threading.Lock()


def _establish(client: Client, scope: Any, socket_name: Any) -> Any:
    """SCardEstablishContext.

    :param socket_name: the path of pcscd's socket for the client; None for the default.
    """

    def keep(real: Any, number: int, owner: Any, gateway: calls.Gateway) -> Any:
        return handles.register(handles.Context(real, number, scope, owner, gateway))

    with _establishing:
        if isinstance(socket_name, str):
            os.environ[start.SOCKET_NAME] = socket_name
        else:
            os.environ.pop(start.SOCKET_NAME, None)
        result = gateways.native.establish(scope, keep, process.current())
    if result[0] == library.SUCCESS:
        client.handles[int(result[1])] = result[1]
        if client.has_ended:
            client.release()
    return result


def run_in_thread(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function that may take long, in a thread if one can be started."""
    if not _starts_in_thread(function, *arguments):
        function(*arguments)


def _starts_in_thread(function: Callable[..., Any], *arguments: Any) -> bool:
    """Call a function in a thread; False if no more threads can be started."""
    try:
        start_new_thread(function, arguments)
    except RuntimeError:
        return False
    return True


def _forget_released(client: Client, handle: Handle) -> None:
    record = handle.record
    if record.released:
        client.handles.pop(handle, None)
    if record.released and isinstance(record, handles.Context):
        for number, other in list(client.handles.items()):
            if other.record.released:
                client.handles.pop(number, None)
