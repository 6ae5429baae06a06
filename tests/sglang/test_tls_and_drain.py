"""A real SGLang with uvicorn's TLS and an API key, ended by SIGTERM in the middle of a stream."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl

import httpx
import pytest

from tests.e2e.conftest import alive, eventually
from tests.sglang.conftest import Replica, Stage, unverified
from tests.sglang.test_gateway import CHAT, body, until

pytestmark = pytest.mark.sglang


@pytest.fixture
def over_tls(stage: Stage) -> Replica:
    return stage.play("tls", "--replica-transport", "tls")


def test_the_gateway_speaks_tls_to_it_and_nobody_is_served_without_the_key(over_tls: Replica) -> None:
    assert [status for _, status in over_tls.health] == ["refused", "503", "200"], over_tls.health
    assert over_tls.url.startswith("https://127.0.0.1:")
    assert httpx.post(over_tls.gateway.url + CHAT, json=body(), timeout=60).status_code == 200
    naked = httpx.post(over_tls.url + CHAT, json=body(), verify=unverified(), timeout=30)
    assert (naked.status_code, naked.json()) == (401, {"error": "Unauthorized"})
    with pytest.raises(httpx.ConnectError) as untrusted:
        httpx.get(over_tls.url + "/health", verify=ssl.create_default_context(), timeout=30)
    assert "CERTIFICATE_VERIFY_FAILED" in str(untrusted.value)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(over_tls.url.replace("https", "http") + "/health", timeout=30)


async def test_sigterm_lets_a_stream_end_and_the_gateway_sends_nothing_more(over_tls: Replica) -> None:
    gateway, pid = over_tls.gateway, over_tls.pid()
    lines: list[str] = []
    loop = asyncio.get_running_loop()
    async with (
        httpx.AsyncClient(timeout=120) as client,
        client.stream("POST", gateway.url + CHAT, json=body(1500, stream=True)) as answer,
    ):
        async for line in answer.aiter_lines():
            lines += [line] if line else []
            if len(lines) == 3:
                os.kill(pid, signal.SIGTERM)
                began = loop.time()
                said = await asyncio.to_thread(over_tls.get, "/health")
                while said.status_code != 503:
                    assert loop.time() - began < 5
                    said = await asyncio.to_thread(over_tls.get, "/health")
                await until(lambda: not gateway.ready())  # the probe has seen it, and the stream goes on
                taken = await asyncio.to_thread(over_tls.post, CHAT, **body())
                assert taken.status_code == 200, "it still takes requests"
    assert lines[-1] == "data: [DONE]"
    finish = [json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] for line in lines[:-1]]
    assert finish[-1] == "length"
    assert gateway.access()[-1]["end"] == "complete"
    eventually(lambda: not alive(pid), 60)
    eventually(lambda: "run exited with code 0" in gateway.log(), 60)
