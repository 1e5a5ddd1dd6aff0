"""What every test can use: a fork helper, a program helper, and sessions on the virtual stack.

Every fork of the tests uses :mod:`forking`: its own session, a watchdog that dumps stacks, ``os._exit``.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import forking
import macos
import pytest
from calling import HeldCard
from macos import OnMacos

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core import handles, process, settings
from pcsc_safe.policy import Broker, Settings
from pcsc_safe.testing import EchoCard, VirtualPcsc
from pcsc_safe.testing._install import Missing, look

ECHO = [0x80, 0x01, 0x00, 0x00, 0x03, 1, 2, 3]
VERIFY = [0x80, 0x20, 0x00, 0x00, 0x00]
IS_VERIFIED = [0x80, 0x30, 0x00, 0x00, 0x00]


GATEWAYS = {
    "native": "the native library of this process",
    "broker": "a broker; the native library is loaded, and not used",
    "always": "a broker; the native library is not loaded. Wants PCSC_SAFE_BROKER=always in the environment",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--gateway``: how the tests of the contract reach PC/SC.  ``--darwin``: run the tests on a simulated macOS.

    ``--claims``: share the test files with another pytest.
    """
    told = "; ".join(f"{name}: {text}" for name, text in GATEWAYS.items())
    parser.addoption("--gateway", choices=GATEWAYS, default="native", help=f"how tests reach PC/SC ({told})")
    parser.addoption("--darwin", action="store_true", help="run the tests on a simulated macOS (tests/macos.py)")
    parser.addoption(
        "--claims",
        metavar="DIRECTORY",
        type=Path,
        help="leave out the test files that another pytest with the same directory has begun",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With ``--darwin``, start again in an environment in which the loader and Python find the simulation."""
    if config.getoption("darwin") and macos.directory() is None:
        config.pluginmanager.getplugin("capturemanager").stop_global_capturing()
        try:
            macos.run_pytest(config.invocation_params.args)
        except macos.NoCompilerError as error:
            raise pytest.UsageError(str(error)) from None


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the simulation that ``--darwin`` has made."""
    directory = macos.directory()
    if config.getoption("darwin") and directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Check that the options have taken effect, and that the programs that tests start ignore no signal."""
    # A shell makes background processes ignore these two.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    asked = config.getoption("gateway") == "always"
    if asked != (os.environ.get("PCSC_SAFE_BROKER") == "always"):
        raise pytest.UsageError("--gateway always and PCSC_SAFE_BROKER=always go together")


LONG_TIMEOUT = 2000
"""The time limit of a long test in seconds, longer than its watchdogs'; pyproject.toml has the limit of the others."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give long tests their time limit; skip what doesn't apply to the gateway or to the simulated macOS."""
    is_macos = macos.directory() is not None or sys.platform == "darwin"
    for item in items:
        without = item.get_closest_marker("not_on_macos")
        if without is not None and is_macos:
            item.add_marker(pytest.mark.skip(reason=f"not on macOS: {without.args[0]}"))
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT))
    if config.getoption("gateway") != "native":
        about_native = [item for item in items if item.get_closest_marker("native")]
        config.hook.pytest_deselected(items=about_native)
        items[:] = [item for item in items if item not in about_native]


def claimed(items: list[pytest.Item], claims: Path) -> Iterator[pytest.Item]:
    """The tests of the files that this process is the first to begin; each file is claimed when it is reached."""
    mine: set[Path] = set()
    for item in items:
        if item.path not in mine:
            try:
                claims.joinpath(str(item.path.relative_to(item.config.rootpath)).replace(os.sep, "-")).touch(
                    exist_ok=False
                )
            except FileExistsError:
                continue
            mine.add(item.path)
        yield item


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Optional[bool]:
    """With ``--claims``: leave out the test files that another process has begun.

    pytest-xdist does something similar, but its processes have a second thread: a fork there is no longer the fork of a
    process with one thread, which most of the tests are about.
    """
    claims = session.config.getoption("claims")
    if claims is None or session.testsfailed or session.config.getoption("collectonly"):
        return None  # pytest's own loop
    mine = claimed(session.items, claims)
    item = next(mine, None)
    while item is not None:
        following = next(mine, None)  # pytest must know the next test, to end the fixtures that it doesn't need
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With ``--gateway always`` no test may have loaded the native library."""
    if session.config.getoption("gateway") == "always" and "libpcsclite" in Path("/proc/self/maps").read_text():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nthe native library was loaded into this process", file=sys.stderr)


@pytest.fixture(scope="session")
def shared_stack() -> Iterator[VirtualPcsc]:
    """One stack for the tests that don't change pcscd, the readers and the cards."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(2, [EchoCard(), EchoCard()]) as stack:
        yield stack


@pytest.fixture(autouse=True, scope="module")
def release_what_is_left() -> Iterator[None]:
    """Release the contexts of this process after each module: a test's children see that it still has its sessions."""
    yield
    for context in list(handles.contexts.values()):
        if context.owner is process.here and not context.released:
            with contextlib.suppress(pcsc_safe.PcscSafeError):
                safe.SCardReleaseContext(context.safe)


@pytest.fixture(autouse=True)
def default_settings(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Iterator[None]:
    """Every test begins and ends with the default settings, except ``--gateway``; the environment has no effect."""
    for name in Settings._fields:
        monkeypatch.delenv(f"PCSC_SAFE_{name.upper()}", raising=False)
    native = pytestconfig.getoption("gateway") == "native"
    defaults = Settings() if native else Settings(broker=Broker.ALWAYS)
    if not native:
        monkeypatch.setenv("PCSC_SAFE_BROKER", "always")
    settings.replace(defaults)
    settings._settings = None
    yield
    settings.replace(defaults)
    settings._settings = None


class Session:
    """A context and a card connection of this process, with the PIN verified; a fork must not damage it."""

    def __init__(self, share_mode: int = safe.SCARD_SHARE_SHARED) -> None:
        hresult, self.context = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)
        assert hresult == safe.SCARD_S_SUCCESS
        hresult, readers = safe.SCardListReaders(self.context, [])
        assert hresult == safe.SCARD_S_SUCCESS
        self.reader = readers[0]
        hresult, self.card, self.protocol = safe.SCardConnect(
            self.context, self.reader, share_mode, safe.SCARD_PROTOCOL_ANY
        )
        assert hresult == safe.SCARD_S_SUCCESS
        assert self.transmit(VERIFY) == [safe.SCARD_S_SUCCESS, [0x90, 0x00]]

    def transmit(self, command: list[int]) -> Any:
        """SCardTransmit on this session's card."""
        return safe.SCardTransmit(self.card, safe.SCARD_PCI_T1, command)

    def assert_untouched(self) -> None:
        """Check that the session continues: same context, same connection, PIN still verified."""
        assert safe.SCardIsValidContext(self.context) == safe.SCARD_S_SUCCESS
        assert self.transmit(IS_VERIFIED) == [safe.SCARD_S_SUCCESS, [1, 0x90, 0x00]]
        assert self.transmit(ECHO) == [safe.SCARD_S_SUCCESS, [1, 2, 3, 0x90, 0x00]]

    def close(self) -> None:
        """Power the card off, so that its PIN is not verified in the next test."""
        safe.SCardDisconnect(self.card, safe.SCARD_UNPOWER_CARD)
        safe.SCardReleaseContext(self.context)


@pytest.fixture
def session(shared_stack: VirtualPcsc) -> Iterator[Session]:
    """A session on the shared stack; it must be intact after the test."""
    session = Session()
    yield session
    gc.collect()
    session.assert_untouched()
    session.close()


@pytest.fixture(scope="session")
def on_macos(tmp_path_factory: pytest.TempPathFactory) -> OnMacos:
    """The environment of a program that uses a stack on the simulated macOS."""
    if not sys.platform.startswith("linux"):
        pytest.skip(f"macOS can be simulated on Linux only, this is {sys.platform}")
    already = macos.directory()
    if already is not None:
        return lambda stack: macos.environment(stack.env, already)
    directory = tmp_path_factory.mktemp("macos")
    try:
        macos.build(directory)
    except macos.NoCompilerError as error:
        pytest.skip(str(error))
    return lambda stack: macos.environment(stack.env, directory)


@pytest.fixture
def held() -> Iterator[VirtualPcsc]:
    """A stack whose first card is a HeldCard; the third reader is another device, and doesn't wait for that card."""
    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    with VirtualPcsc(4, [HeldCard(), EchoCard(), EchoCard(), EchoCard()]) as stack:
        yield stack
        card = stack.readers[0].card
        assert isinstance(card, HeldCard)
        card.go.set()


@pytest.fixture
def in_child() -> Any:
    """:func:`forking.in_child`."""
    return forking.in_child


def pytest_report_header(config: pytest.Config) -> str:
    """Add what is tested to the header."""
    import importlib.metadata as metadata

    return (
        f"pcsc_safe {pcsc_safe.__version__} from {pcsc_safe.__path__[0]}, "
        f"pyscard {metadata.version('pyscard')}, wrapt {metadata.version('wrapt')}, "
        f"through {GATEWAYS[config.getoption('gateway')]}{', on a simulated macOS' if macos.directory() else ''}"
    )
