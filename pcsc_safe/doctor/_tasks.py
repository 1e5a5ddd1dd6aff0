"""What runs in the disposable processes: ``python -m pcsc_safe.doctor._tasks TASK MODULE SECONDS ARGUMENT...``.

A task reports step by step, so that its results before a hang or a crash are known.  It uses the demo's
:class:`~pcsc_safe.demo._stage.Stage`: reports, forks that always end, and an alarm in case the doctor ends first.

Invariant: no task but :func:`touch` calls SCardConnect.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import importlib
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NoReturn, Optional

from ..demo._stage import Stage
from . import _proc, _sockets

__all__ = ["TASKS", "run"]

_VERSION = struct.Struct("=IIiiI")  # pcscd's header (length, command), major, minor, result
_CMD_VERSION, _BODY = 0x11, 12
_NEWEST = (4, 6)  # of the protocol, in pcsc-lite 2.5; a pcscd that wants another one names it


def service(stage: Stage, path: str, seconds: str) -> None:
    """Connect to pcscd as libpcsclite does, and ask for the version of its protocol."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(float(seconds))
        try:
            connection.connect(path)
        except OSError as error:
            stage.report("task", connect=_name(error))
            return
        stage.report("task", connect="ok", listener=_listener(connection))
        stage.report("task", **_handshake(connection), clients=_sockets.accepted(os.path.realpath(path)))


def _listener(connection: socket.socket) -> Optional[int]:
    """The process that made the socket: pcscd, or the one that starts pcscd when a client connects."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def _handshake(connection: socket.socket) -> dict[str, Any]:
    """Agree on a version as libpcsclite does: propose the newest, then the one that pcscd names in its refusal."""
    try:
        named, result = _propose(connection, _NEWEST)
        if result and named[0] == _NEWEST[0]:
            named, result = _propose(connection, named)
    except OSError as error:
        return {"answer": _name(error)}
    except EOFError:
        return {"answer": "hung up"}
    return {"answer": "ok", "protocol": "{}.{}".format(*named), "result": result}


def _propose(connection: socket.socket, version: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Propose a version of the protocol; return the one that pcscd names, and its result for the proposed one.

    :raises EOFError: pcscd closes the connection.
    """
    connection.sendall(_VERSION.pack(_BODY, _CMD_VERSION, *version, 0))
    answer = b""
    while len(answer) < _BODY:
        more = connection.recv(_BODY - len(answer))
        if not more:
            raise EOFError
        answer += more
    major, minor, result = struct.unpack("=iiI", answer)
    return (major, minor), result


def _name(error: OSError) -> str:
    return "timeout" if isinstance(error, socket.timeout) else errno.errorcode.get(error.errno or 0, str(error))


def look(stage: Stage) -> None:
    """What PC/SC lists: readers, and the states of the cards, without a wait and without a connection to a card."""
    scard, imported = _import("smartcard.scard")
    stage.report("task", imported=imported)
    if scard is None:
        return
    stage.scard = scard
    stage.report("task", library=_mapped())
    hresult, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    stage.report("task", establish=stage.name(hresult))
    if hresult:
        return
    hresult, readers = scard.SCardListReaders(context, [])
    stage.report("task", list=stage.name(hresult), readers=list(readers) if not hresult else [])
    if not hresult and readers:
        wanted = [(reader, scard.SCARD_STATE_UNAWARE) for reader in readers]
        hresult, states = scard.SCardGetStatusChange(context, 0, wanted)
        described = [] if hresult else [[name, _flags(scard, state), bytes(atr).hex()] for name, state, atr in states]
        stage.report("task", status=stage.name(hresult), states=described)
    stage.report("task", release=stage.name(scard.SCardReleaseContext(context)))


def _mapped() -> list[str]:
    """The files of the PC/SC library that are mapped into this process."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            paths = {line.rstrip("\n").split(maxsplit=5)[-1] for line in maps}
    except OSError:
        return []
    return sorted(path for path in paths if os.path.basename(path).startswith("libpcsclite"))


_STATES = ("EMPTY", "PRESENT", "EXCLUSIVE", "INUSE", "MUTE", "UNPOWERED", "UNAVAILABLE")


def _flags(scard: Any, state: int) -> list[str]:
    return [name.lower() for name in _STATES if state & int(getattr(scard, f"SCARD_STATE_{name}", 0))]


def load(stage: Stage) -> None:
    """Import what an application imports, and before that what this needs.

    pyscard may crash as it loads the PC/SC library: wrapt is first, so that it isn't blamed for that.
    """
    for name in ("wrapt", "smartcard.scard", "pcsc_safe.scard"):
        stage.report("task", **{name: _import(name)[1]})


def _import(name: str) -> tuple[Any, str]:
    """Import a module; return it, and ``ok`` or how it failed."""
    try:
        return importlib.import_module(name), "ok"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def detection(stage: Stage) -> None:
    """Fork by Python and by C, and check what detects it."""
    from .._core import process  # this process may crash in it

    def child(name: str) -> Callable[[], None]:
        return lambda: stage.report(name, noticed_by=process.current().noticed_by)

    stage.report("task", hooks=process.FORKS, page=process._page is not None)
    stage.wait(stage.fork(child("os.fork")))
    stage.wait(stage.fork(child("C fork"), ctypes.PyDLL(None).fork))


def broker(stage: Stage, establish: str = "") -> None:
    """Start a broker.

    :param establish: if not empty, the broker establishes a context.
    """
    import pcsc_safe

    from ..broker import family  # this process may crash in it

    pcsc_safe.configure(broker="always")
    started = time.monotonic()
    try:
        family.request_catalogue()
        stage.report("task", seconds=round(time.monotonic() - started, 3))
        if not establish:
            return
        stage.scard = importlib.import_module("pcsc_safe.scard")
        hresult, context = stage.scard.SCardEstablishContext(stage.scard.SCARD_SCOPE_SYSTEM)
        stage.report("task", establish=stage.name(hresult))
        if not hresult:
            stage.scard.SCardReleaseContext(context)
    except pcsc_safe.BrokerError as error:
        stage.report("task", problem=error.problem, remedy=error.remedy)


def inherited(stage: Stage) -> None:
    """A context established before a fork, used in the child."""
    _forked(stage)


def c_fork(stage: Stage) -> None:
    """The same after a fork that ran none of Python's hooks."""
    _forked(stage, ctypes.PyDLL(None).fork)


def _forked(stage: Stage, fork: Optional[Callable[[], int]] = None) -> None:
    before = _connections()
    hresult, context = stage.scard.SCardEstablishContext(stage.scard.SCARD_SCOPE_SYSTEM)
    connection = _connections() - before
    stage.report("parent", code=_listed(stage, context) if not hresult else stage.name(hresult), of=len(connection))

    def child() -> None:
        code = _listed(stage, context)
        stage.report("child", code=code, shares=bool(connection & _connections()) if connection else None)

    stage.report("child", ended=stage.wait(stage.fork(child, fork)))
    stage.report("parent", afterwards=_listed(stage, context))


def fresh(stage: Stage) -> None:
    """A context that a forked child establishes."""
    hresult, context = stage.scard.SCardEstablishContext(stage.scard.SCARD_SCOPE_SYSTEM)
    stage.report("parent", code=_listed(stage, context) if not hresult else stage.name(hresult))

    def child() -> None:
        hresult, own = stage.scard.SCardEstablishContext(stage.scard.SCARD_SCOPE_SYSTEM)
        stage.report("child", code=_listed(stage, own) if not hresult else stage.name(hresult))

    stage.report("child", ended=stage.wait(stage.fork(child)))
    stage.report("parent", afterwards=_listed(stage, context))


def _listed(stage: Stage, context: Any) -> str:
    return stage.name(stage.scard.SCardListReaders(context, [])[0])


def _connections() -> set[int]:
    """The connected Unix sockets of this process, by inode; empty if there is no /proc."""
    try:
        own = set((_proc.sockets(os.getpid()) or {}).values())
    except ProcessLookupError:
        return set()
    return {inode for inode, each in _sockets.table()[0].items() if each.connected} & own


def touch(stage: Stage, reader: str) -> None:
    """Connect to a card of the user, and check what a fork does to the connection; no APDU is sent."""
    scard = stage.scard
    hresult, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    if hresult:
        stage.report("parent", connect=stage.name(hresult))
        return
    hresult, card, protocol = scard.SCardConnect(context, reader, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_ANY)
    stage.report("parent", connect=stage.name(hresult), protocol=_protocol(scard, protocol))
    if hresult:
        return

    def child() -> None:
        stage.report("child", inherited=stage.name(scard.SCardStatus(card)[0]))
        code, _ = scard.SCardReconnect(card, scard.SCARD_SHARE_SHARED, protocol, scard.SCARD_LEAVE_CARD)
        stage.report("child", reconnect=stage.name(code), own=stage.name(scard.SCardStatus(card)[0]))
        scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD)

    try:
        stage.report("child", ended=stage.wait(stage.fork(child)))
        stage.report("parent", afterwards=stage.name(scard.SCardStatus(card)[0]))
    finally:
        stage.report("parent", disconnect=stage.name(scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD)))


def _protocol(scard: Any, protocol: int) -> str:
    names = {scard.SCARD_PROTOCOL_T0: "T=0", scard.SCARD_PROTOCOL_T1: "T=1", scard.SCARD_PROTOCOL_RAW: "raw"}
    return names.get(protocol, str(protocol))


TASKS: dict[str, Callable[..., None]] = {
    task.__name__: task for task in (service, look, load, detection, broker, inherited, c_fork, fresh, touch)
}


def run(tasks: Mapping[str, Callable[..., None]], arguments: Sequence[str]) -> NoReturn:
    """Run one of these tasks in this process.

    :param arguments: the task, the scard module or ``""``, the seconds that it may take, and the task's arguments.
    """
    status = 1
    try:
        faulthandler.enable()
        if hasattr(signal, "SIGALRM"):
            faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
        task, module, seconds, *own = arguments
        tasks[task](Stage(importlib.import_module(module) if module else None, float(seconds)), *own)
        status = 0
    except Exception:
        sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(status)  # the interpreter's own clean-up may wait for a thread that hangs in a PC/SC call


if __name__ == "__main__":
    run(TASKS, sys.argv[1:])
