"""The reader side of the vpcd driver: its ports, and the connection that puts a card into a reader.

vpcd listens on a TCP port for each of its two slots.  The process that connects there is the card.  A message is two
bytes of length, big endian, then the data.  (vpcd can also connect to us, but 3.3 can't do that twice: FD_SET(-1), and
pcscd aborts.)

Invariant: only our vpcd can use a port that `PortPair` reserved, from before it starts until `close`, over every
restart.  A card is in a reader exactly as long as its connection lives.  The connection ends by reset or shutdown,
which work however many forked children hold a copy of the socket.

At a fork: the thread that serves the card stays in the parent.  The child's copies of the sockets are never used.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Optional

from ._errors import PcscStackError
from ._libc import abort_connection
from .cards import VirtualCard

_LOCALHOST = "127.0.0.1"
_LENGTH = struct.Struct(">H")
_RESPONSE_TIMEOUT = 0.1  # s, at most; one that takes longer is in the middle, and pcscd reads nothing
_QUICK_ACK = getattr(socket, "TCP_QUICKACK", None)


class PortPair:
    """Two consecutive TCP ports, as one vpcd device needs them.

    vpcd sets SO_REUSEADDR, so on Linux it can listen on ports that we have bound but don't listen on.  No other program
    gets these ports.
    """

    def __init__(self) -> None:
        for _ in range(200):
            self._sockets = [socket.socket(), socket.socket()]
            try:
                self._sockets[0].bind(("", 0))
                self.port: int = self._sockets[0].getsockname()[1]
                self._sockets[1].bind(("", self.port + 1))
            except (OSError, OverflowError):
                self.close()
                continue
            for held in self._sockets:
                # not before bind(), which would then be content with a port that others share, and vpcd would not
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return
        raise PcscStackError(
            "no two consecutive TCP ports are free", remedy="find out which programs use them: ss -tanp"
        )

    def close(self) -> None:
        """Release the ports."""
        for held in self._sockets:
            held.close()


class Slot:
    """One slot of the driver, and the card in it, if any.

    :param port: where vpcd listens for this slot.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.card: Optional[VirtualCard] = None
        self._socket: Optional[socket.socket] = None
        self._thread: Optional[threading.Thread] = None
        self._lock = threading.Lock()
        self._sending = threading.Lock()

    def plug(self) -> None:
        """Connect the card to vpcd, which must be listening; pcscd detects the card later."""
        card = self.card
        assert card is not None
        self._connect()
        name = f"pcsc_safe virtual card on port {self.port}"
        self._thread = threading.Thread(target=self._serve, args=(card,), name=name, daemon=True)
        self._thread.start()

    def unplug(self, timeout: float = 10.0) -> None:
        """End the connection and the thread that serves it.

        :param timeout: seconds to wait for the card's own code to return.
        :raises PcscStackError: it does not return.
        """
        self._disconnect()
        thread, self._thread = self._thread, None
        # a card may pull itself out
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)
        if thread.is_alive():
            problem = f"the code of {type(self.card).__name__} has not returned for {timeout:g} seconds"
            raise PcscStackError(problem, remedy="let apdu(), power_on(), power_off() and reset() return")

    def _connect(self) -> None:
        connection = socket.create_connection((_LOCALHOST, self.port))
        connection.settimeout(None)  # whatever socket.setdefaulttimeout() says: pcscd may ask nothing for long
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection

    def _disconnect(self) -> None:
        with self._lock:
            connection, self._socket = self._socket, None
            if connection is not None:
                self._abort(connection)

    def _abort(self, connection: socket.socket) -> None:
        # If a connection ends before an answer, vpcd takes this for an empty answer and reports success.  If it is
        # reset after the beginning of an answer, vpcd reports a failure, as when a card is pulled out during a command.
        if self._sending.acquire(timeout=_RESPONSE_TIMEOUT):  # so that this is not mixed with a real answer
            with contextlib.suppress(OSError):
                connection.send(_LENGTH.pack(2), socket.MSG_DONTWAIT)
            self._sending.release()
        if not abort_connection(connection):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        # Only the thread that reads from the connection may close it, because the number could be reused.

    def _reconnect(self, lost: socket.socket) -> bool:
        """After vpcd closed the connection: connect again, unless vpcd has ended, or the card was removed."""
        with self._lock:  # no thread is removing the card now
            lost.close()
            if self._socket is not lost:
                return False
            self._socket = None
            try:
                self._connect()
            except OSError:
                return False
        return True

    def _serve(self, card: VirtualCard) -> None:
        """Serve the reader until the connection ends for good."""
        connection = self._socket
        while connection is not None:
            self._converse(connection, card)
            card._lose_power()
            connection = self._socket if self._reconnect(connection) else None

    def _converse(self, connection: socket.socket, card: VirtualCard) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
                answer = card._respond(_read(connection, length))
                if answer is not None:
                    with self._sending:
                        if self._socket is not connection:
                            return  # the card was removed
                        connection.sendall(_LENGTH.pack(len(answer)) + answer)


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if _QUICK_ACK is not None:
            # vpcd 3.3 writes the length and the message separately, and the kernel delays the second until the first is
            # acknowledged.  Linux resets this option, so it is set again for each read.
            connection.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
