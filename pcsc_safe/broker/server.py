"""The broker's side: lets clients in, each connection in a thread of its own, and sees when they have gone.

A client is gone when it has closed its first connection, or when its process has ended, whatever copies of its
descriptors live on; then its contexts are released, as pcscd would have done.  The last client gone, and the door
closed, the broker ends: at once, whatever its threads are doing.  Nothing here forks.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading

from .._core import descriptors, gateways, handles
from . import sharing, start
from .served import Client, Connection
from .sharing import Handle

__all__ = ["Server"]

_ONE_DESCRIPTOR = struct.calcsize("i")


class Server:
    """A broker.

    :param door: over which the connections come.
    """

    def __init__(self, door: socket.socket) -> None:
        self._door = door
        self._poll = select.poll()
        self._has_one_client = False
        self._connections: dict[int, Connection] = {}
        self._clients: dict[bytes, Client] = {}
        self._arriving = threading.Lock()
        descriptors.prepare()
        gateways.native.prepare()
        handles.hand_out(Handle, Handle)

    def run(self) -> None:
        """Serve until the door is closed."""
        self._poll.register(self._door, select.POLLIN)
        while True:
            for number, _ in self._poll.poll():
                if number != self._door.fileno():
                    self._hung_up(number)
                elif not self._let_in():
                    return

    def _let_in(self) -> bool:
        """A connection comes over the door; False if nobody is behind it any more."""
        try:
            data, control, _, _ = self._door.recvmsg(1, socket.CMSG_SPACE(_ONE_DESCRIPTOR))
        except OSError:
            return False
        if not data:
            return False
        self._has_one_client = data == start.FOR_ONE
        for level, kind, rights in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._serve(struct.unpack("i", rights[:_ONE_DESCRIPTOR])[0])
        return True  # where no descriptor came there was none left, and the client sees that nobody is there

    def _serve(self, number: int) -> None:
        try:
            ours = socket.socket(fileno=number)
        except OSError:
            os.close(number)
            return
        ours.settimeout(None)
        connection = Connection(self, ours)
        try:
            threading.Thread(target=connection.run, daemon=True).start()
        except RuntimeError:  # no more threads
            ours.close()
            return
        self._connections[number] = connection
        self._poll.register(number, 0)  # that is: only its end

    def welcome(self, key: bytes, connection: Connection) -> Client:
        """The client whose connection this is; in the connection's thread."""
        with self._arriving:
            client = self._clients.get(key)
            if client is None:
                client = self._clients[key] = Client(key, connection)
            else:
                client.connections.add(connection)
                # Not with the first one, which may have been made by the parent of the process that it is for.
                if not client.is_watched:
                    client.is_watched = True
                    self._watch(client, connection)
            return client

    def give(self, taker: Client, key: bytes, handles: tuple[int, ...], keeps: bool) -> list[int]:
        """Give contexts and cards of one client to another.

        :param key: of the one that has them.
        :param keeps: it has them as well then.
        :return: those that were given.
        """
        giver = self._clients.get(key)
        if giver is None or giver is taker:
            return []
        return [number for number in handles if sharing.share(giver, taker, number, keeps=keeps)]

    def _watch(self, client: Client, connection: Connection) -> None:
        """See when the client's process ends; it may have forked, with no hook run, and left copies of everything."""
        process = connection.process()
        if process is not None:
            try:
                threading.Thread(target=self._until_it_ends, args=(process, client), daemon=True).start()
            except RuntimeError:  # no more threads; its descriptors will tell
                os.close(process)

    def _until_it_ends(self, process: int, client: Client) -> None:
        watch = select.poll()
        watch.register(process, select.POLLIN)
        watch.poll()
        os.close(process)
        self._gone(client)

    def _hung_up(self, number: int) -> None:
        connection = self._connections.pop(number)
        self._poll.unregister(number)
        try:
            threading.Thread(target=self._clean_up, args=(connection,), daemon=True).start()
        except RuntimeError:  # no more threads
            self._clean_up(connection)

    def _clean_up(self, connection: Connection) -> None:
        connection.unwatched.set()
        connection.hang_up()
        client = connection.client
        if client is not None:
            client.connections.discard(connection)
            if client.presence is connection:
                self._gone(client)

    def _gone(self, client: Client) -> None:
        with self._arriving:
            known = self._clients.pop(client.key, None)
            if not self._clients and self._has_one_client:
                os._exit(0)
        if known is not None:
            client.presence.hang_up()
            client.release()
