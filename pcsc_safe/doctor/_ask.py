"""Runs one of the functions of `_tasks` in a disposable process, and says in words how it ended.

This process never imports anything of PC/SC, and never forks; the disposable process may.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Optional

from ..demo._judge import signal_name
from ..testing._disposable import Ended, command_of, run_disposable

__all__ = ["TaskResult", "plain_environment", "run_task", "tasks_at_once"]

_START = 5.0  # seconds that a Python may take to start, on a machine that has much to do


class TaskResult:
    """What a task reported, and how it ended.

    :param done: the disposable process.
    """

    def __init__(self, done: Ended) -> None:
        self._done = done

    def of(self, process: str = "task") -> dict[str, Any]:
        """What a process of the task reported."""
        return self._done.reported.get(process, {})

    @property
    def failure(self) -> str:
        """How the task failed; an empty text if it ended well."""
        if self._done.timed_out is not None:
            return f"did not end in {self._done.timed_out:g} s"
        if self._done.killed_by is not None:
            return f"died of {signal_name(self._done.killed_by)}"
        if self._done.exit_status:
            lines = self._done.log.strip().splitlines()
            return f"failed: {lines[-1] if lines else f'status {self._done.exit_status}'}"
        return ""

    @property
    def timed_out(self) -> bool:
        """Whether it exceeded its time."""
        return self._done.timed_out is not None


def run_task(
    task: str,
    seconds: float,
    *arguments: str,
    module: str = "",
    env: Optional[Mapping[str, str]] = None,
    home: str = "_tasks",
    stop: Optional[threading.Event] = None,
) -> TaskResult:
    """Run a task in a disposable process.

    :param task: the name of a function.
    :param seconds: that it may take, after Python has started.
    :param module: the scard module to use, if any.
    :param env: its environment; if None, this process's without the settings of pcsc_safe.
    :param home: the module of the doctor that has the task.
    :param stop: set it to end the task immediately; then Stopped is raised.
    """
    command = [*command_of(f"pcsc_safe.doctor.{home}"), task, module, f"{seconds + 2 * _START}", *arguments]
    return TaskResult(run_disposable(command, plain_environment() if env is None else env, seconds + _START, stop))


@contextlib.contextmanager
def tasks_at_once(count: int) -> Iterator[Callable[..., Future[TaskResult]]]:
    """A function that calls :func:`run_task` in the background, and returns a future.

    When the block ends, for example because of Ctrl-C, tasks that still run are ended, and others don't begin.

    :param count: of the tasks that run at the same time.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(count) as pool:

        def start(*arguments: Any, **more: Any) -> Future[TaskResult]:
            return pool.submit(run_task, *arguments, stop=stop, **more)

        try:
            yield start
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def plain_environment(keep: str = "") -> dict[str, str]:
    """The environment of this process, without the settings of pcsc_safe.

    :param keep: a setting's variable that stays.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("PCSC_SAFE_") or name == keep}
