"""Whatever clients and replicas do, in whichever order: each request ends once, and nothing is left of it.

What they do is drawn from a seed. The moments are the machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import pytest

from .conftest import RawAnswer, Rig, chat, eventually
from .scripted import ANSWER, DONE, LAST, STREAM, Peer, Scripted, chunk, event, whole
from .test_fast_path import PATH, connect, post

Rigs = Callable[..., Awaitable[Rig]]
CONNECTIONS, AT_ONCE = 150, 25
GET = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n"
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: t\r\n".encode()
BUSY = b'{"error":{"message":"The request queue is full.","code":503}}'


def any_request(rng: random.Random) -> bytes:
    """Mostly good ones, and some of all that may come behind them."""
    stream = rng.random() < 0.5
    good = post(chat("x" * rng.choice((1, 10, 5000)), stream=stream))
    return rng.choice(
        (
            good, good, good, good, good, good, GET,
            post(chat(stream=stream), version="1.0"),
            post(chat(stream=stream), extra="Connection: close\r\n"),
            post(chat(stream=stream), extra="Expect: 100-continue\r\n"),
            post(chat(stream=stream), extra="X-Gateway-Hold: reject\r\n"),
            post(chat(stream=stream), extra="X-Stainless-Read-Timeout: 0.1\r\n"),
            post({}), post(chat(n=0)), post(chat(junk=["x" * 30_000])),
            good[: rng.randrange(1, len(good))],
            HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + good,
            HEAD + b"Content-Length: 2\r\nContent-Type: text/plain\r\n\r\n{}",
            HEAD + b"Content-Type:application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            HEAD + b"Content-Length: 5\r\n" + b"X-Much: %b\r\n" % (b"x" * 4000) * 20 + b"\r\nhello",
            b"\0\0\r\n\r\n",
        )
    )  # fmt: skip


def any_answer(rng: random.Random) -> Callable[[Peer], Awaitable[None]]:
    async def answer(peer: Peer) -> None:
        stream = bool(peer.request.json.get("stream"))
        await asyncio.sleep(rng.choice((0, 0, 0.001, 0.02, 0.15)))
        data = STREAM + chunk(event("a" * rng.choice((1, 300_000)))) + chunk(event("b")) + chunk(DONE) + LAST
        data = data if stream else ANSWER
        match rng.randrange(10):
            case 0:
                peer.reset()
            case 1:
                peer.close()
            case 2:
                await peer.send(data[: rng.randrange(len(data))])
                peer.writer.transport.abort()
            case 3:
                await peer.send(whole(BUSY, status=503))
            case 4 if stream:
                await peer.send(STREAM + chunk(b"data: %b\n\n" % BUSY) + chunk(DONE) + LAST)
            case 5:
                await peer.send(data)
                peer.close()  # the next request meets a stale connection
            case 6:
                await peer.send(data + b"HTTP/1.1 200 OK\r\n")
            case _:
                step = rng.choice((len(data), 400, 70_000))
                for at in range(0, len(data), max(step, len(data) // 20)):
                    await peer.send(data[at : at + max(step, len(data) // 20)])
                    await asyncio.sleep(0)

    return answer


async def any_client(rig: Rig, rng: random.Random) -> None:
    got: RawAnswer = await connect(rig)
    data = b"".join(any_request(rng) for _ in range(rng.choice((1, 1, 2, 3, 6))))
    with contextlib.suppress(ConnectionError):
        while data:
            at = rng.choice((len(data), rng.randrange(1, len(data) + 1)))
            got.writer.write(data[:at])
            await got.writer.drain()
            data = data[at:]
            await asyncio.sleep(rng.choice((0, 0, 0.005)))
        with contextlib.suppress(TimeoutError):
            match rng.randrange(5):
                case 0:
                    await asyncio.sleep(rng.choice((0, 0.001, 0.03)))
                case 1:
                    await asyncio.sleep(0.2)  # nothing is read
                case _:
                    await got.rest(rng.choice((0.05, 0.5)))
    with contextlib.suppress(OSError):  # closed already
        await got.close(reset=rng.random() < 0.5)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_each_request_ends_once_and_leaves_nothing(
    rigs: Rigs, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    rig = await rigs(commit_after=0.05, beat_every=0.1, beat_after=0.1, write_timeout=0.3, max_body=20_000)
    async with Scripted(any_answer(rng)) as one, Scripted(any_answer(rng)) as other:
        rig.publish(one.url, other.url, window=20)
        await rig.acked()
        places = asyncio.Semaphore(AT_ONCE)

        async def client() -> None:
            async with places:
                await any_client(rig, rng)

        clients = [asyncio.create_task(client()) for _ in range(CONNECTIONS)]
        while not all(task.done() for task in clients):
            await asyncio.sleep(rng.choice((0.02, 0.1)))
            urls = rng.choice(([one.url, other.url],) * 4 + ([one.url], []))
            rig.publish(*urls, window=rng.choice((1, 20)))
            if rng.random() < 0.3:
                rig.worker.reload(rig.settings)
        await asyncio.gather(*clients)
        rig.publish(one.url, other.url, window=20)
        await rig.quiet()
        state = rig.servers[0].server_state
        await eventually(lambda: not state.connections and not state.tasks)
        assert rig.board.totals(0).arrived > CONNECTIONS / 2
        assert len(one.requests) + len(other.requests) > CONNECTIONS / 4
        await eventually(lambda: not rig.worker.young)
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == []
