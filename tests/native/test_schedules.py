"""Transactions of several processes: pcsc_safe blocks only where raw pyscard blocks.

Raw pyscard has a context for each thread; with pcsc_safe the threads of a process share one.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import schedules
from calling import Calling, connect, establish, until
from forking import fork, in_program, start, wait_for
from rawscard import raw
from schedules import BEHIND_A_TRANSACTION, EVERY_STEP, Step, connected, crossed, difference, in_one_process, sides

from pcsc_safe import scard as safe
from pcsc_safe.testing import EchoCard, VirtualPcsc
from pcsc_safe.testing._install import Missing, look

OK, TIMED_OUT = safe.SCARD_S_SUCCESS, safe.SCARD_E_TIMEOUT
LEAVE, SHARED, PRESENT = safe.SCARD_LEAVE_CARD, safe.SCARD_SHARE_SHARED, safe.SCARD_STATE_PRESENT
LANES = 4

pytestmark = pytest.mark.native


def differences(stack: VirtualPcsc, every: Iterable[list[Step]]) -> list[str]:
    """Return what :func:`schedules.difference` finds in the schedules; several run at a time."""
    left, found, forking = iter(every), list[str](), threading.Lock()
    names = [reader.name for reader in stack.readers]

    def lane(number: int) -> None:
        raw_readers, safe_readers = (tuple(names[at : at + 2]) for at in (4 * number, 4 * number + 2))
        while True:
            with forking:
                schedule = next(left, None)
                if schedule is None:
                    return
                both = sides(raw, safe, raw_readers, safe_readers)
                opened = both.__enter__()
            try:
                found.append(difference(opened, schedule))
            finally:
                both.__exit__(None, None, None)

    lanes = [Calling(lane, number, name=f"lane {number}") for number in range(LANES)]
    for each in lanes:
        each.join()
        each.answer()
    stack.wait_for_clients(0)
    return [one for one in found if one]


def walks(seed: int, how_many: int) -> Iterator[list[Step]]:
    """Yield random schedules; half of their steps are transactions."""
    chosen = random.Random(seed)
    weights = [3 if step.operation in ("Begin", "End") else 1 for step in EVERY_STEP]
    for _ in range(how_many):
        yield [*connected(), *chosen.choices(EVERY_STEP, weights, k=20)]


def sampled(every: Iterable[list[Step]], step: int) -> Iterator[list[Step]]:
    """Yield one of every ``step`` schedules, from a random start: many runs cover them all."""
    return itertools.islice(every, random.randrange(step), None, step)


def some(seed: int) -> list[list[Step]]:
    """Return crossing transactions of two processes, those of two threads of one process, and random schedules."""
    return [*sampled(crossed(), 9), *sampled(in_one_process(), 6), *walks(seed, 4)]


def crossing(seed: int) -> list[list[Step]]:
    """Each process has a card in a transaction that the other needs, for every call and every way to end one."""
    return [*crossed(), *in_one_process()]


def at_random(seed: int) -> list[list[Step]]:
    """Return schedules of twenty steps each."""
    return list(walks(seed, 300))


def try_all(what: str, seed: str) -> None:
    """Run the schedules; print the differences, and how many steps were blocked."""
    random.seed(int(seed))
    chosen = {"some": some, "crossing": crossing, "at_random": at_random}[what](int(seed))
    with VirtualPcsc(4 * LANES, [EchoCard() for _ in range(4 * LANES)]) as stack:
        found = differences(stack, chosen)
    print(json.dumps({"differences": found, "blocked": sum(map(bool, schedules.blocked_steps))}))


def tried(what: str, timeout: float) -> dict[str, Any]:
    """Call :func:`try_all` in a program: since pcsc-lite 2.5 a process can't return to fewer readers."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    seed = random.randrange(1 << 32)
    done = in_program(try_all, what, str(seed), timeout=timeout)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["differences"] == [], f"seed {seed}"
    return told


def test_some_transactions() -> None:
    """A sample of the schedules below has no differences."""
    assert tried("some", 120)["blocked"], "no step was blocked, so this run tested nothing"


@pytest.mark.long
@pytest.mark.parametrize("what", ["crossing", "at_random"])
def test_all_transactions(what: str) -> None:
    """All crossing transactions, and three hundred random schedules, have no differences."""
    tried(what, 1800)


# A call that waits for another process's transaction delays nobody but its caller.


def held_by_another_process(reader: str, release: int) -> Any:
    """Start a child that has a card in a transaction until it is released."""
    began, begins = os.pipe()

    def child() -> Any:
        card = connect(establish(), reader)
        begun = safe.SCardBeginTransaction(card)
        os.write(begins, b"x")
        os.read(release, 1)
        return begun, safe.SCardEndTransaction(card, LEAVE)

    process = start(child, fork=fork)
    assert os.read(began, 1) == b"x"
    os.close(began)
    os.close(begins)
    return process


def call_on(context: Any, card: Any, operation: str, reader: str) -> int:
    """Make a call that waits for the end of another process's transaction."""
    if operation == "Connect":
        return int(safe.SCardConnect(context, reader, SHARED, safe.SCARD_PROTOCOL_T1)[0])
    arguments: dict[str, tuple[Any, ...]] = {
        "Begin": (safe.SCardBeginTransaction,),
        "Transmit": (safe.SCardTransmit, safe.SCARD_PCI_T1, [0x80, 1, 0, 0, 1, 7]),
        "Status": (safe.SCardStatus,),
        "Reconnect": (safe.SCardReconnect, SHARED, safe.SCARD_PROTOCOL_T1, LEAVE),
        "Disconnect": (safe.SCardDisconnect, LEAVE),
    }
    function, *rest = arguments[operation]
    result = function(card, *rest)
    return int(result[0] if isinstance(result, (list, tuple)) else result)


@pytest.mark.pcsc(readers=4)
@pytest.mark.parametrize("operation", BEHIND_A_TRANSACTION)
def test_who_waits_for_another_process_holds_up_nobody(pcsc_stack: VirtualPcsc, operation: str) -> None:
    """Beside a blocked call, waits for events end on time, other cards respond, and the context can be released."""
    theirs, ours = pcsc_stack.readers[0].name, pcsc_stack.readers[2].name
    may_end, end = os.pipe()
    context = establish()
    card, other = connect(context, theirs), connect(context, ours)
    holder = held_by_another_process(theirs, may_end)
    blocked = Calling(call_on, context, card, operation, theirs)
    blocked.join(0.5)
    was_blocked = blocked.is_alive()
    timed = Calling(safe.SCardGetStatusChange, context, 50, [(theirs, PRESENT), (ours, PRESENT)])
    assert timed.answer()[0] == TIMED_OUT
    assert timed.seconds < 10  # the other process's transaction ends after this
    assert Calling(safe.SCardTransmit, other, safe.SCARD_PCI_T1, [0x80, 1, 0, 0, 1, 7]).answer()[0] == OK
    assert Calling(safe.SCardListReaders, context, []).answer()[0] == OK
    waiter = Calling(safe.SCardGetStatusChange, context, safe.INFINITE, [(ours, PRESENT)])
    until(lambda: waiter.waits, "it waits")
    released = Calling(safe.SCardReleaseContext, context)
    assert released.answer() == OK
    assert waiter.answer()[0] in (safe.SCARD_E_CANCELLED, safe.SCARD_E_INVALID_HANDLE)
    assert released.seconds < 10
    assert blocked.is_alive() == was_blocked
    os.write(end, b"x")
    assert wait_for(holder) == (OK, OK)
    blocked.answer()
    os.close(may_end)
    os.close(end)
    pcsc_stack.wait_for_clients(0)
