"""Draws a history: processes as lanes over time, sessions as bars in the lane of the process that has them.

The drawing is one SVG that loads nothing else: by itself, or in a page whose script zooms it.  Every text from outside,
such as the name of a reader or a program, goes through :func:`captions.escaped`.  Things that are closer together than
a pixel are drawn as one, or more coarsely if necessary, so that no drawing is bigger than :data:`_BIGGEST`.

A fork changes nothing here: this runs after the program has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from .captions import duration, escaped, life_in_words, notes, session_in_words, shortened, times
from .history import Arrow, Connection, History, Lane, Session
from .records import Span

__all__ = ["SUFFIXES", "draw"]
SUFFIXES = (".html", ".svg")
_BIGGEST = 1_900_000  # bytes
_GUTTER, _PLOT, _MARGIN = 210, 960, 30  # px
_WIDTH = _GUTTER + _PLOT + _MARGIN
_TOP = 96  # px; title, legend, axis
_ROW, _ROW_GAP, _PADDING, _LANE_GAP, _LOWEST_LANE = 20, 3, 4, 8, 32  # px
_MOST_LANES, _MOST_ROWS = 500, 24
_LETTER = 5.6  # px; in bars
_LETTERS_IN_GUTTER = 30
_LEAD = 24  # part of the width


def draw(history: History, suffix: str) -> str:
    """The drawing.

    :param suffix: ``.svg`` or ``.html``.
    :return: the text of the file.
    """
    pixels = 1.0
    picture = _Drawing(history, pixels).svg()
    while len(picture.encode()) > _BIGGEST and pixels < _PLOT:
        pixels *= 2
        picture = _Drawing(history, pixels).svg()
    if suffix == ".svg":
        return picture
    page = files(__package__).joinpath("timeline.html").read_text("utf-8")
    return page.replace("<!--drawing-->", picture)


@dataclass
class _Unit:
    """What occupies rows of a lane: the consecutive sessions of one context, or a group of short sessions."""

    since: int
    until: int
    sessions: list[Session]
    rows: int = 1
    row: int = 0
    depth: dict[int, int] = field(default_factory=dict)  # the row inside, by id of a connection


class _Drawing:
    """One attempt to draw.

    :param pixels: items that are closer than this are drawn as one.
    """

    def __init__(self, history: History, pixels: float) -> None:
        self._history = history
        self._from = _beginning(history)
        self._span = max(history.until - self._from, 1000)
        self._fine = pixels * self._span / _PLOT  # ns
        self._parts: list[str] = []
        self._labels: list[str] = []
        self._middles: dict[str, tuple[int, int]] = {}  # top and bottom of a lane

    def svg(self) -> str:
        """The whole drawing."""
        y = _TOP
        lanes = self._history.lanes[:_MOST_LANES]
        for lane in lanes:
            y = self._lane(lane, y)
        with_more = {(arrow.target.name, arrow.time) for arrow in self._history.arrows if arrow.kind in _GIVES}
        arrows = [
            part
            for arrow in self._history.arrows
            if arrow.kind in _GIVES or (arrow.target.name, arrow.time) not in with_more
            for part in self._arrow(arrow)
        ]
        remarks = list(notes(self._history, len(self._history.lanes) - len(lanes)))
        height = y + 22 + 16 * len(remarks)
        style = files(__package__).joinpath("timeline.css").read_text("utf-8")
        count = len(self._history.lanes)
        lead = self._from - self._history.since
        title = f"PC/SC in {count} process{'es' if count != 1 else ''}, {duration(lead + self._span)}"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" id="timeline" viewBox="0 0 {_WIDTH} {height}" '
                f'width="{_WIDTH}" height="{height}" role="img" aria-label="{escaped(title)}" '
                f'data-left="{_GUTTER}" data-width="{_PLOT}" data-ns="{self._span}" data-lead="{lead}" '
                f'data-bottom="{y}">',
                f"<style>{style}</style>",
                _DEFINITIONS.format(left=_GUTTER - 1, width=_PLOT + 2, height=height),
                f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
                f'<text class="title" x="12" y="26">{escaped(title)}</text>',
                *_legend(),
                '<g id="axis">',
                *self._axis(y),
                "</g>",
                '<g id="labels">',
                *self._labels,
                "</g>",
                '<g id="plot" clip-path="url(#inside)">',
                *self._parts,
                *arrows,
                "</g>",
                *(
                    f'<text class="note" x="12" y="{y + 22 + 16 * n}">{escaped(note)}</text>'
                    for n, note in enumerate(remarks)
                ),
                "</svg>",
            ]
        )

    def _x(self, time: float) -> float:
        return round(_GUTTER + (time - self._from) / self._span * _PLOT, 2)

    def _bar(self, kind: str, since: int, until: int, y: float, height: float, title: str) -> str:
        """A rectangle over time, at least one pixel wide."""
        x = self._x(max(since, self._from))
        width = max(1.0, round(self._x(until) - x, 2))
        shape = f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}">'
        return f"{shape}<title>{escaped(title)}</title></rect>"

    def _when(self, since: int, until: int) -> str:
        return f"from {duration(since - self._history.since)} on, for {duration(until - since)}"

    def _axis(self, bottom: int) -> Iterator[str]:
        step = next(s for e in range(3, 16) for s in (10**e, 2 * 10**e, 5 * 10**e) if self._span / s <= 12)
        lead = self._from - self._history.since
        unit, size = ("s", 1e9) if lead + self._span >= 2e9 else ("ms", 1e6)
        for number in range(-int(-lead // step), int((lead + self._span) // step) + 1):
            x = self._x(self._history.since + number * step)
            yield f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP - 8}" y2="{bottom}"/>'
            yield f'<text class="tick" x="{x}" y="{_TOP - 14}">{number * step / size:g} {unit}</text>'

    # A process.

    def _lane(self, lane: Lane, top: int) -> int:
        """Draw a lane; return where the next one begins."""
        units = self._units(lane)
        hidden = sum(len(unit.sessions) for unit in units if unit.row + unit.rows > _MOST_ROWS)
        units = [unit for unit in units if unit.row + unit.rows <= _MOST_ROWS]
        rows = max((unit.row + unit.rows for unit in units), default=0)
        height = max(_LOWEST_LANE, 2 * _PADDING + rows * (_ROW + _ROW_GAP) - _ROW_GAP)
        self._middles[lane.name] = (top, top + height)
        self._label(lane, top, hidden)
        self._parts.append(f'<g class="lane" id="lane-{escaped(lane.name)}">')
        self._life(lane, top, height)
        for unit in units:
            self._unit(lane, unit, top + _PADDING + unit.row * (_ROW + _ROW_GAP))
        for mark in lane.marks:
            path = f'<path d="M0 {top} l5 5 -5 5 -5 -5z"><title>{escaped(mark.text)}</title></path>'
            self._parts.append(f'<g class="mark" transform="translate({self._x(mark.time)} 0)">{path}</g>')
        self._parts.append("</g>")
        return top + height + _LANE_GAP

    def _label(self, lane: Lane, top: int, hidden: int) -> None:
        about = f"{lane.program} ({lane.how})" if lane.how in ("C fork", "exec") else lane.program
        if hidden:
            about = f"{hidden} more contexts"
        words = escaped(shortened(about, _LETTERS_IN_GUTTER))
        self._labels.append(
            f"<g><title>{escaped(life_in_words(lane))}</title>"
            f'<text class="process" x="12" y="{top + 13}">process {lane.pid}</text>'
            f'<text class="program" x="12" y="{top + 27}">{words}</text></g>'
        )

    def _life(self, lane: Lane, top: int, height: int) -> None:
        is_known = lane.end in ("seen", "exec")
        known = lane.until if is_known else max(lane.last, lane.since)
        kind = "life broker" if lane.how == "broker" else "life"
        if not is_known and lane.how == "broker":
            known = lane.until
        self._parts.append(self._bar(kind, lane.since, known, top, height, life_in_words(lane)))
        if lane.until > known:
            self._parts.append(self._bar("life fading", known, lane.until, top, height, life_in_words(lane)))

    def _units(self, lane: Lane) -> list[_Unit]:
        by_key: dict[str, list[Session]] = {}
        for session in lane.sessions:
            by_key.setdefault(session.key, []).append(session)
        units = [_unit(sessions) for sessions in by_key.values()]
        units.sort(key=lambda unit: unit.since)
        units = list(self._swarms(units))
        _pack(units, self._fine)
        return units

    def _swarms(self, units: Sequence[_Unit]) -> Iterator[_Unit]:
        """Combine units that are too short to be distinguished."""
        swarm: list[_Unit] = []

        def gathered() -> Iterator[_Unit]:
            if len(swarm) > 2:
                sessions = [session for unit in swarm for session in unit.sessions]
                yield _Unit(swarm[0].since, max(unit.until for unit in swarm), sessions, rows=1)
            else:
                yield from swarm

        for unit in units:
            if unit.until - unit.since > 2 * self._fine:
                yield unit
                continue
            if swarm and unit.since - swarm[-1].until > self._fine:
                yield from gathered()
                swarm = []
            swarm.append(unit)
        yield from gathered()

    # A session.

    def _unit(self, lane: Lane, unit: _Unit, y: int) -> None:
        height = unit.rows * (_ROW + _ROW_GAP) - _ROW_GAP
        if len({session.key for session in unit.sessions}) > 1:
            self._swarm(unit, y)
            return
        for session in unit.sessions:
            kind = "own" if session.owned else "lost" if session.how.startswith("lost") else "inherited"
            broker = " through" if session.through else ""
            until = max(session.until, session.since)
            title = f"{session_in_words(session)}, {self._when(session.since, until)}"
            self._parts.append(self._bar(f"{kind}{broker}", session.since, until, y, height, title))
            for connection in session.connections:
                self._connection(connection, y + unit.depth[id(connection)] * (_ROW + _ROW_GAP))
            for span in self._merged(session.waits, session.until):
                waited = f"{times(span.times, 'wait')} for events, {self._when(span.start, span.end)}"
                self._parts.append(self._bar("wait", span.start, span.end, y + 1, 3, waited))

    def _swarm(self, unit: _Unit, y: int) -> None:
        owned = [session for session in unit.sessions if session.owned]
        kind = "own" if owned else "inherited"
        count = len({session.key for session in unit.sessions})
        exchanges = sum(span.times for each in owned for card in each.connections for span in card.exchanges)
        title = f"{count} contexts, {times(exchanges, 'exchange')}, {self._when(unit.since, unit.until)}"
        self._parts.append(self._bar(kind, unit.since, unit.until, y, _ROW, title))
        self._name(f"{count} contexts", unit.since, unit.until, y)

    def _connection(self, card: Connection, y: int) -> None:
        until = max(card.until, card.since)
        mode = f"{card.mode}, {'' if card.owned else 'inherited, '}"
        exchanges = sum(span.times for span in card.exchanges)
        begun = sum(span.times for span in card.transactions)
        title = (
            f"card in {card.reader}, {mode}{times(exchanges, 'exchange')}, {times(begun, 'transaction')}, "
            f"{self._when(card.since, until)}"
        )
        kind = ("card " if card.owned else "card-inherited ") + card.mode
        self._parts.append(self._bar(kind, card.since, until, y + 5, _ROW - 7, title))
        for span in self._merged(card.transactions, until):
            done = f"{times(span.times, 'transaction')}, {self._when(span.start, span.end)}"
            self._parts.append(self._bar("begun", span.start, span.end, y + 5, _ROW - 7, done))
        for span in self._merged(card.exchanges, until):
            busy = f"{times(span.times, 'exchange')}, {self._when(span.start, span.end)}"
            self._parts.append(self._bar("apdu", span.start, span.end, y + _ROW - 6, 4, busy))
        if card.owned:
            self._name(card.reader + (f" ({card.mode})" if card.mode != "shared" else ""), card.since, until, y)

    def _name(self, name: str, since: int, until: int, y: int) -> None:
        """Text in a bar, shortened to the space that there is."""
        x = self._x(max(since, self._from)) + 4
        letters = int((self._x(until) - x - 4) / _LETTER)
        if letters > 8:
            words = escaped(shortened(name, letters))
            self._parts.append(
                f'<text class="reader" x="{x:.2f}" y="{y + 13.5}" data-to="{self._x(until)}">{words}</text>'
            )

    def _merged(self, spans: Iterable[Span], until: int) -> Iterator[Span]:
        """Spans, combined where they can't be distinguished; one that has not ended lasts until the given time."""
        last = None
        for span in sorted(spans, key=lambda span: span.start):
            if not span.end or span.end > until > span.start:
                span = span._replace(end=max(until, span.start))
            if last is not None and span.start - last.end < self._fine:
                last = last._replace(end=max(last.end, span.end), times=last.times + span.times)
                continue
            if last is not None:
                yield last
            last = span
        if last is not None:
            yield last

    # Between processes.

    def _arrow(self, arrow: Arrow) -> Iterator[str]:
        if arrow.source.name not in self._middles or arrow.target.name not in self._middles:
            return
        start, end = self._middles[arrow.source.name][1], self._middles[arrow.target.name][0]
        kind = arrow.kind.replace(" ", "-")
        y = start - 8
        many = f", {arrow.count} contexts" if arrow.count > 1 else ""
        title = (
            f"{_GIVES.get(arrow.kind, arrow.kind)}: from process {arrow.source.pid} to {arrow.target.pid}{many}, "
            f"at {duration(arrow.time - self._history.since)}"
        )
        yield (
            f'<g class="arrow {kind}" transform="translate({self._x(arrow.time)} 0)"><title>{escaped(title)}</title>'
            f'<path class="shaft" d="M0 {y}V{end - 4}"/><circle cy="{y}" r="2.5"/>'
            f'<path class="head" d="M0 {end}l-4 -6h8z"/></g>'
        )


def _beginning(history: History) -> int:
    """When the drawing begins: with the first process, or later if that process does other things for long."""
    first = min((each.since for lane in history.lanes for each in lane.sessions), default=history.since)
    later = first - (history.until - first) // _LEAD
    return later if later - history.since > (history.until - first) // 4 else history.since


def _unit(sessions: list[Session]) -> _Unit:
    unit = _Unit(sessions[0].since, max(max(each.until, each.since) for each in sessions), sessions)
    for session in sessions:
        free: list[int] = []
        for connection in session.connections:
            row = next((row for row, until in enumerate(free) if until <= connection.since), len(free))
            free[row : row + 1] = [max(connection.until, connection.since + 1)]
            unit.depth[id(connection)] = row
        unit.rows = max(unit.rows, len(free))
    return unit


def _pack(units: Iterable[_Unit], gap: float) -> None:
    """Give each unit the first rows that are free."""
    free: list[float] = []
    for unit in units:
        row = 0
        while any(until > unit.since for until in free[row : row + unit.rows]):
            row += 1
        unit.row = row
        free += [0.0] * (row + unit.rows - len(free))
        free[row : row + unit.rows] = [max(unit.until, unit.since) + gap] * unit.rows


_GIVES = {"handover": "fork and handover", "share": "fork, and a session shared"}
_DEFINITIONS = """<defs>
<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect class="hatch-ground" width="6" height="6"/><line class="hatch-line" x1="1" x2="1" y2="6"/></pattern>
<linearGradient id="fade"><stop class="fade-from" offset="0"/><stop class="fade-to" offset="1"/></linearGradient>
<clipPath id="inside"><rect x="{left}" y="0" width="{width}" height="{height}"/></clipPath>
</defs>"""
_LEGEND = (
    ("life", "process"),
    ("own", "context"),
    ("own through", "in a broker"),
    ("inherited", "inherited"),
    ("lost", "lost"),
    ("card", "card"),
    ("begun", "transaction"),
    ("apdu", "exchanges"),
    ("wait", "waits for events"),
)
_LEGEND_ARROWS = (("fork", "fork, start"), ("handover", "handover"), ("share", "share"))


def _legend() -> Iterator[str]:
    x, y = 12.0, 52
    for kind, words in _LEGEND:
        height = {"apdu": 3, "wait": 3}.get(kind, 11)
        yield f'<rect class="{kind}" x="{x}" y="{y - height + 1}" width="18" height="{height}"/>'
        yield f'<text class="key" x="{x + 23}" y="{y}">{words}</text>'
        x += 38 + len(words) * 6.1
    for kind, words in _LEGEND_ARROWS:
        yield f'<g class="arrow {kind}" transform="translate({x + 6} 0)"><path class="shaft" d="M0 {y - 11}v7"/>'
        yield f'<path class="head" d="M0 {y + 1}l-4 -6h8z"/></g><text class="key" x="{x + 15}" y="{y}">{words}</text>'
        x += 30 + len(words) * 6.1
