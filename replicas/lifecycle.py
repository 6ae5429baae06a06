"""The life of one replica: states, events, and the one table that says which event is legal where.

PURE. A `Replica` is a value; `advance` returns the next value or raises `IllegalTransition`. Who decides
*that* an event happened is controller.py; what the table does not list cannot happen. The README's diagram is
drawn from the table by `diagram()`.

All times are wall-clock unix seconds, because they are stored and survive a restart of the gateway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, Literal

Failure = Literal["preempted", "crashed", "timeout", "gave_up"]
"""Why a replica FAILED. preempted: its machine is gone. crashed: machine there, `run` ended (or a permanent
launch error). timeout: never READY within the initial delay, or probes failed for too long. gave_up: no
capacity within the provision timeout."""


class State(StrEnum):
    PENDING = "pending"  # decided and saved; launch not called yet
    PROVISIONING = "provisioning"  # launch called, has not returned
    STARTING = "starting"  # machine there, `run` submitted, not READY yet; the initial delay counts from here
    READY = "ready"
    NOT_READY = "not_ready"  # was READY, probes fail; out of rotation, still counted as capacity
    DRAINING = "draining"  # takes nothing new; finishes what it has
    FAILED = "failed"  # will be terminated; `failure` says why
    TERMINATING = "terminating"  # terminate called until the provisioner verifies that nothing is left
    GONE = "gone"  # verified absent; kept as history only


class Event(StrEnum):
    LAUNCH = "launch"  # provisioner.launch is about to be called
    LAUNCHED = "launched"  # it returned: the machine exists and `run` was submitted
    PASSED = "passed"  # a readiness probe answered
    FAILING = "failing"  # readiness probes fail and nothing else shows life
    DRAIN = "drain"  # take it out of rotation
    RESUME = "resume"  # demand is back before the drain ended
    DRAINED = "drained"  # nothing in flight, or the drain limit passed
    CANCEL = "cancel"  # not wanted any more before it was READY; no failure
    FAIL = "fail"  # `failure` says why
    TERMINATE = "terminate"  # a FAILED replica is cleaned up
    ABSENT = "absent"  # the provisioner has verified that nothing is left


_S, _E = State, Event

TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = {
    (_S.PENDING, _E.LAUNCH): _S.PROVISIONING,
    (_S.PROVISIONING, _E.LAUNCHED): _S.STARTING,
    (_S.STARTING, _E.PASSED): _S.READY,
    (_S.READY, _E.FAILING): _S.NOT_READY,
    (_S.NOT_READY, _E.PASSED): _S.READY,
    (_S.READY, _E.DRAIN): _S.DRAINING,
    (_S.NOT_READY, _E.DRAIN): _S.DRAINING,
    (_S.DRAINING, _E.RESUME): _S.READY,
    (_S.DRAINING, _E.DRAINED): _S.TERMINATING,
    (_S.PENDING, _E.CANCEL): _S.TERMINATING,
    (_S.PROVISIONING, _E.CANCEL): _S.TERMINATING,
    (_S.STARTING, _E.CANCEL): _S.TERMINATING,
    (_S.PROVISIONING, _E.FAIL): _S.FAILED,
    (_S.STARTING, _E.FAIL): _S.FAILED,
    (_S.READY, _E.FAIL): _S.FAILED,
    (_S.NOT_READY, _E.FAIL): _S.FAILED,
    (_S.DRAINING, _E.FAIL): _S.FAILED,
    (_S.FAILED, _E.TERMINATE): _S.TERMINATING,
    (_S.TERMINATING, _E.ABSENT): _S.GONE,
}

COMING: Final = frozenset({State.PENDING, State.PROVISIONING, State.STARTING})
"""Cold: will serve if all goes well."""
SERVING: Final = frozenset({State.READY, State.NOT_READY})
CAPACITY: Final = COMING | SERVING
"""What counts toward the target."""


class IllegalTransition(Exception):
    """The table has no such event in such a state: a bug of the caller, never of the world."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica, from the decision to launch it until it is verified gone."""

    id: str  # `<service>-gw-<owner>-<n>`, for life; also the SkyPilot cluster name
    service: str
    n: int  # never reused
    slot: int  # board slot; reused only when no worker can still count in it
    spec_hash: str  # Service.hash of the YAML it was (or will be) launched from
    spec_text: str  # that YAML, so that a launch can be repeated after a restart
    state: State
    since: float  # entered `state` then
    created_at: float
    url: str | None = None  # http://host:port, no path
    phase: str | None = None  # of the cold start: provision setup download load warmup
    phase_since: float | None = None
    progress: float | None = None  # 0..1 within the phase
    reason: str = ""  # English: why it is in this state
    failure: Failure | None = None
    failing_since: float | None = None  # first of the unbroken run of failed probes
    launched_at: float | None = None  # launch returned
    ready_at: float | None = None  # first READY
    hourly_cost: float | None = None  # dollars per hour
    window: int | None = None  # max_running_requests as the replica reports it; None = unknown
    resumable: bool = False  # DRAINING for scale-down alone: demand may call it back
    plan: str = ""  # the name of the launch plan in use (replicas/plans.py); "" = the YAML decides everything
    region: str = ""  # where it was placed: `aws/us-east-1/us-east-1a`, as far as known
    spot: bool | None = None  # whether on a spot machine; None = not known, or as the plan says

    def __repr__(self) -> str:
        why = f" ({self.failure})" if self.failure else ""
        return f"<Replica {self.id} {self.state}{why} slot={self.slot}>"


_FIXED: Final = frozenset({"id", "service", "n", "slot", "state", "since", "created_at"})


def new(
    id: str, service: str, n: int, slot: int, *, spec_hash: str, spec_text: str, now: float, reason: str
) -> Replica:
    return Replica(id, service, n, slot, spec_hash, spec_text, State.PENDING, now, now, reason=reason)


def advance(replica: Replica, event: Event, now: float, **changes: Any) -> Replica:
    """The replica after `event`.

    `changes` are further fields to set, e.g. `reason="..."`, `url=...`; FAIL needs `failure=`. Sets by itself
    what the event implies: since, launched_at, the first ready_at, and the end of a run of failed probes.

    :raises IllegalTransition: the table has no such event in this state.
    :raises ValueError: a change of a field that is fixed for life, or FAIL without a failure.
    """
    to = TRANSITIONS.get((replica.state, event))
    if to is None:
        raise IllegalTransition(f"{event} is not possible for {replica!r}")
    if wrong := _FIXED & changes.keys():
        raise ValueError(f"advance may not set {', '.join(sorted(wrong))}")
    if (event is Event.FAIL) != ("failure" in changes):
        raise ValueError("a failure goes with the event `fail`, and with no other")
    implied: dict[str, Any] = {}
    if event is Event.LAUNCHED:
        implied["launched_at"] = now
    if to is State.READY:
        implied.update(failing_since=None, resumable=False, ready_at=replica.ready_at or now)
    if event is Event.PASSED:
        implied.update(phase=None, phase_since=None, progress=None)
    if event is Event.FAILING:
        implied["failing_since"] = replica.failing_since or now
    return replace(replica, **{**implied, **changes, "state": to, "since": now})


def diagram() -> str:
    """The table as a mermaid state diagram (the README holds exactly this text)."""
    lines = ["stateDiagram-v2", "    [*] --> pending"]
    lines += [f"    {state} --> {to}: {event}" for (state, event), to in TRANSITIONS.items()]
    return "\n".join([*lines, "    gone --> [*]"])
