"""The retrofit: pcsc_safe in programs that import ``smartcard.scard`` and are not edited.

``installation``
    ``install()`` and ``uninstall()``: what is patched, and restored.
``launcher``
    ``python -m pcsc_safe run``: the same for a whole program and the Python processes that it starts, by
    ``site/sitecustomize.py`` and ``on_import``.

Nothing is imported here, so that a program started by ``run`` pays for the retrofit only if it imports pyscard.
"""

__all__: list[str] = []
