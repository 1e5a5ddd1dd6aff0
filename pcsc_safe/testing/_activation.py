"""Sets the path by which libpcsclite, in this process, finds the active stack.

libpcsclite reads PCSCLITE_CSOCK_NAME once and keeps it for the life of the process.  So that several stacks can follow
each other in one process, the variable names a symbolic link.  The link's path stays the same for the life of the
process, and it points to the socket of the stack that was activated last.

Invariant: the link exists only while a stack is active, and only the process that made it changes it.

At a fork: the child continues to use the parent's path, and changes nothing.  A stack that the child starts gets a new
path, which helps only if the process had not used PC/SC before it forked.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import Optional

from . import _slots
from ._daemon import short_temporary_path

VARIABLE = "PCSCLITE_CSOCK_NAME"


@dataclass(frozen=True, eq=False)
class Active:
    """One activation of a stack; another one of the same stack is not equal.

    :ivar path: the stack's socket.
    :ivar slots: how many reader slots the stack's pcscd has; 0 if that does not matter, see :mod:`_slots`.
    """

    path: str
    slots: int


class Switch:
    """The link of one process, and the active stacks; the link points to the last."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.path = short_temporary_path() + ".comm"
        self._lock = threading.Lock()
        self._active: list[Active] = []
        self._before: Optional[str] = None

    def activate(self, stack: Active) -> None:
        """Point the link to a stack's socket, and the environment to the link.

        If this raises, `deactivate` undoes what it has done.

        :raises PcscStackError: libpcsclite of this process can't use this stack.
        """
        with self._lock:
            _slots.maximum.allow(stack.slots, min((each.slots for each in self._active), default=0))
            if not self._active:
                self._before = os.environ.get(VARIABLE)
            self._active.append(stack)
            self._point()
            os.environ[VARIABLE] = self.path

    def deactivate(self, stack: Active) -> None:
        """Undo one `activate`: restore the stack that was active before it, or the original environment."""
        if self.owner != os.getpid():
            return
        with self._lock:
            if stack not in self._active:
                return
            self._active.remove(stack)
            if self._active:
                self._point()
                return
            if os.path.islink(self.path):
                os.unlink(self.path)
            if self._before is None:
                os.environ.pop(VARIABLE, None)
            else:
                os.environ[VARIABLE] = self._before

    def _point(self) -> None:
        fresh = self.path + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)  # of an activation that was interrupted
        os.symlink(self._active[-1].path, fresh)
        os.replace(fresh, self.path)


_switch = Switch()


def switch() -> Switch:
    """Return the `Switch` of this process; a forked child gets a new one."""
    global _switch  # one per process, because libpcsclite's memory is
    if _switch.owner != os.getpid():
        _switch = Switch()
    return _switch
