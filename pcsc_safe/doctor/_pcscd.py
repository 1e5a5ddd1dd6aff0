"""Findings about pcscd: whether it exists, what starts it, whether it accepts this user; readers and cards.

macOS and Windows have no PC/SC daemon with a socket to examine; there the findings are those of PC/SC calls.

Nothing here forks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from .. import policy
from . import _proc
from ._ask import TaskResult, plain_environment, run_task
from ._findings import Finding, Status
from ._machine import library, surroundings

__all__ = ["LOG", "POLKIT", "Service", "service"]

LOG = "see the log of pcscd: journalctl -u pcscd"
_LIMIT = 200  # PCSC_MAX_CONTEXT_THREADS of pcsc-lite
_MANY = 0.9
_UNITS = [f"{place}/systemd/system/pcscd.socket" for place in ("/etc", "/usr/lib", "/lib")]
_INSTALL = "install pcscd (Debian, Ubuntu: sudo apt-get install pcscd; Fedora, Arch, Alpine: pcsc-lite)"
_FROM_OUTSIDE = {
    "container": (
        "give the container pcscd's socket: docker run -v /run/pcscd:/run/pcscd ..., with pcscd running outside; or "
        "run one inside: {start}"
    ),
    "Flatpak app": "run pcscd outside, and flatpak override --user --socket=pcsc {FLATPAK_ID}",
    "snap": "run pcscd outside, and sudo snap connect {SNAP_INSTANCE_NAME}:pcscd; if the snap is not confined: {start}",
}
"""What gives a process pcscd's socket, by what the process runs in."""
_BUS = "/run/dbus/system_bus_socket"
_VERSIONS = "install pcscd and libpcsclite of the same version of pcsc-lite (a container and its host often differ)"
POLKIT = (
    "polkit may allow PC/SC only to users who are logged in at the machine: run as root, log in there, or "
    "add a rule to /etc/polkit-1/rules.d for the actions org.debian.pcsc-lite.access_pcsc and .access_card"
)


class Service(NamedTuple):
    """The state of PC/SC, for further checks.

    :ivar works: whether a context can be established.
    :ivar cards: the readers with a card that responds.
    """

    works: bool
    cards: list[str]


class _Program(NamedTuple):
    path: Optional[str]
    version: str
    directory: str
    asks_polkit: bool


def service(seconds: float) -> Iterator[tuple[list[Finding], Service]]:
    """Examine PC/SC, step by step.

    :param seconds: that each step may take.
    :return: findings, as they are made, each time with the state that is known by then.
    """
    nothing = Service(False, [])
    responds = True
    if policy.PLATFORM not in ("darwin", "win32"):
        program = _program()
        yield [_installed(program)], nothing
        path = os.environ.get("PCSCLITE_CSOCK_NAME") or os.path.join(program.directory, "pcscd.comm")
        found, responds = _socket(path, program, seconds)
        yield found, nothing
    if not responds:
        loaded = run_task("look", seconds, env={**plain_environment(), "PCSCLITE_CSOCK_NAME": os.devnull})
        yield [library(loaded)], nothing
        return
    look = run_task("look", seconds)
    findings = [library(look)]
    if look.of().get("imported") == "ok":
        findings += [_access(look), *_readers(look)]
    states = look.of().get("states", [])
    cards = [name for name, flags, _ in states if "present" in flags and "mute" not in flags]
    yield findings, Service(look.of().get("establish") == "SCARD_S_SUCCESS" and not look.failure, cards)


def _program() -> _Program:
    path = shutil.which("pcscd", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin:/sbin")
    output = ""
    if path:
        try:
            command = [path, "--version"]
            output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            output = ""
    version = re.search(r"version (\S+?)\.?\s", output)
    directory = re.search(r"ipcdir=(\S+)", output)
    asks_polkit = "polkit" in output.split() or not version  # one that can't be asked may
    return _Program(path, version[1] if version else "", directory[1] if directory else "/run/pcscd", asks_polkit)


def _installed(program: _Program) -> Finding:
    what, data = "pcscd", {"path": program.path, "version": program.version}
    if program.path:
        detail = f"pcsc-lite {program.version or 'of unknown version'}, {program.path}"
        return Finding("pcscd.program", Status.OK, what, detail, data=data)
    inside = surroundings()
    if inside:
        detail = f"not installed in this {inside}, which needs none if the socket comes from outside"
        return Finding("pcscd.program", Status.OK, what, detail, data=data)
    return Finding("pcscd.program", Status.WARNING, what, "not installed on this machine", _INSTALL, data)


def _socket(path: str, program: _Program, seconds: float) -> tuple[list[Finding], bool]:
    """The socket of pcscd, and how pcscd responds there; and whether it responds."""
    what, named = "pcscd's socket", bool(os.environ.get("PCSCLITE_CSOCK_NAME"))
    shown = f"{path} (named by PCSCLITE_CSOCK_NAME)" if named else path
    reported = run_task("service", seconds, path, f"{seconds}").of()
    connected = reported.get("connect", "timeout")
    data: dict[str, Any] = {"path": path, "named": named, "connect": connected, "listener": reported.get("listener")}
    if connected != "ok":
        detail, remedy = _not_connected(shown, connected, program, named)
        return [Finding("pcscd.socket", Status.PROBLEM, what, detail, remedy, data)], False
    found = [Finding("pcscd.socket", Status.OK, what, f"{shown}, {_origin(reported.get('listener'))}", data=data)]
    response = reported.get("answer", "timeout")
    found.append(_response_finding(response, reported, program))
    if reported.get("clients"):
        found.append(_clients(reported["clients"]))
    # If pcscd closes the connection, PC/SC calls return a code that says why.  If it doesn't reply, they would hang.
    return found, response != "timeout"


def _not_connected(shown: str, why: str, program: _Program, named: bool) -> tuple[str, str]:
    start, inside = _how_to_start(program), surroundings()
    names = {"FLATPAK_ID": "APP", "SNAP_INSTANCE_NAME": "NAME", **os.environ, "start": start}
    if why == "ENOENT" and named:
        return f"there is no {shown}", f"start the program that creates it, or unset PCSCLITE_CSOCK_NAME; {start}"
    if why == "ENOENT":
        if inside:
            return f"there is no {shown}: no pcscd runs in this {inside}", _FROM_OUTSIDE[inside].format_map(names)
        return f"there is no {shown}: pcscd doesn't run, and no socket activation starts it", start
    if why == "ECONNREFUSED":
        return f"{shown} exists, but no process listens on it: a pcscd that has died left it behind", start
    if why == "EACCES" and inside == "snap":
        return f"this snap may not connect to {shown}", _FROM_OUTSIDE[inside].format_map(names)
    if why == "EACCES":
        return f"this user may not connect to {shown}", "check the permissions of the socket and its directories"
    if why in ("EAGAIN", "timeout"):
        return f"pcscd accepts no connection on {shown}: it hangs", _RESTART
    return f"{shown}: connecting fails with {why}", start


_RESTART = (
    "sudo systemctl restart pcscd, or kill it and start it again; pcscd --foreground --debug shows where it hangs"
)


def _how_to_start(program: _Program) -> str:
    if not program.path:
        return _INSTALL
    if os.path.isdir("/run/systemd/system") and any(map(os.path.exists, _UNITS)):
        return "sudo systemctl enable --now pcscd.socket"
    return f"sudo {program.path}"


def _origin(listener: Optional[int]) -> str:
    """What has created pcscd's socket, by the process that listens on it."""
    name = _proc.name(listener) if listener else ""
    if name == "pcscd":
        return f"of the running pcscd (process {listener})"
    if name == "systemd":
        return "by socket activation: systemd starts pcscd when a client connects"
    if name:
        return f"by socket activation of process {listener} ({name})"
    return "created by a process that is not visible here"


def _response_finding(response: str, reported: dict[str, Any], program: _Program) -> Finding:
    what, data = "pcscd responds", {"answer": response, "protocol": reported.get("protocol")}
    if response == "ok" and not reported.get("result"):
        return Finding("pcscd.answer", Status.OK, what, f"yes, protocol {reported['protocol']}", data=data)
    if response == "ok":
        detail = f"it speaks protocol {reported['protocol']}, and refuses clients of this machine's pcsc-lite"
        return Finding("pcscd.answer", Status.PROBLEM, what, detail, _VERSIONS, data)
    if response == "timeout":
        detail = "it accepts a connection and sends nothing: it hangs, or is stopped"
        return Finding("pcscd.answer", Status.PROBLEM, what, detail, _RESTART, data)
    why, remedy = _refusal(reported.get("listener"), reported.get("clients"), program)
    detail = f"it closes the connection immediately ({response}): {why}. Programs get SCARD_W_SECURITY_VIOLATION or "
    detail += "SCARD_E_NO_SERVICE"
    return Finding("pcscd.answer", Status.PROBLEM, what, detail, remedy, data)


def _refusal(listener: Optional[int], clients: Optional[int], program: _Program) -> tuple[str, str]:
    """Why pcscd closes the connection of this user, as far as that is known, and the remedy.

    polkit never refuses root; but pcscd refuses everybody when it can't ask polkit.
    """
    if clients and clients >= _limit():
        return f"it serves {clients} clients, and accepts no more", "end some of them, or restart pcscd"
    if not listener or not _proc.name(listener):
        remedy = "see its log on the system where it runs; polkit must run there, and must allow this user to use PC/SC"
        return "it refuses this user; its process is not visible here", remedy
    if program.path and not program.asks_polkit:
        return "it accepts no more clients, or fails", LOG
    missing = _missing_for_polkit()
    if missing:
        remedy = (
            f"install and start {missing} (Debian, Ubuntu: apt-get install dbus polkitd), or, where every user may "
        )
        remedy += "use the readers, as in most containers, start pcscd with --disable-polkit (pcsc-lite 2.0 and later)"
        return f"it can't ask polkit who may use PC/SC, because no {missing} runs here", remedy
    if os.geteuid() == 0:
        return "it can't ask polkit, which would allow root, or it accepts no more clients", LOG
    return "polkit refuses this user, or pcscd accepts no more clients", POLKIT


def _missing_for_polkit() -> str:
    """What pcscd needs to ask polkit, and does not run; empty if everything runs, or if that is unknown."""
    if not os.path.exists(_BUS):
        return "dbus-daemon"
    # Where the processes of others are hidden, polkitd would be too.
    if not _proc.name(1) or any(_proc.name(pid) == "polkitd" for pid in _proc.all_pids()):
        return ""
    return "polkitd"


def _clients(clients: int) -> Finding:
    limit = _limit()
    what, data = "pcscd's clients", {"clients": clients - 1, "limit": limit}
    detail = f"{clients - 1} besides the doctor; pcscd serves at most {limit}"
    if clients < _MANY * limit:
        return Finding("pcscd.clients", Status.OK, what, detail, data=data)
    remedy = "find the programs that don't release their contexts, or raise the limit (pcscd --max-thread)"
    return Finding("pcscd.clients", Status.WARNING, what, detail, remedy, data)


def _limit() -> int:
    """The limit of clients: from the command line of the only pcscd that is running, or the default."""
    lines = [_proc.command(pid) for pid in _proc.all_pids() if _proc.name(pid) == "pcscd"]
    for line in lines:
        given = re.search(r"(?:--max-thread[ =]|-t ?)(\d+)", " ".join(line)) if len(lines) == 1 else None
        if given:
            return int(given[1])
    return _LIMIT


def _access(look: TaskResult) -> Finding:
    """Whether this user gets a context."""
    what, key = "PC/SC", "pcsc.access"
    code = look.of().get("establish")
    data = {"establish": code}
    if code == "SCARD_S_SUCCESS":
        return Finding(key, Status.OK, what, "a context can be established", data=data)
    if code is None:
        detail = f"SCardEstablishContext never returned: the process {look.failure}"
        remedy = _RESTART if look.timed_out else "see the system's log; reinstall pyscard and the PC/SC library"
    elif code == "SCARD_E_SERVICE_STOPPED":
        detail = f"SCardEstablishContext returns {code}: libpcsclite doesn't speak the protocol of this pcscd"
        remedy = _VERSIONS
    elif code == "SCARD_E_NO_SERVICE":
        detail = f"SCardEstablishContext returns {code}: PC/SC is not running for this process"
        remedy = _NO_SERVICE.get(policy.PLATFORM, "start pcscd")
    else:
        detail, remedy = f"SCardEstablishContext returns {code}", LOG
    return Finding(key, Status.PROBLEM, what, detail, remedy, data)


_NO_SERVICE = {
    "darwin": "plug a reader in: macOS starts PC/SC with the first one; a forked process can't use PC/SC before exec",
    "win32": "plug a reader in, and check that the service SCardSvr can start",
}


def _readers(look: TaskResult) -> Iterator[Finding]:
    reported = look.of()
    if reported.get("establish") != "SCARD_S_SUCCESS":
        return
    if "list" not in reported:
        detail = f"SCardListReaders never returned: the process {look.failure}"
        yield Finding("readers", Status.PROBLEM, "readers", detail, _RESTART if look.timed_out else LOG)
        return
    readers, code = reported["readers"], reported["list"]
    data = {"readers": readers, "list": code}
    if code not in ("SCARD_E_NO_READERS_AVAILABLE", "SCARD_S_SUCCESS"):
        yield Finding("readers", Status.PROBLEM, "readers", f"SCardListReaders returns {code}", LOG, data)
        return
    if not readers:
        remedy = "plug one in; if lsusb lists it already, install its driver (Debian, Ubuntu: libccid)"
        yield Finding("readers", Status.WARNING, "readers", "there is none", remedy, data)
        return
    yield Finding("readers", Status.OK, "readers", f"{len(readers)}", data=data)
    if "states" not in reported:
        detail = f"SCardGetStatusChange never returned: the process {look.failure}"
        yield Finding("reader", Status.PROBLEM, "cards", detail, _RESTART if look.timed_out else LOG)
        return
    if reported["status"] != "SCARD_S_SUCCESS":
        yield Finding("reader", Status.PROBLEM, "cards", f"SCardGetStatusChange returns {reported['status']}", LOG)
        return
    for name, flags, atr in reported["states"]:
        yield _reader(name, flags, atr)


def _reader(name: str, flags: list[str], atr: str) -> Finding:
    data = {"reader": name, "state": flags, "atr": atr}
    if "mute" in flags:
        detail, remedy = (
            "a card that doesn't respond",
            "check that it is inserted the right way round, and clean its contacts",
        )
    elif "exclusive" in flags:
        detail = f"a card, held exclusively by an application; ATR {atr}"
        remedy = "other applications get SCARD_E_SHARING_VIOLATION until it disconnects, or until it and all children "
        remedy += "that hold its connection end: doctor --pid N lists these children"
    elif "unavailable" in flags:
        detail, remedy = "the reader is unavailable", "unplug it and plug it in again"
    else:
        detail = f"a card{', in use' if 'inuse' in flags else ''}; ATR {atr}" if "present" in flags else "no card"
        return Finding("reader", Status.OK, name, detail, data=data)
    return Finding("reader", Status.WARNING, name, detail, remedy, data)
