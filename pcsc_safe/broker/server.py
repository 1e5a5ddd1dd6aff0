"""The broker's side: accepts clients, serves each connection in a thread, and detects when a client has ended.

A client has ended when it has closed its first connection, or when its process has ended, even if copies of its file
descriptors live on.  Then the broker releases its contexts, as pcscd would have done.  The broker ends when no process
has the other end of the door any more.  A broker for one process also ends when that process has ended, even if copies
of the door live on.  It ends immediately, whatever its threads are doing.

The main thread waits for the ends of connections and of processes (:mod:`watch`).  A separate thread does what follows,
because it may take long.  Nothing here forks.
"""

from __future__ import annotations

import _socket  # as in __main__
import contextlib
import errno
import os
import struct
import sys
import threading
from _thread import start_new_thread  # threading's own waits until the thread runs, which costs a client as long

from .._core import descriptors, gateways, handles
from . import sharing, start, watch
from .served import Client, Connection, run_in_thread
from .sharing import Handle

assert sys.platform != "win32"  # it has no broker

__all__ = ["Server"]

_ONE_DESCRIPTOR = struct.calcsize("i")
_NO_ROOM = (errno.EMFILE, errno.EMSGSIZE)  # macOS' kernel doesn't deliver then


class Server:
    """A broker.

    :param door: the socket over which connections are passed.
    """

    def __init__(self, door: _socket.socket) -> None:
        self._door = door
        self._watch = watch.Watch()
        self._spare = os.dup(door.fileno())
        self._has_one_client = False
        self._connections: dict[int, Connection] = {}
        self._clients: dict[bytes, Client] = {}
        self._processes: dict[int, list[Client]] = {}  # by PID
        self._clients_lock = threading.Lock()
        descriptors.prepare()
        gateways.native.prepare()
        handles.set_proxies(Handle, Handle)

    def run(self) -> None:
        """Serve until the door is closed."""
        self._watch.on_input(self._door.fileno())
        while True:
            for ready in self._watch.wait():
                if ready == self._door.fileno():
                    if not self._accept():
                        return
                elif ready < 0:
                    self._remove_process(-ready)
                else:
                    run_in_thread(self._clean_up, self._connections.pop(ready))

    def _accept(self) -> bool:
        """Accept a connection from the door; False if no process has the other end of the door any more."""
        spare, self._spare = self._spare, -1
        if spare >= 0:
            os.close(
                spare
            )  # so that a descriptor is free for the new connection; otherwise the kernel would drop it silently
        try:
            data, control, _, _ = self._door.recvmsg(1, _socket.CMSG_SPACE(_ONE_DESCRIPTOR))
        except OSError as error:
            return error.errno in _NO_ROOM
        if not data:
            return False
        self._has_one_client = data == start.FOR_ONE
        number = next((struct.unpack("i", rights[:_ONE_DESCRIPTOR])[0] for _, _, rights in control), -1)
        try:
            self._spare = os.dup(self._door.fileno())
        except OSError:  # no descriptor is free: this connection, if it could be received at all, is not served
            self._spare, number = number, -1
            if self._spare >= 0:
                _hang_up(self._spare)
        if number >= 0:
            self._serve(number)
        return True

    def _serve(self, number: int) -> None:
        try:
            ours = _socket.socket(fileno=number)
        except OSError:  # it is not a socket
            os.close(number)
            return
        ours.settimeout(None)
        connection = Connection(self, ours)
        self._connections[number] = connection
        try:
            start_new_thread(connection.run, ())
        except RuntimeError:  # no more threads
            del self._connections[number]
            _hang_up(number)
            ours.close()
            return
        self._watch.on_end(number)

    def welcome(self, key: bytes, connection: Connection) -> Client:
        """The client that this connection belongs to; called in the connection's thread."""
        is_alive = True
        with self._clients_lock:
            client = self._clients.get(key)
            if client is None:
                client = self._clients[key] = Client(key, connection)
            else:
                client.connections.add(connection)
                # Not with the first one, which may have been made by the parent of the process that it is for.
                if not client.is_watched:
                    client.is_watched = True
                    is_alive = self._watch_process(client, connection)
            connection.client = client
        if not is_alive:
            self._remove_client(client)
        if connection.unwatched.is_set():  # it ended before it had a client
            self._clean_up(connection)
        return client

    def give(self, taker: Client, key: bytes, handles: tuple[int, ...], keeps: bool) -> list[int]:
        """Give contexts and cards of one client to another.

        :param key: of the client that has them.
        :param keeps: whether that client keeps them, too.
        :return: those that were given.
        """
        giver = self._clients.get(key)
        if giver is None or giver is taker:
            return []
        return [number for number in handles if sharing.share(giver, taker, number, keeps=keeps)]

    def take_back(self, giver: Client, key: bytes, handles: tuple[int, ...]) -> None:
        """End a client that no process has become, and give back to another client what it gave.

        The request by which it gave this may still arrive, on a connection of its own, and then does nothing.

        :param giver: the client that gets it.
        :param key: of the client that ends.
        :param handles: what the giver did not keep.
        """
        taker = self._clients.get(key)
        if taker is not None and taker is not giver:
            sharing.end(taker)
            for number in handles:
                sharing.share(taker, giver, number, keeps=False)

    def _watch_process(self, client: Client, connection: Connection) -> bool:
        """Watch for the end of the client's process; a child of a fork without hooks may have its descriptors.

        Called with the lock, so :meth:`_remove_process` can't miss the client.

        :return: False if the process has already ended.
        """
        client.process = watch.peer_pid(connection.socket)
        if not client.process:
            return True
        self._processes.setdefault(client.process, []).append(client)
        return self._watch.on_exit(client.process)

    def _remove_process(self, pid: int) -> None:
        with self._clients_lock:
            clients = self._processes.pop(pid, [])
        for client in clients:
            run_in_thread(self._remove_client, client)

    def _clean_up(self, connection: Connection) -> None:
        connection.unwatched.set()
        connection.hang_up()
        client = connection.client
        if client is not None:
            client.connections.discard(connection)
            if client.presence is connection:
                self._remove_client(client)

    def _remove_client(self, client: Client) -> None:
        with self._clients_lock:
            known = self._clients.pop(client.key, None)
            if client in self._processes.get(client.process, []):
                self._processes[client.process].remove(client)
            # A client that has made no call isn't watched: the door is closed when its process ends.
            if not self._clients and self._has_one_client and client.is_watched:
                os._exit(0)
        if known is not None:
            client.presence.hang_up()
            client.release()


def _hang_up(number: int) -> None:
    """Shut a connection down; closing it would not reach the other end while another process has a copy."""
    with contextlib.suppress(OSError):
        temporary = _socket.socket(fileno=number)
        try:
            temporary.shutdown(_socket.SHUT_RDWR)
        finally:
            temporary.detach()
