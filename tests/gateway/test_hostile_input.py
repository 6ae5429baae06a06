"""What an attacker sends: 4xx or a closed connection, at most one request at a replica, bounded memory.

The smuggling set is every known way to make two HTTP parsers disagree about where a request ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from gateway.protocol import GatewayProtocol

from .conftest import RawAnswer, Rig, chat, eventually
from .scripted import ANSWER, Peer, Scripted, chunk, sample
from .test_fast_path import PATH, connect, post

Rigs = Callable[..., Awaitable[Rig]]
BODY = json.dumps(chat()).encode()
INNER = post(chat(user="smuggled"))
START = b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n" % PATH.encode()


def sized(length: object) -> bytes:
    return b"Content-Length: %b\r\n" % str(length).encode()


CLOSE = "Connection: close\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
WHOLE = chunk(BODY) + b"0\r\n\r\n"

# Each is one request that must not be served, whatever it hides behind its end.
SMUGGLING = {
    "CL.TE": START + sized(len(WHOLE + INNER)) + CHUNKED + b"\r\n" + WHOLE + INNER,
    "TE.CL": START + CHUNKED + sized(4) + b"\r\n" + WHOLE + INNER,
    "CL.CL, different": START + sized(len(BODY)) + sized(len(BODY + INNER)) + b"\r\n" + BODY + INNER,
    "CL.CL, the same": START + sized(len(BODY)) * 2 + b"\r\n" + BODY + INNER,
    "CL list": START + sized(f"{len(BODY)}, {len(BODY)}") + b"\r\n" + BODY + INNER,
    "CL +n": START + sized(f"+{len(BODY)}") + b"\r\n" + BODY + INNER,
    "CL -n": START + sized(-1) + b"\r\n" + BODY + INNER,
    "CL 0xn": START + sized(hex(len(BODY))) + b"\r\n" + BODY + INNER,
    "CL n_n": START + sized("1_0") + b"\r\n" + BODY + INNER,
    "CL too large": START + sized(1 << 70) + b"\r\n" + BODY + INNER,
    "CL empty": START + sized("") + b"\r\n" + BODY + INNER,
    "CL space colon": START + b"Content-Length : %d\r\n\r\n" % len(BODY) + BODY + INNER,
    "TE identity": START + b"Transfer-Encoding: identity\r\n\r\n" + WHOLE + INNER,
    "TE xchunked": START + b"Transfer-Encoding: xchunked\r\n\r\n" + WHOLE + INNER,
    "TE chunked, identity": START + b"Transfer-Encoding: chunked, identity\r\n\r\n" + WHOLE + INNER,
    "TE chunked and identity": START + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + WHOLE + INNER,
    "TE space colon": START + b"Transfer-Encoding : chunked\r\n\r\n" + WHOLE + INNER,
    "TE vertical tab": START + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + WHOLE + INNER,
    "TE null": START + b"Transfer-Encoding: chunked\0\r\n\r\n" + WHOLE + INNER,
    "TE obs-fold": START + b"Transfer-Encoding:\r\n chunked\r\n" + sized(4) + b"\r\n" + WHOLE + INNER,
    "obs-fold": START + b"X-A: b\r\n c: d\r\n" + sized(len(BODY)) + b"\r\n" + BODY + INNER,
    "bare LF, head": START.replace(b"\r\n", b"\n") + b"Content-Length: %d\n\n" % len(BODY) + BODY + INNER,
    "bare LF, a line": START + b"X-A: b\n" + sized(len(BODY)) + b"\r\n" + BODY + INNER,
    "bare CR": START + b"X-A: b\rX-B: c\r\n" + sized(len(BODY)) + b"\r\n" + BODY + INNER,
    "null in a header": START + b"X-A: b\0c\r\n" + sized(len(BODY)) + b"\r\n" + BODY + INNER,
    "space in a name": START + b"X A: b\r\n" + sized(len(BODY)) + b"\r\n" + BODY + INNER,
    "no colon": START + b"X-A\r\n" + sized(len(BODY)) + b"\r\n" + BODY + INNER,
    "first line folded": START.replace(b"\r\nHost", b"\r\n Host") + sized(len(BODY)) + b"\r\n" + BODY,
    "chunk size 0x": START + CHUNKED + b"\r\n0x" + WHOLE + INNER,
    "chunk size -": START + CHUNKED + b"\r\n-" + WHOLE + INNER,
    "chunk size space": START + CHUNKED + b"\r\n " + WHOLE + INNER,
    "chunk size too large": START + CHUNKED + b"\r\n" + b"f" * 17 + b"\r\n" + BODY + INNER,
    "chunk too long": START + CHUNKED + b"\r\n%x\r\n" % (len(BODY) - 1) + BODY + b"\r\n0\r\n\r\n" + INNER,
    "chunk bare LF": START + CHUNKED + b"\r\n%x\n" % len(BODY) + BODY + b"\n0\n\n" + INNER,
    "chunk without CRLF": START + CHUNKED + b"\r\n%x\r\n" % len(BODY) + BODY + b"0\r\n\r\n" + INNER,
    "chunk-extension with LF": START + CHUNKED + b"\r\n%x;a=b\nc\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
    "HTTP/0.9": b"POST " + PATH.encode() + b"\r\n" + INNER,
    "HTTP/1.2": post(chat(), version="1.2") + INNER,
    "HTTP/3.0": post(chat(), version="3.0") + INNER,
    "WebSocket": post(chat(), extra="Connection: Upgrade\r\nUpgrade: websocket\r\n") + INNER,
    "h2c": post(chat(), extra="Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n") + INNER,
    "CONNECT": b"CONNECT t:443 HTTP/1.1\r\nHost: t\r\n\r\n" + INNER,
    "URL with a space": START.replace(PATH.encode(), PATH.encode() + b"?a b") + sized(2) + b"\r\n{}",
}

# Paths that are not the one they resemble.
PATHS = (
    "//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/", "/v1/chat%2fcompletions",
    "/v1%2Fchat%2Fcompletions", "/%76%31/chat/completions", "/v1/x/../chat/completions",
    "/v1/./chat/completions", "/v1/chat/completions/../../../abort_request", "/v1/chat/completions%00",
    "/v1/chat/completions;x=y", "/../v1/chat/completions", "/V1/chat/completions", "/abort_request",
    "/v1/chat/completions/%2e%2e/%2e%2e/flush_cache", "http://x//flush_cache", "*",
)  # fmt: skip


@pytest.fixture
async def replica(rig: Rig) -> AsyncIterator[Scripted]:
    async def answer(peer: Peer) -> None:
        await peer.send(ANSWER)

    async with Scripted(answer) as scripted:
        rig.publish(scripted.url)
        await rig.acked()
        yield scripted
        assert (await rig.client.post(PATH, json=chat())).status_code == 200  # it lives
        await rig.quiet()


async def send(rig: Rig, data: bytes) -> bytes:
    """Send, and read until the gateway closes; what waits for more is told that there is none."""
    got = await connect(rig)
    with contextlib.suppress(ConnectionError):
        got.writer.write(data)
        await got.writer.drain()
    answer = await _until_quiet(got)
    await got.close()
    return answer


async def _until_quiet(got: RawAnswer) -> bytes:
    try:
        return await got.rest(0.3)
    except TimeoutError:
        return got.data


async def test_an_ambiguous_request_is_refused_and_nothing_behind_it_is_read(
    rig: Rig, replica: Scripted
) -> None:
    for name, request in SMUGGLING.items():
        data = await send(rig, request)
        assert data == b"" or (data.startswith(b"HTTP/1.1 4") and data.count(b"HTTP/1.1 ") == 1), (name, data)
        assert replica.requests == [], name


async def test_byte_by_byte_it_is_refused_too(rig: Rig, replica: Scripted) -> None:
    for name in ("CL.TE", "TE.CL", "CL.CL, different", "obs-fold", "chunk too long", "WebSocket"):
        got = await connect(rig)
        with contextlib.suppress(ConnectionError):
            for i in range(0, len(SMUGGLING[name]), 7):
                got.writer.write(SMUGGLING[name][i : i + 7])
                await got.writer.drain()
                await asyncio.sleep(0)
        assert (await _until_quiet(got)).count(b"HTTP/1.1 ") <= 1
        await got.close()
    assert replica.requests == []


async def test_a_path_that_only_resembles_one_is_not_served(rig: Rig, replica: Scripted) -> None:
    for path in PATHS:
        assert (await send(rig, post(chat(), path=path, extra=CLOSE))).startswith(b"HTTP/1.1 4"), path
        assert replica.requests == [], path


async def test_the_absolute_form_reaches_the_replica_as_a_path_and_no_other_host(
    rig: Rig, replica: Scripted
) -> None:
    data = await send(rig, post(chat(), path="http://evil.example" + PATH + "?a=b", extra=CLOSE))
    assert data.startswith(b"HTTP/1.1 200 ")
    assert replica.requests[0].line == b"POST %b?a=b HTTP/1.1" % PATH.encode()
    assert replica.requests[0].values(b"host") == [replica.url.removeprefix("http://").encode()]


async def test_head_is_answered_without_a_body_and_wakes_nothing(rig: Rig, replica: Scripted) -> None:
    for path in (PATH, "/health", "/nothing"):
        data = await send(rig, b"HEAD %b HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n" % path.encode())
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 405", b"HTTP/1.1 404", b"HTTP/1.1 200"))
        assert body == b""
    assert replica.requests == []


async def test_http_1_0_is_served_once_and_closed_whatever_it_asks(rig: Rig, replica: Scripted) -> None:
    data = await send(rig, post(chat(), version="1.0", extra="Connection: keep-alive\r\n") + INNER)
    assert data.startswith(b"HTTP/1.1 200 ")
    assert data.count(b"HTTP/1.1 ") == 1
    assert len(replica.requests) == 1


async def test_chunk_extensions_are_dropped_and_endless_ones_refused(rig: Rig, replica: Scripted) -> None:
    head = START + b"Connection: close\r\n" + CHUNKED + b"\r\n"
    data = await send(rig, head + b"%x;a=b;c\r\n%b\r\n0;x\r\n\r\n" % (len(BODY), BODY))
    assert data.startswith(b"HTTP/1.1 200 ")
    assert replica.requests[0].json["messages"] == chat()["messages"]
    data = await send(rig, head + b"%x;" % len(BODY) + b"a" * (1 << 20))
    assert data == b"" or data.startswith(b"HTTP/1.1 4")
    assert len(replica.requests) == 1


@pytest.mark.parametrize(
    "endless",
    [
        START + b"X-A: " + b"a" * (1 << 20),
        START + b"X-A: b\r\n" * 200_000,
        START + b"a" * (1 << 20),
        b"POST /" + b"a" * (1 << 20),
        b"GET /health HTTP/1.1\r\nX-A: " + b"a" * (1 << 20) + b"\r\n\r\n",
        START + CHUNKED + b"\r\n" + chunk(BODY) + b"0\r\nX-A: " + b"a" * (1 << 20),
        START + CHUNKED + b"\r\n" + chunk(BODY) + b"0\r\n" + b"X-A: b\r\n" * 200_000,
        b"\0" * (1 << 20),
    ],
    ids=["value", "lines", "name", "url", "whole", "trailer", "trailers", "nulls"],
)
async def test_headers_without_measure_are_refused_in_bounded_memory(
    rig: Rig, replica: Scripted, endless: bytes
) -> None:
    tracemalloc.start()
    try:
        data = await send(rig, endless)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert data == b"" or data.startswith(b"HTTP/1.1 4")
    assert peak < 8 << 20  # the test's own megabyte in asyncio's buffer among them
    assert replica.requests == []


async def test_a_body_in_the_smallest_chunks_costs_what_it_weighs(rig: Rig) -> None:
    body = b'{"messages":[{"role":"user","content":"%b"}]}' % (b"xy" * 60_000)
    data = b"".join(chunk(body[i : i + 2]) for i in range(0, len(body), 2))
    got = await connect(rig)
    tracemalloc.start()
    try:
        got.writer.write(START + CHUNKED + b"\r\n" + data)
        await eventually(lambda: _taken(rig) == len(body), 30)
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now < 2 << 20  # as a list of pieces: 2.6 MB
    got.writer.write(b"0\r\n\r\n")
    await rig.waiting(1)
    await got.close()
    await rig.waiting(0)


def _taken(rig: Rig) -> int:
    for connection in rig.servers[0].server_state.connections:
        assert isinstance(connection, GatewayProtocol)
        if connection.active is not None:
            return connection.active._size
    return 0


async def test_a_body_of_200_mb_is_413_in_bounded_memory(rig: Rig, replica: Scripted) -> None:
    piece = b"x" * (1 << 20)
    for framing, frame in ((sized(200 << 20), piece), (CHUNKED, chunk(piece))):
        got = await connect(rig)
        reading = asyncio.ensure_future(got.rest(30))
        tracemalloc.start()
        try:
            with contextlib.suppress(ConnectionError):
                got.writer.write(START + framing + b"Connection: close\r\n\r\n")
                for _ in range(200):
                    got.writer.write(frame)
                    await got.writer.drain()
                got.writer.write(b"0\r\n\r\n" if framing is CHUNKED else b"")
            data = await reading
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert data.startswith(b"HTTP/1.1 413 ")
        assert data.count(b"HTTP/1.1 ") == 1
        assert peak < 80 << 20  # --max-body, growing, and the piece
        await got.close()
    assert replica.requests == []


async def test_a_slow_head_and_a_slow_body_are_given_up(
    rig: Rig, replica: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head has its time as a whole, however it drips; a body's is counted from its last byte."""
    monkeypatch.setattr(GatewayProtocol, "read_seconds", 0.3)
    got = await connect(rig)
    with contextlib.suppress(ConnectionError):
        got.writer.write(START)
        for _ in range(20):
            got.writer.write(b"X-A: b\r\n")
            await asyncio.sleep(0.05)
    assert await got.rest() == b""
    await got.close()
    got = await connect(rig)
    got.writer.write(START + sized(len(BODY)) + b"\r\n")
    for i in range(10):
        got.writer.write(BODY[i : i + 1])
        await asyncio.sleep(0.05)
    assert (await got.rest()).startswith(b"HTTP/1.1 408 ")
    await got.close()
    assert replica.requests == []


async def test_what_is_not_http_is_counted_as_rejected(rig: Rig) -> None:
    before = sample("gateway_requests_total", endpoint="other", code="400", end="rejected")
    data = await send(rig, b"\x16\x03\x01\x00\xa5\x01\x00")
    assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_request"
    await eventually(
        lambda: (
            sample("gateway_requests_total", endpoint="other", code="400", end="rejected") == before + 1
        )
    )
