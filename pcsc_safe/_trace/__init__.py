"""What happened to PC/SC in a family of processes: written, read, told and drawn."""

__all__: list[str] = []
