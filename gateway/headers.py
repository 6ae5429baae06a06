"""Which header lines cross the gateway, in both directions. PURE.

Hop-by-hop ones never do. `Expect` is ours to answer; `Accept-Encoding` becomes identity, so that first
events, end markers and usage can be read; the client's key is replaced by the replica's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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


def to_replica(
    headers: Iterable[Header],
    *,
    target: bytes,
    authority: str,
    key: str | None,
    request_id: str,
    client: str,
    scheme: str,
    length: int,
) -> bytes:
    """The head of the request that a replica gets. `target` is path and query, `client` the caller's
    address."""
    lines = [
        b"POST %b HTTP/1.1\r\nhost: %b\r\naccept-encoding: identity\r\nx-request-id: %b\r\n"
        % (target, authority.encode(), request_id.encode())
    ]
    forwarded = [client.encode()]
    host = b""
    nominated: frozenset[bytes] = frozenset()
    for name, value in headers:
        if name not in _NOT_TO_REPLICA:
            lines.append(b"%b: %b\r\n" % (name, value))
        elif name == b"x-forwarded-for":
            forwarded.insert(-1, value)
        elif name == b"host":
            host = value
        elif name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            nominated |= {part.strip().lower() for part in value.split(b",")}
    if nominated:
        lines = lines[:1] + [line for line in lines[1:] if line.partition(b":")[0] not in nominated]
    if key:
        lines.append(b"authorization: Bearer %b\r\n" % key.encode())
    lines.append(
        b"x-forwarded-for: %b\r\nx-forwarded-host: %b\r\nx-forwarded-proto: %b\r\ncontent-length: %d\r\n\r\n"
        % (b", ".join(forwarded), host, scheme.encode(), length)
    )
    return b"".join(lines)


def to_client(headers: Iterable[Header], request_id: str, *, sized: bool = True) -> list[Header]:
    """The replica's response headers as the client gets them; without its length when not `sized`."""
    dropped = _NOT_TO_CLIENT if sized else _NOT_TO_CLIENT | {b"content-length"}
    kept = [header for header in headers if header[0] not in dropped]
    kept.append((b"x-request-id", request_id.encode()))
    return kept


def value(headers: Iterable[Header], name: bytes) -> bytes:
    """The first value of a header, b"" when absent."""
    return next((v for n, v in headers if n == name), b"")
