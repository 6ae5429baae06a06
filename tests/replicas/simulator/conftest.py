"""A client that sees bytes, and the recordings of a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "data" / "sglang"


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
        return [line.partition(b":")[0].decode() for line in self.head[1:]]

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
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes(method, path, body, **headers))
    raw = await reader.read()
    writer.close()
    return Response(raw)


def chat_body(**more: Any) -> dict[str, Any]:
    """A chat completion's request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello the world"}], **more}


@pytest.fixture
def get() -> Callable[..., Any]:
    return fetch


@pytest.fixture
def chat() -> Callable[..., Any]:
    async def call(port: int, **more: Any) -> Response:
        return await fetch(port, "POST", "/v1/chat/completions", chat_body(**more))

    return call


@pytest.fixture
def ask() -> Callable[..., bytes]:
    return request_bytes


@pytest.fixture
def body() -> Callable[..., dict[str, Any]]:
    return chat_body


@pytest.fixture
def recorded() -> Callable[[str], Response]:
    def read(name: str) -> Response:
        raw = (DATA / name).read_bytes()
        return Response(raw[raw.index(b"HTTP/1.1 ") :])

    return read


@pytest.fixture
def until() -> Callable[..., Any]:
    async def wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Until it is so; the limit is only there to end a broken test."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110  # the server has no event for every condition
                await asyncio.sleep(0.002)

    return wait
