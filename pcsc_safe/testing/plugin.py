"""The pytest plugin: fixtures ``pcsc_stack`` and ``pcsc_card``, marker ``pcsc``, and a line in the header.

Invariant: a test run that doesn't use it pays for this module alone; everything else is imported by the fixtures.

At a fork: see `VirtualPcsc`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from . import VirtualCard, VirtualPcsc

__all__ = ["pcsc_card", "pcsc_stack"]

_LOG_TAIL = 2000  # characters


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", "pcsc(readers=2): how many readers (1 to 16), each with an EchoCard, the pcsc_stack fixture has"
    )


def pytest_report_header() -> str:
    """Name what the virtual stack consists of here."""
    from ._install import Missing, look  # pytest loads this plugin in every run

    found = look()
    if isinstance(found, Missing):
        return f"virtual PC/SC stack: none, {found.problem}"
    return f"virtual PC/SC stack: pcscd {found.version}, {found.driver}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Show what pcscd logged where a test with the fixture failed."""
    outcome = yield
    report = outcome.get_result()
    stack = getattr(item, "funcargs", {}).get("pcsc_stack")
    if stack is not None and report.when == "call" and report.failed:
        report.sections.append(("pcscd's log", stack.log[-_LOG_TAIL:]))


@pytest.fixture
def pcsc_stack(request: pytest.FixtureRequest) -> Iterator[VirtualPcsc]:
    """A fresh `VirtualPcsc` for each test, activated, with an EchoCard in every reader.

    It has two readers, or as many as the test asks for: ``@pytest.mark.pcsc(readers=4)``.  The test is skipped where
    pcscd or vpcd is missing.
    """
    from ._install import Missing, look  # as above

    found = look()
    if isinstance(found, Missing):
        pytest.skip(f"{found.problem}; {found.remedy}")
    from . import EchoCard, VirtualPcsc  # as above

    marker = request.node.get_closest_marker("pcsc")
    readers = marker.kwargs.get("readers", 2) if marker else 2
    with VirtualPcsc(readers, [EchoCard() for _ in range(readers)]) as stack:
        yield stack


@pytest.fixture
def pcsc_card(pcsc_stack: VirtualPcsc) -> VirtualCard:
    """The card in the first reader of ``pcsc_stack``."""
    card = pcsc_stack.readers[0].card
    assert card is not None
    return card
