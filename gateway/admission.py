"""What the head of a request must show before its body is read."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.errors import UnsupportedEncoding
from gateway.keys import ApiKeys
from gateway.patience import Patience, patience
from gateway.settings import Settings


class Passed:
    """That a head was let in, by these keys and settings: whose key it has, and how long its client waits.

    Kept with the head (headers.Head.passed), for the next request that has the same lines.
    """

    __slots__ = ("key", "keys", "patience", "settings")

    def __init__(self, keys: ApiKeys, settings: Settings, fields: Mapping[bytes, bytes]) -> None:
        """Raises Unauthorized, UnsupportedEncoding or BadRequest."""
        self.keys = keys
        self.settings = settings
        self.key = keys.check(fields)
        encoding = fields.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"", b"identity"):
            raise UnsupportedEncoding(
                f"Content-Encoding {encoding.decode('latin-1')!r} is not served: send the body uncompressed."
            )
        kind = fields.get(b"content-type", b"")
        if kind.partition(b";")[0].strip().lower() != b"application/json":
            # Also what keeps a web page from waking a paid machine: a browser asks before it may send this
            # type.
            raise UnsupportedEncoding(
                "Send the body as JSON, with 'Content-Type: application/json'.",
                code="unsupported_content_type",
            )
        self.patience: Patience = patience(
            fields.get(b"x-stainless-read-timeout"),
            fields.get(b"x-gateway-hold"),
            hold=settings.hold,
            commit_after=settings.commit_after,
            beat_every=settings.beat_every,
            beat_after=settings.beat_after,
        )

    def __repr__(self) -> str:
        return f"<Passed {self.key or 'anybody'} {self.patience}>"
