"""Hazard 1: establish a context, fork, list the readers in the child.

On macOS the child crashes.  On Linux its call succeeds, but over its parent's connection to pcscd, as the inode of the
socket and the number of pcscd's clients show.
"""

from __future__ import annotations

import contextlib
import os
import platform

from .._judge import Finding, Run, death
from .._stage import Stage

NUMBER, NAME, SECONDS = "1", "the report of 2015: list readers in a forked child", 8.0


def program(stage: Stage) -> None:
    """List the readers in the child, then in the parent."""
    before = _sockets()
    context, readers = stage.establish()
    connection = _sockets() - before
    stage.report("parent", readers=len(readers), clients=_clients())

    def child() -> None:
        hresult, listed = stage.scard.SCardListReaders(context, [])
        shares = bool(connection & _sockets()) if connection else None
        stage.report("child", code=stage.name(hresult), readers=len(listed), parents_socket=shares, clients=_clients())

    stage.report("parent", child_ended=stage.wait(stage.fork(child)))
    hresult, listed = stage.scard.SCardListReaders(context, [])
    stage.report("parent", code_afterwards=stage.name(hresult), readers_afterwards=len(listed))


def _sockets() -> set[str]:
    """Every connected Unix socket of this process, by inode."""
    links = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.add(os.readlink(f"/proc/self/fd/{name}"))
    return links & {f"socket:[{row[6]}]" for row in _connections()}


def _clients() -> int:
    """The connections that the virtual pcscd has accepted."""
    return sum(len(row) == 8 and row[7].rstrip("\n") == os.environ["PCSCLITE_CSOCK_NAME"] for row in _connections())


def _connections() -> list[list[str]]:
    """The connected Unix sockets, as the kernel lists them: ..., state, inode, and the path if it has one."""
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as table:
        return [row for row in (line.split(maxsplit=7) for line in table) if row[5] == "03"]


def judge(run: Run) -> Finding:
    """Shown by the child's death, its failure, or its success over its parent's connection."""
    code, readers, shares, clients = run.of("child", "code", "readers", "parents_socket", "clients")
    expected, before, ended, afterwards = run.of("parent", "readers", "clients", "child_ended", "code_afterwards")
    harm = death("the child", ended)
    if code not in (None, "SCARD_S_SUCCESS"):
        harm.append(f"the child's SCardListReaders returned {code}")
    elif code and shares:
        harm.append(
            f"no crash on {platform.system()}, but the child listed {readers} readers over its parent's own connection "
            f"(pcscd had {before} client before the fork and {clients} then)"
        )
    if afterwards not in (None, "SCARD_S_SUCCESS"):
        harm.append(f"the parent's SCardListReaders returned {afterwards} afterwards")
    whole = ended == 0 and afterwards and readers and readers == expected and shares is False
    own = f"the child listed {readers} readers over its own connection (pcscd had {clients} clients)"
    return Finding(harm, [own, "afterwards the parent listed them over its own connection"] if whole else [])
