"""A third gateway, unknown to the core: it is composed like the other two, and nothing else changes."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Callable, Optional

from forking import in_child, in_program

from pcsc_safe.testing import VirtualPcsc


class Recording:
    """The native gateway, with a record of the calls, and with a fault if the test sets one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seen: list[str] = []
        self.fault: Optional[int] = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def establish(self, scope: Any, keep: Callable[..., Any], here: Any, outgrown: Optional[int] = None) -> Any:
        """Establish as the native gateway does; the context belongs to this gateway."""
        self.seen.append("SCardEstablishContext")
        return self.inner.establish(
            scope, lambda real, number, owner, _: keep(real, number, owner, self), here, outgrown
        )

    def connect(self, context: Any, arguments: Any, keep: Callable[..., Any]) -> Any:
        """Connect as the native gateway does."""
        self.seen.append("SCardConnect")
        return self.inner.connect(context, arguments, keep)

    def caller(self, call: Any, *more: Any) -> Callable[..., Any]:
        """Return the native gateway's caller, or one that returns the fault."""
        make = self.inner.caller(call, *more)

        def called(record: Any, arguments: tuple[Any, ...]) -> Any:
            self.seen.append(call.name)
            return make(record, arguments) if self.fault is None else call.failure(self.fault, arguments)

        return called


def compose() -> tuple[Recording, dict[str, Any]]:
    """Do what pcsc_safe._gateways does, with another gateway; return it and the drop-in's functions."""
    from pcsc_safe._core import gateways
    from pcsc_safe._native import pyscard
    from pcsc_safe.broker import family

    pyscard.load()
    from pcsc_safe._native import gateway

    recording = Recording(gateway.gateway)
    gateways.compose(recording, family)
    from pcsc_safe._core.router import public

    return recording, public


def use_it() -> None:
    """Use PC/SC in parent and child; for the child the core asks the same gateway for a new context."""
    assert "pcsc_safe.scard" not in sys.modules
    recording, scard = compose()
    _, context = scard["SCardEstablishContext"](0)
    _, readers = scard["SCardListReaders"](context, [])
    hresult, card, _ = scard["SCardConnect"](context, readers[0], 2, 3)
    told = {"connected": hresult, "owner": list(recording.seen)}

    def child() -> Any:
        recording.seen.clear()
        hresult, again = scard["SCardListReaders"](context, [])
        return [hresult, again == readers, scard["SCardStatus"](card)[0], recording.seen]

    told["child"] = in_child(child)
    recording.fault = scard["SCARD_E_READER_UNAVAILABLE"]
    told["faults"] = [scard["SCardStatus"](card)[0] == recording.fault, scard["SCardListReaders"](context, [])[1]]
    recording.fault = None
    told["ends"] = [scard["SCardDisconnect"](card, 0), scard["SCardReleaseContext"](context)]
    print(json.dumps(told))


def test_a_gateway_that_the_core_does_not_know(shared_stack: VirtualPcsc) -> None:
    """The gateway gets every call of the owner, and gives a child its context and card. Its faults are returned too."""
    done = in_program(use_it, env={**os.environ, **shared_stack.env})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    connecting = ["SCardGetStatusChange", "SCardConnect"]  # first asks how often a card was inserted
    assert told["owner"] == ["SCardEstablishContext", "SCardListReaders", *connecting]
    assert told["child"] == [0, True, 0, ["SCardEstablishContext", "SCardListReaders", *connecting, "SCardStatus"]]
    assert (told["connected"], told["faults"], told["ends"]) == (0, [True, []], [0, 0])
