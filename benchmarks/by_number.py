"""How the cost depends on the number of workers, clients, files and readers, on raw pyscard and on pcsc_safe.

A call should not take longer because of things that it doesn't use: other clients of pcscd, other readers, other files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from figures import Figure, figure
from processes import RAW, SAFE, Process, by_turns, stack

__all__ = ["figures"]

WORKERS = 1, 16, 64
CLIENTS = 2, 50, 190  # of the 200 that pcscd serves
FILES = 10, 1_000, 10_000
READERS = 2, 8, 16  # as many as pcscd can have; the virtual ones come in pairs
REPEATED = 20  # calls a sample


def figures(rounds: int) -> Iterator[Figure]:
    """All figures of this module.

    :param rounds: the number of pairs for each figure.
    """
    yield from _workers(rounds)
    yield from _clients(rounds)
    yield from _files(rounds)
    yield from _readers(rounds)


@contextlib.contextmanager
def _sides(readers: int = 1) -> Iterator[tuple[dict[str, Process], dict[str, str]]]:
    """A process with raw pyscard and one with pcsc_safe, on one pcscd; and the environment for this pcscd."""
    with contextlib.ExitStack() as undo:
        env = stack(undo, readers)
        yield {side: undo.enter_context(Process(side, env)) for side in (RAW, SAFE)}, env


def _figure(name: str, processes: dict[str, Process], command: Sequence[Any], rounds: int) -> Figure:
    taken = by_turns(processes, command, rounds)
    return figure(name, [(each[RAW][0], each[SAFE][0]) for each in taken])


def _workers(rounds: int) -> Iterator[Figure]:
    """Measure forked workers that use PC/SC at the same time."""
    with _sides(max(READERS)) as (processes, _):
        for count in WORKERS:
            name = f"first exchange of a worker, {count} worker{'s' if count > 1 else ''}"
            yield _figure(name, processes, ("workers", count), rounds)


def _clients(rounds: int) -> Iterator[Figure]:
    """Measure with contexts of other processes."""
    with _sides() as (processes, env), Process(RAW, env) as others:
        for count in CLIENTS:
            others.ask("contexts_are", count)
            for what, command in (("SCardTransmit", "exchange"), ("Establish + Release", "establish_and_release")):
                yield _figure(f"{what}, {count} clients", processes, (command, REPEATED), rounds)


def _files(rounds: int) -> Iterator[Figure]:
    """Measure with open files in the process."""
    with _sides() as (processes, _):
        for count in FILES:
            for process in processes.values():
                process.ask("files_are", count)
                process.ask("contexts_are", 1)
            yield _figure(f"Establish + Release, {count} files", processes, ("establish_and_release", REPEATED), rounds)
            taken = by_turns(processes, ("fork",), rounds)
            for what, column in (("os.fork()", 0), ("fork to reaped", 1)):
                yield figure(f"{what}, {count} files", [(each[RAW][column], each[SAFE][column]) for each in taken])


def _readers(rounds: int) -> Iterator[Figure]:
    """Measure with more readers."""
    for count in READERS:
        with _sides(count) as (processes, _):
            for what, command in (("Connect + Disconnect", "connect_and_disconnect"), ("all states", "look_at_all")):
                yield _figure(f"{what}, {count} readers", processes, (command, REPEATED), rounds)
