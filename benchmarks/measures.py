"""The measures: one function for each, with separate virtual PC/SC stacks and processes.

A function yields its figures.  It measures the things that it compares in turns, in an order that changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import by_number
from figures import Figure, figure
from processes import AGAINST, HERE, RAW, SAFE, WRAPT, Process, SlowCard, by_turns, environment, stack

__all__ = ["FAST", "MEASURES", "OPEN_FILES", "OTHER_WRAPT", "THOROUGH", "Effort"]

OPEN_FILES = 200
BY_HAND, SPAWN = "check by hand", "spawn"
OTHER_WRAPT = "OTHER_WRAPT"
"""The environment variable with the directory of another wrapt, with which a program is also measured."""


class Effort(NamedTuple):
    """The number of rounds of each measure."""

    calls: int
    imports: int
    processes: int
    forks: int
    children: int
    held_up: int
    phases: int
    crowds: int
    pools: int
    numbers: int


THOROUGH = Effort(
    calls=1500,
    imports=60,
    processes=20,
    forks=400,
    children=150,
    held_up=60,
    phases=100,
    crowds=3,
    pools=40,
    numbers=30,
)
FAST = Effort(calls=40, imports=2, processes=2, forks=5, children=5, held_up=2, phases=4, crowds=1, pools=2, numbers=2)


def calls(effort: Effort) -> Iterator[Figure]:
    """How much longer a call takes in a process that never forks."""
    more = {"SCardIsValidContext": 0.6, "SCardTransmit, 8 bytes": 2.5}
    ratio = {"SCardEstablishContext + Release": 1.5}
    with contextlib.ExitStack() as undo:
        command = [sys.executable, str(HERE / "calls.py"), str(effort.calls), str(OPEN_FILES)]
        output = subprocess.run(command, env=stack(undo), check=True, stdout=subprocess.PIPE, timeout=300).stdout
    for name, rounds in json.loads(output).items():
        yield figure(name, [(raw, safe) for raw, _, safe in rounds], more=more.get(name), ratio=ratio.get(name))
        yield figure(name, [(by_hand, safe) for _, by_hand, safe in rounds], against=BY_HAND)


def imports(effort: Effort) -> Iterator[Figure]:
    """How long an import takes, with and without the start of the interpreter."""
    programs = ("pass", "import smartcard.scard", "import pcsc_safe.scard")
    rounds = []
    for number in range(-1, effort.imports):  # the first one writes the .pyc files
        taken = {}
        for program in programs if number % 2 else reversed(programs):
            start = time.perf_counter_ns()
            subprocess.run([sys.executable, "-c", program], env=environment(), check=True)
            taken[program] = (time.perf_counter_ns() - start) / 1000
        rounds.append([taken[program] for program in programs])
    del rounds[0]
    yield figure("import, whole process", [(raw, safe) for _, raw, safe in rounds])
    yield figure("import, net", [(raw - bare, safe - bare) for bare, raw, safe in rounds])


_READ_A_CARD = """
_, context = s.SCardEstablishContext(s.SCARD_SCOPE_SYSTEM)
_, readers = s.SCardListReaders(context, [])
_, card, protocol = s.SCardConnect(context, readers[0], s.SCARD_SHARE_SHARED, s.SCARD_PROTOCOL_T1)
hresult, answer = s.SCardTransmit(card, s.SCARD_PCI_T1, [0x00, 0x01, 0x00, 0x00, 0x03, 1, 2, 3])
assert hresult == s.SCARD_S_SUCCESS
"""
_PROGRAMS = {
    RAW: f"import smartcard.scard as s{_READ_A_CARD}",
    WRAPT: f"import wrapt, smartcard.scard as s{_READ_A_CARD}",
    SAFE: f"import pcsc_safe.scard as s{_READ_A_CARD}",
}


def one_shot(effort: Effort) -> Iterator[Figure]:
    """How long a program that reads one card takes from start to exit, with each wrapt that there is."""
    with contextlib.ExitStack() as undo:
        env = stack(undo)
        other = os.environ.get(OTHER_WRAPT)
        for wrapt, said in [("", ""), *([(other, ", other wrapt")] if other else [])]:
            path = os.pathsep.join(filter(None, (wrapt, env.get("PYTHONPATH"))))
            rounds = _whole_programs({**env, "PYTHONPATH": path} if path else env, effort.imports)
            for against, target in {WRAPT: None if said else 1.12, RAW: 1.6 if said else None}.items():
                pairs = [(taken[against], taken[SAFE]) for taken in rounds]
                yield figure(f"a card read, start to exit{said}", pairs, against=AGAINST[against], ratio=target)


def _whole_programs(env: dict[str, str], count: int) -> list[dict[str, float]]:
    """How long each program takes from start to exit; they run in turns, ``count`` times each."""
    names, rounds = list(_PROGRAMS), []
    for number in range(-1, count):  # the first one writes the .pyc files
        shift, taken = number % len(names), {}
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter_ns()
            subprocess.run([sys.executable, "-c", _PROGRAMS[name]], env=env, check=True)
            taken[name] = (time.perf_counter_ns() - start) / 1000
        rounds.append(taken)
    return rounds[1:]


def memory(effort: Effort) -> Iterator[Figure]:
    """How much memory a forked worker doesn't share with other processes after its first exchange."""
    with contextlib.ExitStack() as undo:
        env = stack(undo)
        processes = {v: undo.enter_context(Process(v, env)) for v in (RAW, WRAPT, SAFE)}
        for process in processes.values():
            process.ask("exchange", 1)
        rounds = by_turns(processes, ("private_memory",), effort.processes)
    for against in (WRAPT, RAW):
        pairs = [(taken[against][0], taken[SAFE][0]) for taken in rounds]
        target = 2048.0 if against is RAW else None
        yield figure("private memory of a worker", pairs, against=AGAINST[against], more=target, unit="kB")


def first_establish(effort: Effort) -> Iterator[Figure]:
    """How long the first SCardEstablishContext of a process takes."""
    rounds = []
    with contextlib.ExitStack() as undo:
        env = stack(undo)
        for _ in range(effort.processes):
            pair = []
            for variant in ("raw", "safe"):
                with Process(variant, env) as process:
                    pair.append(process.ask("first_establish")[0])
            rounds.append((pair[0], pair[1]))
    yield figure("first SCardEstablishContext", rounds)


def forks(effort: Effort) -> Iterator[Figure]:
    """How long a fork takes, with few and with many contexts."""
    with contextlib.ExitStack() as undo:
        # A stack for each process, because pcscd serves 200 contexts at most.
        processes = {v: undo.enter_context(Process(v, stack(undo))) for v in (RAW, WRAPT, SAFE)}
        for count, target in {1: 1.1, 10: None, 50: None, 100: 1.1}.items():
            for process in processes.values():
                process.ask("contexts_are", count)
            rounds = by_turns(processes, ("fork",), effort.forks)
            for what, column in (("os.fork()", 0), ("fork to reaped", 1)):
                for against in (WRAPT, RAW):
                    pairs = [(taken[against][column], taken[SAFE][column]) for taken in rounds]
                    name = f"{what}, {count} context{'s' if count > 1 else ''}"
                    yield figure(name, pairs, against=AGAINST[against], ratio=target if against is WRAPT else None)


def guard(effort: Effort) -> Iterator[Figure]:
    """How much longer a fork takes with guard_native, by the number of sockets that the child examines."""
    with contextlib.ExitStack() as undo:
        env = stack(undo)
        processes = {v: undo.enter_context(Process(v, env)) for v in (SAFE, "guarded")}
        for count in (10, 1000):
            for process in processes.values():
                process.ask("contexts_are", 1)
                process.ask("sockets_are", count)
            rounds = by_turns(processes, ("fork",), effort.forks)
            for what, column in (("os.fork()", 0), ("fork to reaped", 1)):
                pairs = [(taken[SAFE][column], taken["guarded"][column]) for taken in rounds]
                yield figure(f"{what}, guard_native, {count} sockets", pairs, against="guard off")


def first_use(effort: Effort) -> Iterator[Figure]:
    """How long the first use of PC/SC takes in a forked child."""
    with contextlib.ExitStack() as undo:
        env = stack(undo)
        processes = {v: undo.enter_context(Process(v, env)) for v in (RAW, WRAPT, SAFE)}
        for process in processes.values():
            process.ask("contexts_are", 1)
        rounds = by_turns(processes, ("first_use_in_child",), effort.children)
        for against in (WRAPT, RAW):
            pairs = [(taken[against][0], taken[SAFE][0]) for taken in rounds]
            yield figure("first use in a child", pairs, against=AGAINST[against], ratio=2)


def broker(effort: Effort) -> Iterator[Figure]:
    """How much longer PC/SC calls take through a broker."""
    with contextlib.ExitStack() as undo:
        # Two cards on one stack: whatever slows pcscd down slows both variants down.
        env = stack(undo)
        variants = {v: undo.enter_context(Process(v, env)) for v in (RAW, "broker")}
        rounds = by_turns(variants, ("exchange", 50), effort.processes * 5)
        yield figure("SCardTransmit, broker", [(taken[RAW][0], taken["broker"][0]) for taken in rounds], ratio=1.5)
        for what, target in (("cold", 40_000), ("prestarted", 4_000)):
            variants = {v: undo.enter_context(Process(v, env)) for v in (RAW, "child's broker")}
            for process in variants.values():
                process.ask("contexts_are", 1)
            if what == "prestarted":
                variants["child's broker"].ask("prestart")
            rounds = by_turns(variants, ("first_use_in_child",), max(2, effort.children // 5))
            pairs = [(taken[RAW][0], taken["child's broker"][0]) for taken in rounds]
            yield figure(f"first use in a child, {what} broker", pairs, more=target)


def slow_cards(effort: Effort) -> Iterator[Figure]:
    """How much longer an APDU takes if the card takes as long as a real card."""
    for ms, count, target in ((5, 10, 1.03), (50, 2, None)):
        with contextlib.ExitStack() as undo:
            env = stack(undo, card=partial(SlowCard, ms))
            processes = {v: undo.enter_context(Process(v, env)) for v in (RAW, SAFE, "broker")}
            rounds = by_turns(processes, ("exchange", count), effort.processes * 2)
        yield figure(f"SCardTransmit of {ms} ms", [(taken[RAW][0], taken[SAFE][0]) for taken in rounds])
        pairs = [(taken[RAW][0], taken["broker"][0]) for taken in rounds]
        yield figure(f"SCardTransmit of {ms} ms, broker", pairs, ratio=target)


def held_up(effort: Effort) -> Iterator[Figure]:
    """How long a fork takes while other threads are in PC/SC."""
    scenes = {
        f"{name} in {count} thread{'s' if count > 1 else ''}": (what, count)
        for what, name in (("wait", "waits for events"), ("exchange", "10 ms APDUs"))
        for count in (1, 2, 4, 8)
    }
    with contextlib.ExitStack() as undo:
        # A stack for each process: on one stack they would wait for each other's cards.
        stacks = {variant: stack(undo, 8) for variant in (RAW, SAFE)}
        for name, scene in scenes.items():
            with contextlib.ExitStack() as until_next:
                processes = {v: until_next.enter_context(Process(v, env)) for v, env in stacks.items()}
                for process in processes.values():
                    process.ask("busy", *scene)
                rounds = by_turns(processes, ("fork_among_threads",), effort.held_up)
            yield figure(f"os.fork(), {name}", [(taken[RAW][0], taken[SAFE][0]) for taken in rounds])


FREEZES = 10  # seconds after which a process counts as frozen


def crowd(env: dict[str, str], scene: str, rounds: int, seconds: float, *variants: str) -> list[dict[str, Any]]:
    """The output of threads.py; None for each variant if the process froze."""
    command = [sys.executable, str(HERE / "threads.py"), scene, str(rounds), str(seconds), *variants]
    try:
        done = subprocess.run(
            command, env=env, check=True, stdout=subprocess.PIPE, timeout=FREEZES + 3 * rounds * seconds
        )
    except subprocess.TimeoutExpired:
        return [dict.fromkeys(variants)]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def threads(effort: Effort) -> Iterator[Figure]:
    """How long a call takes while eight threads make calls."""
    with contextlib.ExitStack() as undo:
        env = stack(undo, 8)
        for scene, name, share, seconds in (
            ("own", "8 threads, 8 contexts", 1, 0.04),
            ("slow-cards", "8 threads, 8 contexts, 10 ms", 10, 0.15),
        ):
            rounds = crowd(env, scene, max(2, effort.phases // share), seconds, RAW, SAFE)
            yield figure(name, [(taken[RAW], taken[SAFE]) for taken in rounds], ratio=1.02)
        pairs = []
        for number in range(effort.crowds):
            order = (RAW, SAFE) if number % 2 else (SAFE, RAW)
            settings = {RAW: env, SAFE: {**env, "PCSC_SAFE_BROKER": "always"}}
            taken = {variant: crowd(settings[variant], "own", 1, 0.2, variant)[0][variant] for variant in order}
            pairs.append((taken[RAW], taken[SAFE]))
        yield figure("8 threads, 8 contexts, broker", pairs, ratio=1.5)
        for scene, name in (
            ("shared", "8 threads, 2 on one busy context"),
            ("monitored", "8 threads, 1 context monitored"),
        ):
            pairs = []
            for number in range(effort.crowds):
                order = (RAW, SAFE) if number % 2 else (SAFE, RAW)
                taken = {variant: crowd(env, scene, 1, 0.2, variant)[0][variant] for variant in order}
                if taken[SAFE] is None:
                    raise RuntimeError(f"pcsc_safe froze: {name}")
                pairs.append((taken[RAW], taken[SAFE]))
            yield figure(name, pairs, ratio=1)


def pools(effort: Effort) -> Iterator[Figure]:
    """What programs do without pcsc_safe: their workers check by hand whose card it is, or are spawned."""
    ways = (BY_HAND, SPAWN, SAFE, "cold broker", "prestarted broker")
    with contextlib.ExitStack() as undo:
        env = stack(undo)
        processes = {way: undo.enter_context(Process(way, env, "pools.py")) for way in ways}
        processes["prestarted broker"].ask("prestart")
        first = by_turns(processes, ("first_answer",), effort.pools)
        tasks = by_turns(processes, ("tasks", 40), effort.pools)
    for way, said in {SAFE: "", "cold broker": ", cold broker", "prestarted broker": ", prestarted broker"}.items():
        for against in (BY_HAND, SPAWN):
            pairs = [(taken[against][0], taken[way][0]) for taken in first]
            yield figure(f"first answer of a pool{said}", pairs, against=against)
    for way, said in {SAFE: "", "prestarted broker": ", broker"}.items():
        for against in (BY_HAND, SPAWN):
            pairs = [(taken[against][0], taken[way][0]) for taken in tasks]
            yield figure(f"a task in a pool of 2{said}", pairs, against=against)


def many(effort: Effort) -> Iterator[Figure]:
    """How the cost depends on the number of workers, clients, open files and readers."""
    return by_number.figures(effort.numbers)


def recording(effort: Effort) -> Iterator[Figure]:
    """How much longer calls take when ``run --report`` or ``--timeline`` records them."""
    with contextlib.ExitStack() as undo:
        directory = undo.enter_context(tempfile.TemporaryDirectory())
        command = [sys.executable, str(HERE / "recording.py"), str(effort.calls)]
        env = {**stack(undo), "PCSC_SAFE_REPORT": directory}
        output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, timeout=300).stdout
    for name, pairs in json.loads(output).items():
        target = 1.05 if "Transmit" in name else None  # the others are rare
        yield figure(f"{name}, recorded", pairs, against="pcsc_safe", ratio=target)


MEASURES = {
    "calls": calls,
    "imports": imports,
    "one-shot": one_shot,
    "memory": memory,
    "first-establish": first_establish,
    "forks": forks,
    "guard": guard,
    "held-up": held_up,
    "threads": threads,
    "first-use": first_use,
    "broker": broker,
    "slow-cards": slow_cards,
    "pools": pools,
    "many": many,
    "recording": recording,
}
