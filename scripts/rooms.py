"""The picture of the rooms in docs/how.md, drawn from the imports of the package.

python scripts/rooms.py            print it
python scripts/rooms.py --write    put it in docs/images
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pcsc_safe"
PICTURE = ROOT / "docs" / "images" / "rooms.svg"

LAYERS = (
    ("doctor", "demo", "testing"),
    ("scard", "retrofit"),
    ("_gateways",),
    ("broker", "_native", "_trace"),
    ("_core",),
    ("policy", "errors"),
)
"""The rooms in rows; a room is above those that it imports, and a test checks that no arrow points up."""

SAYS = {
    "demo": "hazards, shown",
    "doctor": "findings",
    "testing": "virtual PC/SC",
    "scard": "the drop-in",
    "retrofit": "install(), run",
    "_gateways": "puts the rooms together",
    "broker": "PC/SC in a helper",
    "_native": "libpcsclite here",
    "_trace": "what happened",
    "_core": "one call, and what a fork changes",
    "policy": "settings, decide()",
    "errors": "exceptions",
}
WIDTH, BOX, HEIGHT, GAP = 380, 110, 44, 34


def arrows() -> set[tuple[str, str]]:
    """Which room imports which."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if "site" in parts or parts[-1] == "__main__":  # a separate program, which no other room imports
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*parts[: -node.level], *(node.module or "").split(".")]
                names = [base[0]] if base[0] else [alias.name for alias in node.names]
                found.update((parts[0], name) for name in names)
    return {(one, other) for one, other in found if one != other and {one, other} <= SAYS.keys()}


def drawn() -> set[tuple[str, str]]:
    """The arrows, without those between rooms that other arrows already connect."""
    all_of_them = arrows()
    reached: dict[str, set[str]] = {name: set() for name in SAYS}
    for names in reversed(LAYERS):
        for _ in names:  # rooms of one layer may import each other
            for one, other in all_of_them:
                if one in names:
                    reached[one] |= {other, *reached[other]}
    return {
        (one, other)
        for one, other in all_of_them
        if not any(other in reached[between] for of, between in all_of_them if of == one and between != other)
    }


def svg() -> str:
    """The picture, which fits a phone's screen, and has colours for light and dark pages."""
    middles: dict[str, tuple[float, int]] = {}
    boxes = []
    for layer, names in enumerate(LAYERS):
        y = 8 + layer * (HEIGHT + GAP)
        for number, name in enumerate(names):
            wide = BOX * 2 if len(names) == 1 else BOX
            x = (WIDTH - wide) / 2 if len(names) == 1 else _left(number, len(names))
            middles[name] = x + wide / 2, y
            boxes.append(
                f'<rect x="{x:.0f}" y="{y}" width="{wide}" height="{HEIGHT}" rx="6"/>'
                f'<text x="{x + wide / 2:.0f}" y="{y + 19}" class="name">{name}</text>'
                f'<text x="{x + wide / 2:.0f}" y="{y + 35}">{SAYS[name]}</text>'
            )
    lines = [_arrow(middles[one], middles[other]) for one, other in sorted(drawn())]
    height = 8 + len(LAYERS) * (HEIGHT + GAP) - GAP + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img">'
        "<title>The rooms of pcsc_safe; an arrow leads to what a room imports</title>"
        "<style>svg{color:#1b1f24;background:#fff}rect{fill:#eef3fa;stroke:currentColor}"
        "text{font:11px sans-serif;text-anchor:middle;fill:currentColor}.name{font:bold 13px monospace}"
        "path{fill:none;stroke:#7a8594;marker-end:url(#tip)}marker path{fill:#7a8594;stroke:none;marker-end:none}"
        "@media(prefers-color-scheme:dark){svg{color:#e6e9ee;background:#14171c}rect{fill:#232a35}}</style>"
        '<defs><marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto">'
        '<path d="M0 0L7 3L0 6z"/></marker></defs>' + "".join(lines) + "".join(boxes) + "</svg>\n"
    )


def _left(number: int, of: int) -> float:
    room = WIDTH / of
    return room * number + (room - BOX) / 2


def _arrow(start: tuple[float, int], end: tuple[float, int]) -> str:
    (x, y), (to_x, to_y) = start, end
    if y == to_y:  # a neighbour
        side = 1 if to_x > x else -1
        return f'<path d="M{x + side * BOX / 2:.0f} {y + 22}L{to_x - side * BOX / 2:.0f} {to_y + 22}"/>'
    shift = max(-40.0, min(40.0, (to_x - x) / 4))
    return f'<path d="M{x + shift:.0f} {y + HEIGHT}L{to_x - shift:.0f} {to_y}"/>'


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PICTURE.write_text(svg())
    else:
        print(svg(), end="")
