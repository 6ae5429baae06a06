"""The starts of one service's replicas, from PENDING to READY: on which plan, in which phase, and what a
failed one means for the next."""

from __future__ import annotations

from typing import Final

from replicas.book import Book
from replicas.breaker import Breaker, failed, retried, succeeded
from replicas.coldstarts import ColdStarts
from replicas.errands import Outcome
from replicas.evidence import Evidence
from replicas.health import Signs
from replicas.journal import Observer
from replicas.launches import Launches, Why
from replicas.lifecycle import Event, Failure, Replica, State
from replicas.phases import PHASES
from replicas.policy import ControllerConfig
from replicas.provisioners import Instance
from replicas.spec import Service
from replicas.tries import Tries

# s; a machine that is there and whose output tells no phase by then is taken to load its model (static
# replicas never tell). At once would be wrong for a second or two each time, and so in the estimates.
SILENT_PHASE: Final = 10.0


class Starts:
    """Mutable, by the fleet, within a tick: the breaker, the plans tried, the phases under way, and which of
    the replicas have no machine as far as is known (`unlisted`)."""

    def __init__(
        self,
        service: Service,
        book: Book,
        tries: Tries,
        launches: Launches,
        past: ColdStarts,
        breaker: Breaker,
        *,
        config: ControllerConfig,
        observer: Observer,
    ) -> None:
        self.launches = launches
        self.past = past
        self.breaker = breaker
        self.unlisted: set[str] = set()
        self._service = service
        self._book = book
        self._tries = tries
        self._config = config
        self._observer = observer

    def __repr__(self) -> str:
        return f"<Starts {self.launches!r} {self.past!r} failures={self.breaker.failures}>"

    def begin(self, now: float) -> None:
        """PENDING -> PROVISIONING, each on the best plan there is."""
        for r in list(self._book.rows.values()):
            if r.state is State.PENDING:
                self._begin(r, now)

    def _begin(self, r: Replica, now: float) -> None:
        options = self.launches.choices(r, self._book.rows.values(), now)
        if not options:  # it was decided upon together with another, for which there was money
            self._book.move(r, Event.CANCEL, now, "all that it may run on costs too much for now")
            return
        r = self._book.set(r, plan=options[0].name)
        on = f" (plan=1/{len(options)} {r.plan})" if r.plan else ""
        r = self._book.move(r, Event.LAUNCH, now, r.reason + on)
        self.phase(r, PHASES[0], None, now)

    def hear(self, r: Replica, outcome: Outcome, now: float) -> None:
        """The launch of a replica that is PROVISIONING has ended."""
        match outcome.kind:
            case "launched":
                self._tries.forget(r.id)
                self.launches.ended(r.id)
                self._book.move(r, Event.LAUNCHED, now, "the machine is there and runs the YAML")
            case "no_capacity" | "infeasible" | "try_again":
                self._try_again(r, outcome.kind, outcome.reason, now)
            case "set_up_failed":  # a strike, but another may fare better
                self.fail(r, "crashed", outcome.reason, now, quiet=True)
            case "launch_failed":
                self.fail(r, "crashed", outcome.reason, now)

    def _try_again(self, r: Replica, why: Why, cause: str, now: float) -> None:
        """A launch that did not happen: on the next plan, if there is another that may be tried."""
        rows = self._book.rows.values()
        turn = self.launches.after(r, why, rows, now)
        if turn is None and (refusal := self.launches.refusal([o for o in rows if o.id != r.id], now)):
            self.fail(r, "gave_up", f"{cause}; {refusal}", now, counts=False)
        elif turn is None:
            self.fail(r, "crashed", cause, now)
        else:
            self._tries.pause(r.id, now, turn.pause)
            changed = {} if turn.plan.name == r.plan else {"region": "", "spot": None}  # placed anew
            r = self._book.set(r, plan=turn.plan.name, reason=f"{cause}; {turn}", **changed)
            self._book.tell("launch", r.reason, now, replica=r.id, code=why, plan=r.plan)

    def provisioning(self, r: Replica, instance: Instance | None, seen: Evidence, *, still: bool) -> None:
        """A look at what there is of a replica that is PROVISIONING. `still`: nothing is ended for now."""
        known = instance is not None and instance.alive
        self.note_listed(r.id, known, seen)
        # What a failed attempt has left is no machine, while the next one is waited for.
        has_one = known and self._tries.due(r.id, seen.now)
        delay = self._service.probe.initial_delay_seconds
        limit = self._config.provision_timeout + (delay if has_one else 0.0)
        begun = max(r.since, self.past.watched_since)  # a restart calls launch anew
        if seen.now - begun >= limit and not still:
            last = self._book.rows[r.id].reason
            self.fail(r, "gave_up", f"no machine within {limit:.0f} s ({last})", seen.now, counts=False)

    def note_listed(self, id: str, known: bool, seen: Evidence) -> None:
        if known or seen.instances is None:
            self.unlisted.discard(id)
        else:
            self.unlisted.add(id)

    def judge(
        self, r: Replica, signs: Signs, lost: Failure | None, answers: bool, now: float, *, still: bool
    ) -> None:
        """What has become of a replica that is STARTING. `lost`: as health.lost says."""
        begun = r.since if r.launched_at is None else r.launched_at
        delay = self._service.probe.initial_delay_seconds
        if answers and r.url is not None:
            self._ready(r, now)
        elif still:
            return
        elif lost == "preempted":
            self.fail(r, lost, "its machine is gone", now, counts=False, quiet=True)
        elif lost:
            self.fail(r, lost, signs.detail or "`run` ended before it was ready", now)
        elif now - begun >= delay and self.past.watched(now, delay):
            said = f" ({signs.detail})" if signs.detail else ""
            self.fail(r, "timeout", f"not ready within the initial delay of {delay:.0f} s{said}", now)

    def phase(self, r: Replica, phase: str, progress: float | None, now: float) -> None:
        after = self.past.phase(r, phase, progress, now)
        self._book.rows[r.id] = after
        if after.phase != r.phase:
            self._book.dirty.add(r.id)
            self._book.tell("phase", f"{phase} begins", now, replica=r.id, code=phase)

    def silent(self, r: Replica, now: float) -> None:
        """Its output tells no phase."""
        if r.state is State.STARTING and r.phase in (None, PHASES[0]) and now - r.since >= SILENT_PHASE:
            self.phase(r, "load", None, now)

    def _ready(self, r: Replica, now: float) -> None:
        self.breaker = succeeded(self.breaker)
        self._observer.launch(self._service.name, "ready")
        for phase, seconds in self.past.ready(r, now).items():
            self._observer.cold_start(self._service.name, phase, seconds)
            took = {"phase": phase, "seconds": seconds, "spec_hash": r.spec_hash, "plan": r.plan}
            said = f"{phase} took {seconds:.1f} s"
            self._book.tell("cold_start", said, now, replica=r.id, code=phase, **took)
        self._book.move(r, Event.PASSED, now, "the readiness probe passed")

    def fail(
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
        self._observer.launch(self._service.name, "failed")
        self.past.forget(r.id)
        self._book.move(self._book.rows[r.id], Event.FAIL, now, cause, failure=failure)
        if message := self.breaker.message(now):
            code = "blocked" if self.breaker.blocked() else "cool_down"
            self._book.tell("breaker", message, now, code=code)

    def retry(self, now: float) -> None:
        """A person allows a launch at once, whatever has failed before."""
        self.breaker = retried(self.breaker)
        self._book.tell("retry", "another start is allowed: a person asked for it", now, code="retry")

    def forget(self, r: Replica) -> None:
        """It is gone."""
        self.launches.gone(r, r.since)
        self.past.forget(r.id)
        self.unlisted.discard(r.id)
