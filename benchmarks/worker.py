"""A process that measures itself on request: ``python worker.py VARIANT``, one command a line on stdin.

The benchmark keeps one for each variant and sends them commands in turns.  A command is a JSON list, the name of a
function of :class:`Worker` and its arguments; the answer is a JSON list of times in microseconds.

Every fork here is ended with ``os._exit`` and waited for.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import statistics
import struct
import sys
import threading
import time
import warnings
from typing import Any, Callable

VARIANTS = {
    "raw": ("smartcard.scard", (), {}),
    "raw, wrapt imported": ("smartcard.scard", ("wrapt", "logging", "socket"), {}),
    "safe": ("pcsc_safe.scard", (), {}),
    "guarded": ("pcsc_safe.scard", (), {"PCSC_SAFE_GUARD_NATIVE": "1"}),
    "broker": ("pcsc_safe.scard", (), {"PCSC_SAFE_BROKER": "always"}),
    "child's broker": ("pcsc_safe.scard", (), {"PCSC_SAFE_POLICY": "broker"}),
}
"""Which module it uses, what else it has imported (a process with more in it forks more slowly), and its settings."""

AT_ONCE = [0x80, 0x01, 0x00, 0x00, 0x03, 1, 2, 3]
IN_10_MS = [0x80, 0x02, 0x01, 0x00, 0x03, 1, 2, 3]
clock = time.perf_counter_ns


class Worker:
    """What can be measured.

    :param variant: one of VARIANTS.
    """

    def __init__(self, variant: str) -> None:
        module, more, settings = VARIANTS[variant]
        os.environ.update(settings)
        for name in more:
            importlib.import_module(name)
        self.scard: Any = importlib.import_module(module)
        self.inherits = module == "pcsc_safe.scard"
        self.contexts: list[Any] = []
        self.card: Any = None
        self.sockets: list[Any] = []

    def contexts_are(self, count: int) -> list[float]:
        """Hold so many contexts, idle."""
        while len(self.contexts) < count:
            self.contexts.append(self._establish())
        while len(self.contexts) > count:
            self.scard.SCardReleaseContext(self.contexts.pop())
        return []

    def sockets_are(self, count: int) -> list[float]:
        """Have so many sockets open, beside what is open anyway."""
        import resource  # here, or every variant would be bigger
        import socket

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        while len(self.sockets) < count:
            self.sockets += socket.socketpair()
        return []

    def first_establish(self) -> list[float]:
        """The first SCardEstablishContext of this process, with all that it loads; then the second one."""
        times = []
        for _ in range(2):
            start = clock()
            self.contexts.append(self._establish())
            times.append((clock() - start) / 1000)
        return times

    def exchange(self, count: int) -> list[float]:
        """The median of so many exchanges of 8 bytes, on one session."""
        scard = self.scard
        if self.card is None:
            self.contexts_are(1)
            reader = self._must(scard.SCardListReaders(self.contexts[0], []))[1][0]
            _, self.card, _ = self._must(
                scard.SCardConnect(self.contexts[0], reader, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1)
            )
        times = []
        for _ in range(count):
            start = clock()
            self._must(scard.SCardTransmit(self.card, scard.SCARD_PCI_T1, AT_ONCE))
            times.append((clock() - start) / 1000)
        return [statistics.median(times)]

    def prestart(self) -> list[float]:
        """Start a broker ahead, for the children."""
        importlib.import_module("pcsc_safe").prestart_broker()
        time.sleep(1)
        return []

    def fork(self) -> list[float]:
        """os.fork() as the parent sees it, and from there until a child that does nothing is reaped."""
        start = clock()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        forked = clock()
        os.waitpid(pid, 0)
        return [(forked - start) / 1000, (clock() - start) / 1000]

    def busy(self, what: str, count: int) -> list[float]:
        """Keep so many threads busy from now on, each on a context and a reader of its own: ``wait`` or ``exchange``.

        They wait for events that don't come, or exchange APDUs of 10 ms, one after the other.
        """
        self.contexts_are(count)
        _, readers = self._must(self.scard.SCardListReaders(self.contexts[0], []))
        begin = {"wait": self._wait, "exchange": self._exchange}[what]
        for context, reader in zip(self.contexts, readers):
            threading.Thread(target=begin, args=(context, reader), daemon=True).start()
        return []

    def fork_among_threads(self) -> list[float]:
        """os.fork() as the parent sees it, at any moment of what its other threads do."""
        time.sleep(random.uniform(0.005, 0.02))
        return self.fork()[:1]

    def _wait(self, context: Any, reader: str) -> None:
        scard = self.scard
        _, states = self._must(scard.SCardGetStatusChange(context, 0, [(reader, scard.SCARD_STATE_UNAWARE)]))
        self._must(scard.SCardGetStatusChange(context, scard.INFINITE, [(name, state) for name, state, _ in states]))

    def _exchange(self, context: Any, reader: str) -> None:
        scard = self.scard
        _, card, _ = self._must(scard.SCardConnect(context, reader, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1))
        while True:
            self._must(scard.SCardTransmit(card, scard.SCARD_PCI_T1, IN_10_MS))

    def first_use_in_child(self) -> list[float]:
        """A forked child's first answer from a context of its own; the second, for comparison.

        With pcsc_safe that is any call on the context it inherited; on raw pyscard it has to establish one first.
        """

        def ask() -> None:
            context = self.contexts[0] if self.inherits else self._establish()
            self._must(self.scard.SCardListReaders(context, []))

        return self._in_child(ask)

    def _in_child(self, ask: Callable[[], None]) -> list[float]:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                start = clock()
                ask()
                os.write(write_end, struct.pack("d", (clock() - start) / 1000))
            finally:
                os._exit(0)
        os.close(write_end)
        data = os.read(read_end, 8)
        os.close(read_end)
        os.waitpid(pid, 0)
        return list(struct.unpack("d", data))

    def _establish(self) -> Any:
        return self._must(self.scard.SCardEstablishContext(self.scard.SCARD_SCOPE_SYSTEM))[1]

    def _must(self, result: Any) -> Any:
        if result[0] != self.scard.SCARD_S_SUCCESS:
            raise RuntimeError(self.scard.SCardGetErrorMessage(result[0]))
        return result


def main() -> None:
    """Obey until stdin ends."""
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
