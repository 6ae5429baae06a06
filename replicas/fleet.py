"""The replicas of one service, between the world and the pure functions: evidence in, events and plans out.

`Fleet` is mutable and belongs to the controller, which alone calls it, within a tick. It does no I/O: what
changed is in `dirty` and `news`, for the controller to save and then to act upon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from replicas import health, plans
from replicas.autoscaler import Decision, Demand, Memory, Policy, decide
from replicas.board import Board
from replicas.breaker import Breaker, failed, succeeded
from replicas.coldstarts import ColdStarts
from replicas.errands import Outcome
from replicas.evidence import Evidence, Witness, learned
from replicas.health import Signs
from replicas.journal import Observer
from replicas.launches import Launches, Why
from replicas.lifecycle import CAPACITY, COMING, SERVING, Event, Failure, Replica, State, advance
from replicas.meter import Meter
from replicas.phases import PHASES
from replicas.planner import Action, Drain, Resume, Terminate, plan
from replicas.policy import ControllerConfig, Override, merge
from replicas.probe import TIMEOUT_LEAST
from replicas.provisioners import Instance
from replicas.spec import Service

UNREMARKABLE: Final = frozenset({"cold", "steady", "rising", "falling"})  # they come and go with the load
# s; a machine that is there and whose output tells no phase by then is taken to load its model (static
# replicas never tell). At once would be wrong for a second or two each time, and so in the estimates.
SILENT_PHASE: Final = 10.0
PAUSE_MOST: Final = 300.0  # s between two tries of a launch or an end
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
        self.rows = {r.id: r for r in rows}  # GONE ones leave once they are saved
        self.breaker = breaker
        self.override = override
        self.starts = ColdStarts(history, now)
        self.launches = Launches(plans.menu(service, config.launch), past)
        self.retired = retired  # of a YAML that is not served any more: wound down, not published
        self.stopping = False
        self.decision = Decision(0, "cold", "just started")
        self.frozen: str | None = None
        self.dirty: set[str] = set()
        self.news: list[dict[str, Any]] = []
        self.retry_at: dict[str, float] = {}  # launch or terminate not again before
        self.tries: dict[str, int] = {}
        self.signs: dict[str, Signs] = {}
        self.meter = Meter(now)
        self.written_off: set[str] = set()
        self._memory = Memory()
        self._witness = Witness()
        self._told: tuple[int, str] | None = None  # the last decision that was worth telling
        self._window: int | None = None  # the last one a replica reported
        self._unlisted: set[str] = set()  # as far as is known without a machine
        self._kept: set[str] = set()  # FAILED, and not ended yet

    def __repr__(self) -> str:
        states = " ".join(f"{r.id.rpartition('-')[2]}:{r.state}" for r in self.rows.values())
        return f"<Fleet {self.service.name} target={self.decision.target} {self.meter!r} {states}>"

    # ------------------------------------------------------------ what it is told

    @property
    def policy(self) -> Policy:
        last = self.starts.last_total
        merged = merge(self.service.policy, self.config, self.override, last_start=last)
        return replace(merged, min=0, max=0) if self.retired else merged

    @property
    def probe_interval(self) -> float:
        return self.config.probe_interval or self.service.probe.endpoint_probe_interval_seconds

    def count(self, *states: State) -> int:
        return sum(r.state in states for r in self.rows.values())

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
        match outcome.kind:
            case "launched" if r.state is State.PROVISIONING:
                self._witness.launched(r.id, looked)
                self._forget_tries(r.id)
                self.launches.ended(r.id)
                self.move(r, Event.LAUNCHED, now, "the machine is there and runs the YAML")
            case "no_capacity" | "infeasible" | "try_again" if r.state is State.PROVISIONING:
                self._try_again(r, outcome.kind, outcome.reason, now)
            case "set_up_failed" if r.state is State.PROVISIONING:  # a strike, but another may fare better
                self.fail_start(r, "crashed", outcome.reason, now, quiet=True)
            case "launch_failed" if r.state is State.PROVISIONING:
                self.fail_start(r, "crashed", outcome.reason, now)
            case "gone" if r.state is State.TERMINATING:
                self._forget_tries(r.id)
                self.move(r, Event.ABSENT, now, "verified gone")
            case "not_gone":
                pause = self._back_off(r.id, now, 5.0, PAUSE_MOST)
                why = f"not verified gone: {outcome.reason}; next try in {pause:.0f} s"
                self._set(r, reason=why)
                self.tell("terminate_failed", why, now, replica=r.id, code="terminate_failed")

    def _try_again(self, r: Replica, why: Why, cause: str, now: float) -> None:
        """A launch that did not happen: on the next plan, if there is another that may be tried."""
        rows = self.rows.values()
        turn = self.launches.after(r, why, rows, now)
        if turn is None and (refusal := self.launches.refusal([o for o in rows if o.id != r.id], now)):
            self.fail_start(r, "gave_up", f"{cause}; {refusal}", now, counts=False)
        elif turn is None:
            self.fail_start(r, "crashed", cause, now)
        else:
            self.retry_at[r.id] = now + turn.pause
            changed = {} if turn.plan.name == r.plan else {"region": "", "spot": None}  # placed anew
            r = self._set(r, plan=turn.plan.name, reason=f"{cause}; {turn}", **changed)
            self.tell("launch", r.reason, now, replica=r.id, code=why, plan=r.plan)

    def interpret(self, seen: Evidence) -> None:
        """Evidence -> events, for each replica."""
        now = seen.now
        self.starts.watch(now)
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
                self._provisioning(r, instance, seen)
            else:
                self._note_listed(r.id, instance is not None, seen)
            if r.state in WITH_MACHINE:
                self._judge(self.rows[r.id], self.signs[r.id], seen)
            told = instance is not None and instance.phase is not None
            r = self.rows[r.id]
            silent = r.state is State.STARTING and r.phase in (None, PHASES[0]) and not told
            if silent and now - r.since >= SILENT_PHASE:
                self._phase(r, "load", None, now)

    def _learn(self, r: Replica, instance: Instance, now: float) -> None:
        """URL, price, place and cold-start phase, as the provisioner tells them."""
        if found := learned(r, instance, self.launches.price(r)):
            r = self._set(r, **found)
        if r.state in COMING and instance.phase is not None:
            self._phase(r, instance.phase, instance.progress, now)

    def _provisioning(self, r: Replica, instance: Instance | None, seen: Evidence) -> None:
        known = instance is not None and instance.alive
        self._note_listed(r.id, known, seen)
        # What a failed attempt has left is no machine, while the next one is waited for.
        has_one = known and seen.now >= self.retry_at.get(r.id, 0.0)
        limit = self.config.provision_timeout + (self.service.probe.initial_delay_seconds if has_one else 0.0)
        begun = max(r.since, self.starts.watched_since)  # a restart calls launch anew
        if seen.now - begun >= limit and not self.holds_still:
            last = self.rows[r.id].reason
            self.fail_start(r, "gave_up", f"no machine within {limit:.0f} s ({last})", seen.now, counts=False)

    def _note_listed(self, id: str, known: bool, seen: Evidence) -> None:
        if known or seen.instances is None:
            self._unlisted.discard(id)
        else:
            self._unlisted.add(id)

    def _judge(self, r: Replica, signs: Signs, seen: Evidence) -> None:
        now, grace = seen.now, self.config.grace
        threshold = self.service.probe.consecutive_failure_threshold_timeout
        answers = seen.answers(r.id)
        lost = health.lost(signs, now)
        if r.state is State.STARTING:
            self._starting(r, signs, lost, answers, now)
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
            watched = signs.listed != "unknown" and self.starts.watched(now, threshold)
            if watched and health.expired(signs, now, threshold=threshold, grace=grace):
                others = self.count(State.READY)
                if health.hung(signs, now, grace=grace) and not others and self.decision.target > 0:
                    self.written_off.add(r.id)  # it may yet come back; ended when its replacement is READY
                else:
                    why = f"probes failed for {threshold:.0f} s: {signs.detail}"
                    self.move(r, Event.FAIL, now, why, failure="timeout")
        elif r.state is State.DRAINING and not self.holds_still:
            if r.failing_since != signs.failing_since:
                r = self._set(r, failing_since=signs.failing_since)
            limit = self.config.down_drain_limit if self.stopping else self.config.drain_limit
            if answers and signs.listed == "absent":  # an end would be verified at once, and it would bill on
                if r.reason != (why := health.UNKNOWN_LIVES):
                    self._set(r, reason=why)
                    self.tell("terminate_failed", why, now, replica=r.id, code="terminate_failed")
            elif seen.released(r):
                self.move(r, Event.DRAINED, now, "nothing in flight")
            elif now - r.since >= limit:
                left = self.meter.in_flight.get(r.id, 0)
                self.move(r, Event.DRAINED, now, f"drain limit of {limit:.0f} s passed, {left} in flight")

    def _starting(self, r: Replica, signs: Signs, lost: Failure | None, answers: bool, now: float) -> None:
        begun = r.since if r.launched_at is None else r.launched_at
        delay = self.service.probe.initial_delay_seconds
        if answers and r.url is not None:
            self._ready(r, now)
        elif self.holds_still:
            return
        elif lost == "preempted":
            self.fail_start(r, lost, "its machine is gone", now, counts=False, quiet=True)
        elif lost:
            self.fail_start(r, lost, signs.detail or "`run` ended before it was ready", now)
        elif now - begun >= delay and self.starts.watched(now, delay):
            said = f" ({signs.detail})" if signs.detail else ""
            self.fail_start(r, "timeout", f"not ready within the initial delay of {delay:.0f} s{said}", now)

    def _phase(self, r: Replica, phase: str, progress: float | None, now: float) -> None:
        after = self.starts.phase(r, phase, progress, now)
        self.rows[r.id] = after
        if after.phase != r.phase:
            self.dirty.add(r.id)
            self.tell("phase", f"{phase} begins", now, replica=r.id, code=phase)

    def _ready(self, r: Replica, now: float) -> None:
        self.breaker = succeeded(self.breaker)
        self.observer.launch(self.service.name, "ready")
        for phase, seconds in self.starts.ready(r, now).items():
            self.observer.cold_start(self.service.name, phase, seconds)
            took = {"phase": phase, "seconds": seconds, "spec_hash": r.spec_hash, "plan": r.plan}
            self.tell("cold_start", f"{phase} took {seconds:.1f} s", now, replica=r.id, code=phase, **took)
        self.move(r, Event.PASSED, now, "the readiness probe passed")

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
            if r.state is State.PENDING or (r.state is State.PROVISIONING and r.id in self._unlisted)
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
        if r.state is not State.FAILED or r.failure == "preempted" or r.id in self._unlisted:
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
                self._set(r, resumable=False)
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
        self.rows[replica.id] = replica
        self.dirty.add(replica.id)
        self.tell("launch", replica.reason, now, replica=replica.id, code=self.decision.code)

    # ------------------------------------------------------------ changes

    def fail_start(
        self,
        r: Replica,
        failure: Failure,
        cause: str,
        now: float,
        *,
        counts: bool = True,
        quiet: bool = False,
    ) -> None:
        """A start has failed: the replica is FAILED, and the breaker knows."""
        self.breaker = failed(self.breaker, cause, now, counts=counts, quiet=quiet)
        self.observer.launch(self.service.name, "failed")
        self.starts.forget(r.id)
        self.move(self.rows[r.id], Event.FAIL, now, cause, failure=failure)
        if message := self.breaker.message(now):
            self.tell("breaker", message, now, code="blocked" if self.breaker.blocked() else "cool_down")

    def move(self, r: Replica, event: Event, now: float, reason: str, **changes: Any) -> Replica:
        after = advance(r, event, now, reason=reason, **changes)
        self.rows[r.id] = after
        self.dirty.add(r.id)
        if after.state not in SERVING:
            self.written_off.discard(r.id)
        if after.state is State.TERMINATING:
            self._forget_tries(r.id)  # of its launch: what is there bills
        self.tell("transition", reason, now, replica=r.id, code=str(event), state=str(after.state))
        return after

    def _set(self, r: Replica, **changes: Any) -> Replica:
        self.rows[r.id] = after = replace(self.rows[r.id], **changes)
        self.dirty.add(r.id)
        return after

    def learn_window(self, id: str, window: int | None) -> None:
        """`max_running_requests` as the replica's load report has it."""
        r = self.rows.get(id)
        if r is not None and window is not None and r.window != window:
            self._set(r, window=window)

    def begin_launch(self, r: Replica, now: float) -> Replica:
        options = self.launches.choices(r, self.rows.values(), now)
        if not options:  # it was decided upon together with another, for which there was money
            return self.move(r, Event.CANCEL, now, "all that it may run on costs too much for now")
        r = self._set(r, plan=options[0].name)
        on = f" (plan=1/{len(options)} {r.plan})" if r.plan else ""
        r = self.move(r, Event.LAUNCH, now, r.reason + on)
        self._phase(r, PHASES[0], None, now)
        return self.rows[r.id]

    def tell(self, kind: str, reason: str, now: float, *, replica: str | None = None, **more: Any) -> None:
        event = {"at": now, "service": self.service.name, "replica": replica, "kind": kind, "reason": reason}
        self.news.append({**event, **more})

    def forget(self, id: str) -> None:
        """A GONE replica, once saved."""
        r = self.rows.pop(id)
        self.launches.gone(r, r.since)
        for kept in (self.retry_at, self.tries, self.signs):
            kept.pop(id, None)
        self._witness.forget(id)
        self.starts.forget(id)
        self._unlisted.discard(id)

    def _back_off(self, id: str, now: float, first: float, most: float) -> float:
        self.tries[id] = self.tries.get(id, 0) + 1
        pause = min(most, first * 2.0 ** min(self.tries[id] - 1, 16))
        self.retry_at[id] = now + pause
        return pause

    def due(self, id: str, now: float) -> bool:
        """Whether its launch or end may be tried (again). No pause is longer: else the clock was set back."""
        return not 0 < self.retry_at.get(id, 0.0) - now <= PAUSE_MOST and not self.holds_still

    def _forget_tries(self, id: str) -> None:
        self.tries.pop(id, None)
        self.retry_at.pop(id, None)
