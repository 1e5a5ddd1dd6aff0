"""Finds out which parts of the virtual stack are installed: pcscd, its options, and the vpcd driver.

Invariant: looking changes nothing, and costs one run of ``pcscd --version`` for each process.

At a fork: nothing; a child inherits what its parent found.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from typing import Union

_PACKAGES = (
    "install it (Debian, Ubuntu: apt-get install pcscd vsmartcard-vpcd; elsewhere: pcsc-lite, and vpcd from "
    "https://frankmorgner.github.io/vsmartcard)"
)
_DRIVERS = (
    "/usr/lib/pcsc/drivers/serial/libifdvpcd.so*",
    "/usr/lib*/pcsc/drivers/serial/libifdvpcd.so*",
    "/usr/lib/*/pcsc/drivers/serial/libifdvpcd.so*",
    "/usr/local/lib*/pcsc/drivers/serial/libifdvpcd.so*",
)
_SECONDS = 10  # for pcscd --version


@dataclass(frozen=True)
class Installed:
    """The programs of the virtual stack.

    :param pcscd: path of the daemon.
    :param version: its version, "1.9.9".
    :param polkit: whether it asks polkit who may use it.
    :param driver: path of the vpcd driver.
    :param directory: where it always writes its process ID.
    """

    pcscd: str
    version: str
    polkit: bool
    driver: str
    directory: str

    @property
    def version_info(self) -> tuple[int, ...]:
        """The version, for comparisons; if it is unknown, higher than any other."""
        numbers = re.findall(r"\d+", self.version)
        return tuple(map(int, numbers)) if numbers else (sys.maxsize,)


@dataclass(frozen=True)
class Missing:
    """Why there can't be a virtual stack here, and what to do about it.

    :param is_installed: whether everything is installed, but can't be run, perhaps only now.
    """

    problem: str
    remedy: str
    is_installed: bool = False


@cache
def look() -> Union[Installed, Missing]:
    """Look for pcscd and the vpcd driver."""
    if not sys.platform.startswith("linux"):
        return Missing(f"the virtual PC/SC stack runs on Linux only, this is {sys.platform}", "use a Linux machine")
    pcscd = shutil.which("pcscd", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin:/sbin")
    if pcscd is None:
        return Missing("pcscd, which the virtual PC/SC stack needs, is not installed", _PACKAGES)
    drivers = [path for pattern in _DRIVERS for path in sorted(glob.glob(pattern))]
    if not drivers:
        return Missing("the vpcd driver, which the virtual PC/SC stack needs, is not installed", _PACKAGES)
    try:
        said = subprocess.run(  # noqa: S603  # the path is pcscd's own
            [pcscd, "--version"], capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        problem = f"pcscd, which the virtual PC/SC stack needs, can't be run ({error})"
        return Missing(problem, f"try {pcscd} --version", is_installed=True)
    words = said.stdout.split()
    version = words[2].rstrip(".") if len(words) > 2 else "of unknown version"
    directory = next((word[7:] for word in words if word.startswith("ipcdir=")), "/run/pcscd")
    return Installed(os.path.abspath(pcscd), version, "polkit" in words, os.path.realpath(drivers[0]), directory)
