"""Makes the table of all settings in docs/settings.md from :data:`pcsc_safe.policy.SETTINGS`.

python scripts/settings_table.py            print it
python scripts/settings_table.py --write    write it to the page
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pcsc_safe import policy

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
BEGIN, END = "<!-- made by scripts/settings_table.py -->", "<!-- end -->"
COLUMNS = ("keyword, variable, option", "values", "default", "what it sets", "per context", "page")
PAGES = {
    "quiesce_timeout": "[Threads and forks](threads.md)",
    "broker": "[The broker](broker.md)",
    "broker_python": "[The broker](broker.md)",
    "owner": "[Sessions](sessions.md#handover)",
    "guard_native": "[PKCS#11](hosts/pkcs11.md)",
    "spare_cards": "[Policies](policies.md#resets)",
    "recover": "[Recovery](recovery.md)",
}
"""The page that explains a setting, if it isn't the page about policies."""


def table() -> str:
    """One row for each setting."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(_row(name) for name in policy.SETTINGS)]
    return "\n".join(f"| {' | '.join(row)} |" if row[0] != "---" else f"|{'|'.join(row)}|" for row in rows)


def _row(name: str) -> list[str]:
    setting = policy.SETTINGS[name]
    names = f"`{name}`<br>`{policy.variable(name)}`<br>`{policy.option(name)}`"
    values = ", ".join(f"`{choice}`" for choice in setting.choices()) or _KINDS[type(setting.default)]
    default = f"`{setting.default_as_text()}`"
    of_context = "yes" if setting.of_context else "no"
    return [names, values, default, setting.summary, of_context, PAGES.get(name, "[Policies](policies.md)")]


_KINDS = {bool: "`0`, `1`", float: "a number from 0 to 86400", str: 'a path, or `""`'}


def in_page(text: str) -> str:
    """The text of the page, with the current table."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n\n{table()}\n\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(in_page(PAGE.read_text()))
    else:
        print(table())
