"""Findings about the installation: Python, pyscard, wrapt, the PC/SC library, the settings.

Nothing here forks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Optional

from .. import policy
from ..errors import SettingsError
from ..testing._versions import versions
from ._ask import TaskResult, run_task
from ._findings import Finding, Status

__all__ = ["in_force", "installation", "library", "settings"]

_TIMEOUT = 10.0  # seconds
_LIBRARY = "; if the PC/SC library is missing, install it (Debian, Ubuntu: apt-get install libpcsclite1)"


class _Needed(NamedTuple):
    """A package that pcsc_safe needs.

    :ivar least: its oldest version that works.
    :ivar module: the module of it that is imported.
    :ivar more: what may help besides installing it again.
    """

    least: tuple[int, ...]
    module: str
    more: str = ""


_NEEDED = {"pyscard": _Needed((2, 0, 5), "smartcard.scard", _LIBRARY), "wrapt": _Needed((1, 14), "wrapt")}
_SIGNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Flatpak app": (("/.flatpak-info",), ()),
    "snap": ((), ("SNAP",)),
    "container": (
        ("/.dockerenv", "/run/.containerenv", "/run/systemd/container"),
        ("container", "KUBERNETES_SERVICE_HOST"),
    ),
}
"""What a process may run in, with the files and the variables that show it.  Flatpak also sets $container."""


def installation() -> Iterator[Finding]:
    """Versions, and whether an application can import pcsc_safe and the packages that it needs."""
    installed, load = versions(), run_task("load", _TIMEOUT)
    yield Finding(
        "python",
        Status.OK,
        "Python",
        f"{installed['python']}, {sys.executable}",
        data={"version": installed["python"], "executable": sys.executable},
    )
    inside = surroundings()
    detail = f"{installed['platform']}, in a {inside}" if inside else installed["platform"]
    yield Finding(
        "platform", Status.OK, "platform", detail, data={"platform": installed["platform"], "container": bool(inside)}
    )
    for name, needed in _NEEDED.items():
        yield _package(name, installed[name], needed.least, _imported(load, needed.module))
    yield _pcsc_safe(installed["pcsc_safe"], _imported(load, "pcsc_safe.scard"))


def _imported(load: TaskResult, module: str) -> str:
    """The result of an import in the task ``load``: ``ok``, or how it failed."""
    imported: str = load.of().get(module, load.failure or "nothing was reported")
    return imported


def _pcsc_safe(version: str, imported: str) -> Finding:
    place = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    data = {"version": version, "place": place}
    if imported == "ok":
        return Finding("pcsc_safe", Status.OK, "pcsc_safe", f"{version}, {place}", data=data)
    remedy = f"{sys.executable} -m pip install --force-reinstall pcsc-safe"
    return Finding("pcsc_safe", Status.PROBLEM, "pcsc_safe", f"{version}; can't be imported: {imported}", remedy, data)


def surroundings() -> str:
    """What this process seems to run in, with pcscd usually outside: one of :data:`_SIGNS`, or nothing."""
    for name, (files, variables) in _SIGNS.items():
        if any(map(os.path.exists, files)) or any(map(os.environ.get, variables)):
            return name
    return ""


def _package(name: str, version: str, least: tuple[int, ...], imported: str) -> Finding:
    data, wanted = {"version": version, "imported": imported}, ".".join(map(str, least))
    install = f"{sys.executable} -m pip install"
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if numbers and numbers < least:
        detail = f"{version}; pcsc_safe needs {wanted} or later"
        return Finding(name, Status.PROBLEM, name, detail, f"{install} '{name}>={wanted}'", data)
    if imported == "ok":
        return Finding(name, Status.OK, name, version if numbers else "of unknown version", data=data)
    if not numbers:
        return Finding(
            name, Status.PROBLEM, name, f"{name} is not installed for this Python", f"{install} {name}", data
        )
    remedy = f"{install} --force-reinstall {name}{_NEEDED[name].more}"
    return Finding(name, Status.PROBLEM, name, f"{version}; can't be imported: {imported}", remedy, data)


def library(look: TaskResult) -> Finding:
    """The native library that a process has loaded which imports pyscard.

    :param look: the answer of the task ``look``.
    """
    what, reported = "PC/SC library", look.of()
    failure = reported.get("imported", look.failure or "nothing was reported")
    if failure != "ok":
        remedy = "install PC/SC (Debian, Ubuntu: apt-get install libpcsclite1) and pyscard for this Python"
        return Finding("libpcsclite", Status.PROBLEM, what, f"pyscard can't be imported: {failure}", remedy)
    if not reported.get("library") and policy.PLATFORM != "linux":
        owns = {"darwin": "the PCSC framework of macOS", "win32": "winscard.dll of Windows"}
        return Finding("libpcsclite", Status.OK, what, owns.get(policy.PLATFORM, "the one that pyscard was built for"))
    files = reported.get("library", [])
    if not files:
        detail = "pyscard is imported, but no libpcsclite is mapped into the process"
        return Finding("libpcsclite", Status.UNKNOWN, what, detail)
    packages = {file: _package_of(file) for file in files}
    detail = ", ".join(f"{file} ({package})" if package else file for file, package in packages.items())
    return Finding("libpcsclite", Status.OK, what, detail, data={"files": files, "packages": packages})


def _package_of(file: str) -> Optional[str]:
    """The package that a file comes from, with its version, which libpcsclite itself doesn't report."""
    if shutil.which("dpkg-query"):
        for path in dict.fromkeys((file, file.replace("/usr/lib/", "/lib/", 1))):  # of a merged /usr, either is listed
            package = _output("dpkg-query", "-S", path).partition(": ")[0].partition(",")[0]
            if package:
                return _output("dpkg-query", "-W", "-f", "${Package} ${Version}", package) or None
    for command in (("rpm", "-qf", file), ("apk", "info", "-W", "-q", file), ("pacman", "-Qoq", file)):
        if shutil.which(command[0]):
            return _output(*command) or None
    return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)  # noqa: S603  # ours
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def in_force(environment: Mapping[str, str] = os.environ) -> policy.Settings:
    """The settings of this environment; the defaults if the environment has invalid ones."""
    try:
        return policy.from_environment(environment)
    except SettingsError:
        return policy.Settings()


def settings(environment: Mapping[str, str] = os.environ) -> Finding:
    """The settings of the environment, where each comes from, and what is wrong with them."""
    what, wrong, data, remedies = "settings", [], {}, []
    for name, default in policy.Settings()._asdict().items():
        variable = policy.variable(name)
        given = environment.get(variable)
        data[name] = {"value": _plain(default), "from": variable if given else "default"}
        try:
            data[name]["value"] = _plain(policy.parse(name, given, variable) if given else default)
        except SettingsError as error:
            data[name]["value"] = given
            wrong.append(error.problem)
            remedies.append(f"{variable}: {error.remedy}")
    try:
        policy.from_environment(environment)
    except SettingsError as error:
        if not wrong:
            wrong, remedies = [error.problem], [error.remedy]
    if wrong:
        return Finding("settings", Status.PROBLEM, what, "; ".join(wrong), "; ".join(remedies), data)
    unknown = policy.misspelt(environment)
    if unknown:
        meant = [f"{name}: did you mean {other}?" for name, other in unknown.items() if other]
        detail = f"{', '.join(unknown)}: pcsc_safe ignores it, because no setting has this name"
        remedy = "; ".join(meant) or f"the settings are {', '.join(map(policy.variable, data))}"
        return Finding("settings", Status.WARNING, what, detail, remedy, data)
    return Finding("settings", Status.OK, what, _in_words(data), data=data)


def _in_words(data: Mapping[str, Mapping[str, Any]]) -> str:
    given = [
        f"{name} {each['value']!r} (by {each['from']})" for name, each in data.items() if each["from"] != "default"
    ]
    return f"{', '.join(given)}; the others are the defaults" if given else "the defaults"


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
