"""pyscard's own test suites, and pcsc-lite's UnitaryTests, on raw pyscard and on pcsc_safe.

    python tests/upstream_suites.py PATH_TO_PYSCARD PATH_TO_PCSC [--json]

The two paths are checkouts of LudovicRousseau/pyscard and LudovicRousseau/PCSC.  The tests run from copies, unchanged,
each on its own virtual stack with two T=0 cards; they are not part of this repository.  The exit status is 1 if a
result differs from raw pyscard's, except for SCard_fork.py, which passes here.

Two runs are the same if every test has the same outcome or, for a program, if exit status and output are the same,
except for what always differs: times, and the order in which threads print.  A program that does not end is killed, and
the set of its lines is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Union

from places import ROOT

from pcsc_safe.testing import VirtualCard, VirtualPcsc

__all__ = ["SUITES", "WAYS", "Ended", "Way", "differences", "program", "programs", "suite"]


class SimCard(VirtualCard):
    """The card that pyscard's test cases need: T=0 only, with the file DF TELECOM of a SIM (GSM 11.11)."""

    _FILE = bytes.fromhex("0000000000007F10020000000000")

    def apdu(self, command: bytes) -> bytes:
        """Answer SELECT and GET RESPONSE of class A0."""
        if command[0] != 0xA0:
            return b"\x6e\x00"
        if command[1] == 0xA4:
            return bytes([0x9F, len(self._FILE)]) if command[5:] == b"\x7f\x10" else b"\x94\x04"
        if command[1] == 0xC0:
            return self._FILE[: command[4]] + b"\x90\x00"
        return b"\x6d\x00"


ATRS = (bytes.fromhex("3B021450"), bytes.fromhex("3B03145051"))
"""The ATRs of two different cards."""
FORK_TEST = "SCard_fork.py"
LIMIT = 120
"""The time limit of a suite, in seconds."""
ENDLESS = 20
"""Seconds after which a program counts as one that does not end.  The slowest one that ends takes 10."""


class Way(NamedTuple):
    """A way to run a program.

    :ivar arguments: Python's arguments before the program's name.
    :ivar forked: whether a forked child runs the program.
    """

    arguments: tuple[str, ...]
    forked: bool = False


_RUN = ("-m", "pcsc_safe", "run")
WAYS = {
    "raw": Way(()),
    "retrofitted": Way(_RUN),
    "forked": Way(_RUN, forked=True),
    "always": Way((*_RUN, "--broker", "always")),
    "forked, always": Way((*_RUN, "--broker", "always"), forked=True),
}

FORKING = """
import os, runpy, sys
from smartcard.scard import *

def check(results):
    assert results[0] == SCARD_S_SUCCESS, SCardGetErrorMessage(results[0])
    return results[1]

context = check(SCardEstablishContext(SCARD_SCOPE_SYSTEM))
readers = check(SCardListReaders(context, []))
child = os.fork()
if child == 0:
    del sys.argv[0]
    sys.path[0] = os.getcwd()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert check(SCardListReaders(context, [])) == readers
assert SCardReleaseContext(context) == SCARD_S_SUCCESS
sys.exit(status)
"""
"""Establishes a context, forks, and lets the child run a program; then checks that its context is valid."""

UNITTEST = """
import json, sys, unittest
sys.path.append("..")
import configcheck

configcheck.checklocalconfig()

class Outcomes(unittest.TestResult):
    outcomes = {}

    def startTest(self, test):
        self.outcomes[test.id()] = "passed"

    def addFailure(self, test, error):
        self.outcomes[test.id()] = f"{error[0].__name__}: {error[1]}"

    addError = addFailure

    def addSkip(self, test, reason):
        self.outcomes[test.id()] = f"skipped: {reason}"

tests = unittest.defaultTestLoader.loadTestsFromName(sys.argv[1])
wanted = sys.argv[2:]

def flat(tests):
    for test in tests:
        yield from flat(test) if isinstance(test, unittest.TestSuite) else [test]

unittest.TestSuite(test for test in flat(tests) if not wanted or test.id().split(".")[0] in wanted).run(Outcomes())
with open("outcomes.json", "w") as file:
    json.dump(Outcomes.outcomes, file)
"""


class Ended(NamedTuple):
    """How a program ended, and its output, in a form that can be compared.

    :ivar status: its exit status, or "runs on".
    """

    status: Union[int, str]
    output: str
    errors: str


@contextlib.contextmanager
def _stack() -> Iterator[dict[str, str]]:
    """The environment of a program on its own stack, with default settings."""
    with VirtualPcsc(2, [SimCard(atr) for atr in ATRS], activate=False) as stack:
        usual = {name: value for name, value in stack.env.items() if not name.startswith("PCSC_SAFE_")}
        path = os.pathsep.join(filter(None, [str(ROOT), usual.get("PYTHONPATH", "")]))
        yield {**usual, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0"}


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="suites") as name:
        yield Path(name)


def _run(way: str, folder: Path, arguments: Sequence[str], env: Mapping[str, str], limit: float) -> Ended:
    """Run a Python program in a folder; it and all processes that it started are dead afterwards."""
    how = WAYS[way]
    if how.forked:
        (folder / "forking.py").write_text(FORKING)
        arguments = ["forking.py", *arguments]
    with (folder / "output").open("w") as output, (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *how.arguments, *arguments],
            cwd=folder,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    status: Union[int, str] = "runs on"
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    texts = [(folder / name).read_text(errors="replace").replace(str(folder), ".") for name in ("output", "errors")]
    return Ended(status, *texts)


# Suites: the outcome of each test.


def _pytest(way: str, checkout: Path, _: Sequence[str]) -> dict[str, str]:
    with _folder() as folder, _stack() as env:
        shutil.copytree(checkout / "test", folder / "test")
        (folder / "pytest.ini").write_text("[pytest]\n")
        plain = ["-p", "no:cacheprovider", "-p", "no:pcsc_safe", "-q"]
        ended = _run(way, folder, ["-m", "pytest", *plain, "--junitxml=outcomes.xml", "test"], env, LIMIT)
        return _from_junit(folder / "outcomes.xml", ended)


def _from_junit(file: Path, ended: Ended) -> dict[str, str]:
    if ended.status != 0 or not file.exists():
        return {"pytest": f"ended with {ended.status}\n{ended.output}\n{ended.errors}"}
    outcomes = {}
    for case in ElementTree.parse(file).iter("testcase"):
        kinds = [
            f"{child.tag} {child.get('type', '')}" for child in case if child.tag not in ("system-out", "properties")
        ]
        outcomes[f"{case.get('classname')}.{case.get('name')}"] = " ".join(kinds) or "passed"
    return outcomes


def _unittest(name: str, way: str, checkout: Path, modules: Sequence[str]) -> dict[str, str]:
    with _folder() as folder, _stack() as env:
        tests = next(path for path in (checkout / "src/smartcard/test", checkout / "smartcard/test") if path.exists())
        shutil.copytree(tests / name, folder / name)
        shutil.copy(tests / "configcheck.py", folder)
        (folder / name / "runner.py").write_text(UNITTEST)
        ended = _run(way, folder / name, ["runner.py", f"testsuite_{name}.suite", *modules], env, LIMIT)
        if ended.status != 0:
            return {name: f"ended with {ended.status}\n{ended.output}\n{ended.errors}"}
        outcomes: dict[str, str] = json.loads((folder / name / "outcomes.json").read_text())
        return outcomes


SUITES = ("test", "framework", "scard")


def suite(name: str, way: str, checkout: Path, modules: Sequence[str] = ()) -> dict[str, str]:
    """The outcome of each test of a pyscard suite, by its ID: "passed", or the words of its failure.

    :param name: one of SUITES.
    :param way: one of WAYS.
    :param checkout: of pyscard.
    :param modules: the only ones to run; all if empty.  Not for "test".
    """
    return _pytest(way, checkout, modules) if name == "test" else _unittest(name, way, checkout, modules)


# Programs.


def programs(checkout: Path) -> list[str]:
    """The names of pcsc-lite's UnitaryTests that are written in Python."""
    return sorted(file.name for file in (checkout / "UnitaryTests").glob("*.py"))


def program(name: str, way: str, checkout: Path) -> Ended:
    """How one of pcsc-lite's UnitaryTests ends, and its output, in a form that can be compared.

    SCard_fork.py runs with policy ``invalid``, which it tests.

    :param name: one of :func:`programs`.
    :param way: one of WAYS.
    :param checkout: of pcsc-lite.
    """
    with _folder() as folder, _stack() as env:
        shutil.copy(checkout / "UnitaryTests" / name, folder)
        if name == FORK_TEST:
            env["PCSC_SAFE_POLICY"] = "invalid"
        return _comparable(_run(way, folder, [name], env, ENDLESS))


_TIME = re.compile(r"\d+\.\d+(e-\d+)?")


def _comparable(ended: Ended) -> Ended:
    errors = "\n".join(line for line in ended.errors.splitlines() if line and not line.startswith(" "))  # no frames
    return Ended(ended.status, _TIME.sub("<time>", ended.output), _TIME.sub("<time>", errors))


def same(raw: Ended, other: Ended) -> bool:
    """Whether a program did the same in both ways."""
    if raw.status != other.status or raw.errors != other.errors:
        return False
    if raw.status == "runs on":
        return _kinds(raw.output) == _kinds(other.output)
    return raw.output == other.output or _letters(raw.output) == _letters(other.output)


def _letters(output: str) -> Counter[str]:
    """The letters: threads may have printed into each other's lines."""
    return Counter("".join(output.split()))


def _kinds(output: str) -> set[str]:
    """The lines without their numbers; the last one may be incomplete."""
    lines = {re.sub(r"\d+", "<number>", line) for line in output.splitlines()[:-1]}
    return {re.sub(r"\.+", ".", line) for line in lines}


def differences(raw: Mapping[str, object], other: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """The different results, by name: on raw pyscard, and here."""
    found = {}
    for name in {**raw, **other}:
        one, two = raw.get(name), other.get(name)
        if not (same(one, two) if isinstance(one, Ended) and isinstance(two, Ended) else one == two):
            found[name] = (one, two)
    return found


def _summary(outcomes: Mapping[str, Union[str, Ended]]) -> str:
    def kind(outcome: Union[str, Ended]) -> str:
        if isinstance(outcome, Ended):
            return outcome.status if isinstance(outcome.status, str) else f"end with {outcome.status}"
        return outcome if outcome == "passed" else "xfail" if "xfail" in outcome else outcome.partition(" ")[0]

    counts = Counter(map(kind, outcomes.values()))
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


Results = dict[str, dict[str, dict[str, Union[str, Ended]]]]
"""Results, by suite, way and test."""


def _everything(options: argparse.Namespace, ways: Sequence[str]) -> Results:
    """Run all requested tests, several at a time."""
    with ThreadPoolExecutor(4) as pool:  # they wait most of the time
        of_pyscard: dict[tuple[str, str], Future[dict[str, str]]] = {}
        of_pcsc: dict[tuple[str, str], Future[Ended]] = {}
        if options.pyscard != "-":
            for name in _chosen(options, SUITES):
                of_pyscard.update({(name, way): pool.submit(suite, name, way, Path(options.pyscard)) for way in ways})
        if options.pcsc != "-":
            for name in _chosen(options, programs(Path(options.pcsc))):
                of_pcsc.update({(name, way): pool.submit(program, name, way, Path(options.pcsc)) for way in ways})
        results: Results = {}
        for (name, way), outcomes in of_pyscard.items():
            results.setdefault(name, {})[way] = dict(outcomes.result())
        for (name, way), ended in of_pcsc.items():
            results.setdefault("UnitaryTests", {}).setdefault(way, {})[name] = ended.result()
        return results


def _chosen(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    return [name for name in names if not options.only or name in options.only]


def _print(results: Results, different: Mapping[str, Mapping[str, Mapping[str, object]]]) -> None:
    for what, by_way in results.items():
        for way, outcomes in by_way.items():
            print(f"{what:13} {way:15} {_summary(outcomes)}")
            for name, found in different[what].get(way, {}).items():
                print(f"    {name}, raw and here: {found}")


def main() -> int:
    """Run everything in every way, and print the results; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pyscard", help="a checkout of LudovicRousseau/pyscard; - for none")
    parser.add_argument("pcsc", help="a checkout of LudovicRousseau/PCSC; - for none")
    parser.add_argument("--json", action="store_true", help="print everything for programs")
    parser.add_argument("--only", action="append", help="a suite, or a program of pcsc-lite's; may be repeated")
    parser.add_argument("--way", action="append", choices=WAYS, help="a way to run it, beside raw; may be repeated")
    options = parser.parse_args()
    ways = [way for way in WAYS if way == "raw" or way in (options.way or WAYS)]
    results = _everything(options, ways)
    different = {
        what: {way: differences(by_way["raw"], by_way[way]) for way in ways[1:]} for what, by_way in results.items()
    }
    if options.json:
        print(json.dumps({"results": results, "different": different}, indent=1))
    else:
        _print(results, different)
    unwanted = [name for by_way in different.values() for found in by_way.values() for name in found]
    return int(any(name != FORK_TEST for name in unwanted))


if __name__ == "__main__":
    sys.exit(main())
