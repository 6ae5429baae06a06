"""Bad requests get the very bytes that a real SGLang 0.5.23 answers."""

from __future__ import annotations

import asyncio

import pytest

from replicas.simulator import SimConfig, Simulator

TINY = SimConfig(model_path="tiny", context_length=2048)
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("recording", "body"),
    [
        ("err-bad-json.http", b'{"model": "tiny", "messages": ['),
        ("err-empty-body.http", b""),
        ("err-no-messages.http", b'{"model": "tiny"}'),
        ("err-json-array.http", b"[1,2]"),
    ],
)
async def test_a_body_that_is_no_request(recording, body, get, recorded):
    real = recorded(recording)
    async with Simulator(TINY) as sim:
        ours = await get(sim.port, "POST", "/v1/chat/completions", body, content_type="application/json")
    assert (ours.status, ours.header_names, ours.rest) == (real.status, real.header_names, real.rest)


@pytest.mark.parametrize(
    ("recording", "more"),
    [
        ("err-empty-messages.http", {"messages": []}),
        ("err-temperature.http", {"temperature": -3}),
        ("err-max-tokens-neg.http", {"max_tokens": -1}),
        ("err-n0.http", {"n": 0}),
        (
            "err-image.http",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}]},
        ),
        ("err-bad-tool-choice.http", {"tool_choice": {"type": "function", "function": {"name": "x"}}}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_cannot_be_served_is_refused_before_any_stream(
    recording, more, stream, chat, recorded
):
    real = recorded(recording)
    async with Simulator(TINY) as sim:
        ours = await chat(sim.port, stream=stream, **more)
    assert (ours.status, ours.header_names, ours.rest) == (real.status, real.header_names, real.rest)


async def test_too_long_a_prompt_or_answer_names_the_numbers(chat, recorded):
    async with Simulator(TINY) as sim:
        long = await chat(sim.port, messages=[{"role": "user", "content": "abcd" * 8009}], stream=True)
        big = await chat(sim.port, max_tokens=100000)
    assert long.rest == recorded("err-too-long-stream.raw").rest
    assert big.rest == recorded("err-max-tokens-too-big.http").rest.replace(b"100022", b"100011").replace(
        b" 22 tokens", b" 11 tokens"
    )


async def test_only_json_is_taken(get, recorded):
    async with Simulator(TINY) as sim:
        ours = await get(sim.port, "POST", "/v1/chat/completions", b"{}", content_type="text/plain")
    assert ours.rest == recorded("err-no-ctype.http").rest


async def test_this_model_makes_no_embeddings(get, recorded):
    async with Simulator(TINY) as sim:
        ours = await get(sim.port, "POST", "/v1/embeddings", {"model": "tiny", "input": "x"})
    assert (ours.status, ours.rest) == (400, recorded("err-embeddings.http").rest)


async def test_an_unknown_model_is_served_and_its_name_comes_back_and_a_missing_one_is_default(get, chat):
    async with Simulator(TINY) as sim:
        unknown = await chat(sim.port, model="nope", max_tokens=1)
        missing = await get(
            sim.port, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}
        )
    assert (unknown.json["model"], missing.json["model"]) == ("nope", "default")


@pytest.mark.parametrize("given", ["", "Bearer wrong", "sk-secret"])
async def test_a_key_is_wanted_as_bearer(given, get, body, recorded):
    real = recorded("apikey-none-chat.http")
    async with Simulator(SimConfig(api_key="sk-secret")) as sim:
        ours = await get(sim.port, "POST", "/v1/chat/completions", body(), authorization=given)
        loads = await get(sim.port, "GET", "/v1/loads", authorization=given)
    assert (ours.status, ours.header_names, ours.rest) == (real.status, real.header_names, real.rest)
    assert loads.status == 401


async def test_health_metrics_and_ready_are_open_without_a_key_and_the_right_key_opens_the_rest(get, body):
    config = SimConfig(api_key="sk-secret", health_seconds=0.0, enable_metrics=True)
    async with Simulator(config) as sim:
        paths = ("/health", "/health_generate", "/metrics", "/metrics/", "/ready", "/sim/stats")
        statuses = [(await get(sim.port, "GET", path)).status for path in paths]
        key = "Bearer sk-secret"
        ours = await get(sim.port, "POST", "/v1/chat/completions", body(max_tokens=1), authorization=key)
        info = await get(sim.port, "GET", "/server_info", authorization=key)
    assert statuses == [200] * len(paths)
    assert ours.status == 200
    assert (info.json["api_key"], info.json["frontend"], info.json["version"]) == (
        "sk-secret",
        "python",
        "0.5.23",
    )


async def test_a_rid_that_is_in_use_is_refused_and_one_that_has_ended_is_not(chat, until):
    async with Simulator(TINY) as sim:
        sim.hang()
        first = asyncio.ensure_future(chat(sim.port, rid="twice", max_tokens=1))
        await until(lambda: sim.stats.queued == 1)
        second = await chat(sim.port, rid="twice", max_tokens=1)
        sim.resume()
        assert (await first).status == 200
        third = await chat(sim.port, rid="twice", max_tokens=1)
    assert (second.status, second.json["message"]) == (400, "Duplicate request ID detected: twice")
    assert third.status == 200
    assert sim.stats.requests["twice"] == 2


async def test_head_of_health_is_not_allowed_and_options_answers_any_origin(get):
    async with Simulator(TINY) as sim:
        head = await get(sim.port, "HEAD", "/health")
        options = await get(sim.port, "OPTIONS", "/v1/chat/completions", origin="http://a.example")
    assert (head.status, head.rest) == (405, b"")
    assert b"access-control-allow-origin: http://a.example" in options.head
