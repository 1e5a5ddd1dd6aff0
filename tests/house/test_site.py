"""The site in a browser, and the files that scripts make: the picture of the demo, the man page."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser import browser
from places import ROOT

from pcsc_safe.demo import hazards

__all__ = ["browser"]

SEARCH = """
<script>
addEventListener("load", () => setTimeout(() => {
  document.querySelector("#__search").click();
  const query = document.querySelector(".md-search__input");
  query.focus();
  query.value = "gunicorn";
  query.dispatchEvent(new Event("focus"));
  query.dispatchEvent(new KeyboardEvent("keyup"));
}, 500));
</script>
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install 'pcsc-safe[docs]'")
    directory = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(directory)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, timeout=120, check=True)
    return directory


def test_the_search_works_in_files(site: Path, browser: Any) -> None:
    """The search works in a browser that starts no web worker, as for files."""
    page = site / "searched.html"
    page.write_text((site / "index.html").read_text().replace("</body>", f"{SEARCH}</body>"))
    dom, console = browser(page)
    assert console == []
    assert re.search(r"\d+ matching documents", dom)
    assert re.search(r'<a href="[^"]*hosts/gunicorn\.html[^"]*" class="md-search-result__link"', dom)


def test_the_version_is_shown(site: Path) -> None:
    """The header has the version, and a link beside it."""
    version = runpy.run_path(str(ROOT / "scripts" / "docs_hook.py"))["_value"]("__version__", "pcsc_safe/__init__.py")
    page = (site / "index.html").read_text()
    assert re.search(rf"md-ellipsis\">\s*pcsc_safe {re.escape(version)}\s", page)
    assert re.search(r'<a href="https://[^"]+" title="[^"]*" class="md-source">', page)


def test_the_timeline_tells_what_is_under_the_pointer(site: Path) -> None:
    """The timeline is embedded as a document, because an image has no tooltips."""
    assert '<object type="image/svg+xml" data="timeline.svg"' in (site / "timeline.html").read_text()


def test_the_picture_shows_the_demo() -> None:
    """The picture has every hazard of the demo, with the verdict of the run; if the demo changes, make it again."""
    picture = (ROOT / "docs" / "images" / "demo.svg").read_text()
    texts = [unescape(text) for text in re.findall(r"<text [^>]*>([^<]+)</text>", picture)]
    shown = [text for text in texts if text in {hazard.NAME for hazard in hazards.load()}]
    assert shown == [hazard.NAME for hazard in hazards.load()], "run scripts/demo_picture.py --write"
    assert texts.count("HAZARD") == texts.count("SAFE") == len(shown)
    assert f"pcsc_safe.scard: SAFE in all {len(shown)}." in texts


def test_the_man_page_is_up_to_date() -> None:
    """The man page has all options and settings, and no others."""
    made = runpy.run_path(str(ROOT / "scripts" / "man_page.py"))["page"]()
    assert (ROOT / "man" / "pcsc-safe.1").read_text() == made, "run scripts/man_page.py --write"
