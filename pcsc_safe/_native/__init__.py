"""PC/SC in this process: libpcsclite, by pyscard."""

__all__: list[str] = []
