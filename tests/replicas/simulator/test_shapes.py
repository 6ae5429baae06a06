"""Bodies and events look like a real SGLang 0.5.23's: same keys, same order, same framing."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from replicas.simulator import SimConfig, Simulator

TINY = SimConfig(
    model_path="tiny", reply="ab cd ef gh ij kl mn op qr st uv wx yz ab cd ef", context_length=2048
)
LITERAL = ("object", "finish_reason", "role", "logprobs", "index", "matched_stop")


def skeleton(value: Any, key: str = "") -> Any:
    """Keys and their order kept; what depends on the model or the moment replaced by its type."""
    if isinstance(value, dict):
        return {name: skeleton(member, name) for name, member in value.items()}
    if isinstance(value, list):
        return [skeleton(member) for member in value]
    return value if key in LITERAL or value is None else type(value).__name__


def skeletons(events: list[Any]) -> list[str]:
    """One text per event; equal neighbours once."""
    found: list[str] = []
    for event in events:
        text = json.dumps(skeleton(event))
        if not found or found[-1] != text:
            found.append(text)
    return found


@pytest.mark.parametrize(
    ("recording", "more"),
    [
        ("stream-usage.raw", {"stream_options": {"include_usage": True}}),
        (
            "stream-usage-continuous.raw",
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        ),
    ],
)
async def test_a_chat_stream_has_the_recorded_events(recording, more, chat, recorded):
    real = recorded(recording)
    async with Simulator(TINY) as sim:
        ours = await chat(sim.port, max_tokens=16, stream=True, **more)
    assert ours.header_names == real.header_names
    assert skeletons(ours.events) == skeletons(real.events)


async def test_each_event_is_one_http_chunk_and_the_stream_ends_with_done_and_the_last_chunk(chat):
    async with Simulator(TINY) as sim:
        ours = await chat(sim.port, max_tokens=5, stream=True)
    assert all(chunk.startswith(b"data: ") and chunk.count(b"\n\n") == 1 for chunk in ours.chunks[:-1])
    assert ours.raw.endswith(b"\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    assert len(ours.events) == 1 + 5 + 1 + 1  # role, five tokens, the reason, [DONE]


async def test_events_are_written_without_spaces_as_recorded(chat, recorded):
    async with Simulator(TINY) as sim:
        ours = await chat(sim.port, max_tokens=2, stream=True)
    for response in (ours, recorded("stream-usage.raw")):
        for chunk, event in zip(response.chunks, response.events, strict=False):
            if isinstance(event, dict):
                compact = json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()
                assert chunk == b"data: " + compact + b"\n\n"


@pytest.mark.parametrize(
    ("recording", "more"),
    [("chat-nonstream-rid.http", {"rid": "my-own-rid-1"}), ("chat-nonstream-n2.http", {"n": 2})],
)
async def test_a_chat_completion_has_the_recorded_body(recording, more, chat, recorded):
    real = recorded(recording)
    async with Simulator(TINY) as sim:
        ours = await chat(sim.port, max_tokens=16, **more)
    assert ours.header_names == real.header_names
    assert json.dumps(skeleton(ours.json)) == json.dumps(skeleton(real.json))
    assert ours.json["usage"]["completion_tokens"] == real.json["usage"]["completion_tokens"]


async def test_the_rid_becomes_the_id(chat):
    async with Simulator(TINY) as sim:
        whole = await chat(sim.port, max_tokens=2, rid="mine")
        streamed = await chat(sim.port, max_tokens=2, rid="mine", stream=True)
    assert whole.json["id"] == "mine"
    assert {event["id"] for event in streamed.events[:-1]} == {"mine"}


async def test_two_choices_are_interleaved_and_each_has_its_own_id(chat, recorded):
    real = recorded("stream-n2.raw")
    more = {"stream_options": {"include_usage": True}, "n": 2, "stream": True, "max_tokens": 4}
    async with Simulator(TINY) as sim:
        ours = await chat(sim.port, **more)
    events = [event for event in ours.events if isinstance(event, dict)]
    ids = {event["choices"][0]["index"]: event["id"] for event in events if event["choices"]}
    assert len(set(ids.values())) == 2
    assert set(skeletons(ours.events)) == set(skeletons(real.events))
    assert [event["choices"][0]["index"] for event in events[:4]] == [0, 0, 1, 1]
    assert events[-1]["usage"]["completion_tokens"] == 8
    assert events[-1]["usage"]["prompt_tokens"] == events[-1]["usage"]["total_tokens"] - 8


async def test_thinking_comes_as_reasoning_content_with_a_reasoning_parser(chat, recorded):
    reply = "one two\n</think>\n\nthree four"
    config = SimConfig(model_path="tiny", reply=reply, reasoning_parser="deepseek-r1")
    async with Simulator(config) as sim:
        streamed = await chat(sim.port, stream=True, stream_options={"include_usage": True})
        whole = await chat(sim.port)
        together = await chat(sim.port, separate_reasoning=False)
    deltas = [event["choices"][0]["delta"] for event in streamed.events[1:-3]]
    assert "".join(delta["reasoning_content"] or "" for delta in deltas) == "one two\n"
    assert "".join(delta.get("content", "") for delta in deltas) == "three four"
    thinking = [event for event in streamed.events[1:-3] if event["choices"][0]["delta"]["reasoning_content"]]
    assert skeletons(thinking) == skeletons(recorded("reasoning-stream.raw").events[1:3])
    assert skeletons(streamed.events[-2:]) == skeletons(recorded("reasoning-stream.raw").events[-2:])
    message = whole.json["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("one two\n", "three four")
    used = whole.json["usage"]
    assert used["completion_tokens_details"] == {"reasoning_tokens": used["reasoning_tokens"]}
    assert together.json["choices"][0]["message"]["content"] == "one two\n</think>\n\nthree four"
    assert together.json["choices"][0]["message"]["reasoning_content"] is None


async def test_text_completions_have_the_recorded_events_and_body(get, recorded):
    request = {"model": "tiny", "prompt": "hello", "max_tokens": 8}
    async with Simulator(TINY) as sim:
        streamed = await get(sim.port, "POST", "/v1/completions", {**request, "stream": True})
        whole = await get(sim.port, "POST", "/v1/completions", request)
    assert skeletons(streamed.events) == skeletons(recorded("completions-stream.raw").events)
    real = recorded("completions-nonstream.http")
    assert json.dumps(skeleton(whole.json)) == json.dumps(skeleton(real.json))


async def test_native_generate_streams_the_text_so_far(get, recorded):
    request = {"text": "hello", "sampling_params": {"max_new_tokens": 4}, "stream": True}
    async with Simulator(TINY) as sim:
        ours = await get(sim.port, "POST", "/generate", request)
    texts = [event["text"] for event in ours.events[:-1]]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    real = recorded("generate-stream.raw").events[-2]
    last = ours.events[-2]
    assert list(last) == list(real)
    assert last["meta_info"]["finish_reason"] == real["meta_info"]["finish_reason"]
    assert set(last["meta_info"]) <= set(real["meta_info"])


@pytest.mark.parametrize(
    ("method", "path", "recording"),
    [
        ("GET", "/v1/loads", "get-v1_loads.http"),
        ("GET", "/v1/loads?include=core", "get-v1_loads_core.http"),
        ("GET", "/v1/models", "get-v1_models.http"),
        ("GET", "/v1/models/tiny", "get-v1_models_one.http"),
        ("GET", "/v1/models/nope", "get-v1_models_unknown.http"),
        ("GET", "/", "get-root.http"),
        ("GET", "/nope", "get-not_found.http"),
        ("GET", "/v1/chat/completions", "get-chat-405.http"),
    ],
)
async def test_other_endpoints_answer_as_recorded(method, path, recording, get, recorded):
    real = recorded(recording)
    async with Simulator(TINY) as sim:
        ours = await get(sim.port, method, path)
    assert (ours.status, ours.header_names) == (real.status, real.header_names)
    assert json.dumps(skeleton(ours.json)) == json.dumps(skeleton(real.json))


async def test_answers_without_a_body_have_no_content_type(get, recorded):
    async with Simulator(SimConfig(health_seconds=0.0)) as sim:
        health = await get(sim.port, "GET", "/health")
        flush = await get(sim.port, "POST", "/flush_cache")
        abort = await get(sim.port, "POST", "/abort_request", {"rid": "no-such"})
    assert (health.status, health.header_names) == (200, recorded("get-health.http").header_names)
    assert (flush.header_names, flush.rest) == (
        recorded("flush_cache.http").header_names,
        recorded("flush_cache.http").rest,
    )
    assert (abort.status, abort.header_names) == (200, recorded("abort_request.http").header_names)
