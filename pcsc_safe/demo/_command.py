"""``python -m pcsc_safe demo``: its arguments, its exit status, its JSON.

The raw and the safe run of a hazard take place at the same time, each on a separate stack and in a separate thread; the
threads only watch.  Nothing here forks.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, Optional

from ..testing._disposable import default_sigchld
from ._judge import Outcome, Run, Verdict
from ._run import judged
from ._view import Live, Row, table, wants_colour
from .hazards import Hazard, load

__all__ = ["EPILOG", "add_arguments", "main"]

EPILOG = """exit status: 0 if pcsc_safe is safe from every hazard, 1 if it isn't or if the demo could not tell,
2 if the demo could not run"""

RAW = "smartcard.scard"
_Pair = tuple[tuple[Run, Verdict], tuple[Run, Verdict]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--only", nargs="+", default=[], metavar="N", help="show only hazards N (default: all hazards)")
    parser.add_argument("--json", action="store_true", help="print all observations as JSON (default: a table)")
    # For our own tests: what would the demo say if pcsc_safe let a hazard through?
    parser.add_argument("--safe-module", default="pcsc_safe.scard", help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> int:
    """Run the demo.

    :return: the exit status, see :data:`EPILOG`.
    """
    try:
        from ..testing import PcscStackError, VirtualPcsc  # --help needs none
    except ImportError as error:
        print(
            f"the demo can't run: {error}; install pcsc_safe and what it needs: pip install pcsc-safe",
            file=sys.stderr,
        )
        return 2
    try:
        hazards = load(options.only)
        signal.signal(signal.SIGTERM, _terminated)
        default_sigchld()
        with VirtualPcsc(activate=False):
            pass  # so that a missing stack is reported first
        return _show(hazards, options.safe_module, options.json)
    except (ValueError, PcscStackError) as error:
        print(f"the demo can't run: {error}", file=sys.stderr)
        return 2


def _terminated(number: int, frame: object) -> NoReturn:
    # As an exception, so that stacks and disposable processes are cleared away.
    raise SystemExit(128 + number)


def _show(hazards: Sequence[Hazard], safe: str, as_json: bool) -> int:
    from .. import __version__  # not known while the package is being imported

    live: Optional[Live] = None
    if not as_json:
        print(f"Each hazard runs on {RAW} and on {safe} (pcsc_safe {__version__}),")
        print("in processes that may die, each on a private pcscd with virtual cards.\n")
        live = Live(sys.stdout)
        live.heading(RAW, safe)
    results = list(_results(hazards, safe, live))
    rows = [Row(hazard, raw[1], own[1]) for hazard, (raw, own) in results]
    let_through = [row.hazard.NUMBER for row in rows if row.safe.outcome is not Outcome.SAFE]
    if as_json:
        print(json.dumps(_as_json(results, safe, let_through), indent=2))
    else:
        print(f"\n{table(rows, RAW, safe, wants_colour(sys.stdout))}")
        print(_summary(rows, safe, let_through))
    return 1 if let_through else 0


def _results(hazards: Sequence[Hazard], safe: str, live: Optional[Live]) -> Iterator[tuple[Hazard, _Pair]]:
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            for hazard in hazards:
                if live:
                    live.begin(hazard)
                raw = pool.submit(_judged, hazard, RAW, True, stop, live)
                own = pool.submit(_judged, hazard, safe, False, stop, live)
                yield hazard, (raw.result(), own.result())
        finally:
            stop.set()


def _judged(hazard: Hazard, module: str, raw: bool, stop: threading.Event, live: Optional[Live]) -> tuple[Run, Verdict]:
    seen, verdict = judged(hazard, module, stop)
    if live:
        live.result(raw, verdict)
    return seen, verdict


def _summary(rows: Sequence[Row], safe: str, let_through: Sequence[str]) -> str:
    shown = sum(row.raw.outcome is Outcome.HAZARD for row in rows)
    said = f"{RAW}: {shown} of {len(rows)} hazards seen here.\n{safe}: "
    if let_through:
        return f"{said}NOT SAFE in {len(let_through)} of {len(rows)}: {', '.join(let_through)}."
    return f"{said}SAFE in all {len(rows)}."


def _as_json(results: Sequence[tuple[Hazard, _Pair]], safe: str, let_through: Sequence[str]) -> dict[str, Any]:
    from ..testing._versions import versions  # only --json needs them

    return {
        "versions": versions(),
        "modules": {"raw": RAW, "safe": safe},
        "hazards": [
            {"number": hazard.NUMBER, "name": hazard.NAME, "raw": _run_as_json(*raw), "safe": _run_as_json(*own)}
            for hazard, (raw, own) in results
        ],
        "let_through": list(let_through),
    }


def _run_as_json(seen: Run, verdict: Verdict) -> dict[str, Any]:
    observed = seen._asdict()
    observed["observations"] = observed.pop("reported")
    return {"outcome": verdict.outcome.value, "says": verdict.says, **observed}
