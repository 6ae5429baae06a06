"""What a replica printed can be read while it lives, while its failed machine is kept, and after its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import clean_env, command_line, descendants

Gateways = Callable[..., Any]
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}
CLEAR = """echo "server_args=ServerArgs(api_key='$REPLICA_API_KEY')"; env; echo "token $HF_TOKEN" >&2"""


def key_of(pid: int) -> str:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.partition("=")[::2] for pair in pairs)["REPLICA_API_KEY"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads the key from /proc")
def test_logs_of_a_failed_replica_are_kept_without_secrets_and_following_ends_with_it_or_quietly(
    gateways: Gateways, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-known-kind")
    gateway = gateways("--keep-failed", "3", "--max-replicas", "1", before=CLEAR)
    assert httpx.post(gateway.url + "/v1/chat/completions", json=BODY, timeout=60).status_code == 200
    (replica,) = gateway.ready()
    eventually(lambda: gateway.replicas()[0]["generation_tokens_per_second"] is not None)
    assert "gateway_replica_generation_tokens_per_second{" in gateway.metrics()
    (launcher,) = gateway.replica_processes()
    key = key_of(launcher)

    def follow(to: Path) -> subprocess.Popen[bytes]:
        with open(to, "wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "logs", replica["id"], "--follow"],
                env={**clean_env(), "GATEWAY_STATE_DIR": str(gateway.state)},
                stdout=out, stderr=out, cwd=gateway.folder,
            )  # fmt: skip
        eventually(lambda: "[replica] run started" in to.read_text())
        return process

    out = gateway.folder / "patient.txt"
    interrupted, patient = follow(gateway.folder / "interrupted.txt"), follow(out)
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(20) == 0
    assert "Traceback" not in (gateway.folder / "interrupted.txt").read_text()

    for pid in descendants(launcher):
        if "replicas.simulator" in command_line(pid):
            os.kill(pid, signal.SIGKILL)
    failed = eventually(lambda: [r for r in gateway.replicas() if r["kept_until"]])
    assert failed[0]["id"] == replica["id"]
    shown = [gateway.cli("logs", replica["id"]).stdout]
    eventually(lambda: replica["id"] not in [r["id"] for r in gateway.replicas()])
    assert patient.wait(20) == 0
    followed = out.read_text()
    shown += [followed, gateway.cli("logs", replica["id"]).stdout, gateway.log()]
    shown += [path.read_text() for path in (gateway.state / "replicas" / replica["id"]).iterdir()]
    text = "\n".join(shown)
    assert "api_key='***'" in text
    assert "[replica] run ended with code -9" in followed
    assert key not in text
    assert "a-token-of-no-known-kind" not in text
