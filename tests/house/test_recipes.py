"""The recipes of CONTRIBUTING.md: each addition needs a change in one place.

Each test changes a copy of the package in this place, and looks for the addition wherever users see it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pcsc_safe
from pcsc_safe.testing import VirtualPcsc

PACKAGE = Path(pcsc_safe.__file__).parent
SCRIPTS = PACKAGE.parent / "scripts"


class Copy:
    """A copy of the package that can be changed."""

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        self.directory, self.env = directory, env
        self.first = {"PYTHONPATH": str(directory)}
        shutil.copytree(PACKAGE, directory / "pcsc_safe", ignore=shutil.ignore_patterns("__pycache__"))

    def change(self, module: str, before: str, after: str) -> None:
        """Replace ``before`` with ``after`` in one module."""
        file = self.directory / "pcsc_safe" / module
        text = file.read_text()
        assert text.count(before) == 1, (module, before)
        file.write_text(text.replace(before, after))

    def run(self, *command: str, **variables: str) -> str:
        """The output of ``python command`` with this copy."""
        env = {name: value for name, value in self.env.items() if not name.startswith("PCSC_SAFE_")}
        done = subprocess.run(
            [sys.executable, *command],
            env={**env, **variables, **self.first},
            capture_output=True,
            text=True,
            cwd=self.directory,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path, dict(os.environ))


SAYS = "import pcsc_safe; {0}; print(pcsc_safe.settings().patience)"


def test_a_setting_is_a_row(copy: Copy) -> None:
    """A row of Settings gives a keyword, a variable, an option and a line in the docs' table; its values are parsed."""
    row = '    patience: float = _setting(2.5, "seconds that somebody waits")\n'
    copy.change("policy.py", "    recover: bool = _setting(", f"{row}    recover: bool = _setting(")
    assert copy.run("-c", SAYS.format("pass")) == "2.5\n"
    assert copy.run("-c", SAYS.format("pcsc_safe.configure(patience='7')")) == "7.0\n"
    assert copy.run("-c", SAYS.format("pass"), PCSC_SAFE_PATIENCE="8") == "8.0\n"
    assert "--patience SECONDS" in copy.run("-m", "pcsc_safe", "run", "--help")
    assert copy.run("-m", "pcsc_safe", "run", "--patience", "9", "-c", SAYS.format("pass")) == "9.0\n"
    table = copy.run(str(SCRIPTS / "settings_table.py"))
    names = "`patience`<br>`PCSC_SAFE_PATIENCE`<br>`--patience`"
    assert f"| {names} | a number from 0 to 86400 | `2.5` | seconds that somebody waits | no |" in table


IN_A_CHILD = """
import json, os, sys
import pcsc_safe
from pcsc_safe import scard
_, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    print(json.dumps({call}), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


def test_a_policy_is_a_member_and_its_verdict(copy: Copy, shared_stack: VirtualPcsc) -> None:
    """A member of Policy is a choice of the setting; decide() says what it does."""
    copy.change("policy.py", '    INVALID = "invalid"\n', '    INVALID = "invalid"\n    SILENT = "silent"\n')
    copy.change(
        "policy.py",
        "    if role is Role.CLEANUP:\n",
        "    if settings.policy is Policy.SILENT:\n        return Verdict.SUCCEED\n    if role is Role.CLEANUP:\n",
    )
    asked = IN_A_CHILD.format(call="scard.SCardListReaders(context, [])")
    assert json.loads(copy.run("-c", asked, PCSC_SAFE_POLICY="silent", **shared_stack.env)) == 0
    assert "invalid, silent" in " ".join(copy.run("-m", "pcsc_safe", "run", "--help").split())
    assert "`silent`" in copy.run(str(SCRIPTS / "settings_table.py"))


NEW_FUNCTION = """
import smartcard.scard, smartcard.scard._scard as native
def SCardFrobnicate(hcontext):
    "frobnicates"
    return native.SCardIsValidContext(hcontext)
native.SCardFrobnicate = smartcard.scard.SCardFrobnicate = SCardFrobnicate
"""


def test_a_function_is_a_row(copy: Copy, shared_stack: VirtualPcsc) -> None:
    """A row of CALLS accepts proxies in the owner, and follows the policy in a child."""
    row = '        _context("SCardFrobnicate"),\n'
    copy.change("_core/calls.py", '        _context("SCardCancel", ', f'{row}        _context("SCardCancel", ')
    child = NEW_FUNCTION + IN_A_CHILD.format(call="scard.SCardFrobnicate(context) == scard.SCARD_E_INVALID_HANDLE")
    assert json.loads(copy.run("-c", child, PCSC_SAFE_POLICY="invalid", **shared_stack.env)) is True
    owner = (
        NEW_FUNCTION + "from pcsc_safe import scard\nprint(scard.SCardFrobnicate(scard.SCardEstablishContext(0)[1]))"
    )
    assert copy.run("-c", owner, **shared_stack.env) == "0\n"


def test_a_finding_is_a_key_and_what_yields_it(copy: Copy, shared_stack: VirtualPcsc) -> None:
    """A new finding is printed, also in ``--json``."""
    copy.change("doctor/_findings.py", '    "platform",\n', '    "platform",\n    "weather",\n')
    finding = '    yield Finding("weather", Status.OK, "the weather", "it is fine")\n'
    copy.change("doctor/_machine.py", FIRST_FINDING, finding + FIRST_FINDING)
    env = dict(shared_stack.env)
    told: dict[str, Any] = json.loads(doctor(copy, "--json", **env))
    assert "weather" in [each["key"] for each in told["findings"]]
    assert "it is fine" in doctor(copy, **env)


FIRST_FINDING = "    yield _pcsc_safe("


def doctor(copy: Copy, *options: str, **variables: str) -> str:
    """The doctor's output, whatever it finds."""
    command = [sys.executable, "-m", "pcsc_safe", "doctor", "--no-probe", *options]
    env = {**copy.env, **variables, **copy.first}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, cwd=copy.directory, timeout=60, check=False
    ).stdout


def test_a_hazard_is_a_module(copy: Copy) -> None:
    """A file in demo/hazards is a hazard of the demo."""
    hazards = copy.directory / "pcsc_safe" / "demo" / "hazards"
    first = sorted(hazards.glob("h02*.py"))[0].read_text()
    (hazards / "h99_another.py").write_text(first.replace('"2", ', '"99", ', 1))
    code = "from pcsc_safe.demo.hazards import load; print([hazard.NUMBER for hazard in load()][-1])"
    assert copy.run("-c", code) == "99\n"


def test_an_event_is_a_call_of_record(copy: Copy, shared_stack: VirtualPcsc, tmp_path: Path) -> None:
    """A call of record() puts an event in the report and in the drawing."""
    copy.change(
        "_core/first_call.py",
        "    here = current_epoch()\n",
        '    observer.record("sunrise", hour=6)\n    here = current_epoch()\n',
    )
    picture = tmp_path / "drawn.svg"
    code = "import smartcard.scard as scard; scard.SCardEstablishContext(0)"
    command = [sys.executable, "-m", "pcsc_safe", "run", "--report", f"--timeline={picture}", "-c", code]
    env = {**copy.env, **shared_stack.env, **copy.first}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=copy.directory, timeout=60, check=True)
    assert "sunrise hour=6" in done.stderr
    assert "sunrise" in picture.read_text()
