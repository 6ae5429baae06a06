"""A service to launch, a look at the processes that are really there, and a SkyPilot in memory."""
from __future__ import annotations

import asyncio
import enum
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replicas import spec
from replicas.provisioners.attendant import Attendant
from replicas.provisioners.local import LocalProvisioner
from replicas.provisioners.skypilot import SkyPilotProvisioner
from replicas.spec import Service

OWNER = "0badcafe"


@pytest.fixture
def owner() -> str:
    return OWNER


@pytest.fixture
def service() -> Callable[..., Service]:
    """Builds a service whose replica runs these scripts; by default one that sleeps until it is ended."""

    def build(
        run: str = "exec sleep 1000", setup: str = "", more: str = "", resources: str = "{ports: 30000}"
    ) -> Service:
        script = "\n".join(f"  {line}" for line in f"# --port 30000\n{run}".splitlines())
        text = (
            f"resources: {resources}\n"
            "service:\n"
            "  readiness_probe: /health\n"
            "  replica_policy: {min_replicas: 0, max_replicas: 2}\n"
            f"{more}\n"
            f"run: |\n{script}\n"
        )
        if setup:
            text += "setup: |\n" + "\n".join(f"  {line}" for line in setup.splitlines()) + "\n"
        return spec.parse(text, "tiny.yaml")

    return build


def commands_under(folder: Path) -> dict[int, str]:
    """pid -> command line of every process whose REPLICA_DIR is in the folder (Linux: by /proc)."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if b"REPLICA_DIR=" + os.fsencode(folder) in Path(f"/proc/{name}/environ").read_bytes():
                    found[int(name)] = Path(f"/proc/{name}/cmdline").read_text().replace("\0", " ")
    return found


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[[], dict[int, str]]]:
    """What runs for the replicas of this test, by the kernel's word. Nothing may be left at its end."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("looks at processes through /proc")
    yield lambda: commands_under(tmp_path)
    left = commands_under(tmp_path)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == {}


@pytest.fixture
async def local(tmp_path: Path, running: object) -> AsyncIterator[Callable[..., LocalProvisioner]]:
    """Builds local provisioners on this test's state folder; at the end all their replicas are terminated."""
    made: dict[str, list[LocalProvisioner]] = {}

    def build(owner: str = OWNER, *, grace: float = 5.0, price: float | None = None) -> LocalProvisioner:
        provisioner = LocalProvisioner(tmp_path, owner, grace=grace, price=price)
        made.setdefault(owner, []).append(provisioner)
        return provisioner

    yield build
    for owner in list(made):
        last = build(owner)
        for replica_id in await last.instances():
            await last.terminate(replica_id)
        for provisioner in made[owner]:
            await provisioner.close()


@pytest.fixture
def eventually(
    request: pytest.FixtureRequest,
) -> Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]:
    """Waits for something that a real process does in its own time; 20 s is for a very busy machine."""
    limit = 120 if request.node.get_closest_marker("sky") else 20

    async def wait(condition: Callable[[], Awaitable[object]]) -> None:
        deadline = time.monotonic() + limit
        while not await condition():
            assert time.monotonic() < deadline, f"did not happen within {limit} s"
            await asyncio.sleep(0.01)

    return wait



class Mode(enum.Enum):
    NONE = "none"
    AUTO = "auto"


class Unavailable(Exception):
    def __init__(self, message: str, failover_history: list[Exception] | None = None) -> None:
        super().__init__(message)
        self.failover_history = failover_history or []


class GoneError(ValueError):
    """ClusterDoesNotExist is a ValueError."""


def kind(name: str, base: type[Exception] = Exception) -> type[Exception]:
    return type(name, (base,), {})


@dataclass
class Resources:
    price: float = 30.0

    def get_cost(self, seconds: float) -> float:
        return self.price * seconds / 3600


@dataclass
class Cluster:
    """What sky.status returns for one (sky/schemas/api/responses.py: StatusResponse), as far as we look."""

    name: str
    status: SimpleNamespace
    init_kind: str | None = None
    init_status_reason: str | None = None
    last_event: str | None = None
    cluster_ever_up: bool = False
    handle: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            launched_resources=Resources(),
            launched_nodes=2,
            head_ip="10.0.0.1",   # on Slurm the login host's
            stable_internal_external_ips=[("10.0.0.11", "10.0.0.1"), ("10.0.0.12", "10.0.0.1")],
        )
    )

    def become(self, status: str, kind: str | None = None, why: str | None = None) -> None:
        self.status, self.init_kind, self.init_status_reason = SimpleNamespace(value=status), kind, why
        self.cluster_ever_up = self.cluster_ever_up or status == "UP"


class FakeSky:
    """SkyPilot's SDK, its API server and a cloud, in memory: what facts the provisioner relies on, no more.

    Launches are executed by the server: they go on when nobody waits for them. Cancelling one leaves what it
    has made. `status` is a cache: a preemption shows after a refresh.
    """

    StatusRefreshMode = Mode
    exceptions = SimpleNamespace(
        ResourcesUnavailableError=Unavailable,
        ClusterDoesNotExist=GoneError,
        RequestCancelled=kind("RequestCancelled"),
        **{
            name: kind(name)
            for name in (
                *("NoCloudAccessError", "NotSupportedError", "InvalidClusterNameError", "CloudError"),
                *("ClusterOwnerIdentityMismatchError", "CloudUserIdentityError", "CommandError"),
                *("ApiServerAuthenticationError", "APIVersionMismatchError", "ApiServerConnectionError"),
            )
        },
        InvalidSkyPilotConfigError=kind("InvalidSkyPilotConfigError", ValueError),
    )

    def __init__(self) -> None:
        self.clusters: dict[str, Cluster] = {}
        self.preempted: set[str] = set()             # gone, and not yet noticed
        self.requests: dict[str, SimpleNamespace] = {}
        self.results: dict[str, Any] = {}
        self.launched: list[dict[str, Any]] = []      # the arguments of each launch
        self.tasks: list[dict[str, Any]] = []         # the arguments of each Task.from_yaml_config
        self.refreshes = 0
        self.may_finish = threading.Event()           # launches wait for it
        self.may_finish.set()
        self.submitting = threading.Event()           # submitting a launch waits for it
        self.submitting.set()
        self.launch_fails: list[Exception] = []
        self.leaves_machines = False                  # by a launch that fails
        self.refuses_ports: Exception | None = None   # as a cloud that cannot open any
        self.down_fails: list[Exception] = []
        self.down_does_nothing = 0
        self.status_fails: Exception | None = None
        self.exposed: dict[int, str] = {30000: "10.0.0.5:30000"}
        self.printed = "Fetching 4 files:  50%|##   | 2/4\n"
        self.run_ended: dict[str, int] = {}
        self.closing = threading.Event()
        self.Task = SimpleNamespace(from_yaml_config=self._task)

    def _task(self, config: dict[str, Any], **overrides: Any) -> dict[str, Any]:
        self.tasks.append({"config": dict(config), **overrides})
        task = dict(config)
        config.clear()   # as the real one does
        return task

    def _request(self, result: Any) -> str:
        name = f"request-{len(self.results)}"
        self.results[name] = result
        return name

    def launch(self, task: Any, **arguments: Any) -> str:
        self.submitting.wait(10)
        if self.refuses_ports and "ports" in str(task["resources"]):
            raise self.refuses_ports
        name = arguments["cluster_name"]
        self.launched.append(arguments)
        self.clusters.setdefault(name, Cluster(name, SimpleNamespace(value="INIT"), "launching"))
        request = self._request(None)
        self.requests[request] = SimpleNamespace(
            request_id=request, name="sky.launch", cluster_name=name, status="RUNNING", job=False
        )
        return request

    def stream_and_get(self, request_id: str, *, output_stream: Any) -> Any:
        request = self.requests[request_id]
        output_stream.write("⚙︎ Launching on AWS us-east-1.\n")
        output_stream.flush()
        while not self.may_finish.wait(0.005) and request.status == "RUNNING":
            pass
        if request.status == "CANCELLED":
            raise self.exceptions.RequestCancelled("Request was cancelled")
        request.status = "SUCCEEDED"
        if self.launch_fails:
            if not self.leaves_machines:
                del self.clusters[request.cluster_name]
            raise self.launch_fails.pop(0)
        self.clusters[request.cluster_name].become("UP")
        request.job = True
        return (1, None)

    def get(self, request_id: str) -> Any:
        result = self.results[request_id]
        if isinstance(result, Exception):
            raise result
        return result

    def status(self, cluster_names: list[str] | None, *, refresh: Mode) -> str:
        if self.status_fails:
            raise self.status_fails
        if refresh is Mode.AUTO:
            self.refreshes += 1
            for name in self.preempted:
                self.clusters.pop(name, None)
        return self._request(
            [c for c in self.clusters.values() if cluster_names is None or c.name in cluster_names]
        )

    def endpoints(self, cluster: str) -> str:
        if self.refuses_ports:
            error = ValueError(f"Querying endpoints is not supported for {cluster!r} on Slurm.")
            return self._request(error)
        return self._request(dict(self.exposed))

    def api_status(self, *, cluster_name: str) -> list[Any]:
        return [r for r in self.requests.values() if r.status == "RUNNING"]

    def api_cancel(self, request_ids: list[str], *, silent: bool) -> str:
        for request in request_ids:
            self.requests[request].status = "CANCELLED"
        return self._request(request_ids)

    def queue(self, cluster_name: str) -> str:
        """Its jobs: one for each launch that succeeded."""
        done = [r for r in self.requests.values() if r.cluster_name == cluster_name and r.job]
        return self._request(done)

    def down(self, cluster_name: str) -> str:
        if self.down_fails:
            return self._request(self.down_fails.pop(0))
        if self.down_does_nothing:
            self.down_does_nothing -= 1
            return self._request(None)
        if self.clusters.pop(cluster_name, None) is None:
            return self._request(GoneError(f"Cluster {cluster_name} does not exist"))
        return self._request(None)

    def tail_logs(
        self, cluster_name: str, job_id: object, follow: bool, tail: int, output_stream: Any
    ) -> int:
        output_stream.write(self.printed)
        output_stream.flush()
        while not self.closing.wait(0.005) and cluster_name in self.clusters:
            if cluster_name in self.run_ended:
                return self.run_ended[cluster_name]
        raise self.exceptions.ApiServerConnectionError("closed")


@pytest.fixture
def fake_sky(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSky]:
    monkeypatch.setattr("replicas.provisioners.attendant.PAUSE_SECONDS", 0.01)
    fake = FakeSky()
    yield fake
    fake.clusters.clear()
    fake.closing.set()
    fake.may_finish.set()
    fake.submitting.set()
    for thread in threading.enumerate():
        if thread.daemon and thread.name.startswith(("attendant", "skypilot")):
            if isinstance(thread, Attendant):
                thread.stop()
            thread.join(10)


class Clock:
    """Seconds that pass only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def skypilot(fake_sky: FakeSky, tmp_path: Path, clock: Clock) -> Callable[..., SkyPilotProvisioner]:
    """Builds SkyPilot provisioners over one fake SkyPilot."""

    def build(owner: str = OWNER) -> SkyPilotProvisioner:
        return SkyPilotProvisioner(tmp_path, owner, sky=lambda: fake_sky, clock=clock, sleep=clock.sleep)

    return build


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Callable[..., SkyPilotProvisioner]]:
    """Builds provisioners over the real SkyPilot of tests/e2e/sky; at the end all their clusters are gone."""
    if "SKYGATE_BED" not in os.environ:
        pytest.fail("needs the bed: `make test-sky`")
    made: dict[str, list[SkyPilotProvisioner]] = {}

    def build(owner: str = OWNER) -> SkyPilotProvisioner:
        made.setdefault(owner, []).append(SkyPilotProvisioner(tmp_path, owner))
        return made[owner][-1]

    yield build
    for owner in list(made):
        last = build(owner)
        await asyncio.gather(*(last.terminate(replica) for replica in await last.instances()))
        assert await last.instances() == {}
