"""A real application: yubikit signs with a PIV card, in a process, and in three that share what one of them began.

:mod:`piv` says where the card and the programs come from.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from typing import NamedTuple

import pytest
from forking import TIMEOUT, ChildFailedError, in_program, start, wait_for

from pcsc_safe.testing import VirtualPcsc
from pcsc_safe.testing._install import Missing, look

piv = pytest.importorskip("piv")

# jcecard authenticates who personalises the card by Triple DES
pytestmark = pytest.mark.filterwarnings("ignore:TripleDES has been moved")

RAW, SAFE = "smartcard.scard", "pcsc_safe.scard"
SHARE_MODES = ["SCARD_SHARE_SHARED", "SCARD_SHARE_EXCLUSIVE"]
ROUNDS = 50


class Personalised(NamedTuple):
    """A stack with one card in it, and that card's certificate."""

    stack: VirtualPcsc
    certificate: str

    def env(self, **settings: str) -> dict[str, str]:
        """That of a program on the stack, with these settings and else the defaults."""
        usual = {name: value for name, value in self.stack.env.items() if not name.startswith("PCSC_SAFE_")}
        return {**usual, **{f"PCSC_SAFE_{name.upper()}": value for name, value in settings.items()}}


@pytest.fixture(scope="module")
def personalised() -> Iterator[Personalised]:
    """A card as yubico-piv-tool leaves it; its stack is not for this process."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(cards=[piv.PivCard()], activate=False) as stack:
        env = Personalised(stack, "").env()
        yield Personalised(stack, piv.personalise(env, lambda key: said(in_program(self_sign, key, env=env))))


def said(result: ...) -> str:
    """What a program said, if all was well."""
    assert (result.returncode, result.stderr) == (0, "")
    return str(result.stdout)
