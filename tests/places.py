"""The paths of the tests and of what they run, and this Python as a word of a shell script."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
PYTHON = shlex.quote(sys.executable)
