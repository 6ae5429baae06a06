"""`gateway demo --once` as a user runs it: real processes, no terminal; and what it says when it cannot."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway import statedir
from gateway.demo import cold_start_line


def demo(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", "demo", "--once", *words],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )


def test_from_zero_to_an_answer_and_nothing_is_left(tmp_path: Path) -> None:
    """A busy port, a proxy in the environment, options of another gateway: none of them disturbs."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        done = demo(
            f"--state-dir={tmp_path / 'state'}",
            f"--port={port}",
            "--admin-port=0",
            HTTP_PROXY="http://127.0.0.1:1",
            GATEWAY_ADMIN_KEY="of-another-gateway",
        )
    assert done.returncode == 0, done.stdout
    for words in (
        f"Port {port} is in use: taking a free one instead.",
        "no replica of deepseek-ai/DeepSeek-R1 exists",
        "through the openai SDK",
        "1 held",
        "s left",
        "The first token came after",
        "target 1 of 0..2",
        "Everything has ended.",
    ):
        assert words in done.stdout, (words, done.stdout)
    assert statedir.read_address(tmp_path / "state") is None
    os.close(statedir.lock(tmp_path / "state", wait_s=0))  # no process of it lives
    assert not list((tmp_path / "state").glob("*.sock"))


def test_a_start_that_fails_prints_the_cause_and_fails(tmp_path: Path) -> None:
    held = statedir.lock(tmp_path / "state")
    statedir.write_address(tmp_path / "state", {"pid": os.getpid()})
    try:
        done = demo(f"--state-dir={tmp_path / 'state'}", "--port=0", "--admin-port=0")
    finally:
        os.close(held)
    assert done.returncode == 1
    assert "The demo failed: the gateway did not start" in done.stdout
    assert "already runs with the state dir" in done.stdout


@pytest.mark.parametrize(
    ("replica", "line"),
    [
        (None, "   7 s  2 held  no replica yet"),
        (
            {"state": "starting", "phase": "download", "progress": 0.5, "eta_seconds": 90},
            "   7 s  2 held  provision✓ setup✓ download  ━━╌╌╌ 50%  2 min left",
        ),
        ({"state": "pending", "phase": None, "eta_seconds": None}, "   7 s  2 held  pending  no ETA yet"),
        ({"state": "ready", "phase": None, "eta_seconds": None}, "   7 s  2 held  ready"),
    ],
)
def test_the_line_of_a_cold_start_says_phase_progress_and_eta(
    replica: dict[str, object] | None, line: str
) -> None:
    service = {"demand": {"waiting": 2}, "replicas": [replica] if replica else []}
    assert cold_start_line(service, 7.2)[1] == line


def test_the_line_of_a_cold_start_fits_a_terminal_of_80_columns() -> None:
    """A wrapped line would be drawn anew, and leave its rest behind, five times a second."""
    replica = {"state": "starting", "phase": "warmup", "progress": 1.0, "eta_seconds": 89}
    service = {"demand": {"waiting": 1}, "replicas": [replica]}
    line = cold_start_line(service, 123.0)[1]
    assert len(line) < 80, line


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_a_demo_that_is_killed_leaves_nothing_running(tmp_path: Path) -> None:
    home = tmp_path / "state"
    words = [f"--state-dir={home}", "--port=0", "--admin-port=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "demo", *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60

    def until(what: Callable[[], object]) -> None:
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    until(lambda: list(home.glob("replicas/*/process.json")))
    (record,) = home.glob("replicas/*/process.json")
    pid = json.loads(record.read_text())["pid"]
    process.kill()
    process.wait()
    until(lambda: not statedir.is_alive(pid) and statedir.read_address(home) is None)
    os.close(statedir.lock(home, wait_s=5))
    assert not record.exists()  # ended in order, and verified
