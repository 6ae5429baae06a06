"""A body that takes seconds to parse holds up nobody: a process beside the worker does, and says the same."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import pytest

from gateway import bodies, largebodies, openai
from gateway.errors import BadRequest

from .conftest import Rig, chat
from .scripted import ANSWER, Peer, Scripted

CHAT = openai.ENDPOINTS[b"/v1/chat/completions"]
PATH = CHAT.path
MOST_DELAY = 0.2  # s
Rigs = Callable[..., Awaitable[Rig]]


def many_values(size: int) -> bytes:
    """A valid chat of so many bytes that consists of empty lists, the slowest there is."""
    head, tail = b'{"messages":[{"role":"user","content":"hi"}],"x":[', b"[]]}"
    return head + b"[]," * ((size - len(head) - len(tail)) // 3) + tail


@pytest.mark.parametrize(
    ("raw", "large"),
    [
        (json.dumps(chat()).encode(), False),
        (json.dumps(chat("x" * 5_000_000)).encode(), False),  # an image
        (json.dumps(chat("x" * 9_000_000)).encode(), True),
        (many_values(100_000), False),
        (many_values(1_000_000), True),
    ],
)
def test_what_is_large_is_what_takes_long(raw: bytes, large: bool) -> None:
    assert largebodies.large(raw) is large


async def test_the_verdict_is_the_same() -> None:
    places = asyncio.Semaphore(1)
    for body in (chat(stream=True), chat(n=2), {**chat(), "model": None}):
        raw = json.dumps(body).encode()
        assert await largebodies.read(raw, CHAT, places) == bodies.facts(raw, CHAT)
    for raw in (b"{", b"[]", json.dumps(chat(stream="yes")).encode(), b'{"messages":[{}]}', b"\xff"):
        with pytest.raises(BadRequest) as here:
            bodies.facts(raw, CHAT)
        with pytest.raises(BadRequest) as there:
            await largebodies.read(raw, CHAT, places)
        for name in ("message", "status", "code", "param"):
            assert getattr(there.value, name) == getattr(here.value, name)


async def test_while_32_mib_are_parsed_the_others_are_served(rig: Rig) -> None:
    raw = many_values(32 * 1024 * 1024)

    async def answer(peer: Peer) -> None:
        await peer.send(ANSWER)

    async with Scripted(answer) as replica:
        rig.publish(replica.url)
        await rig.client.post(PATH, json=chat())
        sent = asyncio.create_task(rig.raw(raw))
        got = await sent
        reading = asyncio.create_task(got.until(b"choices", seconds=60))
        delays = []
        while not reading.done():
            began = time.monotonic()
            assert (await rig.client.post(PATH, json=chat())).status_code == 200
            delays.append(time.monotonic() - began)
            await asyncio.sleep(0.01)
        await reading
        await got.close()
        large = [request for request in replica.requests if len(request.body) > 1_000_000]
        assert len(large) == 1
        assert large[0].body.endswith(raw[-1000:])
        await rig.quiet()
    delays.sort()
    p95 = delays[len(delays) * 95 // 100]
    p50, most = delays[len(delays) // 2], delays[-1]
    ms = [round(seconds * 1000) for seconds in (p50, p95, most)]
    print(f"{len(delays)} requests beside it took (p50, p95, max) {ms} ms")
    assert p95 < MOST_DELAY


async def test_a_client_that_leaves_meanwhile_ends_the_parsing(rig: Rig) -> None:
    async def answer(peer: Peer) -> None:
        await peer.send(ANSWER)

    async with Scripted(answer) as replica:
        rig.publish(replica.url)
        got = await rig.raw(many_values(4 * 1024 * 1024))
        await got.writer.drain()
        await asyncio.sleep(0.05)
        await got.close(reset=True)
        await rig.quiet()
        assert (await rig.client.post(PATH, json=chat())).status_code == 200
        assert len(replica.requests) == 1


async def test_a_bad_one_is_refused_as_any_other(rig: Rig) -> None:
    got = await rig.raw(many_values(1_000_000)[:-1])
    data = await got.rest()
    assert data.startswith(b"HTTP/1.1 400 ")
    assert b"is not valid JSON" in data
    await got.close()
