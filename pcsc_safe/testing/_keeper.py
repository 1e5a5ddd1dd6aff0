"""The keeper: a small process that owns one pcscd, and outlives the process that started it until it has cleaned up.

Run as a script, never imported for its code: ``python -I -S _keeper.py HOME LINK SYSTEM PARENT COMMAND...``, with its
control connection, a socket that keeps messages apart, as standard input.  It makes the stack's directory HOME, and
starts and kills pcscd (COMMAND) on request.  When PARENT ends, however it ends, the keeper kills pcscd and removes
HOME, and LINK if that points into it.  It imports little, because its start takes most of the time of a stack's start.

Every pcscd writes its process ID to SYSTEM/pcscd.pid, if it may, and removes that file when it ends by itself; but the
file is the system pcscd's.  So pcscd gets a separate mount namespace, in which SYSTEM is a directory in HOME.  If this
isn't permitted, as in most containers and chroots, or SYSTEM doesn't exist, the keeper restores the file as soon as
pcscd has written it, under a lock that all keepers take.  A pcscd that ends by itself later still removes it then.

Invariant: pcscd and the directory exist no longer than this process, and this process no longer than its parent.  A
signal that ends this process does so between two requests: its handler raises nothing, and only wakes the poller.

At a fork of the parent: nothing.  The keeper watches the process that started it, and not only the control connection's
end of file, which a forked child of that process would delay.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

SOCKET_NAME = "pcscd.comm"
LOG_NAME = "pcscd.log"
PID_NAME = "pcscd.pid"
PRIVATE_NAME = "system"
TIMEOUT = 5.0  # seconds that pcscd may take to write its process id


def main(home: str, link: str, system: str, parent: str, *command: str) -> None:
    """Serve one stack; reply "ok" when the directory exists, as if to request 0."""
    ending = note_signals()
    control = socket.socket(fileno=0)
    keeper = Keeper(home, link, system, command)
    try:
        os.mkdir(home, 0o700)
    except OSError as error:
        reply(control, "0", f"error {error}")
        return
    try:
        reply(control, "0", "ok")
        watch(control, ending, keeper, int(parent))
    finally:
        keeper.clean_up()


def note_signals() -> int:
    """Return a descriptor that is readable as soon as a signal has asked this process to end."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    # what the parent ignores or blocks, it hands down
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    return reading


def watch(control: socket.socket, ending: int, keeper: Keeper, parent: int) -> None:
    """Serve the control connection until it ends, a signal arrives, or the parent has ended."""
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(ending, select.POLLIN)
    timeout = watch_parent(poller, parent)
    while os.getppid() == parent:
        ready = [fd for fd, _ in poller.poll(timeout)]
        if ending in ready:
            return
        if control.fileno() not in ready:
            continue
        number, _, request = control.recv(64).decode().partition(" ")
        if request == "start":
            reply(control, number, f"pid {keeper.start()}")
        elif request == "kill":
            keeper.kill()
            reply(control, number, "ok")
        else:
            return


def watch_parent(poller: select.poll, parent: int) -> int | None:
    """Make the poller wake when the parent dies; return how many milliseconds it may sleep between checks."""
    if sys.platform != "linux":
        return 500
    try:
        poller.register(os.pidfd_open(parent), select.POLLIN)
    except (AttributeError, OSError):
        # an old kernel, or a sandbox that refuses the call
        return 500
    return None


def reply(control: socket.socket, number: str, text: str) -> None:
    """Reply to the request with this number, unless the parent has ended."""
    try:
        control.sendall(f"{number} {text}".encode())
    except OSError:
        return


class Keeper:
    """One directory and the pcscd that runs in it."""

    def __init__(self, home: str, link: str, system: str, command: tuple[str, ...]) -> None:
        self.home = home
        self.link = link
        self.system = system
        self.command = command
        self.hidden = False
        self.pid = 0

    def start(self) -> int:
        """Start pcscd on a new listening socket, as systemd would; return its process ID."""
        self.kill()
        path = os.path.join(self.home, SOCKET_NAME)
        if os.path.lexists(path):
            os.unlink(path)
        # closed here once pcscd has it: clients of a dead pcscd must be refused, not queued for ever
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(128)
            if may_write(self.system) and not self.hide_system():
                self.start_and_restore(listener.fileno())
            else:
                self.fork_pcscd(listener.fileno())
        return self.pid

    def hide_system(self) -> bool:
        """Let pcscd start with a private system directory; return whether that is permitted."""
        private = os.path.join(self.home, PRIVATE_NAME)
        if not os.path.isdir(private):
            os.mkdir(private)
            mounted = in_mount_namespace(private, self.system)
            if run(*mounted, "true"):
                self.command = (*mounted, *self.command)
                self.hidden = True
        return self.hidden

    def fork_pcscd(self, listener: int) -> None:
        """Start pcscd, and do nothing else."""
        self.pid = os.fork()
        if not self.pid:
            self.become_pcscd(listener)

    def start_and_restore(self, listener: int) -> None:
        """Start pcscd, and restore the file that it overwrites at its start."""
        path = os.path.join(self.system, PID_NAME)
        lock = os.open(nearest(self.system), os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = content(path)
            self.fork_pcscd(listener)
            deadline = time.monotonic() + TIMEOUT
            while not names(path, self.pid) and not self.has_ended() and time.monotonic() < deadline:
                time.sleep(0.001)
            if names(path, self.pid) or (self.has_ended() and content(path) is None):
                restore(path, before)
        finally:
            os.close(lock)

    def has_ended(self) -> bool:
        """Whether pcscd has ended; it is waited for by `kill`."""
        if sys.platform != "linux":  # the stack runs there alone
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def become_pcscd(self, listener: int) -> NoReturn:
        """In the forked child: set descriptors and environment as for sd_listen_fds(3), then exec."""
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
            os.execvpe(self.command[0], self.command, environment)  # noqa: S606 - our own, or pcscd's absolute path
        except OSError as error:
            os.write(2, f"{self.command[0]}: {error}\n".encode())
        finally:
            os._exit(127)

    def kill(self) -> None:
        """SIGKILL pcscd and wait until it has ended; do nothing if it is not running."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def clean_up(self) -> None:
        """Kill pcscd, and remove what this process has created."""
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


def in_mount_namespace(private: str, system: str) -> tuple[str, ...]:
    """The beginning of a command that sees one directory instead of another, and stays the same process."""
    script = 'mount --bind "$0" "$1" && shift && exec "$@"'
    return ("unshare", "--mount", "--propagation", "slave", "sh", "-c", script, private, system)


def run(*command: str) -> bool:
    """Whether a command succeeds; its output is dropped."""
    null = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_RDWR, 0) for descriptor in range(3)]
    try:
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=null)
    except OSError:
        return False
    return os.waitpid(pid, 0)[1] == 0


def nearest(directory: str) -> str:
    """A directory, or its nearest parent that exists."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    return directory


def may_write(directory: str) -> bool:
    """Whether pcscd, as this user, can write its process ID there."""
    path = os.path.join(directory, PID_NAME)
    return os.access(path if os.path.exists(path) else nearest(directory), os.W_OK)


def content(path: str) -> bytes | None:
    """The content of a file; None if there is no file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def names(path: str, pid: int) -> bool:
    """Whether a process ID file contains this process ID."""
    return (content(path) or b"").split(b"\n")[0] == str(pid).encode()


def restore(path: str, before: bytes | None) -> None:
    """Restore the former content of a file, or remove it if there was none."""
    try:
        if before is None:
            os.unlink(path)
            return
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb") as file:
            file.write(before)
            file.truncate()
    except OSError:
        return  # it is removed already, or the directory is


if __name__ == "__main__":
    main(*sys.argv[1:])
