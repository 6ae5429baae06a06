"""What the internet sends to any open port costs nothing: only an authenticated, valid request wakes a
service.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

Gateways = Callable[..., Any]
PATHS = (
    "/", "/.env", "/wp-login.php", "/admin", "/admin/status", "/metrics", "/server_info", "/v1/loads",
    "/flush_cache", "/abort_request", "/v1/models", "/health", "/v1/chat/completions/", "/v1/../generate",
    "//v1/chat/completions", "/v1%2fchat%2fcompletions", "/v1/chat/completions", "/v1/completions",
    "/generate", "/v1/embeddings",
)  # fmt: skip
BODIES = (b"", b"{", b"[]", b"{}", b"null", b'{"messages": []}', b'{"messages": "x"}', b"\xff\xfe", b"<xml/>")
VALID = b'{"messages": [{"role": "user", "content": "hi"}], "prompt": "x", "text": "x", "input": "x"}'
KEY = "a-key-for-the-tests"


async def test_a_thousand_scanner_like_requests_launch_nothing(gateways: Gateways) -> None:
    gateway = gateways("--api-key", f"tests={KEY}")
    rng = random.Random(20261124)
    wrong = ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": "wrong"}, {"Authorization": "Basic YTpi"})
    good = {"Authorization": f"Bearer {KEY}"}
    codes: Counter[int] = Counter()
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:

        async def scan() -> None:
            method = rng.choice(("GET", "POST", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
            # Valid bodies without a key, or invalid ones with it.
            keyed = rng.random() < 0.3
            body = rng.choice(BODIES) if keyed or rng.random() < 0.5 else VALID
            headers = {**(good if keyed else rng.choice(wrong)), "Content-Type": "application/json"}
            answer = await client.request(method, rng.choice(PATHS), content=body, headers=headers)
            codes[answer.status_code] += 1

        for _ in range(50):
            await asyncio.gather(*(scan() for _ in range(20)))
    assert sum(codes.values()) == 1000
    assert not {code for code in codes if code >= 500}, codes
    assert not gateway.replicas()
    assert not gateway.replica_processes()
    assert "gateway_launches_total{" not in gateway.metrics()
    assert gateway.service()["demand"] == {"waiting": 0, "in_flight": 0}
