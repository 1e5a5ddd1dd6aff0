"""Imports what a broker requires, before a child can need it.

If another thread held an import lock at a fork, the child must not import a module.  So a process imports the modules
for brokers when it uses PC/SC for the first time, or when the settings say that it needs a broker.  A fork waits for
these imports.

Invariant: a process that has a context needs no further import, and neither does its child.
"""

from __future__ import annotations

from ..policy import Broker, Owner, Policy, Settings, native_works_after_fork
from . import gate, gateways, in_flight

__all__ = ["is_on", "prepare", "prepare_for"]

is_on = True
"""Whether this process can have children, or use a broker; a broker does neither."""


def prepare_for(settings: Settings) -> None:
    """Import what this process, or a child, needs in any case according to these settings."""
    if settings.owner is Owner.CHILD or settings.policy is Policy.SHARE:
        from . import transfer  # imports much that a process otherwise imports for its first context

        transfer.register_hooks()
    always = settings.broker is Broker.ALWAYS or settings.policy is Policy.BROKER
    if always or settings.recover or not native_works_after_fork():
        gate.call_inside(in_flight.IMPORTS, prepare)


def prepare() -> None:
    """Import what a broker requires; called where a fork waits for imports."""
    if is_on:
        gateways.brokers.prepare()
