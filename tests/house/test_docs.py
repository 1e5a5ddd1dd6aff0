"""The documentation: every code block runs, every link works, and no message of the package is missing."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest

import pcsc_safe
from pcsc_safe import policy
from pcsc_safe.testing import EchoCard, VirtualPcsc

pytest.importorskip("markdown_it", reason="markdown-it-py is not installed: pip install 'pcsc-safe[test]'")
from doc_blocks import ROOT, SETUPS, Block, Ended, blocks, pages, run  # imports markdown-it

PACKAGE = Path(pcsc_safe.__file__).parent
BLOCKS = blocks()
LANGUAGES = {"python", "sh", "console", "text", "json", "toml", "ini", "conf"}
OTHER_SAYINGS = ("setup", "run by", "not run", "sample")

TIMED_OUT = 124  # the exit status of timeout

NOT_RUN = {
    "README.md": [
        "installs packages",
        "it is tests/demo/test_demo.py's, and takes half a minute",
        "they are the tests",
    ],
    "CONTRIBUTING.md": ["they are the tests"],
    "docs/api.md": ["numbers differ; tests/core/test_proxies.py has the same"],
    "docs/commands.md": ["a line for a shell's own configuration; tests/house/test_cli.py runs the completion"] * 2,
    "docs/doctor.md": [
        "depends on the machine",
        "it is tests/doctor/test_self_test.py's, and takes half a minute",
        "depends on the machine",
    ],
    "docs/hosts/celery.md": [
        "a worker that serves until it is ended; tests/hosts/test_host_celery.py runs it",
        "needs that worker; tests/hosts/test_host_celery.py makes the same call",
        "needs two readers and Redis; tests/hosts/test_host_celery.py runs a worker for each",
        "needs that worker; tests/hosts/test_host_celery.py asks the same",
    ],
    "docs/hosts/daemon.md": ["a part of examples/pin_daemon.py, which tests/hosts/test_host_daemon.py runs"],
    "docs/hosts/openvpn.md": [
        "needs root, and a server; tests/hosts/test_host_openvpn.py runs both programs",
        "a line for the system's own configuration",
    ],
    "docs/macos.md": [
        "it is tests/native/test_macos.py's, and takes minutes",
        "it is tests/doctor/test_self_test.py's, and takes half a minute",
    ],
    "docs/migrate.md": ["it takes a running program"],
    "docs/retrofit.md": ["PIDs differ; tests/retrofit/test_run.py has the lines"],
    "docs/speed.md": ["installs packages", "installs packages"],
    "docs/start.md": ["installs packages", "it is tests/demo/test_demo.py's, and takes half a minute"],
    "docs/testing.md": ["many machines permit no network namespace"],
}
"""Why blocks are not run, by page; a new one has to be added here."""


def is_run_here(block: Block) -> bool:
    """Whether this module runs the block."""
    return block.language in ("python", "sh") and not block.says.startswith(("run by", "not run"))


@pytest.fixture(scope="module")
def docs_stack() -> Iterator[VirtualPcsc]:
    """A stack with two EchoCards."""
    with VirtualPcsc(2, [EchoCard(), EchoCard()], activate=False) as stack:
        yield stack


RUN_HERE = [pytest.param(block, id=block.name) for block in BLOCKS if is_run_here(block)]


@pytest.mark.parametrize("block", RUN_HERE)
def test_a_block_runs(block: Block, docs_stack: VirtualPcsc, tmp_path: Path) -> None:
    """A Python or sh block ends successfully, and so do the children that it forks."""
    if block.told("setup") == "daemon":
        pytest.importorskip("daemon", reason="python-daemon is not installed (extra hosts)")
    if "piv" in block.code:
        pytest.importorskip("jcecard", reason="jcecard is not installed (extra piv)")
    env = {name: value for name, value in docs_stack.env.items() if not name.startswith("PCSC_SAFE_")}
    ended: Ended = run(block, env, tmp_path)
    assert ended.status == (TIMED_OUT if "-- timeout " in block.code else 0), ended.output
    assert "Traceback" not in ended.output, ended.output  # a child's, or the daemon's


def test_every_block_is_accounted_for() -> None:
    """Each block has a language; it runs here or in another test, or is in the list of those that aren't run."""
    assert {block.language for block in BLOCKS} <= LANGUAGES
    not_run: dict[str, list[str]] = {}
    for block in BLOCKS:
        assert not block.says or block.says.startswith(OTHER_SAYINGS), block
        reason = block.told("not run") or block.told("sample")
        if reason:
            not_run.setdefault(block.page, []).append(reason)
        elif block.language == "console":
            pytest.fail(f"{block.name}: output that nothing compares")
        setup = block.told("setup")
        assert not setup or block.language == "sh" or setup in SETUPS, block
    print("not run:", json.dumps(not_run, indent=2))
    assert not_run == NOT_RUN


def test_who_is_said_to_run_a_block_reads_its_page() -> None:
    """A block that is marked as run by another test is read from its page by that test."""
    for block in BLOCKS:
        test = block.told("run by")
        if test:
            source = (ROOT / test).read_text()
            assert Path(block.page).name in source, block
            assert block.page.removeprefix("docs/") in source or '"hosts"' in source, block


def test_files_for_other_programs_are_well_formed() -> None:
    """Blocks of JSON, TOML and INI can be parsed."""
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.code)
        elif block.language == "ini":
            configparser.ConfigParser().read_string(block.code)
        elif block.language == "toml":
            pytest.importorskip("tomllib").loads(block.code)
        elif block.language == "conf":
            assert all(re.fullmatch(r"#.*|[\w/-]+( \S+)*", line) for line in block.code.splitlines()), block


def test_the_table_of_settings_is_made_from_the_code() -> None:
    """``scripts/settings_table.py --write`` makes the table."""
    script = ROOT / "scripts" / "settings_table.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    table = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    assert table.stdout in (ROOT / "docs" / "settings.md").read_text(), "run scripts/settings_table.py --write"


def test_figures_are_those_of_a_run() -> None:
    """``benchmarks/page.py`` writes them from the run that docs/speed.json records."""
    record = json.loads((ROOT / "docs" / "speed.json").read_text())
    script = runpy.run_path(str(ROOT / "benchmarks" / "page.py"))
    assert len(script["pages"]()) >= 2
    for page in script["pages"]():
        assert script["in_page"](page.read_text(), record) == page.read_text(), "run benchmarks/page.py"


LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_links() -> None:
    """Relative links lead to files, and anchors to headings; the others use https, and few hosts."""
    hosts = set()
    for page in pages():
        for target in LINK.findall(without_code(page.read_text())):
            if "://" in target:
                hosts.add(re.fullmatch(r"https://([a-z0-9.-]+)(/\S*)?", target).group(1))  # type: ignore[union-attr]
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(file), f"{page}: {target}"
    assert hosts <= {"github.com", "pypi.org", "pyscard.sourceforge.io", "keepachangelog.com", "semver.org"}


def without_code(text: str) -> str:
    """The text without its code blocks and code spans."""
    return re.sub(r"(?ms)^(```+).*?^\1$|`[^`\n]+`", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_work_on_pypi() -> None:
    """PyPI shows the description without relative links: scripts/pypi_readme.py makes them absolute."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install 'pcsc-safe[dev]'")
    absolute = runpy.run_path(str(ROOT / "scripts" / "pypi_readme.py"))["absolute"]
    url = "https://github.com/owner/name"
    text = absolute((ROOT / "README.md").read_text(), url)
    targets = LINK.findall(without_code(text))
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert f"{url}/blob/HEAD/docs/macos.md#what-is-simulated" in targets
    assert f"{url}/raw/HEAD/docs/images/demo.svg" in targets


def test_the_site_is_built(tmp_path: Path) -> None:
    """The site is built without a warning, also about links and anchors, and its pages request nothing else."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'pcsc-safe[docs]'")
    # Not --quiet: it would keep the warnings from being counted.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?:)?//', page.read_text())
        assert loaded == [], page


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """The docstrings of a module, by the names of the objects."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield getattr(node, "name", file.stem), ast.get_docstring(node) or ""


def test_the_api_page_can_show_its_docstrings() -> None:
    """The docstrings on the API page have no tables or literal blocks of reStructuredText: Markdown has neither."""
    pytest.importorskip("jcecard", reason="jcecard is not installed (extra piv)")  # the page has the virtual PIV card
    names = re.findall(r"(?m)^::: ([\w.]+)", (ROOT / "docs" / "api.md").read_text())
    homes = {getattr(resolve_name(name), "__module__", name) for name in names if name[-1].islower()}
    for file in sorted(str(sys.modules[home].__file__) for home in homes):
        for name, text in docstrings(Path(file)):
            assert not re.search(r"(?m)^\s*={4}|::$", text), f"{file}: {name}"


# Texts that are not messages about an error.
SILENT_MODULES = (
    "doctor/",
    "demo/",
    "_trace/",
    "__main__",
    "_versions",
    "_completion",
)
NOT_MESSAGES = re.compile(
    r"<[\w…]+ .*>|lost with (its broker|pcscd)|"
    r"FRIENDLYNAME .*|LIBPATH .*|Virtual PCD .*|[0-9A-F… ]+|A card holder|of unknown version|cannot create …:|"
    r"failed to map segment|the broker has closed the connection|"
    r"pcsc_safe virtual card on port .*|\w+\(key=.*|pyscard's functions and .*|"
    r"import \w+; .*|sys\.path \+= .*|configure\(\) got an .*|"
    r"Change settings .*|:(param|return|raises)\b.*|… \(default: …\)|"
    r"mount --bind .*|(usage|The program runs|python -m pcsc_safe).*",
    re.DOTALL,
)


def messages() -> Iterator[tuple[str, list[str]]]:
    """Every sentence in the package's code: its place, and its fixed parts."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        if any(part in name for part in SILENT_MODULES):
            continue
        tree = ast.parse(file.read_text())
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            pieces = _pieces(node, inner)
            text = "…".join(pieces)
            if text.strip().count(" ") >= 2 and not NOT_MESSAGES.fullmatch(text.strip()) and not _is_help(name, node):
                yield f"{name}:{getattr(node, 'lineno', 0)}", pieces


def _pieces(node: ast.AST, inner: set[int]) -> list[str]:
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
        return "".join(map(str, parts)).split("\0")
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
        return re.split(r"%[sd]|%\(\w+\)[sd]", node.value)
    return []


def _is_help(name: str, node: ast.AST) -> bool:
    if isinstance(node, ast.Constant) and node.value in {row.summary for row in policy.SETTINGS.values()}:
        return True
    return name == "testing/plugin.py" or (name == "retrofit/launcher.py" and getattr(node, "lineno", 0) < HELP_ENDS)


HELP_ENDS = (PACKAGE / "retrofit" / "launcher.py").read_text().partition("def main(")[0].count("\n")


def test_every_message_is_on_the_page() -> None:
    """Each error, remedy, log line and refusal is in docs/errors.md, word for word."""
    text = re.sub(r"(?ms)^```.*?^```$", "", (ROOT / "docs" / "errors.md").read_text())
    spans = re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", text))
    missing = []
    for where, pieces in messages():
        pattern = re.compile(
            ".+?".join(re.escape(" ".join(piece.split())) if piece.strip() else r"\s*" for piece in pieces)
        )
        if not any(pattern.search(span) for span in spans):
            missing.append(f"{where}: {'…'.join(pieces)}")
    assert missing == []
