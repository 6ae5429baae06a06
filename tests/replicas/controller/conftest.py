"""A small world for the controller: a clock that is set by hand, machines that appear when launched, workers
that ack at once. The table and the board are the real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replicas.board import Board
from replicas.controller import Controller, ControllerConfig
from replicas.lifecycle import Replica, State
from replicas.loads import Load
from replicas.messages import ColdStart, ServiceInfo, Snapshot, WorkerState
from replicas.plans import Plan
from replicas.probe import Probed
from replicas.provisioners import Instance, Other, concerns
from replicas.spec import Service, parse
from replicas.table import Table

YAML = """
name: r1
resources: {ports: 30000}
run: |
  python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --port 30000 --api-key $REPLICA_API_KEY
service:
  readiness_probe: {path: /health, initial_delay_seconds: 1200}
  replica_policy: {min_replicas: 0, max_replicas: 2}
"""


class FakeClock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class FakeProvisioner:
    """Machines appear when launched and vanish when terminated, unless a test says otherwise."""

    def __init__(self) -> None:
        self.machines: dict[str, Instance] = {}
        self.launched: list[str] = []
        self.terminated: list[str] = []
        self.services: list[Service] = []
        self.envs: list[dict[str, str]] = []
        self.plans: list[Plan] = []
        self.full: dict[str, Exception] = {}  # by the plan's name: what its launch fails with
        self.launch_error: Exception | None = None
        self.terminate_error: Exception | None = None
        self.instances_error: Exception | None = None
        self.gate: asyncio.Event | None = None  # launch returns only once it is set
        self.dies: str | None = None  # the last words of every `run`
        self.cost: float | None = None
        self.placed: dict[str, Any] = {}  # region and spot of every machine
        self.not_ours: list[Other] = []

    async def launch(self, replica_id: str, service: Service, env: Mapping[str, str], plan: Plan) -> None:
        self.launched.append(replica_id)
        self.plans.append(plan)
        self.services.append(service)
        self.envs.append(dict(env))
        if self.gate is not None:
            await self.gate.wait()
        if self.launch_error is not None:
            raise self.launch_error
        if plan.name in self.full:
            raise self.full[plan.name]
        n = replica_id.rpartition("-")[2]
        machine = Instance(replica_id, True, f"http://127.0.0.1:{30000 + int(n)}", hourly_cost=self.cost)
        machine = replace(machine, **self.placed)
        if self.dies is not None:
            machine = replace(machine, alive=False, detail=self.dies)
        self.machines.setdefault(replica_id, machine)

    async def terminate(self, replica_id: str) -> None:
        self.terminated.append(replica_id)
        if self.terminate_error is not None:
            raise self.terminate_error
        self.machines.pop(replica_id, None)

    async def instances(self, fresh: Collection[str] = ()) -> dict[str, Instance]:
        if self.instances_error is not None:
            raise self.instances_error
        return dict(self.machines)

    async def others(self, services: Collection[str]) -> list[Other]:
        return [other for other in self.not_ours if concerns(other.name, services)]

    async def close(self) -> None: ...


class FakeControl:
    """Workers that ack each generation at once, unless told to be silent."""

    def __init__(self) -> None:
        self.workers = {0: WorkerState(0, 4711, 0, {})}
        self.published: list[Snapshot] = []
        self.progressed: list[tuple[str, ColdStart | None]] = []
        self.suspects: dict[str, str] = {}
        self.silent = False
        self.news = asyncio.Event()

    def publish(self, snapshot: Snapshot) -> None:
        self.published.append(snapshot)
        self.news.set()
        if not self.silent:
            self.ack()

    async def until(self, status: str) -> None:
        """The workers have been told that r1 has this status."""
        while not self.published or self.published[-1].services[0].status != status:
            self.news.clear()
            await self.news.wait()

    def ack(self) -> None:
        for index, worker in self.workers.items():
            self.workers[index] = replace(worker, generation=self.published[-1].generation)

    def progress(self, service: str, cold: ColdStart | None) -> None:
        self.progressed.append((service, cold))

    def take_suspects(self) -> dict[str, str]:
        suspects, self.suspects = self.suspects, {}
        return suspects


class FakeProber:
    """Who is asked answers as `answers` says: True, an error, or None (no answer yet)."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.answers: dict[str, bool | str | None] = {}
        self.every: bool | str | None = None  # the answer of everybody else
        self.targets: Mapping[str, Any] = {}
        self.results: dict[str, Probed] = {}
        self.hurried: list[str] = []

    def keep(self, targets: Mapping[str, Any]) -> None:
        self.targets = targets
        self.results = {id: found for id, found in self.results.items() if id in targets}

    def ask(self) -> None:
        for id in self.targets:
            answer = self.answers.get(id, self.every)
            old = self.results.get(id, Probed())
            if answer is True:
                self.results[id] = Probed(ok_at=self.clock.now)
            elif answer:
                since = old.failing_since or self.clock.now
                failures = old.failures + 1
                self.results[id] = replace(old, failures=failures, failing_since=since, error=str(answer))

    def soon(self, id: str) -> None:
        self.hurried.append(id)

    async def close(self) -> None: ...


class FakeLoads:
    def __init__(self) -> None:
        self.results: dict[str, Load] = {}
        self.targets: Mapping[str, Any] = {}

    def keep(self, targets: Mapping[str, Any]) -> None:
        self.targets = targets

    def window(self, id: str) -> int:
        return min(64, self.results.get(id, Load()).max_running or 16)

    async def close(self) -> None: ...


class FakeObserver:
    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.dollars = 0.0

    def decision(self, service: str, code: str) -> None:
        self.told.append(("decision", code))

    def launch(self, service: str, outcome: str) -> None:
        self.told.append(("launch", outcome))

    def cold_start(self, service: str, phase: str, seconds: float) -> None:
        self.told.append(("cold_start", phase, seconds))

    def cost(self, service: str, dollars: float) -> None:
        self.dollars += dollars


class World:
    """One gateway: its state dir outlives its controllers."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.clock = FakeClock()
        self.provisioner = FakeProvisioner()
        self.board = Board.create(state_dir / "load.board", 1)
        self.row = self.board.worker(0)
        self.board.cells[self.row.pid] = 4711
        self.settings = ControllerConfig()
        self.text = YAML
        self.others: list[Service] = []
        self.table = Table(state_dir / "state.db")
        self.start()

    def start(self, *, yaml: str | None = None, **settings: Any) -> None:
        """A controller on what is in the state dir; the one before counts as killed."""
        self.table.close()
        self.text = yaml or self.text
        self.settings = replace(self.settings, **settings)
        self.table = self.open_table()
        self.control = FakeControl()
        self.prober = FakeProber(self.clock)
        self.loads = FakeLoads()
        self.observer = FakeObserver()
        self.service = parse(self.text, "r1.yaml")
        self.controller = self.make_controller()

    def open_table(self) -> Table:
        return Table(self.state_dir / "state.db")

    def make_controller(self) -> Controller:
        return Controller(
            [self.service, *self.others],
            self.provisioner,
            self.table,
            self.board,
            self.control,
            settings=self.settings,
            observer=self.observer,
            state_dir=self.state_dir,
            clock=self.clock,
            prober=self.prober,  # type: ignore[arg-type]
            loads=self.loads,  # type: ignore[arg-type]
        )

    async def step(self, seconds: float = 1.0) -> None:
        """Time passes, the replicas are probed, the controller ticks, its tasks go as far as they can."""
        self.clock.now += seconds
        self.prober.ask()
        await self.controller.tick()
        for _ in range(6):
            await asyncio.sleep(0)

    async def steps(self, n: int, seconds: float = 1.0, *, until: Callable[[], Any] | None = None) -> int:
        """Up to `n` steps, fewer if `until` comes true; returns how many there were."""
        for i in range(n):
            if until is not None and until():
                return i
            await self.step(seconds)
        assert until is None or until(), self.controller
        return n

    async def become_ready(self, n: int = 1) -> None:
        """`n` replicas serve, with nobody waiting any more."""
        self.prober.every = True
        if self.waiting == 0:
            self.waits(1)
        await self.steps(8, until=lambda: self.states.count(State.READY) >= n)
        self.waits(0)
        await self.step()

    # what the workers do

    @property
    def waiting(self) -> int:
        return self.board.totals(0).waiting

    def waits(self, n: int) -> None:
        """So many requests are held now; the new ones have just arrived, those missing have ended."""
        cells, more = self.board.cells, n - self.waiting
        cells[self.row.arrived if more > 0 else self.row.ended] += abs(more)
        cells[self.row.waiting] = n

    def arrives(self) -> None:
        """A request that is refused at once (`X-Gateway-Hold: reject`, or 503 launch_blocked)."""
        self.board.cells[self.row.arrived] += 1
        self.board.cells[self.row.ended] += 1

    def lease(self, id: str, n: int = 1) -> None:
        self.board.cells[self.row.started + self.replica(id).slot] += n

    def release(self, id: str, n: int = 1) -> None:
        self.board.cells[self.row.finished + self.replica(id).slot] += n
        self.board.cells[self.row.ended] += n

    def chunk(self, id: str) -> None:
        self.board.cells[self.row.chunks + self.replica(id).slot] += 1

    # what is seen

    @property
    def replicas(self) -> list[Replica]:
        return list(self.controller.fleets["r1"].rows.values())

    @property
    def states(self) -> list[State]:
        return [r.state for r in self.replicas]

    def replica(self, id: str) -> Replica:
        return self.controller.fleets["r1"].rows[id]

    def id(self, n: int) -> str:
        return f"r1-gw-{self.table.owner}-{n}"

    @property
    def info(self) -> ServiceInfo:
        return self.control.published[-1].services[0]

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        return [e for e in self.table.last_events(10_000) if kind in (None, e["kind"])]

    def machines_of(self) -> set[str]:
        return set(self.provisioner.machines)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.controller.close()
    world.table.close()
    world.board.close()
