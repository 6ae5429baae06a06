"""One pooled HTTP/1.1 connection to a replica, and everything a replica can do to it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from gateway import upstream
from gateway.errors import BadResponse, DiedMidway, DiedSilent, UpstreamTimeout
from gateway.upstream import Connection, Pool, Stale
from replicas.tls import Identity, context_for, make

from .conftest import eventually
from .scripted import ANSWER, LAST, STREAM, Peer, Scripted, chunk, says, server_context, whole

REQUEST = b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi"
CLOSE_DELIMITED = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"


Talking = Callable[
    [Callable[[Peer], Awaitable[None]]], contextlib.AbstractAsyncContextManager[tuple[Pool, Scripted]]
]


@pytest.fixture(scope="module")
def identity() -> Identity:
    return make("r1")


@pytest.fixture(scope="module")
def serving(identity: Identity, tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    return server_context(identity, tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["plain", "tls"])
def talking(request: pytest.FixtureRequest, identity: Identity, serving: ssl.SSLContext) -> Talking:
    """`async with talking(answer) as (pool, server)`: all that follows holds over TCP and over TLS."""
    context = serving if request.param == "tls" else None

    @contextlib.asynccontextmanager
    async def talk(answer: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[tuple[Pool, Scripted]]:
        async with Scripted(answer, context=context) as server:
            pool = Pool(server.url, context=context_for(server.url, identity.cert, None))
            yield pool, server
            pool.close()

    return talk


async def body(conn: Connection) -> bytes:
    """All of the body."""
    parts = []
    while (part := await conn.read()) != b"":
        parts.append(part or b"")
    return b"".join(parts)


async def head(conn: Connection) -> None:
    """Send a request and wait for the head of the answer."""
    conn.request(REQUEST)
    await conn.head()


async def ask(pool: Pool) -> tuple[Connection, bytes]:
    conn = await pool.acquire()
    await head(conn)
    return conn, await body(conn)


def unread(conn: Connection) -> int:
    found = re.search(r"unread=(\d+)", repr(conn))
    assert found is not None
    return int(found[1])


# --- what goes well


@pytest.mark.parametrize(
    "parts",
    [
        (whole(b"hello"),),
        tuple(bytes([byte]) for byte in whole(b"hello")),
        (STREAM + chunk(b"he") + chunk(b"llo") + LAST,),
        (STREAM, chunk(b"he"), chunk(b"llo"), LAST),
        tuple(bytes([byte]) for byte in STREAM + chunk(b"hello") + LAST),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + whole(b"hello")),
        (STREAM + chunk(b"hello") + b"0\r\nx-trailer: yes\r\n\r\n",),
    ],
)
async def test_an_answer_is_the_same_however_it_is_cut(talking: Talking, parts: tuple[bytes, ...]) -> None:
    async with talking(says(*parts)) as (pool, server):
        conn, data = await ask(pool)
        assert (conn.status, data) == (200, b"hello")
        assert {name for name, _ in conn.headers}.isdisjoint({b"link", b"x-trailer"})
        assert conn.exhausted
        conn.release()
        assert (await ask(pool))[1] == b"hello"
        assert server.connections == 1
        assert server.requests[1].body == b"hi"


async def test_a_body_without_a_length_ends_with_the_connection(talking: Talking) -> None:
    async with talking(says(CLOSE_DELIMITED + b"hel", b"lo", close=True)) as (pool, server):
        conn, data = await ask(pool)
        assert data == b"hello"
        conn.release()
        await ask(pool)
        assert server.connections == 2


async def test_the_newest_idle_connection_is_used_first(talking: Talking) -> None:
    async with talking(says(ANSWER)) as (pool, server):
        one, two = await pool.acquire(), await pool.acquire()
        for conn in (one, two):
            await head(conn)
            await body(conn)
            conn.release()
        assert await pool.acquire() is two
        assert await pool.acquire() is one
        assert server.connections == 2
        one.abort()
        two.abort()


# --- what is not reused


@pytest.mark.parametrize(
    "parts",
    [
        (whole(b"hello", extra="connection: close\r\n"),),
        (whole(b"hello") + b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",),
        (whole(b"hello") + b"garbage",),
        (STREAM + chunk(b"hello") + LAST + b"\0",),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello",),
    ],
)
async def test_a_connection_with_bytes_past_the_end_or_a_close_is_not_used_again(
    talking: Talking,
    parts: tuple[bytes, ...],
) -> None:
    async with talking(says(*parts)) as (pool, server):
        conn, data = await ask(pool)
        assert data == b"hello"
        conn.release()
        assert repr(pool).endswith("idle=0>")
        await ask(pool)
        assert server.connections == 2


async def test_bytes_on_an_idle_connection_close_it(talking: Talking) -> None:
    async with talking(says(ANSWER)) as (pool, server):
        conn, _ = await ask(pool)
        conn.release()
        assert repr(pool).endswith("idle=1>")
        await server.peers[0].send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await eventually(lambda: conn.closed)
        assert repr(pool).endswith("idle=0>")


async def test_an_idle_connection_that_the_replica_closes_is_forgotten(talking: Talking) -> None:
    async with talking(says(ANSWER)) as (pool, server):
        conn, _ = await ask(pool)
        conn.release()
        server.peers[0].close()
        await eventually(lambda: repr(pool).endswith("idle=0>"))


async def test_a_connection_is_kept_for_less_than_the_5_s_after_which_sglang_closes_it(
    talking: Talking,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 3 <= upstream.IDLE_SECONDS <= 4.5
    async with talking(says(ANSWER)) as (pool, server):
        conn, _ = await ask(pool)
        conn.release()
        pool.sweep()
        assert not conn.closed
        monkeypatch.setattr(upstream, "IDLE_SECONDS", -1.0)
        other, _ = await ask(pool)
        assert other is not conn
        other.release()
        pool.sweep()
        await eventually(lambda: conn.closed and other.closed)
        assert server.connections == 2


async def test_a_half_read_answer_is_not_given_back(talking: Talking) -> None:
    async with talking(says(STREAM + chunk(b"x"))) as (pool, server):
        conn = await pool.acquire()
        await head(conn)
        conn.release()
        await asyncio.wait_for(server.peers[0].gone.wait(), 5)
        assert repr(pool).endswith("idle=0>")


async def test_a_closed_pool_takes_nothing_back(talking: Talking) -> None:
    async with talking(says(ANSWER)) as (pool, _):
        conn, _ = await ask(pool)
        pool.close()
        conn.release()
        await eventually(lambda: conn.closed)


# --- what goes wrong


async def test_a_pooled_connection_that_had_been_closed_is_stale(talking: Talking) -> None:
    async def once(peer: Peer) -> None:
        if peer.number == 0:
            await peer.send(ANSWER)
        else:
            peer.reset()

    async with talking(once) as (pool, _):
        conn, _ = await ask(pool)
        conn.release()
        conn = await pool.acquire()
        conn.request(REQUEST)
        with pytest.raises(Stale):
            await conn.head()


async def test_a_pooled_connection_that_closes_long_after_the_request_was_sent_did_carry_it(
    talking: Talking,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def once(peer: Peer) -> None:
        if peer.number == 0:
            await peer.send(ANSWER)
        else:
            peer.close()

    async with talking(once) as (pool, _):
        conn, _ = await ask(pool)
        conn.release()
        monkeypatch.setattr(upstream, "STALE_SECONDS", -1.0)
        conn = await pool.acquire()
        conn.request(REQUEST)
        with pytest.raises(DiedSilent):
            await conn.head()


@pytest.mark.parametrize("reset", [True, False])
async def test_a_new_connection_that_closes_without_a_byte_died_silent(talking: Talking, reset: bool) -> None:
    async def answer(peer: Peer) -> None:
        peer.reset() if reset else peer.close()

    async with talking(answer) as (pool, _):
        conn = await pool.acquire()
        conn.request(REQUEST)
        with pytest.raises(DiedSilent):
            await conn.head()


@pytest.mark.parametrize(
    "start",
    [
        b"H",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel",
        STREAM,
        STREAM + chunk(b"hel"),
        STREAM + b"5\r\nhel",
    ],
)
async def test_a_connection_that_closes_within_the_answer_died_midway(talking: Talking, start: bytes) -> None:
    async with talking(says(start, close=True)) as (pool, _):
        with pytest.raises(DiedMidway):
            await ask(pool)


async def test_what_came_before_the_end_is_read_before_the_error(talking: Talking) -> None:
    async with talking(says(STREAM + chunk(b"hel"), close=True)) as (pool, _):
        conn = await pool.acquire()
        await head(conn)
        await eventually(lambda: conn.closed)
        assert await conn.read() == b"hel"
        with pytest.raises(DiedMidway):
            await conn.read()


@pytest.mark.parametrize(
    "parts",
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n",),
        (b"\x15\x03\x01\x00\x02\x02\x28",),
        (b"HTTP/1.1 99999 X\r\n\r\n",),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",),
        (STREAM + b"zz\r\nhello\r\n",),
        (STREAM + chunk(b"he") + b"3\r\nlloXX",),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\nhello",),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 70_000,),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 30_000 + b"content-length: 0\r\n\r\n",),
        (b"HTTP/1.1 102 Processing\r\n\r\n" * 9,),
        (b"HTTP/1.1 102 Processing\r\n\r\n",) * 9,
        (STREAM + chunk(b"x") + b"0\r\n" + b"t: railer\r\n" * 10_000,),
    ],
    ids=["ssh", "tls", "status", "upgrade", "size", "chunk", "lengths", "negative", "long", "many", "1xx",
         "1xxs", "trailers"],
)  # fmt: skip
async def test_what_is_not_http_or_without_bounds_is_a_bad_response(
    talking: Talking, parts: tuple[bytes, ...]
) -> None:
    async with talking(says(*parts)) as (pool, _):
        with pytest.raises(BadResponse):
            await ask(pool)
        await eventually(lambda: repr(pool).endswith("idle=0>"))


# --- waiting


async def test_an_answer_that_is_given_up_fails_the_one_who_waits(talking: Talking) -> None:
    async with talking(says()) as (pool, server):
        conn = await pool.acquire()
        conn.request(REQUEST)
        waiting = asyncio.ensure_future(conn.head())
        await eventually(lambda: server.peers)
        conn.fail(UpstreamTimeout("silent for too long"))
        with pytest.raises(UpstreamTimeout, match="silent"):
            await waiting
        await eventually(lambda: server.peers[0].gone.is_set())
        conn.release()


async def test_a_sink_hears_of_bytes_and_of_the_end(talking: Talking) -> None:
    async with talking(says(STREAM)) as (pool, server):
        conn = await pool.acquire()
        await head(conn)
        heard: list[bytes] = []
        conn.sink = lambda c: heard.append(c.take())
        await server.peers[0].send(chunk(b"x") + LAST)
        await eventually(lambda: conn.exhausted)
        assert b"".join(heard) == b"x"
        conn.release()


async def test_a_slow_reader_pauses_the_replica_and_gets_all_of_it(talking: Talking) -> None:
    size, count, sent = 64 * 1024, 160, 0

    async def flood(peer: Peer) -> None:
        nonlocal sent
        await peer.send(STREAM)
        for i in range(count):
            await peer.send(chunk(bytes([i % 256]) * size))
            sent += size
        await peer.send(LAST)

    async with talking(flood) as (pool, _):
        conn = await pool.acquire()
        await head(conn)
        await eventually(lambda: unread(conn) > upstream.HIGH_WATER)
        for _ in range(200):
            await asyncio.sleep(0)
        held, stopped = unread(conn), sent
        assert held <= upstream.HIGH_WATER + 256 * 1024  # one read of the event loop
        assert stopped < size * count
        for _ in range(200):
            await asyncio.sleep(0)
        assert (unread(conn), sent) == (held, stopped)
        data = await body(conn)
        assert data == b"".join(bytes([i % 256]) * size for i in range(count))
        conn.release()
        assert repr(pool).endswith("idle=1>")
