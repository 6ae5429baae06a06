"""SkyPilot's SDK, its API server and a cloud, in memory."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from .fake_server import VERSION, FakeServer
from .sky_exceptions import real_exceptions
from .sky_records import Cluster, Mode, Request, WaitFor


class FakeSky:
    """What facts of SkyPilot 0.14.1 the provisioner relies on, no more; the bed keeps it honest.

    Launches are executed by the server: they go on when nobody waits for them. Cancelling one leaves what it
    has made, and so does a restart of the server, which forgets all requests. `status` is a cache: what the
    cloud did shows after a refresh. `machines` is the truth: the names that bill.
    """

    StatusRefreshMode = Mode
    __version__ = VERSION
    skylet = SimpleNamespace(autostop_lib=SimpleNamespace(AutostopWaitFor=WaitFor))

    def __init__(self) -> None:
        self.exceptions: Any = real_exceptions()
        self.clusters: dict[str, Cluster] = {}        # ~/.sky
        self.machines: set[str] = set()               # the cloud
        self.unnoticed: dict[str, tuple[str, str | None, str | None] | None] = {}  # None: gone
        self.autostops = True                         # AUTO refreshes clusters that have an autostop
        self.requests: dict[str, Request] = {}
        self.results: dict[str, Any] = {}
        self.launched: list[dict[str, Any]] = []      # the arguments of each launch
        self.tasks: list[dict[str, Any]] = []         # the arguments of each Task.from_yaml_config
        self.refreshes = 0
        self.asked: list[tuple[list[str] | None, Mode]] = []
        self.downed: list[str] = []
        self.may_finish = threading.Event()           # launches wait for it
        self.may_finish.set()
        self.submitting = threading.Event()           # submitting a launch waits for it
        self.submitting.set()
        self.submit_fails: list[Exception] = []
        self.launch_fails: list[Exception] = []
        self.answers_lost = 0                         # launches that it takes on, and dies before it says so
        self.leaves_machines = False                  # by a launch that fails
        self.refuses_ports: Exception | None = None   # as a cloud that cannot open any
        self.down_fails: list[Exception] = []
        self.down_does_nothing = 0
        self.status_fails: Exception | None = None
        self.api_down = False
        self.server = SimpleNamespace(common=FakeServer(lambda: not self.api_down))
        self.armed: list[tuple[str, int, WaitFor, bool]] = []   # the arguments of each autostop
        self.autostop_fails: list[Exception] = []
        self.refuses_labels: Exception | None = None
        self.exposed: dict[int, str] = {30000: "10.0.0.5:30000"}
        self.endpoints_fail: Exception | None = None
        self.printed = "Fetching 4 files:  50%|##   | 2/4\n"
        self.provisioned: dict[int | None, str] = {}  # logs by worker; None: the head's
        self.logs_hang = False                        # a machine that does not answer any more
        self.run_ended: dict[str, int] = {}
        self.tailed: set[str] = set()                 # clusters whose output is being followed
        self.closing = threading.Event()
        self.Task = SimpleNamespace(from_yaml_config=self._task)
        self._ever: list[Request] = []                # all launches, those from before a restart too
        self._held: list[Callable[[], bool]] = []     # one for each thread that a test holds up in here
        self._numbers = 0
        self._lock = threading.RLock()

    # what a test does to it

    def unavailable(self, says: str, tried: list[Exception] | None = None) -> Exception:
        error: Exception = self.exceptions.ResourcesUnavailableError(says, failover_history=tried)
        return error

    def command_error(self, says: str, code: int = 255) -> Exception:
        """A command on a machine failed over ssh; 255: it could not be reached."""
        error: Exception = self.exceptions.CommandError(code, "bash setup.sh", says, None)
        return error

    def error(self, name: str, says: str) -> Exception:
        """SkyPilot's exception of that name."""
        if name == "CommandError":
            return self.command_error(says)
        arguments = (says, "AWS", "ClientError") if name == "CloudError" else (says,)
        error: Exception = getattr(self.exceptions, name)(*arguments)
        return error

    def held(self) -> int:
        """Threads that wait in here for something that the test has not done yet."""
        return sum(waits() for waits in list(self._held))

    def jobs(self, name: str) -> int:
        """How often `run` was submitted to this cluster."""
        return sum(r.cluster_name == name and r.job for r in self._ever)

    def lose(self, name: str, status: str = "", kind: str | None = None, why: str | None = None) -> None:
        """The cloud takes the machines or, with a status, leaves something of them; seen after a refresh."""
        self.unnoticed[name] = (status, kind, why) if status else None
        if not status:
            self.machines.discard(name)

    def forget_all(self) -> None:
        """`~/.sky` is wiped: nothing is known of what bills."""
        self.clusters.clear()

    def restart(self) -> None:
        """The API server dies and comes back: no request is known any more, and no launch goes on."""
        with self._lock:
            for request in self.requests.values():
                if request.status == "RUNNING":
                    request.status = "LOST"
            self.requests.clear()
            self.results.clear()

    @contextmanager
    def holding(self, waits: Callable[[], bool]) -> Iterator[None]:
        """This thread waits for the test for as long as that is true."""
        self._held.append(waits)
        try:
            yield
        finally:
            self._held.remove(waits)

    # the API server

    def _reach(self) -> None:
        if self.api_down:
            raise self.exceptions.ApiServerConnectionError("http://127.0.0.1:46580")
        self._work()

    def _work(self) -> None:
        """What the server has done by now, of its own accord."""
        with self._lock:
            if not self.may_finish.is_set():
                return
            for request in self.requests.values():
                if request.status == "RUNNING":
                    self._finish(request)

    def _finish(self, request: Request) -> None:
        name = request.cluster_name
        if self.launch_fails:
            request.status, request.error = "FAILED", self.launch_fails.pop(0)
            if not self.leaves_machines:
                self.clusters.pop(name, None)
                self.machines.discard(name)
            return
        request.status, request.job = "SUCCEEDED", True
        self.machines.add(name)
        self.clusters.setdefault(name, Cluster(name, SimpleNamespace(value="INIT"))).become("UP")

    def _request(self, result: Any) -> str:
        with self._lock:
            self._numbers += 1
            name = f"request-{self._numbers}"
            self.results[name] = result
            return name

    def _unknown(self, request_id: str) -> RuntimeError:
        said = f'{{"detail":"Request {request_id!r} not found"}}'
        return RuntimeError(f"Failed to get request {request_id}: 404 {said}")

    # the SDK

    def _task(self, config: dict[str, Any], **overrides: Any) -> dict[str, Any]:
        self.tasks.append({"config": dict(config), **overrides})
        task = dict(config)
        config.clear()   # as the real one does
        return task

    def launch(self, task: Any, **arguments: Any) -> str:
        self._reach()
        with self.holding(lambda: not self.submitting.is_set()):
            self.submitting.wait(10)
        self._reach()
        if self.submit_fails:
            raise self.submit_fails.pop(0)
        if self.refuses_ports and "ports" in str(task["resources"]):
            raise self.refuses_ports
        if self.refuses_labels and "labels" in task["resources"]:
            raise self.refuses_labels
        name = arguments["cluster_name"]
        with self._lock:
            self.launched.append(arguments)
            self.machines.add(name)
            self.clusters.setdefault(name, Cluster(name, SimpleNamespace(value="INIT"), "launching"))
            request = Request(self._request(None), name)
            self.requests[request.request_id] = request
            self._ever.append(request)
            if self.answers_lost:
                self.answers_lost -= 1
                raise self.exceptions.ApiServerConnectionError("http://127.0.0.1:46580")
        return request.request_id

    def stream_and_get(self, request_id: str, *, output_stream: Any) -> Any:
        self._reach()
        request = self.requests.get(request_id)
        if request is None:
            raise self._unknown(request_id)
        output_stream.write("⚙︎ Launching on AWS us-east-1.\n")
        output_stream.flush()

        def waits() -> bool:
            return not self.may_finish.is_set() and request.status == "RUNNING" and not self.api_down

        with self.holding(waits):
            while waits():
                self.may_finish.wait(0.005)
        if request.status == "LOST":
            raise self.exceptions.RequestInterruptedError(f"Request {request_id} was interrupted")
        self._reach()
        if request.status == "CANCELLED":
            raise self.exceptions.RequestCancelled("Current 'sky.launch' request is cancelled")
        if request.error is not None:
            raise request.error
        return (1, None)

    def get(self, request_id: str) -> Any:
        self._reach()
        if request_id not in self.results:
            raise self._unknown(request_id)
        result = self.results[request_id]
        if isinstance(result, Exception):
            raise result
        return result

    def status(self, cluster_names: list[str] | None, *, refresh: Mode) -> str:
        self._reach()
        if self.status_fails:
            raise self.status_fails
        with self._lock:
            self.asked.append((cluster_names, refresh))
            if refresh is Mode.FORCE or (refresh is Mode.AUTO and self.autostops):
                self.refreshes += 1
                self._refresh(cluster_names)
            found = [c for c in self.clusters.values() if cluster_names is None or c.name in cluster_names]
            return self._request(found)

    def _refresh(self, names: list[str] | None) -> None:
        for name in [name for name in self.unnoticed if names is None or name in names]:
            now = self.unnoticed.pop(name)
            if now is None:
                self.clusters.pop(name, None)
            elif name in self.clusters:
                self.clusters[name].become(*now)

    def autostop(self, cluster_name: str, idle_minutes: int, *, wait_for: WaitFor, down: bool) -> str:
        self._reach()
        self.armed.append((cluster_name, idle_minutes, wait_for, down))
        return self._request(self.autostop_fails.pop(0) if self.autostop_fails else None)

    def endpoints(self, cluster: str) -> str:
        self._reach()
        found = self.clusters.get(cluster)
        if found is None or found.status.value != "UP":
            status = None if found is None else found.status
            return self._request(self.exceptions.ClusterNotUpError(f"{cluster} is not up", status))
        if self.endpoints_fail:
            return self._request(self.endpoints_fail)
        if self.refuses_ports:
            error = ValueError(f"Querying endpoints is not supported for {cluster!r} on Slurm.")
            return self._request(error)
        return self._request(dict(self.exposed))

    def api_status(self, *, cluster_name: str) -> list[Any]:
        self._reach()
        return [r for r in list(self.requests.values()) if r.status == "RUNNING"]

    def api_cancel(self, request_ids: list[str], *, silent: bool) -> str:
        self._reach()
        for request in request_ids:
            self._cancel(self.requests[request])
        return self._request(request_ids)

    def _cancel(self, request: Request) -> None:
        with self._lock:
            if request.status == "RUNNING":
                request.status = "CANCELLED"

    def queue(self, cluster_name: str) -> str:
        """Its jobs: one for each launch that got so far."""
        self._reach()
        return self._request([r for r in self._ever if r.cluster_name == cluster_name and r.job])

    def down(self, cluster_name: str) -> str:
        self._reach()
        with self._lock:
            self.downed.append(cluster_name)
            for request in self.requests.values():   # as the real one does
                if request.cluster_name == cluster_name:
                    self._cancel(request)
            if self.down_fails:
                return self._request(self.down_fails.pop(0))
            if self.down_does_nothing:
                self.down_does_nothing -= 1
                return self._request(None)
            if self.clusters.pop(cluster_name, None) is None:
                gone = self.exceptions.ClusterDoesNotExist(f"Cluster {cluster_name} does not exist")
                return self._request(gone)
            self.machines.discard(cluster_name)
            return self._request(None)

    def appear(self, name: str) -> None:
        """A launch that was cancelled got a machine after all."""
        self.machines.add(name)
        self.clusters[name] = Cluster(name, SimpleNamespace(value="INIT"), "launching")

    def tail_logs(
        self, cluster_name: str, job_id: object, follow: bool, tail: int, output_stream: Any
    ) -> int:
        self._reach()
        if not follow and self.logs_hang:
            self.closing.wait(10)
        output_stream.write(self.printed)
        output_stream.flush()
        if not follow:
            return 0
        self.tailed.add(cluster_name)
        try:
            while not self.closing.wait(0.005) and cluster_name in self.clusters and not self.api_down:
                if cluster_name in self.run_ended:
                    return self.run_ended[cluster_name]
        finally:
            self.tailed.discard(cluster_name)
        raise self.exceptions.ApiServerConnectionError("http://127.0.0.1:46580")

    def tail_provision_logs(
        self, cluster_name: str, worker: int | None, follow: bool, tail: int, output_stream: Any
    ) -> int:
        """A file of the API server; the head's is also known when the cluster is gone."""
        self._reach()
        text = self.provisioned.get(worker)
        if text is None:
            raise self.command_error("Provision log path is not recorded for this cluster.")
        output_stream.write(text)
        output_stream.flush()
        while follow and not self.may_finish.is_set() and not self.closing.wait(0.005):
            pass
        return 0
