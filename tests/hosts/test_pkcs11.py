"""PKCS#11 beside pcsc_safe in one process: with ``guard_native=True`` no child ends its parent's session.

The PKCS#11 module is OpenSC's, called by PyKCS11; the card is that of :mod:`piv`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from forking import in_program

from pcsc_safe.testing import EchoCard, VirtualPcsc
from pcsc_safe.testing._install import Missing, look

pytest.importorskip("PyKCS11", reason="PyKCS11 is not installed: pip install 'pcsc-safe[hosts]'")
piv = pytest.importorskip("piv")
import pkcs11  # noqa: E402  # imports PyKCS11

pytestmark = [
    # jcecard authenticates with these who personalises the card.
    pytest.mark.filterwarnings("ignore:TripleDES has been moved"),
    pytest.mark.skipif(not pkcs11.MODULES, reason="opensc-pkcs11.so is not installed (Debian: opensc-pkcs11)"),
]

CANNOT_SAY = os.EX_SOFTWARE << 8  # the descriptor for its report is closed, too
GENERAL_ERROR = "CKR_GENERAL_ERROR (0x00000005)"
RESET_CARD = 0x80100068
YUBIKEY_4 = bytes.fromhex("3BF81300008131FE15597562696B657934D4")  # an ATR that OpenSC knows


class Readers(NamedTuple):
    """A stack, and the certificate of the card in its first reader."""

    stack: VirtualPcsc
    certificate: str

    def env(self, **settings: str) -> dict[str, str]:
        """The environment of a program on the stack, with these settings or the defaults."""
        usual = {name: value for name, value in self.stack.env.items() if not name.startswith("PCSC_SAFE_")}
        return {**usual, **{f"PCSC_SAFE_{name.upper()}": value for name, value in settings.items()}}

    def right(self, signed: dict[str, str]) -> int:
        """How many of these are the card's signatures of their messages."""
        return sum(len(made) == 128 and self._is_right(text, bytes.fromhex(made)) for text, made in signed.items())

    def _is_right(self, text: str, signature: bytes) -> bool:
        from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
        return bool(piv.is_signature(self.certificate, text.encode(), encode_dss_signature(r, s)))


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    """A PIV card, and an EchoCard."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(2, [piv.PivCard(YUBIKEY_4), EchoCard()], activate=False) as stack:
        env = Readers(stack, "").env()
        yield Readers(stack, piv.personalise(env, lambda key: in_program(self_sign, key, env=env).stdout))


def self_sign(public_key: str) -> None:
    """Make the certificate."""
    print(piv.Signer(piv.Connection(importlib.import_module("smartcard.scard"))).self_sign(public_key), end="")


def told(program: Any, *arguments: str, env: dict[str, str], prefix: tuple[str, ...] = ()) -> Any:
    """What the child reported, and what the parent has signed since."""
    done = in_program(program, *arguments, env=env, prefix=prefix)
    complaints = [line for line in done.stderr.splitlines() if "returns SCARD_W_RESET_CARD" not in line]
    assert (done.returncode, complaints) == (0, []), done.stderr
    return json.loads(done.stdout)


def test_without_the_guard_the_parent_loses_its_session(readers: Readers) -> None:
    """The hazard: a child that only ends takes the parent's session with it."""
    _, signed = told(pkcs11.ends_in_an_orderly_way, env=readers.env())
    assert list(signed.values()) == [GENERAL_ERROR] * pkcs11.ROUNDS


def test_a_child_ends_in_an_orderly_way(readers: Readers) -> None:
    """With ``python -m pcsc_safe run --guard-native`` the same program signs 30 times out of 30."""
    start_it = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    run = (sys.executable, "-m", "pcsc_safe", "run", "--guard-native", "-c", start_it)
    _, signed = told(pkcs11.ends_in_an_orderly_way, env=readers.env(), prefix=run)
    assert readers.right(signed) == pkcs11.ROUNDS


@pytest.mark.parametrize(
    ("child", "says"),
    [
        ("uses", GENERAL_ERROR),
        ("has_a_child", [None, None]),
        ("closes_everything", CANNOT_SAY),
        ("is_killed", signal.SIGKILL),
    ],
)
def test_the_parent_goes_on(readers: Readers, child: str, says: Any) -> None:
    """The parent continues whatever a child does; this needs only PCSC_SAFE_GUARD_NATIVE and ``import pcsc_safe``."""
    said, signed = told(pkcs11.forks, child, env=readers.env(guard_native="yes"))
    assert (said, readers.right(signed)) == (says, pkcs11.ROUNDS)


def test_a_fork_in_a_thread(readers: Readers) -> None:
    """Any thread can fork."""
    _, signed = told(pkcs11.forks_in_a_thread, env=readers.env())
    assert readers.right(signed) == pkcs11.ROUNDS


def test_a_child_begins_anew(readers: Readers) -> None:
    """After C_Initialize, which PKCS#11 requires in a child, the child has its own session; both sign concurrently."""
    together, signed = told(pkcs11.both_sign, env=readers.env())
    assert (len(together), readers.right(together)) == (2 * pkcs11.ROUNDS, 2 * pkcs11.ROUNDS)
    assert readers.right(signed) == pkcs11.ROUNDS


def test_pcsc_safe_in_the_same_process(readers: Readers) -> None:
    """The contexts of pcsc_safe follow their policy, and its child continues."""
    (before, after, parents, here), signed = told(pkcs11.has_sessions_of_both, "", env=readers.env())
    assert (before, after, here) == ([0, [1, 0x90, 0]], [0, [1, 0x90, 0]], [0, [1, 0x90, 0]])
    assert (parents, readers.right(signed)) == (GENERAL_ERROR, pkcs11.ROUNDS)


def test_handover_in_the_same_process(readers: Readers) -> None:
    """The handed-over session continues in the child; the PKCS#11 session stays with the parent."""
    (before, after, parents, here), signed = told(pkcs11.has_sessions_of_both, "handed over", env=readers.env())
    assert (before, after, here) == ([0, [1, 0x90, 0]], [0, [1, 0x90, 0]], [RESET_CARD, []])
    assert (parents, readers.right(signed)) == (GENERAL_ERROR, pkcs11.ROUNDS)


@pytest.mark.parametrize(("when", "right"), [("first", 0), ("anew", pkcs11.ROUNDS)])
def test_a_fork_from_c(readers: Readers, when: str, right: int) -> None:
    """The guard starts with the child's first use of pcsc_safe, and spares the connections that the child has made."""
    child, signed = told(pkcs11.is_forked_from_c, when, env=readers.env())
    assert (readers.right(child), readers.right(signed)) == (right, pkcs11.ROUNDS)
