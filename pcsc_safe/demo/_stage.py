"""What a hazard program uses: the scard module under test, its report, its forks and their ends.

It runs in a disposable process, started by `_run` as ``python -m pcsc_safe.demo._stage HAZARD SCARD SECONDS``.  Reports
are lines of JSON on descriptor 1, one write each, so the reports of several processes don't mix, and the reports of a
process that crashes later are not lost.

At a fork the child inherits descriptor 1, and the handler of SIGALRM, which dumps the stacks and ends the process.
:meth:`Stage.fork` sets the alarm again.  (``faulthandler.dump_traceback_later`` can't be used here: if it was started
before a fork, a child that starts it again hangs.)
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
from typing import Any, Callable, Optional

__all__ = ["PCSCD", "Stage"]

PCSCD = "PCSC_SAFE_DEMO_PCSCD"
"""The environment variable with the PID of the virtual pcscd, for the hazard program."""


class Stage:
    """The tools of one hazard program.

    :param scard: the module under test.
    :param seconds: after which every process of the program ends itself, in case the demo has ended.
    """

    def __init__(self, scard: Any, seconds: float) -> None:
        self.scard = scard
        self._seconds = seconds
        self.watch()

    def watch(self, seconds: Optional[float] = None) -> None:
        """Set the alarm of this process; if the demo still runs, it ends the process earlier."""
        if hasattr(signal, "setitimer"):  # Windows has none
            signal.setitimer(signal.ITIMER_REAL, seconds or self._seconds)

    def report(self, process: str, **observations: Any) -> None:
        """Report observations of ``process``; a later value replaces an earlier one of the same name."""
        os.write(1, json.dumps([process, observations]).encode() + b"\n")

    def fork(
        self, body: Callable[[], None], fork: Optional[Callable[[], int]] = None, seconds: Optional[float] = None
    ) -> int:
        """Run ``body`` in a forked child, which never returns.

        :param fork: how to fork; by ``os.fork()`` if None.
        :param seconds: after which SIGALRM ends the child.
        :return: the child's PID.
        """
        pid = (fork or os.fork)()
        if pid:
            return pid
        status = 1
        try:
            self.watch(seconds)
            body()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def wait(self, pid: int) -> int:
        """Wait for a child; return its exit status, or the negative number of the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def retrofit(self) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        """For a program that uses pyscard's classes: install pcsc_safe, if it is under test.

        :return: the context manager that such a program enters around the fork of its daemon.
        """
        if self.scard.__name__ != "pcsc_safe.scard":
            return contextlib.nullcontext
        import pcsc_safe

        pcsc_safe.install()
        return pcsc_safe.handover

    def kill_pcscd(self) -> None:
        """Kill the virtual pcscd, as a crash would; return when it has ended."""
        pid = int(os.environ[PCSCD])
        os.kill(pid, signal.SIGKILL)
        while _is_running(pid):
            time.sleep(0.005)

    def name(self, hresult: int) -> str:
        """The PC/SC name of a return code."""
        for name, value in sorted(vars(self.scard).items()):
            if name.startswith(("SCARD_S_", "SCARD_E_", "SCARD_W_", "SCARD_F_")) and value == hresult:
                return str(name)
        return hex(hresult & 0xFFFFFFFF)

    def establish(self) -> tuple[Any, list[str]]:
        """A context, and the readers that it lists.

        :raises RuntimeError: the virtual stack does not work, so nothing can be observed.
        """
        hresult, context = self.scard.SCardEstablishContext(self.scard.SCARD_SCOPE_SYSTEM)
        if hresult == 0:
            hresult, readers = self.scard.SCardListReaders(context, [])
        if hresult:
            raise RuntimeError(f"the hazard could not be set up: {self.name(hresult)}")
        return context, readers

    def connect(self) -> tuple[Any, Any, int]:
        """A context, a shared connection to the card in the first reader, and its protocol.

        :raises RuntimeError: as for :meth:`establish`.
        """
        context, readers = self.establish()
        hresult, card, protocol = self.scard.SCardConnect(
            context, readers[0], self.scard.SCARD_SHARE_SHARED, self.scard.SCARD_PROTOCOL_ANY
        )
        if hresult:
            raise RuntimeError(f"the hazard could not be set up: {self.name(hresult)}")
        return context, card, protocol

    def transmit(self, card: Any, ins: int, data: bytes = b"") -> tuple[int, list[int]]:
        """One command to an EchoCard."""
        command = [0x80, ins, 0, 0, *([len(data), *data] if data else [])]
        hresult, answer = self.scard.SCardTransmit(card, self.scard.SCARD_PCI_T1, command)
        return hresult, answer


def _is_running(pid: int) -> bool:
    """Whether a process that is not our child is running; a zombie is not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main(hazard: str, scard: str, seconds: str) -> int:
    """Run one hazard program."""
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
    program = importlib.import_module(hazard).program
    program(Stage(importlib.import_module(scard), float(seconds)))
    return 0


if __name__ == "__main__":
    # Not sys.exit: at this point the interpreter's own clean-up may wait for a thread that hangs in a PC/SC call.
    _status = 1
    try:
        _status = main(*sys.argv[1:])
    except Exception:
        sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(_status)
