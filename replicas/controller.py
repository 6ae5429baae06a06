"""The controller: each second, or at once on a message, it looks at the world, decides, saves, and then acts.

    observe    probes, load reports, provisioner.instances(), the board, limits
    interpret  into events; `advance` each replica                    (fleet.py, starts.py, health.py)
    decide     how many replicas                                                 (autoscaler.py)
    plan       what that means                                                   (planner.py)
    SAVE       one transaction; a replica has its row before `launch` is called
    act        publish a generation, launch, terminate: tasks that go on between ticks

Acting is level-triggered: a row's state says which task must be running (PROVISIONING: a launch, TERMINATING:
a termination), so a restarted controller goes on where the last one was killed, with the same three lines of
code. Outcomes of tasks become events at the next tick. One lock: ticks never overlap.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final, Protocol

from replicas import publisher, report, spec
from replicas.accounts import Accounts
from replicas.adoption import adopt, as_it_was
from replicas.board import SERVICES, Board
from replicas.deadman import Alarm
from replicas.errands import Errands
from replicas.evidence import LOOK_MOST, Evidence, Lookout, silent
from replicas.fleet import Fleet
from replicas.journal import Journal, Observer
from replicas.lifecycle import State, new
from replicas.loads import LoadPoller, LoadTarget
from replicas.masking import Mask
from replicas.planner import Launch
from replicas.plans import Spending
from replicas.policy import ControllerConfig, Override
from replicas.probe import Prober, ProbeTarget
from replicas.provisioners import Provisioner, owned_by
from replicas.publisher import Publisher
from replicas.spec import Service
from replicas.strays import Strays
from replicas.table import Limits, Table
from replicas.tls import Certificates

__all__ = ["Controller", "ControllerConfig", "Observer", "UnknownService"]

log = logging.getLogger(__name__)

TICK: Final = 1.0  # s
TICK_LEAST: Final = 0.02  # s between ticks that messages cause
PROBED: Final = frozenset({State.STARTING, State.READY, State.NOT_READY, State.DRAINING})


class UnknownService(KeyError):
    """There is no service of that name; the message lists those there are."""

    def __str__(self) -> str:
        return str(self.args[0])


class Control(publisher.Control, Protocol):
    """What else the controller hears through it."""

    def take_suspects(self) -> dict[str, str]: ...


class Controller:
    """Mutable, by the event loop alone. `run()` for ever; everything else may be called at any time beside
    it."""

    def __init__(
        self,
        services: Sequence[Service],
        provisioner: Provisioner,
        table: Table,
        board: Board,
        control: Control,
        *,
        settings: ControllerConfig,
        observer: Observer,
        state_dir: Path,
        clock: Callable[[], float] = time.time,
        prober: Prober | None = None,
        loads: LoadPoller | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        if not 1 <= len(services) <= SERVICES:
            raise ValueError(f"1 to {SERVICES} services, not {len(services)}")
        self.provisioner, self.table, self.control, self.config = provisioner, table, control, settings
        self.clock, self.certificates = clock, certificates or Certificates(state_dir)
        self.prober = prober or Prober(self.poke, clock=clock)
        self.loads = loads or LoadPoller(board, self.poke, window_max=settings.window_max, clock=clock)
        self.stopping = False
        self.keys = {s.name: settings.replica_api_key or table.replica_key(s.name) for s in services}
        known = [s.secrets.values() for s in services]
        self._mask = Mask(chain(*known, self.keys.values(), settings.launch.secrets.values()))
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._lookout = Lookout(provisioner, settings.look_every, [s.name for s in services], self.poke)
        self._alarm = Alarm(provisioner, settings.dead_man)
        self._errands = Errands(provisioner, self._lookout.outdate, self._mask)
        self._strays = Strays(table.owner, self._errands)
        self._publisher = Publisher(table, board, control)
        self._journal = Journal(table)
        self._accounts = Accounts(table, control, observer, clock())
        self.fleets = adopt(
            services, table, board=board, config=settings, observer=observer, now=clock()
        )

    def __repr__(self) -> str:
        fleets = " ".join(map(repr, self.fleets.values()))
        return f"<Controller generation={self._publisher.generation} {fleets}>"

    # ------------------------------------------------------------ the tick

    def poke(self, _worker: int | None = None) -> None:
        """Tick at once: something has happened. May be given to ControlServer as `on_change`."""
        self._wake.set()

    async def run(self) -> None:
        """Tick each second, at once when poked, until cancelled. One that raises is logged, not the end."""
        while True:
            self._wake.clear()
            try:
                await self.tick()
            except Exception:
                log.exception("the tick failed; the next one is in a second")
                await asyncio.sleep(TICK)
            rested = time.monotonic() + TICK_LEAST
            await self._woken(TICK)
            await asyncio.sleep(max(0.0, rested - time.monotonic()))

    async def _woken(self, seconds: float) -> None:
        """Wait for a poke, so long at most."""
        timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    async def tick(self) -> None:
        async with self._lock:
            await self._observe()
            now = self.clock()
            self._interpret(now)
            self._alarm.look(self.fleets.values(), now)
            self._add_up(now)
            for fleet in self.fleets.values():
                for action in fleet.decide(now):
                    if isinstance(action, Launch):
                        self._add(fleet, action.reason, now)
                    else:
                        fleet.apply(action, now)
                fleet.starts.begin(now)
            self._account(now)
            try:
                self._save(now)
                self._publish(now)
            except Exception:
                self._end_unwanted(now)  # a full disk must launch nothing, and keep nothing that bills
                raise
            self._act(now)

    async def close(self) -> None:
        """Save and let go; ends no replica. Launches under way are adopted by the next controller."""
        self._accounts.save(self.clock())
        await self._lookout.close()
        await self._errands.close()
        await self.prober.close()
        await self.loads.close()

    # ------------------------------------------------------------ observe, interpret

    async def _observe(self) -> None:
        for id, reason in self.control.take_suspects().items():
            log.info("a worker could not connect to %s: %s", id, reason)
            self.prober.soon(id)
        rows = [r for f in self.fleets.values() for r in f.rows.values()]
        await self._lookout.look(self.clock(), silent(rows, self.prober.results))

    def _interpret(self, now: float) -> None:
        masked = self._mask
        outcomes = [replace(o, reason=masked(o.reason)) for o in self._errands.take()]
        look, released = self._lookout, self._publisher.slots.released
        probes, loads = self.prober.results, self.loads.results
        instances = look.instances
        if instances is not None:
            instances = {
                id: replace(i, detail=masked(i.detail)) if i.detail else i for id, i in instances.items()
            }
        seen = Evidence(now, instances, look.number, probes, loads, released)
        for fleet in self.fleets.values():
            for outcome in outcomes:
                fleet.hear(outcome, look.begun, now)
            for id, load in loads.items():
                fleet.learn_window(id, load.max_running)
            fleet.stopping = self.stopping
            fleet.interpret(seen)
        self._strays.hear(outcomes, now)
        self._strays.look(look, {id for f in self.fleets.values() for id in f.rows}, now)

    def _add_up(self, now: float) -> None:
        """The limits on money are the gateway's: each fleet is told what the others cost."""
        spent = {name: f.launches.spending(f.rows.values(), now) for name, f in self.fleets.items()}
        for name, fleet in self.fleets.items():
            others = [self._strays.spending(now)] + [s for other, s in spent.items() if other != name]
            fleet.launches.elsewhere = Spending(sum(s.hourly for s in others), sum(s.day for s in others))

    # ------------------------------------------------------------ plan and save

    def _add(self, fleet: Fleet, reason: str, now: float) -> None:
        held = {r.slot for f in self.fleets.values() for r in f.rows.values()}
        slot = self._publisher.slots.free(held)
        if slot is None:
            log.warning("no free slot on the board: %s waits for one", fleet.service.name)
            return
        service = fleet.service
        n = self.table.next_n(service.name)
        id = f"{service.name}-gw-{self.table.owner}-{n}"
        text, hash = service.text, service.hash
        row = new(id, service.name, n, slot, spec_hash=hash, spec_text=text, now=now, reason=reason)
        fleet.add(row, now)
        asked = fleet.meter.waiting > 0 or fleet.meter.arrived > 0
        self._accounts.launched(id, service.name, now, asked=asked)

    def _account(self, now: float) -> None:
        """What this tick's time has cost."""
        busy = {id for f in self.fleets.values() for id, n in f.meter.in_flight.items() if n}
        rows = [r for f in self.fleets.values() for r in f.rows.values()]
        listed, strays = self._lookout.instances, self._strays.machines
        self._accounts.accrue(rows, now, listed=listed, busy=busy, strays=strays)

    def _save(self, now: float) -> None:
        """All that changed, in one transaction: from here on the world may be touched."""
        strays = self._strays.news
        if not strays and not any(f.book.dirty or f.book.news for f in self.fleets.values()):
            return
        told: list[dict[str, Any]] = []
        with self.table.transaction():
            for fleet in self.fleets.values():
                self.table.save(fleet.rows[id] for id in fleet.book.dirty)
                name = fleet.service.name
                if any(e["kind"] in ("breaker", "transition", "retry") for e in fleet.book.news):
                    self.table.set_breaker(name, fleet.breaker.to_json())
                for event in fleet.book.news:
                    if event["kind"] == "cold_start":
                        phase, seconds = event["phase"], event["seconds"]
                        on = event["spec_hash"], event["plan"]
                        self.table.add_cold_start(name, *on, phase, seconds, now)
                    told.append(self._journal.save(event))
            told += [self._journal.save(event) for event in strays]
        strays.clear()
        for fleet in self.fleets.values():
            for id in [id for id in fleet.book.dirty if fleet.rows[id].state is State.GONE]:
                fleet.forget(id)
            fleet.book.dirty.clear()
            fleet.book.news.clear()
        self._journal.tell(told)

    # ------------------------------------------------------------ act

    def _publish(self, now: float) -> None:
        served = [f for f in self.fleets.values() if not f.retired]
        window, certificates = self.loads.window, self.certificates
        infos = [report.service_info(f, window, self.keys[f.service.name], certificates, now) for f in served]
        self._publisher.publish(infos)

    def _act(self, now: float) -> None:
        """What each row's state asks for, unless it is under way."""
        self._end_unwanted(now)
        probes: dict[str, ProbeTarget] = {}
        polls: dict[str, LoadTarget] = {}
        for fleet in self.fleets.values():
            key = self.keys.get(fleet.service.name)
            for r in fleet.rows.values():
                if r.state is State.PROVISIONING and fleet.due(r.id, now) and r.id not in self._errands:
                    same = r.spec_hash == fleet.service.hash
                    known = self.config.launch.variables
                    service = fleet.service if same else as_it_was(r, fleet.service, known)
                    env = {} if key is None else {spec.REPLICA_KEY: key}
                    self._errands.launch(r.id, service, env, fleet.launches.plan(r, fleet.rows.values(), now))
                if r.url is not None and r.state in PROBED:
                    eager = r.state is State.STARTING
                    interval = fleet.probe_interval
                    tls = self.certificates.context(r.service, r.id, r.url)
                    probes[r.id] = ProbeTarget(r.url, fleet.service.probe, interval, eager, key, tls)
                    if r.state in (State.READY, State.NOT_READY):
                        polls[r.id] = LoadTarget(r.url, r.slot, key, tls)
                signs = fleet.signs.get(r.id)
                if signs is not None and signs.ended and not signs.probe_failures:
                    self.prober.soon(r.id)
        self.prober.keep(probes)
        self.loads.keep(polls)
        self._strays.end(now)

    def _end_unwanted(self, now: float) -> None:
        """Terminations, which are safe to repeat and to forget: a row that is left is found without a
        machine.
        """
        for fleet in self.fleets.values():
            for r in fleet.rows.values():
                if r.state is State.TERMINATING and fleet.due(r.id, now):
                    self._errands.terminate(r.id)

    # ------------------------------------------------------------ what people ask for

    def _fleet(self, name: str) -> Fleet:
        fleet = self.fleets.get(name)
        if fleet is None or fleet.retired:
            known = ", ".join(n for n, f in self.fleets.items() if not f.retired)
            raise UnknownService(f"there is no service {name!r}; there is: {known}")
        return fleet

    def set_limits(self, name: str, min: int | None = None, max: int | None = None) -> dict[str, Any]:
        """Override the limits until `reset_limits` or a changed YAML; None leaves that one as it is.

        Effective within a tick. Returns {"min", "max", "override"} as in `status`.
        :raises UnknownService:
        :raises ValueError: a negative number, or a minimum above the maximum.
        """
        fleet = self._fleet(name)
        fleet.override = override = (fleet.override or Override()).changed(min, max, fleet.policy.max)
        self.table.set_limits(name, Limits(override.min, override.max, fleet.service.hash))
        return self._limits_changed(fleet, "set")

    def reset_limits(self, name: str) -> dict[str, Any]:
        """Back to the YAML's (and the flags') limits."""
        fleet = self._fleet(name)
        fleet.override = None
        self.table.clear_limits(name)
        return self._limits_changed(fleet, "reset")

    def _limits_changed(self, fleet: Fleet, code: str) -> dict[str, Any]:
        limits = report.limits(fleet)
        fleet.tell("limits", f"limits are {limits['min']}..{limits['max']} ({code})", self.clock(), code=code)
        self.poke()
        return limits

    def retry(self, name: str) -> None:
        """Allow a launch at once, whatever has failed before. :raises UnknownService:"""
        self._fleet(name).starts.retry(self.clock())
        self.poke()

    async def down(self, limit: float | None = None, *, pause: float = 0.2) -> list[str]:
        """End every replica and verify that nothing of ours is left; waiters are told "stopping" at once.

        Streams get `down_drain_limit` seconds. Goes on (with back-off) until nothing is left, or for `limit`
        seconds; returns the ids that remain: an empty list means verified. There is no way back: the gateway
        is to stop.
        """
        self.stopping = True
        began = time.monotonic()
        while True:
            try:
                await self.tick()
            except Exception:
                log.exception("the tick failed while going down")
            remaining = {r.id for f in self.fleets.values() for r in f.rows.values()}
            if not remaining and not self._errands:
                try:
                    most = LOOK_MOST if limit is None else max(0.0, began + limit - time.monotonic())
                    async with asyncio.timeout(most):
                        instances = await self.provisioner.instances()
                    remaining = {id for id in instances if owned_by(id, self.table.owner)}
                    if not remaining:
                        return []
                except Exception as error:  # nothing is verified then
                    remaining = {f"(unknown: {str(error) or 'no answer in time'})"}
            if limit is not None and time.monotonic() - began >= limit:
                return sorted(remaining)
            self._wake.clear()
            await self._woken(pause)

    def status(self) -> dict[str, Any]:
        """The shape of GET /admin/status."""
        now = self.clock()
        self._accounts.save(now)
        told = [(name, f) for name, f in self.fleets.items() if not f.retired or f.rows]
        services = [report.status(f, self.loads, self._accounts.sums(name), now) for name, f in told]
        return {
            "generation": self._publisher.generation,
            "owner": self.table.owner,
            "provisioner": self._alarm.status(services, now),
            "strays": self._strays.status(),
            "others": [asdict(other) for other in self._lookout.others],
            "services": services,
        }

    def cost(self, since: str | None = None, by: str = "day") -> dict[str, Any]:
        """The answer of GET /admin/cost. `since`: "7d" or a date. :raises ValueError: it cannot be read."""
        return self._accounts.bill(since, by, self.clock())

    def events(self, last: int = 0) -> AsyncIterator[dict[str, Any]]:
        """The `last` past events, then each new one as it comes. A reader that is slow loses the oldest."""
        return self._journal.follow(last)
