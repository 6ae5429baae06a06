"""The replicas of one service, between the world and the pure functions: evidence in, events and plans out.

`Fleet` is mutable and belongs to the controller, which alone calls it, within a tick. It does no I/O: what
changed is in its book, for the controller to save and then to act upon. Until a replica is READY its `Starts`
judge it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from replicas import health, plans
from replicas.autoscaler import Decision, Demand, Memory, Policy, decide
from replicas.board import Board
from replicas.book import Book
from replicas.breaker import Breaker
from replicas.coldstarts import ColdStarts
from replicas.errands import Outcome
from replicas.evidence import Evidence, Witness, learned
from replicas.health import Signs
from replicas.journal import Observer
from replicas.launches import Launches
from replicas.lifecycle import CAPACITY, COMING, SERVING, Event, Replica, State
from replicas.meter import Meter
from replicas.planner import Action, Drain, Resume, Terminate, plan
from replicas.policy import ControllerConfig, Override, merge
from replicas.probe import TIMEOUT_LEAST
from replicas.provisioners import Instance
from replicas.spec import Service
from replicas.starts import Starts
from replicas.tries import PAUSE_MOST, Tries

UNREMARKABLE: Final = frozenset({"cold", "steady", "rising", "falling"})  # they come and go with the load
END_PAUSE_FIRST: Final = 5.0  # s from an end that was not verified to the next try
WITH_MACHINE: Final = frozenset({State.STARTING, State.READY, State.NOT_READY, State.DRAINING})


class Fleet:
    """One service's replicas and everything that is decided about them."""

    def __init__(
        self,
        service: Service,
        index: int,
        *,
        config: ControllerConfig,
        board: Board,
        observer: Observer,
        rows: Sequence[Replica],
        breaker: Breaker,
        override: Override | None,
        history: Sequence[tuple[str, float, str]],
        now: float,
        past: Sequence[Replica] = (),
        retired: bool = False,
    ) -> None:
        self.service = service
        self.index = index
        self.config = config
        self.board = board
        self.observer = observer
        self.book = Book(service.name, rows)
        self.override = override
        self.tries = Tries()  # of launches and ends
        launches, before = Launches(plans.menu(service, config.launch), past), ColdStarts(history, now)
        self.starts = Starts(
            service, self.book, self.tries, launches, before, breaker, config=config, observer=observer
        )
        self.retired = retired  # of a YAML that is not served any more: wound down, not published
        self.stopping = False
        self.decision = Decision(0, "cold", "just started")
        self.frozen: str | None = None
        self.signs: dict[str, Signs] = {}
        self.meter = Meter(now)
        self.written_off: set[str] = set()
        self._memory = Memory()
        self._witness = Witness()
        self._told: tuple[int, str] | None = None  # the last decision that was worth telling
        self._window: int | None = None  # the last one a replica reported
        self._kept: set[str] = set()  # FAILED, and not ended yet

    def __repr__(self) -> str:
        return f"<Fleet {self.service.name} target={self.decision.target} {self.meter!r} {self.book!r}>"

    # ------------------------------------------------------------ what it is told

    @property
    def rows(self) -> dict[str, Replica]:
        return self.book.rows

    @property
    def launches(self) -> Launches:
        return self.starts.launches

    @property
    def breaker(self) -> Breaker:
        return self.starts.breaker

    @property
    def policy(self) -> Policy:
        last = self.starts.past.last_total
        merged = merge(self.service.policy, self.config, self.override, last_start=last)
        return replace(merged, min=0, max=0) if self.retired else merged

    @property
    def probe_interval(self) -> float:
        return self.config.probe_interval or self.service.probe.endpoint_probe_interval_seconds

    def count(self, *states: State) -> int:
        return self.book.count(*states)

    @property
    def holds_still(self) -> bool:
        """Frozen, and no person wants what it would otherwise do: nothing is ended or launched."""
        return self.frozen is not None and not self.stopping and self.decision.code != "paused"

    def outdated(self, r: Replica) -> bool:
        return r.spec_hash != self.service.hash

    # ------------------------------------------------------------ observe and interpret

    def hear(self, outcome: Outcome, looked: int, now: float) -> None:
        """A launch or a termination has ended."""
        r = self.rows.get(outcome.id)
        if r is None:
            return
        if r.state is State.PROVISIONING:
            if outcome.kind == "launched":
                self._witness.launched(r.id, looked)
            self.starts.hear(r, outcome, now)
        match outcome.kind:
            case "gone" if r.state is State.TERMINATING:
                self.tries.forget(r.id)
                self.move(r, Event.ABSENT, now, "verified gone")
            case "not_gone":
                pause = self.tries.failed(r.id, now, END_PAUSE_FIRST, PAUSE_MOST)
                why = f"not verified gone: {outcome.reason}; next try in {pause:.0f} s"
                self.book.set(r, reason=why)
                self.tell("terminate_failed", why, now, replica=r.id, code="terminate_failed")

    def interpret(self, seen: Evidence) -> None:
        """Evidence -> events, for each replica."""
        now = seen.now
        self.starts.past.watch(now)
        self.meter.read(self.board, None if self.retired else self.index, self.rows.values(), now)
        machines = [r for r in self.rows.values() if r.state in WITH_MACHINE]
        self.signs = {r.id: self._witness.signs(r, seen, self.board) for r in machines}
        probe = self.service.probe
        was_ready = [s for s in self.signs.values() if s.ready_at is not None]
        frozen = health.frozen(
            was_ready,
            now,
            period=self.probe_interval + max(probe.timeout_seconds, TIMEOUT_LEAST),
            threshold=probe.consecutive_failure_threshold_timeout,
        )
        if frozen != self.frozen:
            self.frozen = frozen
            self.tell("freeze", frozen or "the evidence is sound again", now, code="freeze")
        for r in list(self.rows.values()):
            instance = seen.instance(r.id)
            if instance is not None and instance.alive:
                self._learn(r, instance, now)
            if r.state is State.PROVISIONING:
                self.starts.provisioning(r, instance, seen, still=self.holds_still)
            else:
                self.starts.note_listed(r.id, instance is not None, seen)
            if r.state in WITH_MACHINE:
                self._judge(self.rows[r.id], self.signs[r.id], seen)
            if instance is None or instance.phase is None:
                self.starts.silent(self.rows[r.id], now)

    def _learn(self, r: Replica, instance: Instance, now: float) -> None:
        """URL, price, place and cold-start phase, as the provisioner tells them."""
        if found := learned(r, instance, self.launches.price(r)):
            r = self.book.set(r, **found)
        if r.state in COMING and instance.phase is not None:
            self.starts.phase(r, instance.phase, instance.progress, now)

    def _judge(self, r: Replica, signs: Signs, seen: Evidence) -> None:
        now, grace = seen.now, self.config.grace
        threshold = self.service.probe.consecutive_failure_threshold_timeout
        answers = seen.answers(r.id)
        lost = health.lost(signs, now)
        if r.state is State.STARTING:
            self.starts.judge(r, signs, lost, answers, now, still=self.holds_still)
            return
        if lost and not self.holds_still:
            self.move(r, Event.FAIL, now, signs.detail or "its machine is gone", failure=lost)
        elif r.state is State.READY and health.not_ready(signs, now, grace=grace):
            since = signs.failing_since
            self.move(r, Event.FAILING, now, f"probes fail: {signs.detail}", failing_since=since)
        elif r.state is State.NOT_READY and answers:
            self.written_off.discard(r.id)
            self.move(r, Event.PASSED, now, "it answers again")
        elif r.state is State.NOT_READY and not self.holds_still:
            # While nobody can look, and nothing could take its place, it may yet come back.
            watched = signs.listed != "unknown" and self.starts.past.watched(now, threshold)
            if watched and health.expired(signs, now, threshold=threshold, grace=grace):
                others = self.count(State.READY)
                if health.hung(signs, now, grace=grace) and not others and self.decision.target > 0:
                    self.written_off.add(r.id)  # it may yet come back; ended when its replacement is READY
                else:
                    why = f"probes failed for {threshold:.0f} s: {signs.detail}"
                    self.move(r, Event.FAIL, now, why, failure="timeout")
        elif r.state is State.DRAINING and not self.holds_still:
            if r.failing_since != signs.failing_since:
                r = self.book.set(r, failing_since=signs.failing_since)
            limit = self.config.down_drain_limit if self.stopping else self.config.drain_limit
            if answers and signs.listed == "absent":  # an end would be verified at once, and it would bill on
                if r.reason != (why := health.UNKNOWN_LIVES):
                    self.book.set(r, reason=why)
                    self.tell("terminate_failed", why, now, replica=r.id, code="terminate_failed")
            elif seen.released(r):
                self.move(r, Event.DRAINED, now, "nothing in flight")
            elif now - r.since >= limit:
                left = self.meter.in_flight.get(r.id, 0)
                self.move(r, Event.DRAINED, now, f"drain limit of {limit:.0f} s passed, {left} in flight")

    # ------------------------------------------------------------ decide and plan

    def demand(self, now: float) -> Demand:
        serving = [r for r in self.rows.values() if r.state in SERVING and r.id not in self.written_off]
        coming = [r for r in self.rows.values() if r.state in COMING]
        for r in serving:
            self._window = r.window or self._window
        ready_at = max((r.ready_at or 0.0 for r in serving), default=0.0)
        return Demand(
            waiting=self.meter.waiting,
            in_flight=sum(self.meter.in_flight.values()),
            arrived=self.meter.arrived > 0,
            qps=self.meter.qps,
            asked_at=self.meter.asked_at,
            active_at=max(self.meter.active_at, ready_at),
            window=float(max(1, min(self._window or self.config.window_max, self.config.window_max))),
            unlaunched=len(self.unlaunched()),
            coming=len(coming),
            serving=len(serving),
        )

    def unlaunched(self) -> set[str]:
        """Coming replicas that have no machine yet, as far as is known: giving them up costs nothing."""
        return {
            r.id
            for r in self.rows.values()
            if r.state is State.PENDING or (r.state is State.PROVISIONING and r.id in self.starts.unlisted)
        }

    def decide(self, now: float) -> tuple[Action, ...]:
        """The plan of this tick. Empty while the evidence is too odd to act on."""
        if self.stopping:
            return self._wind_down()
        decision = decide(self.policy, self._memory, self.demand(now), now)
        self._memory = decision.memory
        actions: tuple[Action, ...] = ()
        too_dear = self.launches.refusal(self.rows.values(), now)
        may_launch = self.breaker.may_launch(now) and too_dear is None
        if not self.frozen or decision.code == "paused":
            actions = plan(
                decision.target,
                decision.reason,
                list(self.rows.values()),
                in_flight=self.meter.in_flight,
                waiting=self.meter.waiting if decision.code != "paused" else 0,
                unlaunched=self.unlaunched(),
                written_off=self.written_off,
                outdated={r.id for r in self.rows.values() if self.outdated(r)},
                kept=self._keep(now),
                may_launch=may_launch,
            )
        if not actions and not may_launch and decision.target > self.count(*CAPACITY):
            code, cause = ("budget", too_dear) if too_dear else ("blocked", self.breaker.cause)
            decision = Decision(self.count(*CAPACITY), code, f"no launch for now: {cause}")
        self._remark(decision, bool(actions), now)
        return actions

    def kept_until(self, r: Replica) -> float | None:
        """Until when a FAILED replica's machine is held for a person to look at; None = it is not."""
        if r.state is not State.FAILED or r.failure == "preempted" or r.id in self.starts.unlisted:
            return None
        held = self.config.keep_failed > 0 and not self.stopping
        return r.since + self.config.keep_failed if held else None

    def _keep(self, now: float) -> set[str]:
        kept = {r.id for r in self.rows.values() if now < (self.kept_until(r) or 0.0)}
        for id in kept - self._kept:
            why = f"its machine is kept for {self.config.keep_failed:.0f} s: --keep-failed"
            self.tell("kept", why, now, replica=id, code="kept")
        self._kept = kept
        return kept

    def _remark(self, decision: Decision, acts: bool, now: float) -> None:
        """Tell a decision that is acted upon, or that is new; not each one that comes and goes with the
        load."""
        new = decision.code not in UNREMARKABLE and (decision.target, decision.code) != self._told
        self.decision = decision
        if new or acts:
            self._told = (decision.target, decision.code)
            self.observer.decision(self.service.name, decision.code)
            self.tell("decision", decision.reason, now, code=decision.code, target=decision.target)

    def _wind_down(self) -> tuple[Action, ...]:
        self.decision = Decision(0, "stopping", "the gateway goes down")
        actions = plan(0, "the gateway goes down", list(self.rows.values()), in_flight={}, waiting=0)
        for r in self.rows.values():
            if r.state is State.DRAINING and r.resumable:
                self.book.set(r, resumable=False)
        return actions

    def apply(self, action: Resume | Drain | Terminate, now: float) -> None:
        r = self.rows[action.id]
        match action:
            case Resume(reason=reason):
                self.move(r, Event.RESUME, now, reason)
            case Drain(reason=reason):
                self.move(r, Event.DRAIN, now, reason, resumable=not self.stopping)
            case Terminate(reason=reason) if r.state is State.FAILED:
                self.move(r, Event.TERMINATE, now, r.reason)
            case Terminate(reason=reason):
                self.observer.launch(self.service.name, "cancelled")
                self.move(r, Event.CANCEL, now, reason)

    def add(self, replica: Replica, now: float) -> None:
        self.book.add(replica, now, self.decision.code)

    # ------------------------------------------------------------ changes

    def move(self, r: Replica, event: Event, now: float, reason: str, **changes: Any) -> Replica:
        after = self.book.move(r, event, now, reason, **changes)
        if after.state not in SERVING:
            self.written_off.discard(r.id)
        if after.state is State.TERMINATING:
            self.tries.forget(r.id)  # of its launch: what is there bills
        return after

    def learn_window(self, id: str, window: int | None) -> None:
        """`max_running_requests` as the replica's load report has it."""
        r = self.rows.get(id)
        if r is not None and window is not None and r.window != window:
            self.book.set(r, window=window)

    def tell(self, kind: str, reason: str, now: float, *, replica: str | None = None, **more: Any) -> None:
        self.book.tell(kind, reason, now, replica=replica, **more)

    def forget(self, id: str) -> None:
        """A GONE replica, once saved."""
        self.starts.forget(self.rows.pop(id))
        self.tries.forget(id)
        self.signs.pop(id, None)
        self._witness.forget(id)

    def due(self, id: str, now: float) -> bool:
        """Whether its launch or end may be tried (again)."""
        return self.tries.due(id, now) and not self.holds_still
