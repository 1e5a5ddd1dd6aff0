"""A minimal Debian in a folder, for scripts/stacks: debootstrap creates it, unshare and chroot enter it.  Needs root.

Invariant: a command that runs in the system has its own mount namespace and PID namespace.  Its mounts and its
processes end with it.  So a system that is deleted has no mount in it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR = "http://deb.debian.org/debian"
UPDATES = """deb {mirror} {suite}-updates main
deb {mirror}-security {suite}-security main
"""
ROLLING = ("sid",)  # without updates and security of their own

ENTER = """
set -e
system=$1 shown=$2
shift 2
mount --make-rprivate /
mount --bind "$system" "$system" # a mount point is what a command in it can have a mount namespace of
mount -t proc proc "$system/proc"
mount --rbind /dev "$system/dev"
mount -t tmpfs tmpfs "$system/dev/shm"
mount -t sysfs -o ro sysfs "$system/sys"
mount -t tmpfs tmpfs "$system/run"
mount -t tmpfs tmpfs "$system/tmp"
for folder in $shown; do
    mkdir -p "$system$folder"
    mount --bind "$folder" "$system$folder"
    mount -o remount,bind,ro "$system$folder"
done
set +e
chroot "$system" "$@"
exit $? # not exec: as process 1 this shell also collects what daemons leave
"""
NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]


class NotPossible(Exception):  # noqa: N818 - no error of ours: the machine's, told by name
    """Something is not permitted on this machine, or can't be downloaded; the text says what."""


def apt_get(*arguments: str) -> list[str]:
    """The command for an apt-get that asks no questions."""
    return ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", *arguments]


def check_machine() -> None:
    """Check that systems can be created and entered here; install debootstrap if it is missing.

    :raises NotPossible: systems can't be created or entered.
    """
    if not sys.platform.startswith("linux"):
        raise NotPossible("this is not Linux")
    if os.geteuid() != 0:
        raise NotPossible("this needs root: debootstrap, unshare and chroot do")
    for program in ("unshare", "setpriv", "chroot", "mount", "git"):
        if shutil.which(program) is None:
            raise NotPossible(f"there is no {program} here")
    _check_namespaces()
    _check_debootstrap()


def _check_namespaces() -> None:
    tried = subprocess.run(
        [*NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, timeout=60, check=False
    )
    if tried.returncode != 0:
        raise NotPossible(
            f"unshare: this machine doesn't permit new namespaces, or mounts in them: {tried.stderr.strip()}"
        )


def _check_debootstrap() -> None:
    if shutil.which("debootstrap"):
        return
    if shutil.which("apt-get") is None:
        raise NotPossible("there is no debootstrap here, and no apt-get to install it with")
    install = apt_get("install", "--no-install-recommends", "debootstrap", "debian-archive-keyring")
    for command in (install, apt_get("update"), install):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if shutil.which("debootstrap"):
            return
    raise NotPossible(
        f"there is no debootstrap here, and apt-get can't install it: {last_line(done.stdout + done.stderr)}"
    )


def last_line(text: str) -> str:
    """The last line that isn't empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def throw_away(folder: Path) -> None:
    """Delete a folder, unless something is mounted in it."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if inside := [mount for mount in mounts if Path(mount).is_relative_to(folder)]:
        raise NotPossible(f"{inside[0]} is a mount; unmount it before {folder} can be deleted")
    subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)


class Settings:
    """The settings of this machine for the network, the package registries and Debian; commands in a system need them.

    :ivar env: the environment of a command.
    :ivar shown: the folders that pip's settings name; the system has them at the same place.
    """

    _files = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
    _certificates = Path("/usr/local/share/ca-certificates")  # what an update of Debian's certificates adds to them
    _passed = re.compile(r"PIP_.*|.*_CERT(_.*)?|.*_CERTS(_.*)?|.*_CA_?(BUNDLE|INFO)|SSL_.*|(https?|no|all)_proxy", re.I)
    _apt = re.compile(r"Acquire::(https?|Check-|Retries|ForceIPv|Languages|Max-)")

    def __init__(self) -> None:
        self.env = {name: value for name, value in os.environ.items() if self._passed.fullmatch(name)}
        self.shown = sorted(self._folders_of_pip())
        self.env |= {"HOME": "/root", "LANG": "C.UTF-8", "COLUMNS": "300", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}

    def copy_to(self, system: Path) -> None:
        """Copy the files of the settings to a system."""
        named = [Path(value) for name, value in self.env.items() if "CERT" in name or "CA" in name]
        for file in [*map(Path, self._files), *self._configurations(), *self._certificates.glob("*.crt"), *named]:
            if file.is_file():
                self._copy(file, system / self._place(file).relative_to("/"))
        (system / "etc/apt/apt.conf.d/99this-machine").write_text(self._settings_of_apt())

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)  # what a link leads to

    @staticmethod
    def _place(file: Path) -> Path:
        home = Path.home()
        return Path("/root") / file.relative_to(home) if file.is_relative_to(home) else file

    @staticmethod
    def _configurations() -> list[Path]:
        folders = [Path("/etc/xdg/pip"), Path.home() / ".config/pip", Path.home() / ".pip"]
        return [file for folder in folders if folder.is_dir() for file in folder.iterdir()]

    def _folders_of_pip(self) -> set[str]:
        texts = [file.read_text() for file in [Path("/etc/pip.conf"), *self._configurations()] if file.is_file()]
        texts += [value for name, value in self.env.items() if name.startswith("PIP_")]
        named = {Path(path) for text in texts for path in re.findall(r"(?:^|[\s=]|file://)(/[\w./+-]+)", text)}
        # An index has its files beside it.
        named = {path.parent if path.name == "simple" else path for path in named}
        return {str(path) for path in named if path.is_dir()}

    def _settings_of_apt(self) -> str:
        if shutil.which("apt-config") is None:
            return ""
        dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
        return "".join(f"{line}\n" for line in dump.splitlines() if self._apt.match(line))


class System:
    """One Debian.

    :param suite: its name, for debootstrap.
    :param folder: where it is, or will be created.
    """

    def __init__(self, suite: str, folder: Path, settings: Settings, mirror: str = MIRROR) -> None:
        self.suite = suite
        self.folder = folder
        self._settings = settings
        self._mirror = mirror

    def make(self, log: Path) -> None:
        """Create the system if it doesn't exist, and install the newest packages.

        :param log: the file for the output.
        :raises NotPossible: the system can't be created.
        """
        if not self.folder.exists():
            self._debootstrap(log)
        self._write_sources()
        self._settings.copy_to(self.folder)
        self._refresh(log)

    def _debootstrap(self, log: Path) -> None:
        unfinished = self.folder.with_name(self.folder.name + ".unfinished")
        throw_away(unfinished)  # of a run that was interrupted
        keyring = [f"--keyring={KEYRING}"] if KEYRING.exists() else []
        command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", *keyring]
        try:
            with open(log, "w") as output:
                status = subprocess.call(
                    [*command, self.suite, str(unfinished), self._mirror], stdout=output, stderr=output, timeout=1800
                )
        except subprocess.TimeoutExpired as error:
            raise NotPossible(f"debootstrap {self.suite} from {self._mirror}: {error}; see {log}") from None
        if status != 0:
            raise NotPossible(f"debootstrap {self.suite} from {self._mirror}: {last_line(log.read_text())}; see {log}")
        unfinished.rename(self.folder)

    def _write_sources(self) -> None:
        text = f"deb {self._mirror} {self.suite} main\n"
        if self.suite not in ROLLING:
            text += UPDATES.format(mirror=self._mirror, suite=self.suite)
        (self.folder / "etc/apt/sources.list").write_text(text)

    def _refresh(self, log: Path) -> None:
        # An earlier run may have been interrupted.
        self.run(["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--configure", "-a"], log)
        self.run(apt_get("install", "--fix-broken"), log)
        for arguments in (["update"], ["dist-upgrade"], ["clean"]):
            if self.run(apt_get(*arguments), log) != 0:
                raise NotPossible(f"apt-get {arguments[0]} in {self.suite}: {last_line(log.read_text())}; see {log}")

    def run(
        self,
        command: Sequence[str],
        log: Path,
        env: Optional[Mapping[str, str]] = None,
        limit: float = 1800,
        echo: bool = False,
    ) -> int:
        """Run a command in the system, as root.

        :param log: gets the output, at its end.
        :param env: more for its environment.
        :param limit: seconds after which it is ended, with all that it started.
        :param echo: whether its output is shown, too.
        :return: its exit status; -9: it took too long.
        """
        enter = ["sh", "-c", ENTER, "enter", str(self.folder), " ".join(self._settings.shown)]
        process = subprocess.Popen(
            # Should this script be killed, so is unshare, and with it everything inside.
            ["setpriv", "--pdeathsig", "KILL", *NAMESPACES, *enter, *command],
            env={**self._settings.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        watchdog = threading.Timer(limit, process.kill)
        watchdog.start()
        try:
            _copy_output(process, log, echo)
            return process.wait()
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()

    def output(self, command: Sequence[str], log: Path) -> str:
        """The output of a command; empty if the command fails."""
        own = log.with_suffix(".output")
        own.unlink(missing_ok=True)
        return own.read_text().strip() if self.run(command, own) == 0 else ""


def _copy_output(process: subprocess.Popen[bytes], log: Path, echo: bool) -> None:
    assert process.stdout is not None
    with open(log, "ab") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            if echo:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
