"""The engines of the contract: the simulator always, a real SGLang where `-m sglang` asks for it."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from replicas.simulator import SimConfig, Simulator
from tests.e2e.conftest import Gateway, command_line, descendants, eventually
from tests.sglang.contract import CONTEXT
from tests.sglang.install import fault, home

KEY = "sk-contract"
SLOTS = 8  # --max-running-requests
QUEUED = 30  # --max-queued-requests
START_SECONDS = 280  # a start takes 20 to 60 s; 119 s were seen with 30 other processes on two cores

LIKE_THE_REAL_ONE = SimConfig(
    model_path="tiny",
    api_key=KEY,
    context_length=CONTEXT,
    max_running=SLOTS,
    max_queued=QUEUED,
    kv_tokens=8192,
    enable_metrics=True,
    speedup=0.25,  # 4 ms a token, as the real one on a quiet machine
    reply="A tiny model with random weights wrote this text.",
)


@dataclass(frozen=True)
class Engine:
    """One engine to talk to, without TLS. `real`: not the simulator."""

    port: int
    key: str
    real: bool


@dataclass
class Replica:
    """A real SGLang as the one replica of a gateway. `health`: what its port said while it started, each
    different answer once, with the seconds since the launch.
    """

    gateway: Gateway
    health: list[tuple[float, str]] = field(default_factory=list)
    first_answer: httpx.Response | None = None  # of the request that launched it

    @property
    def url(self) -> str:
        return str(self.gateway.replicas()[0]["url"])

    @property
    def engine(self) -> Engine:
        return Engine(urlsplit(self.url).port or 0, KEY, real=True)

    def get(self, path: str) -> httpx.Response:
        """From the engine itself, not through the gateway."""
        key = {"authorization": f"Bearer {KEY}"}
        return httpx.get(self.url + path, headers=key, timeout=30, verify=unverified())

    def post(self, path: str, **body: Any) -> httpx.Response:
        key = {"authorization": f"Bearer {KEY}"}
        return httpx.post(self.url + path, headers=key, json=body, timeout=60, verify=unverified())

    def loads(self) -> dict[str, Any]:
        return dict(self.get("/v1/loads?include=core").json()["loads"][0])

    def aborted(self) -> float:
        """`sglang:num_aborted_requests_total`, summed."""
        lines = self.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("sglang:num_aborted_requests_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def log(self) -> str:
        (output,) = self.gateway.state.glob("replicas/*/output.log")
        return output.read_text(errors="replace")

    def pid(self) -> int:
        """Of SGLang's first process."""
        (launcher,) = self.gateway.replica_processes()
        (pid,) = [p for p in (launcher, *descendants(launcher)) if "engine/launch.py" in command_line(p)]
        return pid

    def idle(self) -> None:
        """Wait until nothing runs or waits there."""
        eventually(lambda: self.loads()["num_running_reqs"] + self.loads()["num_waiting_reqs"] == 0)

    def watch(self, launched: float) -> None:
        """Note what /health says until it says 200."""
        while not self.health or self.health[-1][1] != "200":
            said = health(self.gateway)
            if said and (not self.health or self.health[-1][1] != said):
                self.health.append((round(time.monotonic() - launched, 1), said))
            if time.monotonic() - launched > START_SECONDS:
                return
            time.sleep(0.02)  # between two looks at another process


def unverified() -> ssl.SSLContext:
    """For the tests' own looks at an engine whose certificate the gateway has made."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def health(gateway: Gateway) -> str:
    """"refused", or the status of /health; nothing when there is no replica yet, or no answer."""
    for record in gateway.state.glob("replicas/*/process.json"):
        with suppress(OSError, ValueError, KeyError):
            port = json.loads(record.read_text())["port"]
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5):
                    pass
                scheme = "https" if "tls" in gateway.options else "http"
                url = f"{scheme}://127.0.0.1:{port}/health"
                return str(httpx.get(url, timeout=30, verify=unverified()).status_code)
            except ConnectionRefusedError:
                return "refused"
            except httpx.HTTPError:
                return ""
    return ""


class Stage:
    """One real engine at a time (1.5 GB): starting another one ends the last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._playing: tuple[str, Replica] | None = None

    def play(self, name: str, *options: str) -> Replica:
        """The gateway called `name` with its replica ready; started if it is not the one that plays."""
        if self._playing is None or self._playing[0] != name:
            self.end()
            folder = self._folder / name
            folder.mkdir()
            file = Path(__file__).with_name("sglang.yaml")
            gateway = Gateway(folder, file, ("--replica-api-key", KEY, "--model", "tiny", *options))
            self._playing = name, Replica(gateway)
            gateway.start()
            self._launch(self._playing[1])
        return self._playing[1]

    def _launch(self, replica: Replica) -> None:
        launched = time.monotonic()
        watcher = threading.Thread(target=replica.watch, args=(launched,), daemon=True)
        watcher.start()
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        url = replica.gateway.url + "/v1/chat/completions"
        replica.first_answer = httpx.post(url, json=body, timeout=START_SECONDS)
        assert replica.first_answer.status_code == 200, replica.first_answer.text + replica.gateway.log()
        watcher.join(30)

    def end(self) -> None:
        if self._playing is not None:
            self._playing[1].gateway.clean_up()
            self._playing = None


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    if wrong := fault(home()):
        pytest.fail(f"no SGLang in {home()}: {wrong}; run tests/sglang/install.py", pytrace=False)
    flags = f"--max-running-requests {SLOTS} --max-queued-requests {QUEUED}"
    os.environ |= {"SKYGATE_SGLANG": str(home()), "SGLANG_FLAGS": flags}
    made = Stage(tmp_path_factory.mktemp("sg"))
    yield made
    made.end()


@pytest.fixture
def behind_gateway(stage: Stage) -> Replica:
    """A gateway and its replica, which speak without TLS; idle."""
    replica = stage.play("plain")
    replica.idle()
    return replica


@pytest.fixture(params=["simulator", pytest.param("sglang", marks=pytest.mark.sglang)])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """Both, with the same settings."""
    if request.param == "sglang":
        replica: Replica = request.getfixturevalue("stage").play("plain")
        yield replica.engine
        return
    async with Simulator(LIKE_THE_REAL_ONE) as simulator:
        yield Engine(simulator.port, KEY, real=False)
