"""install() and uninstall() reach pyscard's functions under every name, imported before or after."""

from __future__ import annotations

import builtins
import contextlib
import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from interrupts import Alarm
from programs import (
    INVALID_HANDLE,
    IS_VERIFIED,
    RESET_CARD,
    UNPOWER_CARD,
    VERIFY,
    child,
    code,
    eventually,
    open_session,
    orderly_child,
    outcome,
    refusal,
    say,
    verified,
)

import pcsc_safe
from pcsc_safe.testing import VirtualPcsc

pytestmark = pytest.mark.native  # each test sets what its programs use


def namespaces() -> dict[str, dict[str, Any]]:
    """The functions, by every style of import."""
    found: dict[str, dict[str, Any]] = {"star": {}, "by name": {}, "module": {}, "inner": {}}
    exec("from smartcard.scard import *", found["star"])
    names = "SCardEstablishContext, SCardListReaders, SCardConnect, SCardTransmit, SCardDisconnect, SCardReleaseContext"
    names += ", SCARD_PCI_T1"
    exec(f"from smartcard.scard import {names}", found["by name"])
    exec("import smartcard.scard as pcsc", found["module"])
    exec("import smartcard.scard.scard as pcsc", found["inner"])
    for style in ("module", "inner"):
        found[style] = vars(found[style]["pcsc"])
    return found


def use(names: dict[str, Any]) -> Any:
    """Open a session by these names; return what a forked child gets that uses, drops and closes it."""
    hresult, context = names["SCardEstablishContext"](2)
    _, readers = names["SCardListReaders"](context, [])
    _, card, protocol = names["SCardConnect"](context, readers[0], 2, 3)
    transmit = lambda command: names["SCardTransmit"](card, names["SCARD_PCI_T1"], command)  # noqa: E731
    assert (hresult, protocol) == (0, 2)
    transmit(VERIFY)

    def in_child() -> Any:
        answer, _ = transmit(IS_VERIFIED)
        return code(answer), names["SCardDisconnect"](card, 2), names["SCardReleaseContext"](context)

    answers = child(in_child)
    answers = [*answers, transmit(IS_VERIFIED)]
    names["SCardDisconnect"](card, 2)
    names["SCardReleaseContext"](context)
    return answers


def styles(when: str) -> None:
    if when == "before":
        pcsc_safe.install()
    found = namespaces()
    if when == "after":
        pcsc_safe.install()
    answers = {style: use(names) for style, names in found.items()}
    connection = open_session(UNPOWER_CARD)
    answers["framework"] = [
        *child(lambda: [refusal(lambda: verified(connection)), connection.disconnect()]),
        verified(connection),
    ]
    say(answers)


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_import_style(shared_stack: VirtualPcsc, when: str) -> None:
    """Under every name, imported before or after install(), a child gets the reset; the parent's session continues.

    With ``cards="reset"``, because a child that continues in the session and asks to power off the card powers it off.
    """
    told = [RESET_CARD, 0, 0, [0, [1, 0x90, 0]]]
    expected = dict.fromkeys(("star", "by name", "module", "inner"), told)
    expected["framework"] = ["CardConnectionException", None, True]
    assert outcome(styles, shared_stack, when, PCSC_SAFE_CARDS="reset") == expected


def nothing_forced() -> None:
    before = [name for name in sys.modules if name.partition(".")[0] in ("smartcard", "wrapt")]
    pcsc_safe.install()
    say([before, [name for name in sys.modules if name.partition(".")[0] == "smartcard"], "wrapt" in sys.modules])


def test_install_imports_no_pyscard(shared_stack: VirtualPcsc) -> None:
    """install() imports wrapt and nothing of pyscard; `import pcsc_safe` imports neither."""
    assert outcome(nothing_forced, shared_stack) == [[], [], True]


def attributes() -> dict[str, Any]:
    """Everything in pyscard that could be patched."""
    for name in ("CardMonitoring", "CardRequest", "CardService", "ReaderMonitoring"):
        import_module(f"smartcard.{name}")

    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "smartcard":
            for attribute, value in vars(module).items():
                found[f"{name}.{attribute}"] = value
                if isinstance(value, type):
                    found.update({f"{name}.{attribute}.{inner}": thing for inner, thing in vars(value).items()})
    return found


def changes(before: dict[str, Any]) -> list[str]:
    after = attributes()
    missing = object()
    return sorted(
        name
        for name in before.keys() | after.keys()
        if before.get(name, missing) is not after.get(name, missing)
        and not name.endswith(("__dict__", "__weakref__", ".instance"))
    )


def there_and_back(when: str) -> None:
    before = attributes()
    for _ in range(3):
        pcsc_safe.install()
        pcsc_safe.install()
        patched = len(changes(before))
        assert patched > 25, changes(before)
        connection = open_session()
        connection.disconnect()
        del connection
        pcsc_safe.uninstall()
        pcsc_safe.uninstall()
        assert changes(before) == []
    import importlib

    pcsc_safe.install()
    importlib.reload(sys.modules["smartcard.scard"])
    assert child(lambda: len(changes(before))) >= patched
    say(refusal(open_session))


def test_idempotent_and_reversible(shared_stack: VirtualPcsc) -> None:
    """Calling install() twice is like calling it once; uninstall() restores every name; both can be repeated."""
    assert outcome(there_and_back, shared_stack, "") == "no error"


def interrupted_at_row(number: int, of: str, call: Callable[[], Any]) -> None:
    """Raise, as a signal handler may, when a function of ``patches`` calls ``of`` on the row with this number."""
    from pcsc_safe.retrofit import patches

    rows = itertools.count(1)

    def interrupt(*arguments: Any) -> Any:
        if next(rows) == number:
            raise Alarm
        return function(*arguments)

    function = getattr(patches, of, None) or getattr(builtins, of)
    setattr(patches, of, interrupt)
    with contextlib.suppress(Alarm):
        call()
    assert next(rows) > number
    setattr(patches, of, function)


def repeated(number: str) -> None:
    before = attributes()
    pcsc_safe.install()
    patched = changes(before)
    interrupted_at_row(int(number), "_restore", pcsc_safe.uninstall)
    pcsc_safe.uninstall()
    restored = changes(before) == []
    interrupted_at_row(int(number), "setattr", pcsc_safe.install)
    clean = changes(before) == []
    pcsc_safe.install()
    again = changes(before) == patched
    interrupted_at_row(int(number), "_restore", pcsc_safe.uninstall)
    pcsc_safe.install()
    complete = changes(before) == patched
    pcsc_safe.uninstall()
    say([restored, clean, again, complete, changes(before)])


@pytest.mark.parametrize("number", ["1", "5", "25"])
def test_interrupted_and_repeated(shared_stack: VirtualPcsc, number: str) -> None:
    """If a signal handler raises in install() or uninstall(), either can be called again, and does all of it."""
    assert outcome(repeated, shared_stack, number) == [True, True, True, True, []]


def interrupted_import() -> None:
    pcsc_safe.install()
    interrupted_at_row(3, "setattr", lambda: import_module("smartcard.CardService"))
    for name in [name for name in sys.modules if name.startswith("smartcard.Card")]:
        del sys.modules[name]
    from smartcard.CardMonitoring import CardMonitor
    from smartcard.CardService import CardService
    from smartcard.scard import _scard  # type: ignore[attr-defined]

    say([function.__module__ for function in (_scard.SCardConnect, CardMonitor.__getattribute__, CardService.__del__)])


@pytest.mark.skipif(version("wrapt").startswith("1.14."), reason="wrapt 1.14 reports only a module's first import")
def test_a_module_is_imported_again(shared_stack: VirtualPcsc) -> None:
    """A module of pyscard is patched at each import: also if a signal handler has raised in the first one."""
    patched = [f"pcsc_safe.retrofit.{name}" for name in ("scard", "monitors", "framework")]
    assert outcome(interrupted_import, shared_stack) == patched


def joined_by_a_handler() -> None:
    import smartcard.CardService

    from pcsc_safe.retrofit import framework, installation

    other = threading.Thread(target=pcsc_safe.install, daemon=True)

    def interrupted(module: Any) -> Any:
        if other.ident is None:
            other.start()
            other.join(10)
        return framework.card_service(module)

    installation.PATCHES["smartcard.CardService"] = interrupted
    pcsc_safe.install()
    say([other.is_alive(), smartcard.CardService.CardService.__del__.__module__])


def test_a_signal_handler_waits_for_a_thread_that_installs(shared_stack: VirtualPcsc) -> None:
    """A signal handler that interrupts install() can wait for a thread that calls install()."""
    assert outcome(joined_by_a_handler, shared_stack) == [False, "pcsc_safe.retrofit.framework"]


def live_handles() -> None:
    from smartcard.scard import _scard  # type: ignore[attr-defined]

    before = dict(vars(_scard))
    changed = lambda: [name for name in before if vars(_scard)[name] is not before[name]]  # noqa: E731
    pcsc_safe.install()
    connection = open_session()
    pcsc_safe.uninstall()
    kept = changed()
    plain = open_session()  # raw: the program has uninstalled
    told = child(lambda: refusal(lambda: verified(connection)))
    works = [verified(connection), verified(plain), type(plain.component.hcontext) is int]
    connection.disconnect()
    del plain
    still = changed()
    connection.component.__del__()  # what pyscard before 2.3 has to release the context
    connection.component.hcontext = None
    del type(connection.component).__del__
    say(["SCardTransmit" in kept, "SCardEstablishContext" in kept, told, works, still == kept, changed()])


def test_live_handles_outlive_uninstall(shared_stack: VirtualPcsc) -> None:
    """What was opened after install() works after uninstall(), also across forks; closing it restores the last name."""
    expected = [True, False, "CardConnectionException", [True, True, True], True, []]
    assert outcome(live_handles, shared_stack, PCSC_SAFE_CARDS="reset") == expected


def interrupted_release() -> None:
    from smartcard.scard import _scard  # type: ignore[attr-defined]

    before = dict(vars(_scard))
    pcsc_safe.install()
    from pcsc_safe.retrofit import scard

    def interrupt(context: object) -> None:
        raise Alarm

    _, context = _scard.SCardEstablishContext(0)
    note, scard._note_released = scard._note_released, interrupt
    with contextlib.suppress(Alarm):
        _scard.SCardReleaseContext(context)
    scard._note_released = note
    pcsc_safe.uninstall()
    say([name for name in before if vars(_scard)[name] is not before[name]])


def test_a_release_is_interrupted(shared_stack: VirtualPcsc) -> None:
    """If a signal handler raises when a context has just been released, uninstall() restores all functions."""
    assert outcome(interrupted_release, shared_stack) == []


def opened_before(configured: str) -> None:
    connection = open_session(UNPOWER_CARD)
    inner = connection.component
    if configured:
        pcsc_safe.configure(broker="always")
    pcsc_safe.install()
    import smartcard.scard as pcsc

    def in_child() -> Any:
        from pcsc_safe._core import descriptors

        dead = sum(descriptors.is_dead(int(name)) for name in os.listdir("/proc/self/fd"))
        context, card = inner.hcontext, inner.hcard
        return [
            dead >= 2,  # the connection and the spare one
            *map(
                code,
                [
                    pcsc.SCardTransmit(card, pcsc.SCARD_PCI_T1, IS_VERIFIED)[0],
                    pcsc.SCardListReaders(context, [])[0],
                    pcsc.SCardIsValidContext(context),
                    pcsc.SCardDisconnect(card, 2),
                    pcsc.SCardReleaseContext(context),
                    pcsc.SCardIsValidContext(4711),
                ],
            ),
            refusal(open_session),
        ]

    answers = child(in_child)
    silent = orderly_child(lambda: globals().clear())
    works = [verified(connection), inner.getATR() != [], pcsc.SCardIsValidContext(inner.hcontext)]
    say([type(inner.hcard).__name__, answers, silent, works, code(pcsc.SCardIsValidContext(4711))])


@pytest.mark.parametrize("configured", ["", "broker='always'"])
def test_what_was_opened_before(shared_stack: VirtualPcsc, configured: str) -> None:
    """An older session works where it was opened, whatever is configured later; it is invalid and silent in a child."""
    refused = [True, *[INVALID_HANDLE] * 6, "no error"]
    assert outcome(opened_before, shared_stack, configured) == ["int", refused, 0, [True, True, 0], INVALID_HANDLE]


def inside_before() -> None:
    import smartcard.scard as pcsc

    _, context = pcsc.SCardEstablishContext(pcsc.SCARD_SCOPE_USER)
    _, readers = pcsc.SCardListReaders(context, [])
    _, states = pcsc.SCardGetStatusChange(context, 0, [(readers[0], pcsc.SCARD_STATE_UNAWARE)])
    known = [(readers[0], states[0][1])]
    waiting = threading.Thread(target=lambda: pcsc.SCardGetStatusChange(context, 20000, known))
    waiting.start()
    wrapper = pcsc.SCardGetStatusChange.__code__
    assert eventually(lambda: any(frame.f_code is wrapper for frame in sys._current_frames().values()))
    time.sleep(0.1)
    pcsc_safe.configure(policy="reestablish", quiesce_timeout=0.1)
    pcsc_safe.install()
    during = child(lambda: refusal(lambda: pcsc.SCardEstablishContext(0)))
    pcsc.SCardCancel(context)
    waiting.join()
    pcsc_safe.configure(quiesce_timeout=20)
    began = time.monotonic()
    after = child(lambda: code(pcsc.SCardEstablishContext(0)[0]))
    say([during, after, time.monotonic() - began < 10])


def test_a_thread_inside_before_install_makes_a_fork_unquiet(shared_stack: VirtualPcsc) -> None:
    """A call that began before install() makes a fork unquiet, until the call has ended."""
    assert outcome(inside_before, shared_stack) == ["ForkUnsafeError", 0, True]


def returned_before_a_fork() -> None:
    waits = type(sys)("smartcard.scard.scard")
    waits.__file__ = "scard.py"
    wait_of_pyscard = "def SCardGetStatusChange(context, timeout, states): sleep(timeout)"
    exec(compile(wait_of_pyscard, waits.__file__, "exec"), vars(waits))
    vars(waits)["sleep"] = time.sleep
    sys.modules["smartcard.scard.scard"] = waits

    def wait_of_application(context: int, timeout: float, states: object) -> None:
        time.sleep(timeout)

    def work() -> None:
        waits.SCardGetStatusChange(1, 1, None)
        wait_of_application(1, 5, None)

    from pcsc_safe._core import in_flight
    from pcsc_safe.retrofit import scard

    def note() -> Any:
        scard._note_threads_inside()
        return list(in_flight.calls_without_place)

    threading.Thread(target=work, daemon=True).start()
    assert eventually(note)
    (call,) = in_flight.calls_without_place
    code_of_application = wait_of_application.__code__
    assert eventually(lambda: any(frame.f_code is code_of_application for frame in sys._current_frames().values()))
    call.interrupt()
    say(list(map(str, in_flight.calls_without_place)))


def test_a_call_before_install_that_has_returned(shared_stack: VirtualPcsc) -> None:
    """A fork no longer waits for a call that has returned, even if another frame has the address of its frame."""
    assert outcome(returned_before_a_fork, shared_stack) == []


def another_tool(when: str, update: str) -> None:
    import smartcard.scard as pcsc
    from smartcard.scard import _scard  # type: ignore[attr-defined]

    names = ["SCardEstablishContext", "SCardListReaders", "SCardReleaseContext"]
    seen = []

    def wrap(name: str) -> None:
        inner = getattr(_scard, name)

        def traced(*arguments: Any) -> Any:
            seen.append(name)
            return inner(*arguments)

        setattr(_scard, name, functools.update_wrapper(traced, inner) if update else traced)

    def use_each() -> Any:
        hresult, context = pcsc.SCardEstablishContext(0)
        kind = type(context).__name__
        return [hresult, pcsc.SCardListReaders(context, [])[0], pcsc.SCardReleaseContext(context), kind]

    if when == "before":
        list(map(wrap, names))
    pcsc_safe.install()
    if when == "after a context":
        use_each()
    if when != "before":
        list(map(wrap, names))
    answers = [use_each()]
    pcsc_safe.uninstall()
    answers.append(use_each())
    pcsc_safe.install()
    answers.append(use_each())
    say([answers, sorted(set(seen)) == names])


@pytest.mark.parametrize("update", ["", "wraps"])
@pytest.mark.parametrize("when", ["before", "after", "after a context"])
def test_another_tool_wraps_the_functions(shared_stack: VirtualPcsc, when: str, update: str) -> None:
    """If another tool wraps pyscard's C functions, before install() or after it, the tool and pcsc_safe both work."""
    safe = [0, 0, 0, "SafeContext"]
    assert outcome(another_tool, shared_stack, when, update) == [[safe, [0, 0, 0, "int"], safe], True]


def imports_meanwhile() -> None:
    begun, done = threading.Event(), threading.Event()

    class Slow:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "colorsys":
                begun.set()
                done.wait(20)

    pcsc_safe.install()
    sys.meta_path.insert(sys.meta_path.index(PathFinder), Slow())  # type: ignore[arg-type]
    errors: list[str] = []
    importing = threading.Thread(target=lambda: errors.append(refusal(lambda: import_module("colorsys"))))
    importing.start()
    begun.wait(20)
    pcsc_safe.uninstall()
    done.set()
    importing.join()
    say(errors)


def test_uninstall_while_another_thread_imports(shared_stack: VirtualPcsc) -> None:
    """uninstall() doesn't shorten the list of finders that another thread's import is going through."""
    assert outcome(imports_meanwhile, shared_stack) == ["no error"]


def many_threads() -> None:
    errors = []
    begin = threading.Barrier(8)
    # While nothing is installed these calls are raw: libpcsclite (1.9.9) changes a context's list of cards without the
    # lock under which calls on other cards read it, and so dies of SIGSEGV.
    one_session = threading.Lock()

    def toggle() -> None:
        try:
            begin.wait(20)
            for _ in range(20):
                pcsc_safe.install()
                pcsc_safe.uninstall()
        except BaseException as error:
            errors.append(repr(error))

    def work() -> None:
        try:
            begin.wait(20)
            import smartcard.CardMonitoring
            import smartcard.ReaderMonitoring
            import smartcard.System

            for _ in range(5):
                reader = smartcard.System.readers()[0]
                with one_session:
                    session = reader.createConnection()
                    session.connect(disposition=0)
                    assert session.transmit([0x80, 1, 0, 0, 1, 7]) == ([7], 0x90, 0)
                    session.disconnect()
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=task, daemon=True) for task in [toggle, toggle, toggle, toggle, *[work] * 4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    hung = sum(thread.is_alive() for thread in threads)
    before = attributes()
    patched = []
    pcsc_safe.install()
    patched = changes(before)
    pcsc_safe.uninstall()
    say([errors, hung, len(patched) > 25, changes(before)])


def test_threads(shared_stack: VirtualPcsc) -> None:
    """Threads can install, uninstall, import and use pyscard at the same time without error; all is restored."""
    assert outcome(many_threads, shared_stack) == [[], 0, True, []]


def other_way_round(first: str) -> None:
    pcsc_safe.install()
    exec(first)
    connection = open_session()
    say([child(lambda: refusal(lambda: verified(connection))), verified(connection)])


@pytest.mark.parametrize(
    "first", ["import pcsc_safe.scard", "pcsc_safe.handover()", "pcsc_safe.configure(cards='reset')"]
)
def test_pcsc_safe_may_import_pyscard(shared_stack: VirtualPcsc, first: str) -> None:
    """If pcsc_safe is the first to import pyscard, pyscard is patched, too."""
    assert outcome(other_way_round, shared_stack, first, PCSC_SAFE_CARDS="reset") == ["CardConnectionException", True]


def without_native() -> None:
    pcsc_safe.install()
    connection = open_session()
    import smartcard.scard as pcsc
    from smartcard.CardRequest import CardRequest
    from smartcard.scard import _scard  # type: ignore[attr-defined]

    def in_child() -> Any:
        refused = refusal(lambda: verified(connection))
        connection.connect(disposition=0)
        return refused, verified(connection), loaded()

    answers = child(in_child)
    card = CardRequest(timeout=5).waitforcard()
    card.connection.connect(disposition=0)
    works = [verified(connection), verified(card.connection), pcsc.SCardGetErrorMessage(0) != "", loaded()]
    stand_in = type(_scard.__spec__.loader).__name__ if _scard.__spec__ else "stand-in"
    del card
    pcsc_safe.uninstall()
    real = sys.modules["smartcard.scard._scard"]
    back = [hasattr(real, "__file__"), pcsc.scard._scard is real, verified(connection), verified(open_session())]
    say([answers, works, stand_in, loaded(), back])


def without_a_native_library() -> None:
    pcsc_safe.install()
    import smartcard.scard
    from smartcard.System import readers

    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "smartcard.scard._scard":
                raise ImportError(name)

    sys.meta_path.insert(sys.meta_path.index(PathFinder), Missing())  # type: ignore[arg-type]
    refused = [refusal(pcsc_safe.uninstall) for _ in range(2)]
    pcsc_safe.install()
    works = len(readers())
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder) is not Missing]
    pcsc_safe.uninstall()
    say([refused, works, hasattr(smartcard.scard.scard._scard, "__file__"), len(readers())])


def test_uninstall_without_a_native_library(shared_stack: VirtualPcsc) -> None:
    """If uninstall() can't load the native library, pyscard continues with the broker, and either can be repeated."""
    expected = [["ImportError"] * 2, 2, True, 2]
    assert outcome(without_a_native_library, shared_stack, PCSC_SAFE_BROKER="always") == expected


def loaded() -> bool:
    return "libpcsclite" in Path("/proc/self/maps").read_text()


def test_the_native_library_is_never_loaded(shared_stack: VirtualPcsc) -> None:
    """With broker="always" the framework works without libpcsclite, also in a child; only uninstall() loads it."""
    told = outcome(without_native, shared_stack, PCSC_SAFE_BROKER="always", PCSC_SAFE_CARDS="reset")
    assert told[:2] == [["CardConnectionException", True, False], [True, True, True, False]]
    assert told[3:] == [True, [True] * 4]
