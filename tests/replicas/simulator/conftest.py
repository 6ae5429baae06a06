"""The simulator's client, and the recordings of a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.wire import Response, fetch, request_bytes

DATA = Path(__file__).parents[2] / "data" / "sglang"


def chat_body(**more: Any) -> dict[str, Any]:
    """A chat completion's request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello the world"}], **more}


@pytest.fixture
def get() -> Callable[..., Any]:
    return fetch


@pytest.fixture
def chat() -> Callable[..., Any]:
    async def call(port: int, **more: Any) -> Response:
        return await fetch(port, "POST", "/v1/chat/completions", chat_body(**more))

    return call


@pytest.fixture
def ask() -> Callable[..., bytes]:
    return request_bytes


@pytest.fixture
def body() -> Callable[..., dict[str, Any]]:
    return chat_body


@pytest.fixture
def recorded() -> Callable[[str], Response]:
    def read(name: str) -> Response:
        raw = (DATA / name).read_bytes()
        return Response(raw[raw.index(b"HTTP/1.1 ") :])

    return read


@pytest.fixture
def until() -> Callable[..., Any]:
    async def wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Until it is so; the limit is only there to end a broken test."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110  # the server has no event for every condition
                await asyncio.sleep(0.002)

    return wait
