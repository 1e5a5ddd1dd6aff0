"""Raw ``smartcard.scard``, for tests that compare.

With ``--gateway always`` the tests check that the native library is not loaded.  Then pyscard's C functions run in a
separate process, behind pyscard's own Python wrappers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import types
from typing import Any


class _Worker:
    """The process that loads pyscard."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, *question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((question, os.environ.get("PCSCLITE_CSOCK_NAME")), self._process.stdin)
        self._process.stdin.flush()
        outcome, value = pickle.load(self._process.stdout)
        if outcome == "raised":
            raise value
        return value


def _serve() -> None:
    from smartcard.scard import _scard

    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            (name, *arguments), stack = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        os.environ.update({"PCSCLITE_CSOCK_NAME": stack} if stack else {})
        try:
            outcome = "returned", getattr(_scard, name)(*arguments) if name else _described(_scard)
        except Exception as error:
            outcome = "raised", type(error)(*map(str, error.args))
        pickle.dump(outcome, answers)
        answers.flush()


def _described(module: types.ModuleType) -> dict[str, Any]:
    return {name: value if isinstance(value, (int, str)) else None for name, value in vars(module).items()}


def _elsewhere() -> types.ModuleType:
    worker = _Worker()
    fake = types.ModuleType("_scard")
    for name, value in worker.ask("").items():
        if not name.startswith("_"):
            setattr(fake, name, value if value is not None else lambda *a, name=name: worker.ask(name, *a))
    fake.error = type("error", (Exception,), {})  # type: ignore[attr-defined]
    smartcard = importlib.util.find_spec("smartcard")
    assert smartcard is not None
    assert smartcard.submodule_search_locations
    path = os.path.join(smartcard.submodule_search_locations[0], "scard", "scard.py")
    spec = importlib.util.spec_from_file_location("rawscard_scard", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_scard"] = fake
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["_scard"]
    return module


if __name__ == "__main__":
    _serve()
elif os.environ.get("PCSC_SAFE_BROKER") == "always":
    raw: Any = _elsewhere()
else:
    raw = importlib.import_module("smartcard.scard")
