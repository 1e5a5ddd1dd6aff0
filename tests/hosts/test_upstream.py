"""Programs written for smartcard.scard do the same when only their import is changed.

They are pyscard's examples and its test cases of the scard layer, from the source of the installed version, and
pcsc-lite's test of what a fork does to a handle; :mod:`upstream` says where they come from.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import upstream
from forking import in_program

from pcsc_safe import scard
from pcsc_safe.testing import EchoCard, VirtualPcsc

ATRS = (bytes.fromhex("3B021450"), bytes.fromhex("3B03145051"))
"""What pyscard's test cases need: two cards with T=0 only and with different ATRs."""

EXAMPLES = (
    "sample_control.py",
    "sample_getATR.py",
    "sample_getAttrib.py",
    "sample_getStatusChange.py",
    "sample_listCards.py",  # this one and the
    "sample_listInterfaces.py",  # next two report that
    "sample_locateCards.py",  # pcsc-lite can't do what they need
    "sample_pinpad.py",  # it reports that there is no pinpad
    "sample_readerGroups.py",
    "sample_readers.py",
    "sample_selectDFTelecom.py",
    "sample_transaction.py",
)

TEST_CASES = (
    "testcase_getatr",
    "testcase_getattrib",
    "testcase_geterrormessage",
    "testcase_locatecards",
    "testcase_readergroups",
    "testcase_returncodes",
    "testcase_transaction",
)

RUNNER = """
import json, sys, unittest

class Outcomes(unittest.TestResult):
    outcomes = {}

    def startTest(self, test):
        self.outcomes[test.id()] = "passed"

    def addFailure(self, test, error):
        self.outcomes[test.id()] = f"{error[0].__name__}: {error[1]}"

    addError = addFailure

    def addSkip(self, test, reason):
        self.outcomes[test.id()] = f"skipped: {reason}"

unittest.defaultTestLoader.loadTestsFromName(sys.argv[1]).run(Outcomes())
with open("outcomes.json", "w") as file:
    json.dump(Outcomes.outcomes, file)
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[VirtualPcsc]:
    """Two readers with a T=0 card each; this process doesn't use them."""
    from pcsc_safe.testing._install import Missing, look

    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(2, [EchoCard(atr) for atr in ATRS], activate=False) as stack:
        yield stack


def environment(stack: VirtualPcsc, policy: str = "") -> dict[str, str]:
    """The environment of a program on the stack, with default settings except for the policy."""
    usual = {name: value for name, value in stack.env.items() if not name.startswith("PCSC_SAFE_")}
    return {**usual, "PCSC_SAFE_POLICY": policy} if policy else usual


def test_no_example_is_left_out() -> None:
    """Every example of the installed pyscard's scard layer is in the list of this module."""
    assert {file.name for file in upstream.pyscard("Examples/scard-api").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(stack: VirtualPcsc, tmp_path: Path, name: str) -> None:
    """An example of pyscard ends with the same status and prints the same, on raw pyscard and on pcsc_safe."""
    program = upstream.pyscard("Examples/scard-api") / name
    raw = run_example(upstream.copy(program, tmp_path / "raw", change=False), stack)
    assert raw.output
    assert run_example(upstream.copy(program, tmp_path / "safe", change=True), stack) == raw


def run_example(program: Path, stack: VirtualPcsc) -> upstream.Outcome:
    """Run it, and respond to its prompts."""
    if program.name != "sample_getStatusChange.py":
        return upstream.run(program, env=environment(stack))
    words, last = "Please insert or remove a card", stack.readers[-1]
    try:
        return upstream.run(program, env=environment(stack), when_it_says=words, do=last.remove)
    finally:
        if last.card is None:
            last.insert(EchoCard(ATRS[-1]))


def local_config(stack: VirtualPcsc) -> str:
    """The file that pyscard's configcheck.py writes for its test cases: which readers and cards to expect."""
    readers, atrs = [reader.name for reader in stack.readers], [list(atr) for atr in ATRS]
    return (
        f"expectedReaders = {readers!r}\nexpectedATRs = {atrs!r}\n"
        "expectedATRinReader = dict(zip(expectedReaders, expectedATRs))\n"
        "expectedReaderGroups = ['SCard$DefaultReaders']\n"
    )


def run_test_case(module: Path, folder: Path, stack: VirtualPcsc, *, change: bool) -> dict[str, str]:
    """The outcome of each test of a module of pyscard, by its ID."""
    upstream.copy(module, folder, change=change)
    (folder / "local_config.py").write_text(local_config(stack))
    (folder / "runner.py").write_text(RUNNER)
    outcome = upstream.run(folder / "runner.py", module.stem, env=environment(stack))
    assert outcome.status == 0, outcome.errors
    outcomes: dict[str, str] = json.loads((folder / "outcomes.json").read_text())
    return outcomes


@pytest.mark.parametrize("name", TEST_CASES)
def test_test_case(stack: VirtualPcsc, tmp_path: Path, name: str) -> None:
    """Each test of pyscard passes or fails on pcsc_safe as on raw pyscard, with the same output.

    The tests of SCardGetAttrib that use a reader with a card fail on both: vpcd has no SCARD_ATTR_ATR_STRING.
    testcase_listcards is left out: it is empty except on Windows.
    """
    module = upstream.pyscard("test/scard") / f"{name}.py"
    raw = run_test_case(module, tmp_path / "raw", stack, change=False)
    assert "passed" in raw.values() if name == "testcase_getattrib" else set(raw.values()) == {"passed"}
    assert run_test_case(module, tmp_path / "safe", stack, change=True) == raw


def test_scard_fork_of_pcsc_lite(stack: VirtualPcsc, tmp_path: Path) -> None:
    """Under policy ``invalid``, pcsc-lite's own test of fork() passes, and its parent ends successfully."""
    program = upstream.source("pcsc-lite") / "UnitaryTests" / "SCard_fork.py"
    copy = upstream.copy(program, tmp_path / "safe", change=True)
    status, output, errors = upstream.run(copy, env=environment(stack, policy="invalid"))
    assert (status, errors) == (0, "")
    assert "test passed" in output.splitlines()
    assert "FAILED" not in output
    assert "father: SCardReleaseContext() Command successful." in output.splitlines()


def handle_is_invalid_after_fork() -> None:
    """The steps of pcsc-lite's SCard_fork.py; both processes end as Python programs usually do."""
    hresult, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_USER)
    assert hresult == scard.SCARD_S_SUCCESS
    hresult, readers = scard.SCardListReaders(context, [])
    assert hresult == scard.SCARD_S_SUCCESS
    hresult, card, _ = scard.SCardConnect(context, readers[0], scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_ANY)
    assert hresult == scard.SCARD_S_SUCCESS
    son = os.fork()
    if son == 0:
        hresult, readers = scard.SCardListReaders(context, [])
        print("son:", readers, scard.SCardGetErrorMessage(hresult), flush=True)
        sys.exit(hresult != scard.SCARD_E_INVALID_HANDLE)
    print("son ended with", os.waitpid(son, 0)[1])
    print("father:", scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD), scard.SCardReleaseContext(context))


def test_the_sequence_of_scard_fork(stack: VirtualPcsc) -> None:
    """Under policy ``invalid``, an inherited handle returns SCARD_E_INVALID_HANDLE; the parent's handle still works."""
    result = in_program(handle_is_invalid_after_fork, env=environment(stack, policy="invalid"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["son: [] Invalid handle.", "son ended with 0", "father: 0 0"]
