"""What ``--self-test`` runs in disposable processes; :mod:`_tasks` has the tasks of the rest of the doctor.

Each task does on this machine what pcsc_safe relies on, and reports what it observed, step by step.

Invariant: only :func:`exchange` connects to a card, and what it sends changes nothing there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any, Callable, Optional

from ..demo._stage import Stage
from . import _tasks

assert sys.platform != "win32"  # there are no forks

__all__ = ["TASKS"]

_PASSED = 100
_CHILDREN = 8
_TIMEOUT = 5.0  # s
_PROC_PIDTBSDINFO, _BSDINFO_SIZE = 3, 136  # sys/proc_info.h of macOS
_NEW_READERS = "\\\\?PnP?\\Notification"
_GET_RESPONSE = [0x00, 0xC0, 0x00, 0x00, 0x00]  # asks for the rest of an answer, and there is none


def passing(stage: Stage) -> None:
    """Pass sockets, and check which of them work: closed by their sender before they are received, and after."""
    early = sum(not _socket_works(close_early=True) for _ in range(_PASSED))
    stage.report("task", passed=_PASSED, dead_if_closed_early=early)
    stage.report("task", dead_if_kept=sum(not _socket_works(close_early=False) for _ in range(_PASSED)))
    near, far = socket.socketpair()
    stage.report("task", buffer=near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
    far.close()


def _socket_works(*, close_early: bool) -> bool:
    door, behind = socket.socketpair()
    ours, theirs = socket.socketpair()
    with door, behind, ours:
        socket.send_fds(door, [b"1"], [theirs.fileno()])
        if close_early:
            theirs.close()
            for end in socket.socketpair():  # the close of any socket may start the kernel's search for what is lost
                end.close()
        _, numbers, _, _ = socket.recv_fds(behind, 1, 1)
        with socket.socket(fileno=numbers[0]) as received:
            theirs.close()
            received.settimeout(_TIMEOUT)
            try:
                ours.send(b"2")
                return received.recv(1) == b"2"
            except OSError:
                return False


def ends(stage: Stage) -> None:
    """Detect the end of a connection and of a process as a broker does, and check what identifies a socket."""
    from .._core import descriptors  # this process may crash in it
    from ..broker import watch  # so it may in this one

    near, far = socket.socketpair()
    far.send(b"unread")
    watching = watch.Watch()
    watching.on_end(near.fileno())
    reports, waiting = _waiting(watching)
    waiting.join(0.2)
    stage.report("task", what_is_sent=[*reports])
    far.close()
    waiting.join(_TIMEOUT)
    stage.report("task", hang_up=reports == [near.fileno()])

    pid = stage.fork(lambda: time.sleep(_TIMEOUT))
    watching = watch.Watch()
    watching.on_exit(pid)
    reports, waiting = _waiting(watching)
    os.kill(pid, signal.SIGKILL)
    waiting.join(_TIMEOUT)
    stage.report("task", exit=reports == [-pid])
    stage.wait(pid)
    stage.report("task", peer=_peer(stage, watch.peer_pid), poll=_poll_reports_hang_up())

    one, other = socket.socketpair()
    before = descriptors.of(one.fileno())
    intact = before.is_intact()
    os.dup2(other.fileno(), one.fileno())
    stage.report("task", identity=intact and not before.is_intact(), flags=_flags())
    stage.wait(stage.fork(lambda: stage.report("task", flags_of_child=_flags())))


def _flags() -> Optional[int]:
    """The flags that macOS' kernel has for this process; they may distinguish a forked from an exec'd process."""
    with contextlib.suppress(AttributeError):
        about = ctypes.create_string_buffer(_BSDINFO_SIZE)
        size = ctypes.CDLL(None).proc_pidinfo(os.getpid(), _PROC_PIDTBSDINFO, ctypes.c_uint64(0), about, len(about))
        return int.from_bytes(about.raw[:4], sys.byteorder) if size > 0 else None
    return None


def _waiting(watching: Any) -> tuple[list[int], threading.Thread]:
    """The next report of a watch, when there is one; and the thread that waits for it."""
    reports: list[int] = []
    waiting = threading.Thread(target=lambda: reports.extend(watching.wait()), daemon=True)
    waiting.start()
    return reports, waiting


def _peer(stage: Stage, peer_pid: Callable[[socket.socket], int]) -> bool:
    """Whether a socket reports the process that made the pair, as a broker asks for it."""
    door, behind = socket.socketpair()

    def child() -> None:
        near, far = socket.socketpair()
        socket.send_fds(door, [b"1"], [far.fileno()])
        near.send(b"2")
        time.sleep(_TIMEOUT)

    pid = stage.fork(child)
    door.close()  # so that the next line ends if the child has failed
    _, numbers, _, _ = socket.recv_fds(behind, 1, 1)
    with socket.socket(fileno=numbers[0]) as received:
        received.recv(1)
        found = peer_pid(received) == pid
    os.kill(pid, signal.SIGKILL)
    stage.wait(pid)
    return found


def _poll_reports_hang_up() -> bool:
    """Whether poll() reports a hang-up if no events are requested."""
    near, far = socket.socketpair()
    poll = select.poll()
    poll.register(near, 0)
    far.close()
    return bool(poll.poll(200))


def brokers(stage: Stage) -> None:
    """One broker for a family: children that connect at the same time, and a broker that is killed."""
    family = _family("always")
    began = time.monotonic()
    family.request_catalogue()
    stage.report("task", first=round(time.monotonic() - began, 3))

    def child() -> None:
        family.request_catalogue()
        os._exit(42)

    began = time.monotonic()
    pids = [stage.fork(child) for _ in range(_CHILDREN)]
    served = sum(stage.wait(pid) == 42 for pid in pids)
    stage.report("task", children=_CHILDREN, served=served, seconds=round(time.monotonic() - began, 3))
    broker = family.get()
    os.kill(broker.helper_pid, signal.SIGKILL)
    family.request_catalogue()
    stage.report("task", after_its_death=family.get() is not broker)


def _family(broker: str) -> Any:
    import pcsc_safe

    from ..broker import family  # this process may crash in it

    pcsc_safe.configure(policy="auto", broker=pcsc_safe.Broker(broker))
    return family


def deaths(stage: Stage) -> None:
    """A client is killed; a child that C code has forked still runs, with copies of its descriptors."""
    family = _family("on-fork")
    read_end, write_end = os.pipe()

    def client() -> None:
        family.request_catalogue()
        broker = family.get().helper_pid
        idle = ctypes.PyDLL(None).fork()
        if idle:
            os.write(write_end, struct.pack("ii", broker, idle))
        time.sleep(4 * _TIMEOUT)

    pid = stage.fork(client)
    os.close(write_end)  # so that the read ends if the client has failed
    broker, idle = struct.unpack("ii", os.read(read_end, 8))
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    stage.wait(pid)
    ended = _ends(broker)
    stage.report("task", broker_ended=ended, seconds=round(time.monotonic() - began, 3))
    os.kill(idle, signal.SIGKILL)


def _ends(pid: int) -> bool:
    """Whether a process that is no longer this process's child ends soon."""
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
        with contextlib.suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
        time.sleep(0.01)
    return False


def events(stage: Stage, broker: str = "") -> None:
    """Wait for an event, and cancel the wait; and report the states of the readers.

    :param broker: ``always``, or empty.
    """
    if broker:
        _family(broker)
    scard = stage.scard
    stage.report("task", negative=scard.SCARD_E_NO_SERVICE < 0)
    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    result = scard.SCardGetStatusChange(context, 0, [(_NEW_READERS, 0)])
    is_unknown = any(state & scard.SCARD_STATE_UNKNOWN for _, state, _ in result[1])
    stage.report("task", new_readers=f"{stage.name(result[0])}{', unknown' if is_unknown else ''}")
    hresult, readers = scard.SCardListReaders(context, [])
    if hresult or not readers:
        return
    states = scard.SCardGetStatusChange(context, 0, [(reader, scard.SCARD_STATE_UNAWARE) for reader in readers])[1]
    stage.report("task", counter=any(state >> 16 for _, state, _ in states))
    known = [(reader, state & ~scard.SCARD_STATE_CHANGED) for reader, state, _ in states]
    results: list[Any] = []

    def wait() -> None:
        results.append(scard.SCardGetStatusChange(context, scard.INFINITE, known)[0])

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.5)
    began = time.monotonic()
    cancelled = stage.name(scard.SCardCancel(context))
    waiting.join(_TIMEOUT)
    ended = stage.name(results[0]) if results else "still waiting"
    stage.report("task", cancel=cancelled, wait=ended, seconds=round(time.monotonic() - began, 3))


def idle(stage: Stage, seconds: str) -> None:
    """Leave a context idle for a while."""
    scard = stage.scard
    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    stage.report("task", before=stage.name(scard.SCardListReaders(context, [])[0]))
    time.sleep(float(seconds))
    stage.report("task", seconds=float(seconds), after=stage.name(scard.SCardListReaders(context, [])[0]))


def exchange(stage: Stage, reader: str, broker: str = "") -> None:
    """Exchange a command with the card in parent, child and parent again.

    :param broker: ``always``, or empty.
    """
    import pcsc_safe

    pcsc_safe.configure(cards="reconnect", broker=pcsc_safe.Broker(broker or "on-fork"))
    scard = stage.scard
    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    connected: Any = scard.SCardConnect(context, reader, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_ANY)
    hresult, card, protocol = connected
    if hresult:
        stage.report("task", connect=stage.name(hresult))
        return
    pci = {scard.SCARD_PROTOCOL_T0: scard.SCARD_PCI_T0, scard.SCARD_PROTOCOL_T1: scard.SCARD_PCI_T1}.get(protocol)

    def status() -> Optional[str]:
        hresult, response = scard.SCardTransmit(card, pci, _GET_RESPONSE)
        return bytes(response[-2:]).hex() if not hresult and len(response) >= 2 else stage.name(hresult)

    try:
        stage.report("task", parent=status())
        stage.wait(stage.fork(lambda: stage.report("task", child=status())))
        stage.report("task", parent_again=status())
    finally:
        scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD)


TASKS: dict[str, Callable[..., None]] = {
    task.__name__: task for task in (passing, ends, brokers, deaths, events, idle, exchange)
}


if __name__ == "__main__":
    _tasks.run(TASKS, sys.argv[1:])
