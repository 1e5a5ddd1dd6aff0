"""What /proc says about processes: names, parents, file descriptors, libraries, and the marks that pcsc_safe leaves.

A process may end between two reads, and may belong to another user.  Both cases are distinguished from "there is
nothing".

Nothing here forks.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Optional

__all__ = [
    "Process",
    "all_pids",
    "command",
    "descendants",
    "environment",
    "is_marked",
    "look",
    "name",
    "sockets",
    "started",
]

_BROKER = "pcsc_safe.broker"
_MARK = ("rr", "sr", "rr", "sr")  # of pcsc_safe._core.process, which leaves it where it is imported


class Process(NamedTuple):
    """A process, as /proc shows it.

    :ivar started: when it was started, in clock ticks since the machine was booted.
    :ivar sockets: its sockets' inodes by descriptor; None if this user may not see them.
    :ivar libpcsclite: whether the PC/SC library is mapped into it; None if this user may not see that.
    :ivar pcsc_safe: what shows that pcsc_safe is loaded in it; empty if nothing does.
    :ivar network: the inode of its network namespace; 0 if that is unknown.
    """

    pid: int
    parent: int
    name: str
    state: str
    started: int
    sockets: Optional[dict[int, int]]
    libpcsclite: Optional[bool]
    pcsc_safe: str
    network: int

    @property
    def is_broker(self) -> bool:
        """Whether it is a broker of pcsc_safe."""
        return self.pcsc_safe == "broker"


class _Stat(NamedTuple):
    name: str
    state: str
    parent: int
    started: int


class _Area(NamedTuple):
    """Memory of a process between two addresses, with the kernel's flags for it."""

    start: int
    end: int
    flags: frozenset[str]


def all_pids() -> Iterator[int]:
    """Every process that this user can see."""
    with contextlib.suppress(OSError):
        yield from [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _stat(pid: int) -> Optional[_Stat]:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            before, _, after = file.read().rpartition(")")
    except OSError:
        return None
    fields = after.split()
    return _Stat(before.partition("(")[2], fields[0], int(fields[1]), int(fields[19]))


def name(pid: int) -> str:
    """The name of a process; empty if it has ended.  Not its arguments: they may contain a PIN."""
    found = _stat(pid)
    return found.name if found else ""


def started(pid: int) -> int:
    """When a process was started, in clock ticks since the machine was booted; 0 if it has ended."""
    found = _stat(pid)
    return found.started if found else 0


def command(pid: int) -> list[str]:
    """The arguments of a process, to search for known ones; never show them."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return [os.fsdecode(each) for each in file.read().split(b"\0") if each]
    return []


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty if this user may not see it."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        pairs = [os.fsdecode(each).partition("=") for each in file.read().split(b"\0") if each]
        return {name: value for name, _, value in pairs}
    return {}


def descendants(pid: int) -> list[int]:
    """A process and all its descendants, parents first; without the current process, if it is one of them."""
    children: dict[int, list[int]] = {}
    for each in all_pids():
        found = _stat(each)
        if found and each != os.getpid():
            children.setdefault(found.parent, []).append(each)
    family = [pid]
    for each in family:
        family += sorted(children.get(each, []))
    return family


def sockets(pid: int) -> Optional[dict[int, int]]:
    """The inodes of a process's sockets by descriptor; None if this user may not see them.

    :raises ProcessLookupError: it has ended.
    """
    found = {}
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                link = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{number}"))
                if link:
                    found[int(number)] = int(link[1])
    except PermissionError:
        return None
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(pid) from None
    return found


def look(pid: int) -> Process:
    """Everything about a process.

    :raises ProcessLookupError: it has ended.
    """
    found = _stat(pid)
    if found is None:
        raise ProcessLookupError(pid)
    library = _maps_libpcsclite(pid)
    numbers = sockets(pid) if found.state not in "ZX" else {}
    try:
        network = os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        network = 0
    return Process(pid, found.parent, found.name, found.state, found.started, numbers, library, _mark(pid), network)


def _maps_libpcsclite(pid: int) -> Optional[bool]:
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
            return any("/libpcsclite" in line for line in maps)
    except OSError:
        return None


def _mark(pid: int) -> str:
    """What shows that pcsc_safe is loaded in a process: ``broker``, ``mark``, ``environment``, or nothing.

    The environment is no proof: it only says that a Python which imports pyscard gets pcsc_safe.
    """
    if _is_brokers(command(pid)[1:]):
        return "broker"
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps", encoding="utf-8", errors="surrogateescape") as maps:
        if is_marked(maps):
            return "mark"
    given = environment(pid)
    return "environment" if "pcsc_safe/retrofit/site" in given.get("PYTHONPATH", "") else ""


def _is_brokers(arguments: list[str]) -> bool:
    """Whether a program with these arguments is a broker; see `pcsc_safe.broker.start`."""
    if arguments[:1] == ["-c"]:
        return any(f"run_module({_BROKER!r}" in text for text in arguments[1:2])
    if arguments[:2] == ["-S", "-c"]:
        return any(f"from {_BROKER}.__main__" in text for text in arguments[2:3])
    return arguments in (["-m", _BROKER], ["--pcsc-safe-broker"])


def is_marked(smaps: Iterable[str]) -> bool:
    """Whether a process has the pages that pcsc_safe leaves in it; see :mod:`pcsc_safe._core.process`.

    :param smaps: the lines of its /proc/PID/smaps.
    """
    found: list[_Area] = []
    for area in _private_areas(smaps):
        follows = bool(found) and found[-1].end == area.start
        found = [*found, area] if follows else [area]
        if _is_mark(found[-len(_MARK) :]):
            return True
    return False


def _private_areas(smaps: Iterable[str]) -> Iterator[_Area]:
    """The writable private areas that map no file; they may have a name."""
    start = end = 0
    for line in smaps:
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+)", line)
        if head:
            is_private = head.group(3, 4) == ("rw-p", "0")
            start, end = (int(head[1], 16), int(head[2], 16)) if is_private else (0, 0)
        elif end and line.startswith("VmFlags:"):
            yield _Area(start, end, frozenset(line.split()[1:]))


def _is_mark(areas: list[_Area]) -> bool:
    page = os.sysconf("SC_PAGE_SIZE")
    given = [each.flags & {"wf", *_MARK} for each in areas]
    wanted = [{advice, "wf"} if not number else {advice} for number, advice in enumerate(_MARK)]
    return given == wanted and all(each.end - each.start == page for each in areas)
