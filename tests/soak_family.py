"""A family of a soak test: its head, and all its descendants.  `soak` describes it, and starts it.

The settings are in its environment.  Its processes check every response and every error that they get.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from soak_report import Report, judge_end

import pcsc_safe
from pcsc_safe.errors import BrokerError, ForkedHandleError, ForkUnsafeError, HandoverError, PcscSafeError
from pcsc_safe.policy import Owner, Policy

try:
    from pcsc_safe import scard
except BrokerError:  # it was killed before it could report its descriptors
    os._exit(0)

PATIENCE = 60  # s; a process that runs longer has hung
GRACE = 30  # s; every thread that is asked to end does so within this time
MEMORY = 8 << 20  # bytes; the allocator may keep this much after the busiest moments
DELAY = 2  # times 10 ms; of a slow card
LOST_AFTER = 10  # consecutive failures, after which a process establishes a new context
NOTHING = -1  # instead of a code: there is no session

OK, RESET, SHARED, T1 = (
    scard.SCARD_S_SUCCESS,
    scard.SCARD_W_RESET_CARD,
    scard.SCARD_SHARE_SHARED,
    scard.SCARD_PROTOCOL_T1,
)
EXPECTED = {
    getattr(scard, f"SCARD_{name}")
    for name in (
        *("E_NO_SERVICE", "E_SERVICE_STOPPED", "F_COMM_ERROR", "E_INVALID_HANDLE"),
        "E_PROTO_MISMATCH",  # the card was replaced by another
        "W_SECURITY_VIOLATION",  # libpcsclite's code for ECONNRESET
        *(
            "E_NOT_TRANSACTED",
            "W_RESET_CARD",
            "W_REMOVED_CARD",
            "E_NO_SMARTCARD",
            "E_READER_UNAVAILABLE",
            "E_UNKNOWN_READER",
        ),
        *("E_NO_READERS_AVAILABLE", "E_CANCELLED", "W_UNPOWERED_CARD", "W_UNRESPONSIVE_CARD"),
    )
}
NAMES = {getattr(scard, name): name for name in dir(scard) if name.startswith(("SCARD_E_", "SCARD_F_", "SCARD_W_"))}


class Session(NamedTuple):
    """The PC/SC handles of a process."""

    context: Any
    cards: list[Any]
    generation: int


class Member:
    """One process of a family.

    :param report: for breaches.
    :param seed: of its random numbers.
    :param until: when it ends, on the monotonic clock.
    """

    def __init__(self, report: Report, seed: int, until: float) -> None:
        self.report = report
        self.random = random.Random(seed)
        self.until = until
        self.session: Optional[Session] = None
        self._users = 0
        self._changed = threading.Condition()
        self._count = 0

    @property
    def goes_on(self) -> bool:
        """Whether it has time left."""
        return time.monotonic() < self.until

    # libpcsclite 1.9.9 crashes if one thread connects while another makes a call on another context's card, also on raw
    # pyscard.  So a process has one context at a time, and no thread uses the old one while it is replaced.

    @contextlib.contextmanager
    def using(self) -> Iterator[Optional[Session]]:
        """The session; None if none can be opened."""
        with self._changed:
            session = self.session
            self._users += 1
        try:
            yield session
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def renew(self, generation: int) -> None:
        """Establish a new session, unless another thread has already done so."""
        with self._changed:
            while self._users:
                self._changed.wait(1)
            if self.session is None or self.session.generation == generation:
                self._replace(generation + 1)

    def _replace(self, generation: int) -> None:
        if self.session is not None:
            scard.SCardReleaseContext(self.session.context)
            self.session = None
        hresult, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
        if hresult != OK:
            self.judge("SCardEstablishContext", hresult)
            return
        hresult, readers = scard.SCardListReaders(context, [])
        cards = []
        for reader in self.random.sample(readers, min(2, len(readers))):
            for _ in range(2):
                hresult, card, _ = scard.SCardConnect(context, reader, SHARED, T1)
                self.judge("SCardConnect", hresult)
                if hresult == OK:
                    cards.append(card)
        if not cards:
            scard.SCardReleaseContext(context)
            time.sleep(0.05)
            return
        self.session = Session(context, cards, generation)
        self.report.figures["sessions"] += 1

    def judge(self, function: str, hresult: int) -> bool:
        """Whether a call succeeded; a failure has to be one of the expected ones."""
        self.report.figures["calls"] += 1
        if hresult != OK:
            self.report.figures[NAMES.get(hresult, hex(hresult))] += 1
            if hresult not in EXPECTED:
                self.report.breach("an unexpected code", function=function, code=NAMES.get(hresult, hex(hresult)))
        return hresult == OK

    def data(self) -> list[int]:
        """Data that no other process sends."""
        self._count += 1
        return [
            *os.getpid().to_bytes(4, "big"),
            *threading.get_ident().to_bytes(8, "big"),
            *self._count.to_bytes(4, "big"),
        ]

    def exchange(
        self,
        card: Any,
        ins: int = 0x01,
        p1: int = 0,
        data: Optional[list[int]] = None,
        came_between: Optional[list[dict[str, str]]] = None,
    ) -> int:
        """Make one exchange and check it; the caller checks interference at the end of its transaction."""
        sent = self.data() if data is None else data
        hresult, answer = scard.SCardTransmit(card, scard.SCARD_PCI_T1, [0x80, ins, p1, 0, len(sent), *sent])
        if self.judge("SCardTransmit", hresult):
            self.report.figures["exchanges"] += 1
            if not answer:
                # On raw pyscard, too: vpcd says so if the connection to its card ends during an exchange.
                self.report.figures["empty responses"] += 1
            elif answer != ([] if ins >= 0x50 else sent) + [0x90, 0x00]:
                found = {"sent": bytes(sent).hex(), "answer": bytes(answer).hex()}
                if answer == [0x69, 0x85] and came_between is not None:
                    came_between.append(found)
                else:
                    self.report.breach("another's answer", **found)
        elif answer != []:
            self.report.breach("an answer of a call that failed")
        return int(hresult)

    def reconnect(self, card: Any) -> int:
        """Reconnect after a reset."""
        hresult, _ = scard.SCardReconnect(card, SHARED, T1, scard.SCARD_LEAVE_CARD)
        self.judge("SCardReconnect", hresult)
        return int(hresult)

    # What its threads do repeatedly; each gets the number of its own card.

    def exchanges(self, number: int) -> int:
        """Exchange, sometimes with a slow card."""
        with self.using() as session:
            if session is None:
                return NOTHING
            card = session.cards[number % len(session.cards)]
            slow = self.random.random() < 0.05
            hresult = self.exchange(card, 0x02 if slow else 0x01, DELAY if slow else 0)
            return self.reconnect(card) if hresult == RESET else hresult

    def transacts(self, number: int) -> int:
        """Send two commands in a transaction."""
        with self.using() as session:
            if session is None:
                return NOTHING
            card = session.cards[number % len(session.cards)]
            hresult = scard.SCardBeginTransaction(card)
            if not self.judge("SCardBeginTransaction", hresult):
                return self.reconnect(card) if hresult == RESET else int(hresult)
            sent, came_between = self.data(), list[dict[str, str]]()
            if self.exchange(card, 0x50, data=sent) == OK:
                self.exchange(card, 0x51, data=sent, came_between=came_between)
            hresult = scard.SCardEndTransaction(card, scard.SCARD_LEAVE_CARD)
            # If a handover has taken the transaction away, another thread may have given this handle a new session.
            if hresult == OK and came_between:
                self.report.breach("somebody came between", **came_between[0])
            if hresult != scard.SCARD_E_SHARING_VIOLATION:  # another has one in the new session
                self.judge("SCardEndTransaction", hresult)
            self.report.figures["transactions"] += 1
            return OK

    def waits(self, number: int) -> int:
        """Wait for events, which may happen or not."""
        with self.using() as session:
            if session is None:
                return NOTHING
            hresult, readers = scard.SCardListReaders(session.context, [])
            if not self.judge("SCardListReaders", hresult):
                return int(hresult)
            states = [(reader, scard.SCARD_STATE_PRESENT) for reader in readers]
            hresult, _ = scard.SCardGetStatusChange(session.context, self.random.randrange(1, 200), states)
            self.judge("SCardGetStatusChange", OK if hresult == scard.SCARD_E_TIMEOUT else hresult)
            return OK if hresult == scard.SCARD_E_TIMEOUT else int(hresult)

    def run(self, step: Callable[[int], int], number: int) -> None:
        """Do one thing until the end; establish a new context if nothing works any more."""
        failures = 0
        while self.goes_on:
            generation = self.session.generation if self.session is not None else 0
            try:
                hresult = step(number)
                if hresult == NOTHING:
                    self.renew(generation)
            except PcscSafeError as error:
                self.caught(error)
                hresult = NOTHING
            except Exception as error:
                self.report.breach("an exception", error=f"{type(error).__name__}: {error}")
                return
            failures = failures + 1 if hresult != OK else 0
            if failures:
                time.sleep(0.01)
            if failures >= LOST_AFTER:
                failures = 0
                with contextlib.suppress(PcscSafeError):
                    self.renew(generation)

    def caught(self, error: PcscSafeError) -> None:
        """Record an error; it has to be one of the expected ones."""
        self.report.figures[type(error).__name__] += 1
        if not self._may_raise(error):
            self.report.breach("an unexpected error", error=str(error))

    def _may_raise(self, error: PcscSafeError) -> bool:
        policy = pcsc_safe.settings().policy
        if isinstance(error, ForkUnsafeError):
            return policy is Policy.REESTABLISH
        if isinstance(error, ForkedHandleError):
            return policy in (Policy.RAISE, Policy.SHARE)
        return isinstance(error, (BrokerError, HandoverError))

    def live(self, depth: int) -> None:
        """Threads that use PC/SC, and threads that fork, until the end."""
        jobs = [(self.exchanges, 0), (self.exchanges, 1), (self.waits, 0), (self.transacts, 2)]
        # A transaction that is handed over at a fork would stay open: the child doesn't have its thread.
        count = 2 if depth else 3 if pcsc_safe.settings().owner is Owner.CHILD else 4
        threads = [threading.Thread(target=self.run, args=job, daemon=True) for job in jobs[:count]]
        threads += [
            threading.Thread(target=self.forks, args=(depth,), daemon=True) for _ in range(2 if depth == 0 else 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0, self.until - time.monotonic()) + GRACE)
            if thread.is_alive():
                self.report.breach("a thread hangs")
                faulthandler.dump_traceback(_stacks[0], all_threads=True)
                return

    def forks(self, depth: int) -> None:
        """Fork, and wait for the child, repeatedly until the end."""
        if depth >= 2:
            return
        while self.goes_on:
            time.sleep(self.random.uniform(0, 0.1))
            seed, lives = self.random.randrange(1 << 30), min(self.random.expovariate(2), 3)
            inherited = self.session
            try:
                hands_over = depth == 0 and self.random.random() < 0.05 and inherited is not None
                with pcsc_safe.handover(inherited.context) if hands_over and inherited else contextlib.nullcontext():
                    pid = os.fork()
                    if pid == 0:
                        self._is_child(depth, seed, min(self.until, time.monotonic() + lives), inherited)
            except PcscSafeError as error:
                self.caught(error)
                continue
            self.report.figures["forks"] += 1
            _, status = os.waitpid(pid, 0)
            judge_end(self.report, os.waitstatus_to_exitcode(status), pid)

    def _is_child(self, depth: int, seed: int, until: float, inherited: Optional[Session]) -> None:
        status = 70
        try:
            signal.alarm(PATIENCE)
            self.report.figures.clear()
            child = Member(self.report, seed, until)
            if inherited is not None:
                child.use(inherited)
            child.live(depth + 1)
            status = child.ends(inherited)
        finally:
            os._exit(status)

    def use(self, inherited: Session) -> None:
        """Use what the parent had, as the policy permits; then sometimes keep it."""
        for card in inherited.cards:
            # The inherited session may have an open transaction, which no thread here would end.
            with contextlib.suppress(PcscSafeError):
                scard.SCardEndTransaction(card, scard.SCARD_LEAVE_CARD)
        for _ in range(3):
            for card in inherited.cards:
                try:
                    if self.exchange(card) == RESET and self.random.random() < 0.5:
                        self.reconnect(card)
                except PcscSafeError as error:
                    self.caught(error)
        if self.random.random() < 0.3 and pcsc_safe.settings().policy not in (Policy.RAISE, Policy.INVALID):
            self.session = inherited

    def ends(self, inherited: Optional[Session]) -> int:
        """End in one of the ways in which a process ends; return the exit status."""
        way = self.random.choice(("exit", "release", "finalizers", "SIGKILL"))
        if way == "release":
            self.close()
        if way == "finalizers":
            self.session = None
            gc.collect()
        if way == "finalizers":
            atexit._run_exitfuncs()
        self.report.close()
        if way == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def close(self) -> None:
        """Close the session."""
        session, self.session = self.session, None
        if session is not None:
            with contextlib.suppress(PcscSafeError):
                for card in session.cards:
                    self.judge("SCardDisconnect", scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD))
                self.judge("SCardReleaseContext", scard.SCardReleaseContext(session.context))


def be_watched(path: Path) -> None:
    """Make a process and all its descendants dump their stacks if they take too long or crash."""
    _stacks.append(path.open("a"))
    faulthandler.enable(_stacks[0])
    # Not dump_traceback_later: its thread holds a lock, which would stay locked in a grandchild.
    faulthandler.register(signal.SIGALRM, file=_stacks[0], all_threads=True, chain=True)


_stacks: list[Any] = []


def memory() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main(directory: str, seed: str, seconds: str) -> None:
    """The head of a family."""
    chosen = {name[10:].lower(): value for name, value in os.environ.items() if name.startswith("PCSC_SAFE_")}
    report = Report(directory, " ".join(f"{name}={value}" for name, value in chosen.items()))
    # Not to stderr: if another thread forks while one writes there, the child inherits the stream's lock, locked.
    logging.getLogger("pcsc_safe").addHandler(logging.NullHandler())
    logging.getLogger("pcsc_safe").propagate = False
    be_watched(Path(directory) / "stacks")
    member = Member(report, int(seed), time.monotonic() + float(seconds))
    with contextlib.suppress(PcscSafeError):
        member.renew(0)  # so that no thread forks during the first call's imports
    measured: list[int] = []
    timer = threading.Timer(float(seconds) / 3, lambda: measured.append(memory()))
    timer.daemon = True
    timer.start()
    member.live(0)
    member.close()
    gc.collect()
    if measured and memory() - measured[0] > MEMORY:
        report.breach("memory", bytes=memory() - measured[0])
    report.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
