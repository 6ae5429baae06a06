"""SIGHUP: keys and limits are read again while streams go on; what is wrong changes nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

Gateways = Callable[..., Any]
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def test_keys_and_limits_are_read_again_and_nothing_is_dropped(
    gateways: Gateways, eventually: Any, tmp_path: Path
) -> None:
    keys, limits = tmp_path / "keys", tmp_path / "limits"
    keys.write_text("alice=alice-key-1\n")
    limits.write_text("max-body=100000\n")
    files = ("--api-keys-file", str(keys), "--limits-file", str(limits))
    gateway = gateways("--workers", "2", *files, startup="load=1", min=1, flags="--profile r1-8xh200-2026")

    def ask(key: str, **more: Any) -> int:
        with httpx.Client(timeout=60) as client:  # a connection of its own: either worker may have it
            head = {"Authorization": f"Bearer {key}"}
            url = gateway.url + "/v1/chat/completions"
            return client.post(url, json={**BODY, **more}, headers=head).status_code

    def all_say(key: str, status: int, **more: Any) -> bool:
        return {ask(key, **more) for _ in range(8)} == {status}

    def hang_up() -> None:
        gateway.process.send_signal(signal.SIGHUP)

    assert all_say("alice-key-1", 200)
    assert all_say("bob-key-123", 401)
    processes = gateway.children("gateway.")
    stream: list[str] = []

    def read() -> None:
        head = {"Authorization": "Bearer alice-key-1"}
        body = {**BODY, "stream": True, "max_tokens": 150, "ignore_eos": True}
        with httpx.stream(
            "POST", gateway.url + "/v1/chat/completions", json=body, headers=head, timeout=60
        ) as answer:
            stream.extend(answer.iter_text())

    reader = threading.Thread(target=read)
    reader.start()
    eventually(lambda: stream)

    keys.write_text("bob=bob-key-123\n")
    limits.write_text("max-body=200\n")
    hang_up()
    eventually(lambda: all_say("bob-key-123", 200))
    assert all_say("alice-key-1", 401)
    assert all_say("bob-key-123", 413, user="x" * 200)

    keys.write_text("bob=short\n")
    hang_up()
    eventually(
        lambda: "keys and limits stay as they were: --api-keys-file, bob=...: the key has" in gateway.log()
    )
    assert all_say("bob-key-123", 200)
    reader.join()
    assert "".join(stream).endswith("data: [DONE]\n\n")
    assert gateway.children("gateway.") == processes
    assert gateway.replicas()[0]["state"] == "ready"
