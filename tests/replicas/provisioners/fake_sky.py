"""SkyPilot's SDK, its API server and a cloud, in memory."""
from __future__ import annotations

import enum
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


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
