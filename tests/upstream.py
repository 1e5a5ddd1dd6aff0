"""Where pyscard's and pcsc-lite's own programs are, and how they are run, with or without a change of their import.

They are not part of this repository: ``scripts/fetch-upstream`` fetches them into ``.cache/upstream``;
PYSCARD_CHECKOUT or PCSC_CHECKOUT names another copy.  A program is always copied before it is run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Optional, Union

import pytest
from places import ROOT

TIMEOUT = 60


def source(name: str) -> Path:
    """The source tree of ``pyscard`` (the installed version) or ``pcsc-lite``; skips the test if there is none.

    :param name: the name in ``scripts/fetch-upstream``.
    """
    variable = {"pyscard": "PYSCARD_CHECKOUT", "pcsc-lite": "PCSC_CHECKOUT"}[name]
    if os.environ.get(variable):
        return Path(os.environ[variable]).resolve()
    folder = f"pyscard-{importlib.metadata.version('pyscard')}" if name == "pyscard" else name
    found = ROOT / ".cache" / "upstream" / folder
    problem = "" if found.exists() else _fetch(name)
    if problem:
        pytest.skip(f"{name}'s own programs are not here: set {variable} to a checkout of {name}; {problem}")
    return found


def pyscard(part: str) -> Path:
    """A folder of pyscard's package; skips the test if there is none.

    :param part: its path below ``smartcard``.
    """
    root = source("pyscard")
    return next(iter(root.glob(f"src/smartcard/{part}")), root / "smartcard" / part)  # older versions have no src


@functools.cache
def _fetch(name: str) -> str:
    """Fetch it; return the reason if this failed.  A second attempt would fail, too."""
    script = ROOT / "scripts" / "fetch-upstream"
    if not script.exists():
        return f"there is no {script}"
    process = subprocess.Popen(
        [str(script), name],
        env={**os.environ, "PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=2 * TIMEOUT)
    except subprocess.TimeoutExpired:
        errors = f"it took longer than {2 * TIMEOUT} s"
    finally:
        _kill(process)
    return f"{script} could not fetch them:\n{errors[-2000:]}" if process.returncode else ""


def copy(program: Path, folder: Path, *, change: bool) -> Path:
    """Copy a program.

    :param change: import pcsc_safe.scard instead of smartcard.scard; nothing else is changed.
    :return: the copy.
    """
    text = program.read_text(encoding="utf-8")
    if change:
        text, changes = re.subn(r"\bsmartcard\.scard\b", "pcsc_safe.scard", text)
        assert changes, f"{program} does not import smartcard.scard"
    folder.mkdir(exist_ok=True)
    (folder / program.name).write_text(text, encoding="utf-8")
    return folder / program.name


class Outcome(NamedTuple):
    """How a program ended, and its output, in which ``.`` replaces its folder."""

    status: int
    output: str
    errors: str


def run(
    program: Path,
    *arguments: str,
    env: Mapping[str, str],
    when_it_says: str = "",
    do: Optional[Callable[[], object]] = None,
) -> Outcome:
    """Run a program in its own folder, to its end; it and all processes that it started are dead afterwards.

    :param when_it_says: once this is in its output,
    :param do: call this.
    """
    files = [program.parent / name for name in ("output", "errors")]
    with files[0].open("w") as output, files[1].open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-u", "-X", "faulthandler", program.name, *arguments],
            cwd=program.parent,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    try:
        if do is not None:
            _await(process, files[0], when_it_says)
            do()
        process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler dumps the stacks
        process.wait(5)
        raise AssertionError(f"{program.name} hangs:\n{files[0].read_text()}\n{files[1].read_text()}") from None
    finally:
        _kill(process)
    texts = [file.read_text(encoding="utf-8").replace(str(program.parent), ".") for file in files]
    return Outcome(process.returncode, *texts)


def _await(process: subprocess.Popen[bytes], file: Path, words: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while words not in file.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"it never printed {words!r}:\n{file.read_text()}")
        select.select([], [], [], 0.01)  # there is no event for new data in a file


def _kill(process: Union[subprocess.Popen[str], subprocess.Popen[bytes]]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
