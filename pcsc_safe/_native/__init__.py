"""PC/SC in this process: libpcsclite, through pyscard."""

__all__: list[str] = []
