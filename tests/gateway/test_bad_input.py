"""Whatever comes in: a clear error in OpenAI's shape with the right code, and the worker lives on."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually
from .scripted import sample

PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
GOOD = json.dumps(chat(max_tokens=1)).encode()
Rigs = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def open_rig(rig: Rig) -> AsyncIterator[Rig]:
    """With a replica: a good request is answered before and after."""
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        await rig.acked()
        yield rig
        got = await rig.client.post(PATH, content=GOOD, headers=JSON)
        assert got.status_code == 200
        assert sim.stats.runs_total == 1
        await rig.quiet()


def is_error(got: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert got.status_code == status, got.text
    body = got.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    return error


BODIES = [
    (b"", "invalid_request", None),
    (b"{", "invalid_request", None),
    (b'{"messages": [{"role": "user", "content": "x"}', "invalid_request", None),
    (b"[]", "invalid_request", None),
    (b"\xff", "invalid_request", None),
    (b"[" * 50_000, "invalid_request", None),
    (b"{}", "missing_required_parameter", "messages"),
    (b'{"messages": []}', "invalid_request", "messages"),
    (b'{"messages": [{"role": "user"}], "stream": "yes"}', "invalid_request", "stream"),
    (b'{"messages": [{"role": "user"}], "max_tokens": -1}', "invalid_request", "max_tokens"),
]


async def test_a_bad_body_is_400(open_rig: Rig) -> None:
    for body, code, param in BODIES:
        got = await open_rig.client.post(PATH, content=body, headers=JSON)
        assert is_error(got, 400, code, param)["type"] == "invalid_request_error"
    assert open_rig.board.totals(0).arrived == 0


ELSEWHERE = [
    ("POST", "/", 404, None),
    ("GET", "/", 404, None),
    ("POST", "/abort_request", 404, None),
    ("GET", "/flush_cache", 404, None),
    ("GET", "/server_info", 404, None),
    ("GET", "/metrics", 404, None),
    ("POST", "/v1/chat/completions/", 404, None),
    ("POST", "/v1/chat%2Fcompletions", 404, None),
    ("POST", "/V1/chat/completions", 404, None),
    ("POST", "//v1/chat/completions", 404, None),
    ("POST", "/v1/../abort_request", 404, None),
    ("GET", "/v1/chat/completions", 405, "POST"),
    ("PUT", "/v1/completions", 405, "POST"),
    ("DELETE", "/generate", 405, "POST"),
    ("OPTIONS", "/v1/chat/completions", 405, "POST"),
    ("POST", "/v1/models", 405, "GET"),
    ("POST", "/health", 405, "GET"),
]


async def test_another_path_is_404_and_another_method_405(open_rig: Rig) -> None:
    for method, path, status, allow in ELSEWHERE:
        url = httpx.URL(open_rig.url).copy_with(raw_path=path.encode())
        got = await open_rig.client.request(method, url, content=GOOD, headers=JSON)
        is_error(got, status, "unknown_url")
        assert got.headers.get("allow") == allow


async def test_a_compressed_body_is_415(open_rig: Rig) -> None:
    for encoding in ("gzip", "br", "GZIP", "gzip, identity", "x"):
        headers = {**JSON, "content-encoding": encoding}
        got = await open_rig.client.post(PATH, content=GOOD, headers=headers)
        is_error(got, 415, "unsupported_content_encoding")


async def test_a_body_that_a_web_page_could_send_is_415(open_rig: Rig) -> None:
    kinds = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json")
    for kind in kinds:
        got = await open_rig.client.post(PATH, content=GOOD, headers={"content-type": kind})
        is_error(got, 415, "unsupported_content_type")


async def test_json_by_any_spelling_is_read(open_rig: Rig) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/json ;x"):
        got = await open_rig.client.post(PATH, content=b"{}", headers={"content-type": kind})
        is_error(got, 400, "missing_required_parameter", "messages")


async def test_an_unknown_wish_how_to_be_held_is_400(open_rig: Rig) -> None:
    got = await open_rig.client.post(PATH, content=GOOD, headers={**JSON, "x-gateway-hold": "maybe"})
    is_error(got, 400, "invalid_request", "X-Gateway-Hold")


async def test_a_patience_that_is_none_counts_as_unknown(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        for patience in (b"", b"soon", b"-1", b"0", b"nan", b"inf", b"1e999", b"\xff"):
            headers = {b"content-type": b"application/json", b"x-stainless-read-timeout": patience}
            assert (await rig.client.post(PATH, content=GOOD, headers=headers)).status_code == 200


@pytest.mark.parametrize("key", [None, "sk-b", "sk-alice", "SK-ALICE1"])
async def test_a_wrong_key_is_401_and_wakes_nothing(rigs: Rigs, key: str | None) -> None:
    rig = await rigs(api_key=("alice=sk-alice1",))
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    got = await rig.client.post(PATH, content=GOOD, headers={**JSON, **headers})
    assert is_error(got, 401, "invalid_api_key")["type"] == "authentication_error"
    assert got.headers["www-authenticate"] == "Bearer"
    assert (await rig.client.get("/v1/models", headers=headers)).status_code == 401
    assert rig.board.totals(0).arrived == 0


async def test_a_body_over_the_limit_is_413_though_it_was_not_read(rigs: Rigs) -> None:
    """100 MB against the default of 32 MiB; the client sends all of it, and then reads."""
    rig = await rigs()
    piece = b"x" * (1 << 20)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield piece

    sized = {**JSON, "content-length": str(100 << 20)}
    for headers in (sized, JSON, {**sized, "connection": "close"}, {**JSON, "connection": "close"}):
        got = await rig.client.post(PATH, content=body(), headers=headers)
        assert "--max-body" in is_error(got, 413, "body_too_large")["message"]
    assert (await rig.client.get("/health")).status_code == 200


@pytest.mark.parametrize("close", [True, False])
async def test_a_large_body_with_a_wrong_key_gets_its_answer_too(rigs: Rigs, close: bool) -> None:
    rig = await rigs(api_key=("alice=sk-alice1",))
    headers = {**JSON, "connection": "close"} if close else JSON
    got = await rig.client.post(PATH, content=b"x" * (20 << 20), headers=headers)
    is_error(got, 401, "invalid_api_key")


async def test_a_client_that_asks_before_it_sends_is_refused_before_it_sends(rigs: Rigs) -> None:
    rig = await rigs(max_body=1000)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(rig.url.rsplit(":", 1)[1]))
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % PATH.encode())
    writer.write(b"content-length: 5000\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n")
    data = await asyncio.wait_for(reader.read(), 5)
    assert data.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in data
    writer.close()
    await writer.wait_closed()


async def test_a_body_of_just_the_limit_is_served(rigs: Rigs) -> None:
    rig = await rigs(max_body=1000)
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        body = GOOD + b" " * (1000 - len(GOOD))
        assert (await rig.client.post(PATH, content=body, headers=JSON)).status_code == 200
        is_error(await rig.client.post(PATH, content=body + b" ", headers=JSON), 413, "body_too_large")


async def test_an_unpaired_surrogate_in_the_model_harms_nobody(rigs: Rigs) -> None:
    rig = await rigs(commit_after=0.01, beat_every=0.1, access_log="-")
    got = await rig.raw(b'{"model":"\\ud800","stream":true,"messages":[{"role":"user","content":"x"}]}')
    await got.until(b": cold-start")
    rig.publish(status="paused")
    data = await got.rest()
    assert b'"code": "service_paused"' in data
    await got.close()
    await rig.quiet()


NOISE = (
    b"\x16\x03\x01\x00\xa5\x01\x00", b"SSH-2.0-x\r\n", b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", b"*1\r\n$4\r\nPING\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
)  # fmt: skip
PATHS = (
    "/.env", "/wp-login.php", "/admin/status", "/admin/down", "/api/tags", "/v1/models/../../x",
    "/robots.txt", "/cgi-bin/luci", "/v1/files", "/v1/images/generations", "/actuator/health",
    "/v1/chat/completions?x=%00",
)  # fmt: skip


async def test_a_thousand_requests_of_scanners_wake_nothing(rigs: Rigs) -> None:
    rig = await rigs(api_key=("alice=sk-alice1",))
    rng = random.Random(1)
    port = int(rig.url.rsplit(":", 1)[1])

    async def noise(data: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(10):
            while await reader.read(65536):
                pass
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    async def scan() -> None:
        for _ in range(50):
            if rng.random() < 0.2:
                await asyncio.gather(noise(rng.choice(NOISE)), return_exceptions=True)
                continue
            headers = {"authorization": rng.choice(["Bearer x", "Basic eDp5", ""])}
            if rng.random() < 0.5:
                headers |= JSON
            method = rng.choice(["GET", "POST", "HEAD", "PUT", "OPTIONS", "PROPFIND"])
            path = rng.choice((*PATHS, "/v1/chat/completions", "/v1/models", "/generate"))
            got = await rig.client.request(method, path, headers=headers, content=rng.choice([b"", GOOD]))
            assert 400 <= got.status_code < 500

    await asyncio.gather(*(scan() for _ in range(20)))
    totals = rig.board.totals(0)
    assert (totals.arrived, totals.waiting, totals.waiting_bytes, totals.oldest_ns) == (0, 0, 0, 0)
    assert rig.control.workers[0].waiting.get("r1", 0) == 0
    assert (await rig.client.get("/health")).status_code == 200


async def test_what_is_rejected_is_counted_as_rejected(rig: Rig) -> None:
    before = sample("gateway_requests_total", endpoint=PATH, code="400", end="rejected")
    other = sample("gateway_requests_total", endpoint="other", code="404", end="rejected")
    await rig.client.post(PATH, content=b"{", headers=JSON)
    await rig.client.get("/nothing/here")
    await eventually(
        lambda: (
            sample("gateway_requests_total", endpoint=PATH, code="400", end="rejected") == before + 1
            and sample("gateway_requests_total", endpoint="other", code="404", end="rejected") == other + 1
        )
    )
