"""Imports what a broker requires, before a child can need it.

A child must not be the first process to import a module if another thread may have held an import lock at its fork.  So
a process imports what a broker requires when it uses PC/SC for the first time, or when the settings say that it needs a
broker.  A fork waits for that.

Invariant: a process that has a context has nothing left to import, and neither has its child.
"""

from __future__ import annotations

from ..policy import Broker, Owner, Policy, Settings, native_works_after_fork
from . import gate, gateways, in_flight

__all__ = ["consider", "is_on", "prepare"]

is_on = True
"""Whether this process can have children, or use a broker; a broker does neither."""


def consider(settings: Settings) -> None:
    """Import what this process, or a child, needs in any case according to these settings."""
    if settings.owner is Owner.CHILD or settings.policy is Policy.SHARE:
        from . import transfer  # not for processes that give their children nothing

        transfer.begin()
    always = settings.broker is Broker.ALWAYS or settings.policy is Policy.BROKER
    if always or settings.recover or not native_works_after_fork():
        gate.during(in_flight.IMPORTS, prepare)


def prepare() -> None:
    """Import what a broker requires; called where a fork waits for imports."""
    if is_on:
        gateways.brokers.prepare()
