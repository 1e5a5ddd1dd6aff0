"""The broker: PC/SC for a process that can't use the native library itself."""

__all__: list[str] = []
