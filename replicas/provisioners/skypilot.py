"""Replicas as SkyPilot clusters: one cluster per replica, its name the replica's id, launched once.

The untyped world ends here. Its SDK blocks (its async one too, with the API server down for 13 s), so every
call runs in a thread of its own (threads.py).

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

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicas.plans import Plan
from replicas.provisioners import (
    YAML_DECIDES,
    Instance,
    InstancesUnknown,
    LaunchError,
    Other,
    TerminateError,
    clusters,
    concerns,
    folder,
    launcher,
    owned_by,
)
from replicas.provisioners.attendant import Attendant
from replicas.provisioners.sdk import Sky, import_sky
from replicas.provisioners.sky_errors import cannot_open_ports, is_other_hardware, launch_error, reason
from replicas.provisioners.task import build_task
from replicas.provisioners.threads import in_thread

if TYPE_CHECKING:
    from replicas.spec import Service

log = logging.getLogger(__name__)

REFRESH_SECONDS = 20.0   # so a preemption is noticed within this, plus a tick
DOWN_SECONDS = 600.0     # from the first `down` to giving up for now
DOWN_PAUSE_SECONDS = 5.0


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
        self._others: list[Any] = []   # clusters of the last look
        self._attendants: dict[str, Attendant] = {}

    def __repr__(self) -> str:
        return f"<SkyPilotProvisioner owner={self._owner} launching={len(self._launching)}>"

    async def launch(
        self, replica_id: str, service: Service, env: Mapping[str, str], plan: Plan = YAML_DECIDES
    ) -> None:
        """See Provisioner. One round over all candidates of the plan: minutes, longer with file mounts."""
        await in_thread(lambda: self._launch(replica_id, service, env, plan))

    async def terminate(self, replica_id: str) -> None:
        """See Provisioner. Cancel, down, look; again until it is no longer listed, for up to 10 minutes."""
        await in_thread(lambda: self._terminate(replica_id))

    async def instances(self, fresh: Collection[str] = ()) -> dict[str, Instance]:
        """See Provisioner. Never waits for a launch or an endpoint."""
        return await in_thread(lambda: self._instances(fresh))

    async def others(self, services: Collection[str]) -> list[Other]:
        """See Provisioner. Of the user that SkyPilot knows us as; their status is what it remembers."""
        found = [cluster for cluster in self._others if concerns(cluster.name, services)]
        return await in_thread(lambda: [clusters.other(cluster) for cluster in found]) if found else []

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
            if is_other_hardware(sky.exceptions, error):
                _forget_plan(directory)
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
        under_way = clusters.launches(sky, replica_id)
        up = any(map(clusters.was_up, clusters.listed(sky, replica_id)))
        broken = replica_id in self._broken and not clusters.has_job(sky, replica_id)
        if up and not under_way and not broken:
            return None   # its `run` was submitted: never a second time
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not under_way and _on_another_plan(directory, plan) and not clusters.down(sky, replica_id):
            raise LaunchError(f"{replica_id}: what it left on its last plan is not gone yet", permanent=False)
        facts = {"port": service.port, "spec_hash": service.hash, "plan": plan.name}
        launcher.write_atomically(str(directory / launcher.RECORD), facts)
        if under_way:   # by a gateway that has died since: it goes on in the API server
            return under_way[0]
        try:   # anew, or on with what a failed launch left
            return clusters.launch(sky, replica_id, build_task(sky, service, env, plan))
        except Exception as error:
            if not cannot_open_ports(sky.exceptions, error):
                raise
            log.info("%s: %s; launched without `resources.ports`", replica_id, reason(error))
            return clusters.launch(sky, replica_id, build_task(sky, service, env, plan, ports=False))

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
                if clusters.down(sky, replica_id):
                    break
            except Exception as error:
                why = reason(error)
            if self._clock() >= deadline:
                raise TerminateError(f"{replica_id} is not verified gone: {why}")
            self._sleep(DOWN_PAUSE_SECONDS)
        folder.forget(self._root / replica_id)

    def _instances(self, fresh: Collection[str]) -> dict[str, Instance]:
        with self._looking:
            try:
                sky = self._sdk()
                ours = self._clusters(sky, fresh)
            except Exception as error:
                raise InstancesUnknown(f"SkyPilot does not say what exists: {reason(error)}") from error
            found = {name: self._placed(sky, cluster) for name, cluster in ours.items()}
            for name in self._attendants.keys() - found.keys():
                self._attendants.pop(name).stop()
            for name in self._attendants.keys() & set(fresh):
                self._attendants[name].find_again()
            for name, output in list(self._launching.items()):   # there is none to list in the first seconds
                if name not in found:
                    found[name] = _launching(name, output, None)
            return found

    def _clusters(self, sky: Sky, fresh: Collection[str]) -> dict[str, Any]:
        """Our clusters by name; every REFRESH_SECONDS, and `fresh` ones now, as the clouds see them."""
        modes = sky.StatusRefreshMode
        listed = sky.get(sky.status(None, refresh=modes.NONE))
        ours = {c.name: c for c in listed if self._ours(c.name)}
        self._others = [c for c in listed if c.name not in ours]
        if ours and self._clock() - self._refreshed >= REFRESH_SECONDS:
            ours = {c.name: c for c in sky.get(sky.status(list(ours), refresh=modes.AUTO))}
            self._refreshed = self._clock()
        if doubtful := [name for name in ours if name in fresh]:   # AUTO passes over what has no autostop
            seen = {c.name: c for c in sky.get(sky.status(doubtful, refresh=modes.FORCE))}
            ours = {name: c for name, c in ours.items() if name not in doubtful} | seen
        return ours

    def _ours(self, name: str) -> bool:
        return owned_by(name, self._owner)

    def _placed(self, sky: Sky, cluster: Any) -> Instance:
        region, spot = clusters.placed(cluster)
        since = cluster.launched_at
        return replace(self._instance(sky, cluster), region=region, spot=spot, launched_at=since)

    def _instance(self, sky: Sky, cluster: Any) -> Instance:
        name: str = cluster.name
        price = clusters.hourly_cost(cluster)
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


def _on_another_plan(directory: Path, plan: Plan) -> bool:
    """Whether an earlier attempt asked for other hardware: SkyPilot refuses to go on with its remains."""
    record = folder.record(directory)
    return record is not None and record.get("plan", plan.name) != plan.name


def _forget_plan(directory: Path) -> None:
    """What is there fits no plan: the next attempt ends it first, whatever it asks for."""
    facts = folder.record(directory) or {}
    launcher.write_atomically(str(directory / launcher.RECORD), facts | {"plan": None})


def _launching(name: str, output: folder.Output | None, price: float | None) -> Instance:
    """An instance that SkyPilot is making; `output` is known if it is this process that waits for it."""
    phases = output.read() if output else None
    phase = (phases and phases.phase) or "provision"
    return Instance(name, True, phase=phase, progress=phases.progress if phases else None, hourly_cost=price)
