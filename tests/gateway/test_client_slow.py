"""A client that does not read: its replica is paused, its memory bounded, and in the end it is cut."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from .conftest import RawAnswer, Rig, chat, eventually
from .scripted import DONE, LAST, STREAM, Peer, Scripted, chunk, event, sample, whole

PATH = "/v1/chat/completions"
Rigs = Callable[..., Awaitable[Rig]]
PIECE = event("x" * 60_000)
TOTAL = 40 * 1024 * 1024  # far over what the kernel's buffers of four sockets hold


class Flood:
    """A replica that streams TOTAL bytes as fast as they are taken."""

    def __init__(self) -> None:
        self.sent = 0

    async def __call__(self, peer: Peer) -> None:
        await peer.send(STREAM)
        while self.sent < TOTAL and not peer.gone.is_set():
            await peer.send(chunk(PIECE))
            self.sent += len(PIECE)
        await peer.send(chunk(DONE) + LAST)


async def deaf(rig: Rig, **more: object) -> RawAnswer:
    """A client that sends a request and reads nothing: a small window, and a reader that is paused."""
    got = await rig.raw(chat(**more))
    got.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    got.writer.transport.pause_reading()  # type: ignore[attr-defined]
    return got


async def rest(got: RawAnswer) -> bytes:
    """Read on, all of it; faster than `got.rest()` for megabytes."""
    got.writer.transport.resume_reading()  # type: ignore[attr-defined]
    parts = [got.data]
    async with asyncio.timeout(20):
        while more := await got.reader.read(1 << 20):
            parts.append(more)
    return b"".join(parts)


async def stalled(count: Callable[[], int]) -> int:
    """The value of `count` once it no longer grows."""
    last, same = -1, 0
    async with asyncio.timeout(10):
        while same < 20:
            await asyncio.sleep(0.005)
            last, same = (count(), 0) if count() != last else (last, same + 1)
    return last


async def test_its_replica_is_paused_so_that_a_stream_holds_a_bounded_number_of_bytes(rig: Rig) -> None:
    flood = Flood()
    async with Scripted(flood) as replica:
        rig.publish(replica.url)
        got = await deaf(rig, stream=True)
        assert 0 < await stalled(lambda: flood.sent) < TOTAL * 0.75
        data = await rest(got)
        assert data.count(b'"content": "xxx') == flood.sent // len(PIECE)
        assert data.endswith(LAST)
        assert flood.sent >= TOTAL
        await got.close()
        await rig.quiet()


@pytest.mark.parametrize("mode", ["beats", "silent"])
async def test_after_the_write_timeout_it_is_cut_and_its_place_at_the_replica_is_free(
    rigs: Rigs, mode: str
) -> None:
    rig = await rigs(write_timeout=0.3, hold=mode)
    ended = sample("gateway_requests_total", endpoint=PATH, code="200", end="client_slow")
    flood = Flood()
    async with Scripted(flood) as replica:
        rig.publish(replica.url)
        got = await deaf(rig, stream=True)
        await eventually(lambda: replica.peers and replica.peers[0].gone.is_set())
        await rig.quiet()
        now = sample("gateway_requests_total", endpoint=PATH, code="200", end="client_slow")
        assert now == ended + 1
        assert not rig.servers[0].server_state.connections  # it does not linger with its unsent bytes
        await got.close()


async def test_a_client_that_does_not_read_the_end_is_cut_too(rigs: Rigs) -> None:
    """The whole answer is here, the last write waits for the client."""
    rig = await rigs(write_timeout=0.3)
    ended = sample("gateway_requests_total", endpoint=PATH, code="200", end="client_slow")

    async def large(peer: Peer) -> None:
        await peer.send(whole(b'"' + b"x" * 30_000_000 + b'"'))

    async with Scripted(large) as replica:
        rig.publish(replica.url)
        got = await deaf(rig)
        await eventually(lambda: rig.board.totals(0).arrived == 1)
        await rig.quiet()
        now = sample("gateway_requests_total", endpoint=PATH, code="200", end="client_slow")
        assert now == ended + 1
        await got.close()


async def test_a_client_that_reads_slowly_but_reads_is_not_cut(rigs: Rigs) -> None:
    rig = await rigs(write_timeout=0.5, upstream_timeout=0.5)
    pieces = 8

    async def sends(peer: Peer) -> None:
        await peer.send(STREAM)
        for _ in range(pieces * 20):
            await peer.send(chunk(PIECE))
        await peer.send(chunk(DONE) + LAST)

    async with Scripted(sends) as replica:
        rig.publish(replica.url)
        got = await deaf(rig, stream=True)
        for _ in range(pieces):
            await asyncio.sleep(0.1)
            got.writer.transport.resume_reading()  # type: ignore[attr-defined]
            async with asyncio.timeout(5):
                for _ in range(8):
                    got.data += await got.reader.read(65536)
            got.writer.transport.pause_reading()  # type: ignore[attr-defined]
        data = await rest(got)
        assert data.endswith(LAST)
        assert data.count(b'"content": "xxx') == pieces * 20
        await got.close()
