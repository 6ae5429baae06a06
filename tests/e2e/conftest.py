"""A whole gateway as a person starts it: `gateway up` and replicas as processes, clients over TCP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from replicas.provisioners.launcher import started

T = TypeVar("T")
RECIPE_MODEL = "deepseek-ai/DeepSeek-R1-671B"  # what the recipe's own curl asks for

YAML = """\
name: e2e
secrets:
  REPLICA_API_KEY: null
run: |
  {before}
  exec "$PYTHON" -m replicas.simulator --host 127.0.0.1 --port $REPLICA_PORT \\
    --model-path deepseek-ai/DeepSeek-R1 --api-key "$REPLICA_API_KEY" --enable-metrics \\
    --startup {startup} --drain-tick 0.2 {flags}
service:
  ports: 30000
  readiness_probe:
    path: /health
    initial_delay_seconds: {initial_delay}
    endpoint_probe_interval_seconds: 1
  replica_policy:
    min_replicas: {min}
    max_replicas: {max}
"""


def eventually(condition: Callable[[], T], seconds: float = 30.0) -> T:
    """The first true value of `condition`. The limit is for a broken gateway, no promise about time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s; the last value was {value!r}")
        time.sleep(0.05)  # between two looks at another process


@dataclass
class Gateway:
    """One state dir and the gateway that runs on it, if any."""

    folder: Path
    file: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def start(self) -> None:
        """Start, and wait until it serves."""
        (self.state / "gateway.json").unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "gateway", "up", str(self.file), "--provisioner", "local",
            "--state-dir", str(self.state), "--port", "0", "--admin-port", "0",
            "--access-log", str(self.folder / "access.log"), *self.options,
        ]  # fmt: skip
        with open(self.folder / "gateway.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=clean_env()
            )
        eventually(self._serves)

    def _serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            self.url, self.admin_url = self.address["url"], self.address["admin_url"]
            return httpx.get(self.url + "/ready", timeout=2).status_code == 200 and bool(self.status())
        except (OSError, KeyError, ValueError, httpx.HTTPError):
            return False

    @property
    def address(self) -> dict[str, Any]:
        return dict(json.loads((self.state / "gateway.json").read_text()))

    def log(self) -> str:
        return (self.folder / "gateway.log").read_text(errors="replace")

    def access(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]

    def status(self) -> dict[str, Any]:
        return dict(httpx.get(self.admin_url + "/admin/status", timeout=10).raise_for_status().json())

    def service(self) -> dict[str, Any]:
        return dict(self.status()["services"][0])

    def replicas(self) -> list[dict[str, Any]]:
        return list(self.service()["replicas"])

    def ready(self) -> list[dict[str, Any]]:
        return [r for r in self.replicas() if r["state"] == "ready"]

    def children(self, module: str) -> list[int]:
        """Pids of the gateway's own processes that run `module`."""
        assert self.process is not None
        return [p for p in descendants(self.process.pid) if module in command_line(p)]

    def replica_processes(self) -> list[int]:
        """Pids of this gateway's replicas, by the record that each leaves in the state dir."""
        pids = []
        for record in self.state.glob("replicas/*/process.json"):
            with contextlib.suppress(OSError, ValueError):
                pid = json.loads(record.read_text())["pid"]
                if alive(pid):
                    pids.append(pid)
        return pids

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line against this gateway."""
        done = subprocess.run(
            [sys.executable, "-m", "gateway", *arguments],
            env={**clean_env(), "GATEWAY_STATE_DIR": str(self.state)},
            capture_output=True, text=True, timeout=60, check=False, cwd=self.folder,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}\n{self.log()}"
        return done

    def metrics(self) -> str:
        return httpx.get(self.admin_url + "/metrics", timeout=10).raise_for_status().text

    def kill(self) -> None:
        """SIGKILL the gateway's first process, as the kernel's OOM killer would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 40) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def clean_up(self) -> None:
        """End everything this test has started, whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(Exception):
                self.cli("down", check=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        for record in self.state.glob("replicas/*/process.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                known = json.loads(record.read_text())
                if started(known["pid"]) == known["started"]:
                    os.killpg(known["pid"], signal.SIGKILL)


def clean_env() -> dict[str, str]:
    """The environment without settings of a gateway that may run around the tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("GATEWAY_", "PROMETHEUS_"))}


def alive(pid: int) -> bool:
    """Whether the process runs (one that only waits to be reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Pids of all living processes below `pid`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            if alive(child):
                found.append(child)
            todo.append(child)
    return found


@pytest.fixture
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Gateway]]:
    """Makes and starts gateways: `gateway = gateways("--workers", "2", startup="load=5")`."""
    made: list[Gateway] = []

    def make(
        *options: str,
        startup: str = "load=1",
        flags: str = "",
        before: str = ":",
        min: int = 0,
        max: int = 2,
        initial_delay: float = 60,
    ) -> Gateway:
        folder = tmp_path_factory.mktemp("gw")  # short: unix socket paths are limited to 103 bytes
        file = folder / "e2e.yaml"
        file.write_text(
            YAML.format(
                startup=startup, flags=flags, before=before, min=min, max=max, initial_delay=initial_delay
            )
        )
        gateway = Gateway(folder, file, options)
        made.append(gateway)
        gateway.start()
        return gateway

    yield make
    for gateway in made:
        gateway.clean_up()


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[..., Any]:
    return eventually
