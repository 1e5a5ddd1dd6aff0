"""pcsc_safe in a process that gevent or eventlet has patched.

A native call blocks a whole thread, with all its greenlets.  So do pcsc_safe's locks and pauses, which are the
interpreter's own, not the patched ones.  Otherwise native threads of the libraries' pools would wait for greenlets.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from forking import in_program
from green import (
    CANCELLED,
    LIBRARIES,
    OK,
    RESET,
    TIMED_OUT,
    classes,
    forks,
    greenlets,
    hands_over,
    pool,
    releases_beside_a_wait,
    reports_again,
)

from pcsc_safe.testing import EchoCard, VirtualPcsc

ORDERS = ["patched first", pytest.param("patched later", marks=pytest.mark.long)]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    """The library's name; not imported here, because it changes the process that imports it."""
    name = str(request.param)
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; it is in the extra 'hosts'")
    return name


@pytest.fixture(params=["native", "broker"])
def gateway(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ORDERS)
def how(request: pytest.FixtureRequest, library: str, gateway: str) -> tuple[str, ...]:
    """The arguments of a program."""
    return library, gateway, str(request.param)


def told(program: Callable[..., Any], how: tuple[str, ...]) -> Any:
    """The program's output, on a new stack; no context is left."""
    with VirtualPcsc(2, [EchoCard(), EchoCard()], activate=False) as stack:
        done = in_program(program, *how, env={**os.environ, **stack.env})
        assert done.returncode == 0, done.stderr
        stack.wait_for_clients(0)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_wait_in_the_pool(how: tuple[str, ...]) -> None:
    """While a thread of the pool waits, other threads of the pool and greenlets make calls, each with its own bytes."""
    assert told(pool, how) == [[50] * 5, [OK] * 3, OK, CANCELLED, TIMED_OUT, OK]


def test_a_release_beside_the_pool(how: tuple[str, ...]) -> None:
    """A greenlet that releases the context ends the wait; the two don't wait for each other."""
    assert told(releases_beside_a_wait, how) == [[OK, OK], True, True]


def test_greenlets(how: tuple[str, ...]) -> None:
    """Greenlets take turns on one context and one card; every exchange has its own bytes."""
    assert told(greenlets, how) == [[20] * 4, [20, 20], [TIMED_OUT], 40, OK]


def test_a_fork(how: tuple[str, ...]) -> None:
    """Parent and child continue after a fork; a wait in the pool neither ends nor delays the fork."""
    child = [[OK, 10, 10, TIMED_OUT, OK], 0]
    assert told(forks, how) == [[child] * 3, 10, True, OK, CANCELLED, OK]


@pytest.mark.parametrize("order", ["patched first", "patched later"])
def test_a_handover(library: str, gateway: str, order: str) -> None:
    """A greenlet that forks in a handover block hands over, whether the library has patched before or after import."""
    assert told(hands_over, (library, gateway, order)) == [[[OK, OK], 0], RESET, OK]


def test_the_classes_of_pyscard(how: tuple[str, ...]) -> None:
    """After install() a monitor of readers, requests and connections work in parent and child, at the same time."""
    again = [20, 20, 20, 2 if reports_again(how[0]) else 0]
    assert told(classes, how) == [[20, 20, 20, 2], [again, 0], again]
