"""A release is complete, and works without the checkout."""

from __future__ import annotations

import os
import subprocess

import pytest
from places import ROOT

CHECK = ROOT / "scripts" / "release-check"


@pytest.mark.long
@pytest.mark.skipif(not (CHECK.parent.parent / ".git").exists(), reason="this is a release itself")
def test_the_release_is_whole() -> None:
    """``scripts/release-check`` passes: sdist, wheel, twine, check-wheel-contents, and tests of the installed wheel."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PCSC_SAFE_", "PYTHON"))}
    done = subprocess.run([str(CHECK)], env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all well" in done.stderr
