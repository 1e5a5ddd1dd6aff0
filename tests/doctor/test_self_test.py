"""``doctor --self-test`` tries what pcsc_safe relies on, here on this machine and on a simulated macOS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
from macos import OnMacos

from pcsc_safe.doctor import _command, _self_test
from pcsc_safe.doctor._ask import TaskResult
from pcsc_safe.doctor._findings import Finding, Status
from pcsc_safe.testing import EchoCard, VirtualPcsc
from pcsc_safe.testing._disposable import Ended
from pcsc_safe.testing._install import Missing, look

on_linux = pytest.mark.skipif(isinstance(look(), Missing), reason="there is no virtual PC/SC stack here")
WAITS = ["waits, raw", "waits", "waits, broker"]


def self_test(env: dict[str, str], *options: str) -> tuple[int, str]:
    """Run it; return the exit status and the output."""
    command = [sys.executable, "-m", "pcsc_safe", "doctor", "--self-test", "--no-probe", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def findings(page: str, may_fail: tuple[str, ...] = ()) -> dict[str, Any]:
    """The data of what was tried, by key; everything succeeded.

    :param may_fail: keys that need not succeed.
    """
    report = page.split("-" * 72)[1].splitlines()
    assert report[1] == "pcsc_safe doctor --self-test"
    assert report[2].startswith("pcsc_safe ")
    told = {}
    for line in report[3:]:
        status, key, rest = line.split(maxsplit=2)
        if key.startswith("self."):
            assert status == "ok" or key in may_fail, line
            told[rest.partition(": ")[0]] = json.loads(rest[rest.index("{") :])
    return told


def test_on_this_machine() -> None:
    """Everything that needs no PC/SC succeeds on every machine, also on a Mac."""
    _, page = self_test({**os.environ, "PCSCLITE_CSOCK_NAME": "/nonexistent"})
    told = findings(page, ("self.cancel", "self.idle"))
    assert {test.what for test in _self_test._TESTS if not test.needs_pcsc} <= {*told}


def test_an_interrupted_test_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the doctor is interrupted, tests that still run are ended, and those that wait for their turn don't begin."""
    monkeypatch.setenv("PCSCLITE_CSOCK_NAME", "/nonexistent")
    quick, *_, slow = _self_test._TESTS
    assert slow.what == "idle context"
    monkeypatch.setattr(_self_test, "_TESTS", [quick, *[slow] * 5])
    found = _self_test.tests(True)
    assert next(found).what == quick.what
    began = time.monotonic()
    found.close()
    assert time.monotonic() - began < _self_test._IDLE / 2


@pytest.mark.long  # it leaves a context idle for 20 s
@on_linux
def test_all_is_well() -> None:
    """With a card, every test of the list runs, and parent and child exchange commands with the card."""
    with VirtualPcsc(1, [EchoCard()], activate=False) as stack:
        status, page = self_test(stack.env, "--touch-cards")
        reader = stack.readers[0].name
    told = findings(page)
    assert status == 0
    assert list(told) == [*[test.what for test in _self_test._TESTS], "card 0", "card 0, broker"]
    assert told["passing sockets"]["dead_if_closed_early"] == 0
    assert all(
        told["ends of connections and processes"][name] for name in ("hang_up", "exit", "peer", "identity", "poll")
    )
    assert {told[wait]["wait"] for wait in WAITS} == {"SCARD_E_CANCELLED"}
    assert not told["waits"]["negative"]
    for card in ("card 0", "card 0, broker"):
        assert len(told[card]["parent"]) == 4
        assert {*told[card].values()} == {told[card]["parent"]}
    assert reader not in page.split("-" * 72)[1]


@pytest.mark.long
@on_linux
def test_on_a_simulated_macos(on_macos: OnMacos) -> None:
    """On the simulated macOS it reports the simulation's behaviour, and pcsc_safe works, also without a card."""
    with VirtualPcsc(1, activate=False) as stack:
        status, page = self_test(on_macos(stack))
    told = findings(page)
    assert status == 0
    assert told["passing sockets"]["dead_if_closed_early"] == told["passing sockets"]["passed"]
    assert told["ends of connections and processes"]["poll"] is False
    assert told["waits"]["negative"]
    assert told["waits, raw"]["counter"] is False
    assert told["waits, raw"]["new_readers"] == "SCARD_S_SUCCESS, unknown"


@pytest.mark.parametrize(
    ("task", "reported", "wrong"),
    [
        ("self.passing", {"dead_if_kept": 3}, "dead if kept: 3, not 0"),
        (
            "self.ends",
            {"what_is_sent": [], "hang_up": True, "exit": True, "peer": False, "identity": True},
            "peer: False",
        ),
        ("self.brokers", {"children": 8, "served": 7, "after_its_death": True}, "served: 7"),
        ("self.brokers", {}, "served: None"),
        ("self.deaths", {"broker_ended": False}, "broker ended: False, not True"),
        ("self.cancel", {"wait": "still waiting"}, "the wait ended with still waiting"),
        ("self.idle", {"before": "SCARD_S_SUCCESS", "after": "SCARD_E_NO_SERVICE"}, "and SCARD_E_NO_SERVICE after"),
    ],
)
def test_what_is_wrong_is_said(task: str, reported: dict[str, Any], wrong: str) -> None:
    """A failure is reported with what was seen; what raw pyscard does is no problem of pcsc_safe."""
    for test in _self_test._TESTS:
        if test.key == task:
            finding = _self_test._finding(test, TaskResult(Ended({"task": reported}, 0)))
            assert wrong in finding.detail
            assert finding.status is (Status.WARNING if test.module == _self_test.RAW else Status.PROBLEM)


def test_the_report_names_nothing_of_the_users() -> None:
    """The report contains no path and no reader name, because it will be published."""
    told = _self_test.report(
        [
            Finding("python", Status.OK, "Python", "/home/alice/python"),
            Finding("reader", Status.OK, "ACS ACR122U 0123456", "present"),
            Finding("broker", Status.OK, "broker", "starts", data={"python": "/home/alice/python", "seconds": 0.1}),
            Finding("self.ends", Status.OK, "ends", "they are told", data={"peer": True}),
        ]
    )
    assert "alice" not in told
    assert "ACR122U" not in told
    assert 'ok       self.ends: ends: they are told {"peer": true}' in told


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("ImportError: /home/alice/app/libx.so: no such file", "ImportError: libx.so: no such file"),
        ('File "/home/al/a b/c.py", line 3', 'File "c.py", line 3'),
        ("can't open '/home/al' or '/home/al/x'", "can't open '~' or 'x'"),
        ("parent/child: 3", "parent/child: 3"),
    ],
)
def test_the_report_names_no_directory(monkeypatch: pytest.MonkeyPatch, said: str, shown: str) -> None:
    """Of a file that a failing process named, the report has the last part only."""
    monkeypatch.setenv("HOME", "/home/al")
    told = _self_test.report([Finding("broker", Status.UNKNOWN, "broker", said, data={"said": f"\n{said}"})])
    line = f"unknown  broker: broker: {shown} "
    assert line + json.dumps({"said": f"\n{shown}"}) in told


def test_it_does_not_go_with_pid(capsys: pytest.CaptureFixture[str]) -> None:
    """``--self-test`` and ``--pid`` exclude each other: ``--pid`` examines a program, not the machine."""
    from pcsc_safe.__main__ import main

    with pytest.raises(SystemExit):
        main(["doctor", "--self-test", "--pid", "1"])
    assert "--self-test" in capsys.readouterr().err
    assert "--self-test" in _command.EPILOG
