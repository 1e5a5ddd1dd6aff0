"""A soak test: everything at the same time, for a given time, with every result checked.

::

    python tests/soak.py --seconds 600 --seed 7

A director runs families of processes on one virtual stack.  Their threads exchange APDUs, hold transactions, wait for
events and fork, with every policy, natively and through brokers; children and grandchildren use inherited and new
handles.  The director kills random processes by SIGKILL (parents, children, brokers, pcscd), and removes and inserts
cards.

These guarantees must hold, and each breach is reported:

- a response is to the command that the same process sent, or there is none, and a code that gives the reason;
- no other process uses the card during a transaction;
- no call hangs, and no process dies unless the director kills it;
- at the end no process, connection to pcscd, descriptor or memory is left.

The same seed gives the same director and the same families; the scheduling is up to the kernel.  Figures and breaches
are printed as JSON; the exit status is 1 if there is a breach.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from soak_report import Report, judge_end, lines

from pcsc_safe.testing import EchoCard, PcscStackError, VirtualPcsc

PR_SET_CHILD_SUBREAPER = 36
READERS = 4
FAMILIES = 5
GRACE = 40  # s; every process that is asked to end does so within this time
SETTINGS: list[dict[str, str]] = [
    {"policy": "auto"},
    {"policy": "auto", "cards": "reconnect"},
    {"policy": "reestablish", "quiesce_timeout": "5"},
    {"policy": "auto", "quiesce_timeout": "0"},
    {"policy": "broker"},
    {"policy": "broker", "cards": "reconnect"},
    {"policy": "raise"},
    {"policy": "invalid"},
    {"policy": "auto", "owner": "child"},
    {"policy": "auto", "broker": "always"},
    {"policy": "auto", "broker": "always", "owner": "child"},
    {"policy": "share", "broker": "always"},
    {"policy": "share", "broker": "always", "cards": "reconnect"},
    {"policy": "auto", "recover": "1"},
    {"policy": "auto", "cards": "reconnect", "recover": "1"},
    {"policy": "broker", "recover": "1"},
    {"policy": "auto", "owner": "child", "recover": "1"},
    {"policy": "share", "broker": "always", "recover": "1"},
]


class SoakCard(EchoCard):
    """An EchoCard that detects interference: after INS 50, INS 51 with other data returns 6985."""

    opened_by = b""

    def apdu(self, command: bytes) -> bytes:
        """Answer one command."""
        if command[1] not in (0x50, 0x51):
            return super().apdu(command)
        if command[1] == 0x50:
            self.opened_by = command[5:]
        return b"\x90\x00" if self.opened_by == command[5:] else b"\x69\x85"


# The director.


class Process(NamedTuple):
    """A descendant of the director."""

    pid: int
    parent: int
    state: str


def descendants() -> list[Process]:
    """All descendants of this process, including zombies."""
    found: dict[int, Process] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
            found[int(directory.name)] = Process(int(directory.name), int(parent), state)
    below, mine = {os.getpid()}, list[Process]()
    while more := [each for each in found.values() if each.parent in below and each.pid not in below]:
        mine += more
        below.update(each.pid for each in more)
    return mine


class Director:
    """Starts families, and disturbs them.

    :param seconds: the duration.
    :param seed: for what is done, and when.
    :param directory: for the reports.
    :param stack: the virtual stack.
    """

    def __init__(self, seconds: float, seed: int, directory: str, stack: VirtualPcsc) -> None:
        self.report = Report(directory)
        self._directory = directory
        self._stack = stack
        self._random = random.Random(seed)
        self._until = time.monotonic() + seconds
        self._spared = {each.pid for each in descendants()}
        self._families: list[subprocess.Popen[bytes]] = []
        self._settings = list(SETTINGS)
        self._random.shuffle(self._settings)
        self._started = 0
        self._pulled: list[Any] = []

    def run(self) -> None:
        """Run the whole test; return when all processes have ended."""
        elder = self._start(self._until - time.monotonic())
        self._spared.add(elder.pid)
        while time.monotonic() < self._until:
            self._families = [each for each in self._families if not self._has_ended(each)]
            while len(self._families) < FAMILIES:
                self._start(min(self._random.uniform(1, 8), self._until - time.monotonic()))
            for action, weight in ((self._kill, 0.5), (self._pull, 0.2), (self._put_back, 0.3), (self._restart, 0.02)):
                if self._random.random() < weight:
                    action()
            time.sleep(self._random.uniform(0, 0.2))
        while self._pulled:
            self._put_back()
        self._end()

    def _start(self, seconds: float) -> subprocess.Popen[bytes]:
        settings = self._settings[self._started % len(self._settings)]
        self._started += 1
        self.report.figures["families"] += 1
        program = [str(Path(__file__).with_name("soak_family.py")), self._directory]
        chosen = {f"PCSC_SAFE_{name.upper()}": value for name, value in settings.items()}
        with (Path(self._directory) / "stderr").open("ab") as errors:
            started = subprocess.Popen(
                [sys.executable, "-W", "ignore", *program, str(self._random.randrange(1 << 30)), str(seconds)],
                env={**self._stack.env, **chosen},
                stdin=subprocess.DEVNULL,
                stderr=errors,
            )
        self._families.append(started)
        return started

    def _has_ended(self, started: subprocess.Popen[bytes]) -> bool:
        status = started.poll()
        if status is not None:
            judge_end(self.report, status, started.pid)
        return status is not None

    def _kill(self) -> None:
        candidates = [each.pid for each in descendants() if each.pid not in self._spared and each.state != "Z"]
        if candidates:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(sorted(candidates)), signal.SIGKILL)
                self.report.figures["kills"] += 1

    def _pull(self) -> None:
        readers = [reader for reader in self._stack.readers[1:] if reader.card is not None]
        if len(readers) > 1:
            reader = self._random.choice(readers)
            self._pulled.append((reader, reader.remove()))
            self.report.figures["cards pulled"] += 1

    def _put_back(self) -> None:
        if self._pulled:
            reader, card = self._pulled.pop(0)
            reader.insert(card)

    def _restart(self) -> None:
        self._spared -= {self._stack.pid}
        self._stack.kill()
        time.sleep(self._random.uniform(0, 0.3))
        before = {each.pid for each in descendants()}
        self._stack.start()
        self._spared |= {self._stack.pid}
        self._spared |= {each.pid for each in descendants() if each.parent == os.getpid()} - before - self._pids()
        self.report.figures["pcscd killed"] += 1

    def _pids(self) -> set[int]:
        return {each.pid for each in self._families}

    def _end(self) -> None:
        deadline = time.monotonic() + GRACE
        for started in self._families:
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(max(0.1, deadline - time.monotonic()))
            if not self._has_ended(started):
                self.report.breach("a family goes on")
                started.send_signal(signal.SIGABRT)
        while left := self._left():
            if time.monotonic() > deadline:
                self.report.breach("processes are left", processes=[self._described(pid) for pid in left])
                for pid in left:
                    os.kill(pid, signal.SIGABRT)
                time.sleep(1)
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.02)

    def _left(self) -> list[int]:
        """The processes that are left; orphans become children of the director, which reaps them."""
        kept = {self._stack.pid, *self._spared}
        left = []
        for each in descendants():
            if each.pid in kept and each.pid not in self._pids():
                continue
            if each.state == "Z" and each.parent == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    pid, status = os.waitpid(each.pid, os.WNOHANG)
                    if pid:
                        judge_end(self.report, os.waitstatus_to_exitcode(status), pid)
            else:
                left.append(each.pid)
        return left

    @staticmethod
    def _described(pid: int) -> str:
        with contextlib.suppress(OSError):
            return f"{pid}: " + Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        return str(pid)


def where_threads_sleep(pid: int) -> str:
    """For each thread of a process: its system call, and the functions of the kernel that it is in."""
    found = []
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*")):
        for name in ("syscall", "wchan", "stack"):
            with contextlib.suppress(OSError):
                found.append(f"{thread.name} {name}: {(thread / name).read_text().strip()}")
    return "\n".join(found)


def direct(seconds: float, seed: int, directory: str) -> dict[str, Any]:
    """Run a soak test.

    :return: the figures and the breaches.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with VirtualPcsc(READERS, [SoakCard() for _ in range(READERS)], activate=False) as stack:
        descriptors = len(os.listdir("/proc/self/fd"))
        director = Director(seconds, seed, directory, stack)
        began = time.monotonic()
        try:
            director.run()
        except PcscStackError:
            faulthandler.dump_traceback()  # the threads of the cards are in this process
            print(
                where_threads_sleep(stack.pid), Path("/proc/self/net/tcp").read_text(), stack.readers, file=sys.stderr
            )
            raise
        try:
            stack.wait_for_clients(0)
        except TimeoutError as error:
            director.report.breach("connections to pcscd are left", error=str(error))
        if len(os.listdir("/proc/self/fd")) > descriptors + 1 + FAMILIES:
            director.report.breach("descriptors are left in the director")
        (Path(directory) / "pcscd.log").write_text(stack.log)
        director.report.figures["seconds"] = round(time.monotonic() - began)
        director.report.close()
    figures: Counter[str] = Counter()
    for line in lines(directory, "figures"):
        figures.update(line)
    breaches = Counter(json.dumps({**line, "pid": 0}) for line in lines(directory, "breaches"))
    stacks = (Path(directory) / "stacks").read_text(errors="replace")
    return {
        "seed": seed,
        "figures": dict(sorted(figures.items())),
        "breaches": [{**json.loads(line), "times": times} for line, times in breaches.most_common(100)],
        "stacks": stacks[-20000:],
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Everything at once, for as long as it is told.")
    parser.add_argument("--seconds", type=float, default=60, help="how long (60)")
    parser.add_argument("--seed", type=int, default=None, help="of what is done, and when; a new one if not given")
    parser.add_argument("--keep", metavar="DIRECTORY", help="keep reports and error output in this new directory")
    options = parser.parse_args()
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    with contextlib.ExitStack() as undo:
        directory = options.keep or undo.enter_context(tempfile.TemporaryDirectory())
        os.makedirs(directory, exist_ok=True)
        (Path(directory) / "stacks").touch()
        result = direct(options.seconds, seed, directory)
    print(json.dumps(result, indent=2))
    return 1 if result["breaches"] or result["stacks"] else 0


if __name__ == "__main__":
    sys.exit(main())
