"""Makes pcscd look at its readers now.

pcscd looks for cards every 400 ms and sleeps in between.  A signal ends the sleep: SIGUSR1 tells pcscd to look for
serial readers again, which does nothing for vpcd's readers.

Invariant: this only saves time.  If it doesn't work (no /proc, no tgkill) everything takes up to 400 ms longer.

At a fork: nothing.
"""

from __future__ import annotations

import os
import signal

from ._libc import signal_thread


def nudge(pid: int) -> None:
    """Wake the threads of pcscd that sleep.

    :param pid: pcscd's process ID; before pcscd has started completely, the signal would kill it.
    """
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        if _sleeps(pid, thread):
            # kill() would wake that thread, but let another one take the signal
            signal_thread(pid, int(thread), signal.SIGUSR1)


def _sleeps(pid: int, thread: str) -> bool:
    try:
        with open(f"/proc/{pid}/task/{thread}/wchan", encoding="ascii") as file:
            return "nanosleep" in file.read()
    except OSError:
        return False
