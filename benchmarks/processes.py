"""Starts the measured processes and their PC/SC stacks, and sends them commands in turns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

from pcsc_safe.testing import EchoCard, VirtualPcsc

__all__ = ["AGAINST", "HERE", "RAW", "SAFE", "WRAPT", "Process", "SlowCard", "by_turns", "environment", "stack"]

HERE = Path(__file__).parent
RAW, WRAPT, SAFE = "raw", "raw, wrapt imported", "safe"
AGAINST = {RAW: "raw pyscard", WRAPT: WRAPT}


def environment(**more: str) -> dict[str, str]:
    """The environment of the measured processes: this process's, with .pyc files and the default settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PCSC_SAFE_") and name != "PYTHONDONTWRITEBYTECODE"
    }
    return {**kept, **more}


class SlowCard(EchoCard):
    """A card that takes as long for a command as a real card.

    :param ms: how long it takes.
    """

    def __init__(self, ms: int) -> None:
        super().__init__()
        self._seconds = ms / 1000

    def apdu(self, command: bytes) -> bytes:
        """Reply to one command, later."""
        time.sleep(self._seconds)
        return super().apdu(command)


def stack(undo: contextlib.ExitStack, readers: int = 1, card: Callable[[], EchoCard] = EchoCard) -> dict[str, str]:
    """Start a PC/SC stack; return the environment for processes that use it."""
    running = undo.enter_context(VirtualPcsc(readers, [card() for _ in range(readers)], activate=False))
    return environment(PCSCLITE_CSOCK_NAME=running.env["PCSCLITE_CSOCK_NAME"])


class Process:
    """A process that measures on command.

    :param variant: one of the program's.
    :param env: its environment.
    :param program: worker.py or pools.py.
    """

    def __init__(self, variant: str, env: dict[str, str], program: str = "worker.py") -> None:
        command = [sys.executable, str(HERE / program), variant]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)

    def ask(self, *command: Any) -> list[float]:
        """Send one command, and return the times."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer: list[float] = json.loads(self._process.stdout.readline())
        return answer


def by_turns(processes: dict[str, Process], command: Sequence[Any], rounds: int) -> list[dict[str, list[float]]]:
    """Send the command to each process once in each round, in an order that changes."""
    names, found = list(processes), []
    for number in range(rounds):
        shift = number % len(names)
        order = names[shift:] + names[:shift]
        found.append({name: processes[name].ask(*command) for name in order})
    return found
