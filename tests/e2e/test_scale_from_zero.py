"""From zero, back to zero, and from zero again, with the OpenAI SDK and the recipe's own request."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import openai

Gateways = Callable[..., Any]

COLD_START = "provision=4,download=8,load=6,warmup=2"  # 20 s
SLOW_ANSWER = 2300  # tokens at 9 ms each: 20 s
RECIPE_BODY = {
    "model": "deepseek-ai/DeepSeek-R1-671B",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "how many rs are in strawberry"},
    ],
}


async def ask(client: openai.AsyncOpenAI, marker: str, *, stream: bool, tokens: int = 20) -> str:
    """One chat completion; the text of its answer. `marker` is what the replica counts it by."""
    body: Any = {
        "model": "deepseek-ai/DeepSeek-R1-671B",
        "messages": [{"role": "user", "content": "how many rs are in strawberry"}],
        "max_tokens": tokens,
        "user": marker,
        "extra_body": {"ignore_eos": True},
    }
    if not stream:
        answer = await client.chat.completions.create(**body)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == tokens
        return answer.choices[0].message.content or ""
    parts, finish = [], None
    async for chunk in await client.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert finish == "length"
    return "".join(parts)


def runs(gateway: Any) -> dict[str, int]:
    """How often each request ran, as the one READY replica counts."""
    (replica,) = gateway.ready()
    return dict(httpx.get(replica["url"] + "/sim/stats", timeout=10).json()["markers"])


async def test_fifty_requests_wake_one_replica_then_it_scales_to_zero_and_wakes_again(
    gateways: Gateways, eventually: Any
) -> None:
    gateway = gateways("--idle-timeout", "3", startup=COLD_START, flags="--profile r1-8xh200-2026")
    assert gateway.replicas() == []
    async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as client:
        answers = await asyncio.gather(*(ask(client, f"first-{i}", stream=i % 2 == 0) for i in range(50)))
    assert len(set(answers)) == 1
    assert answers[0].startswith("There are")
    assert runs(gateway) == {f"first-{i}": 1 for i in range(50)}
    assert {entry["attempts"] for entry in gateway.access()} == {1}
    assert min(entry["held_s"] for entry in gateway.access()) > 10
    assert 'gateway_launches_total{outcome="ready",service="e2e"} 1.0' in gateway.metrics()

    # A client with 5 s of patience and an answer that takes 20 s.
    patient = openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0, timeout=5)
    async with patient:
        await asyncio.gather(
            ask(patient, "slow-json", stream=False, tokens=SLOW_ANSWER),
            ask(patient, "slow-stream", stream=True, tokens=SLOW_ANSWER),
        )
        assert runs(gateway)["slow-json"] == runs(gateway)["slow-stream"] == 1

        eventually(lambda: not gateway.replicas() and not gateway.replica_processes())

        # And the same client over a whole cold start, in both modes, beside the recipe's own curl.
        recipe = asyncio.create_task(asyncio.to_thread(recipe_curl, gateway.url))
        await asyncio.gather(ask(patient, "json", stream=False), ask(patient, "stream", stream=True))
    answer = await recipe
    assert answer["choices"][0]["message"]["content"].startswith("There are **3**")
    assert answer["model"] == "deepseek-ai/DeepSeek-R1-671B"
    launches = 'gateway_launches_total{outcome="ready",service="e2e"} 2.0'
    assert launches in gateway.metrics()


def recipe_curl(url: str) -> dict[str, Any]:
    """The recipe's request, by curl where there is one."""
    endpoint, body = url + "/v1/chat/completions", json.dumps(RECIPE_BODY)
    if shutil.which("curl") is None:
        headers = {"Content-Type": "application/json"}
        return dict(httpx.post(endpoint, content=body, headers=headers, timeout=120).json())
    command = ["curl", "-s", endpoint, "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return dict(json.loads(done.stdout))
