"""What is under test, as processes: three simulated replicas on fixed ports, and `gateway up` before them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replicas.board import Board
from tests.chaos.client import REPLICAS, reply_text

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
YAML = """\
name: chaos
run: "true"
service:
  ports: 30000
  readiness_probe: {path: /health, timeout_seconds: 1, endpoint_probe_interval_seconds: 1,
    consecutive_failure_threshold_timeout: 3600, initial_delay_seconds: 3600}
  replica_policy: {min_replicas: 3, max_replicas: 3}
"""


class BedError(Exception):
    """The bed cannot be made, or does not recover."""


async def http(port: int, method: str, path: str, body: Any = None, seconds: float = 5.0) -> bytes:
    """One short call on a connection of its own; the body. Raises OSError for whatever goes wrong."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + b"\r\n" + data)
            answer = await reader.read()
        finally:
            writer.close()
    head_, _, rest = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head_.partition(b"\r\n")[0]:
        raise OSError(f"{path}: {head_[:60]!r}")
    return rest


async def until(what: str, condition: Callable[[], Any], seconds: float) -> None:
    """Wait for it. Raises BedError."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        if time.monotonic() > deadline:
            raise BedError(f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.05)


def environment() -> dict[str, str]:
    """Without the settings of a gateway that may run around this."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GATEWAY_", "PROMETHEUS_"))}
    return {**clean, "PYTHONPATH": str(ROOT)}


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


class Replica:
    """One simulated server, dead or alive. Mutable: `process`, `busy` (some fault has it)."""

    def __init__(self, name: str, port: int, folder: Path) -> None:
        self.name, self.port, self.folder = name, port, folder
        self.journal = folder / f"{name}.journal"
        self.process: subprocess.Popen[bytes] | None = None
        self.busy = False

    def start(self) -> None:
        command = [
            sys.executable, "-m", "replicas.simulator", "--port", str(self.port), "--model-path", "m",
            "--profile", "fast", "--startup", "provision=0,setup=0,download=0,load=0,warmup=0",
            "--skip-server-warmup", "--health-seconds", "0.05", "--log-level", "warning",
            "--max-running-requests", "64", "--reply", reply_text(self.name), "--journal", str(self.journal),
        ]  # fmt: skip
        with open(self.folder / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def fault(self, kind: str, count: float | None = None) -> None:
        """As POST /sim/fault; nothing where nobody answers."""
        with contextlib.suppress(OSError, TimeoutError):
            await http(self.port, "POST", "/sim/fault", {"kind": kind, "count": count})

    async def healthy(self) -> bool:
        with contextlib.suppress(OSError, TimeoutError):
            await http(self.port, "GET", "/health", seconds=1.0)
            return True
        return False

    async def heal(self) -> None:
        """Alive and without faults, whatever it was."""
        if self.alive:
            await self.fault("resume")
            for kind, number in (("slow", 1.0), ("drop", 0), ("tear", 0), ("queue-full", 0)):
                await self.fault(kind, number)
        if not await self.healthy():
            self.kill()
            self.start()
            await until(f"{self.name} healthy", self.healthy, 20)


class Bed:
    """Replicas and gateway in one folder. Mutable: `pids`, all processes that the gateway ever had."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.access = folder / "access.log"
        ports = free_ports(len(REPLICAS))
        self.replicas = [Replica(name, port, folder) for name, port in zip(REPLICAS, ports, strict=True)]
        self.gateway: subprocess.Popen[bytes] | None = None
        self.board: Board | None = None
        self.port = self.admin_port = 0
        self.pids: set[int] = set()

    def log(self) -> list[str]:
        """What the gateway printed."""
        return (self.folder / "gateway.log").read_text(errors="replace").splitlines()

    def _up(self) -> None:
        """`gateway up`."""
        file = self.folder / "chaos.yaml"
        file.write_text(YAML)
        urls = [word for r in self.replicas for word in ("--replica", f"http://127.0.0.1:{r.port}")]
        command = [
            sys.executable, "-m", "gateway", "up", str(file), "--provisioner", "static", *urls,
            "--workers", str(WORKERS), "--state-dir", str(self.state), "--port", "0", "--admin-port", "0",
            "--access-log", str(self.access), "--commit-after", "0.5", "--beat-every", "0.5",
            "--beat-after", "1", "--upstream-timeout", "3", "--probe-interval", "0.3",
        ]  # fmt: skip
        with open(self.folder / "gateway.log", "ab") as log:
            self.gateway = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
            )

    async def start(self) -> None:
        """Returns when three replicas are ready and the workers serve. Raises BedError."""
        for replica in self.replicas:
            replica.start()
        self._up()
        await until("the gateway serves", self._serves, 30)
        self.board = Board.open(self.state / "load.board")
        await self.all_ready()
        await until("the workers serve", lambda: sum("serves" in line for line in self.log()) >= WORKERS, 30)

    def _serves(self) -> bool:
        if self.gateway is None or self.gateway.poll() is not None:
            raise BedError(f"the gateway ended: {self.log()[-20:]}")
        try:
            record = json.loads((self.state / "gateway.json").read_text())
        except (OSError, ValueError):
            return False
        self.port = int(record["url"].rpartition(":")[2])
        self.admin_port = int(record["admin_url"].rpartition(":")[2])
        return True

    async def ready(self) -> int:
        """How many replicas the controller calls ready; -1: it does not answer."""
        try:
            status = json.loads(await http(self.admin_port, "GET", "/admin/status", seconds=3))
        except (OSError, TimeoutError, ValueError):
            return -1
        return sum(replica["state"] == "ready" for replica in status["services"][0]["replicas"])

    async def all_ready(self) -> None:
        async def looks() -> bool:
            return await self.ready() == len(self.replicas)

        await until("three replicas ready", looks, 60)

    async def metrics(self) -> str:
        return (await http(self.admin_port, "GET", "/metrics", seconds=20)).decode()

    def children(self) -> dict[int, str]:
        """The gateway's living processes: pid -> supervisor, controller or worker."""
        assert self.gateway is not None
        found = {self.gateway.pid: "supervisor"}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                line = (entry / "cmdline").read_bytes()
                if int(fields[1]) == self.gateway.pid and fields[0] not in "ZX":
                    found[int(entry.name)] = "controller" if b"gateway.admin" in line else "worker"
        self.pids |= set(found)
        return found

    def kill_one(self, role: str, pick: Callable[[list[int]], int]) -> bool:
        """SIGKILL one of the gateway's processes; whether there was one."""
        pids = sorted(pid for pid, its in self.children().items() if its == role)
        if not pids:
            return False
        os.kill(pick(pids), signal.SIGKILL)
        return True

    async def stop(self) -> int | None:
        """SIGTERM the gateway; its exit code, None where it did not end."""
        if self.gateway is None:
            return None
        if self.gateway.poll() is None:
            self.children()
            self.gateway.send_signal(signal.SIGTERM)
            with contextlib.suppress(BedError):
                await until("the gateway ends", lambda: self.gateway and self.gateway.poll() is not None, 40)
        return self.gateway.poll()

    def clean_up(self) -> None:
        """End whatever still runs."""
        for replica in self.replicas:
            replica.kill()
        if self.gateway is not None and self.gateway.poll() is None:
            self.gateway.kill()
            self.gateway.wait()
        if self.board is not None:
            self.board.close()
