"""The bytes that keep a waiting client, exactly as they leave the socket."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable

import pytest

from gateway import reply
from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually
from .http1 import read_answer
from .scripted import DONE, LAST, STREAM, Peer, Scripted, chunk, whole

Rigs = Callable[..., Awaitable[Rig]]
PATIENT = "x-stainless-read-timeout: 600"
COMMENTS = re.compile(rb"(?:: [^\r\n]+\n)+")


@pytest.fixture
async def quick(rigs: Rigs) -> Rig:
    """Commits at once and beats ten times a second."""
    return await rigs(commit_after=0.05, beat_every=0.1, beat_after=0.1)


async def beats(rig: Rig, body: dict[str, object], path: str, count: int, marker: bytes) -> bytes:
    """What a held request got in the time of `count` beats; it never got a replica."""
    answer = await rig.raw(body, path=path, headers=[PATIENT])
    async with asyncio.timeout(10):
        while answer.data.count(marker) < count:
            answer.data += await answer.reader.read(65536)
    await answer.close()
    await rig.quiet()
    return read_answer(answer.data).body


async def test_the_head_of_a_commit_keeps_proxies_from_holding_beats_back(quick: Rig) -> None:
    quick.progress("load", 0.62, 410.2)
    await eventually(lambda: quick.worker.services["r1"].cold)
    held = await quick.raw(chat(stream=True), headers=[PATIENT, "X-Request-Id: mine"])
    await held.until(b"\r\n\r\n")
    got = read_answer(held.data)
    assert got.status == 200
    assert got.headers == {
        "content-type": "text/event-stream; charset=utf-8",
        "x-accel-buffering": "no",
        "cache-control": "no-cache, no-transform",
        "x-request-id": "mine",
        "x-gateway-state": "cold-start",
        "x-gateway-eta-seconds": "410",
        "connection": "close",
        "transfer-encoding": "chunked",
    }
    await held.close()


async def test_a_held_stream_gets_single_newline_comments_and_nothing_else_before_the_replica(
    quick: Rig,
) -> None:
    held = await quick.raw(chat(stream=True, max_tokens=4), headers=[PATIENT])
    await held.until(b"phase=pending")
    quick.progress("load", 0.62, 410.2)
    await held.until(b": cold-start phase=load progress=62% eta=410s\n")
    quick.progress("provision", plan="2/3", attempt=14)
    await held.until(b": cold-start phase=provision plan=2/3 attempt=14 eta=unknown\n")
    quick.progress("warmup")
    await held.until(b": cold-start phase=warmup eta=unknown\n")
    async with Simulator(SimConfig()) as sim:
        quick.publish(sim.url)
        got = read_answer(await held.rest())
        await held.close()
        await quick.quiet()
    assert got.complete
    before, data, after = got.body.partition(b"data: ")
    assert COMMENTS.fullmatch(before)
    assert before.count(b"\n") >= 3
    assert b"\n\n" not in before
    assert not re.search(rb"^(id|retry|event):", got.body, re.MULTILINE)
    events = (data + after).split(b"\n\n")
    assert all(event.startswith(b"data: {") for event in events[:-2])
    assert events[-2:] == [b"data: [DONE]", b""]


@pytest.mark.parametrize(
    ("path", "body", "kind", "choice"),
    [
        ("/v1/chat/completions", chat(stream=True), "chat.completion.chunk", {"delta": {}}),
        (
            "/v1/completions",
            {"prompt": "a", "stream": True, "max_tokens": 2},
            "text_completion",
            {"text": "", "logprobs": None},
        ),
    ],
)
async def test_an_empty_chunk_comes_for_clients_that_count_parsed_chunks(
    quick: Rig, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, object], kind: str,
    choice: dict[str, object],
) -> None:  # fmt: skip
    assert reply.CHUNK_SECONDS == 55, "LangChain gives up after 120 s without one"
    monkeypatch.setattr(reply, "CHUNK_SECONDS", 0.25)
    held = await quick.raw(body, path=path, headers=[PATIENT])
    async with asyncio.timeout(10):
        while held.data.count(b"data: ") < 2:
            held.data += await held.reader.read(65536)
    async with Simulator(SimConfig()) as sim:
        quick.publish(sim.url)
        got = read_answer(await held.rest())
        await held.close()
        await quick.quiet()
    assert got.complete
    chunks = [json.loads(line[6:]) for line in got.body.split(b"\n") if line.startswith(b"data: {")]
    ours, first = chunks[0], chunks[-1]
    assert ours["object"] == first["object"] == kind
    assert ours["id"] == first["id"], "one answer has one id"
    assert ours["choices"] == [{"index": 0, **choice, "finish_reason": None}]
    assert chunks[1] == {**ours, "created": chunks[1]["created"]}
    comments_between = got.body.split(b"data: ")[1].count(b": cold-start")
    assert comments_between >= 1, "it does not replace the comments"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "stream": True}),
        ("/v1/responses", {"input": "a", "stream": True}),
    ],
)
async def test_generate_and_responses_get_comments_only(
    quick: Rig, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, object]
) -> None:
    monkeypatch.setattr(reply, "CHUNK_SECONDS", 0.0)
    got = await beats(quick, body, path, 4, b": cold-start")
    assert COMMENTS.fullmatch(got)


async def test_messages_get_anthropics_own_ping(quick: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "CHUNK_SECONDS", 0.0)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "stream": True}
    got = await beats(quick, body, "/v1/messages", 3, b"ping\n")
    assert re.fullmatch(rb'(?:event: ping\ndata: \{"type": "ping"\}\n\n)+', got)


async def test_a_held_json_answer_begins_with_spaces_and_then_is_the_replicas_body(quick: Rig) -> None:
    held = await quick.raw(chat(max_tokens=3), headers=[PATIENT])
    async with asyncio.timeout(10):
        while held.data.count(b"1\r\n \r\n") < 3:
            held.data += await held.reader.read(65536)
    body = b'{"id":"x",  "choices":[{"index":0}]}'

    async def script(peer: Peer) -> None:
        await peer.send(whole(body))

    async with Scripted(script) as replica:
        quick.publish(replica.url)
        got = read_answer(await held.rest())
        await held.close()
    assert got.complete
    assert got.headers["content-type"] == "application/json"
    assert "content-length" not in got.headers
    assert set(got.chunks[:3]) == {b" "}
    assert got.body.lstrip(b" ") == body


async def test_the_commit_comes_after_a_third_of_the_clients_patience_and_not_before(rigs: Rigs) -> None:
    rig = await rigs(commit_after=600.0, beat_every=600.0)
    loop = asyncio.get_running_loop()
    began = loop.time()
    held = await rig.raw(chat(stream=True), headers=["x-stainless-read-timeout: 0.9"])
    await held.until(b"HTTP/1.1 200")
    assert loop.time() - began >= 0.3
    async with asyncio.timeout(10):
        while held.data.count(b"\n: cold-start") < 4:  # the commit, a first pause of any length, and two more
            held.data += await held.reader.read(65536)
    assert loop.time() - began >= 0.9, "beats are a third of the patience apart, not one after the other"
    await held.close()


async def test_before_the_commit_a_failure_has_its_honest_status(rigs: Rigs) -> None:
    rig = await rigs(commit_after=600.0)
    held = await rig.raw(chat(stream=True), headers=[PATIENT])
    await rig.waiting(1)
    rig.publish(status="blocked", message="No H100 in any zone.", retry_after=30)
    got = read_answer(await held.rest())
    await held.close()
    assert got.status == 503
    assert json.loads(got.body)["error"]["message"] == "No H100 in any zone."


# --- a replica's own silence


async def test_a_slow_json_answer_is_kept_alive_like_a_hold(quick: Rig) -> None:
    go = asyncio.Event()
    async def script(peer: Peer) -> None:
        await go.wait()
        await peer.send(whole(b'{"a": 1}'))

    async with Scripted(script) as replica:
        quick.publish(replica.url)
        await quick.acked()
        answer = await quick.raw(chat(), headers=[PATIENT])
        async with asyncio.timeout(10):
            while answer.data.count(b"1\r\n \r\n") < 3:
                answer.data += await answer.reader.read(65536)
        go.set()
        got = read_answer(await answer.rest())
        await answer.close()
    assert (got.status, got.complete, got.body.lstrip(b" ")) == (200, True, b'{"a": 1}')
    assert len(replica.requests) == 1


async def test_a_slow_stream_gets_comments_before_its_first_event(quick: Rig) -> None:
    go = asyncio.Event()
    async def script(peer: Peer) -> None:
        await go.wait()
        await peer.send(STREAM + chunk(b'data: {"n":1}\n\n') + chunk(DONE) + LAST)

    async with Scripted(script) as replica:
        quick.publish(replica.url)
        await quick.acked()
        answer = await quick.raw(chat(stream=True), headers=[PATIENT])
        async with asyncio.timeout(10):
            while answer.data.count(b": waiting for the replica") < 2:
                answer.data += await answer.reader.read(65536)
        go.set()
        got = read_answer(await answer.rest())
        await answer.close()
    comments, _, events = got.body.partition(b"data: ")
    assert got.complete
    assert COMMENTS.fullmatch(comments)
    assert events == b'{"n":1}\n\ndata: [DONE]\n\n'


async def test_a_stalled_stream_gets_a_comment_only_between_two_events(quick: Rig) -> None:
    half, go = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.send(STREAM + chunk(b'data: {"n":1}\n\n'))
        await half.wait()
        await peer.send(chunk(b'data: {"n":'))
        await go.wait()
        await peer.send(chunk(b"2}\n\n") + chunk(DONE) + LAST)

    async with Scripted(script) as replica:
        quick.publish(replica.url)
        await quick.acked()
        answer = await quick.raw(chat(stream=True), headers=[PATIENT])
        await answer.until(b": waiting for the replica")
        half.set()
        async with asyncio.timeout(10):
            while answer.data.count(b'data: {"n":') < 2:
                answer.data += await answer.reader.read(65536)
        before = len(answer.data)
        with pytest.raises(TimeoutError):  # inside an event nothing of ours may come: several beats' time
            async with asyncio.timeout(0.5):
                answer.data += await answer.reader.read(65536)
        assert len(answer.data) == before
        go.set()
        got = read_answer(await answer.rest())
        await answer.close()
    assert got.complete
    assert re.sub(rb"(?m)^: [^\n]+\n", b"", got.body) == b'data: {"n":1}\n\ndata: {"n":2}\n\ndata: [DONE]\n\n'


async def test_no_beats_when_they_are_switched_off(rigs: Rigs) -> None:
    rig = await rigs(beat_after=0.0, beat_every=0.1)
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await go.wait()
        await peer.send(whole(b"{}"))

    async with Scripted(script) as replica:
        rig.publish(replica.url)
        await rig.acked()
        answer = await rig.raw(chat(), headers=["x-stainless-read-timeout: 0.9"])
        await eventually(lambda: replica.requests)
        with pytest.raises(TimeoutError):
            await answer.until(b"HTTP", seconds=0.6)
        go.set()
        got = read_answer(await answer.rest())
        await answer.close()
    assert got.body == b"{}"


async def test_requests_that_came_at_once_do_not_beat_at_once(rigs: Rigs) -> None:
    rig = await rigs(commit_after=0.0, beat_every=2.0)
    loop, times = asyncio.get_running_loop(), list[float]()

    async def second_beat() -> None:
        answer = await rig.raw(chat(stream=True), headers=[PATIENT])
        while answer.data.count(b"\n: cold-start") < 2:
            answer.data += await answer.reader.read(65536)
        times.append(loop.time())
        await answer.close()

    async with asyncio.timeout(20):
        await asyncio.gather(*(second_beat() for _ in range(20)))
    assert max(times) - min(times) >= 1.0
