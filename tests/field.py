"""Programs of other frameworks, like those in their documentation: the parent opens a card, and forked workers use it.

Run as ``python -m pcsc_safe run tests/field.py HOST WORKERS PARENT DIRECTORY``; it prints how many responses were
right, and what the others were.  The programs contain no code for forks, resets or pcsc_safe.
"""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TASKS = 20
_ECHO = [0x80, 0x01, 0x00, 0x00, 0x02]
connection: Any = None


def open_card() -> None:
    """What the parent does first, with pyscard's defaults."""
    global connection
    from smartcard.System import readers

    connection = readers()[0].createConnection()
    connection.connect()
    exchange(0)


def exchange(number: int) -> str:
    """One task: 'right', or what went wrong."""
    data = [number >> 8, number & 255]
    try:
        answer, *status = connection.transmit([*_ECHO, *data])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right" if (answer, status) == (data, [0x90, 0x00]) else "another's answer"


def by_executor(workers: int, directory: Path) -> Iterable[str]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(exchange, range(TASKS)))


def by_pebble(workers: int, directory: Path) -> Iterable[str]:
    import multiprocessing

    from pebble import ProcessPool

    with ProcessPool(workers, context=multiprocessing.get_context("fork")) as pool:
        return [pool.schedule(exchange, args=[number]).result() for number in range(TASKS)]


def by_billiard(workers: int, directory: Path) -> Iterable[str]:
    import billiard

    with billiard.Pool(workers) as pool:
        return list(pool.map(exchange, range(TASKS)))


def by_pty(workers: int, directory: Path) -> Iterable[str]:
    import pty

    told = []
    for number in range(TASKS):
        pid, terminal = pty.fork()
        if pid == 0:
            os.write(1, exchange(number).encode() + b"\n")
            os._exit(0)
        told.append(os.read(terminal, 1000).decode().strip())
        os.waitpid(pid, 0)
        os.close(terminal)
    return told


def by_forking_server(workers: int, directory: Path) -> Iterable[str]:
    import socket
    import socketserver

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(exchange(int(self.rfile.readline())).encode())

    def ask(number: int) -> str:
        with socket.create_connection(server.server_address) as client:
            client.sendall(b"%d\n" % number)
            return client.makefile().read()

    with socketserver.ForkingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with ThreadPoolExecutor(workers) as clients:
            told = list(clients.map(ask, range(TASKS)))
        server.shutdown()
    return told


def by_huey(workers: int, directory: Path) -> Iterable[str]:
    from huey import SqliteHuey

    huey = SqliteHuey(filename=str(directory / "huey.db"))
    task = huey.task()(exchange)
    results = [task(number) for number in range(TASKS)]
    consumer = huey.create_consumer(workers=workers, worker_type="process", periodic=False)
    consumer.start()
    try:
        return [result.get(blocking=True, timeout=60) for result in results]
    finally:
        consumer.stop(graceful=True)


def by_rq(workers: int, directory: Path) -> Iterable[str]:
    import redis
    import rq

    path = directory / "redis"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", ""],
        stdout=subprocess.DEVNULL,
        cwd=directory,
    )
    try:
        while not path.exists():
            time.sleep(0.01)
        client = redis.Redis(unix_socket_path=str(path))
        queue = rq.Queue(connection=client)
        jobs = [queue.enqueue("__main__.exchange", number) for number in range(TASKS)]
        rq.Worker([queue], connection=client).work(burst=True, logging_level="ERROR")
        return [job.return_value() or str(job.get_status()) for job in jobs]
    finally:
        server.kill()
        server.wait()


HOSTS: dict[str, Callable[[int, Path], Iterable[str]]] = {
    "concurrent.futures": by_executor,
    "pebble": by_pebble,
    "billiard": by_billiard,
    "pty": by_pty,
    "ForkingTCPServer": by_forking_server,
    "huey": by_huey,
    "rq": by_rq,
}


def main(host: str, workers: str, parent: str, directory: str) -> None:
    """Open the card, have the tasks done, and print the result."""
    open_card()
    over = threading.Event()

    def work() -> None:
        for number in range(1000, 60000):
            if over.is_set():
                break
            told["parent: " + exchange(number)] += 1
            time.sleep(0.001)

    told: collections.Counter[str] = collections.Counter()
    busy = threading.Thread(target=work)
    if parent == "busy":
        busy.start()
    answers = collections.Counter(HOSTS[host](int(workers), Path(directory)))
    over.set()
    if parent == "busy":
        busy.join()
    told["parent: " + exchange(1)] += 1
    print(dict(answers), sorted(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
