"""Policy ``share``: all processes of a fork family continue one session, and no other application interrupts it."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import stat
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from brokers import ENOUGH, Client, Link, broker, brokers, until, watched
from calling import Calling, stays
from cforks import c_fork
from conftest import ECHO, IS_VERIFIED, Session
from families import (
    BEGIN,
    ECHOED,
    END,
    EXCLUSIVE,
    INVALID,
    IS_PIN_THERE,
    LEAVE,
    OK,
    RECONNECT,
    RESET,
    SHARED,
    T1,
    TRANSMIT,
    UNPOWER,
    VERIFIED,
    VIOLATION,
    Member,
    another,
    called,
    card_of,
    exchanges,
    is_free,
    module_stack,
    sharing,
    stack,
)
from forking import in_child, in_program, start, wait_for
from macos import OnMacos

import pcsc_safe
from pcsc_safe import scard as safe
from pcsc_safe._core.calls import ByDefault
from pcsc_safe.errors import SettingsError
from pcsc_safe.testing import VirtualPcsc

__all__ = ["module_stack", "stack"]

pytestmark = pytest.mark.native  # each family chooses its own way to PC/SC


# One session.


def test_all_go_on_in_one_session(stack: VirtualPcsc) -> None:
    """Parent and eight children make 1,000 exchanges each: all are right, and the connection stays exclusive."""

    def head(link: Link) -> Any:
        session = Session(EXCLUSIVE)
        children = [start(exchanges, session, number, 1000) for number in range(8)]
        link.say("they exchange")
        return [exchanges(session, 8, 1000), *map(wait_for, children), len(brokers())]

    with Client(sharing(head)) as client:
        client.hear()
        free = [is_free(stack, mode) for mode in (EXCLUSIVE, SHARED)]
        *answers, how_many_brokers = client.result()
    assert free == [False, False]
    assert answers == [(0, VERIFIED)] * 9
    assert how_many_brokers == 1


@pytest.mark.parametrize("how", ["exit", "SIGKILL"])
def test_a_child_goes_on_without_its_parent(stack: VirtualPcsc, how: str) -> None:
    """A child continues the session when its parent ends. Session and broker end with the last process."""

    def child(link: Link, session: Session, parent: int) -> None:
        until(lambda: os.getppid() != parent, "its parent is gone")
        link.say(exchanges(session, 1, 10))
        link.hear()

    def head(link: Link) -> None:
        start(child, link, Session(EXCLUSIVE), os.getpid())
        link.say(broker())
        time.sleep(0 if how == "exit" else ENOUGH)

    with Client(sharing(head)) as client, watched(client.hear()) as of_broker:
        if how == "SIGKILL":
            client.kill()
        assert client.hear() == (0, VERIFIED)
        assert not is_free(stack)
        assert not of_broker.ends(0)
        client.say("end")
        assert of_broker.ends()
        until(lambda: is_free(stack), "the hold has ended")


HOW_TO_LEAVE = [
    pytest.param(SHARED, ("SCardDisconnect", LEAVE), 0, 0, id="leave"),
    pytest.param(SHARED, ("SCardDisconnect", RESET), 1, 0, id="reset"),
    pytest.param(SHARED, ("SCardDisconnect", UNPOWER), 0, 1, id="unpower"),
    pytest.param(SHARED, ("SCardReleaseContext",), 0, 0, id="release"),
    pytest.param(SHARED, None, 0, 0, id="die"),
    pytest.param(SHARED, BEGIN, 1, 0, id="die-in-transaction"),
    pytest.param(EXCLUSIVE, ("SCardReleaseContext",), 1, 0, id="release-exclusive"),
    pytest.param(EXCLUSIVE, None, 1, 0, id="die-exclusive"),
]


@pytest.mark.parametrize("last", ["parent", "child", "one that does not share"])
@pytest.mark.parametrize(("share_mode", "how", "resets", "power_offs"), HOW_TO_LEAVE)
def test_the_last_holder_ends_the_session(
    stack: VirtualPcsc, share_mode: int, how: Any, resets: int, power_offs: int, last: str
) -> None:
    """The last process decides what happens to the card, as if it had been alone, whatever the others asked for."""
    disposed = "SCardDisconnect", UNPOWER

    def ends(session: Session) -> Any:
        return called(session, *IS_PIN_THERE), called(session, *how) if how else OK

    def head() -> Any:
        session = Session(share_mode)
        with Member(session) as child, Member(session) as other:
            first = [child.calls(*disposed), child.calls(*TRANSMIT), other.calls("SCardReleaseContext")]
            if last == "parent":
                return first, ends(session)
            with Member(session) as heir:
                called(session, *disposed)
                return first, (heir.calls(*IS_PIN_THERE), heir.calls(*how) if how else OK)

    # Beside another connection pcscd doesn't power the card off, as it does with an unused card.
    with another(stack, SHARED) if share_mode == SHARED else contextlib.nullcontext():
        card = card_of(stack)
        before = card.resets, card.power_offs
        if last in ("parent", "child"):
            assert in_child(sharing(head)) == ([OK, [INVALID, []], OK], (VERIFIED, OK))
        else:
            assert in_child(lambda: ends(Session(share_mode))) == (VERIFIED, OK)
        stack.wait_for_clients(int(share_mode == SHARED))
        card.wait_for("reset", before[0] + resets)
        card.wait_for("power-off", before[1] + power_offs)
        after = card.resets - before[0], card.power_offs - before[1], card.verified
        assert after[0] == resets
        assert share_mode == EXCLUSIVE or after == (resets, power_offs, not (resets or power_offs))


@pytest.mark.parametrize("mode", [SHARED, EXCLUSIVE])
def test_a_default_reset_spares_the_card(stack: VirtualPcsc, mode: int) -> None:
    """A default reset of pyscard in one process leaves alone the card that another process uses in the same session."""

    def head() -> Any:
        session = Session(mode)

        def reset() -> Any:
            safe.SCardReconnect(session.card, mode, T1, ByDefault(safe.SCARD_RESET_CARD))
            return session.transmit(IS_VERIFIED)

        def child(link: Link) -> None:
            link.say(reset())
            link.hear()

        with Client(child) as other:
            answers = [other.hear(), reset()]
            other.say("both have reset")
            other.result()
        return [*answers, reset()]

    assert in_child(sharing(head)) == [VERIFIED, VERIFIED, [OK, [0, 0x90, 0x00]]]


def test_what_comes_after_the_fork_is_of_one_alone(stack: VirtualPcsc) -> None:
    """Contexts and cards that a process gets after the fork are its own, and end with it."""

    def connects(session: Session, reader: int, share_mode: int) -> Any:
        own = safe.SCardEstablishContext(safe.SCARD_SCOPE_SYSTEM)[1]
        name = safe.SCardListReaders(own, [])[1][reader]
        return own, name, safe.SCardConnect(session.context, name, share_mode, T1)

    def reaches(context: int, card: int) -> Any:
        return safe.SCardListReaders(context, [])[0], safe.SCardStatus(card)[0], safe.SCardDisconnect(card, UNPOWER)

    def child(link: Link, session: Session) -> None:
        own, _, (hresult, card, _) = connects(session, 1, EXCLUSIVE)
        link.say((hresult, int(own), int(card)))
        link.say(reaches(*link.hear()))
        link.hear()

    def head() -> Any:
        session = Session()
        with Client(child, session) as client:
            hresult, *theirs = client.hear()
            own, _, (mine, card, _) = connects(session, 0, SHARED)
            *_, name, (refused, _, _) = connects(session, 1, EXCLUSIVE)
            reached = reaches(*theirs)
            client.say((int(own), int(card)))
            answers = [hresult, mine, refused], reached, client.hear(), safe.SCardStatus(card)[0]
        until(lambda: safe.SCardConnect(session.context, name, EXCLUSIVE, T1)[0] == OK, "it is free")
        return answers, called(session, *IS_PIN_THERE)

    by_number = (INVALID, INVALID, INVALID)
    assert in_child(sharing(head)) == (([OK, OK, VIOLATION], by_number, by_number, OK), VERIFIED)


def test_a_cancel_is_for_the_waits_of_one_process(stack: VirtualPcsc) -> None:
    """SCardCancel ends only waits of its own process. Other processes' waits on the context continue."""

    def head() -> Any:
        session = Session()
        name = safe.SCardListReaders(session.context, [])[1][1]
        state = safe.SCardGetStatusChange(session.context, 0, [(name, 0)])[1][0][1]
        waits = [Calling(called, session, "SCardGetStatusChange", safe.INFINITE, [(name, state)]) for _ in range(2)]
        until(lambda: stays(lambda: all(wait.waits for wait in waits)), "they wait")
        with Member(session) as child:
            child.say(("SCardGetStatusChange", 3000, [(name, state)]))
            silent, exchanged = child.is_silent(), called(session, *TRANSMIT)
            cancelled = called(session, "SCardCancel"), [wait.answer()[0] for wait in waits]
            return silent, exchanged, cancelled, child.is_silent(), child.hear()[0]

    cancelled = OK, [safe.SCARD_E_CANCELLED] * 2
    assert in_child(sharing(head)) == (True, ECHOED, cancelled, True, safe.SCARD_E_TIMEOUT)


WAITING = [TRANSMIT, ("SCardStatus",), BEGIN, RECONNECT]
REFUSED = [("SCardControl", 1, []), END]


@pytest.mark.parametrize("how", ["shared", "apart"])
def test_transactions_exclude_each_other(stack: VirtualPcsc, how: str) -> None:
    """Transactions of the processes in a session exclude each other, as those of separate applications do."""

    def head() -> Any:
        session = Session()
        with Member(session if how == "shared" else None) as other:
            other.calls(*TRANSMIT)
            waited, refused = [], []
            for asked in WAITING:
                assert called(session, *BEGIN) == OK
                other.say(asked)
                silent, mine, ended = other.is_silent(), called(session, *TRANSMIT), called(session, *END)
                answer = other.hear()
                waited.append((silent, mine, ended, answer[0] if isinstance(answer, list) else answer))
                assert asked != BEGIN or other.calls(*END) == OK
            for asked in REFUSED:
                assert called(session, *BEGIN) == OK
                refused.append((other.calls(*asked), called(session, *END)))
            return waited, refused

    waited, refused = in_child(sharing(head) if how == "shared" else head)
    assert waited == [(True, ECHOED, OK, OK)] * len(WAITING)
    assert refused == [([VIOLATION, []], OK), (VIOLATION, OK)]


session: Any = None  # the pool's program sets it


def in_a_pool(number: int) -> Any:
    return exchanges(session, number, 10)


def with_a_pool() -> None:
    """A program that opens its session before it starts a pool of workers, twice, and exits normally."""
    import test_share  # pickle finds this module

    test_share.session = Session(EXCLUSIVE)
    for _ in range(2):
        with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
            print(json.dumps([*pool.map(test_share.in_a_pool, range(20))]))
    print(json.dumps([test_share.in_a_pool(1)]))


def environment(stack: VirtualPcsc) -> dict[str, str]:
    return {**stack.env, "PCSC_SAFE_BROKER": "always", "PCSC_SAFE_POLICY": "share"}


def test_a_pool_of_workers(stack: VirtualPcsc) -> None:
    """The settings come from the environment, and concurrent.futures forks: the session outlives the workers."""
    done = in_program(with_a_pool, env=environment(stack))
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[[0, VERIFIED]] * many for many in (20, 20, 1)]


def a_family() -> None:
    """A program with children of both kinds of fork, and a grandchild."""
    session = Session(EXCLUSIVE)

    def child() -> Any:
        return [exchanges(session, 1, 10), in_child(exchanges, session, 2, 10)]

    answers = [in_child(child), in_child(child, fork=c_fork), exchanges(session, 3, 10)]
    print(json.dumps([answers, "libpcsclite" in Path("/proc/self/maps").read_text()]))


def test_on_macos(stack: VirtualPcsc, on_macos: OnMacos) -> None:
    """Sharing works on macOS (simulated), where PC/SC dies in forked processes: none of them loads it."""
    done = in_program(a_family, env={**environment(stack), **on_macos(stack)})
    assert (done.returncode, done.stderr) == (0, "")
    right = [0, VERIFIED]
    assert json.loads(done.stdout) == [[[right, right], [right, right], right], False]


# Who shares.


@pytest.mark.parametrize("joins", [True, False])
def test_a_fork_that_ran_no_hooks(stack: VirtualPcsc, joins: bool) -> None:
    """The child of a fork without hooks can join its owner's session while the owner lives, and then continue it."""

    def child(link: Link, session: Session) -> None:
        link.say(called(session, *TRANSMIT) if joins else None)
        link.hear()
        link.say([called(session, *asked) for asked in (IS_PIN_THERE, ("SCardIsValidContext",))])

    def head(link: Link) -> None:
        start(child, link, Session(), fork=c_fork)
        time.sleep(ENOUGH)

    with Client(sharing(head)) as client:
        assert client.hear() == (ECHOED if joins else None)
        client.kill()
        if not joins:
            stack.wait_for_clients(0)
        client.say("its owner is dead")
        assert client.hear() == ([VERIFIED, OK] if joins else ["ForkedHandleError", INVALID])


def test_a_fork_that_ran_no_hooks_gets_what_it_knows(stack: VirtualPcsc) -> None:
    """The child doesn't share what its owner connected after the fork: the owner's disconnect ends that."""

    def head() -> Any:
        session = Session()
        with Member(session, fork=c_fork) as child:
            second = safe.SCardListReaders(session.context, [])[1][1]
            hresult, card, _ = safe.SCardConnect(session.context, second, EXCLUSIVE, T1)
            joined, ended = child.calls(*TRANSMIT), safe.SCardDisconnect(card, LEAVE)
            return hresult, joined, ended, safe.SCardConnect(session.context, second, EXCLUSIVE, T1)[0]

    assert in_child(sharing(head)) == (OK, ECHOED, OK, OK)


@pytest.mark.parametrize("shares", ["one", "the other"])
def test_a_context_can_have_a_policy_of_its_own(stack: VirtualPcsc, shares: str) -> None:
    """A context's own policy can share it, or not share it, unlike the others; also after a fork in C."""

    def child(shared: Session, unshared: Session, generations: int) -> list[Any]:
        below = in_child(child, shared, unshared, generations - 1) if generations > 1 else []
        return [called(shared, *IS_PIN_THERE), called(unshared, *TRANSMIT), *below]

    def head() -> Any:
        pcsc_safe.configure(broker="always", policy="auto" if shares == "one" else "share")
        shared, unshared = Session(), Session()
        owned = shared if shares == "one" else unshared
        pcsc_safe.configure(context=owned.context, policy="share" if shares == "one" else "raise")
        answers = [*in_child(child, shared, unshared, 2), *in_child(child, shared, unshared, 1, fork=c_fork)]
        return answers, called(shared, *IS_PIN_THERE), called(unshared, *IS_PIN_THERE)

    other = ECHOED if shares == "one" else "ForkedHandleError"
    assert in_child(head) == ([VERIFIED, other] * 3, VERIFIED, VERIFIED)


@pytest.mark.not_on_macos("a forked process has a broker there whatever was configured")
def test_it_needs_a_broker_always(stack: VirtualPcsc) -> None:
    """Policy ``share`` without broker='always' is a SettingsError. A context outside of a broker isn't shared."""

    def head() -> Any:
        session = Session()
        for context in (None, session.context):
            with pytest.raises(SettingsError, match="set broker='always' as well"):
                pcsc_safe.configure(policy="share", context=context)
        with pytest.raises(SettingsError, match="before you establish it"):
            pcsc_safe.configure(broker="always", policy="share")

        def child() -> Any:
            pcsc_safe.configure(broker="always", policy="share")
            return called(session, *TRANSMIT)

        return in_child(child), called(session, *TRANSMIT)

    assert in_child(head) == ("ForkedHandleError", ECHOED)


@pytest.mark.not_on_macos("a forked process has a broker there whatever was configured")
def test_validity_is_a_code_without_a_broker(stack: VirtualPcsc) -> None:
    """Where sharing needs a broker and none can be started, SCardIsValidContext returns a code, and others raise."""

    def child(session: Session) -> Any:
        pcsc_safe.configure(broker="always", policy="share", broker_python="/nonexistent")
        return [called(session, *asked) for asked in (("SCardIsValidContext",), ("SCardListReaders", []))]

    assert in_child(lambda: in_child(child, Session())) == [INVALID, "BrokerError"]


# What a new process needs.


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may call chroot and setuid")
@pytest.mark.parametrize("where", ["empty root", "nobody"])
def test_a_new_process_needs_no_path_and_no_right(stack: VirtualPcsc, tmp_path: Path, where: str) -> None:
    """After chroot to an empty directory, or setuid to nobody, children continue the session and get new contexts."""

    def child(session: Session, generations: int) -> list[Any]:
        if generations > 1:
            if where == "nobody":
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            else:
                os.chroot(tmp_path)
                os.chdir("/")
        below = in_child(child, session, generations - 1) if generations > 1 else []
        return [exchanges(session, 1, 10), Session().transmit(ECHO), *below]

    def head() -> Any:
        session = Session()
        return in_child(child, session, 2), called(session, *IS_PIN_THERE)

    assert in_child(sharing(head)) == ([(0, VERIFIED), ECHOED] * 2, VERIFIED)


def close_all(but: list[int]) -> list[int]:
    """Close this process's descriptors, as a daemon does, and open files with their numbers."""
    logging.disable()  # pytest's handler writes to one of them
    closed = 0
    for number in range(3, 100):
        with contextlib.suppress(OSError):
            if number not in but and not stat.S_ISFIFO(os.fstat(number).st_mode):  # the result's pipe
                os.close(number)
                closed += 1
    return [os.memfd_create("the application's") for _ in range(closed)]


@pytest.mark.parametrize("when", ["at once", "later", "in the parent", "in the parent, unnoticed", "preserved"])
def test_where_all_descriptors_are_closed(stack: VirtualPcsc, when: str) -> None:
    """A BrokerError says that descriptors are closed. No reused number is touched, and preserved descriptors work."""
    by_parent, is_preserved = "parent" in when, when == "preserved"

    def untouched(files: list[int]) -> bool:
        return all(os.readlink(f"/proc/self/fd/{n}").startswith("/memfd") and not os.fstat(n).st_size for n in files)

    def child(session: Session, preserved: list[int]) -> Any:
        if when == "later":
            called(session, *TRANSMIT)
        files = close_all(preserved if is_preserved else []) if not by_parent else []
        try:
            answers = [session.transmit(IS_VERIFIED) for _ in range(2)]
        except Exception as error:
            answers = [type(error).__name__, "files_to_preserve()" in str(error)]
        return answers, in_child(called, session, *IS_PIN_THERE), Session().transmit(ECHO), untouched(files)

    def head() -> Any:
        session = Session()
        files = close_all([]) if by_parent else []
        mine = called(session, *IS_PIN_THERE) if when != "in the parent, unnoticed" else None
        childs = in_child(child, session, pcsc_safe.files_to_preserve())
        return childs, mine or called(session, *IS_PIN_THERE), untouched(files)

    right = ([VERIFIED] * 2, VERIFIED, ECHOED, True)
    lost = (["BrokerError", True], "BrokerError", ECHOED, True)
    parents = "BrokerError" if by_parent else VERIFIED
    assert in_child(sharing(head)) == (right if is_preserved else lost, parents, True)
