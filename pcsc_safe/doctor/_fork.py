"""Findings about forks: what detects one here, what policy ``auto`` chooses, and whether a broker can be started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from .. import policy
from ._ask import TaskResult, plain_environment, run_task
from ._findings import Finding, Status
from ._machine import in_force

__all__ = ["are_possible", "broker", "forks"]

_TIMEOUT = 10.0  # seconds
_PYTHON = "PCSC_SAFE_BROKER_PYTHON"


def are_possible() -> bool:
    """Whether this system has forks."""
    return policy.PLATFORM != "win32"


def forks() -> Iterator[Finding]:
    """Examine what detects a fork here, and what policy ``auto`` chooses."""
    if not are_possible():
        detail = "Windows has no fork: pcsc_safe passes every call through"
        yield Finding("fork.hooks", Status.OK, "forks", detail, data={"forks": False})
        return
    yield from _detection(run_task("detection", _TIMEOUT))
    yield _auto()


def broker(seconds: float, pcsc_works: bool) -> Finding:
    """Start a broker.

    :param seconds: that it may take to start.
    :param pcsc_works: whether it can be asked for a context.
    """
    return _broker(run_task("broker", seconds, *["establish"] * pcsc_works, env=plain_environment(keep=_PYTHON)))


def _detection(reported: TaskResult) -> Iterator[Finding]:
    task = reported.of()
    if not task:
        detail = f"the test of forks failed: the process {reported.failure or 'reported nothing'}"
        remedy = "check that this user may start processes (ulimit -u), and that pcsc_safe can be imported"
        yield Finding("fork.hooks", Status.PROBLEM, "os.fork()", detail, remedy)
        return
    seen = {fork: reported.of(fork).get("noticed_by") for fork in ("os.fork", "C fork")}
    hooks, page = seen["os.fork"] == "hook", seen["C fork"] == "page"
    if hooks:
        yield Finding("fork.hooks", Status.OK, "os.fork()", "detected by Python's at-fork hooks", data={"works": True})
    else:
        remedy = "use CPython 3.9 or later"
        detail = f"Python's at-fork hooks did not run; detected by {seen['os.fork']}"
        yield Finding("fork.hooks", Status.PROBLEM, "os.fork()", detail, remedy, {"works": False})
    yield _page(task, page, seen["C fork"])
    layers = [name for name in _LAYERS if name in seen.values()]
    detail = ", and ".join(_LAYERS[layer] for layer in layers)
    yield Finding("fork.detection", Status.OK, "in use", detail, data={"layers": layers, "noticed_by": seen})


_LAYERS = {"hook": "at-fork hooks", "page": "a page that the kernel wipes", "pid": "os.getpid()"}


def _page(task: dict[str, object], works: bool, noticed_by: object) -> Finding:
    key, what, data = (
        "fork.page",
        "fork() from C",
        {"works": works, "there": task.get("page"), "noticed_by": noticed_by},
    )
    if works:
        return Finding(key, Status.OK, what, "detected by a memory page that the kernel wipes in each child", data=data)
    if noticed_by != "pid":
        detail = f"it is not detected ({noticed_by})"
        return Finding(key, Status.PROBLEM, what, detail, "report this: pcsc_safe is not safe on this machine", data)
    if not sys.platform.startswith("linux"):
        return Finding(key, Status.OK, what, "detected by os.getpid()", data=data)
    detail = "detected by os.getpid() only, which misses a child that has its parent's PID in another PID namespace"
    return Finding(
        key, Status.WARNING, what, detail, "use Linux 4.14 or later, and no emulator that lacks madvise", data
    )


def _auto() -> Finding:
    given = in_force()
    auto = given._replace(policy=policy.Policy.AUTO)
    works = policy.native_works_after_fork()
    way = policy.choose_way(auto, forked=True, native_works=works)
    data = {"chooses": _CALLED[way], "platform": policy.PLATFORM, "policy": given.policy.value}
    data["broker"] = given.broker.value
    data["after_unquiet_fork"] = _CALLED[policy.choose_way(auto, forked=True, native_works=False)]
    if given.broker is policy.Broker.ALWAYS:
        detail = "a broker, because the setting broker is 'always'"
    elif works:
        detail = "a forked child uses PC/SC itself; if it was forked while another thread was inside a PC/SC "
        detail += "call, a broker makes its PC/SC calls"
    else:
        detail = "a broker: on macOS a forked process can't use PC/SC"
    if given.policy is not policy.Policy.AUTO:
        detail += f". Not in use: the policy is {given.policy.value!r}"
    return Finding("policy.auto", Status.OK, "policy 'auto'", detail, data=data)


_CALLED = {policy.Way.NATIVE: "reestablish", policy.Way.BROKER: "broker", policy.Way.NONE: "none"}


def _broker(reported: TaskResult) -> Finding:
    task, python = reported.of(), os.environ.get(_PYTHON) or sys.executable
    data = {"seconds": task.get("seconds"), "python": python, "establish": task.get("establish")}
    if "seconds" in task and "problem" not in task:
        took = f"starts, and replies after {1000 * task['seconds']:.0f} ms"
        code = task.get("establish", reported.failure)
        if code in ("", "SCARD_S_SUCCESS"):
            return Finding("broker", Status.OK, "broker", took, data=data)
        detail, remedy = (
            f"{took}; SCardEstablishContext in the broker: {code}",
            "find out what keeps other processes from using PC/SC",
        )
        return Finding("broker", Status.PROBLEM, "broker", detail, remedy, data)
    if "problem" in task:
        return Finding("broker", Status.PROBLEM, "broker", task["problem"], task["remedy"] or _HELP, data)
    detail = f"can't be started: the process {reported.failure or 'reported nothing'}"
    return Finding("broker", Status.PROBLEM, "broker", detail, _HELP, data)


_HELP = "check that this user may start processes, and that PCSC_SAFE_BROKER_PYTHON, if set, has pcsc_safe"
