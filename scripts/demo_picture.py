"""Makes the animated picture of the demo in the README from a real run in a terminal.

python scripts/demo_picture.py            run the demo, and print the picture
python scripts/demo_picture.py --write    write it to docs/images

The picture shows the lines as the run prints them.  Pauses are shortened, and the table between the last line and the
summary is left out.  Each text is in its final place from the beginning, and is hidden until its time.  So a viewer
that doesn't animate the picture shows the end of the run.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import textwrap
import time
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "demo.svg"
COMMAND = "python -m pcsc_safe demo"

COLUMNS, CHARACTER, LINE, MARGIN, BAR = 80, 7.8, 20, 16, 30
START, LONGEST_PAUSE = 1.2, 0.8  # seconds: until the first line, between two changes
STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; fill: #1f2328;
  white-space: pre; animation: show 1ms backwards; }
.paper { fill: #f6f8fa; stroke: #d0d7de; } .dot { fill: #d0d7de; }
.red { fill: #b3131e; font-weight: bold; } .green { fill: #116329; font-weight: bold; } .yellow { fill: #7d4e00; }
.muted { fill: #59636e; }
.brief { visibility: hidden; animation-name: brief; animation-fill-mode: none; }
@keyframes show { from { visibility: hidden; } }
@keyframes brief { from, to { visibility: visible; } }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .paper { fill: #0d1117; stroke: #3d444d; } .dot { fill: #3d444d; }
  .red { fill: #ff7b72; } .green { fill: #56d364; } .yellow { fill: #e3b341; } .muted { fill: #9198a1; }
}
@media (prefers-reduced-motion: reduce) { text { animation: none; } }
"""
CLASSES = {"31": "red", "32": "green", "33": "yellow"}


class Part(NamedTuple):
    """Text at a place of the screen."""

    column: int
    text: str
    look: str


class Shown(NamedTuple):
    """A part of a line, with the second when it appears, and the second when it disappears (None if it stays)."""

    part: Part
    since: float
    until: float | None


def recorded() -> list[tuple[float, str]]:
    """What a run of the demo writes to a terminal, in pieces with their times."""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, *COMMAND.split()[1:]]
    pieces = []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, env=environment) as process:
        os.close(terminal)
        while piece := _read(controller):
            pieces.append((time.monotonic(), piece))
    os.close(controller)
    if process.returncode:
        raise SystemExit(f"the demo ended with status {process.returncode}")
    return pieces


def _read(descriptor: int) -> str:
    try:
        return os.read(descriptor, 65536).decode()
    except OSError:  # Linux: the terminal is closed
        return ""


def shortened(pieces: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The same without long pauses, beginning at :data:`START`."""
    now, before, result = START, pieces[0][0], []
    for at, piece in pieces:
        now += min(at - before, LONGEST_PAUSE)
        before = at
        result.append((now, piece))
    return result


def lines(pieces: list[tuple[float, str]]) -> list[list[tuple[float, str]]]:
    """Each line of the screen, as the list of its versions."""
    screen: list[list[tuple[float, str]]] = [[]]
    for at, piece in pieces:
        for token in re.split(r"(\r\n|\r\x1b\[K)", piece):
            if token == "\r\n":
                screen.append([])
            elif token and not token.startswith("\r"):
                screen[-1].append((at, token))
    return screen


def parts(text: str) -> list[Part]:
    """The parts of a line, without the spaces between them."""
    found, column, look = [], 0, ""
    for token in re.split(r"(\x1b\[\d+m|  +)", text):
        if token.startswith("\x1b"):
            look = CLASSES.get(token[2:-1], "")
        else:
            if token.strip():
                found.append(Part(column, token.rstrip(), look))
            column += len(token)
    return found


def shown(versions: list[tuple[float, str]]) -> list[Shown]:
    """Each part of a line, once."""
    result: list[Shown] = []
    open_since: dict[Part, float] = {}
    for at, text in versions:
        now = parts(text)
        for part in [part for part in open_since if part not in now]:
            result.append(Shown(part, open_since.pop(part), at))
        for part in now:
            open_since.setdefault(part, at)
    return result + [Shown(part, since, None) for part, since in open_since.items()]


def screen_of(pieces: list[tuple[float, str]]) -> list[list[Shown]]:
    """The command, and what the run wrote without the table."""
    written = [line for versions in lines(shortened(pieces)) for line in _wrapped(shown(versions))]
    while not written[-1]:
        written.pop()
    table = next(number for number, line in enumerate(written) if line and line[0].part.text == "hazard")
    summary = written[-2:]
    dots = [Shown(Part(0, "[...]", "muted"), summary[0][0].since, None)]
    prompt = [Shown(Part(0, "$", "muted"), 0, None), Shown(Part(2, COMMAND, ""), START / 2, None)]
    return [prompt, *written[:table], dots, *summary]


def _wrapped(line: list[Shown]) -> list[list[Shown]]:
    """A sentence that is wider than the screen, in several lines."""
    if len(line) != 1:
        return [line]
    part, since, until = line[0]
    return [[Shown(part._replace(text=text), since, until)] for text in textwrap.wrap(part.text, COLUMNS)]


def svg(screen: list[list[Shown]]) -> str:
    """The picture."""
    width, height = round(2 * MARGIN + COLUMNS * CHARACTER), BAR + LINE * len(screen) + MARGIN
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-labelledby="title">',
        f'<title id="title">{COMMAND}: each hazard happens on pyscard\'s smartcard.scard, and not on pcsc_safe</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        *(f'<circle class="dot" cx="{MARGIN + 4 + 16 * dot}" cy="16" r="5"/>' for dot in range(3)),
    ]
    for number, line in enumerate(screen):
        drawn += [_text(each, BAR + LINE * (number + 1) - 6) for each in line]
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _text(each: Shown, y: int) -> str:
    column, text, look = each.part
    times = f"animation-delay: {each.since:.2f}s"
    if each.until is not None:
        look = f"{look} brief".strip()
        times += f"; animation-duration: {each.until - each.since:.2f}s"
    x, length = MARGIN + column * CHARACTER, len(text) * CHARACTER
    named = f'class="{look}" ' if look else ""
    return (
        f'<text {named}x="{x:.1f}" y="{y}" textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs" '
        f'style="{times}">{escape(text)}</text>'
    )


if __name__ == "__main__":
    made = svg(screen_of(recorded()))
    if "--write" in sys.argv:
        PICTURE.write_text(made)
    else:
        sys.stdout.write(made)
