"""A replica whose every byte a test decides: for what no well-behaved server can be made to do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gateway.metrics import REGISTRY
from replicas.tls import Identity

from .conftest import Rig

DATA = Path(__file__).parent.parent / "data" / "sglang"

STREAM = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"vary: Origin\r\ntransfer-encoding: chunked\r\n\r\n"
)
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"


def recorded(name: str) -> tuple[int, bytes]:
    """Status and body of a recorded answer of a real SGLang."""
    raw = (DATA / name).read_bytes()
    raw = raw[raw.index(b"HTTP/1.1") :]
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def chunk(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str) -> bytes:
    """One chat chunk as an SSE event."""
    body = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: %b\n\n" % json.dumps(body).encode()


def whole(body: bytes, *, status: int = 200, kind: str = "application/json", extra: str = "") -> bytes:
    """A whole answer with its length."""
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


def busier(rig: Rig, slot: int) -> None:
    """Make the replica in `slot` the second choice for the next 3 s: others are said to use it."""
    rig.board.cells[rig.board.foreign + slot] = 9
    rig.board.cells[rig.board.polled + slot] = time.monotonic_ns()


def sample(name: str, **labels: str) -> float:
    """A metric's value now, of service r1."""
    return REGISTRY.get_sample_value(name, {"service": "r1", **labels}) or 0.0


def retries(cause: str) -> float:
    return sample("gateway_retries_total", cause=cause)


ANSWER = whole(b'{"object":"chat.completion","choices":[]}')


@dataclass
class Request:
    """What came over the wire."""

    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


@dataclass(eq=False)
class Peer:
    """One request's connection, from the replica's side. `gone`: the gateway closed it."""

    request: Request
    writer: asyncio.StreamWriter
    number: int  # which request on this replica, from 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    def close(self) -> None:
        """FIN after what was sent."""
        self.writer.close()

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Scripted:
    """`answer(peer)` is called for each request; /abort_request is answered by itself and noted in `aborts`.
    `peers`: every request so far, and its connection. `context`: it speaks TLS."""

    def __init__(
        self, answer: Callable[[Peer], Awaitable[None]], *, context: ssl.SSLContext | None = None
    ) -> None:
        self._answer = answer
        self._context = context
        self._tasks: set[asyncio.Task[None]] = set()
        self.peers: list[Peer] = []
        self.aborts: list[str] = []
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def requests(self) -> list[Request]:
        return [peer.request for peer in self.peers]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *error: object) -> None:
        # A connection half accepted when its server closes (an abort on its way) would never be closed.
        for sock in self._server.sockets:
            asyncio.get_running_loop().remove_reader(sock.fileno())
        for _ in range(3):
            await asyncio.sleep(0)
        self._server.close()
        while self._tasks:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.sleep(0)  # from Python 3.12 on, gather takes no turn for what is done
        for writer in self._writers:  # a task that was cancelled before its first step closed nothing
            writer.transport.abort()
        await self._server.wait_closed()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering: asyncio.Task[None] | None = None
        peer: Peer | None = None
        try:
            while True:
                request = await _read(reader)
                if request.line.startswith(b"POST /abort_request "):
                    self.aborts.append(request.json["rid"])
                    writer.write(whole(b""))
                    continue
                peer = Peer(request, writer, len(self.peers))
                self.peers.append(peer)
                answering = asyncio.ensure_future(self._answer(peer))  # type: ignore[arg-type]
        except (asyncio.IncompleteReadError, ConnectionError):
            if peer is not None:
                peer.gone.set()
            if answering is not None:
                await answering
        finally:
            if answering is not None:
                answering.cancel()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    line, *rest = head[:-4].split(b"\r\n")
    headers = [(name.lower(), value.strip()) for name, _, value in (item.partition(b":") for item in rest)]
    length = int(dict(headers).get(b"content-length", b"0"))
    return Request(line, headers, await reader.readexactly(length))


def says(*parts: bytes, close: bool = False) -> Callable[[Peer], Awaitable[None]]:
    """A replica that sends these bytes, each by itself, for every request."""

    async def answer(peer: Peer) -> None:
        for part in parts:
            await peer.send(part)
            await asyncio.sleep(0)
        if close:
            peer.close()

    return answer


def server_context(identity: Identity, folder: Path) -> ssl.SSLContext:
    """A replica's, with the key and certificate that it was given."""
    (folder / "replica.pem").write_text(identity.key + identity.cert)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "replica.pem")
    return context
