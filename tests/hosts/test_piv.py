"""A real application: yubikit signs with a PIV card, in one process, and in three that go on in the session of one.

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

# That is how jcecard authenticates who personalises the card.
pytestmark = pytest.mark.filterwarnings("ignore:TripleDES has been moved")

RAW, SAFE = "smartcard.scard", "pcsc_safe.scard"
SHARE_MODES = ["SCARD_SHARE_SHARED", "SCARD_SHARE_EXCLUSIVE"]
FAMILY = ["parent", "first child", "second child"]
ROUNDS = 50


class Personalised(NamedTuple):
    """A stack with one card in it, and the certificate that was made for that."""

    stack: VirtualPcsc
    certificate: str

    def env(self, **settings: str) -> dict[str, str]:
        """That of a program on the stack, with these settings, or the default ones."""
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
        yield Personalised(stack, piv.personalise(env, lambda key: output(in_program(self_sign, key, env=env))))


def output(result: CompletedProcess[str]) -> str:
    """What a program that ended well has said."""
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


# The programs.


def signer(module: str, share_mode: str = SHARE_MODES[0]) -> Any:
    return piv.Signer(piv.Connection(importlib.import_module(module), share_mode))


def self_sign(public_key: str) -> None:
    """Make the certificate."""
    print(signer(RAW).self_sign(public_key), end="")


def sign(card: Any, name: str, meet: Callable[[], object] = int) -> dict[str, str]:
    """Sign 50 messages that nobody else signs, and read the certificate now and then.

    :param meet: waits for the others before each, so that all sign at the same time.
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
    """The same; if it fails, nobody waits for this one any more."""
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
    """A session and a PIN, then two forks; all three sign 50 messages; the children end, and the parent goes on.

    :param limit: seconds that it may take.
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
    with contextlib.suppress(BrokenBarrierError):  # a child failed, and tells how
        signed = sign_together(card, FAMILY[0], together)
    for started in children:
        signed.update(wait_for(started))
    signed["parent goes on"] = card.sign(b"parent goes on").hex()
    card.connection.close()
    print(json.dumps(signed))


def sign_after_reset(how: str) -> None:
    """What the card says to one who had a session, and to those who come anew."""
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
    """Every message has its signature, and every time the certificate was read it was that."""
    signed = json.loads(output(result))
    certificates = {signed.pop(name) for name in list(signed) if name.startswith("certificate ")}
    assert {f"{name} {number}" for name in names for number in range(ROUNDS)} <= signed.keys()
    right = [piv.is_signature(certificate, text.encode(), bytes.fromhex(made)) for text, made in signed.items()]
    assert (all(right), certificates) == (True, {certificate})


# The tests.


def test_yubico_piv_tool_is_content(personalised: Personalised) -> None:
    """It finds on the card what it has put there, and a signature of the card right."""
    status = piv.tool("--action=status", env=personalised.env()).stdout
    assert re.search(r"CHUID:\s+30", status)
    # 2.7.3 tells of the private key before, from metadata that this card doesn't have
    algorithm = r"(Private Key Algorithm:\s+\w+\s+Public Key )?Algorithm:\s+ECCP256"
    assert re.search(rf"Slot 9a:\s+{algorithm}\s+Subject DN:\s+O=pcsc_safe, CN=A card holder", status)
    actions = ["--action=verify-pin", f"--pin={piv.PIN}", "--action=test-signature"]
    checked = piv.tool(*actions, env=personalised.env(), given=personalised.certificate)
    assert "Successful ECDSA verification" in checked.stderr


@pytest.mark.parametrize("how", ["SCARD_RESET_CARD", "SCARD_UNPOWER_CARD"])
def test_the_card_forgets_the_pin(personalised: Personalised, how: str) -> None:
    """When it is reset or loses its power, which applet was selected and that the PIN was verified; not the key."""
    said = output(in_program(sign_after_reset, how, env=personalised.env()))
    assert said.splitlines() == ["no applet: 6985", "no PIN: 6982", "the PIN again: 9000"]


@pytest.mark.parametrize("share_mode", SHARE_MODES)
@pytest.mark.parametrize(
    ("module", "settings"),
    [(RAW, {}), (SAFE, {}), (SAFE, {"broker": "always"}), (SAFE, {"broker": "always", "policy": "share"})],
    ids=["raw", "safe", "broker", "share"],
)
def test_one_process_signs(personalised: Personalised, module: str, settings: dict[str, str], share_mode: str) -> None:
    """A process that never forks signs through pcsc_safe as through smartcard.scard."""
    result = in_program(sign_alone, module, share_mode, env=personalised.env(**settings))
    assert_all_right(result, personalised.certificate, "alone")


@pytest.mark.parametrize("share_mode", SHARE_MODES)
def test_three_processes_sign_in_one_session(personalised: Personalised, share_mode: str) -> None:
    """Under policy ``share``, two children sign in the parent's session at the same time as it does, without a PIN.

    What they drop at their end they drop for themselves: the parent goes on.
    """
    env = personalised.env(policy="share", broker="always")
    result = in_program(sign_with_two_children, SAFE, share_mode, "25", env=env)
    assert_all_right(result, personalised.certificate, *FAMILY)


def test_three_processes_on_raw_pyscard_do_not(personalised: Personalised) -> None:
    """The same on smartcard.scard goes wrong: processes hang, die, or have each other's answers."""
    with pytest.raises(AssertionError):
        assert_all_right(
            in_program(sign_with_two_children, RAW, SHARE_MODES[0], "3", env=personalised.env()),
            personalised.certificate,
            *FAMILY,
        )
