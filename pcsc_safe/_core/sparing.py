"""Whether a call may reset or power off a card that another process of the family uses.

By default pyscard powers a card off when it disconnects, and resets it when it reconnects.  In a family of processes
this ends the session of every other process that is connected: the PIN has to be verified again.  So pyscard's defaults
leave such a card alone, whichever process connected first, and whether before or after the fork.  A reset that the
application asks for is done, and logged once.  At a fork nothing changes here.
"""

from __future__ import annotations

from . import log, observer, process
from .calls import ByDefault
from .handles import Card
from .reestablish import LEAVE_CARD
from .settings import settings

__all__ = ["disposition"]


def disposition(function: str, card: Card, wanted: int) -> int:
    """What a call should do to a card that this process is connected to.

    :param function: PC/SC's name of the call.
    :param wanted: SCARD_*_CARD, from the application or by default.
    """
    session = card.session
    # What processes with one connection ask for, the broker does when the last of them disconnects.
    is_last_asked = session.is_joint and function == "SCardDisconnect"
    if wanted == LEAVE_CARD or not settings().spare_cards:
        return int(wanted)
    if not (session.is_used_apart() if is_last_asked else session.is_used_by_others()):
        return int(wanted)
    if isinstance(wanted, ByDefault):
        return LEAVE_CARD
    here = process.current()
    if card.warned_of_end is not here:
        card.warned_of_end = here
        observer.record("interferes", function=function, context=card.context.key)
        log.warning(
            "interference",
            "process %(pid)d resets or powers off the card in %(reader)s, which its parent, a child or a sibling uses "
            "too, because the application passes this disposition to %(function)s: pass SCARD_LEAVE_CARD to leave the "
            "card alone",
            function=function,
            reader=card.reader,
        )
    return int(wanted)
