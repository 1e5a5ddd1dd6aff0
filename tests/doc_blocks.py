"""The code blocks of the documentation, and how each is run; tests/house/test_docs.py runs them.

A comment above a block says how it is run::

    <!-- setup: NAME -->            what the block needs, from SETUPS or FILES
    <!-- run by tests/NAME.py -->   this test reads the block from the page, and runs it
    <!-- not run: REASON -->        it can't be run here
    <!-- sample: REASON -->         output, which is never the same

A Python block runs in a new process, as a program whose forked children end with it; warnings are errors.  ``sh -eu``
runs a sh block, with the virtual environment first on PATH, in a directory with nothing but the examples;
``pip install`` checks that the packages are already installed.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from places import PYTHON, ROOT

TIMEOUT = 60

SETUPS = {
    "context": """
from pcsc_safe.scard import *
hresult, context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)
""",
    "reader": """
from smartcard.scard import *
_, _context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)
reader = SCardListReaders(_context, [])[1][0]
SCardReleaseContext(_context)
""",
    "verified": """
from pcsc_safe.scard import *
_, context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)
_, card, _ = SCardConnect(context, SCardListReaders(context, [])[1][0], SCARD_SHARE_SHARED, SCARD_PROTOCOL_ANY)
assert SCardTransmit(card, SCARD_PCI_T1, [0x80, 0x20, 0, 0, 0])[1] == [0x90, 0x00]  # an EchoCard's VERIFY
sign = [0x80, 0x30, 0, 0, 0]  # says whether that was before, in this session
""",
    "daemon": """
import daemon, os, pcsc_safe, sys, time
from pcsc_safe.scard import *
_, context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)
_, card, _ = SCardConnect(context, SCardListReaders(context, [])[1][0], SCARD_SHARE_SHARED, SCARD_PROTOCOL_ANY)
SCardTransmit(card, SCARD_PCI_T1, [0x80, 0x20, 0, 0, 0])
_read, _write = os.pipe()
_context_of_daemon = daemon.DaemonContext
daemon.DaemonContext = lambda files_preserve: _context_of_daemon(
    files_preserve=[*files_preserve, _write], detach_process=True, umask=0o077
)
_fork = os.fork
def _first():
    os.fork = _fork
    pid = _fork()
    if pid:
        os.close(_write)
        said = os.read(_read, 999); assert said == b"verified", said
    return pid
os.fork = _first
def serve():
    hresult, answer = SCardTransmit(card, SCARD_PCI_T1, [0x80, 0x30, 0, 0, 0])
    os.write(_write, b"verified" if answer == [1, 0x90, 0x00] else repr((hresult, answer)).encode())
""",
    "pytest": "",
}
"""The code that runs before a Python block, by the name in its comment."""

AFTER = {"verified": "assert answer == [1, 0x90, 0x00], answer\n"}
"""A condition at the end of a Python block, in each process that reaches it; by the same name."""

FILES = {
    "program": {"program.py": "import smartcard.System\nprint(smartcard.System.readers())\n"},
    "repository": {},
}
"""The files in the directory of a sh block besides the examples."""

_PIP = """#!/bin/sh
'''exec' {python} "$0" "$@"
'''
import importlib.metadata, re, sys
assert sys.argv[1] == "install", sys.argv
for wanted in sys.argv[2:]:
    name = re.match("[A-Za-z0-9-]+", wanted).group()
    importlib.metadata.version(name)  # it is there; and if not, this says so
"""

_WRAPPER = """
import os, sys
_main, _children, _fork_of_os = os.getpid(), [], os.fork
def _counted():
    pid = _fork_of_os()
    if os.getpid() == _main: _children.append(pid)
    return pid
os.fork = _counted
def _run(_path):
    _names = {"__name__": "__main__"}
    try:
        for _each in _path:
            with open(_each) as _file: _code = _file.read()
            exec(compile(_code, _each, "exec"), _names)
    except SystemExit: raise
    except BaseException:
        import traceback; traceback.print_exc(); sys.stderr.flush(); os._exit(1)
    if os.getpid() != _main: os._exit(0)
    _ends = []
    for _pid in _children:
        try: _ends.append(os.waitpid(_pid, 0)[1])
        except ChildProcessError: pass
    if any(_ends): os._exit(1)
_run(sys.argv[1:])
"""


class Block(NamedTuple):
    """A fenced block of code.

    :ivar page: its path relative to the repository.
    :ivar line: its first line.
    :ivar says: the text of the comment above it.
    """

    page: str
    line: int
    language: str
    code: str
    says: str

    @property
    def name(self) -> str:
        """The block's name in a test ID."""
        return f"{self.page}:{self.line}"

    def told(self, word: str) -> str:
        """The text after a word with which the comment begins; "" if it doesn't begin with it."""
        return self.says[len(word) :].strip(" :") if self.says.startswith(word) else ""


def pages() -> list[Path]:
    """All pages."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks() -> list[Block]:
    """All blocks, in the order of the pages."""
    found = []
    for page in pages():
        above = ""
        for token in MarkdownIt().parse(page.read_text()):
            if token.type == "fence":
                line = token.map[0] + 1 if token.map else 0
                found.append(Block(str(page.relative_to(ROOT)), line, token.info.strip(), token.content, above))
            comment = re.fullmatch(r"<!-- (.*) -->\s*", token.content) if token.type == "html_block" else None
            above = comment.group(1) if comment else ""
    return found


class Ended(NamedTuple):
    """How a block ended."""

    status: int
    output: str


def run(block: Block, env: dict[str, str], directory: Path) -> Ended:
    """Run a Python or sh block; all processes that it started are dead afterwards."""
    script = directory / "block"
    if block.language == "python":
        setup = block.told("setup")
        script.write_text(block.code + AFTER.get(setup, ""))
        (directory / "setup").write_text(SETUPS[setup] if setup else "")
        (directory / "wrapper").write_text(_WRAPPER)
        command = [sys.executable, "-X", "faulthandler", "-W", "error", "-W", "ignore:This process:DeprecationWarning"]
        command += ["wrapper", "setup", "block"]
        if setup == "pytest":
            (directory / "test_block.py").write_text(block.code)
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_block.py"]
    else:
        _furnish(directory, FILES.get(block.told("setup"), {}))
        script.write_text(block.code)
        command = ["sh", "-eu", "block"]
        env = {**env, "PATH": os.pathsep.join([str(directory / "bin"), str(Path(sys.executable).parent), env["PATH"]])}
        env["PIV_PIN"] = "123456"
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\nit did not end in {TIMEOUT} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Ended(process.returncode, output)


def _furnish(directory: Path, files: dict[str, str]) -> None:
    (directory / "examples").symlink_to(ROOT / "examples")
    (directory / "docs").mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    (directory / "bin").mkdir()
    pip = directory / "bin" / "pip"
    pip.write_text(_PIP.format(python=PYTHON))
    pip.chmod(pip.stat().st_mode | stat.S_IXUSR)
