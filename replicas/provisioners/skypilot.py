"""Replicas as SkyPilot clusters: one cluster per replica, its name the replica's id, launched once.

The untyped world ends here. Its SDK blocks (its async one too, with the API server down for 13 s), so every
call runs in a thread of its own (threads.py).

What SkyPilot 0.14.1 does and a reader would not expect:
* A launch is executed by the API server and outlives us. Cancelling it ends its worker, never its machines:
  only `down` does, and the cluster is gone when `status` no longer lists it.
* Launching an existing name submits `run` a second time, onto the same port: see launching.py.
* `retry_until_up` retries for ever, with no reasons and no deadline. We try once; the controller tries again.
* Slurm opens no ports and refuses a task that names some, although its nodes can be reached: so ask again
  without, and dial the head node by its own address (attendant.py).
* Status is a cache. A refresh asks the cloud, for each cluster, and costs seconds: every REFRESH_SECONDS.
"""
from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicas.plans import Plan
from replicas.provisioners import (
    YAML_DECIDES,
    Ended,
    Instance,
    InstancesUnknown,
    LaunchError,
    Other,
    TerminateError,
    clusters,
    concerns,
    deadman,
    folder,
    keeping,
    owned_by,
)
from replicas.provisioners.api_server import ApiServer, ServerTrouble
from replicas.provisioners.attendant import Attendant
from replicas.provisioners.deadman import DeadMan
from replicas.provisioners.launching import ATTEMPT_SECONDS, Launching
from replicas.provisioners.prices import Prices
from replicas.provisioners.sdk import Sky, import_sky
from replicas.provisioners.sky_errors import reason
from replicas.provisioners.threads import in_thread

if TYPE_CHECKING:
    from replicas.spec import Service

REFRESH_SECONDS = 20.0   # so a preemption is noticed within this, plus a tick
LOOK_SECONDS = 10.0      # that a look waits for the one before
HUNG_SECONDS = 300.0     # after which that one is not waited for any more; doubling, as each holds a thread
HUNG_MOST = 3600.0
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
        server: ApiServer | None = None,
        dead_man: float = deadman.LIMIT,
        attempt: float = ATTEMPT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`dead_man`, `attempt`: seconds, see deadman.py and launching.py. `wall`: unix seconds."""
        self._root = Path(state_dir).resolve() / "replicas"
        self._owner = owner
        self._make_sky = sky
        self._server = server or ApiServer(clock=clock)
        self._clock = clock
        self._sleep = sleep
        self._importing = threading.Lock()
        self._sky: Sky | None = None
        self._timers = DeadMan(self._root, dead_man, clock=wall)
        self._launching = Launching(self._root, owner, self._timers, limit=attempt, clock=clock, wall=wall)
        self._prices = Prices(clock)
        self._saved: set[str] = set()   # whose logs were saved before their down
        # Mutable by `instances` alone, one at a time.
        self._looking = threading.Lock()
        self._look_begun = float("-inf")
        self._hung = 0   # looks in a row that were given up
        self._refreshed = float("-inf")
        self._others: list[Any] = []   # clusters of the last look
        self._attendants: dict[str, Attendant] = {}

    def __repr__(self) -> str:
        return f"<SkyPilotProvisioner owner={self._owner} {self._launching!r}>"

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
        return await in_thread(lambda: self._priced(found)) if found else []

    def _priced(self, found: list[Any]) -> list[Other]:
        return [Other(c.name, str(c.status.value), self._prices.of(c)) for c in found]

    async def close(self) -> None:
        """See Provisioner. Threads that wait for SkyPilot end with the process."""

    def dead_man(self, replica_id: str) -> float | None:
        """Unix seconds when the replica ends itself unless we go on; None: it does not."""
        return self._timers.acts_at(replica_id)

    @property
    def says(self) -> str:
        """One line for people: where replicas come from, or why none can for now (`trouble`)."""
        return self._server.says

    @property
    def trouble(self) -> bool:
        return self._server.trouble

    def _sdk(self, *, ending: bool = False) -> Sky:
        """SkyPilot, its API server found or started. Raises ServerTrouble; `ending` needs less of it."""
        with self._importing:
            if self._sky is None:
                self._sky = self._make_sky()
        try:
            self._server.check(self._sky)
        except ServerTrouble as trouble:
            if not (ending and trouble.answers):
                raise
        return self._sky

    def _launch(self, replica_id: str, service: Service, env: Mapping[str, str], plan: Plan) -> None:
        if not owned_by(replica_id, self._owner):
            raise LaunchError(f"{replica_id} is not a name of this gateway (owner {self._owner})")
        try:
            sky = self._sdk()
        except ServerTrouble as trouble:
            raise LaunchError(str(trouble), permanent=False) from trouble
        self._launching.launch(sky, replica_id, service, env, plan)

    def _terminate(self, replica_id: str) -> None:
        if not owned_by(replica_id, self._owner):
            return
        settled = self._launching.end(replica_id)
        deadline = self._clock() + DOWN_SECONDS
        while True:
            try:
                sky = self._sdk(ending=True)
                self._save_logs(sky, replica_id)
                gone = clusters.down(sky, replica_id)
                if gone and settled:
                    break
                why = "SkyPilot does not end the submission of its launch" if gone else "it is still listed"
            except Exception as error:
                why = reason(error)
            if self._clock() >= deadline:
                raise TerminateError(f"{replica_id} is not verified gone: {why}")
            settled = settled or self._launching.end(replica_id)
            self._sleep(DOWN_PAUSE_SECONDS)
        self._timers.forget(replica_id)
        keeping.finish(self._root / replica_id)

    def _save_logs(self, sky: Sky, replica_id: str) -> None:
        """Once: a down that is repeated has nothing more to fetch."""
        if replica_id not in self._saved:
            self._saved.add(replica_id)
            attendant = self._attendants.get(replica_id)
            followed = attendant is not None and attendant.complete
            keeping.save(sky, replica_id, self._root / replica_id, followed=followed)

    def _instances(self, fresh: Collection[str]) -> dict[str, Instance]:
        with self._one_look() as lock:
            try:
                sky = self._sdk()
                ours = self._clusters(sky, fresh)
            except ServerTrouble as trouble:
                if trouble.answers:
                    self._arm_unseen()
                raise InstancesUnknown(str(trouble)) from trouble
            except Exception as error:
                self._arm_unseen()
                raise InstancesUnknown(f"SkyPilot does not say what exists: {reason(error)}") from error
            if lock is not self._looking:
                raise InstancesUnknown("SkyPilot has answered too late")
            found = {name: self._placed(sky, cluster) for name, cluster in ours.items()}
            for name in self._attendants.keys() - found.keys():
                self._attendants.pop(name).stop()
            for name in self._attendants.keys() & set(fresh):
                self._attendants[name].find_again()
            self._arm(sky, [name for name, cluster in ours.items() if cluster.status.value == "UP"])
            for name, output in list(self._launching.under_way.items()):   # not listed in the first seconds
                if name not in found:
                    found[name] = _launching(name, output, None)
            return found

    @contextlib.contextmanager
    def _one_look(self) -> Iterator[threading.Lock]:
        """One at a time; one that SkyPilot never answers is left to itself after a while."""
        lock = self._looking
        if not lock.acquire(timeout=LOOK_SECONDS):
            self._arm_unseen()
            if self._clock() - self._look_begun >= min(HUNG_MOST, HUNG_SECONDS * 2.0 ** min(self._hung, 16)):
                self._hung += 1
                self._looking = threading.Lock()
            raise InstancesUnknown("SkyPilot has not answered yet what exists")
        try:
            self._look_begun = self._clock()
            yield lock
            self._hung = 0
        finally:
            lock.release()

    def _arm_unseen(self) -> None:
        """Those that were armed before, while it is not known what exists: or they would end themselves."""
        if self._sky is not None:
            self._arm(self._sky, self._timers.known())

    def _arm(self, sky: Sky, names: Iterable[str]) -> None:
        busy = {*self._launching.under_way, *self._launching.terminated}
        self._timers.keep(sky, [name for name in names if self._ours(name) and name not in busy])

    def _clusters(self, sky: Sky, fresh: Collection[str]) -> dict[str, Any]:
        """Our clusters by name; every REFRESH_SECONDS, and `fresh` ones now, as the clouds see them."""
        modes = sky.StatusRefreshMode
        listed = sky.get(sky.status(None, refresh=modes.NONE))
        ours = {c.name: c for c in listed if self._ours(c.name)}
        self._others = [c for c in listed if c.name not in ours]
        self._prices.keep({c.name for c in listed})
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
        price = self._prices.of(cluster)
        status = cluster.status.value
        if name in self._launching.under_way or (status == "INIT" and cluster.init_kind != "unhealthy"):
            return _launching(name, self._launching.under_way.get(name), price)
        if status != "UP":
            why = cluster.init_status_reason or cluster.last_event or "lost, preempted or stopped"
            said = f"SkyPilot says {status}: {why}"
            ended: Ended = "unreachable" if status == "INIT" else "machine"
            return Instance(name, alive=False, hourly_cost=price, detail=said, ended=ended)
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
            generation=attendant.output.generation,
            hourly_cost=price,
        )


def _launching(name: str, output: folder.Output | None, price: float | None) -> Instance:
    """An instance that SkyPilot is making; `output` is known if it is this process that waits for it."""
    phases = output.read() if output else None
    phase = (phases and phases.phase) or "provision"
    return Instance(name, True, phase=phase, progress=phases.progress if phases else None, hourly_cost=price)
