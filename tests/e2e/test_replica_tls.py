"""A whole gateway whose replica speaks TLS: from zero to an answer, over a restart; no secret shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

Gateways = Callable[..., Any]
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
FILES = 'cd "$REPLICA_DIR"; umask 077; echo "$REPLICA_TLS_KEY" >key; echo "$REPLICA_TLS_CERT" >cert'
FLAGS = '${REPLICA_TLS_CERT:+--ssl-keyfile "$REPLICA_DIR/key" --ssl-certfile "$REPLICA_DIR/cert"}'


def ask(gateway: Any, **more: Any) -> httpx.Response:
    return httpx.post(gateway.url + "/v1/chat/completions", json={**BODY, **more}, timeout=60)


def test_a_replica_is_launched_adopted_and_ended_by_tls_and_its_key_stays_with_it(gateways: Gateways) -> None:
    gateway = gateways("--replica-transport", "tls", before=FILES, flags=FLAGS)
    answer = ask(gateway)
    assert answer.status_code == 200, answer.text
    assert "[DONE]" in ask(gateway, stream=True).text
    (before,) = gateway.ready()
    assert before["url"].startswith("https://127.0.0.1:")

    gateway.kill()
    gateway.options = ()  # it speaks TLS for life, whatever the flags of the day
    gateway.start()
    assert ask(gateway).status_code == 200
    (after,) = gateway.ready()
    assert (after["id"], after["url"]) == (before["id"], before["url"])

    (pem,) = (gateway.state / "tls").glob("*.pem")
    secret = pem.read_text().splitlines()[1]
    events = httpx.get(gateway.admin_url + "/admin/status").text
    shown = [gateway.log(), events, (gateway.state / "replicas" / after["id"] / "output.log").read_text()]
    assert not any(secret in text for text in shown)
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in gateway.replica_processes()]
    assert commands
    assert not any(secret in command for command in commands)
    gateway.cli("down")
    assert gateway.replica_processes() == []
