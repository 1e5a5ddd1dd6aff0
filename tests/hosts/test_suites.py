"""pyscard's suites and pcsc-lite's UnitaryTests have the same results as on raw pyscard; this is the quick part.

``python tests/upstream_suites.py`` runs all; :mod:`upstream` says where they come from.
"""

from __future__ import annotations

import pytest
import upstream
import upstream_suites as suites

from pcsc_safe.testing._install import Installed, Missing, look

HERE = [way for way in suites.WAYS if way != "raw"]
QUICK = {
    "test": [],
    "framework": [
        "testcase_Card",
        "testcase_CardConnection",
        "testcase_CardRequest",
        "testcase_CardService",
        "testcase_CardType",
        "testcase_readers",
        "testcase_readergroups",
    ],
    "scard": [],
}
"""The quick modules of a suite, which take some seconds; all if none is named."""
PROGRAMS = (
    "SCardBeginTransaction_Disconnect.py",
    "SCardBeginTransaction_ExclusiceMode.py",
    "SCardBeginTransaction_Reset.py",
    "SCardEndTransaction_extra_call.py",
    "SCardReconnect.py",
    "ThreadSafeConnect.py",
)
CRASHES_RAW = {
    ((1, 9, 9), "ThreadSafeConnect.py"): "libpcsclite 1.9.9 can crash if threads connect on different contexts at once"
}
"""Programs that sometimes end with SIGSEGV on raw pyscard, and the version of pcsc-lite; see docs/limits.md."""


@pytest.fixture(autouse=True)
def installed() -> Installed:
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    return found


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.long) for name in ("test", "framework")), "scard"]
)
def test_suite(name: str) -> None:
    """Each test has the same outcome as on raw pyscard, in the parent, in a forked child, and through a broker."""
    checkout, modules = upstream.source("pyscard"), QUICK[name]
    raw = suites.suite(name, "raw", checkout, modules)
    passed = [outcome for outcome in raw.values() if outcome == "passed"]
    assert len(passed) >= len(raw) - 4  # expected failures, and SCardGetAttrib: vpcd has no SCARD_ATTR_ATR_STRING
    for way in HERE:
        assert not suites.differences(raw, suites.suite(name, way, checkout, modules)), way


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, installed: Installed) -> None:
    """A program ends as on raw pyscard and prints the same, in the parent, in a forked child, and through a broker."""
    if reason := CRASHES_RAW.get((installed.version_info, name)):
        pytest.skip(reason)
    checkout = upstream.source("pcsc-lite")
    raw = {name: suites.program(name, "raw", checkout)}
    assert raw[name].status == 0
    for way in HERE:
        assert not suites.differences(raw, {name: suites.program(name, way, checkout)}), way


def test_scard_fork() -> None:
    """pcsc-lite's own test of fork() passes, unmodified, under policy ``invalid``."""
    checkout = upstream.source("pcsc-lite")
    for way in HERE:
        status, output, errors = suites.program("SCard_fork.py", way, checkout)
        assert (status, "test passed" in output, "FAILED" in output, errors) == (0, True, False, ""), way
