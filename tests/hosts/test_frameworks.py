"""The examples of docs/frameworks.md, each under the page's server: every reply is the card's."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from servers import ROOT, code_of, serving

from pcsc_safe.testing import EchoCard, VirtualPcsc

PAGE = "frameworks.md"
ASKED = 40
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / PAGE).read_text(), re.DOTALL)
    for line in block.splitlines()
]


def needs(name: str) -> None:
    """Skip the test if a package is missing."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; it is in the extra 'hosts'")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.partition("gunicorn ")[2])
def test_every_reply_is_the_cards(command: str, tmp_path: Path) -> None:
    """The server loads the application, opens the card, and forks its workers, which use the card."""
    if shutil.which("gunicorn", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("gunicorn is not installed: pip install 'pcsc-safe[hosts]'")
    module = command.rpartition(" ")[2].partition(":")[0]
    needs(module.partition("_")[0])
    if "uvicorn" in command:
        needs("uvicorn_worker")
    for file in ("card.py", f"{module}.py"):
        (tmp_path / file).write_text(code_of(PAGE, f"# {file}"))
    *before, application = shlex.split(command)
    with VirtualPcsc(cards=[EchoCard()]) as stack:
        started = ["env", *before, "--bind", "unix:{path}", "--graceful-timeout", "5", application]
        path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH"), str(ROOT)]))
        with serving(started, stack, cwd=tmp_path, PYTHONPATH=path) as server:
            replies = [server.request("GET", f"/echo/{number}") for number in range(ASKED)]
            assert "Traceback" not in server.log
        assert [(status, json.loads(body)) for status, body in replies] == [
            (200, {"reply": [number, 0x90, 0x00]}) for number in range(ASKED)
        ]
