"""Measures what pcsc_safe costs on this machine: ``python benchmarks/run.py [--output DIRECTORY]``.

It needs pcscd and vpcd, as the tests do, and starts its own virtual PC/SC stacks.  The same run also measures raw
pyscard, and what programs do without pcsc_safe.  It always takes their samples and those of pcsc_safe in turns.  pyperf
can't do this: it finishes one measure before it begins the next.  On a machine with other users, the speed of the
machine changes more in that time than pcsc_safe costs.  With ``--output`` the table is also written as a page
(results.md), as data (results.json) and as a picture (results.svg).

The exit status is 0, whatever the figures are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

from figures import Figure, markdown, table
from measures import FAST, MEASURES, OPEN_FILES, OTHER_WRAPT, THOROUGH
from picture import picture

from pcsc_safe.testing._install import Missing, look

EXPLANATION = f"""
Times are medians of many samples. The quartiles are in parentheses: half of the samples lie between them. A pair is two
samples that were taken one immediately after the other. "more" is the median of the differences in each pair, "ratio"
is the median of the ratios. The 95 % interval is that of the ratio if the target is a ratio, and otherwise that of
"more". "unclear" means that the target lies inside the interval.

calls            Calls in one process that never forks, on one session. The card is a Python thread of another process.
                 "check by hand" is an application on raw pyscard that compares os.getpid() before each call.
{OPEN_FILES} more files   The same with more open files, because SCardEstablishContext looks for its connection
                 among the file descriptors of the process.
import           "python -c" with the import, from start to exit. "net" is this time without that of "python -c pass".
a card read      A program, from start to exit, that imports, establishes a context, connects and exchanges an APDU.
                 Most of what pcsc_safe adds is the import of wrapt, which depends on its version. "other wrapt" uses
                 the wrapt in the directory that the environment variable {OTHER_WRAPT} names.
private memory   The memory that a forked worker doesn't share with other processes after its first exchange (Private_*
                 of smaps_rollup). On pcsc_safe it uses the card of its parent, on raw pyscard it connects to a card.
first establish  The first SCardEstablishContext of a process. On pcsc_safe it imports wrapt, and with it asyncio.
fork             os.fork(), until it returns in the parent. "to reaped" is the time until the parent has reaped a child
                 that only calls _exit. A bigger process forks more slowly. "raw pyscard" has imported nothing else.
                 "raw, wrapt imported" has also imported wrapt, as pcsc_safe has. So the difference to this one is what
                 pcsc_safe itself adds to a fork.
guard            A fork with guard_native=True, compared with guard_native=False. The child examines each of its file
                 descriptors; sockets take longest.
waits, APDUs     os.fork() in the parent while its other threads wait for events that don't come, or exchange APDUs of
                 10 ms, each on a separate context and reader. On pcsc_safe the fork waits for these calls. On raw
                 pyscard it doesn't, and a child that does more than _exit may hang.
8 threads        Microseconds for each call of any thread, while all exchange APDUs. "10 ms" is the time that the card
                 takes; without it, the card replies immediately. "2 on one": two threads use one context, which is
                 always busy with APDUs of 10 ms. "monitored": one thread waits for events on a context that another
                 thread uses. Both modules are measured in turns in one process on the same sessions. For "2 on one"
                 and "monitored", where raw pyscard may freeze, and for "broker" (broker="always"), each module has
                 separate processes.
broker           SCardTransmit of a process whose PC/SC calls a broker makes (broker="always"). Also the first use in a
                 forked child with policy "broker": the child starts the broker (cold), or the parent has started it
                 before the fork (prestarted).
recorded         pcsc_safe with run --report or --timeline, compared with pcsc_safe without it, in one process on one
                 session.
slow cards       SCardTransmit with a card that takes 5 ms or 50 ms for an APDU, as real cards do.
first use        In a forked child on pcsc_safe: SCardListReaders on the inherited context, which is re-established
                 first. On raw pyscard: SCardEstablishContext and SCardListReaders.
many             Cost by number: of forked workers that run at the same time, each with a card, on 16 readers (the time
                 is that from the first fork on, for each worker); of contexts of another process; of open files; of
                 readers. "all states" is an SCardGetStatusChange that doesn't wait.
pool             ProcessPoolExecutor of an application that has connected to the card. On pcsc_safe, workers are forked
                 and use that card, with cards="reconnect". With "check by hand", they are forked, and connect when
                 they see that their PID is another one. With "spawn", they are new Python processes, which connect
                 when they start. The first answer is the time from the start of the pool to the result of one worker.
                 A task is one exchange; two workers carry out the tasks.
"""


def machine() -> dict[str, Any]:
    """The machine, the date and the versions."""
    found = look()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "load": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "pcsc-lite": found.problem if isinstance(found, Missing) else found.version,
        **{name: version(name) for name in ("pcsc-safe", "pyscard", "wrapt")},
    }


def processor() -> str:
    """The name of the processor, as Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "of unknown name")


def write(directory: Path, where: dict[str, Any], figures: Sequence[Figure], fast: bool) -> None:
    """Write the figures as a page, as data, and as a picture.

    :param directory: where to write; it is created if it doesn't exist.
    :param where: what :func:`machine` returned.
    """
    directory.mkdir(parents=True, exist_ok=True)
    document = {"machine": where, "fast": fast, "figures": [line.as_json() for line in figures]}
    (directory / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    (directory / "results.svg").write_text(picture(figures))
    about = "".join(f"- {name}: {value}\n" for name, value in where.items())
    page = f"# What pcsc_safe costs\n\n{about}\n![the same as a picture](results.svg)\n\n{markdown(figures)}\n"
    (directory / "results.md").write_text(f"{page}\n```\n{EXPLANATION.strip()}\n```\n")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Measure how much longer pcsc_safe takes than smartcard.scard.")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="run only a few rounds, to test the benchmark; the figures mean nothing (default: all rounds)",
    )
    parser.add_argument(
        "--output",
        metavar="DIRECTORY",
        type=Path,
        help="also write a page, data and a picture to this directory (default: print a table only)",
    )
    parser.add_argument(
        "--only",
        metavar="MEASURE",
        action="append",
        choices=MEASURES,
        help=f"take this measure only; repeat it for more measures: {', '.join(MEASURES)} (default: all measures)",
    )
    options = parser.parse_args(arguments)
    where = machine()
    figures: list[Figure] = []
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    for name, measure in MEASURES.items():
        if not options.only or name in options.only:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            figures += measure(FAST if options.fast else THOROUGH)
    where["load at the end"] = f"{os.getloadavg()[0]:.2f}"
    print(EXPLANATION)
    print(table(figures))
    if options.output:
        write(options.output, where, figures, options.fast)
    return 0


if __name__ == "__main__":
    sys.exit(main())
