"""The contract suite, over each way to PC/SC.

The modules below say what ``pcsc_safe.scard`` guarantees, and run natively as any other.  Here they run again,
unchanged, over a broker, and once more without the native library in the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pcsc_safe.testing._install import Missing, look

HERE = Path(__file__).parent
CONTRACT = ("test_scard.py", "test_inherited.py", "test_cleanup.py", "test_proxies.py", "test_threads.py")
AT_LEAST = 350  # tests; so that an empty run is no success


@pytest.mark.native
@pytest.mark.parametrize("gateway", ["broker", "always"])
def test_the_contract_holds_over(gateway: str) -> None:
    """Every guarantee of the native gateway holds over a broker, also where the native library is never loaded."""
    if isinstance(look(), Missing):
        pytest.skip("there is no pcscd, or no vpcd")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PCSC_SAFE_")}
    if gateway == "always":
        env["PCSC_SAFE_BROKER"] = "always"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--gateway", gateway]
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in CONTRACT)],
        env=env,
        cwd=HERE.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    last = done.stdout.strip().splitlines()[-1]
    assert int(last.split(" passed")[0].split()[-1]) > AT_LEAST, last
    assert "skipped" not in last
    assert "failed" not in last
