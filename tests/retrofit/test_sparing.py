"""pyscard's defaults don't affect a card that another process of the family uses."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from forking import start as start_child
from forking import wait_for
from programs import VERIFY, child, outcome, refusal, say, verified

import pcsc_safe
from pcsc_safe.testing import EchoCard, VirtualPcsc

pytestmark = pytest.mark.native  # each test sets what its programs use

WAYS = {"native": {}, "broker": {"PCSC_SAFE_BROKER": "always"}}
through_both = pytest.mark.parametrize("way", WAYS)


def connected() -> Any:
    from smartcard.System import readers

    connection = readers()[0].createConnection()
    connection.connect()
    return connection


def its_own(end: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def use(inherited: Any) -> Any:
        connection = connected()
        answer = verified(connection)
        end(connection)
        return answer

    return use


def inherited_one(end: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def use(inherited: Any) -> Any:
        answer = verified(inherited)
        end(inherited)
        return answer

    return use


def disconnects(connection: Any) -> None:
    connection.disconnect()


def releases(connection: Any) -> None:
    getattr(connection, "release", connection.disconnect)()


def drops(connection: Any) -> None:
    del connection
    gc.collect()


def reconnects(connection: Any) -> None:
    connection.reconnect()
    connection.reconnect()
    connection.disconnect()


def session_closes(inherited: Any) -> Any:
    from smartcard.Session import Session

    session = Session()
    session.sendCommandAPDU([0x80, 1, 0, 0, 0])
    session.close()
    return True


def request_is_served(inherited: Any) -> Any:
    from smartcard.CardRequest import CardRequest
    from smartcard.CardType import AnyCardType

    service = CardRequest(timeout=10, cardType=AnyCardType()).waitforcard()
    service.connection.connect()
    answer = verified(service.connection)
    del service
    gc.collect()
    return answer


def both(inherited: Any) -> Any:
    inherited.disconnect()
    return its_own(disconnects)(None)


USES: dict[str, Callable[[Any], Any]] = {
    **{f"its own {end.__name__}": its_own(end) for end in (disconnects, releases, drops, reconnects)},
    **{f"inherited {end.__name__}": inherited_one(end) for end in (disconnects, releases, drops, reconnects)},
    "both": both,
    "session closes": session_closes,
    "request": request_is_served,
}


def a_child_uses_the_card(use: str) -> None:
    pcsc_safe.install()
    mine = connected()
    mine.transmit(VERIFY)
    answer = child(lambda: USES[use](mine))
    say([answer, refusal(lambda: verified(mine)), verified(mine)])


@through_both
@pytest.mark.parametrize("use", USES)
def test_a_child_leaves_its_parents_card_alone(shared_stack: VirtualPcsc, use: str, way: str) -> None:
    """Whatever pyscard does by default, the parent's PIN stays verified."""
    assert outcome(a_child_uses_the_card, shared_stack, use, **WAYS[way]) == [True, "no error", True]


def explicitly(how: str) -> None:
    pcsc_safe.install()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pcsc_safe").addHandler(handler)
    mine = connected()
    mine.transmit(VERIFY)

    def in_child() -> Any:
        own = connected()
        if how == "disconnects":
            own.disconnect()
            return []
        for _ in range(2):
            own.reconnect(disposition=1)
        own.disconnect()
        own.connect(disposition=2)
        own.disconnect()
        return [line for line in lines if "the application passes this disposition" in line]

    say([len(child(in_child)), refusal(lambda: verified(mine))])


def test_what_the_application_asks_for_is_done(shared_stack: VirtualPcsc) -> None:
    """If the application asks for a reset, the card is reset, and the log says so once per connection."""
    assert outcome(explicitly, shared_stack, "says so") == [2, "CardConnectionException"]


def test_a_setting_turns_it_off(shared_stack: VirtualPcsc) -> None:
    """With the setting off, pyscard's defaults are unchanged."""
    assert outcome(explicitly, shared_stack, "disconnects", PCSC_SAFE_SPARE_CARDS="no") == [
        0,
        "CardConnectionException",
    ]


def a_parent_disconnects(how: str) -> None:
    pcsc_safe.install()
    mine = connected()
    mine.transmit(VERIFY)
    ready_end, ready = os.pipe()
    go_end, go = os.pipe()
    answer_end, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            verified(mine)
            os.write(ready, b".")
            os.read(go_end, 1)
            os.write(answer, b"verified" if verified(mine) else b"not verified")
        finally:
            os._exit(0)
    os.read(ready_end, 1)
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    mine.disconnect()
    os.write(go, b".")
    if how == "lives":
        say(os.read(answer_end, 100).decode())
        os.waitpid(pid, 0)
    else:
        mine.connect()
        say(verified(mine))


@through_both
def test_a_parent_leaves_its_childs_card_alone(shared_stack: VirtualPcsc, way: str) -> None:
    """A parent leaves the card alone if a child continues in its session; a child that has ended doesn't count."""
    assert outcome(a_parent_disconnects, shared_stack, "lives", **WAYS[way]) == "verified"
    card = shared_stack.readers[0].card
    assert isinstance(card, EchoCard)
    before = card.power_offs
    assert outcome(a_parent_disconnects, shared_stack, "killed", **WAYS[way]) is False
    assert card.power_offs > before


def a_brother_disconnects() -> None:
    pcsc_safe.install()
    mine = connected()
    mine.transmit(VERIFY)
    ready_end, ready = os.pipe()
    go_end, go = os.pipe()
    brothers_go_end, brothers_go = os.pipe()
    answer_end, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            verified(mine)
            os.write(ready, b".")
            os.read(go_end, 1)
            os.write(answer, b"verified" if verified(mine) else b"not verified")
        finally:
            os._exit(0)
    os.read(ready_end, 1)

    def brother() -> Any:
        told = verified(mine)
        os.write(ready, b".")
        os.read(brothers_go_end, 1)
        mine.disconnect()
        return told

    waiting = start_child(brother)
    os.read(ready_end, 1)
    mine.disconnect()
    os.write(brothers_go, b".")
    told = [wait_for(waiting)]
    os.write(go, b".")
    say([*told, os.read(answer_end, 100).decode()])
    os.waitpid(pid, 0)


def test_a_child_leaves_its_brothers_card_alone(shared_stack: VirtualPcsc) -> None:
    """Two children can continue in the session of their parent, even if the parent has disconnected since."""
    assert outcome(a_brother_disconnects, shared_stack) == [True, "verified"]


def signals() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two functions for two processes: one waits until the other has called the other one."""
    end, start = os.pipe()
    return lambda: os.read(end, 1), lambda: os.write(start, b".")


def another_process_ends(how: str) -> None:
    """A child's PIN stays verified whatever another process of its family does by pyscard's defaults."""
    pcsc_safe.install()
    from smartcard.System import readers

    connection = connected() if how != "each connects for itself" else None
    readers()  # a family knows only what has used PC/SC before the fork
    if connection is not None:
        connection.transmit(VERIFY)
    until_ready, ready = signals()
    until_go, go = signals()

    def in_child() -> bool:
        mine = connection or connected()
        if "before its first call" not in how:
            mine.transmit(VERIFY)
        ready()
        until_go()
        return verified(mine)

    with pcsc_safe.handover() if "after a handover" in how else contextlib.nullcontext():
        waiting = start_child(in_child)
    until_ready()
    OTHERS[how](connection)
    gc.collect()
    go()
    say(wait_for(waiting))


def a_sibling_reconnects(connection: Any) -> None:
    until_disconnected, disconnected = signals()

    def sibling() -> None:
        until_disconnected()
        with contextlib.suppress(Exception):  # the card was reset, says pcsc_safe
            verified(connection)
        connection.reconnect()

    waiting = start_child(sibling)
    connection.disconnect()
    disconnected()
    wait_for(waiting)


def its_own_is_closed(_: Any) -> None:
    connected().disconnect()


def it_reconnects_and_drops(connection: Any) -> None:
    pcsc_safe.reconnecting(connection, lambda connection: connection.transmit([0x80, 1, 0, 0, 0]))
    connection.disconnect()


OTHERS: dict[str, Callable[[Any], Any]] = {
    "each connects for itself": its_own_is_closed,
    "a second connection": its_own_is_closed,
    "a sibling reconnects": a_sibling_reconnects,
    "after a handover: it reconnects": lambda connection: connection.reconnect(),
    "after a handover: it reconnects and disconnects": it_reconnects_and_drops,
    "after a handover: another connection": its_own_is_closed,
    "after a handover, before its first call: another connection": its_own_is_closed,
    "shared, before its first call: another connection": its_own_is_closed,
}


@pytest.mark.parametrize("how", OTHERS)
def test_whoever_connected_first(shared_stack: VirtualPcsc, how: str) -> None:
    """A child keeps its PIN, whichever process connected first, before the fork or after it."""
    env = {"PCSC_SAFE_BROKER": "always", "PCSC_SAFE_POLICY": "share"} if "shared" in how else {}
    assert outcome(another_process_ends, shared_stack, how, **env) is True


def all_disconnect_at_once() -> None:
    pcsc_safe.install()
    from smartcard.System import readers

    readers()
    told = []
    for _ in range(10):
        pairs = [(*signals(), *signals()) for _ in range(2)]

        def in_child(ready: Callable[[], Any], until_go: Callable[[], Any]) -> None:
            mine = connected()
            mine.transmit(VERIFY)
            ready()
            until_go()
            mine.disconnect()

        waiting = [start_child(in_child, ready, until_go) for _, ready, until_go, _ in pairs]
        for until_ready, _, _, _ in pairs:
            until_ready()
        for _, _, _, go in pairs:
            go()
        for each in waiting:
            wait_for(each)
        told.append(child(lambda: verified(connected())))
    say(told)


def test_the_last_one_powers_the_card_off(shared_stack: VirtualPcsc) -> None:
    """If several processes disconnect at the same time, the next one finds no verified PIN, as without pcsc_safe."""
    assert outcome(all_disconnect_at_once, shared_stack) == [False] * 10


def its_own_outlives_a_shared_one() -> None:
    pcsc_safe.install()
    shared = connected()
    shared.transmit(VERIFY)
    until_ready, ready = signals()
    until_go, go = signals()

    def in_child() -> bool:
        shared.disconnect()
        own = connected()
        own.transmit(VERIFY)
        ready()
        until_go()
        return verified(own)

    waiting = start_child(in_child)
    until_ready()
    shared.disconnect()
    go()
    say(wait_for(waiting))


def test_a_shared_session_and_another_one(shared_stack: VirtualPcsc) -> None:
    """The last process of a shared session leaves the card alone that another one uses by a connection of its own."""
    env = {"PCSC_SAFE_BROKER": "always", "PCSC_SAFE_POLICY": "share"}
    assert outcome(its_own_outlives_a_shared_one, shared_stack, **env) is True
