"""A Qt program, offscreen: a timer of its window uses the card, a QThread waits for events, and it starts processes.

PySide6 takes 250 MB, so it is in no extra: only ``scripts/fetch-apps qt`` fetches it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from pcsc_safe.testing import VirtualPcsc

HERE = ROOT / ".cache" / "apps" / f"qt-{sys.implementation.cache_tag}"
ASKED = 200

PROGRAM = """
import json, os, signal, sys
from PySide6.QtCore import QProcess, QThread, QTimer
from PySide6.QtWidgets import QApplication, QLabel
{imports}

class Waiting(QThread):
    ended = None
    def run(self):
        self.ended = SCardGetStatusChange(context, INFINITE, [(reader, SCARD_STATE_PRESENT)])[0]

def ask(number):
    return SCardTransmit(card, SCARD_PCI_T1, [0x80, 1, 0, 0, 1, number]) == [SCARD_S_SUCCESS, [number, 0x90, 0]]

def tick():
    told["right"] += ask(told["asked"] % 256)
    told["asked"] += 1
    window.setText(str(told["right"]))
    if told["asked"] % 20 == 0:
        process = QProcess()
        process.start("true")
        told["started"] += process.waitForFinished() and process.exitCode() == 0
        told["forked"] += fork()
    if told["asked"] == {asked}:
        told["cancelled"] = SCardCancel(context)
        waiting.wait()
        told["ended"] = waiting.ended == SCARD_E_CANCELLED
        application.quit()

def fork():
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        hresult, own = SCardEstablishContext(SCARD_SCOPE_SYSTEM)
        os._exit(not (hresult == SCardListReaders(own, [])[0] == SCardListReaders(context, [])[0] == SCARD_S_SUCCESS))
    return os.waitpid(child, 0)[1] == 0

application = QApplication([])
window = QLabel("0")
window.show()
context = SCardEstablishContext(SCARD_SCOPE_SYSTEM)[1]
reader = SCardListReaders(context, [])[1][0]
card = SCardConnect(context, reader, SCARD_SHARE_SHARED, SCARD_PROTOCOL_T1)[1]
told = {{"asked": 0, "right": 0, "started": 0, "forked": 0}}
waiting = Waiting()
waiting.start()
timer = QTimer()
timer.timeout.connect(tick)
timer.start(2)
application.exec()
print(json.dumps(told))
"""
WAYS = {
    "run": (["-m", "pcsc_safe", "run"], "from smartcard.scard import *"),
    "run broker": (["-m", "pcsc_safe", "run", "--broker", "always"], "from smartcard.scard import *"),
    "drop-in": ([], "from pcsc_safe.scard import *"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_qt_program(shared_stack: VirtualPcsc, tmp_path: Path, way: str) -> None:
    """Every exchange is right, every process that it starts or forks works, the wait continues; there is no output."""
    if not HERE.exists():
        pytest.skip(f"there is no {HERE}; scripts/fetch-apps gets it")
    launcher, imports = WAYS[way]
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(imports=imports, asked=ASKED))
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env={**os.environ, **shared_stack.env, "PYTHONPATH": f"{ROOT}:{HERE}", "QT_QPA_PLATFORM": "offscreen"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    tenth = ASKED // 20
    assert json.loads(done.stdout) == {
        "asked": ASKED,
        "right": ASKED,
        "started": tenth,
        "forked": tenth,
        "cancelled": 0,
        "ended": True,
    }
    shared_stack.wait_for_clients(0)
