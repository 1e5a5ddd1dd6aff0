"""The contract suite, run over each gateway to PC/SC.

The modules below say what ``pcsc_safe.scard`` guarantees.  Like all tests, they run natively.  Here they run
unchanged over a broker, and once more without the native library in the process.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from forking import in_program
from places import ROOT, TESTS

from pcsc_safe import scard as safe
from pcsc_safe.testing import VirtualPcsc
from pcsc_safe.testing._install import Missing, look

CONTRACT = (
    "core/test_scard.py",
    "core/test_inherited.py",
    "core/test_cleanup.py",
    "core/test_proxies.py",
    "native/test_threads.py",
)
AT_LEAST = 350  # tests; an empty run is no success


@pytest.mark.native
@pytest.mark.long
@pytest.mark.parametrize("gateway", ["broker", "always"])
def test_the_contract_holds_over(gateway: str) -> None:
    """Every guarantee of the native gateway holds over a broker, and where the native library is never loaded."""
    if isinstance(look(), Missing):
        pytest.skip("there is no pcscd, or no vpcd")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PCSC_SAFE_")}
    if gateway == "always":
        env["PCSC_SAFE_BROKER"] = "always"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--gateway", gateway]
    try:
        done = subprocess.run(
            [*command, *(str(TESTS / name) for name in CONTRACT)],
            env=env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1500,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"it did not end in {error.timeout:g} s: {(error.output or b'')[-5000:].decode(errors='replace')}")
    assert done.returncode == 0, done.stdout[-5000:]
    last = done.stdout.strip().splitlines()[-1]
    assert int(last.split(" passed")[0].split()[-1]) > AT_LEAST, last
    assert "skipped" not in last
    assert "failed" not in last


CALLS = 1000


@pytest.mark.long
@pytest.mark.native
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_calls_through_a_broker_leave_nothing(shared_stack: VirtualPcsc) -> None:
    """1,000 calls of each kind leave no memory allocated, neither in this process nor in the broker."""
    done = in_program(called_often, env={**shared_stack.env, "PCSC_SAFE_BROKER": "always"})
    assert done.returncode == 0, done.stderr
    here, broker = json.loads(done.stdout)
    assert here < CALLS  # bytes: less than one for each call, so no call leaves any
    assert broker < 20  # pages: the allocator's own variation


def called_often() -> None:
    """Make the calls. Print how much memory they leave allocated."""
    from pcsc_safe.broker import family

    _, context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
    _, readers = safe.SCardListReaders(context, [])

    def calls() -> None:
        for _ in range(CALLS):
            _, card, _ = safe.SCardConnect(context, readers[0], safe.SCARD_SHARE_SHARED, safe.SCARD_PROTOCOL_ANY)
            safe.SCardTransmit(card, safe.SCARD_PCI_T1, [0x80, 1, 0, 0, 3, 1, 2, 3])
            safe.SCardStatus(card)
            safe.SCardGetStatusChange(context, 0, [(readers[0], safe.SCARD_STATE_UNAWARE)])
            safe.SCardDisconnect(card, safe.SCARD_LEAVE_CARD)

    def pages() -> int:
        return int(Path(f"/proc/{family.get().helper_pid}/statm").read_text().split()[1])

    tracemalloc.start()
    calls()
    gc.collect()
    sizes = [(tracemalloc.get_traced_memory()[0], pages())]
    for _ in range(3):
        calls()
        gc.collect()
        sizes.append((tracemalloc.get_traced_memory()[0], pages()))
    # Memory that calls leave grows in each round.
    columns = list(zip(*sizes))
    print(json.dumps([min(more - less for less, more in zip(column, column[1:])) for column in columns]))
