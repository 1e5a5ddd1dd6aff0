"""What happened to PC/SC in a family of processes: recorded, read, reported and drawn."""

__all__: list[str] = []
