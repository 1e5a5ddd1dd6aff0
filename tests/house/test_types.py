"""What a type checker knows about pcsc_safe: every public name, and no other."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import smartcard.scard as raw

import pcsc_safe
from pcsc_safe.policy import SETTINGS

STUB = ast.parse(Path(pcsc_safe.__path__[0], "scard.pyi").read_text())
VERSION = [int(part) for part in importlib.metadata.version("pyscard").split(".") if part.isdigit()]
OLDER = VERSION < [2, 3, 1] or not sys.platform.startswith("linux")
"""The stub describes a newer pyscard, or that of another system."""
FUNCTIONS = {name: value for name, value in vars(raw).items() if inspect.isfunction(value) and name[0] != "_"}
CONSTANTS = {name: value for name, value in vars(raw).items() if isinstance(value, (int, str)) and name[0] != "_"}

USER_PROGRAM = '''
"""A program whose author runs mypy --strict."""

from typing import Optional

import pcsc_safe
from pcsc_safe import Cards, Policy, Settings, configure, errors, scard, settings
from pcsc_safe.scard import SCARD_PROTOCOL_ANY, SCARD_S_SUCCESS, SCARD_SCOPE_USER, SCARD_SHARE_SHARED
from pcsc_safe.scard import SCardConnect, SCardEstablishContext, SCardTransmit
from pcsc_safe.testing import CardEvent, EchoCard, Reader, VirtualCard, VirtualPcsc


def first_reader(context: int) -> Optional[str]:
    hresult, readers = scard.SCardListReaders(context, [])
    return readers[0] if hresult == SCARD_S_SUCCESS and readers else None


def ask(reader: str, command: list[int]) -> bytes:
    hresult, context = SCardEstablishContext(SCARD_SCOPE_USER)
    hresult, card, protocol = SCardConnect(context, reader, SCARD_SHARE_SHARED, SCARD_PROTOCOL_ANY)
    if hresult != SCARD_S_SUCCESS:
        raise scard.error(scard.SCardGetErrorMessage(hresult))
    hresult, response = SCardTransmit(card, protocol, command)
    hresult, name, state, protocol, atr = scard.SCardStatus(card)
    hresult, states = scard.SCardGetStatusChange(context, scard.INFINITE, [(name, scard.SCARD_STATE_UNAWARE)])
    hresult, states = scard.SCardGetStatusChange(context, 0, states)
    hresult, attribute = scard.SCardGetAttrib(card, scard.SCARD_ATTR_ATR_STRING)
    hresult = scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD) or scard.SCardReleaseContext(context)
    return bytes(response + atr + attribute)


def forked() -> Settings:
    configure(policy=Policy.REESTABLISH, cards="reconnect")
    chosen: Cards = settings().cards
    try:
        ask("", [chosen is Cards.RESET])
    except pcsc_safe.ForkedHandleError as error:
        return configure(policy=Policy(str(error.hresult)), context=error.owner_pid)
    except errors.PcscSafeError as error:
        print(error.function, error.remedy, pcsc_safe.__version__)
    return settings()


def verified(card: int, apdu: list[int]) -> list[int]:
    def verify(card: int) -> None:
        scard.SCardTransmit(card, scard.SCARD_PCI_T1, [0, 0x20, 0, 0x80, 0])

    def work(card: int) -> tuple[int, list[int]]:
        return scard.SCardTransmit(card, scard.SCARD_PCI_T1, apdu)

    try:
        with configure(policy="raise", cards=Cards.RESET) as inside:
            chosen: Policy = inside.policy
            hresult, answer = pcsc_safe.reconnecting(card, work, verify, attempts=2 if chosen else 1)
    except pcsc_safe.ReconnectError as error:
        return [error.hresult]
    return answer


def daemonized(context: int) -> list[int]:
    pcsc_safe.freeze_support()
    pcsc_safe.install(policy="raise", broker=pcsc_safe.Broker.ON_FORK, recover=True)
    kept: list[int] = pcsc_safe.files_to_preserve()
    try:
        with pcsc_safe.handover(), pcsc_safe.handover(context):
            configure(owner=pcsc_safe.Owner.CHILD, broker="always", recover=True, guard_native="no", quiesce_timeout=5)
            configure(broker=pcsc_safe.Broker.ON_FORK, broker_python="/usr/bin/python3")
        pcsc_safe.prestart_broker()
    except (pcsc_safe.HandoverError, pcsc_safe.BrokerError, pcsc_safe.ForkUnsafeError) as error:
        print(error.pid, error.remedy)
    except pcsc_safe.SettingsError as error:
        print(error.remedy)
    recovers: bool = settings().recover and settings().guard_native
    patience: float = settings().quiesce_timeout
    pcsc_safe.uninstall()
    return kept if recovers and patience else []


class Card(VirtualCard):
    def apdu(self, command: bytes) -> bytes:
        return command


with VirtualPcsc(2, [EchoCard(), Card()]) as stack:
    reader: Reader = stack.readers[0]
    print(ask(reader.name, [0, 1, 0, 0]), stack.readers[1].remove().count(CardEvent.APDU))
'''

WRONG_PROGRAM = """
import pcsc_safe
from pcsc_safe import scard

hresult, context = scard.SCardEstablishContext("user")
hresult, card = scard.SCardConnect(context, "reader", 2, 3)
scard.SCardTransmit(context, 2, b"command")
scard.SCardNoSuchFunction(context)
pcsc_safe.configure(recover=1.5)
pcsc_safe.configure(no_such=True)
pcsc_safe.handover("reader").nothing
pcsc_safe.configure(policy="bogus")
pcsc_safe.install(cards="recover")
pcsc_safe.reconnecting(1, lambda card: card.upper())
"""


def test_the_stub_has_the_functions_of_pyscard_with_their_parameters() -> None:
    """Every function of the installed smartcard.scard is in the stub, with the same parameter names.

    An older pyscard may lack some: those for reader groups were added after 2.0.
    """
    declared = {
        node.name: [argument.arg for argument in node.args.args]
        for node in STUB.body
        if isinstance(node, ast.FunctionDef)
    }
    installed = {name: list(inspect.signature(function).parameters) for name, function in FUNCTIONS.items()}
    assert declared.items() >= installed.items() if OLDER else declared == installed


def test_the_stub_has_the_constants_of_pyscard_with_their_types() -> None:
    """Every constant of the installed smartcard.scard is in the stub with its type; from 2.3.1 on there is no other."""
    declared = {
        node.target.id: ast.unparse(node.annotation)
        for node in STUB.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    installed = {name: type(value).__name__ for name, value in CONSTANTS.items()}
    assert declared.items() >= installed.items()
    assert OLDER or declared == installed


def test_the_stub_has_everything_else_of_pyscard() -> None:
    """Besides functions and constants, smartcard.scard has only one exception."""
    classes = {node.name for node in STUB.body if isinstance(node, ast.ClassDef)}
    assert classes == {name for name, value in vars(raw).items() if inspect.isclass(value)} == {"error"}


def check(program: str, tmp_path: Path) -> list[str]:
    """The findings of mypy --strict in a user's program, as ``line: code``."""
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    (tmp_path / "mypy.ini").write_text("[mypy]\n")  # no settings of the checkout
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "program.py"]
    result = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=300)
    lines = result.stdout.splitlines()
    errors = [line for line in lines if ": error: " in line]
    assert lines, result
    assert all(line.startswith("program.py:") for line in errors), errors
    return [f"{line.split(':')[1]}: {line.rpartition('[')[2].rstrip(']')}" for line in errors]


def test_a_strictly_typed_program_passes(tmp_path: Path) -> None:
    """``mypy --strict`` accepts a program that uses every part of the public interface."""
    assert check(USER_PROGRAM, tmp_path) == []


def test_a_wrong_program_does_not_pass(tmp_path: Path) -> None:
    """A wrong argument, a wrong number of results, bytes for a list, and unknown names are found."""
    found = [
        "5: arg-type",
        "6: misc",
        "7: arg-type",
        "8: attr-defined",
        "9: arg-type",
        "10: call-arg",
        "11: attr-defined",
        "12: arg-type",
        "13: arg-type",
        "14: attr-defined",
    ]
    assert check(WRONG_PROGRAM, tmp_path) == found


def test_each_value_of_a_setting_is_known() -> None:
    """A type checker accepts a setting's enumeration and its words, and nothing else."""
    source = ast.parse(Path(pcsc_safe.__path__[0], "_core", "configure.py").read_text())
    typed = [node for node in ast.walk(source) if isinstance(node, ast.FunctionDef) and node.name == "configure"][-1]
    known = {
        argument.arg: ast.unparse(argument.annotation) for argument in typed.args.kwonlyargs if argument.annotation
    }
    assert known.keys() == {*SETTINGS, "context"}
    for name, row in SETTINGS.items():
        if row.choices():
            words = ", ".join(map(repr, row.choices()))
            assert known[name] == f"Union[{type(row.default).__name__}, Literal[{words}], None]"


def test_the_typed_program_uses_all_that_is_public() -> None:
    """The typed program uses every public name, so an added name can't be missed."""
    used = {node.attr for node in ast.walk(ast.parse(USER_PROGRAM)) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(ast.parse(USER_PROGRAM)) if isinstance(node, ast.Name)}
    assert set(pcsc_safe.__all__) <= used
