"""`sky.server.common` of 0.14.1, as far as we look: what an API server says of itself."""
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

VERSION = "0.14.1"


class Refusal:
    """The response itself, which SkyPilot keeps for a while."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server
        self.cleared = 0

    def __call__(self, url: str) -> Any:
        return SimpleNamespace(headers=self._server.headers) if self._server.answering else None

    def cache_clear(self) -> None:
        self.cleared += 1


class FakeServer:
    """A remote one by default: nothing of it is ever started here, but `local`."""

    def __init__(self, answers: Callable[[], bool]) -> None:
        self.url = "http://sky.example:46580"
        self.local = False
        self.status = "healthy"
        self.version: str | None = VERSION
        self.headers = {"X-SkyPilot-Version": VERSION}   # of a refusal, which has no body
        self.error: str | None = None
        self.asked = 0
        self.get_api_server_status_response = Refusal(self)
        self._answers = answers

    @property
    def answering(self) -> bool:
        return self._answers()

    def get_server_url(self) -> str:
        return self.url

    def redact_url_password(self, url: str) -> str:
        return url

    def is_api_server_local(self, url: str) -> bool:
        return self.local

    def get_api_server_status(self, url: str) -> Any:
        self.asked += 1
        healthy = self.answering and self.status == "healthy"
        return SimpleNamespace(
            status=SimpleNamespace(value=self.status if self.answering else "unhealthy"),
            version=self.version if healthy else None,
            error=self.error,
        )
