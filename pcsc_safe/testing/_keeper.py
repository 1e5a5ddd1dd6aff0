"""The keeper: a small process that owns one pcscd, and outlives the process that wanted it just long enough to tidy up.

Run as a script, never imported for its code: ``python -I -S _keeper.py HOME LINK PARENT COMMAND...``, with its control
connection as standard input.  It makes the stack's directory HOME, starts and kills pcscd (COMMAND) on request, and
when PARENT goes, however it goes, kills pcscd and removes HOME, and LINK if that points into it.  It imports little:
its start is most of what the start of a stack costs.

Invariant: pcscd and the directory exist no longer than this process, and this process no longer than its parent.

At a fork of the parent: nothing.  The keeper watches the process that started it, not only for the control connection's
end of file, which a forked child of that process would hold back.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

SOCKET_NAME = "pcscd.comm"
LOG_NAME = "pcscd.log"


def main(home: str, link: str, parent: str, *command: str) -> None:
    """Serve one stack; answers "ok" when the directory exists."""
    # what the parent ignores or blocks, it hands down
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit())
    control = socket.socket(fileno=0)
    keeper = Keeper(home, link, command)
    try:
        os.mkdir(home, 0o700)
        reply(control, "ok")
        watch(control, keeper, int(parent))
    except OSError as error:
        reply(control, f"error {error}")
    finally:
        keeper.clean_up()


def watch(control: socket.socket, keeper: Keeper, parent: int) -> None:
    """Obey the control connection until it says stop, ends, or the parent is gone."""
    poller = select.poll()
    poller.register(control, select.POLLIN)
    patience = watch_parent(poller, parent)
    while os.getppid() == parent:
        if control.fileno() not in [fd for fd, _ in poller.poll(patience)]:
            continue
        # requests are one byte each, and the next comes only after the answer
        request = control.recv(1)
        if request == b"s":
            reply(control, f"pid {keeper.start()}")
        elif request == b"k":
            keeper.kill()
            reply(control, "ok")
        else:
            return


def watch_parent(poller: select.poll, parent: int) -> int | None:
    """Make the poller wake when the parent dies; returns how many milliseconds it may sleep without looking."""
    try:
        poller.register(os.pidfd_open(parent), select.POLLIN)
    except (AttributeError, OSError):
        # an old kernel, or a sandbox that refuses the call
        return 500
    return None


def reply(control: socket.socket, line: str) -> None:
    """Answer one request; a parent that is gone needs no answer."""
    try:
        control.sendall(line.replace("\n", " ").encode() + b"\n")
    except OSError:
        return


class Keeper:
    """One directory and the pcscd that runs in it."""

    def __init__(self, home: str, link: str, command: tuple[str, ...]) -> None:
        self.home = home
        self.link = link
        self.command = command
        self.pid = 0

    def start(self) -> int:
        """Start pcscd on a fresh listening socket, the way systemd would; returns its process id."""
        self.kill()
        path = os.path.join(self.home, SOCKET_NAME)
        if os.path.lexists(path):
            os.unlink(path)
        # closed here once pcscd has it: clients of a dead pcscd must be refused, not queued for ever
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(128)
            self.pid = os.fork()
            if not self.pid:
                self.become_pcscd(listener.fileno())
        return self.pid

    def become_pcscd(self, listener: int) -> NoReturn:
        """In the forked child: descriptors and environment as sd_listen_fds(3) wants them, then exec."""
        try:
            log = os.open(os.path.join(self.home, LOG_NAME), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(listener, 3)
            os.set_inheritable(3, True)
            environment = {
                "PATH": os.environ.get("PATH", os.defpath),
                "LISTEN_FDS": "1",
                "LISTEN_PID": str(os.getpid()),
                # real USB readers of this machine have no place in a test (pcsc-lite 2.0 and later)
                "PCSCLITE_HP_DROPDIR": os.path.join(self.home, "no-usb-drivers"),
            }
            os.execve(self.command[0], self.command, environment)  # noqa: S606 - the path is absolute
        except OSError as error:
            os.write(2, f"{self.command[0]}: {error}\n".encode())
        finally:
            os._exit(127)

    def kill(self) -> None:
        """SIGKILL pcscd and wait until it is gone; nothing to do when it is not running."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def clean_up(self) -> None:
        """Leave nothing behind."""
        self.kill()
        for link in (self.link, self.link + ".new"):
            try:
                if os.path.dirname(os.readlink(link)) == self.home:
                    os.unlink(link)
            except OSError:
                pass
        for folder, _, files in os.walk(self.home, topdown=False):
            for name in files:
                os.unlink(os.path.join(folder, name))
            os.rmdir(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
