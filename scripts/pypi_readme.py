"""README.md as PyPI shows it, where relative links lead nowhere: those to files of the repository are made absolute.

hatchling calls this when it builds (``tool.hatch.metadata.hooks.custom`` in pyproject.toml).  The URL is that of
``Repository`` in ``project.urls``; without it the links stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)(\[[^]]*\]\()([^)#\s:]+)(#[^)\s]*)?\)")


class PypiReadme(MetadataHookInterface):  # type: ignore[misc]  # hatchling is there when it calls this
    """What hatchling looks for in this file."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set ``readme``."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository", "")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, repository) if repository else text,
        }


def absolute(markdown: str, repository: str) -> str:
    """Text with its links to files of the repository made absolute.

    :param repository: its URL.
    """

    def link(match: re.Match[str]) -> str:
        image, before, path, anchor = match.groups("")
        return f"{image}{before}{repository.rstrip('/')}/{'raw' if image else 'blob'}/HEAD/{path}{anchor})"

    return _LINK.sub(link, markdown)
