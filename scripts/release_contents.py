"""Checks what is in the archives of a release: ``release_contents.py SDIST WHEEL WHEEL-FROM-THE-CHECKOUT``."""

from __future__ import annotations

import hashlib
import sys
import tarfile
import zipfile

WANTED = {
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "pyproject.toml",
    "PKG-INFO",
    "mkdocs.yml",
}
FOLDERS = {"pcsc_safe", "tests", "examples", "docs", "benchmarks", "scripts", "man"}
MAY_BE = WANTED | {".gitignore"}


def of_wheel(path: str) -> dict[str, str]:
    """Each file of a wheel, with a hash; without the list of files, whose order depends on the builder."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/RECORD")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def of_sdist(path: str) -> set[str]:
    """The names in an sdist, below its one directory."""
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def faults(sdist: str, wheel: str, direct: str) -> list[str]:
    """The faults of these archives, in words."""
    found = []
    if of_wheel(wheel) != of_wheel(direct):
        found.append("the wheel from the sdist differs from the wheel from the checkout")
    if strange := {name for name in of_wheel(wheel) if not name.startswith(("pcsc_safe/", "pcsc_safe-"))}:
        found.append(f"the wheel has files that it should not have: {sorted(strange)}")
    if not {"pcsc_safe/py.typed", "pcsc_safe/scard.pyi"} <= of_wheel(wheel).keys():
        found.append("the wheel has no py.typed")
    if not any(name.endswith(".data/data/share/man/man1/pcsc-safe.1") for name in of_wheel(wheel)):
        found.append("the wheel has no man page")
    names = of_sdist(sdist)
    top = {name.partition("/")[0] for name in names}
    if missing := (WANTED | FOLDERS) - top:
        found.append(f"the sdist lacks {sorted(missing)}")
    if more := top - MAY_BE - FOLDERS:
        found.append(f"the sdist has {sorted(more)}")
    if caches := {name for name in names if "__pycache__" in name or name.endswith(".pyc")}:
        found.append(f"the sdist has {sorted(caches)[:3]}")
    return found


if __name__ == "__main__":
    problems = faults(*sys.argv[1:])
    print("\n".join(problems) or "the contents are correct")
    sys.exit(bool(problems))
