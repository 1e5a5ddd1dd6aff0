"""One call, from the application's handle to a gateway, and what a fork changes on its path."""

__all__: list[str] = []
