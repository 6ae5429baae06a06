"""A client that sees bytes: one request, its answer as it came over the wire."""

from __future__ import annotations

import asyncio
import json
import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Response:
    """One response, as it came over the wire."""

    raw: bytes

    @property
    def head(self) -> list[bytes]:
        return self.raw.partition(b"\r\n\r\n")[0].split(b"\r\n")

    @property
    def status(self) -> int:
        return int(self.head[0].split()[1])

    @property
    def header_names(self) -> list[str]:
        return [name for name, _ in self.headers]

    @property
    def headers(self) -> list[tuple[str, str]]:
        pairs = [line.decode("latin-1").partition(":") for line in self.head[1:]]
        return [(name, value.strip()) for name, _, value in pairs]

    @property
    def rest(self) -> bytes:
        """Everything after the headers, chunk sizes included."""
        return self.raw.partition(b"\r\n\r\n")[2]

    @property
    def json(self) -> Any:
        return json.loads(self.rest)

    @property
    def chunks(self) -> list[bytes]:
        """The HTTP chunks, the last empty one included where there is one."""
        chunks, rest = [], self.rest
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            chunks.append(rest[:length])
            assert rest[length : length + 2] == b"\r\n"
            rest = rest[length + 2 :]
        return chunks

    @property
    def events(self) -> list[Any]:
        """The JSON of each event; `[DONE]` as that text."""
        texts = [chunk.removeprefix(b"data: ").removesuffix(b"\n\n") for chunk in self.chunks if chunk]
        return [text.decode() if text == b"[DONE]" else json.loads(text) for text in texts]


def request_bytes(method: str, path: str, body: Any = None, *, close: bool = True, **headers: str) -> bytes:
    """A request; a dict becomes JSON."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
    given = {"content-type": "application/json"} if data and "content_type" not in headers else {}
    given |= {name.replace("_", "-"): value for name, value in headers.items() if value}
    lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in given.items()]
    lines += ["connection: close"] if close else []
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def fetch(port: int, method: str, path: str, body: Any = None, **headers: str) -> Response:
    """One request on its own connection, read to the end."""
    return await exchange(port, request_bytes(method, path, body, **headers))


async def exchange(
    port: int, request: bytes, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> Response:
    """These bytes on a connection of their own, and what comes until its end."""
    reader, writer = await asyncio.open_connection(host, port, ssl=tls)
    writer.write(request)
    raw = await reader.read()
    writer.close()
    with suppress(OSError):  # the other side may have closed without a word
        await writer.wait_closed()
    return Response(raw)
