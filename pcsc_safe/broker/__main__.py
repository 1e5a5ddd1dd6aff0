"""``python -m pcsc_safe.broker``: a broker.  pcsc_safe starts it; there is no reason to start it by hand.

Before anything native is loaded, the process becomes what a broker has to be: it ignores the terminal's signals, has
one file descriptor, and can't leave a core dump.  Nothing here forks.
"""

from __future__ import annotations

import _socket  # socket imports three times as much
import contextlib
import gc
import importlib.util
import os
import signal
import stat
import sys
import threading
from collections.abc import Sequence
from typing import Optional

from .._core.descriptors import possible_numbers
from .start import DOOR, IGNORED

assert sys.platform != "win32"  # it has no broker

__all__ = ["main"]

_USAGE = """\
usage: python -m pcsc_safe.broker

Makes the PC/SC calls of the process that starts it, and gets its connections over file descriptor 3.
Don't start it yourself: pcsc_safe starts a broker when a process can't use PC/SC itself.
"""
_PR_SET_DUMPABLE = 4  # linux/prctl.h
_PT_DENY_ATTACH = 31  # sys/ptrace.h of macOS
_DESCRIPTORS = 4096


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Serve as a broker until the last client has ended.

    :param arguments: those of the command line if None.
    :return: the exit status, if the broker could not start.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments or not _is_socket(DOOR):
        asked = list(arguments) in (["-h"], ["--help"])
        print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    _stand_alone()
    _leave_no_trace()
    from .._core import readiness, sessions  # not before this process stands alone

    readiness.is_on = sessions.is_on = False
    _leave_out_classes()
    from .. import _gateways  # noqa: F401  # loads the native library, not before this process stands alone
    from .server import Server

    server = Server(_socket.socket(fileno=DOOR))
    threading.Thread(target=int).start()  # if there is no memory for threads, this says so
    _be_silent()
    gc.enable()
    server.run()
    os._exit(0)  # whatever its threads are in; pcscd ends the sessions


def _is_socket(number: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False


def _stand_alone() -> None:
    for ignored in (*IGNORED, signal.SIGUSR1, signal.SIGUSR2):  # a service manager may send these to all processes
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with contextlib.suppress(OSError):
        os.setsid()  # no Ctrl-C, and no hangup, of the terminal
    with contextlib.suppress(OSError):
        os.chdir("/")  # keep nothing busy
    # What C code of the client left open for every program that it execs.
    try:
        numbers = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:  # a chroot without one
        numbers = list(possible_numbers())
    for number in numbers:
        if number > DOOR:
            with contextlib.suppress(OSError):
                os.close(number)


def _leave_no_trace() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if sys.platform.startswith(("linux", "darwin")):
        import ctypes

        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            library.ptrace(_PT_DENY_ATTACH, 0, None, 0)  # no debugger may attach
        else:
            # A core that is piped to a program is not bound by the limit. Nor may others of this user look into us.
            library.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _leave_out_classes() -> None:
    """Keep ``import smartcard.scard`` from also importing pyscard's classes, which a broker doesn't use."""
    package = importlib.util.find_spec("smartcard")
    if package is not None:
        sys.modules["smartcard"] = importlib.util.module_from_spec(package)


def _be_silent() -> None:
    """Write nothing from here on: a traceback could contain data of an APDU."""
    try:
        nowhere = [os.open(os.devnull, os.O_RDWR)]
    except OSError:  # a chroot without one
        nowhere = [*os.pipe()]
    for number in (0, 1, 2):
        os.dup2(nowhere[-1], number)
    for number in nowhere:
        os.close(number)


if __name__ == "__main__":
    sys.exit(main())
