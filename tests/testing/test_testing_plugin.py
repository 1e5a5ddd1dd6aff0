"""The pytest plugin, each time in a new pytest process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT


def run_pytest(folder: Path, source: str, *options: str, **variables: str) -> str:
    """Run a test file in a new pytest; return its output."""
    Path(folder, "test_it.py").write_text(source)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PCSCLITE"))}
    environment.update(PYTHONPATH=str(ROOT), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **variables)
    command = [sys.executable, "-m", "pytest", "-p", "pcsc_safe.testing.plugin", "-rs", "--strict-markers", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_fixtures(tmp_path: Path) -> None:
    """pcsc_stack is new for each test, activated, with a card in each reader; the marker sets the number of readers."""
    source = """
import os
import pytest
from smartcard.scard import *
from pcsc_safe.testing import EchoCard

def count():
    hresult, context = SCardEstablishContext(0)
    names = SCardListReaders(context, [])[1]
    SCardReleaseContext(context)
    return len(names)

def test_default(pcsc_stack, pcsc_card):
    assert count() == len(pcsc_stack.readers) == 2
    assert isinstance(pcsc_card, EchoCard)
    assert pcsc_stack.readers[0].card is pcsc_card
    pcsc_stack.readers[0].remove()

@pytest.mark.pcsc(readers=4)
def test_marked(pcsc_stack):
    assert count() == 4
    assert all(reader.card for reader in pcsc_stack.readers)

def test_fresh(pcsc_stack, pcsc_card):
    assert pcsc_card.resets == 0
    assert pcsc_stack.readers[0].card is pcsc_card

def test_without():
    assert "PCSCLITE_CSOCK_NAME" not in os.environ
"""
    output = run_pytest(tmp_path, source)
    assert "4 passed" in output
    assert "virtual PC/SC stack: pcscd " in output


def test_the_marker_chooses_cards(tmp_path: Path) -> None:
    """Cards are chosen by name, class or function, or left out; each test, also a parametrised one, has its own."""
    source = """
import pytest
from pcsc_safe.testing import EchoCard, VirtualCard

class Mine(VirtualCard):
    def apdu(self, command):
        return bytes([0x90, 0x00])

seen = []

@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.pcsc(cards=[Mine, None, lambda: EchoCard(), "echo"])
def test_cards(pcsc_stack, pcsc_card, number):
    assert [type(reader.card) for reader in pcsc_stack.readers] == [Mine, type(None), EchoCard, EchoCard]
    assert pcsc_card not in seen
    seen.append(pcsc_card)

@pytest.mark.pcsc(3, ["echo"])
def test_fewer_cards_than_readers(pcsc_stack):
    assert [reader.card is not None for reader in pcsc_stack.readers] == [True, False, False]

@pytest.mark.pcsc(cards=[EchoCard()])
def test_a_card_that_others_would_share(pcsc_stack):
    pass

@pytest.mark.pcsc(cards=[lambda: "echo"])
def test_a_function_that_makes_no_card(pcsc_stack):
    pass
"""
    output = run_pytest(tmp_path, source)
    assert "3 passed, 2 errors" in output
    assert "'echo' is not a card; pass a VirtualCard" in output
    assert "doesn't make a card; use 'echo', 'piv', None, or a class or function" in output


def test_the_factory(tmp_path: Path) -> None:
    """The factory starts stacks side by side; each ends with its test."""
    source = """
import os
import pytest
stacks = []

def test_two(pcsc_stack_factory):
    outer = pcsc_stack_factory(cards=["echo"])
    inner = pcsc_stack_factory(readers=1, cards=[], activate=False)
    assert outer.pid != inner.pid
    assert [len(stack.readers) for stack in (outer, inner)] == [1, 1]
    assert inner.readers[0].card is None
    stacks.extend([outer.pid, inner.pid])

def test_they_are_gone():
    for pid in stacks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
"""
    assert "2 passed" in run_pytest(tmp_path, source)


@pytest.mark.parametrize(
    ("source", "logs"),
    [
        ("def test_it(pcsc_stack):\n    assert not pcsc_stack\n", 1),
        ("def test_it(pcsc_stack_factory):\n    assert not [pcsc_stack_factory(), pcsc_stack_factory()]\n", 2),
        ("def test_it(pcsc_stack):\n    pcsc_stack.__exit__(None, None, None)\n    assert not pcsc_stack\n", 0),
    ],
    ids=["one", "two", "closed"],
)
def test_log_of_a_failing_test(tmp_path: Path, source: str, logs: int) -> None:
    """A failing test shows the log of each pcscd that it has started."""
    output = run_pytest(tmp_path, source)
    assert "1 failed" in output
    assert output.count("pcscd's log") == logs
    assert ("daemon ready" in output) == bool(logs)


def test_a_run_that_uses_none_of_it(tmp_path: Path) -> None:
    """The plugin doesn't disturb runs that don't use it: with a pcscd that can't be run, and a fixture of their own."""
    pcscd = tmp_path / "pcscd"
    pcscd.write_text("no program")
    pcscd.chmod(0o755)
    source = """
import pytest

@pytest.fixture
def pcsc_stack():
    return 1

def test_it(pcsc_stack):
    assert pcsc_stack == 2
"""
    output = run_pytest(tmp_path, source, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "1 failed" in output
    assert "can't be run ([Errno 8] Exec format error" in output
    assert "pcscd's log" not in output


def test_skip_where_it_is_not_installed(tmp_path: Path) -> None:
    """If pcscd or vpcd is missing, tests are skipped, and the reason names the packages."""
    source = """
from pcsc_safe.testing import _install
_install._DRIVERS = ()
_install.look.cache_clear()
def test_it(pcsc_stack):
    pass
"""
    output = run_pytest(tmp_path, source)
    assert "1 skipped" in output
    assert "vpcd driver" in output
    assert "apt-get install pcscd vsmartcard-vpcd" in output.replace("\n", " ")


def test_a_pcscd_that_does_not_run(tmp_path: Path) -> None:
    """It fails the tests, which would otherwise be skipped. If it was only too slow once, they run."""
    (tmp_path / "conftest.py").write_text("from pcsc_safe.testing import _install\n_install._SECONDS = 1\n")
    again, pcscd = tmp_path / "again", tmp_path / "pcscd"
    for runs, outcome in ((f"test -e {again}", "1 passed"), ("false", "1 error")):
        pcscd.write_text(f'#!/bin/sh\n{runs} && exec /usr/sbin/pcscd "$@"\n>{again}\nexec sleep 60\n')
        pcscd.chmod(0o755)
        output = run_pytest(tmp_path, "def test_it(pcsc_stack): pass\n", PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert outcome in output


def test_under_run(tmp_path: Path) -> None:
    """``run -m pytest`` works although warnings are errors."""
    (tmp_path / "test_it.py").write_text("def test_it(pcsc_stack): pass\n")
    command = [sys.executable, "-m", "pcsc_safe", "run", "-m", "pytest", "-W", "error::pytest.PytestWarning"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PCSCLITE"))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_errors_of_a_card_fail_the_test(tmp_path: Path) -> None:
    """A bug in a card is an error of the test that used it."""
    source = "def test_it(pcsc_stack, pcsc_card):\n    pcsc_card.errors.append(ValueError('my bug'))\n"
    output = run_pytest(tmp_path, source)
    assert "1 passed, 1 error" in output
    assert "my bug" in output


@pytest.mark.parametrize("module", ["pcsc_safe.testing.plugin", "pcsc_safe.testing"])
def test_import_is_cheap(module: str) -> None:
    """Loading the plugin imports neither pyscard nor any module of the stack."""
    source = f"import pytest, sys; old = set(sys.modules); import {module}; print(sorted(set(sys.modules) - old))"
    command = [sys.executable, "-c", source]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert "smartcard" not in done.stdout
    assert "_stack" not in done.stdout
