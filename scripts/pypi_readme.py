"""README.md for PyPI, where relative links don't work: links to files of the repository are made absolute.

hatchling calls this module when it builds (``tool.hatch.metadata.hooks.custom`` in pyproject.toml).  The links begin
with the URL ``Repository`` in ``project.urls``.  Without this URL the links stay relative.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)(\[[^]]*\]\()([^)#\s:]+)(#[^)\s]*)?\)")


class PypiReadme(MetadataHookInterface):  # type: ignore[misc]  # hatchling is installed when it calls this module
    """The hook that hatchling calls."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set ``readme``."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository", "")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, repository) if repository else text,
        }


def absolute(markdown: str, repository: str) -> str:
    """The text, with absolute links to files of the repository.

    :param repository: its URL.
    """

    def link(match: re.Match[str]) -> str:
        image, before, path, anchor = match.groups("")
        return f"{image}{before}{repository.rstrip('/')}/{'raw' if image else 'blob'}/HEAD/{path}{anchor})"

    return _LINK.sub(link, markdown)
