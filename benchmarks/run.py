"""What pcsc_safe costs, measured here and now: ``python benchmarks/run.py [--output DIRECTORY]``.

Needs what the tests need (pcscd, vpcd), and starts its own virtual PC/SC stacks.  Raw pyscard, and what users do
instead of pcsc_safe, are measured in the same run, always in turns with it.  pyperf can't be used: it finishes one
measure before it begins the next, and on a machine that others use too, the machine changes more in that time than the
difference that we look for.  With ``--output`` the table is also written as a page (results.md), data (results.json)
and a picture (results.svg).

Exit status: 0, whatever the figures are; it measures, it does not judge a machine.
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
Times are medians of many samples, with the quartiles beside them: half of the samples lie between. "more" and "ratio"
are medians of differences and ratios inside pairs of samples taken right after each other; the 95 % interval is that of
the ratio where the target is a ratio, else of "more". "unclear": the target lies inside the interval.

calls            all in one process that never forks, on one session; the card is a Python thread elsewhere. "check by
                 hand": an application on raw pyscard that compares os.getpid() before each call
{OPEN_FILES} more files   SCardEstablishContext looks for its connection among the descriptors of the process
import           a whole "python -c", from start to end; "net": less an empty "python -c pass" of the same round
a card read      a program from start to exit that imports, establishes, connects, exchanges an APDU and ends. Most of
                 what pcsc_safe adds is the import of wrapt, which depends on its version; "other wrapt": with the one
                 in the directory that the environment variable {OTHER_WRAPT} names, if there is one
private memory   what a forked worker has to itself after its first exchange (Private_* of smaps_rollup): on its
                 parent's card with pcsc_safe, on one that it connected with raw pyscard
first establish  the first SCardEstablishContext of a process: wrapt, and with it asyncio, is imported there, not before
fork             os.fork() until it returns in the parent; "to reaped": until a child that does nothing but _exit is
                 reaped. A bigger process takes longer to fork, whatever made it bigger: "raw pyscard" has nothing else
                 loaded, "raw, wrapt imported" has also imported wrapt, as pcsc_safe has; so the difference to the
                 latter is what pcsc_safe itself costs a fork, the difference to the former all that a user notices
guard            the same with guard_native=True, beside pcsc_safe without: the child looks at every descriptor; sockets
                 take longest
waits, APDUs     os.fork() in the parent while its other threads are in PC/SC: waiting for events that don't come, or
                 exchanging APDUs of 10 ms, each on a context and a reader of its own. pcsc_safe's waits until they are
                 out; raw pyscard's doesn't, and a child that does more than _exit may hang
8 threads        microseconds a call, of all threads together: their throughput, upside down. All exchange APDUs;
                 "10 ms": that is what a card takes, else it answers at once. "2 on one": two of them use one context,
                 which is always busy with APDUs of 10 ms. "monitored": one waits for events on a context that another
                 uses. Both modules by turns in one process on the same sessions, but for the last two, where raw may
                 freeze, and for "broker" (broker="always"): there each has processes of its own
broker           SCardTransmit of a process whose PC/SC is done by a broker (broker="always"); and the first use in a
                 forked child that has to go through one (policy "broker"): that starts it (cold), or the parent has
                 started one ahead (prestarted)
recorded         run --report or --timeline: pcsc_safe beside itself, in one process, on one session
first use        in a forked child: SCardListReaders on the inherited context, which gets a context of its own first; on
                 raw pyscard SCardEstablishContext and SCardListReaders
many             cost by number: forked workers that are there at the same time, each with a card, 16 readers between
                 them, and what one of them takes from the first fork on; contexts of another process; open files;
                 readers. "all states": SCardGetStatusChange that doesn't wait
pool             ProcessPoolExecutor of an application that has connected the card. pcsc_safe: workers are forked and
                 use that card, with cards="reconnect"; "check by hand": they are forked and connect when they see that
                 the process is another one; "spawn": they are new Pythons, which connect when they begin. The first
                 answer of one worker, from the start of the pool; a task is one exchange, two workers do them
"""


def machine() -> dict[str, Any]:
    """Where and when this is measured."""
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
    """Its name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "of unknown name")


def write(directory: Path, where: dict[str, Any], figures: Sequence[Figure], fast: bool) -> None:
    """The figures as a page, as data, and as a picture.

    :param directory: where to; made if there is none.
    :param where: what :func:`machine` said.
    """
    directory.mkdir(parents=True, exist_ok=True)
    document = {"machine": where, "fast": fast, "figures": [line.as_json() for line in figures]}
    (directory / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    (directory / "results.svg").write_text(picture(figures))
    about = "".join(f"- {name}: {value}\n" for name, value in where.items())
    page = f"# What pcsc_safe costs\n\n{about}\n![the same as a picture](results.svg)\n\n{markdown(figures)}\n"
    (directory / "results.md").write_text(f"{page}\n```\n{EXPLANATION.strip()}\n```\n")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what pcsc_safe costs more than smartcard.scard.")
    parser.add_argument("--fast", action="store_true", help="a few rounds only: to see that it runs, not what it says")
    parser.add_argument("--output", metavar="DIRECTORY", type=Path, help="write a page, data and a picture there")
    parser.add_argument("--only", metavar="MEASURE", action="append", choices=MEASURES, help=", ".join(MEASURES))
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
