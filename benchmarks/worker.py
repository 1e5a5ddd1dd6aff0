"""A process that measures itself on request: ``python worker.py VARIANT``, one command a line on stdin.

The benchmark has one such process for each variant, and sends them commands in turns.  A command is a JSON list with
the name of a function of :class:`Worker` and its arguments.  The answer is a JSON list of times in microseconds.

Every forked child ends with ``os._exit``, and this process waits for it.
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
    "raw, wrapt imported": ("smartcard.scard", ("wrapt",), {}),
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
        self.files: list[int] = []

    def contexts_are(self, count: int) -> list[float]:
        """Have ``count`` idle contexts."""
        while len(self.contexts) < count:
            self.contexts.append(self._establish())
        while len(self.contexts) > count:
            self.scard.SCardReleaseContext(self.contexts.pop())
        return []

    def sockets_are(self, count: int) -> list[float]:
        """Have ``count`` more sockets open."""
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

    def files_are(self, count: int) -> list[float]:
        """Have ``count`` more files open."""
        import resource  # as in sockets_are

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        while len(self.files) < count:
            self.files.append(os.open(os.devnull, os.O_RDONLY))
        return []

    def exchange(self, count: int) -> list[float]:
        """The median time of ``count`` exchanges of 8 bytes, on one session."""
        if self.card is None:
            self.contexts_are(1)
            self.card = self._connect(self.contexts[0], 0)
        return self._median(count, self._transmit, self.card)

    def establish_and_release(self, count: int) -> list[float]:
        """The median time to establish and release a context, of ``count`` contexts."""
        return self._median(count, lambda: self.scard.SCardReleaseContext(self._establish()))

    def connect_and_disconnect(self, count: int) -> list[float]:
        """The median time to connect to the last reader and disconnect, of ``count`` connections."""
        self.contexts_are(1)
        disconnect, leave = self.scard.SCardDisconnect, self.scard.SCARD_LEAVE_CARD
        return self._median(count, lambda: disconnect(self._connect(self.contexts[0], -1), leave))

    def look_at_all(self, count: int) -> list[float]:
        """The median time of ``count`` calls that return the states of all readers."""
        self.contexts_are(1)
        scard, context = self.scard, self.contexts[0]
        states = [(name, scard.SCARD_STATE_UNAWARE) for name in self._readers(context)]
        return self._median(count, lambda: self._must(scard.SCardGetStatusChange(context, 0, states)))

    def _median(self, count: int, call: Callable[..., Any], *arguments: Any) -> list[float]:
        times = []
        for _ in range(count):
            start = clock()
            call(*arguments)
            times.append((clock() - start) / 1000)
        return [statistics.median(times)]

    def _transmit(self, card: Any) -> None:
        self._must(self.scard.SCardTransmit(card, self.scard.SCARD_PCI_T1, AT_ONCE))

    def _readers(self, context: Any) -> list[str]:
        readers: list[str] = self._must(self.scard.SCardListReaders(context, []))[1]
        return readers

    def _connect(self, context: Any, number: int) -> Any:
        """A connection to the card in a reader, by its number."""
        scard, readers = self.scard, self._readers(context)
        reader = readers[number % len(readers)]
        return self._must(scard.SCardConnect(context, reader, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T1))[1]

    def private_memory(self) -> list[float]:
        """The private memory of a forked worker in kB, after an exchange with the inherited card, or with its own."""

        def ask() -> float:
            self._transmit(self.card if self.inherits else self._connect(self._establish(), 0))
            with open("/proc/self/smaps_rollup") as rollup:
                return float(sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")))

        return self._in_child(ask)

    def workers(self, count: int) -> list[float]:
        """The time until each of ``count`` forked workers has had an exchange with its card, divided by ``count``."""
        self.contexts_are(1)
        read_end, write_end = os.pipe()
        goes_on, is_over = os.pipe()
        start, pids = clock(), []
        for number in range(count):
            pids.append(os.fork())
            if pids[-1] == 0:
                try:
                    os.close(is_over)
                    self._transmit(self._connect(self.contexts[0] if self.inherits else self._establish(), number))
                    os.write(write_end, b"1")
                    os.read(goes_on, 1)  # all are there at the same time
                finally:
                    os._exit(0)
        os.close(write_end)
        answers = sum(len(os.read(read_end, 1)) for _ in range(count))
        taken = (clock() - start) / 1000 / count
        for end in (read_end, goes_on, is_over):
            os.close(end)
        for pid in pids:
            os.waitpid(pid, 0)
        if answers != count:
            raise RuntimeError(f"{count - answers} of {count} workers failed")
        return [taken]

    def prestart(self) -> list[float]:
        """Start a broker for the children before they are forked."""
        importlib.import_module("pcsc_safe").prestart_broker()
        time.sleep(1)
        return []

    def fork(self) -> list[float]:
        """The time of os.fork() in the parent, and the time until a child that does nothing is reaped."""
        start = clock()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        forked = clock()
        os.waitpid(pid, 0)
        return [(forked - start) / 1000, (clock() - start) / 1000]

    def busy(self, what: str, count: int) -> list[float]:
        """Keep ``count`` threads busy from now on, each on its own context and reader: ``wait`` or ``exchange``.

        They wait for events that don't come, or exchange APDUs of 10 ms, one after the other.
        """
        self.contexts_are(count)
        _, readers = self._must(self.scard.SCardListReaders(self.contexts[0], []))
        begin = {"wait": self._wait, "exchange": self._exchange}[what]
        for context, reader in zip(self.contexts, readers):
            threading.Thread(target=begin, args=(context, reader), daemon=True).start()
        return []

    def fork_among_threads(self) -> list[float]:
        """The time of os.fork() in the parent, at a random moment of the other threads' calls."""
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
        """The time of a forked child's first call on its own context, and of the second, for comparison.

        On pcsc_safe the first call uses the inherited context.  On raw pyscard the child first establishes a context.
        """

        def ask() -> float:
            start = clock()
            context = self.contexts[0] if self.inherits else self._establish()
            self._must(self.scard.SCardListReaders(context, []))
            return (clock() - start) / 1000

        return self._in_child(ask)

    def _in_child(self, ask: Callable[[], float]) -> list[float]:
        """The output of a forked child."""
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(write_end, struct.pack("d", ask()))
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
    """Execute commands until stdin ends."""
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
