"""A third gateway, which the core has never heard of: it is composed as the other two are, and nothing else changes."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Callable, Optional

from forking import in_child, in_program

from pcsc_safe.testing import VirtualPcsc


class Recording:
    """The native gateway, with a list of what goes through it; and with a fault, if one is asked for."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seen: list[str] = []
        self.fault: Optional[int] = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def establish(self, scope: Any, keep: Callable[..., Any], outgrown: Optional[int] = None) -> Any:
        """As the native one; the context is one of this gateway's."""
        self.seen.append("SCardEstablishContext")
        return self.inner.establish(scope, lambda real, number, owner, _: keep(real, number, owner, self), outgrown)

    def connect(self, context: Any, arguments: Any, keep: Callable[..., Any]) -> Any:
        """As the native one."""
        self.seen.append("SCardConnect")
        return self.inner.connect(context, arguments, keep)

    def caller(self, call: Any) -> Callable[..., Any]:
        """As the native one's, or the fault."""
        make = self.inner.caller(call)

        def called(record: Any, arguments: tuple[Any, ...]) -> Any:
            self.seen.append(call.name)
            return make(record, arguments) if self.fault is None else call.failure(self.fault, arguments)

        return called


def compose() -> tuple[Recording, dict[str, Any]]:
    """What pcsc_safe._gateways does, with another gateway; returns it, and the functions of the drop-in."""
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
    """Parent and child; in the child the core asks the same gateway for a context of its own."""
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
    """It sees every call of the owner, and gives a child its context and card; its faults are answers too."""
    done = in_program(use_it, env={**os.environ, **shared_stack.env})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    connecting = ["SCardGetStatusChange", "SCardConnect"]  # how often a card has come or gone is asked before
    assert told["owner"] == ["SCardEstablishContext", "SCardListReaders", *connecting]
    assert told["child"] == [0, True, 0, ["SCardEstablishContext", "SCardListReaders", *connecting, "SCardStatus"]]
    assert (told["connected"], told["faults"], told["ends"]) == (0, [True, []], [0, 0])
