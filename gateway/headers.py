"""Which header lines cross the gateway, in both directions. PURE.

Hop-by-hop ones never do. `Expect` is ours to answer; `Accept-Encoding` becomes identity, so that first
events, end markers and usage can be read; the client's key is replaced by the replica's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

Header = tuple[bytes, bytes]

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NOT_TO_REPLICA = _HOP_BY_HOP | {
    b"accept-encoding",
    b"authorization",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"x-api-key",
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-forwarded-proto",
    b"x-gateway-hold",
    b"x-request-id",
}
_NOT_TO_CLIENT = _HOP_BY_HOP | {b"x-request-id", b"set-cookie"}
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def request_id(headers: Mapping[bytes, bytes], made: str) -> str:
    """The client's `X-Request-Id` when it is printable and short, else `made`. For logs and headers only."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return made


class Head:
    """The lines of one request's head, without its content-length. `fields`: by lower-cased name, the last
    of each.

    Clients send the same lines again and again: a connection keeps what was made of them, and whoever checks
    them notes in `passed` what let them in (by identity: keys and limits can change).
    """

    __slots__ = ("_client", "_forwarded", "_scheme", "fields", "lines", "passed", "raw")

    def __init__(self, raw: Sequence[Header], client: str, scheme: str) -> None:
        """`client` is the caller's address."""
        self.raw = raw
        self.lines = [(name.lower(), value) for name, value in raw]
        self.fields = dict(self.lines)
        self.passed: object = None
        self._client = client
        self._scheme = scheme
        self._forwarded: bytes | None = None

    def __repr__(self) -> str:
        return f"<Head {' '.join(name.decode('latin-1') for name in self.fields)}>"

    @property
    def expects(self) -> bool:
        """Whether the client waits for `100 Continue` before it sends the body."""
        return self.fields.get(b"expect", b"").lower() == b"100-continue"

    @property
    def forwarded(self) -> bytes:
        """What of it a replica gets."""
        made = self._forwarded
        if made is None:
            made = self._forwarded = self._forward()
        return made

    def _forward(self) -> bytes:
        lines = []
        addresses = [self._client.encode()]
        nominated: frozenset[bytes] = frozenset()
        for name, value in self.lines:
            if name not in _NOT_TO_REPLICA:
                lines.append(b"%b: %b\r\n" % (name, value))
            elif name == b"x-forwarded-for":
                addresses.insert(-1, value)
            elif name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
                nominated |= {part.strip().lower() for part in value.split(b",")}
        if nominated:
            lines = [line for line in lines if line.partition(b":")[0] not in nominated]
        lines.append(
            b"x-forwarded-for: %b\r\nx-forwarded-host: %b\r\nx-forwarded-proto: %b\r\n"
            % (b", ".join(addresses), self.fields.get(b"host", b""), self._scheme.encode())
        )
        return b"".join(lines)


def to_replica(
    head: Head, *, target: bytes, authority: str, key: str | None, request_id: str, length: int
) -> bytes:
    """The head of the request that a replica gets. `target` is path and query."""
    bearer = b"authorization: Bearer %b\r\n" % key.encode() if key else b""
    return (
        b"POST %b HTTP/1.1\r\nhost: %b\r\naccept-encoding: identity\r\nx-request-id: %b\r\n"
        b"%b%bcontent-length: %d\r\n\r\n"
        % (target, authority.encode(), request_id.encode(), head.forwarded, bearer, length)
    )


def to_client(headers: Iterable[Header], request_id: str, *, sized: bool = True) -> list[Header]:
    """The replica's response headers as the client gets them; without its length when not `sized`."""
    dropped = _NOT_TO_CLIENT if sized else _NOT_TO_CLIENT | {b"content-length"}
    kept = [header for header in headers if header[0] not in dropped]
    kept.append((b"x-request-id", request_id.encode()))
    return kept


def value(headers: Iterable[Header], name: bytes) -> bytes:
    """The first value of a header, b"" when absent."""
    return next((v for n, v in headers if n == name), b"")
