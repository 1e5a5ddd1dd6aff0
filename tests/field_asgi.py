"""An ASGI application for ``gunicorn --preload``: the master opens the card, and its workers use it."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import field

field.open_card()


def _work() -> None:
    while True:
        field.exchange(1)
        time.sleep(0.001)


if os.environ.get("FIELD_PARENT") == "busy":
    threading.Thread(target=_work, daemon=True).start()


async def application(scope: Any, receive: Any, send: Any) -> None:
    """``GET /7`` runs the seventh task."""
    if scope["type"] == "http":
        told = field.exchange(int(scope["path"][1:])).encode()
        headers = [(b"content-length", str(len(told)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": told})
