"""A real SGLang as a local replica of a gateway: what the gateway relies on is so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import eventually
from tests.sglang.conftest import KEY, QUEUED, SLOTS, Replica

pytestmark = pytest.mark.sglang

CHAT = "/v1/chat/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
LONG = 900  # tokens, some seconds; 8 times that fits the KV cache of 8192


def body(tokens: int = 4, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": "tiny", "messages": messages, "max_tokens": tokens, "ignore_eos": True, **more}


Posts = list[asyncio.Task[httpx.Response]]


@asynccontextmanager
async def direct(replica: Replica, count: int, tokens: int) -> AsyncIterator[Posts]:
    """`count` requests of somebody else to the engine itself; those still open at the end are aborted."""
    headers = {"authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=replica.url, headers=headers, timeout=120, limits=limits) as client:
        posts = [asyncio.create_task(client.post(CHAT, json=body(tokens))) for _ in range(count)]
        try:
            yield posts
        finally:
            await client.post("/abort_request", json={"abort_all": True})
            await asyncio.gather(*posts, return_exceptions=True)


async def until(condition: Any, seconds: float = 60) -> None:
    await asyncio.to_thread(eventually, condition, seconds)


def test_the_port_is_closed_then_says_503_then_200_while_the_first_request_is_held(
    behind_gateway: Replica,
) -> None:
    said = [status for _, status in behind_gateway.health]
    assert said == ["refused", "503", "200"], behind_gateway.health
    assert behind_gateway.first_answer is not None
    assert behind_gateway.first_answer.json()["usage"]["completion_tokens"] == 3
    (entry,) = [e for e in behind_gateway.gateway.access() if e["held_s"] and e["held_s"] > 5]
    assert entry["attempts"] == 1


def test_what_was_read_from_the_log_and_from_v1_loads(behind_gateway: Replica) -> None:
    (replica,) = behind_gateway.gateway.ready()
    eventually(lambda: behind_gateway.gateway.ready()[0]["window"] == SLOTS)
    assert "fired up and ready to roll" in behind_gateway.log()
    assert replica["state"] == "ready"


async def test_a_stream_and_a_whole_answer_say_the_same_and_count_the_same(behind_gateway: Replica) -> None:
    gateway = behind_gateway.gateway
    async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="x", max_retries=0) as client:
        given: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        whole = await client.chat.completions.create(**given)
        text, usage, finish = "", None, None
        stream = await client.chat.completions.create(
            **given, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
    assert (text, finish) == (whole.choices[0].message.content, "stop")
    assert text.startswith("A tiny model with random weights")
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.total_tokens == whole.usage.total_tokens


async def test_24_clients_on_8_slots_are_all_served_and_16_wait_in_the_gateway(
    behind_gateway: Replica,
) -> None:
    gateway = behind_gateway.gateway
    await until(lambda: gateway.ready()[0]["window"] == SLOTS)
    running: list[int] = []
    waiting: list[int] = []
    async with httpx.AsyncClient(base_url=gateway.url, timeout=120) as client:
        posts = [asyncio.create_task(client.post(CHAT, json=body(120))) for _ in range(24)]
        while not all(post.done() for post in posts):
            loads = await asyncio.to_thread(behind_gateway.loads)
            running.append(loads["num_running_reqs"] + loads["num_waiting_reqs"])
            waiting.append((await asyncio.to_thread(gateway.service))["demand"]["waiting"])
        answers = [await post for post in posts]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {120}
    assert max(running) == SLOTS
    assert max(waiting) == 24 - SLOTS


async def test_the_queue_that_others_make_is_seen_by_the_gateway(behind_gateway: Replica) -> None:
    gateway = behind_gateway.gateway
    async with direct(behind_gateway, 24, LONG):
        await until(lambda: behind_gateway.loads()["num_waiting_reqs"] == 24 - SLOTS)
        await until(lambda: gateway.replicas()[0]["queue_depth"] == 24)
    await until(lambda: gateway.replicas()[0]["queue_depth"] == 0)


async def test_a_full_queue_is_503_for_a_whole_answer_and_for_a_stream(behind_gateway: Replica) -> None:
    url = behind_gateway.gateway.url + CHAT
    async with direct(behind_gateway, SLOTS, LONG):
        await until(lambda: behind_gateway.loads()["num_running_reqs"] == SLOTS)
        async with direct(behind_gateway, QUEUED + 1, LONG) as more, httpx.AsyncClient(timeout=60) as client:
            refused, _ = await asyncio.wait(more, return_when=asyncio.FIRST_COMPLETED)
            assert [task.result().status_code for task in refused] == [503]
            for stream in (False, True):
                answer = await client.post(url, json=body(stream=stream))
                assert answer.status_code == 503, answer.text
                assert answer.json()["error"]["code"] == "replica_queue_full", answer.text
                assert answer.headers["content-type"] == "application/json"


async def test_a_client_that_leaves_in_mid_stream_frees_its_slot(behind_gateway: Replica) -> None:
    before = behind_gateway.aborted()
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", behind_gateway.gateway.url + CHAT, json=body(2 * LONG, stream=True)) as answer,
    ):
        async for line in answer.aiter_lines():
            if '"content":"' in line and '"content":""' not in line:
                break
    await until(lambda: behind_gateway.aborted() == before + 1)
    await until(lambda: behind_gateway.loads()["num_running_reqs"] == 0)


async def test_a_client_that_leaves_before_its_answer_is_aborted_by_rid(behind_gateway: Replica) -> None:
    before, asked = behind_gateway.aborted(), behind_gateway.log().count("POST /abort_request")
    async with httpx.AsyncClient(timeout=60) as client:
        post = asyncio.create_task(client.post(behind_gateway.gateway.url + CHAT, json=body(2 * LONG)))
        await until(lambda: behind_gateway.loads()["num_running_reqs"] == 1)
        post.cancel()
        await asyncio.wait([post])
    await until(lambda: behind_gateway.aborted() == before + 1)
    assert behind_gateway.log().count("POST /abort_request") == asked + 1
    assert behind_gateway.gateway.access()[-1]["end"] == "client_gone"


async def test_a_stream_that_is_aborted_by_its_rid_ends_properly(behind_gateway: Replica) -> None:
    lines: list[str] = []
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", behind_gateway.gateway.url + CHAT, json=body(2 * LONG, stream=True)) as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and not lines:
                rid = json.loads(line.removeprefix("data: "))["id"]
                done = await asyncio.to_thread(behind_gateway.post, "/abort_request", rid=rid)
                assert done.status_code == 200
            lines += [line] if line else []
    assert len(rid) == 32
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 100_000}, "maximum context length of 2048 tokens"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'role' must be one of"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "Model only supports text input"),
        ({"response_format": {"type": "json_object"}}, "--grammar-backend none"),
    ],
)
def test_its_errors_are_wrapped_as_openais_and_tell_nothing_of_its_files(
    wrong: dict[str, Any], message: str, stream: bool, behind_gateway: Replica
) -> None:
    answer = httpx.post(behind_gateway.gateway.url + CHAT, json=body(**wrong, stream=stream), timeout=30)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert "site-packages" not in answer.text
    assert ".py" not in answer.text
    assert behind_gateway.gateway.access()[-1]["attempts"] == 1, "it was the engine that refused"
