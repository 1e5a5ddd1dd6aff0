"""``scripts/stacks``: how it reads the tests' output, what it reports where it can't run, and the pages' tables.

And ``scripts/all-pythons --help``, and the option of pytest by which ``scripts/test`` runs two processes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import claimed
from places import PYTHON, ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import stack_results as results
import stack_system as system

GREEN = """\
optional, not installed: pip-uwsgi apt-chromium (.cache/setup has the logs)
== pytest
some output: 99 passed in 1.00s
=========================== short test summary info ============================
SKIPPED [2] tests/hosts/test_host_uwsgi.py:20: uwsgi is not installed
SKIPPED [1] tests/hosts/test_piv.py:5: no card
========== 10 passed, 3 skipped, 5 deselected in 12.34s ===========
== pytest -m long
=========================== short test summary info ============================
SKIPPED [1] tests/hosts/test_host_uwsgi.py:99: uwsgi is not installed
========== 4 passed, 1 skipped, 1 xfailed in 61.00s (0:01:01) ===========
"""

RED = """\
== pytest
=========================== short test summary info ============================
FAILED tests/test_a.py::test_b - AssertionError: no
ERROR tests/test_c.py::test_d
==== 1 failed, 2 passed, 1 error in 3.00s ====
== pytest -m long
tests/whole/test_storm.py ++++++++++ Timeout ++++++++++
  File "/srv/pcsc_safe/tests/whole/test_storm.py", line 364, in test_of_wind
+++++++++++ Timeout +++++++++++
"""


def result(**more: Any) -> dict[str, Any]:
    """A successful result."""
    versions = {"debian": "13.2", "pcsc_lite": "2.3.3", "python": "3.13.5", "pyscard": "2.3.1", "wrapt": "2.0.0"}
    seen = {"demo": "ok", "status": 0, "seconds": 600, "date": "2026-01-31", "log": "a.log", "arguments": []}
    return {"stack": "trixie", **versions, **seen, "tests": results.read_tests(GREEN), **more}


@pytest.mark.parametrize(("option", "status"), [("--help", 0), ("--no-such", 2)])
def test_usage_of_all_pythons(option: str, status: int) -> None:
    """``scripts/all-pythons --help`` prints its usage, and so does an unknown option."""
    script = ROOT / "scripts" / "all-pythons"
    done = subprocess.run([script, option], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == status
    assert "usage: scripts/all-pythons [PYTHON...] [-- PYTEST-ARGUMENT...]" in (done.stderr if status else done.stdout)


def test_counts_and_reasons_of_both_runs_are_added() -> None:
    """Counts and reasons of both runs are added; deselected tests and output of tests are not counted."""
    assert results.read_tests(GREEN) == {
        "passed": 14,
        "failed": 0,
        "errors": 0,
        "skipped": 4,
        "xfailed": 1,
        "skips": {"uwsgi is not installed": 3, "no card": 1},
        "failures": [],
        "lacking": ["pip-uwsgi", "apt-chromium"],
    }


def test_a_run_that_did_not_end_is_a_failure() -> None:
    """A run that did not end is a failure, and so is each failed test; all are named."""
    read = results.read_tests(RED)
    assert (read["passed"], read["failed"], read["errors"]) == (2, 1, 1)
    assert read["failures"] == [
        "FAILED tests/test_a.py::test_b - AssertionError: no",
        "ERROR tests/test_c.py::test_d",
        "test_storm.py::test_of_wind took longer than its limit, and pytest ended; the log has its stacks",
    ]


def test_the_table_for_a_terminal() -> None:
    """The table has a row for each stack; the reasons follow, with their counts."""
    text = results.as_text([result(), {"stack": "sid", "impossible": "there is no network"}])
    assert "14 passed, 0 failed, 4 skipped, 1 xfailed" in text
    assert "skipped 3: uwsgi is not installed" in text
    assert "optional, can't be installed: pip-uwsgi" in text
    assert "sid: there is no network" in text


def test_only_whole_green_runs_are_recorded(tmp_path: Path) -> None:
    """Only complete, successful runs are recorded, and replace older ones; the others are named, with the reason."""
    file, order = tmp_path / "stacks.json", ["bookworm", "trixie", "sid"]
    assert results.record([result(stack="sid"), result()], order, file) == []
    part, red = result(arguments=["tests/core/test_scard.py"]), result(stack="bookworm", status=1)
    absent = {"stack": "sid", "impossible": "there is no network"}
    refused = results.record([part, red, absent, result(stack="sid", debian="sid")], order, file)
    assert refused == [
        "trixie: only some of the tests were run",
        "bookworm: the demo or a test failed",
        "sid: not possible here",
    ]
    assert [(each["stack"], each["debian"]) for each in results.recorded(file)] == [("trixie", "13.2"), ("sid", "sid")]


@pytest.mark.parametrize("page", results.PAGES)
def test_the_table_on_a_page_is_the_recorded_one(page: str) -> None:
    """Only ``scripts/stacks --record`` writes the table."""
    text = (ROOT / page).read_text()
    assert results.with_table(text, results.as_markdown(results.recorded())) == text


def run_stacks(**env: str) -> subprocess.CompletedProcess[str]:
    """Run the script where it can't do anything."""
    command = [sys.executable, str(ROOT / "scripts" / "stacks"), "trixie"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as the script does")
def test_what_the_machine_lacks_is_named() -> None:
    """What is missing is named, with its own exit status."""
    done = run_stacks(PATH="/nonexistent")
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr == "scripts/stacks: not possible here: there is no unshare here\n"


def test_a_stack_that_there_is_not_is_refused() -> None:
    """An unknown stack is refused, and the known ones are named."""
    command = [sys.executable, str(ROOT / "scripts" / "stacks"), "potato"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "there is no stack potato; there are bookworm, trixie, sid" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts in a namespace, as root")
def test_what_has_a_mount_in_it_is_not_deleted(tmp_path: Path) -> None:
    """A directory with a mount in it is not deleted, not even in part."""
    (tmp_path / "here").mkdir()
    (tmp_path / "kept").touch()
    program = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
from stack_system import NotPossible, throw_away
try:
    throw_away(pathlib.Path({str(tmp_path)!r}))
except NotPossible as error:
    print(error)
"""
    mount = f'mount -t tmpfs tmpfs {shlex.quote(str(tmp_path))}/here && exec {PYTHON} -c "$0"'
    command = ["unshare", "--mount", "sh", "-c", mount, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.stderr.startswith(("unshare:", "mount:")):  # in a chroot or a container
        pytest.skip(f"no mount is permitted here: {done.stderr.strip()}")
    assert done.stdout == f"{tmp_path}/here is a mount; unmount it before {tmp_path} can be deleted\n"
    assert (tmp_path / "kept").exists()
    system.throw_away(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_two_processes_share_the_test_files(tmp_path: Path) -> None:
    """With ``--claims`` each file is run by one of them, as a whole, even if they take turns."""
    config = SimpleNamespace(rootpath=ROOT)
    items: Any = [SimpleNamespace(path=ROOT / "tests" / f"{name}.py", config=config) for name in "aabcccdee"]
    mine, theirs = claimed(items, tmp_path), claimed(items, tmp_path)
    ran: list[list[str]] = [[], []]
    for _ in items:
        for number, process in enumerate((mine, theirs)):
            ran[number] += [item.path.stem for item in (next(process, None),) if item]
    assert sorted(ran[0] + ran[1]) == sorted("aabcccdee")
    assert set(ran[0]).isdisjoint(ran[1])
    assert all(ran)
