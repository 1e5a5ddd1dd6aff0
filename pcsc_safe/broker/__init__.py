"""The broker: PC/SC for a process that cannot use the native library itself."""

__all__: list[str] = []
