"""The history of a family of processes: which process forked which, and which owned which session when.

Its sources are the processes' records, and the times at which their ends were observed.  A child inherits what its
parent had at the fork, so this needs no record.  Nothing here knows how the history is drawn, and nothing forks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Union

from .records import Event, Span

__all__ = ["Arrow", "Connection", "History", "Lane", "Mark", "Session"]


@dataclass
class Connection:
    """A connection to a card, as one process has it.

    :ivar owned: whether this process can use it; an inherited one waits for SCardReconnect.
    :ivar since: when this process got it, ns.
    :ivar until: when it no longer had it; 0 until that is known.
    """

    key: str
    reader: str
    mode: str
    since: int
    until: int = 0
    owned: bool = True
    transactions: list[Span] = field(default_factory=list)
    exchanges: list[Span] = field(default_factory=list)


@dataclass
class Session:
    """A context, as one process has it, with its cards.

    :ivar owned: whether it is this process's own, or inherited.
    :ivar how: how this process got it.
    :ivar end: how it ended; "" until that is known.
    :ivar through: the PID of the broker, or 0.
    """

    key: str
    owned: bool
    how: str
    since: int
    at: str = ""
    thread: int = 0
    through: int = 0
    until: int = 0
    end: str = ""
    connections: list[Connection] = field(default_factory=list)
    waits: list[Span] = field(default_factory=list)

    def open_connections(self) -> list[Connection]:
        """The connections that have not ended."""
        return [connection for connection in self.connections if not connection.until]


@dataclass
class Mark:
    """Another event that a process recorded."""

    time: int
    text: str


@dataclass
class Lane:
    """A process.

    :ivar how: how it began: ``start``, ``fork``, ``C fork``, ``exec`` or ``broker``.
    :ivar end: how its end is known: ``seen``, ``exec``, ``gone`` (it ended between its last record and ``until``), or
        ``unknown``.
    :ivar last: the time of its last record.
    :ivar open: the sessions that it has, by key, while the history is made.
    """

    name: str
    pid: int
    parent_pid: int
    how: str
    program: str
    since: int
    parent: Optional[Lane] = None
    last: int = 0
    until: int = 0
    end: str = "unknown"
    is_incomplete: bool = False
    sessions: list[Session] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    open: dict[str, Session] = field(default_factory=dict)

    def title(self) -> str:
        """Its title: the PID and the program, without its arguments."""
        return f"process {self.pid}: {self.program}"


@dataclass
class Arrow:
    """An arrow from process to process.

    :ivar kind: ``start``, ``fork``, ``C fork``, ``exec``, ``broker``, ``handover`` or ``share``.
    """

    kind: str
    time: int
    source: Lane
    target: Lane
    count: int = 1


_KNOWN = ("retrofit", "fork", "broker", "handover", "share")  # the report's; here they are seen otherwise


class History:
    """What happened.

    :param recorded: what the processes recorded.
    :param ends: when the end of each process was observed, by record.
    :param ended_before: when it was observed that a process had already ended, by record.
    :ivar lanes: a process before those that it forked.
    :ivar left_out: how many processes had nothing to do with PC/SC.
    """

    def __init__(
        self, recorded: Iterable[Union[Event, Span]], ends: Mapping[str, int], ended_before: Mapping[str, int]
    ) -> None:
        self._by_name: dict[str, Lane] = {}
        self._ends = ends
        self.arrows: list[Arrow] = []
        spans: list[Span] = []
        for each in recorded:
            if isinstance(each, Span):
                spans.append(each)
            else:
                self._add(each)
        self._add_spans(spans)
        lanes = list(self._by_name.values())
        for lane in lanes:
            self._end(lane, ended_before)
        self.since = min((lane.since for lane in lanes), default=0)
        self.until = max((lane.until for lane in lanes), default=0)
        for lane in lanes:
            if lane.end == "unknown":
                lane.until = self.until
        shown = _worth_showing(lanes)
        self.left_out = len(lanes) - len(shown)
        self.lanes = _in_order(shown)
        self.arrows = [arrow for arrow in self.arrows if arrow.target.name in shown and arrow.source.name in shown]

    # One event.

    def _add(self, event: Event) -> None:
        if event.kind == "process":
            self._begin(event)
        lane = self._by_name.get(event.process)
        if lane is None:
            return  # its record has no beginning: the process was killed right there
        if not (lane.how == "broker" and event.kind == "process"):
            lane.last = max(lane.last, event.time)
        handle: Optional[Callable[[History, Lane, Event], None]] = _HANDLERS.get(event.kind)
        if handle is not None:
            handle(self, lane, event)
        elif event.kind not in (*_KNOWN, "process"):
            words = (f"{name} {value}" for name, value in event.fields.items())
            lane.marks.append(Mark(event.time, ", ".join([event.kind, *words])))

    def _begin(self, event: Event) -> None:
        fields = event.fields
        parent = self._by_name.get(fields["parent"]) or self._find_running(fields["ppid"], event.time)
        lane = Lane(event.process, event.pid, fields["ppid"], fields["how"], fields["program"], event.time, parent)
        earlier = self._find_running(event.pid, event.time)
        if earlier is not None and lane.how == "start":
            earlier.until, earlier.end = event.time, "exec"
            lane.parent, lane.how = earlier, "exec"
        if lane.parent is not None:
            self.arrows.append(Arrow(lane.how, event.time, lane.parent, lane))
            if lane.how in ("fork", "C fork"):
                lane.program = lane.program or lane.parent.program
                for session in lane.parent.open.values():
                    _open(lane, _inherited(session, event.time, f"inherited from process {lane.parent.pid}"))
        self._by_name[lane.name] = lane

    def _find_running(self, pid: int, time: int) -> Optional[Lane]:
        """The process that had this PID at that time."""
        for lane in reversed(list(self._by_name.values())):
            if lane.pid == pid and lane.end != "exec" and self._ends.get(lane.name, time + 1) > time:
                return lane
        return None

    def _established(self, lane: Lane, event: Event) -> None:
        how = event.kind if event.kind == "established" else "re-established"
        fields = event.fields
        before = _close(lane, fields["context"], event.time, how)
        _open(
            lane,
            Session(
                fields["context"],
                True,
                how,
                event.time,
                str(fields.get("at", "")),
                event.thread,
                int(fields.get("through", 0)),
                connections=_copies(before, event.time) if before is not None and not before.owned else [],
            ),
        )

    def _received(self, lane: Lane, event: Event) -> None:
        how, key = event.fields["how"], event.fields["context"]
        before, source = _close(lane, key, event.time, "handed over" if how == "handover" else "shared"), lane.parent
        if before is None:
            return
        words = {"handover": "handed over", "share": "shared"}[how]
        time = lane.since if before.since == lane.since else event.time  # at the fork, or at the first use
        received = _inherited(before, time, words)
        received.owned = True
        for connection in received.connections:
            connection.owned = True
        _open(lane, received)
        lane.sessions = [each for each in lane.sessions if each is not before or each.since != received.since]
        if source is None:
            return
        if how == "handover" and key in source.open:
            given = _close(source, key, time, f"handed over to process {lane.pid}")
            assert given is not None
            _open(source, _inherited(given, time, f"handed over to process {lane.pid}"))
            source.last = max(source.last, time)
        last = self.arrows[-1]
        if last.kind == how and last.target is lane:
            last.count += 1
        else:
            self.arrows.append(Arrow(how, time, source, lane))

    def _lost(self, lane: Lane, event: Event) -> None:
        session = _close(lane, event.fields["context"], event.time, "lost")
        if session is not None:
            _open(lane, _inherited(session, event.time, "lost: its broker has ended, or was disconnected"))

    def _released(self, lane: Lane, event: Event) -> None:
        _close(lane, event.fields["key"], event.time, "released")

    def _connected(self, lane: Lane, event: Event) -> None:
        fields = event.fields
        session = lane.open.get(fields["context"])
        if session is None:
            return
        for connection in session.open_connections():
            if connection.key == fields["card"] and connection.owned and connection.mode == fields["mode"]:
                return  # reconnected, as what it was
            if connection.key == fields["card"]:
                connection.until = event.time
        session.connections.append(Connection(fields["card"], fields["reader"], fields["mode"], event.time))

    def _disconnected(self, lane: Lane, event: Event) -> None:
        for session in lane.open.values():
            for connection in session.open_connections():
                if connection.key == event.fields["key"]:
                    connection.until = event.time

    def _incomplete(self, lane: Lane, event: Event) -> None:
        lane.is_incomplete = True

    # The rest.

    def _add_spans(self, spans: list[Span]) -> None:
        """Add the spans to the objects that they were done on."""
        owned: dict[tuple[str, str], list[Union[Session, Connection]]] = {}
        for lane in self._by_name.values():
            for session in lane.sessions:
                bars: list[Union[Session, Connection]] = [session, *session.connections]
                for bar in bars:
                    if bar.owned:
                        owned.setdefault((lane.name, bar.key), []).append(bar)
        for span in spans:
            its = self._by_name.get(span.process)
            if its is not None:
                its.last = max(its.last, span.start, span.end)
            found = next((bar for bar in owned.get((span.process, span.key), ()) if _overlap(bar, span)), None)
            if isinstance(found, Session):
                found.waits.append(span)
            elif found is not None:
                (found.exchanges if span.activity == "apdu" else found.transactions).append(span)

    def _end(self, lane: Lane, ended_before: Mapping[str, int]) -> None:
        if lane.end == "exec":
            pass
        elif lane.name in self._ends:
            lane.until, lane.end = self._ends[lane.name], "seen"
        elif lane.name in ended_before:
            lane.until, lane.end = ended_before[lane.name], "gone"
        else:
            lane.until = 0
        until = lane.until if lane.end in ("seen", "exec") else max(lane.last, lane.since)
        for key in list(lane.open):
            _close(lane, key, until, "" if lane.end == "unknown" else "the process ended")
        lane.until = max(lane.until, lane.last)


_HANDLERS: dict[str, Callable[[History, Lane, Event], None]] = {
    "established": History._established,
    "reestablished": History._established,
    "got": History._received,
    "lost": History._lost,
    "released": History._released,
    "connected": History._connected,
    "reconnected": History._connected,
    "disconnected": History._disconnected,
    "incomplete": History._incomplete,
}


def _open(lane: Lane, session: Session) -> None:
    lane.open[session.key] = session
    lane.sessions.append(session)


def _close(lane: Lane, key: str, time: int, end: str) -> Optional[Session]:
    """Close a session, if there is one, with its connections, and return it."""
    session = lane.open.pop(key, None)
    if session is not None:
        session.until, session.end = time, end
        for connection in session.open_connections():
            connection.until = time
    return session


def _inherited(session: Session, since: int, how: str) -> Session:
    """The same session in another process, or in this one when it no longer owns it."""
    return Session(
        session.key, False, how, since, session.at, session.thread, session.through, connections=_copies(session, since)
    )


def _copies(session: Session, since: int) -> list[Connection]:
    until = session.until
    alive = [each for each in session.connections if not each.until or each.until == until]
    return [Connection(each.key, each.reader, each.mode, since, owned=False) for each in alive]


def _overlap(bar: Any, span: Span) -> bool:
    return bool(span.start < (bar.until or span.start + 1) and (span.end or span.start) >= bar.since)


def _worth_showing(lanes: list[Lane]) -> dict[str, Lane]:
    """The processes that used PC/SC, and their ancestors."""
    shown: dict[str, Lane] = {}
    for lane in lanes:
        if lane.sessions or lane.marks or lane.how == "broker":
            ancestor: Optional[Lane] = lane
            while ancestor is not None and ancestor.name not in shown:
                shown[ancestor.name] = ancestor
                ancestor = ancestor.parent
    return shown or {lane.name: lane for lane in lanes[:1]}


def _in_order(shown: Mapping[str, Lane]) -> list[Lane]:
    """A parent before its children, and these by time."""
    children: dict[str, list[Lane]] = {}
    for lane in shown.values():
        children.setdefault(lane.parent.name if lane.parent is not None else "", []).append(lane)

    def below(name: str) -> Iterator[Lane]:
        waiting = [sorted(children.get(name, []), key=lambda lane: lane.since)]
        while waiting:  # not by recursion: a chain of forks may be long
            if not waiting[-1]:
                waiting.pop()
                continue
            lane = waiting[-1].pop(0)
            yield lane
            waiting.append(sorted(children.get(lane.name, []), key=lambda lane: lane.since))

    return list(below(""))
