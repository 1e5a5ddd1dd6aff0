"""``python -m pcsc_safe version``, and the versions for everything else that prints them.

This loads nothing native, because users ask for the versions when an installation is broken.

Nothing here forks.
"""

from __future__ import annotations

import argparse
import json
import platform

from .. import __version__

__all__ = ["add_arguments", "main", "versions"]


def versions() -> dict[str, str]:
    """The versions of pcsc_safe and of what it needs; "not installed" for what is missing."""
    return {
        "pcsc_safe": __version__,
        "python": platform.python_version(),
        "pyscard": _installed("pyscard"),
        "wrapt": _installed("wrapt"),
        "platform": platform.platform(),
    }


def _installed(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print the versions as JSON (default: as text)")


def main(options: argparse.Namespace) -> int:
    """Print the versions, one in each line."""
    found = versions()
    print(
        json.dumps(found, indent=2) if options.json else "\n".join(f"{name} {value}" for name, value in found.items()),
        flush=True,
    )
    return 0
