"""A real application: yubikit signs with a PIV card in one process, and in three that share one session.

:mod:`piv` says where the card and the programs come from.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from subprocess import CompletedProcess
from threading import BrokenBarrierError
from typing import Any, NamedTuple

import pytest
from forking import in_program, start, wait_for

from pcsc_safe.testing import VirtualPcsc
from pcsc_safe.testing._install import Missing, look

piv = pytest.importorskip("piv")

# jcecard authenticates with these who personalises the card.
pytestmark = pytest.mark.filterwarnings("ignore:TripleDES has been moved")

RAW, SAFE = "smartcard.scard", "pcsc_safe.scard"
SHARE_MODES = ["SCARD_SHARE_SHARED", "SCARD_SHARE_EXCLUSIVE"]
FAMILY = ["parent", "first child", "second child"]
ROUNDS = 50


class Personalised(NamedTuple):
    """A stack with one card, and the certificate that was made for this card."""

    stack: VirtualPcsc
    certificate: str

    def env(self, **settings: str) -> dict[str, str]:
        """The environment of a program on the stack, with these settings or the defaults."""
        usual = {name: value for name, value in self.stack.env.items() if not name.startswith("PCSC_SAFE_")}
        return {**usual, **{f"PCSC_SAFE_{name.upper()}": value for name, value in settings.items()}}


@pytest.fixture(scope="module")
def personalised() -> Iterator[Personalised]:
    """A card that yubico-piv-tool has personalised; this process doesn't use its stack."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(cards=[piv.PivCard()], activate=False) as stack:
        env = Personalised(stack, "").env()
        yield Personalised(stack, piv.personalise(env, lambda key: output(in_program(self_sign, key, env=env))))


def output(result: CompletedProcess[str]) -> str:
    """The output of a program, which must succeed."""
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


# The programs.


def signer(module: str, share_mode: str = SHARE_MODES[0]) -> Any:
    return piv.Signer(piv.Connection(importlib.import_module(module), share_mode))


def self_sign(public_key: str) -> None:
    """Make the certificate."""
    print(signer(RAW).self_sign(public_key), end="")


def sign(card: Any, name: str, meet: Callable[[], object] = int) -> dict[str, str]:
    """Sign 50 messages that no other process signs, and sometimes read the certificate.

    :param meet: waits for the others before each message, so that all sign at the same time.
    :return: message and signature, "certificate" and certificate.
    """
    signed = {}
    for number in range(ROUNDS):
        meet()
        message = f"{name} {number}"
        signed[message] = card.sign(message.encode()).hex()
        if number % 10 == 0:
            signed[f"certificate {name} {number}"] = card.certificate()
    return signed


def sign_together(card: Any, name: str, together: Barrier) -> dict[str, str]:
    """The same; if it fails, the others no longer wait for this process."""
    try:
        return sign(card, name, together.wait)
    except BaseException:
        together.abort()
        raise


def sign_alone(module: str, share_mode: str) -> None:
    """In one process: a session, a PIN, 50 signatures."""
    card = signer(module, share_mode)
    signed = sign(card, "alone")
    card.connection.close()
    print(json.dumps(signed))


def sign_with_two_children(module: str, share_mode: str, limit: str) -> None:
    """A session and a PIN, then two forks; all three sign 50 messages; the children end, and the parent continues.

    :param limit: time limit, in seconds.
    """
    card = signer(module, share_mode)
    together = multiprocessing.get_context("fork").Barrier(len(FAMILY))

    def child(name: str) -> dict[str, str]:
        signal.alarm(int(limit))
        signed = sign_together(card, name, together)
        card.connection.close()
        return signed

    signal.alarm(int(limit))
    children = [start(child, name) for name in FAMILY[1:]]
    signed = {}
    with contextlib.suppress(BrokenBarrierError):  # a child failed, and reports its error
        signed = sign_together(card, FAMILY[0], together)
    for started in children:
        signed.update(wait_for(started))
    signed["parent goes on"] = card.sign(b"parent goes on").hex()
    card.connection.close()
    print(json.dumps(signed))


def sign_after_reset(how: str) -> None:
    """The card's status words after a reset, in an old session and in a new one."""
    card = signer(RAW)
    card.sign(b"before")
    card.connection.reset(how)
    tell("no applet", card)
    tell("no PIN", piv.Signer(card.connection, pin=""))
    tell("the PIN again", piv.Signer(card.connection))


def tell(who: str, card: Any) -> None:
    try:
        card.sign(b"after")
    except piv.ApduError as error:
        print(f"{who}: {error.sw:04x}")
    else:
        print(f"{who}: 9000")


def assert_all_right(result: CompletedProcess[str], certificate: str, *names: str) -> None:
    """Every message has its signature, and every certificate that was read is the right one."""
    signed = json.loads(output(result))
    certificates = {signed.pop(name) for name in list(signed) if name.startswith("certificate ")}
    assert {f"{name} {number}" for name in names for number in range(ROUNDS)} <= signed.keys()
    right = [piv.is_signature(certificate, text.encode(), bytes.fromhex(made)) for text, made in signed.items()]
    assert (all(right), certificates) == (True, {certificate})


# The tests.


def test_yubico_piv_tool_is_content(personalised: Personalised) -> None:
    """yubico-piv-tool finds on the card what it has stored there, and accepts a signature of the card."""
    status = piv.tool("--action=status", env=personalised.env()).stdout
    assert re.search(r"CHUID:\s+30", status)
    # 2.7.3 first reports the private key, from metadata that this card doesn't have
    algorithm = r"(Private Key Algorithm:\s+\w+\s+Public Key )?Algorithm:\s+ECCP256"
    assert re.search(rf"Slot 9a:\s+{algorithm}\s+Subject DN:\s+O=pcsc_safe, CN=A card holder", status)
    actions = ["--action=verify-pin", f"--pin={piv.PIN}", "--action=test-signature"]
    checked = piv.tool(*actions, env=personalised.env(), given=personalised.certificate)
    assert "Successful ECDSA verification" in checked.stderr


@pytest.mark.parametrize("how", ["SCARD_RESET_CARD", "SCARD_UNPOWER_CARD"])
def test_the_card_forgets_the_pin(personalised: Personalised, how: str) -> None:
    """After a reset or a power-off the card has no selected applet and no verified PIN, but still has the key."""
    said = output(in_program(sign_after_reset, how, env=personalised.env()))
    assert said.splitlines() == ["no applet: 6985", "no PIN: 6982", "the PIN again: 9000"]


@pytest.mark.parametrize("share_mode", SHARE_MODES)
@pytest.mark.parametrize(
    ("module", "settings"),
    [(RAW, {}), (SAFE, {}), (SAFE, {"broker": "always"}), (SAFE, {"broker": "always", "policy": "share"})],
    ids=["raw", "safe", "broker", "share"],
)
def test_one_process_signs(personalised: Personalised, module: str, settings: dict[str, str], share_mode: str) -> None:
    """A process that never forks can sign through pcsc_safe as through smartcard.scard."""
    result = in_program(sign_alone, module, share_mode, env=personalised.env(**settings))
    assert_all_right(result, personalised.certificate, "alone")


@pytest.mark.parametrize("share_mode", SHARE_MODES)
def test_three_processes_sign_in_one_session(personalised: Personalised, share_mode: str) -> None:
    """Under policy ``share``, two children sign in the parent's session while it signs, without a PIN.

    When they end, their cleanup affects only themselves: the parent continues.
    """
    env = personalised.env(policy="share", broker="always")
    result = in_program(sign_with_two_children, SAFE, share_mode, "25", env=env)
    assert_all_right(result, personalised.certificate, *FAMILY)


def test_three_processes_on_raw_pyscard_do_not(personalised: Personalised) -> None:
    """On smartcard.scard the same goes wrong: processes hang, die, or receive each other's responses."""
    with pytest.raises(AssertionError):
        assert_all_right(
            in_program(sign_with_two_children, RAW, SHARE_MODES[0], "3", env=personalised.env()),
            personalised.certificate,
            *FAMILY,
        )
