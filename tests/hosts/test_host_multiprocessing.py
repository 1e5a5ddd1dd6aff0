"""The multiprocessing example signs every message once, even if workers die; workers can receive handles."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import secrets
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from forking import in_program
from local_hosts import EXAMPLES, PIN, Program, WatchedCard, raw, stack_with, until

from pcsc_safe.testing import EchoCard, VirtualPcsc

NAME = "multiprocessing_sign.py"


def signed(card: WatchedCard, messages: set[bytes], output: bytes) -> list[bytes]:
    """The messages with a right signature, in the order of the output; every line has one."""
    found = []
    for line in output.splitlines():
        signature, _, message = line.partition(b" ")
        assert message in messages
        assert card.has_signed(message, bytes.fromhex(signature.decode()))
        found.append(message)
    return found


def sign_all(directory: Path, kind: str, method: str, count: int, kill_at: range) -> list[int]:
    """Run the example; return the PIDs of the workers that were killed, each before the card had signed for it."""
    card = WatchedCard.personalised()
    messages = {secrets.token_hex(16).encode() for _ in range(count)}
    killed: list[int] = []
    with stack_with(card) as stack, Program(stack, directory, NAME, kind, method, PYTHONPATH=str(EXAMPLES)) as program:

        def before(number: int) -> None:
            if number in kill_at:
                killed.append(program.kill_one_inside_pcsc())

        card.before = before
        output, _ = program.process.communicate(b"".join(message + b"\n" for message in messages), timeout=120)
        assert program.process.returncode == 0
        done = signed(card, messages, output)
        assert (len(done), set(done)) == (count, messages)
        assert until(lambda: not program.others())
        stack.wait_for_clients(0)
        errors = program.errors.read_text()
        assert "Traceback" not in errors
        (opened,) = [line for line in errors.splitlines() if line.endswith("opened the card")]
        assert (opened.split()[1] == str(program.process.pid)) == (method == "fork")
    return killed


@pytest.mark.parametrize(("kind", "method"), [("executor", "fork"), ("process", "fork"), ("executor", "forkserver")])
def test_workers_sign(tmp_path: Path, kind: str, method: str) -> None:
    """100 messages are signed; two workers are killed while the card signs for them, without effect on the others."""
    assert len(sign_all(tmp_path, kind, method, 100, range(20, 61, 40))) == 2


def test_a_pool_signs(tmp_path: Path) -> None:
    """A pool whose workers are replaced signs 100 messages; no worker is killed: the example would wait too long."""
    assert sign_all(tmp_path, "pool", "fork", 100, range(0)) == []


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("kind", ["pool", "executor", "process"])
def test_workers_sign_a_thousand(tmp_path: Path, kind: str, method: str) -> None:
    """1,000 messages are signed; 20 workers are killed while the card signs for them, others are replaced."""
    killed = sign_all(tmp_path, kind, method, 1000, range(40, 801, 40))
    assert len(set(killed)) == 20


def test_a_wrong_pin_is_tried_once(tmp_path: Path) -> None:
    """With a wrong PIN no worker is forked, so the PIN is tried once."""
    card = WatchedCard.personalised()
    with stack_with(card) as stack, Program(stack, tmp_path, NAME, "pool", PIV_PIN="999999") as program:
        output, _ = program.process.communicate(b"message\n", timeout=30)
        assert (program.process.returncode, output) == (1, b"")
        assert program.errors.read_text() == "opened_card.py: the card refuses the PIN (63C2)\n"


@pytest.mark.long
def test_the_control(tmp_path: Path) -> None:
    """On raw pyscard the same program doesn't have 20 messages signed within 10 s."""
    card = WatchedCard.personalised()
    messages = {secrets.token_hex(16).encode() for _ in range(20)}
    with stack_with(card) as stack, Program(stack, tmp_path, NAME, "executor", **raw(tmp_path)) as program:
        try:
            output, _ = program.process.communicate(b"".join(message + b"\n" for message in messages), timeout=10)
        except subprocess.TimeoutExpired as error:
            output = error.output or b""
        assert len({line.partition(b" ")[2] for line in output.splitlines()} & messages) < 20


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_each_worker_opens_the_card(tmp_path: Path, method: str) -> None:
    """The page's program with an initializer works with every start method."""
    page = EXAMPLES.parent / "docs/hosts/multiprocessing.md"
    (code,) = re.findall(r"(?s)```python\n(.*?)```", page.read_text())
    guard = 'if __name__ == "__main__":\n'
    chosen = f"{guard}    import multiprocessing\n    multiprocessing.set_start_method({method!r})\n"
    program = tmp_path / "program.py"
    program.write_text(code.replace(guard, chosen))
    with VirtualPcsc(cards=[EchoCard()], activate=False) as stack:
        env = {**os.environ, **stack.env}
        subprocess.run([sys.executable, str(program)], env=env, timeout=60, check=True)


# Pickled handles.


def digest(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()


def program_that_passes_its_signer() -> None:
    """Print a signature for each message, by a method of a signer, which is pickled with its handles."""
    sys.path.insert(0, str(EXAMPLES))
    sys.modules.pop("piv", None)
    import piv

    signer = piv.Signer(PIN)
    messages = [b"%d" % number for number in range(100)]
    how = multiprocessing.get_context("fork")
    with how.Pool(3, maxtasksperchild=20) as pool:
        by_pool = pool.map(signer.sign, map(digest, messages))
    with ProcessPoolExecutor(3, mp_context=how) as executor:
        by_executor = list(executor.map(signer.sign, map(digest, messages)))
    for message, *signatures in zip(messages, by_pool, by_executor, map(signer.sign, map(digest, messages))):
        for signature in signatures:
            print(signature.hex(), message.decode())


def test_handles_are_passed_to_workers() -> None:
    """With ``pool.map(signer.sign, ...)`` a worker receives the card that it has inherited."""
    card = WatchedCard.personalised()
    with stack_with(card) as stack:
        done = in_program(program_that_passes_its_signer, env=stack.env)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False)
        assert len(signed(card, {b"%d" % number for number in range(100)}, done.stdout.encode())) == 300
        stack.wait_for_clients(0)


def program_that_passes_to_strangers(method: str) -> None:
    """Print a worker's error for a context of another family."""
    from pcsc_safe.scard import SCARD_SCOPE_SYSTEM, SCardEstablishContext

    _, context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as executor:
        print(type(executor.submit(str, context).exception()).__name__)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_not_to_those_that_are_no_forks(method: str) -> None:
    """A worker that was not forked from this process is of another family: loading a handle raises an error there."""
    with stack_with(WatchedCard.personalised()) as stack:
        done = in_program(program_that_passes_to_strangers, method, env=stack.env)
    assert done.stdout == "BrokenProcessPool\n"
    assert "a handle is valid only where it was inherited: establish a context here" in done.stderr
