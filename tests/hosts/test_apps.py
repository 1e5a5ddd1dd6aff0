"""Unmodified applications from PyPI, under ``python -m pcsc_safe run``: their sessions survive a fork.

:mod:`apps` is the program that uses them.  The cards are jcecard's (see :mod:`piv`) and a FIDO2 card.  If a package is
missing, its tests are skipped: ``scripts/fetch-apps`` and ``scripts/fetch-piv`` fetch the packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from places import ROOT, TESTS

from pcsc_safe.testing import VirtualCard, VirtualPcsc
from pcsc_safe.testing._install import Missing, look

piv = pytest.importorskip("piv")

# jcecard authenticates with these who personalises the card
pytestmark = pytest.mark.filterwarnings("ignore:TripleDES has been moved")

FETCHED = ROOT / ".cache" / "apps"
TAG = str(sys.implementation.cache_tag)
RUN = ("-m", "pcsc_safe", "run")
SHARE = (*RUN, "--broker", "always", "--policy", "share")
TIMEOUT = 30

SAYS = {
    "ykman": ("signed by CN=card holder 0", "signed by CN=card holder 1"),
    "piv-smartcard": ("CN=card holder 0", "CN=card holder 1"),
    "fido2": ("FIDO_2_0", "FIDO_2_0"),
    "OpenPGPpy": ("signed, 256 bytes", "signed, 256 bytes"),
}
"""What an application prints about the card in the first reader, and about the other."""


class PivCard(piv.PivCard):  # type: ignore[misc]  # the fetched package has no types
    """A PIV card that can also be selected by its whole AID, like real cards."""

    _AID = bytes.fromhex("A000000308")

    def apdu(self, command: bytes) -> bytes:
        """Answer one command of SP 800-73."""
        if command[:4] == b"\x00\xa4\x04\x00" and command[5:].startswith(self._AID):
            command = command[:4] + bytes([len(self._AID)]) + self._AID + b"\x00"
        return bytes(super().apdu(command))


class FidoCard(VirtualCard):
    """An authenticator whose applet, when selected, describes itself (CTAP 2, authenticatorGetInfo)."""

    _AID = bytes.fromhex("A0000006472F0001")
    _INFO = bytes.fromhex("00A2") + b"\x01\x81\x68FIDO_2_0" + b"\x03\x50" + bytes(16)
    _selected = False

    def apdu(self, command: bytes) -> bytes:
        """Answer SELECT and NFCCTAP_MSG."""
        if command[1] == 0xA4:
            self._selected = command[5:].startswith(self._AID)
            return b"FIDO_2_0\x90\x00" if self._selected else b"\x6a\x82"
        if not self._selected:
            return b"\x69\x85"
        return self._INFO + b"\x90\x00" if command[1] == 0x10 and command[5] == 0x04 else b"\x6d\x00"

    def power_on(self) -> None:
        """Forget what was selected."""
        self._selected = False

    power_off = reset = power_on


class OpenPgpCard(VirtualCard):
    """jcecard's OpenPGP card.

    :param folder: where it stores its keys.
    """

    def __init__(self, folder: Path) -> None:
        from jcecard.main import OpenPGPCard

        super().__init__()
        self._card = OpenPGPCard(storage_path=folder)

    def apdu(self, command: bytes) -> bytes:
        """Answer one command of the OpenPGP card's specification."""
        if command.startswith(b"\x00\xca\x7f\x66"):  # the supported lengths; jcecard's card doesn't report them
            return bytes.fromhex("0202010002020100 9000")
        return bytes(self._card.process_apdu(command))

    def power_on(self) -> None:
        """Forget the PIN and what was selected."""
        self._card.power_on()

    def power_off(self) -> None:
        """The same."""
        self._card.power_off()

    def reset(self) -> None:
        """The same."""
        self._card.reset()


class Ended(NamedTuple):
    """How a program ended, and its output."""

    status: int
    output: str
    errors: str


class Place(NamedTuple):
    """A stack, and the path of an application."""

    stack: VirtualPcsc
    packages: Path

    def run(self, *arguments: str) -> Ended:
        """Run Python there, with default settings; every process of the run is dead afterwards."""
        usual = {name: value for name, value in self.stack.env.items() if not name.startswith("PCSC_SAFE_")}
        path = os.pathsep.join([str(self.packages), str(ROOT)])
        # No PATH: if ykman gets no connection, it looks for pkill, to end all programs on the machine that use cards.
        env = {**usual, "PYTHONPATH": path, "PATH": os.devnull}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return Ended(process.returncode, output, errors)

    def personalise(self, how: str) -> None:
        """Personalise the cards with keys."""
        ended = self.run(str(TESTS / "apps.py"), f"personalise-{how}")
        assert ended.status == 0, ended

    def told(self, *arguments: str) -> dict[str, str]:
        """All output of an application before, in and after a fork."""
        ended = self.run(*arguments)
        lines = [json.loads(line) for line in ended.output.splitlines()]
        assert len(lines) == 2, ended
        return {**lines[0], **lines[1]}


def packages(name: str) -> Path:
    """The path of an application's packages; skips the test if they are missing."""
    found = FETCHED / name
    if not found.exists():
        pytest.skip(f"there is no {found}; scripts/fetch-apps gets it")
    return found


@contextlib.contextmanager
def place(name: str, *cards: VirtualCard) -> Iterator[Place]:
    """A stack with these cards, for an application with these packages."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(len(cards), cards, activate=False) as stack:
        yield Place(stack, packages(name))


@pytest.fixture(scope="module")
def piv_place() -> Iterator[Place]:
    """Two PIV cards."""
    with place(TAG, PivCard(), PivCard()) as found:
        found.personalise("piv")
        yield found


@pytest.fixture(scope="module")
def fido_place() -> Iterator[Place]:
    """Two authenticators."""
    with place(TAG, FidoCard(), FidoCard()) as found:
        yield found


@pytest.fixture(scope="module")
def openpgp_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Two OpenPGP cards, and the version of pyscard that OpenPGPpy requires."""
    folders = [tmp_path_factory.mktemp("openpgp") for _ in range(2)]
    with place(f"openpgppy-{TAG}", *map(OpenPgpCard, folders)) as found:
        found.personalise("openpgp")
        yield found


PLACES = {"ykman": "piv_place", "piv-smartcard": "piv_place", "fido2": "fido_place", "OpenPGPpy": "openpgp_place"}


@pytest.fixture(params=PLACES)
def app(request: pytest.FixtureRequest) -> tuple[str, Place]:
    """An application, by its name in :mod:`apps`, and its place."""
    return request.param, request.getfixturevalue(PLACES[request.param])


def test_the_fork_of_an_application(app: tuple[str, Place]) -> None:
    """The parent's session continues.  So does the child's, unless it is exclusive (ykman's)."""
    name, place = app
    told = place.told(*RUN, str(TESTS / "apps.py"), name)
    first, second = SAYS[name]
    inherited = told.pop("inherited")
    assert {"ykman": "reset" in inherited.lower(), "OpenPGPpy": True}.get(name, inherited == first), inherited
    assert told == {"before": first, "own": second, "child": "0", "after": first, "closed": "None"}


def test_the_shared_session_of_an_application(app: tuple[str, Place]) -> None:
    """Under policy ``share`` the child uses the session of its parent, including applet, PIN and exclusive access."""
    name, place = app
    told = place.told(*SHARE, str(TESTS / "apps.py"), name)
    first, second = SAYS[name]
    assert told == {
        "before": first,
        "inherited": first,
        "own": second,
        "child": "0",
        "after": first,
        "closed": "None",
    }


def test_an_application_on_raw_pyscard(app: tuple[str, Place]) -> None:
    """On raw pyscard the same program ends the parent's session."""
    name, place = app
    told = place.told(str(TESTS / "apps.py"), name)
    assert told["before"] == SAYS[name][0] != told["after"]


def test_ykman_piv_info(piv_place: Place) -> None:
    """``ykman piv info`` prints the same about a card on raw pyscard and on pcsc_safe."""
    command = ["-m", "ykman._cli", "--reader", piv_place.stack.readers[0].name, "piv", "info"]
    raw = piv_place.run(*command)
    assert (raw.status, "CN=card holder 0" in raw.output) == (0, True), raw
    assert piv_place.run(*RUN, *command) == raw
    assert piv_place.run(*SHARE, *command) == raw


def test_piv_smartcard_read(piv_place: Place) -> None:
    """``piv-smartcard read`` prints the same about a card on raw pyscard and on pcsc_safe."""
    command = ["-m", "smartcard_demo.cli", "read", "--slot", "authentication", "--pem"]
    raw = piv_place.run(*command)
    assert (raw.status, "BEGIN CERTIFICATE" in raw.output) == (0, True), raw
    assert piv_place.run(*RUN, *command) == raw
