"""The table of all settings in docs/policies.md, made from :data:`pcsc_safe.policy.SETTINGS`.

python scripts/settings_table.py            print it
python scripts/settings_table.py --write    put it in the page
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pcsc_safe import policy

PAGE = Path(__file__).resolve().parent.parent / "docs" / "policies.md"
BEGIN, END = "<!-- made by scripts/settings_table.py -->", "<!-- end -->"


def table() -> str:
    """One row for each setting."""
    rows = ["| `configure()` | environment | `run` | values | default | what it is for |", "|---|---|---|---|---|---|"]
    for name, row in policy.SETTINGS.items():
        default = f"`{_as_text(row.default)}`"
        values = ", ".join(f"`{choice}`" for choice in row.choices()) or _KINDS[type(row.default)]
        names = f"`{name}` | `{policy.variable(name)}` | `{policy.option(name)}`"
        rows.append(f"| {names} | {values} | {default} | {row.summary} |")
    return "\n".join(rows)


_KINDS = {bool: "`0`, `1`; also `false`, `true`, `no`, `yes`, `off`, `on`", float: "a number", str: 'a path, or `""`'}


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return str(getattr(value, "value", value)) or '""'


def in_page(text: str) -> str:
    """The page with the table as it is now."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n\n{table()}\n\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(in_page(PAGE.read_text()))
    else:
        print(table())
