"""``doctor --pid``: which connections to pcscd a running program and its children hold, and which they inherited.

If two processes hold a connection, one of them has made it, and it is a hazard in the other.  pcscd's end of the
connection says which process made it, if this user may look there (SO_PEERCRED; root or pcscd's own user).  Otherwise
the process that has existed longest counts as its creator.  Nothing is sent anywhere, and no process is stopped.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple, Optional

from . import _proc, _sockets
from ._findings import Finding, Status
from ._proc import Process

__all__ = ["examine", "why_invisible"]

_USUAL = "pcscd.comm"
_RUN = "run the program with `python -m pcsc_safe run ...`, or import pcsc_safe.scard instead of smartcard.scard"
_NOT_PYTHON = "let it fork before it first uses PC/SC"
_OUTSIDE = (
    "in a container, run the doctor on its host; elsewhere, see whether a security module (SELinux, AppArmor) protects "
    "the process"
)
_HAZARDS = {
    "2": "both read each other's replies",
    "3": "its cleanup ends the owner's session",
    "4": "the owner's exit ends this process's session",
    "5": "the owner's cards stay locked after the owner has died",
}


class Connection(NamedTuple):
    """A connection to pcscd.

    :ivar holders: the processes that have it, the oldest first.
    :ivar owner: the process that made it.
    :ivar known: whether pcscd's end says so; if not, the oldest holder counts as the owner.
    """

    inode: int
    holders: list[int]
    owner: int
    known: bool


class _Family(NamedTuple):
    processes: dict[int, Optional[Process]]
    connections: dict[int, Connection]
    ends_known: bool
    unseen: int
    dead: frozenset[int]


def examine(pid: int) -> tuple[list[Finding], bool]:
    """Examine a process and its descendants.

    :param pid: of the process.
    :return: the findings, and whether the process itself could be examined.
    :raises ProcessLookupError: there is no such process.
    """
    root = _proc.look(pid)
    if root.network and root.network != os.stat("/proc/self/ns/net").st_ino:
        remedy = f"{'' if _is_root() else 'sudo '}nsenter -t {pid} -n {_command(pid)}"
        detail = f"process {pid} ({root.name}) is in another network namespace, so the doctor can't see where its "
        detail += "sockets lead"
        return [Finding("family", Status.UNKNOWN, "processes", detail, remedy, {"pid": pid})], False
    family = _gather(pid, root)
    findings = [_summary(pid, family)]
    findings += [_finding(each, process, family) for each, process in family.processes.items()]
    return findings, root.sockets is not None or root.is_broker


def why_invisible(pid: int) -> str:
    """Why /proc doesn't show a process: there is none, or /proc is mounted with hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return f"there is no process {pid}"
    return f"this user may not see process {pid}: {_OUTSIDE if _is_root() else f'sudo {_command(pid)}'}"


def _is_root() -> bool:
    return os.geteuid() == 0


def _command(pid: int) -> str:
    return f"{sys.executable} -m pcsc_safe doctor --pid {pid}"


def _gather(pid: int, root: Process) -> _Family:
    processes: dict[int, Optional[Process]] = {}
    for each in _proc.descendants(pid):
        try:
            processes[each] = root if each == pid else _proc.look(each)
        except ProcessLookupError:
            processes[each] = None
    table, ends_known = _sockets.table()
    inodes = _to_pcscd(processes, table)
    holders, unseen = _holders(inodes)
    connections = {inode: _connection(inode, table, holders[inode]) for inode in inodes if holders[inode]}
    dead = frozenset(each.inode for each in table.values() if not each.connected and not each.path)
    return _Family(processes, connections, ends_known, unseen, dead)


def _to_pcscd(processes: dict[int, Optional[Process]], table: dict[int, _sockets.Socket]) -> set[int]:
    """The inodes of the sockets that lead to pcscd."""
    found = set()
    for pid, process in processes.items():
        given = _proc.environment(pid).get("PCSCLITE_CSOCK_NAME", "")
        named = {_USUAL, os.path.basename(os.environ.get("PCSCLITE_CSOCK_NAME") or _USUAL)}
        named |= {os.path.basename(os.path.realpath(given))} if given else set()
        for number, inode in ((process.sockets or {}) if process else {}).items():
            own = table.get(inode)
            if own is None or not own.connected or own.path or inode in found:
                continue
            peer = table.get(own.peer)
            path = peer.path if peer is not None else _sockets.leads_to(pid, number)
            if os.path.basename(path) in named:
                found.add(inode)
    return found


def _holders(inodes: set[int]) -> tuple[dict[int, list[int]], int]:
    """The processes that have these sockets, the oldest first; and how many processes could not be examined."""
    found: dict[int, list[tuple[int, int]]] = {inode: [] for inode in inodes}
    unseen = 0
    for pid in _proc.all_pids() if inodes else ():
        try:
            held = _proc.sockets(pid)
        except ProcessLookupError:
            continue
        unseen += held is None
        for inode in inodes.intersection((held or {}).values()):
            found[inode].append((_proc.started(pid), pid))
    return {inode: [pid for _, pid in sorted(each)] for inode, each in found.items()}, unseen


def _connection(inode: int, table: dict[int, _sockets.Socket], holders: list[int]) -> Connection:
    creator = _connecting_process(table[inode].peer) if inode in table else None
    return Connection(inode, holders, creator or holders[0], creator is not None)


def _connecting_process(other_end: int) -> Optional[int]:
    """The process that made a connection, according to the server's end of it."""
    for pid in _proc.all_pids() if other_end else ():
        if _proc.name(pid) != "pcscd":
            continue
        try:
            numbers = [number for number, inode in (_proc.sockets(pid) or {}).items() if inode == other_end]
        except ProcessLookupError:
            continue
        if numbers:
            return _sockets.connected_by(pid, numbers[0])
    return None


def _summary(pid: int, family: _Family) -> Finding:
    count, connections = len(family.processes), len(family.connections)
    shared = sum(len(each.holders) > 1 for each in family.connections.values())
    data: dict[str, Any] = {"pid": pid, "processes": count, "connections": connections, "shared": shared}
    data["unseen"] = family.unseen
    detail = f"{_counted(count, 'process', 'processes')}, {_counted(connections, 'connection', 'connections')} to pcscd"
    detail += f", {shared} of them held by several processes"
    unsure = not family.ends_known and any(each and each.libpcsclite for each in family.processes.values())
    if unsure and not connections:
        remedy = "modprobe unix_diag" if _is_root() else f"sudo modprobe unix_diag, or sudo {_command(pid)}"
        text = "the doctor can't see where their sockets lead"
        return Finding("family", Status.UNKNOWN, "processes", text, remedy, data)
    if family.unseen:
        unseen = _counted(family.unseen, "process", "processes")
        detail += f"; {unseen} of other users can't be seen, and may also hold some"
    return Finding("family", Status.OK, "processes", detail, data=data)


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _processes_in_words(pids: list[int]) -> str:
    return f"{'process' if len(pids) == 1 else 'processes'} {' and '.join(map(str, pids))}"


def _finding(pid: int, process: Optional[Process], family: _Family) -> Finding:
    if process is None:
        return Finding(
            "process",
            Status.UNKNOWN,
            f"process {pid}",
            "it ended before the doctor could examine it",
            data={"pid": pid},
        )
    what = f"process {pid} ({process.name})"
    data = _data(process, family)
    if process.is_broker:
        detail = "a broker of pcsc_safe: no other process inherits its connections"
        return Finding("process", Status.OK, what, detail, data=data)
    if process.state in "ZX":
        return Finding("process", Status.OK, what, "has ended, but its parent has not yet waited for it", data=data)
    if process.sockets is None:
        remedy = _OUTSIDE if _is_root() else f"sudo {_command(pid)}"
        detail = "this user may not examine it: it belongs to another user, or is protected"
        return Finding("process", Status.UNKNOWN, what, detail, remedy, data)
    inherited = [each for each in _held(process, family) if each.owner != pid]
    if inherited:
        return _verdict(process, family, inherited, what, data)
    return Finding("process", Status.OK, what, _describe_ok(process, family), data=data)


def _held(process: Process, family: _Family) -> list[Connection]:
    return [
        family.connections[inode] for inode in sorted(set((process.sockets or {}).values()) & set(family.connections))
    ]


def _data(process: Process, family: _Family) -> dict[str, Any]:
    numbers = {inode: number for number, inode in (process.sockets or {}).items()}
    return {
        "pid": process.pid,
        "parent": process.parent,
        "name": process.name,
        "readable": process.sockets is not None,
        "libpcsclite": process.libpcsclite,
        "pcsc_safe": process.pcsc_safe,
        "connections": [
            {
                "descriptor": numbers[each.inode],
                "inode": each.inode,
                "owner": each.owner,
                "owner_known": each.known,
                "holders": each.holders,
                "inherited": each.owner != process.pid,
            }
            for each in _held(process, family)
        ],
        "dead_sockets": {str(number): of for number, of in _dead_sockets(process, family).items()},
        "hazards": [],
    }


def _dead_sockets(process: Process, family: _Family) -> dict[int, int]:
    """Descriptors with a dead socket that replaces an ancestor's connection, and the ancestor's PID."""
    dead = {number for number, inode in (process.sockets or {}).items() if inode in family.dead}
    ancestor, found = process, {}
    while dead and ancestor.parent in family.processes and family.processes[ancestor.parent]:
        parent = family.processes[ancestor.parent]
        assert parent is not None
        ancestor = parent
        held = {number for number, inode in (ancestor.sockets or {}).items() if inode in family.connections}
        found.update(dict.fromkeys(dead & held, ancestor.pid))
    return found


def _describe_ok(process: Process, family: _Family) -> str:
    own = _held(process, family)
    parts = [f"{_counted(len(own), 'connection', 'connections')} to pcscd, its own"] if own else []
    also = sorted({pid for each in own for pid in each.holders} - {process.pid})
    parts += [f"also held by {_processes_in_words(also)}"] if also else []
    for owner in sorted(set(_dead_sockets(process, family).values())):
        parts.append(f"a dead socket that replaces process {owner}'s connection: harmless, pcsc_safe put it there")
    if not parts:
        parts.append("no connection to pcscd" + ("" if process.libpcsclite else ", no PC/SC library"))
    parts += [f"pcsc_safe is loaded (shown {_HOW[process.pcsc_safe]})"] if process.pcsc_safe else []
    return "; ".join(parts)


_HOW = {"mark": "by its mark in memory", "environment": "by its environment"}


def _verdict(
    process: Process, family: _Family, inherited: list[Connection], what: str, data: dict[str, Any]
) -> Finding:
    """The finding for a process that holds connections which other processes made."""
    closed = [each for each in inherited if each.owner not in each.holders]
    owners = _processes_in_words(sorted({each.owner for each in inherited}))
    certainty = (
        "" if all(each.known for each in inherited) else " (probably, because that is the oldest process that holds it)"
    )
    guarded = _is_guarded(process, family)
    if guarded and len(closed) == len(inherited):
        detail = f"holds a session that {owners} established and has handed over"
        return Finding("process", Status.OK, what, detail, data=data)
    if guarded:
        data["hazards"] = ["5"]
        detail = f"holds {owners}'s connection{certainty}, and has not used PC/SC since the fork, which ran no hook; "
        detail += f"pcsc_safe closes it at its first PC/SC call. Until then hazard 5: {_HAZARDS['5']}"
        return Finding("process", Status.WARNING, what, detail, "end the process, or let it make a PC/SC call", data)
    numbers = ["4", "5"] if len(closed) == len(inherited) else ["2", "3", "5"] if process.libpcsclite else ["5"]
    data["hazards"] = numbers
    words = "; ".join(_HAZARDS[number] for number in numbers)
    whose = f"holds {owners}'s connection{certainty}"
    if closed:
        whose += ", which that process has closed"
    detail = f"{whose}: {'hazard' if len(numbers) == 1 else 'hazards'} {', '.join(numbers)} ({words})"
    return Finding("process", Status.PROBLEM, what, detail, _RUN if _is_python(process) else _NOT_PYTHON, data)


def _is_guarded(process: Process, family: _Family) -> bool:
    """Whether pcsc_safe is certainly loaded in a process: it has the mark, and the dead socket kept in reserve."""
    return process.pcsc_safe == "mark" and not family.dead.isdisjoint((process.sockets or {}).values())


def _is_python(process: Process) -> bool:
    try:
        program = os.readlink(f"/proc/{process.pid}/exe")
    except OSError:
        return True
    return "python" in os.path.basename(program).lower()
