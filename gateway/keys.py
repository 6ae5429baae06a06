"""API keys of the public port."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping

from gateway.errors import Unauthorized


class ApiKeys:
    """Named keys. Without any, everybody is let in (the public port then listens on loopback only)."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._pairs = [(name, key.encode()) for name, key in pairs]

    def __repr__(self) -> str:
        return f"<ApiKeys {' '.join(name for name, _ in self._pairs) or 'open'}>"

    def check(self, headers: Mapping[bytes, bytes]) -> str:
        """The name of the caller's key ("" when the gateway has none). Raises Unauthorized.

        Every key is compared, each in constant time, so the time taken tells nothing about any of them.
        """
        if not self._pairs:
            return ""
        given = headers.get(b"x-api-key", b"")  # Anthropic's clients
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given = token.strip()
        found = None
        for name, key in self._pairs:
            if hmac.compare_digest(given, key):
                found = name
        if found is None:
            what = "Incorrect API key." if given else "No API key."
            raise Unauthorized(f"{what} Send 'Authorization: Bearer KEY' with a key of this gateway.")
        return found
