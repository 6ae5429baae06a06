"""The controller's HTTP clients towards replicas: one per way of verifying them, made on first use.

httpx is imported here, and by whoever uses a client, no sooner than it is needed: with a terminal's libraries
it takes 0.2 s, and a gateway that starts is waited for."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

KEEP_SECONDS = 4.0  # SGLang closes idle connections at 5 s


class Clients:
    """Mutable: by the event loop alone. There are as many clients as SSL contexts: one, or two."""

    def __init__(self, *, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._clients: dict[ssl.SSLContext | None, httpx.AsyncClient] = {}

    def __repr__(self) -> str:
        return f"<Clients {len(self._clients)}>"

    def get(self, context: ssl.SSLContext | None) -> httpx.AsyncClient:
        """The client for URLs that are verified by `context`; None: plain ones."""
        client = self._clients.get(context)
        if client is None:
            import httpx

            # No proxies: the gateway reaches replicas directly. A context of its own even for plain URLs, as
            # the default one is read from disk (20 ms); with nothing in it no https:// URL passes by mistake.
            client = self._clients[context] = httpx.AsyncClient(
                limits=httpx.Limits(keepalive_expiry=KEEP_SECONDS),
                trust_env=False,
                timeout=self._timeout,
                verify=context or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            )
        return client

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()
