"""What a list of single answers does not show: the same promises, kept by the simulator and a real SGLang."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from replicas.simulator import SimConfig, Simulator
from tests.sglang.conftest import KEY, LIKE_THE_REAL_ONE, QUEUED, SLOTS, Engine, Stage
from tests.sglang.contract import CHAT, MESSAGES, NAMES, names
from tests.wire import Response, fetch, request_bytes

LONG = 900  # tokens, some seconds; what 8 of them reserve still fits the KV cache of 8192


def body(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES, "max_tokens": tokens, "ignore_eos": True, **more}


async def call(engine: Engine, method: str, path: str, data: Any = None) -> Response:
    return await fetch(engine.port, method, path, data, authorization=f"Bearer {engine.key}")


async def chat(engine: Engine, tokens: int = 4, **more: Any) -> Response:
    return await call(engine, "POST", CHAT, body(tokens, **more))


async def loads(engine: Engine) -> dict[str, Any]:
    return dict((await call(engine, "GET", "/v1/loads?include=core")).json["loads"][0])


async def until_load(engine: Engine, running: int, waiting: int) -> None:
    """Until the engine reports so many; the limit is there to end a broken test."""
    async with asyncio.timeout(60):
        while True:
            found = await loads(engine)
            if (found["num_running_reqs"], found["num_waiting_reqs"]) == (running, waiting):
                return
            await asyncio.sleep(0.01)  # another process


@asynccontextmanager
async def busy(engine: Engine, *counts: int, **more: Any) -> AsyncIterator[list[asyncio.Task[Response]]]:
    """Long requests that run or wait; each of `counts` comes when those before have found their places."""
    await until_load(engine, 0, 0)
    posts: list[asyncio.Task[Response]] = []
    try:
        for count in counts:
            posts += [asyncio.create_task(chat(engine, LONG, **more)) for _ in range(count)]
            await until_load(engine, min(SLOTS, len(posts)), max(0, len(posts) - SLOTS))
        yield posts
    finally:
        await call(engine, "POST", "/abort_request", {"abort_all": True})
        await asyncio.gather(*posts, return_exceptions=True)


async def test_as_many_tokens_as_asked_for_and_one_prompt_counts_once(engine: Engine) -> None:
    used = (await chat(engine, 7)).json["usage"]
    twice = (await chat(engine, 7, n=2)).json["usage"]
    assert used["completion_tokens"] == 7
    assert used["total_tokens"] == used["prompt_tokens"] + 7
    assert (twice["completion_tokens"], twice["prompt_tokens"]) == (14, used["prompt_tokens"])


async def test_requests_beyond_the_slots_wait_and_the_figures_say_so(engine: Engine) -> None:
    async with busy(engine, SLOTS, 3):
        found = await loads(engine)
    assert found["max_running_requests"] == SLOTS
    assert found["num_used_tokens"] > 0
    await until_load(engine, 0, 0)


async def test_a_full_queue_is_503_or_a_first_event_and_health_stays_200(engine: Engine) -> None:
    async with busy(engine, SLOTS, QUEUED):
        whole = await chat(engine)
        stream = await chat(engine, stream=True)
        health = await call(engine, "GET", "/health")
    error = {"object": "error", "message": "The request queue is full.", "param": None, "code": 503}
    assert (whole.status, whole.json) == (503, {**error, "type": "503"})
    first, done = (chunk for chunk in stream.chunks if chunk)
    assert (stream.status, done) == (200, b"data: [DONE]\n\n")
    assert first.startswith(b'data: {"error": {"object": "error", "message": ')  # with spaces
    assert stream.events[0]["error"] == {**error, "type": "SERVICE_UNAVAILABLE"}
    assert health.status == 200


async def test_nothing_is_sent_before_the_first_token(engine: Engine) -> None:
    async with busy(engine, SLOTS):
        reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
        key = f"Bearer {engine.key}"
        writer.write(request_bytes("POST", CHAT, body(4, stream=True), authorization=key))
        await until_load(engine, SLOTS, 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.1)
        writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_aborted_by_its_rid_ends_properly(stream: bool, engine: Engine) -> None:
    async with busy(engine, 1, rid="victim-1", stream=stream) as posts:
        assert (await call(engine, "POST", "/abort_request", {"rid": "victim"})).status == 200
        await asyncio.sleep(0.2)  # another process, in which nothing is to happen
        assert not posts[0].done()  # a prefix is nobody's rid
        done = await call(engine, "POST", "/abort_request", {"rid": "victim-1"})
        victim = await posts[0]
    assert (done.status, done.rest, victim.status) == (200, b"", 200)
    if stream:
        assert victim.events[-1] == "[DONE]"
        (choice,) = victim.events[-2]["choices"]
    else:
        (choice,) = victim.json["choices"]
    assert choice["finish_reason"] == "abort"


async def test_an_abort_takes_those_with_it_whose_rid_only_begins_so(engine: Engine) -> None:
    async with busy(engine, 1, rid="a1") as first, busy_with(engine, "a12") as longer:
        await call(engine, "POST", "/abort_request", {"rid": "a1"})
        answers = [await first[0], await longer]
    assert [answer.json["choices"][0]["finish_reason"] for answer in answers] == ["abort", "abort"]


@asynccontextmanager
async def busy_with(engine: Engine, rid: str) -> AsyncIterator[asyncio.Task[Response]]:
    """One more long request."""
    post = asyncio.create_task(chat(engine, LONG, rid=rid))
    try:
        await until_load(engine, 2, 0)
        yield post
    finally:
        await asyncio.gather(post, return_exceptions=True)


async def test_a_rid_that_is_in_use_is_refused(engine: Engine) -> None:
    async with busy(engine, 1, rid="twice"):
        second = await chat(engine, rid="twice")
    assert (second.status, second.json["type"]) == (400, "BadRequestError")
    assert second.json["message"] == "Duplicate request ID detected: twice"


async def test_the_cache_is_not_flushed_while_anything_runs(engine: Engine) -> None:
    async with busy(engine, 1):
        refused = await call(engine, "POST", "/flush_cache")
    assert (refused.status, refused.rest) == (400, b"Flush cache failed.\n")


async def test_a_client_that_leaves_in_mid_stream_frees_its_slot_and_is_counted(engine: Engine) -> None:
    before = await aborted(engine)
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    key = f"Bearer {engine.key}"
    writer.write(request_bytes("POST", CHAT, body(1800, stream=True), authorization=key))
    await reader.readuntil(b'"content":""')
    writer.close()
    await until_load(engine, 0, 0)
    assert await aborted(engine) == before + 1


async def aborted(engine: Engine) -> float:
    text = (await call(engine, "GET", "/metrics")).rest.decode()
    found = re.findall(r"^sglang:num_aborted_requests_total\{.*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


@pytest.mark.sglang
async def test_the_simulators_times_are_the_measured_ones(stage: Stage) -> None:
    """Of the real one alone: the simulator's own tests show that it keeps to its settings."""
    engine, settings = stage.play("plain").engine, SimConfig()
    began = time.monotonic()
    assert (await call(engine, "GET", "/health")).status == 200
    assert time.monotonic() - began == pytest.approx(settings.health_seconds, abs=0.7)

    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    writer.write(request_bytes("GET", "/ping", close=False, authorization=f"Bearer {engine.key}"))
    await reader.readuntil(b"\r\n\r\n")
    began = time.monotonic()
    assert await reader.read() == b""
    assert time.monotonic() - began == pytest.approx(settings.keep_alive, abs=0.7)
    writer.close()

    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    began = time.monotonic()
    key = f"Bearer {engine.key}"
    writer.write(request_bytes("POST", CHAT, body(1800), authorization=key))
    await until_load(engine, 1, 0)
    writer.close()
    await until_load(engine, 0, 0)
    assert time.monotonic() - began == pytest.approx(settings.disconnect_poll, abs=1.5)


@pytest.mark.parametrize("what", ["metrics", "server_info"])
async def test_every_name_that_the_simulator_uses_is_one_of_sglangs(what: str, engine: Engine) -> None:
    if engine.real:
        theirs = (await names(engine.port, engine.key))[what]
    else:
        theirs = json.loads(NAMES.read_text())[what]
    async with Simulator(LIKE_THE_REAL_ONE) as simulator:
        ours = Engine(simulator.port, KEY, real=False)
        for stream in (False, True):
            assert (await chat(ours, stream=stream)).status == 200
        found = (await names(ours.port, KEY))[what]
    assert found
    assert {name: theirs.get(name) for name in found} == found
