"""Draws the figures as an SVG of bars and lines, without any library.

A panel that has no figures is left out (``--only``).  Whiskers reach from the first quartile to the third.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple, Optional

from figures import Figure, Interval

__all__ = ["picture"]

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 56, 44  # margins in a panel, around what is plotted
COLOURS = {  # Okabe and Ito's palette, which colour-blind people can distinguish
    "raw pyscard": "#999999",
    "raw, wrapt imported": "#56b4e9",
    "check by hand": "#e69f00",
    "spawn": "#cc79a7",
    "pcsc_safe": "#009e73",
}
DARK = (
    "@media (prefers-color-scheme: dark) { svg { fill: #ddd } .paper { fill: #14171c } "
    '[stroke="#333"] { stroke: #ddd } [stroke="#ddd"] { stroke: #353c44 } [fill="#c00"] { fill: #ff8080 } }'
)
OURS = "pcsc_safe"
THREADS = (1, 2, 4, 8)
CONTEXTS = (1, 10, 50, 100)


class Panel(NamedTuple):
    """One diagram.

    :ivar title: the title, with the unit.
    :ivar unit: of the axis, in that of the figures.
    :ivar figures: what stands on the x axis (a line begins after ", "), and the name of its figure.
    :ivar lines: whether x is a number and the medians are joined; else they are bars.
    :ivar below: what x is.
    """

    title: str
    unit: float
    figures: dict[str, str]
    lines: bool = False
    below: str = ""


PANELS = (
    Panel(
        "A call, no fork anywhere (µs)",
        1,
        {
            "SCardTransmit": "SCardTransmit, 8 bytes",
            "SCardStatus": "SCardStatus",
            "Connect, and Disconnect": "SCardConnect + Disconnect",
            "Establish, and Release": "SCardEstablishContext + Release",
            "SCardTransmit, broker": "SCardTransmit, broker",
        },
    ),
    Panel(
        "A call while 8 threads make them (µs)",
        1,
        {
            "8 contexts": "8 threads, 8 contexts",
            "8 contexts, broker": "8 threads, 8 contexts, broker",
            "1 context, monitored": "8 threads, 1 context monitored",
            "APDUs, of 10 ms": "8 threads, 8 contexts, 10 ms",
            "2 on one, with 10 ms": "8 threads, 2 on one busy context",
        },
    ),
    Panel(
        "From start to exit of a program that reads one card (ms)",
        1000,
        {"this wrapt": "a card read, start to exit", "other wrapt": "a card read, start to exit, other wrapt"},
    ),
    Panel(
        "Private memory of a forked worker (MB)",
        1024,
        {"after its first exchange": "private memory of a worker"},
    ),
    Panel(
        "First answer of a pool's worker (ms)",
        1000,
        {
            "native": "first answer of a pool",
            "broker ahead": "first answer of a pool, prestarted broker",
            "broker cold": "first answer of a pool, cold broker",
        },
    ),
    Panel(
        "A task in a pool of 2 (µs)",
        1,
        {"native": "a task in a pool of 2", "broker": "a task in a pool of 2, broker"},
    ),
    Panel(
        "os.fork() by idle contexts (ms)",
        1000,
        {str(count): f"os.fork(), {count} context{'s' if count > 1 else ''}" for count in CONTEXTS},
        lines=True,
        below="contexts",
    ),
    Panel(
        "Fork until the child is reaped, by idle contexts (ms)",
        1000,
        {str(count): f"fork to reaped, {count} context{'s' if count > 1 else ''}" for count in CONTEXTS},
        lines=True,
        below="contexts",
    ),
    Panel(
        "os.fork() held up by threads that wait for events (ms)",
        1000,
        {str(count): f"os.fork(), waits for events in {count} thread{'s' if count > 1 else ''}" for count in THREADS},
        lines=True,
        below="threads",
    ),
    Panel(
        "os.fork() held up by threads with APDUs of 10 ms (ms)",
        1000,
        {str(count): f"os.fork(), 10 ms APDUs in {count} thread{'s' if count > 1 else ''}" for count in THREADS},
        lines=True,
        below="threads",
    ),
)

Points = dict[str, dict[str, Optional[Interval]]]
"""By what stands on the x axis, by whose it is; None: it froze."""


def picture(figures: Sequence[Figure]) -> str:
    """All panels that there are figures for, two in a row.

    :param figures: of one run.
    :return: an SVG document.
    """
    drawn = [(panel, points) for panel in PANELS if (points := points_of(panel, figures))]
    rows = math.ceil(len(drawn) / 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {rows * HEIGHT}" width="{2 * WIDTH}" '
        f'height="{rows * HEIGHT}" font-family="sans-serif" font-size="11" fill="#333">',
        f"<style>{DARK}</style>",
        '<rect class="paper" width="100%" height="100%" fill="white"/>',
    ]
    for number, (panel, points) in enumerate(drawn):
        lines.append(f'<g transform="translate({number % 2 * WIDTH},{number // 2 * HEIGHT})">')
        lines += panel_of(panel, points)
        lines.append("</g>")
    return "\n".join([*lines, "</svg>"]) + "\n"


def points_of(panel: Panel, figures: Sequence[Figure]) -> Points:
    """What of the figures belongs into a panel."""
    found: Points = {}
    for label, name in panel.figures.items():
        for line in figures:
            if line.name == name:
                found.setdefault(label, {})[line.against] = line.raw
                found[label][OURS] = line.safe
    return found


def panel_of(panel: Panel, points: Points) -> Iterator[str]:
    """One panel."""
    series = [name for name in COLOURS if any(name in of for of in points.values())]
    tops = [each.third_quartile for of in points.values() for each in of.values() if each]
    scale = Scale(max(tops) / panel.unit)
    yield text(LEFT, 20, panel.title, "start", 'font-weight="bold" font-size="13"')
    yield from legend(series)
    for tick in scale.ticks():
        yield f'<path d="M{LEFT} {scale.y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield text(LEFT - 6, scale.y(tick) + 4, f"{tick:g}", "end")
    yield from (lined if panel.lines else barred)(panel, points, series, scale)
    if panel.below:
        yield text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, panel.below)


class Scale:
    """The y axis, from 0 on.

    :param top: what has to have a place on it.
    """

    def __init__(self, top: float) -> None:
        power = 10.0 ** math.floor(math.log10(top / 4))
        self._step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power * 5 >= top)
        self._top = self._step * math.ceil(top / self._step)

    def ticks(self) -> list[float]:
        """Where the lines are."""
        return [self._step * number for number in range(round(self._top / self._step) + 1)]

    def y(self, value: float) -> float:
        """Where a value is."""
        return HEIGHT - BOTTOM - value / self._top * (HEIGHT - TOP - BOTTOM)


def barred(panel: Panel, points: Points, series: Sequence[str], scale: Scale) -> Iterator[str]:
    """A group of bars for each label."""
    room = (WIDTH - LEFT - RIGHT) / len(points)
    for number, (label, of) in enumerate(points.items()):
        names = [name for name in series if name in of]
        width = min(36.0, room * 0.8 / len(names))
        middle = LEFT + room * (number + 0.5)
        for line, words in enumerate(label.split(", ")):
            yield text(middle, HEIGHT - BOTTOM + 16 + 14 * line, words)
        for place, name in enumerate(names):
            x, interval = middle + (place - len(names) / 2) * width, of[name]
            if interval is None:
                yield text(x + width / 2, scale.y(0) - 16, "freezes", "middle", 'fill="#c00" font-size="9"')
                continue
            y = scale.y(interval.median / panel.unit)
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{scale.y(0) - y:.1f}" '
                f'fill="{COLOURS[name]}"/>'
            )
            yield whisker(x + width / 2 - 1, interval, panel.unit, scale)
            above = scale.y(interval.third_quartile / panel.unit) - 4
            yield text(x + width / 2 - 1, above, short(interval.median / panel.unit), "middle", 'font-size="9"')


def lined(panel: Panel, points: Points, series: Sequence[str], scale: Scale) -> Iterator[str]:
    """A line for each series; x is a number."""
    last = max(map(int, points))
    places = {label: LEFT + 10 + int(label) / last * (WIDTH - LEFT - RIGHT - 50) for label in points}
    for label, x in places.items():
        yield text(x, HEIGHT - BOTTOM + 16, label)
    for name in series:
        there = [(places[label], interval) for label, of in points.items() if (interval := of.get(name))]
        path = " ".join(f"{x:.1f},{scale.y(interval.median / panel.unit):.1f}" for x, interval in there)
        yield f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>'
        for x, interval in there:
            y = scale.y(interval.median / panel.unit)
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[name]}"/>'
            yield whisker(x, interval, panel.unit, scale)
        x, interval = there[-1]
        yield text(x + 6, scale.y(interval.median / panel.unit) + 4, short(interval.median / panel.unit), "start")


def whisker(x: float, interval: Interval, unit: float, scale: Scale) -> str:
    """From quartile to quartile."""
    low, high = scale.y(interval.first_quartile / unit), scale.y(interval.third_quartile / unit)
    return f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="#333"/>'


def legend(series: Sequence[str]) -> Iterator[str]:
    """Which colour is whose."""
    x = float(LEFT)
    for name in series:
        yield f'<rect x="{x}" y="30" width="10" height="10" fill="{COLOURS[name]}"/>'
        yield text(x + 14, 39, name, "start")
        x += 28 + 6 * len(name)


def text(x: float, y: float, said: str, anchor: str = "middle", more: str = "") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(said)}</text>'


def short(value: float) -> str:
    """A number of three digits at most."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
