"""The demo shows the hazards, reports only what it observed, and can fail."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any, Optional

import pytest

from pcsc_safe.demo import _run, _view
from pcsc_safe.demo._judge import Finding, Outcome, Run, Verdict, conclude, death
from pcsc_safe.demo._stage import _is_running
from pcsc_safe.demo.hazards import load
from pcsc_safe.testing import EchoCard, PcscStackError, VirtualPcsc

NUMBERS = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"]
SAFE, HAZARD, UNKNOWN = Outcome.SAFE, Outcome.HAZARD, Outcome.UNKNOWN


@pytest.fixture(scope="session")
def _a_stack_can_be_had() -> None:
    try:
        with VirtualPcsc(cards=[EchoCard()], activate=False):
            pass
    except PcscStackError as error:
        pytest.skip(str(error))


needs_stack = pytest.mark.usefixtures("_a_stack_can_be_had")


def demo(*arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pcsc_safe", "demo", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def program(code: str, seconds: float = 5.0) -> Any:
    """A hazard module with this program."""
    return types.SimpleNamespace(__name__=code, NUMBER="0", NAME="a test's own", SECONDS=seconds)


@needs_stack
def test_every_hazard_shows_raw_and_none_on_pcsc_safe() -> None:
    """In the whole demo every hazard is SAFE on pcsc_safe and seen on raw pyscard, and the status is 0."""
    done = demo("--json", timeout=240)
    assert done.stderr == ""
    told = json.loads(done.stdout)
    by_number = {hazard["number"]: hazard for hazard in told["hazards"]}
    assert list(by_number) == NUMBERS
    assert {number: hazard["safe"]["outcome"] for number, hazard in by_number.items()} == dict.fromkeys(NUMBERS, "safe")
    assert {number: hazard["raw"]["outcome"] for number, hazard in by_number.items()} == dict.fromkeys(
        NUMBERS, "hazard"
    )
    assert told["let_through"] == []
    assert done.returncode == 0


@needs_stack
def test_status_1_if_pcsc_safe_lets_one_through() -> None:
    """With raw pyscard in place of pcsc_safe, the demo detects the hazards, names them, and ends with 1."""
    done = demo("--only", "10", "9", "--safe-module", "smartcard.scard")
    assert done.returncode == 1
    assert "NOT SAFE in 2 of 2: 9, 10." in done.stdout
    assert "739184" not in done.stdout + done.stderr


@needs_stack
def test_where_sigchld_is_ignored() -> None:
    """A process that inherits an ignored SIGCHLD can't wait for a child; the demo works there, too."""
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", ignore, sys.executable, "-m", "pcsc_safe", "demo", "--only", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_stack
def test_json_keys() -> None:
    """The keys of the JSON are stable."""
    told = json.loads(demo("--only", "10", "--json").stdout)
    assert list(told) == ["versions", "modules", "hazards", "let_through"]
    (hazard,) = told["hazards"]
    assert list(hazard) == ["number", "name", "raw", "safe"]
    keys = ["outcome", "says", "module", "exit_status", "killed_by", "timed_out", "seconds", "log", "observations"]
    assert [list(hazard[side]) for side in ("raw", "safe")] == [keys, keys]


@needs_stack
def test_settings_of_the_user_change_nothing() -> None:
    """The demo uses the default settings, whatever PCSC_SAFE_POLICY is."""
    assert demo("--only", "10", PCSC_SAFE_POLICY="raise").returncode == 0


def test_an_unknown_hazard_is_refused() -> None:
    """``--only`` with an unknown number ends with 2 and lists the known ones."""
    done = demo("--only", "99")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"the hazards are {', '.join(NUMBERS)}" in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="on other systems the message names Linux, not pcscd")
def test_status_2_where_there_is_no_stack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without pcscd or vpcd the demo ends with 2 and names the packages."""
    import shutil

    from pcsc_safe.__main__ import main
    from pcsc_safe.testing import _install

    monkeypatch.setattr(shutil, "which", lambda *given, **named: None)
    _install.look.cache_clear()
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["demo"]) == 2
    finally:
        _install.look.cache_clear()
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr()
    assert said.out == ""
    assert "pcscd vsmartcard-vpcd" in said.err


def test_status_2_on_macos(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On macOS the demo ends with 2 and says that the virtual stack needs Linux."""
    from pcsc_safe.__main__ import main
    from pcsc_safe.testing import _install

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "platform", "darwin")
    _install.look.cache_clear()
    try:
        assert main(["demo"]) == 2
    finally:
        _install.look.cache_clear()
        signal.signal(signal.SIGTERM, before)
    assert "Linux" in capsys.readouterr().err


# A single run.


@pytest.fixture
def run_disposable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the body of a hazard program, without a stack."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def run(body: str, seconds: float = 5.0, stop: Optional[threading.Event] = None) -> Run:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "a_hazard.py").write_text(f"import os, signal, time\ndef program(stage):\n{lines}")
        return _run._run_disposable(program("a_hazard", seconds), "math", dict(os.environ), stop or threading.Event())

    return run


def test_reports_of_a_program_that_dies_are_kept(run_disposable: Any) -> None:
    """Everything that a program reported before it died is kept, and so is the signal that ended it."""
    seen = run_disposable("stage.report('child', wrong=1)\nstage.report('child', wrong=2)\nos.kill(os.getpid(), 11)")
    assert seen.reported == {"child": {"wrong": 2}}
    assert (seen.exit_status, seen.killed_by, seen.timed_out) == (None, signal.SIGSEGV, None)


def test_a_program_that_hangs_is_given_up(run_disposable: Any) -> None:
    """A program that does not end is killed after its time limit, and the log shows where it hung."""
    started = time.monotonic()
    seen = run_disposable("stage.report('parent', alive=True)\ntime.sleep(60)", seconds=3.0)
    assert (seen.exit_status, seen.killed_by, seen.timed_out) == (None, None, 3.0)
    assert "in program" in seen.log
    assert time.monotonic() - started < 20


def test_nothing_of_a_program_is_left(run_disposable: Any) -> None:
    """A child that the program did not wait for is killed with it."""
    seen = run_disposable("stage.report('parent', child=stage.fork(lambda: time.sleep(60)))")
    child = seen.reported["parent"]["child"]
    deadline = time.monotonic() + 10
    while _is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_that_fails_says_why(run_disposable: Any) -> None:
    """An exception in the program is a failure, not a hazard: the status and the traceback are kept."""
    seen = run_disposable("raise RuntimeError('no card')")
    assert seen.exit_status == 1
    assert "no card" in seen.log
    assert conclude(Finding([], ["all is well"]), seen) == (UNKNOWN, "the program failed with status 1")


def test_an_interrupted_run_is_no_result(run_disposable: Any) -> None:
    """If the demo is interrupted, a run ends immediately and gives no result."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(_run.Stopped):
        run_disposable("time.sleep(60)", stop=stop)


def test_hazard_5_without_an_exclusive_connection(run_disposable: Any) -> None:
    """If the owner gets no connection, it has no idle child; nothing else is killed."""
    seen = run_disposable("""\
from types import SimpleNamespace
from pcsc_safe.demo.hazards import h05_exclusive_lock as hazard
hazard._connect = lambda *arguments: 5
stage.establish = lambda: (None, [])
stage.scard = SimpleNamespace(SCARD_SHARE_EXCLUSIVE=1, SCARD_SHARE_SHARED=2, SCARD_E_X=5)
hazard.program(stage)""")
    assert (seen.reported, seen.exit_status) == ({"owner": {"code": "SCARD_E_X", "killed": True}}, 0), seen.log


# Verdicts.


@pytest.mark.parametrize(
    ("finding", "ending", "verdict"),
    [
        (Finding([], []), {"exit_status": 0}, (UNKNOWN, "it reported too little for a verdict")),
        (Finding([], ["fine"]), {"exit_status": 0}, (SAFE, "fine")),
        (Finding(["bad", "worse"], []), {"exit_status": 0}, (HAZARD, "bad; worse")),
        (Finding(["bad"], ["fine"]), {"exit_status": 0}, (HAZARD, "bad")),
        (Finding([], ["fine"]), {"timed_out": 8.0}, (HAZARD, "did not finish in 8 s")),
        (Finding([], ["fine"]), {"killed_by": 11}, (HAZARD, "the program died of SIGSEGV")),
        (Finding(["bad"], []), {"killed_by": 6}, (HAZARD, "bad; the program died of SIGABRT")),
        (Finding([], []), {"exit_status": 3}, (UNKNOWN, "the program failed with status 3")),
        (Finding(["bad"], []), {"exit_status": 3}, (HAZARD, "bad; the program failed with status 3")),
    ],
)
def test_a_verdict_counts_how_the_program_ended(finding: Finding, ending: Any, verdict: Any) -> None:
    """A program that hung, died or failed is never SAFE, and too few reports give no verdict."""
    assert conclude(finding, Run("scard", {}, **ending)) == verdict


@pytest.mark.parametrize("number", NUMBERS)
def test_nothing_is_said_of_nothing(number: str) -> None:
    """Without reports, a hazard is neither seen nor excluded."""
    (hazard,) = load([number])
    assert hazard.judge(Run("scard", {})) == Finding([], [])


OK = "SCARD_S_SUCCESS"
TEN = {f"child {number}": {"code": OK, "ended": 0} for number in range(10)}
NONE_STUCK = {"calls": 30, "failed": 0, "stuck": 0}
IN_TIME = {"code": OK, "seconds": 0.001}
FOUR = {"wait": {"code": "SCARD_E_CANCELLED"}, **dict.fromkeys(("same context", "other context", "cancel"), IN_TIME)}
WATCHED = {"program": {"watched": 1.5}}
JUDGEMENTS: list[tuple[str, dict[str, dict[str, Any]], list[str], bool]] = [
    # hazard, reports, words that the description of its harm must have, whether it is proven safe
    ("1", {"parent": {"readers": 2, "clients": 1, "child_ended": -11}}, ["child died of SIGSEGV"], False),
    ("1", {"parent": {"readers": 2, "child_ended": 1}, "child": {"code": "SCARD_E_X"}}, ["returned SCARD_E_X"], False),
    (
        "1",
        {
            "parent": {"readers": 2, "clients": 1, "child_ended": 0, "code_afterwards": OK},
            "child": {"code": OK, "readers": 2, "parents_socket": True, "clients": 1},
        },
        ["over its parent's own connection"],
        False,
    ),
    (
        "1",
        {
            "parent": {"readers": 2, "clients": 1, "child_ended": 0, "code_afterwards": OK},
            "child": {"code": OK, "readers": 2, "parents_socket": None, "clients": 2},
        },
        [],
        False,  # the parent's connection was not found, so nothing is known about it
    ),
    (
        "2",
        {"parent 0": {"asked": 3, "wrong": 2, "failed": 1, "ended": 0}},
        ["2 calls returned SCARD_S_SUCCESS and wrong bytes", "1 calls failed"],
        False,
    ),
    ("2", {"parent 0": {"asked": 0, "ended": 0}, "child 0": {"ended": -11}}, ["1 process died of SIGSEGV"], False),
    ("2", {"parent 0": {"asked": 25, "ended": 0}, "child 0": {"asked": 24, "ended": 0}}, [], False),
    ("2", {"parent 0": {"asked": 25, "ended": 0}, "child 0": {"asked": 25, "ended": 0}}, [], True),
    ("5", {"owner": {"code": OK, "killed": True}, "other": {"code": OK, "waited": 0.1, "idle_alive": True}}, [], True),
    (
        "5",
        {"owner": {"code": OK, "killed": True}, "other": {"code": OK, "waited": 0.1, "idle_alive": False}},
        [],
        False,
    ),
    ("5", {"owner": {"code": "SCARD_E_X", "killed": True}, "other": {"code": "SCARD_E_X", "waited": 1.0}}, [], False),
    ("6", {**TEN, "child 3": {"ended": -14}, "parent": NONE_STUCK}, ["1 of 10 children hung"], False),
    ("6", {**TEN, "child 3": {"ended": -11}, "parent": NONE_STUCK}, ["1 of 10 children died"], False),
    ("6", {**TEN, "child 3": {"code": "SCARD_E_X", "ended": 0}, "parent": NONE_STUCK}, ["refused: SCARD_E_X"], False),
    ("6", {**TEN, "parent": {"calls": 30, "failed": 2, "stuck": 1}}, ["2 of the threads' 30 calls", "1 of the"], False),
    ("6", {**TEN, "parent": {"calls": 0, "failed": 0, "stuck": 0}}, [], False),  # no thread was ever busy
    ("6", {**TEN, "child 3": {"ended": 1}, "parent": NONE_STUCK}, [], False),
    ("6", {**TEN, "parent": NONE_STUCK}, [], True),
    ("7", {**FOUR, "cancel": {}, **WATCHED}, ["still frozen after 1.5 s: SCardCancel"], False),
    ("7", {**FOUR, "other context": {"code": "SCARD_E_X"}, **WATCHED}, ["another context returned SCARD_E_X"], False),
    ("7", {**FOUR, "wait": {"code": OK}, **WATCHED}, [], False),  # it did not wait for its end
    ("7", FOUR, [], False),
    ("7", {**FOUR, **WATCHED}, [], True),
    ("9", {"daemon": {"database_received": 51, "database_has_pin": True}}, ["received the PIN"], False),
    ("9", {"daemon": {"database_received": 5, "database_has_pin": False}}, ["received 5 bytes"], False),
    ("9", {"daemon": {"database_received": 0, "database_open": False}}, ["closed the database"], False),
    ("9", {"daemon": {"database_received": 0, "database_open": True, "code_at_last": OK}}, [], False),
    (
        "10",
        {"parent": {"verified": True, "child_ended": 0, "code_afterwards": OK, "verified_afterwards": True}},
        [],
        False,
    ),
    (
        "10",
        {
            "parent": {"verified": True, "child_ended": 0, "code_afterwards": OK, "verified_afterwards": False},
            "child": {"disconnect": OK},
        },
        ["ended the parent's PIN session"],
        False,
    ),
    (
        "11",
        {
            "child": {"calls": 20, "codes": [OK], "failed": 0, "filled": 0, "held_secret": 0},
            "pcscd": {"calls": 20, "codes": [OK], "failed": 0, "filled": 0, "held_secret": 0},
        },
        [],
        False,  # no call failed, so none could show it
    ),
    (
        "11",
        {"child": {"calls": 20, "codes": ["X"], "failed": 20, "filled": 3, "held_secret": 1}},
        ["3 returned memory of the process, 1 of them"],
        False,
    ),
]


@pytest.mark.parametrize(("number", "reported", "harm", "proven"), JUDGEMENTS)
def test_a_judgement_says_what_was_reported(number: str, reported: Any, harm: list[str], proven: bool) -> None:
    """Harm is described with the reported figures; safety is stated only if every needed report is there."""
    (hazard,) = load([number])
    finding = hazard.judge(Run("scard", reported))
    assert bool(finding.harm) == bool(harm)
    assert all(words in "; ".join(finding.harm) for words in harm)
    assert bool(finding.proof) == proven


def test_a_death_is_said_only_of_who_died() -> None:
    """An orderly end, and one that was not observed, give no sentence about a death."""
    assert [death("it", status) for status in (None, 0, 1, -9)] == [[], [], [], ["it died of SIGKILL"]]


# The output.


class Terminal(io.StringIO):
    """A stream that pretends to be a terminal."""

    def isatty(self) -> bool:
        return True


def row(raw: Outcome = HAZARD, safe: Outcome = SAFE) -> _view.Row:
    return _view.Row(load(["5"])[0], Verdict(raw, "raw said this " * 6), Verdict(safe, "safe said that " * 6))


@pytest.mark.parametrize(
    ("stream", "environment", "wanted"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colour_only_where_it_is_wanted(stream: Any, environment: dict[str, str], wanted: bool) -> None:
    """Colour is used only on a terminal, and only if NO_COLOR is empty or unset."""
    assert _view.wants_colour(stream, environment) is wanted


def test_the_table_holds_every_word_and_fits() -> None:
    """Sentences are wrapped, not cut, and no line is longer than the terminal."""
    text = _view.table([row()], "raw", "safe", colour=False, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert (text.count("said this"), text.count("said that")) != (0, 0)
    assert text.split().count("this") == text.split().count("that") == 6
    assert "\033" not in text


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (row(), ["HAZARD:", "SAFE:"]),
        (row(raw=SAFE), ["not seen:", "SAFE:"]),
        (row(safe=HAZARD), ["HAZARD:", "HAZARD:"]),
        (row(safe=UNKNOWN), ["HAZARD:", "UNKNOWN:"]),
    ],
)
def test_the_table_names_outcomes(rows: _view.Row, words: list[str]) -> None:
    """A hazard that raw pyscard did not show is "not seen", not "safe"; an unknown outcome is called unknown."""
    text = _view.table([rows], "raw", "safe", colour=False, width=100)
    assert all(text.count(word) >= words.count(word) for word in words)


def test_live_lines_without_a_terminal() -> None:
    """Written to a file, each hazard is one plain line, written when both runs have ended."""
    stream = io.StringIO()
    live = _view.Live(stream)
    live.begin(row().hazard)
    live.result(False, row().safe)
    assert stream.getvalue() == ""
    live.result(True, row().raw)
    assert stream.getvalue().split()[-2:] == ["HAZARD", "SAFE"]
    assert stream.getvalue().count("\n") == 1


def test_live_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, a hazard's line appears immediately; the results of both runs are added to it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    live = _view.Live(stream)
    live.begin(row().hazard)
    live.result(True, row().raw)
    live.result(False, row().safe)
    states = [state.split()[-2:] for state in stream.getvalue().split("\r\033[K")[1:]]
    assert states == [["...", "..."], ["HAZARD", "..."], ["HAZARD", "SAFE"]]
