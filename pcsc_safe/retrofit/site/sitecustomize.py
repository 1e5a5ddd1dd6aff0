"""Calls ``pcsc_safe.install()``; Python imports it when it starts, because its directory is first on PYTHONPATH.

``python -m pcsc_safe run`` has put the directory there, for a program and every Python that the program starts.  One of
these may have another version or no pcsc_safe, and must run as usual.  So this is written for any Python, and finally
imports the sitecustomize that would have been imported without it.
"""

import os
import sys

__all__ = []  # type: list[str]


def _install():  # type: () -> None
    if sys.version_info < (3, 9):  # noqa: UP036  # it runs in any
        return
    try:
        from pcsc_safe.retrofit.on_import import install_late
    except ValueError as error:  # of PCSC_SAFE_GUARD_NATIVE
        sys.stderr.write("pcsc_safe: process " + str(os.getpid()) + " runs without pcsc_safe: " + str(error) + "\n")
        return
    except Exception:
        return  # it isn't installed there, or not for this Python
    install_late()


def _step_aside():  # type: () -> None
    """Remove this directory from the path, and import the next sitecustomize; site expects that there may be none."""
    here = os.path.dirname(__file__)
    sys.path[:] = [entry for entry in sys.path if entry != here]
    sys.modules.pop(__name__, None)
    __import__("sitecustomize")


_self = sys.modules.get(__name__)  # Python 2 empties a module that nothing refers to
_install()
if __name__ == "sitecustomize":
    _step_aside()
