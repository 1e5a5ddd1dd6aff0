"""Turns pairs of samples into a line of the table: medians, their spread, and whether a target is met.

A pair is one sample of raw pyscard, or of what programs do without pcsc_safe, and one sample of pcsc_safe.  Both are
taken in the same run, one immediately after the other.  If something slows the machine down for a while, it slows both
down.  So the differences and ratios are computed for each pair, and the median is computed from them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple, Optional

__all__ = ["Figure", "Interval", "figure", "markdown", "table"]


class Interval(NamedTuple):
    """A median, its confidence interval, and the quartiles.

    :ivar low, high: the median lies between them with 95 % confidence (order statistics, for any distribution).
    :ivar first_quartile, third_quartile: half of the samples lie between them.
    """

    median: float
    low: float
    high: float
    first_quartile: float
    third_quartile: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Interval:
        """The interval of some samples."""
        ordered, half = sorted(samples), 0.98 * math.sqrt(len(samples))
        low = max(0, math.floor(len(samples) / 2 - half))
        high = min(len(samples) - 1, math.ceil(len(samples) / 2 + half))
        first, median, third = statistics.quantiles(ordered, n=4, method="inclusive") if ordered[1:] else ordered * 3
        return cls(median, ordered[low], ordered[high], first, third)


class Figure(NamedTuple):
    """One line of the table.

    :ivar name: what was measured.
    :ivar against: what pcsc_safe is compared with: "raw pyscard", a variant of it, or what programs do without it.
    :ivar raw: the samples of ``against``; None if it froze in every round.
    :ivar safe: the samples of pcsc_safe.
    :ivar more: the differences in each pair; None if raw froze in every round.
    :ivar ratio: the ratios in each pair; None if raw froze in every round.
    :ivar froze: the number of rounds in which raw froze; :attr:`raw` has the other rounds.
    :ivar most: the highest value that meets the target; None if there is no target.
    :ivar target_is_ratio: whether the target is for the ratio, not for the difference.
    :ivar rounds: the number of pairs.
    :ivar unit: the unit of all values except ratios: us or kB.
    """

    name: str
    against: str
    raw: Optional[Interval]
    safe: Interval
    more: Optional[Interval]
    ratio: Optional[Interval]
    froze: int
    most: Optional[float]
    target_is_ratio: bool
    rounds: int
    unit: str

    @property
    def judged(self) -> Optional[Interval]:
        """The ratio or the difference, whichever the target is for."""
        return self.ratio if self.target_is_ratio else self.more

    @property
    def met(self) -> str:
        """Whether the target is met; "unclear" if it lies within the spread."""
        if self.most is None:
            return "-"
        if self.judged is None:
            return "met"  # raw never ended
        if self.judged.high <= self.most:
            return "met"
        return "NOT MET" if self.judged.low > self.most else "unclear"

    @property
    def target(self) -> str:
        """The target in words."""
        if self.most is None:
            return "none"
        return f"<= x {self.most:g}" if self.target_is_ratio else f"<= +{self.say(self.most)}"

    def say(self, value: float, sign: str = "") -> str:
        """A value in words."""
        if self.unit != "us":
            return f"{value:{sign}.0f} {self.unit}"
        if abs(value) >= 10_000:
            return f"{value / 1000:{sign}.1f} ms"
        return f"{value:{sign}.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} us"

    def spread(self, interval: Interval) -> str:
        """A median and its quartiles in words."""
        quartiles = f"{self.say(interval.first_quartile)} to {self.say(interval.third_quartile)}"
        return f"{self.say(interval.median)} ({quartiles})"

    def as_json(self) -> dict[str, object]:
        """The figure as a dict for ``json.dumps``; intervals become dicts of their fields."""
        plain = {
            key: value._asdict() if isinstance(value, Interval) else value for key, value in self._asdict().items()
        }
        return {**plain, "target": self.target, "met": self.met}


def figure(
    name: str,
    pairs: Sequence[tuple[Optional[float], float]],
    *,
    against: str = "raw pyscard",
    more: Optional[float] = None,
    ratio: Optional[float] = None,
    unit: str = "us",
) -> Figure:
    """Make a figure from pairs of samples, (raw, safe).

    :param pairs: the samples in this unit; None for raw if it froze.
    :param more: the target, if it is for the difference.
    :param ratio: the target, if it is for the ratio.
    :param unit: microseconds (us) or kB.
    """
    whole = [(raw, safe) for raw, safe in pairs if raw is not None]
    return Figure(
        name,
        against,
        Interval.of([raw for raw, _ in whole]) if whole else None,
        Interval.of([safe for _, safe in pairs]),
        Interval.of([safe - raw for raw, safe in whole]) if whole else None,
        Interval.of([safe / raw for raw, safe in whole]) if whole else None,
        len(pairs) - len(whole),
        more if ratio is None else ratio,
        ratio is not None,
        len(pairs),
        unit,
    )


HEADINGS = (
    "what",
    "compared with",
    "that: median (quartiles)",
    "pcsc_safe: median (quartiles)",
    "more",
    "ratio",
    "95 % interval",
    "target",
    "met",
    "rounds",
)


def table(figures: Sequence[Figure]) -> str:
    """The figures as a table for a terminal."""
    rows = [HEADINGS, *map(_row, figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown(figures: Sequence[Figure]) -> str:
    """The figures as a table for a page."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *map(_row, figures)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(line: Figure) -> tuple[str, ...]:
    if line.raw is None or line.more is None or line.ratio is None or line.judged is None:
        compared = ("froze", line.spread(line.safe), "-", "-", "-")
    else:
        low, high, say = line.judged.low, line.judged.high, line.say
        spread = f"x {low:.3f} to {high:.3f}" if line.target_is_ratio else f"{say(low, '+')} to {say(high, '+')}"
        raw = line.spread(line.raw) + (f", froze {line.froze} times" if line.froze else "")
        more, ratio = say(line.more.median, "+"), f"x {line.ratio.median:.3f}"
        compared = (raw, line.spread(line.safe), more, ratio, spread)
    return (line.name, line.against, *compared, line.target, line.met, str(line.rounds))
