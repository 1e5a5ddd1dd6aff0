"""The log: the prefix of a line, the fields of a record, and lines that appear only once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
from conftest import ECHO, Session
from forking import fork, in_child, in_program

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import handles, log
from pcsc_safe.testing import VirtualPcsc


def facts(record: logging.LogRecord) -> dict[str, Any]:
    """Return a record's fields."""
    return {name: getattr(record, f"pcsc_{name}") for name in log.FIELDS}


def test_a_record_has_its_facts_as_fields(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    """Every record has every field, so a format may name it. A field that doesn't apply is None."""
    pcsc_safe.configure(cards="reset")

    def child() -> tuple[Any, str]:
        with caplog.at_level(logging.DEBUG, "pcsc_safe"):
            assert session.transmit(ECHO)[0] == safe.SCARD_W_RESET_CARD
        of_event = {record.pcsc_event: record for record in caplog.records}  # type: ignore[attr-defined]
        formatted = logging.Formatter("%(pcsc_event)s %(pcsc_pid)d %(pcsc_reader)s").format(of_event["fork"])
        return facts(of_event["reset"]), formatted.replace(str(os.getpid()), "CHILD")

    told, formatted = in_child(child)
    assert told.pop("pid") != os.getpid()
    assert told == {
        "event": "reset",
        "owner_pid": os.getpid(),
        "broker_pid": None,
        "function": "SCardTransmit",
        "reader": session.reader,
        "established_at": None,
    }
    assert formatted == "fork CHILD None"


def unconfigured(configured: str = "") -> None:
    """Fork and cause a warning, with or without logging configured."""
    if configured:
        logging.basicConfig(format="%(name)s|%(message)s")
    pcsc_safe.configure(cards="reset")
    session = Session()
    in_child(session.transmit, ECHO)


@pytest.mark.native
@pytest.mark.parametrize(("configured", "begins"), [("", "pcsc_safe: SCardTransmit"), ("yes", "pcsc_safe|SCardTran")])
def test_a_line_says_whose_it_is(shared_stack: VirtualPcsc, configured: str, begins: str) -> None:
    """A line begins with "pcsc_safe" if logging isn't configured, because logging then prints the text alone."""
    done = in_program(unconfigured, configured, env=shared_stack.env)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "SCARD_W_RESET_CARD" in line]
    assert line.startswith(begins)


WITHOUT_PCSCD = """
import os, sys
from pcsc_safe import scard
def establish():
    return [scard.SCardEstablishContext(0)[0] == scard.SCARD_E_NO_SERVICE for _ in range(3)]
assert all(establish()), "there is one"
sys.stderr.flush()
if os.fork() == 0:
    establish()
    os._exit(0)
os.wait()
"""


@pytest.mark.native
@pytest.mark.not_on_macos("a child's broker finds no pcscd either, and says so")
def test_no_pcscd_is_told_once(tmp_path: Any) -> None:
    """One line in each process says that no pcscd runs, and points to the doctor."""
    env = {**os.environ, "PCSCLITE_CSOCK_NAME": str(tmp_path / "none")}
    done = subprocess.run([sys.executable, "-c", WITHOUT_PCSCD], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "SCARD_E_NO_SERVICE" in line]
    assert len(lines) == 2, done.stderr
    assert all(line.startswith("pcsc_safe: SCardEstablishContext returns SCARD_E_NO_SERVICE") for line in lines)
    assert all("run 'python -m pcsc_safe doctor' to see which" in line for line in lines)


def test_a_pcscd_that_stops_is_told_once(
    pcsc_stack: VirtualPcsc, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says that pcscd has ended while a context is open."""
    monkeypatch.setattr("pcsc_safe._core.recovery._warned_epoch", None)  # another test may have caused that line
    session = Session()
    pcsc_stack.kill()
    for _ in range(3):
        safe.SCardListReaders(session.context, [])
        session.transmit(ECHO)
        assert safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[0] == safe.SCARD_E_NO_SERVICE
    lines = [record.getMessage() for record in caplog.records if getattr(record, "pcsc_event", "") == "no-service"]
    assert len(lines) == 1, lines
    safe.SCardReleaseContext(session.context)


def lines_of(event: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines of an event."""
    return [record.getMessage() for record in caplog.records if getattr(record, "pcsc_event", "") == event]


def no_handovers(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines about blocks that do nothing."""
    lines = lines_of("no-handover", caplog)
    caplog.clear()
    return [line.rpartition(": ")[2] for line in lines]


@pytest.mark.not_on_macos("there handover() needs broker='always'")
def test_a_handover_that_does_nothing(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    """One line says that a block has no context, or else no fork. A correct block logs nothing."""
    with pcsc_safe.handover():
        pass
    assert no_handovers(caplog) == ["this thread has not called os.fork() in its handover() block"]

    def child() -> list[list[str]]:
        caplog.clear()
        own = Session()

        def forking() -> int:
            with pcsc_safe.handover(own.context):
                return fork()

        assert in_child(lambda: own.transmit(ECHO)[0], fork=forking) == safe.SCARD_S_SUCCESS
        good = no_handovers(caplog)
        for context in list(handles.contexts.values()):
            safe.SCardReleaseContext(context.safe)
        with pcsc_safe.handover():
            pass
        without_fork = no_handovers(caplog)
        with pcsc_safe.handover():
            in_child(lambda: None)
        return [good, without_fork, no_handovers(caplog)]

    no_context = ["it has no PC/SC context at the beginning of its handover() block; establish one before the block"]
    assert in_child(child) == [[], no_context, no_context]


@pytest.mark.not_on_macos("there handover() needs broker='always'")
def test_a_handover_inside_another(caplog: pytest.LogCaptureFixture, shared_stack: VirtualPcsc) -> None:
    """One line says that a block is inside another, and the fork hands over the contexts of both."""

    def parent() -> tuple[Any, ...]:
        caplog.clear()
        first, second = Session(), Session()
        pid, sessions = os.getpid(), (first, second)
        pcsc_safe.configure(policy="invalid")

        def forking() -> int:
            with pcsc_safe.handover(first.context), pcsc_safe.handover(second.context):
                return fork()

        in_its_child = in_child(lambda: [session.transmit(ECHO)[0] for session in sessions], fork=forking)
        left = [session.transmit(ECHO)[0] for session in sessions]
        return pid, in_its_child, left, lines_of("nested-handover", caplog), lines_of("no-handover", caplog)

    pid, in_its_child, left, nested, nothing = in_child(parent)
    assert (in_its_child, left) == ([safe.SCARD_S_SUCCESS] * 2, [safe.SCARD_E_INVALID_HANDLE] * 2)
    assert nested == [
        f"process {pid} has a handover() block inside another one, and a fork there hands over the contexts of both: "
        "pass all contexts to one block"
    ]
    assert nothing == []


@pytest.mark.native
@pytest.mark.not_on_macos("there handover() needs broker='always'")
def test_who_has_handed_over(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    """A line or an error in the parent and in its other children names the process that handed over, once."""

    def parent() -> tuple[Any, ...]:
        pid, own = str(os.getpid()), Session()

        def forking() -> int:
            with pcsc_safe.handover(own.context):
                return fork()

        assert in_child(lambda: None, fork=forking) is None

        def uses(cards: Any) -> list[str]:
            with caplog.at_level(logging.INFO, "pcsc_safe"), pcsc_safe.configure(cards=cards):
                caplog.clear()
                own.transmit(ECHO)
                return [record.getMessage() for record in caplog.records]

        def refusal() -> str:
            with pcsc_safe.configure(policy="raise"), pytest.raises(pcsc_safe.ForkedHandleError) as refused:
                own.transmit(ECHO)
            return str(refused.value)

        in_another_child = in_child(lambda: (refusal(), uses("reset"), str(os.getpid())))
        return pid, refusal(), uses("reset"), uses("reconnect"), in_another_child

    pid, refusal, reset, reconnect, (other_refusal, other_reset, other) = in_child(parent)
    gone = f"process {pid} has handed this session over to its child"
    assert f"to process {pid} for" in reset[-1]
    assert f"because {gone}: call SCardReconnect" in reset[-1]
    assert all(line.endswith(f"which replaces the one that process {pid} has handed over") for line in reconnect)
    assert (
        f"was handed over by process {pid} to its child; establish a context in this process, or use policy 'auto'"
        in refusal
    )
    assert f"because {gone}: call SCardReconnect" in other_reset[-1]
    assert f"was handed over by process {pid} to its child, and this is process {other}" in other_refusal


def misspelt(variable: str) -> str:
    """Return what is written to stderr if the variable is set."""
    code = "import pcsc_safe; pcsc_safe.settings(); pcsc_safe.settings(); from pcsc_safe import scard"
    env = {**os.environ, variable: "raise"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30).stderr


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("PCSC_SAFE_POLCY", "did you mean PCSC_SAFE_POLICY?"),
        ("PCSC_SAFE_QUIESCE_TIMOUT", "did you mean PCSC_SAFE_QUIESCE_TIMEOUT?"),
        ("PCSC_SAFE_XYZZY", "'python -m pcsc_safe run --help' lists the settings"),
    ],
)
def test_a_misspelt_variable(variable: str, hint: str) -> None:
    """One line names the misspelt variable, and the setting that may be meant."""
    expected = f"pcsc_safe: the environment variable {variable} is ignored, because no setting has this name: {hint}\n"
    assert misspelt(variable) == expected


@pytest.mark.parametrize("variable", ["PCSC_SAFE_PYTHON", "PCSC_SAFE_CARDS_", "OTHER_PCSC_SAFE_POLCY"])
def test_a_variable_that_is_somebody_elses(variable: str) -> None:
    """Variables of other parts of the project, and those with another prefix, cause no line."""
    assert bool(misspelt(variable)) is (variable == "PCSC_SAFE_CARDS_")
