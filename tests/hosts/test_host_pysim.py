"""Unmodified pySim-read prints the same about a SIM under ``run`` as on raw pyscard, and ends silently.

The SIM is scripted.  ``scripts/fetch-apps pysim`` fetches pySim.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Optional

import pytest
from places import ROOT

from pcsc_safe.testing import VirtualCard, VirtualPcsc

HERE = ROOT / ".cache" / "apps" / f"pysim-{sys.implementation.cache_tag}"
FILES: dict[str, Optional[bytes]] = {
    "3f00": None,
    "7f10": None,
    "7f20": None,
    "2fe2": bytes.fromhex("98881200000000000010"),  # EF.ICCID
    "6f07": bytes.fromhex("082910107856341209"),  # EF.IMSI
    "6f78": bytes.fromhex("0004"),  # EF.ACC
    "6fad": bytes.fromhex("00000002"),  # EF.AD
    "6f38": bytes.fromhex("ff33ff0f"),  # EF.SST
    "6f46": bytes.fromhex("01") + b"A network".ljust(16, b"\xff"),  # EF.SPN
    "6f42": bytes(b"\xff" * 28),  # EF.SMSP
    "6f40": bytes(b"\xff" * 28),  # EF.MSISDN
}
RECORDS = {"6f42", "6f40"}


class Sim(VirtualCard):
    """A SIM of TS 51.011, with T=0: a SELECT is followed by GET RESPONSE and a read command."""

    def __init__(self) -> None:
        super().__init__(bytes.fromhex("3B00"))
        self._selected, self._told = "3f00", b""

    def apdu(self, command: bytes) -> bytes:
        """Answer one command."""
        if command[0] != 0xA0:
            return b"\x6e\x00"
        instruction, length = command[1], command[4]
        content = FILES[self._selected] or b""
        if instruction == 0xA4:
            return self._select(command[5:7].hex())
        if instruction == 0xC0:
            return self._told[:length] + b"\x90\x00"
        if instruction == 0xB0:
            offset = command[2] << 8 | command[3]
            return content[offset : offset + length] + b"\x90\x00"
        return content[:length] + b"\x90\x00" if instruction == 0xB2 else b"\x6d\x00"

    def _select(self, name: str) -> bytes:
        if name not in FILES:
            return b"\x94\x04"
        self._selected, content = name, FILES[name]
        if content is None:
            self._told = bytes(4) + bytes.fromhex(name) + b"\x02" + bytes(15)
        else:
            is_linear = name in RECORDS
            access = b"\x00" * 5
            self._told = (
                bytes(2)
                + len(content).to_bytes(2, "big")
                + bytes.fromhex(name)
                + b"\x04"
                + access
                + bytes([2, is_linear, len(content) if is_linear else 0])
            )
        return bytes([0x9F, len(self._told)])


@pytest.fixture(scope="module")
def stack() -> Iterator[VirtualPcsc]:
    if not HERE.exists():
        pytest.skip(f"there is no {HERE}; scripts/fetch-apps gets it")
    with VirtualPcsc(1, [Sim()], activate=False) as running:
        yield running


def read(stack: VirtualPcsc, *launcher: str) -> tuple[int, str, str]:
    """How pySim-read ends, and its output."""
    command = [sys.executable, *launcher, str(HERE / "bin" / "pySim-read.py"), "--pcsc-device", "0"]
    env = {**stack.env, "PYTHONPATH": f"{HERE}:{ROOT}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    stack.wait_for_clients(0)
    return done.returncode, done.stdout, done.stderr


RUN = ("-m", "pcsc_safe", "run")


@pytest.mark.parametrize("launcher", [RUN, (*RUN, "--broker", "always")], ids=["native", "broker"])
def test_it_says_the_same(stack: VirtualPcsc, launcher: tuple[str, ...]) -> None:
    """Every line about each file is the same; stderr is empty."""
    status, said, errors = read(stack, *launcher)
    assert (status, errors) == (0, "")
    assert (status, said, errors) == read(stack)
    assert "ICCID: 89882100000000000001\n" in said
    assert "Done !" in said
