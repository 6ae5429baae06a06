"""Replicas as SkyPilot clusters: one cluster per replica, its name the replica's id, launched once.

The untyped world ends here, and SkyPilot is imported only here, inside a function: `import sky` takes 4 s and
160 MB. Its SDK blocks (its async one too, with the API server down for 13 s), so every call runs in a thread;
daemon threads, for an executor's are joined when Python exits, and a launch may wait for hours.

What SkyPilot 0.14.1 does and a reader would not expect:
* A launch is executed by the API server and outlives us. Cancelling it ends its worker, never its machines:
  only `down` does, and the cluster is gone when `status` no longer lists it.
* Launching an existing name submits `run` a second time, onto the same port. So: look first, launch once.
* `retry_until_up` retries for ever, with no reasons and no deadline. We try once; the controller tries again.
* Slurm opens no ports and refuses a task that names some, although its nodes can be reached: so ask again
  without, and dial the head node by its own address (attendant.py).
* Status is a cache. A refresh asks the cloud, for each cluster, and costs seconds: every REFRESH_SECONDS.
"""
from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from replicas import plans
from replicas.plans import Plan
from replicas.provisioners import (
    YAML_DECIDES,
    Instance,
    InstancesUnknown,
    LaunchError,
    TerminateError,
    folder,
    launcher,
    owned_by,
)
from replicas.provisioners.attendant import Attendant
from replicas.provisioners.sky_errors import cannot_open_ports, launch_error, reason

if TYPE_CHECKING:
    from replicas.spec import Service

log = logging.getLogger(__name__)

T = TypeVar("T")

REFRESH_SECONDS = 20.0         # so a preemption is noticed within this, plus a tick
AUTODOWN_IDLE_MINUTES = 30     # from the end of `run` (a crash) to SkyPilot's own teardown, should we be dead
DOWN_SECONDS = 600.0           # from the first `down` to giving up for now
DOWN_PAUSE_SECONDS = 5.0
_ACTIVE = ("PENDING", "WAITING", "RUNNING")   # sky.server.requests.requests.RequestStatus, unfinished


class Sky(Protocol):
    """The functions of the package `sky` that we use; all but `get`, `stream_and_get` and the last two return
    the id of a request, whose result `get` waits for."""

    Task: Any
    StatusRefreshMode: Any
    exceptions: Any

    def launch(
        self, task: Any, *, cluster_name: str, retry_until_up: bool, idle_minutes_to_autostop: int, down: bool
    ) -> str: ...
    def status(self, cluster_names: list[str] | None, *, refresh: Any) -> str: ...
    def endpoints(self, cluster: str) -> str: ...
    def down(self, cluster_name: str) -> str: ...
    def queue(self, cluster_name: str) -> str: ...
    def api_cancel(self, request_ids: list[str], *, silent: bool) -> str: ...
    def get(self, request_id: str) -> Any: ...
    def stream_and_get(self, request_id: str, *, output_stream: Any) -> Any: ...
    def api_status(self, *, cluster_name: str) -> list[Any]: ...
    def tail_logs(
        self, cluster_name: str, job_id: int | None, follow: bool, tail: int, output_stream: Any
    ) -> int: ...


def import_sky() -> Sky:
    """The real one, without telemetry (Loki, and a ping that costs 1 s per call)."""
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    import sky

    logging.getLogger("alembic").setLevel(logging.WARNING)   # its tables' migrations
    # `api_status` complains of an old server in every thread that has not asked another thing before.
    logging.getLogger("sky.client.sdk").addFilter(lambda record: "flag is ignored" not in record.getMessage())
    return sky  # type: ignore[no-any-return]


class SkyPilotProvisioner:
    """Provisioner of clusters. `sky` makes the SDK, in a thread, on first use."""

    def __init__(
        self,
        state_dir: Path,
        owner: str,
        *,
        sky: Callable[[], Sky] = import_sky,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._root = Path(state_dir).resolve() / "replicas"
        self._owner = owner
        self._make_sky = sky
        self._clock = clock
        self._sleep = sleep
        self._importing = threading.Lock()
        self._sky: Sky | None = None
        # Mutable under the lock of the id, which a launch keeps until it is submitted (with file mounts:
        # minutes), so that none can follow its terminate.
        self._locks: dict[str, threading.Lock] = {}
        self._terminated: set[str] = set()
        self._broken: set[str] = set()   # their last launch failed: a refresh may call what it left UP
        self._launching: dict[str, folder.Output] = {}
        # Mutable by `instances` alone, one at a time.
        self._looking = threading.Lock()
        self._refreshed = float("-inf")
        self._attendants: dict[str, Attendant] = {}

    def __repr__(self) -> str:
        return f"<SkyPilotProvisioner owner={self._owner} launching={len(self._launching)}>"

    async def launch(
        self, replica_id: str, service: Service, env: Mapping[str, str], plan: Plan = YAML_DECIDES
    ) -> None:
        """See Provisioner. One round over all candidates of the plan: minutes, longer with file mounts."""
        await _in_thread(lambda: self._launch(replica_id, service, env, plan))

    async def terminate(self, replica_id: str) -> None:
        """See Provisioner. Cancel, down, look; again until it is no longer listed, for up to 10 minutes."""
        await _in_thread(lambda: self._terminate(replica_id))

    async def instances(self) -> dict[str, Instance]:
        """See Provisioner. Never waits for a launch or an endpoint."""
        return await _in_thread(self._instances)

    async def close(self) -> None:
        """See Provisioner. Threads that wait for SkyPilot end with the process."""

    def _sdk(self) -> Sky:
        with self._importing:
            if self._sky is None:
                self._sky = self._make_sky()
            return self._sky

    def _lock(self, replica_id: str) -> threading.Lock:
        return self._locks.setdefault(replica_id, threading.Lock())

    def _launch(self, replica_id: str, service: Service, env: Mapping[str, str], plan: Plan) -> None:
        if not owned_by(replica_id, self._owner):
            raise LaunchError(f"{replica_id} is not a name of this gateway (owner {self._owner})")
        sky = self._sdk()
        directory = self._root / replica_id
        try:
            with self._lock(replica_id):
                request = self._submit(sky, replica_id, directory, service, env, plan)
                if request is None:
                    return
                self._launching[replica_id] = folder.Output(directory)
            try:
                with open(directory / launcher.LOG, "a", opener=folder.private) as out:
                    sky.stream_and_get(request, output_stream=out)
            finally:
                del self._launching[replica_id]
            self._broken.discard(replica_id)
        except LaunchError:
            raise
        except Exception as error:
            self._broken.add(replica_id)
            raise launch_error(sky.exceptions, error) from error

    def _submit(
        self,
        sky: Sky,
        replica_id: str,
        directory: Path,
        service: Service,
        env: Mapping[str, str],
        plan: Plan,
    ) -> str | None:
        """The id of the launch request, ours or one that is under way; None when there is nothing to do."""
        if replica_id in self._terminated:
            raise LaunchError(f"{replica_id} was terminated before it was launched", permanent=False)
        if replica_id in self._launching:
            return None
        under_way = _launches(sky, replica_id)
        up = any(map(_was_up, _listed(sky, replica_id)))
        broken = replica_id in self._broken and not _has_job(sky, replica_id)
        if up and not under_way and not broken:
            return None   # its `run` was submitted: never a second time
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not under_way and _on_another_plan(directory, plan) and not _down(sky, replica_id):
            raise LaunchError(f"{replica_id}: what it left on its last plan is not gone yet", permanent=False)
        facts = {"port": service.port, "spec_hash": service.hash, "plan": plan.name}
        launcher.write_atomically(str(directory / launcher.RECORD), facts)
        if under_way:   # by a gateway that has died since: it goes on in the API server
            return under_way[0]
        try:   # anew, or on with what a failed launch left
            return _launch(sky, replica_id, build_task(sky, service, env, plan))
        except Exception as error:
            if not cannot_open_ports(sky.exceptions, error):
                raise
            log.info("%s: %s; launched without `resources.ports`", replica_id, reason(error))
            return _launch(sky, replica_id, build_task(sky, service, env, plan, ports=False))

    def _terminate(self, replica_id: str) -> None:
        if not owned_by(replica_id, self._owner):
            return
        with self._lock(replica_id):
            self._terminated.add(replica_id)
        sky = self._sdk()
        deadline = self._clock() + DOWN_SECONDS
        why = "it is still listed"
        while True:
            try:
                if _down(sky, replica_id):
                    break
            except Exception as error:
                why = reason(error)
            if self._clock() >= deadline:
                raise TerminateError(f"{replica_id} is not verified gone: {why}")
            self._sleep(DOWN_PAUSE_SECONDS)
        folder.forget(self._root / replica_id)

    def _instances(self) -> dict[str, Instance]:
        with self._looking:
            try:
                sky = self._sdk()
                clusters = self._clusters(sky)
            except Exception as error:
                raise InstancesUnknown(f"SkyPilot does not say what exists: {reason(error)}") from error
            found = {name: self._instance(sky, cluster) for name, cluster in clusters.items()}
            for name in self._attendants.keys() - found.keys():
                self._attendants.pop(name).stop()
            for name, output in list(self._launching.items()):   # there is none to list in the first seconds
                if name not in found:
                    found[name] = _launching(name, output, None)
            return found

    def _clusters(self, sky: Sky) -> dict[str, Any]:
        """Our clusters by name; every REFRESH_SECONDS as the clouds see them."""
        modes = sky.StatusRefreshMode
        ours = {c.name: c for c in sky.get(sky.status(None, refresh=modes.NONE)) if self._ours(c.name)}
        if ours and self._clock() - self._refreshed >= REFRESH_SECONDS:
            ours = {c.name: c for c in sky.get(sky.status(list(ours), refresh=modes.AUTO))}
            self._refreshed = self._clock()
        return ours

    def _ours(self, name: str) -> bool:
        return owned_by(name, self._owner)

    def _instance(self, sky: Sky, cluster: Any) -> Instance:
        name: str = cluster.name
        price = hourly_cost(cluster)
        status = cluster.status.value
        if name in self._launching or (status == "INIT" and cluster.init_kind != "unhealthy"):
            return _launching(name, self._launching.get(name), price)
        if status != "UP":
            why = cluster.init_status_reason or cluster.last_event or "lost, preempted or stopped"
            return Instance(name, alive=False, hourly_cost=price, detail=f"SkyPilot says {status}: {why}")
        attendant = self._attendants.get(name)
        if attendant is None:
            attendant = self._attendants[name] = Attendant(sky, name, self._root / name, cluster.handle)
            attendant.start()
        if attendant.ended is not None:
            return Instance(name, alive=False, hourly_cost=price, detail=attendant.why())
        phases = attendant.output.read()
        return Instance(
            name,
            alive=True,
            url=attendant.url,
            phase=phases.phase,
            progress=phases.progress,
            hourly_cost=price,
        )


def _launch(sky: Sky, replica_id: str, task: Any) -> str:
    return sky.launch(
        task,
        cluster_name=replica_id,
        retry_until_up=False,
        idle_minutes_to_autostop=AUTODOWN_IDLE_MINUTES,
        down=True,
    )


def _on_another_plan(directory: Path, plan: Plan) -> bool:
    """Whether an earlier attempt asked for other hardware: SkyPilot refuses to go on with its remains."""
    record = folder.record(directory)
    return record is not None and record.get("plan", plan.name) != plan.name


def build_task(
    sky: Sky, service: Service, env: Mapping[str, str], plan: Plan = YAML_DECIDES, *, ports: bool = True
) -> Any:
    """The YAML as a sky.Task: without `service:` (0.14.1 rejects what the DeepSeek README shows), with `env`,
    on the plan's hardware.

    A variable that the YAML lists under `envs`, or `--env` sets, is one; any other is given as a secret.
    `ports=False` leaves out `resources.ports`, for a cloud that has none to open.
    """
    task = plans.apply(copy.deepcopy(service.task), plan)   # from_yaml_config empties it
    if not ports:
        resources = task.get("resources") or {}
        for one in (resources, *(resources.get("any_of") or ()), *(resources.get("ordered") or ())):
            one.pop("ports", None)
    env = {**plan.envs, **plan.secrets, **env}
    plain = {*(task.get("envs") or {}), *plan.envs} - {*(task.get("secrets") or {})}
    envs = {name: value for name, value in env.items() if name in plain}
    secrets = service.secrets | {name: value for name, value in env.items() if name not in plain}
    return sky.Task.from_yaml_config(
        task, env_overrides=list(envs.items()), secrets_overrides=list(secrets.items())
    )


def _launches(sky: Sky, replica_id: str) -> list[str]:
    """Launch requests for the cluster that the API server has not finished."""
    return [
        request.request_id
        for request in sky.api_status(cluster_name=replica_id)
        if request.cluster_name == replica_id
        and request.status in _ACTIVE
        and request.name.endswith("launch")
    ]


def _listed(sky: Sky, replica_id: str) -> list[Any]:
    clusters: list[Any] = sky.get(sky.status([replica_id], refresh=sky.StatusRefreshMode.NONE))
    return clusters


def _was_up(cluster: Any) -> bool:
    """Whether its machines were ever all there; what follows at once is the submission of `run`."""
    return cluster.status.value != "INIT" or bool(cluster.cluster_ever_up)


def _has_job(sky: Sky, replica_id: str) -> bool:
    """Whether `run` was submitted. A cluster on which SkyPilot's own set-up failed cannot even be asked."""
    try:
        return bool(sky.get(sky.queue(replica_id)))
    except Exception:
        return False


def _down(sky: Sky, replica_id: str) -> bool:
    """One round of cancel and down; whether the cluster is gone."""
    launches = _launches(sky, replica_id)
    if launches:
        sky.get(sky.api_cancel(launches, silent=True))
    # Down also when it is not listed: a launch that was just cancelled may have got as far as a machine.
    with contextlib.suppress(sky.exceptions.ClusterDoesNotExist):
        sky.get(sky.down(replica_id))
    return not _launches(sky, replica_id) and not _listed(sky, replica_id)


def _launching(name: str, output: folder.Output | None, price: float | None) -> Instance:
    """An instance that SkyPilot is making; `output` is known if it is this process that waits for it."""
    phases = output.read() if output else None
    phase = (phases and phases.phase) or "provision"
    return Instance(name, True, phase=phase, progress=phases.progress if phases else None, hourly_cost=price)


def hourly_cost(cluster: Any) -> float | None:
    """Dollars per hour of all nodes, by SkyPilot's catalogue (not the real spot bill; 0 on Kubernetes)."""
    try:
        handle = cluster.handle
        return float(handle.launched_resources.get_cost(3600)) * int(handle.launched_nodes)
    except Exception:   # no handle yet, no instance type, not in the catalogue: asserts and assorted errors
        return None


async def _in_thread(work: Callable[[], T]) -> T:
    """Run blocking work in a daemon thread. Cancelling the wait does not stop the work."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def run() -> None:
        try:
            value = work()
        except BaseException as error:
            outcome: tuple[Callable[[Any], None], Any] = (future.set_exception, error)
        else:
            outcome = (future.set_result, value)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="skypilot", daemon=True).start()
    return await future
