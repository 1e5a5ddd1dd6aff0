"""The parts of the site that mkdocs.yml can't configure; mkdocs loads this module (``hooks`` in mkdocs.yml).

It adds the README's first screen, files of the repository, pictures, the version and the link to the repository.  The
pages link to examples and other files by relative paths, which work in the repository.  For the site, each linked file
becomes a page with its text, and the links lead to this page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
FIRST_SCREEN = "<!-- the first screen of README.md -->"
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "reporting.md"}
WITH_TOOLTIPS = {"timeline.svg"}
_PICTURE = re.compile(r'<p><img alt="([^"]*)" src="([^"]+\.svg)" ?/?></p>')
_LINK = re.compile(r"(\[[^]]*\]\()([^)#\s:]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Show the version beside the name, and link to the repository; to PyPI while pyproject.toml names none."""
    config.site_name = f"{config.site_name} {_value('__version__', 'pcsc_safe/__init__.py')}"
    config.copyright = f"{config.site_name}, {_value('license', 'pyproject.toml')}"
    repository, homepage = _value("Repository", "pyproject.toml"), _value("Homepage", "pyproject.toml")
    config.repo_url = repository or homepage
    config.repo_name = "Repository" if repository else "PyPI"
    return config


def _value(name: str, file: str) -> str:
    """The string that a file assigns to a name; Python 3.9 has no parser of TOML."""
    found = re.search(rf'(?m)^{name} = "([^"]*)"', (ROOT / file).read_text())
    return found.group(1) if found else ""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that show files of the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=moved((ROOT / source).read_text(), ".", ".")))
    for example in sorted((ROOT / "examples").glob("*.py")):
        name = f"examples/{example.name}"
        page = File.generated(config, f"examples/{example.stem}.md", content=_listing(name, example.read_text()))
        page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Insert the README's first screen, and change links so that they lead to pages of this site."""
    source = page.file.src_uri
    if source in PAGES.values() or source.startswith("examples/"):
        return markdown
    directory = os.path.dirname(f"docs/{source}")
    markdown = moved(markdown, directory, os.path.dirname(source) or ".")
    return markdown.replace(FIRST_SCREEN, moved(first_screen(), ".", "."))


def on_page_content(html: str, **_: Any) -> str:
    """Embed the pictures, and replace Sphinx's roles in docstrings with code."""
    html = _PICTURE.sub(_embedded, html)
    return re.sub(r":(?:mod|class|func|meth|data|exc|attr):<code>~?", "<code>", html)


def _embedded(picture: re.Match[str]) -> str:
    """A picture that scrolls if the page is narrower, and a link to the picture in its full size.

    An ``<img>`` follows the page's choice of light or dark, but has no tooltips; an ``<object>`` has them.
    """
    alt, source = picture.groups()
    shown = f'<img alt="{alt}" src="{source}">'
    if os.path.basename(source) in WITH_TOOLTIPS:
        shown = f'<object type="image/svg+xml" data="{source}" aria-label="{alt}">{shown}</object>'
    link = f'<figcaption><a href="{source}">Full size</a></figcaption>'
    return f'<figure><div class="picture">{shown}</div>{link}</figure>'


def on_post_page(output: str, **_: Any) -> str:
    """Prevent the theme's script from asking GitHub for the repository's stars."""
    return output.replace(' data-md-component="source"', "")


def first_screen() -> str:
    """The first screen of README.md, without its title."""
    _, _, rest = (ROOT / "README.md").read_text().partition("\n")
    return rest.partition("\n## ")[0]


def moved(markdown: str, directory: str, page_directory: str) -> str:
    """The text, with links to pages of the site instead of links to files of the repository.

    :param directory: the directory of the text, relative to the repository.
    :param page_directory: the directory of its page, relative to the site.
    """

    def link(match: re.Match[str]) -> str:
        before, target, anchor = match.groups("")
        path = os.path.normpath(os.path.join(directory, target))
        page = _page_of(path)
        return match.group() if page is None else f"{before}{os.path.relpath(page, page_directory)}{anchor})"

    return _LINK.sub(link, markdown)


def _page_of(path: str) -> str | None:
    """The page that shows a file of the repository; None if no page does."""
    if path in PAGES:
        return PAGES[path]
    if path == "examples":
        return "hosts/index.md"
    if path.startswith("examples/") and path.endswith(".py"):
        return f"{path[:-3]}.md"
    if path.startswith("docs/"):
        return path[len("docs/") :]
    return None


def _listing(name: str, text: str) -> str:
    return f"# {name}\n\n````python\n{text.rstrip()}\n````\n"
