"""Hazard 8: pyscard's monitors are singletons with a thread, which does not survive a fork; their observers wait."""

from __future__ import annotations

import threading
import time
from typing import Any

from .._judge import Finding, Run, death
from .._stage import Stage

NUMBER, NAME, SECONDS = "8", "card and reader monitors are dead in the child", 12.0
PATIENCE = 3.0  # seconds that an observer gets to hear of the cards that are there


def program(stage: Stage) -> None:
    """Watch cards, fork a child that does the same, and check which observers are notified of the cards."""
    stage.retrofit()
    from smartcard.CardMonitoring import CardMonitor
    from smartcard.ReaderMonitoring import ReaderMonitor

    def is_notified(monitor: Any) -> bool:
        observer = _Observer()
        monitor.addObserver(observer)
        return observer.notified.wait(PATIENCE)

    cards, readers = CardMonitor(), ReaderMonitor()
    # A new card monitor has an empty list of cards, which then grows; the observer is first notified of the empty list.
    stage.report("parent", cards=is_notified(cards), readers=is_notified(readers))

    def child() -> None:
        stage.report("child", readers=is_notified(readers), cards=is_notified(CardMonitor()))
        stage.report("child", thread=bool(CardMonitor().instance.rmthread.is_alive()))

    stage.report("parent", child_ended=stage.wait(stage.fork(child)))
    time.sleep(0.1)
    stage.report("parent", thread=bool(cards.instance.rmthread.is_alive()))


class _Observer:
    """An observer for either monitor; it needs no base class."""

    def __init__(self) -> None:
        self.notified = threading.Event()

    def update(self, observable: object, handlers: tuple[list[object], list[object]]) -> None:
        """Called by the monitor."""
        if handlers[0]:
            self.notified.set()


def judge(run: Run) -> Finding:
    """Shown by observers in the child that are never notified, and threads that don't exist there."""
    cards, readers, thread = run.of("child", "cards", "readers", "thread")
    ended, parent_thread, first_cards, first_readers = run.of("parent", "child_ended", "thread", "cards", "readers")
    harm = [
        f"in the child an observer was not notified of the {what} within {PATIENCE:g} s"
        for what, notified in (("readers", readers), ("cards", cards))
        if notified is False
    ]
    harm += ["the card monitor's thread was dead in the child"] if thread is False else []
    harm += ["the card monitor's thread died in the parent"] if parent_thread is False else []
    harm += death("the child", ended)
    if not (first_cards and first_readers and cards and readers and thread and parent_thread) or ended != 0:
        return Finding(harm, [])
    return Finding(
        harm, ["in the child new observers were notified of readers and cards, and the parent's monitor kept working"]
    )
