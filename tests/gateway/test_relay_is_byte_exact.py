"""What the client sends reaches the replica, and what the replica sends reaches the client, byte for byte."""

from __future__ import annotations

import asyncio
import json
import random
import re
from typing import Any

import httpx
import pytest

from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat
from .scripted import ANSWER, DATA, LAST, STREAM, Peer, Scripted, chunk, whole

RID = "0123456789abcdef0123456789abcdef"
ODD = 'naïve \u202e \U0001f9ff "quoted" \\ \x7f data: [DONE] \u2028 : id: retry: \ufffd 中文 e\u0301'


def recorded(name: str) -> tuple[bytes, bytes]:
    """The whole response of a real SGLang, and its body without the chunk framing."""
    raw = (DATA / name).read_bytes()
    raw = raw[raw.index(b"HTTP/1.1") :].replace(b"Connection: close\r\n", b"")
    head, _, rest = raw.partition(b"\r\n\r\n")
    if b"chunked" not in head:
        return raw, rest
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return raw, body


PATHS = {
    "stream-usage.raw": "/v1/chat/completions",
    "stream-usage-continuous.raw": "/v1/chat/completions",
    "stream-n2.raw": "/v1/chat/completions",
    "reasoning-stream.raw": "/v1/chat/completions",
    "completions-stream.raw": "/v1/completions",
    "generate-stream.raw": "/generate",
    "chat-nonstream-rid.http": "/v1/chat/completions",
    "chat-nonstream-n2.http": "/v1/chat/completions",
    "completions-nonstream.http": "/v1/completions",
}


def request(path: str, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = chat(**more)
    if path == "/v1/completions":
        body["prompt"] = body.pop("messages")[0]["content"]
    elif path == "/generate":
        body["text"] = body.pop("messages")[0]["content"]
    return body


def normal(data: bytes) -> bytes:
    """Without the time of day and SGLang's random ids of n > 1 choices: two runs differ in nothing else."""
    data = re.sub(RID.encode() + rb"_[0-9a-f]{32}", RID.encode(), data)
    data = re.sub(rb'"created":\d+', b'"created":0', data)
    return re.sub(rb'("\w+_(?:time|ts|latency|throughput|wait)":)[0-9.e+-]+', rb"\g<1>0", data)


@pytest.mark.parametrize("name", PATHS)
async def test_an_answer_recorded_of_sglang_comes_through_unchanged_however_it_is_cut(
    rig: Rig, name: str
) -> None:
    raw, body = recorded(name)
    rng = random.Random(name)

    async def answer(peer: Peer) -> None:
        at = 0
        while at < len(raw):
            step = rng.choice((1, 7, 64, 300, 5000, len(raw)))
            await peer.send(raw[at : at + step])
            at += step
            await asyncio.sleep(0)

    async with Scripted(answer) as replica:
        rig.publish(replica.url)
        for _ in range(4):
            got = await rig.client.post(PATHS[name], json=request(PATHS[name], stream="stream" in name))
            assert got.status_code == 200
            assert got.content == body
        assert replica.connections == 1
        await rig.quiet()


USAGE = {"include_usage": True}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"stream_options": USAGE},
    {"stream_options": {**USAGE, "continuous_usage_stats": True}},
    {"n": 2},
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_through_the_gateway_equals_the_one_taken_direct(
    rig: Rig, path: str, stream: bool
) -> None:
    async with Simulator(SimConfig(reply=ODD)) as sim, httpx.AsyncClient(base_url=sim.url) as direct:
        rig.publish(sim.url)
        for more in VARIANTS:
            if path == "/generate":
                more = {"sampling_params": {"max_new_tokens": 12, "n": more.get("n", 1)}}
            body = request(path, stream=stream, max_tokens=12, rid=RID, **more)
            want = await direct.post(path, json=body)
            got = await rig.client.post(path, json=body)
            assert got.status_code == want.status_code == 200
            assert normal(got.content).split(b"\n\n") == normal(want.content).split(b"\n\n")
            assert RID.encode() in got.content
            ours = {"date", "content-length", "x-request-id"}
            assert {k: v for k, v in got.headers.items() if k not in ours} == {
                k: v for k, v in want.headers.items() if k not in ours
            }


async def test_an_answer_has_the_request_id_of_the_client_or_one_made_for_it(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        body = chat(max_tokens=1)
        got = await rig.client.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-7"})
        assert got.headers.get_list("x-request-id") == ["mine-7"]
        got = await rig.client.post("/v1/chat/completions", json=body)
        assert re.fullmatch("[0-9a-f]{32}", got.headers["x-request-id"])


async def test_a_body_reaches_the_replica_byte_for_byte_with_a_rid_put_first(rig: Rig) -> None:
    async def answer(peer: Peer) -> None:
        await peer.send(ANSWER)

    bodies = [
        b'{"messages":[{"role":"user","content":"x"}]}',
        b' \r\n{ "n" : 1.0 ,\t"messages" : [ {"role":"user", "content":"\\u00e9 \\ud83d\\ude00 \\/"} ] } \n',
        json.dumps(chat(ODD), ensure_ascii=False).encode(),
        b'{"messages":[{"role":"user","content":"a"}],"seed":1,"seed":2,"big":12345678901234567890.0e-3}',
        b'{"messages":[{"role":"user","content":"' + b"x" * 3_000_000 + b'"}]}',
    ]
    headers = {"content-type": "application/json"}
    async with Scripted(answer) as replica:
        rig.publish(replica.url)
        for body in bodies:
            got = await rig.client.post("/v1/chat/completions", content=body, headers=headers)
            assert got.status_code == 200
            sent = replica.requests[-1].body
            assert re.sub(rb'"rid":"[0-9a-f]{32}",', b"", sent, count=1) == body
            assert sent.lstrip()[:7] == b'{"rid":'
        rids = {peer.json["rid"] for peer in replica.requests}
        assert len(rids) == len(bodies)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", b'{"messages": [{"role": "user"}], "rid": "mine"}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user"}], "n": 2}'),
        ("/v1/completions", b'{"prompt": ["a", "b"]}'),
        ("/v1/embeddings", b'{"input": "a"}'),
        ("/tokenize", b'{"prompt": "a"}'),
    ],
)
async def test_a_body_that_takes_no_rid_is_not_touched(rig: Rig, path: str, body: bytes) -> None:
    async def answer(peer: Peer) -> None:
        await peer.send(ANSWER)

    async with Scripted(answer) as replica:
        rig.publish(replica.url)
        await rig.client.post(path, content=body, headers={"content-type": "application/json"})
        assert replica.requests[0].body == body
        assert replica.requests[0].line == b"POST %b HTTP/1.1" % path.encode()


async def test_the_replica_gets_its_own_key_the_query_and_who_asked(rig: Rig) -> None:
    async def answer(peer: Peer) -> None:
        await peer.send(ANSWER)

    async with Scripted(answer) as replica:
        rig.publish(replica.url + "/prefix", replica_key="theirs")
        headers = {"authorization": "Bearer mine", "x-api-key": "mine", "cookie": "mine", "x-a": "b"}
        await rig.client.post("/v1/chat/completions?a=1&b=%20", json=chat(), headers=headers)
        request = replica.requests[0]
        assert request.line == b"POST /prefix/v1/chat/completions?a=1&b=%20 HTTP/1.1"
        assert request.values(b"authorization") == [b"Bearer theirs"]
        assert request.values(b"accept-encoding") == [b"identity"]
        assert request.values(b"x-forwarded-for") == [b"127.0.0.1"]
        assert request.values(b"host") == [f"127.0.0.1:{replica.port}".encode()]
        assert request.values(b"x-a") == [b"b"]
        assert not any(b"mine" in value for _, value in request.headers)


async def test_a_stream_comes_event_by_event_and_is_not_gathered(rig: Rig) -> None:
    go = asyncio.Event()

    async def answer(peer: Peer) -> None:
        await peer.send(STREAM + chunk(b"data: 1\n\n"))
        await go.wait()
        await peer.send(chunk(b"data: 2\n\ndata: [DONE]\n\n") + LAST)

    async with Scripted(answer) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat(stream=True))
        await got.until(b"data: 1\n\n")
        go.set()
        assert b"data: 2\n\ndata: [DONE]\n\n" in await got.rest()
        await got.close()


async def test_a_large_answer_of_the_responses_api_is_complete_though_its_last_event_is_long(
    rig: Rig,
) -> None:
    text = "x" * 200_000
    last = json.dumps({"type": "response.completed", "response": {"output_text": text}})
    body = f"event: response.created\ndata: {{}}\n\nevent: response.completed\ndata: {last}\n\n".encode()

    async def answer(peer: Peer) -> None:
        await peer.send(STREAM)
        for data in (body[:60], body[60:70_000], body[70_000:]):
            await peer.send(chunk(data))
            await asyncio.sleep(0)
        await peer.send(LAST)

    async with Scripted(answer) as replica:
        rig.publish(replica.url)
        got = await rig.client.post("/v1/responses", json={"input": "x", "stream": True})
        assert got.content == body


async def test_an_answer_that_is_no_json_is_passed_on_as_it_is(rig: Rig) -> None:
    data = bytes(range(256)) * 40

    async def answer(peer: Peer) -> None:
        await peer.send(whole(data, kind="application/octet-stream", status=201))

    async with Scripted(answer) as replica:
        rig.publish(replica.url)
        got = await rig.client.post("/v1/embeddings", json={"input": "x"})
        assert (got.status_code, got.content) == (201, data)
        assert got.headers["content-type"] == "application/octet-stream"
        assert got.headers["content-length"] == str(len(data))
