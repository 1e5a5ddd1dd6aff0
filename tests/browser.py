"""A browser for the tests that look at a page."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

__all__ = ["browser"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def browser(tmp_path: Path) -> Any:
    """Show a page in a headless Chromium; return the resulting DOM and the lines on the console."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")

    def show(page: Path) -> tuple[str, list[str]]:
        process = subprocess.Popen(
            [
                CHROMIUM or "",
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
                *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"),
                *("--dump-dom", page.as_uri()),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            dom, err = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return dom, [line for line in err.splitlines() if "CONSOLE" in line]

    return show
