"""One run of one hazard: a new virtual stack, a disposable process on it, and what is observed from outside.

Invariant: the run ends soon after the hazard's ``SECONDS``, and leaves nothing behind.  The demo itself never forks and
never uses PC/SC.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ..testing._disposable import Stopped, command_of, run_disposable
from ._judge import Run, Verdict, conclude
from ._stage import PCSCD
from .hazards import Hazard

__all__ = ["Stopped", "judged", "run"]


def run(hazard: Hazard, module: str, stop: threading.Event) -> Run:
    """Run a hazard's program on a separate stack.

    :param module: the name of the scard module to use.
    :param stop: set it to end the run immediately.
    :raises PcscStackError: the virtual stack can't be started.
    :raises Stopped: ``stop`` was set.
    """
    from ..testing import EchoCard, VirtualPcsc  # only a run needs a stack

    with VirtualPcsc(cards=[EchoCard(), EchoCard()], activate=False) as stack:
        # Settings of the user's would make it another demonstration.
        env = {name: value for name, value in stack.env.items() if not name.startswith("PCSC_SAFE_")}
        return _run_disposable(hazard, module, {**env, PCSCD: str(stack.pid)}, stop)


def judged(hazard: Hazard, module: str, stop: threading.Event) -> tuple[Run, Verdict]:
    """Run a hazard's program, and judge what was observed; see :func:`run`."""
    seen = run(hazard, module, stop)
    return seen, conclude(hazard.judge(seen), seen)


def _run_disposable(hazard: Hazard, module: str, env: Mapping[str, str], stop: threading.Event) -> Run:
    command = [*command_of("pcsc_safe.demo._stage"), hazard.__name__, module, f"{hazard.SECONDS + 5}"]
    return Run(module, *run_disposable(command, env, hazard.SECONDS, stop))
