"""The pytest plugin: ``pcsc_stack``, ``pcsc_card``, ``pcsc_stack_factory``, the marker ``pcsc``, a line in the header.

Invariant: a test run that doesn't use the plugin imports only this module and `_install`, which runs
``pcscd --version`` for the header; the fixtures import everything else.

At a fork: see `VirtualPcsc`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

import pytest

if TYPE_CHECKING:
    from . import VirtualCard, VirtualPcsc

    CardSource = Union[str, Callable[[], VirtualCard], None]
    StackFactory = Callable[..., VirtualPcsc]

__all__ = ["pcsc_card", "pcsc_stack", "pcsc_stack_factory"]

_LOG_TAIL = 2000  # characters
_STACKS = "_pcsc_safe_stacks"  # an attribute of the test's item: before pytest 7 it has no stash


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "pcsc(readers=2, cards=['echo', 'echo']): how many readers (1 to 16) pcsc_stack has, and the cards in the "
        "first ones: 'echo', 'piv', None for no card, or a class or function that makes a card",
    )


def pytest_report_header() -> str:
    """Print the versions of the virtual stack, or why there is none."""
    from ._install import Missing, look  # pytest loads this plugin in every run

    found = look()
    if isinstance(found, Missing):
        return f"virtual PC/SC stack: not available, {found.problem}"
    return f"virtual PC/SC stack: pcscd {found.version}, {found.driver}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Show the log of each pcscd that a failed test has started."""
    outcome = yield
    report = outcome.get_result()
    if report.when != "teardown" and report.failed:
        for stack in getattr(item, _STACKS, ()):
            with contextlib.suppress(Exception):  # it would end the whole run; the test may have closed the stack
                report.sections.append(("pcscd's log", stack.log[-_LOG_TAIL:]))


@pytest.fixture
def pcsc_stack_factory(request: pytest.FixtureRequest) -> Iterator[StackFactory]:
    """A function that starts a `VirtualPcsc`, which ends with the test.

    Its arguments are those of the marker ``pcsc``, and ``activate``: whether PC/SC calls in this process use the stack
    (default: True).  Stacks can be nested; see `VirtualPcsc.activated`.  The test is skipped if pcscd or vpcd is
    missing.
    """
    from ._install import Missing, look  # as above

    found = look()
    if isinstance(found, Missing) and found.is_installed:
        look.cache_clear()  # the machine may have been too busy
        found = look()
    if isinstance(found, Missing) and not found.is_installed:
        pytest.skip(f"{found.problem}; {found.remedy}")
    from . import VirtualPcsc  # as above

    with contextlib.ExitStack() as stacks:

        def start(
            readers: Optional[int] = None, cards: Optional[Sequence[CardSource]] = None, *, activate: bool = True
        ) -> VirtualPcsc:
            count = readers if readers is not None else 2 if cards is None else len(cards)
            made = [_card(source) for source in (["echo"] * count if cards is None else cards)]
            stack = stacks.enter_context(VirtualPcsc(count, made, activate=activate))
            vars(request.node).setdefault(_STACKS, []).append(stack)
            return stack

        yield start


def _card(source: CardSource) -> Optional[VirtualCard]:
    from . import EchoCard, PcscStackError  # as above

    if callable(source):
        return source()
    if source == "piv":
        from .piv import PivCard  # needs the extra piv

        return PivCard.personalised()
    if source in ("echo", None):
        return EchoCard() if source else None
    raise PcscStackError(
        f"{source!r} doesn't make a card",
        remedy="use 'echo', 'piv', None, or a class or function that returns a new card",
    )


@pytest.fixture
def pcsc_stack(request: pytest.FixtureRequest, pcsc_stack_factory: StackFactory) -> VirtualPcsc:
    """A new `VirtualPcsc` for each test, activated, with an EchoCard in each of its two readers.

    The marker requests other readers and cards: ``@pytest.mark.pcsc(readers=4)``,
    ``@pytest.mark.pcsc(cards=["piv", None, MyCard])``.  The test is skipped if pcscd or vpcd is missing.
    """
    marker = request.node.get_closest_marker("pcsc")
    return pcsc_stack_factory(*marker.args, **marker.kwargs) if marker else pcsc_stack_factory()


@pytest.fixture
def pcsc_card(pcsc_stack: VirtualPcsc) -> VirtualCard:
    """The card in the first reader of ``pcsc_stack``."""
    card = pcsc_stack.readers[0].card
    assert card is not None
    return card
