"""Where replicas come from: one Protocol of three idempotent verbs, and what they speak in. PURE.

`local` runs replicas as processes of this machine, `static` hands out servers that somebody else runs,
`skypilot` launches clusters. One conformance suite (tests/replicas/provisioners/) holds for all of them.

Errors, named by what the caller may do next:

    LaunchError          the launch did not happen; `permanent` says whether asking again could help
    ├─ NoCapacity        nothing free at the moment (never permanent): the next plan; hold the requests
    ├─ Infeasible        nothing of this kind exists for us: no use asking again, another plan may fit
    └─ SetUpFailed       machines came and could not be set up: end what is there; a new one may fare better
    TerminateError       the replica is not verified gone and may still cost money: call terminate again
    InstancesUnknown     what exists could not be found out; conclude nothing from it, ask again
"""
from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

from replicas.plans import Plan

if TYPE_CHECKING:
    from replicas.spec import Service


class LaunchError(Exception):
    """A launch that did not happen. `reason` is a sentence for people: the provisioner's own cause.

    `permanent`: the same launch would fail again (bad YAML, no cloud access), so nobody should wait for it.
    """

    def __init__(self, reason: str, *, permanent: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.permanent = permanent


class NoCapacity(LaunchError):
    """Nothing free anywhere it may be launched, right now."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, permanent=False)


class Infeasible(LaunchError):
    """What the plan asks for can never be had, and it is the plan's fault."""


class SetUpFailed(LaunchError):
    """The machines are there, and a command on them failed. Nobody knows what they lack: end them."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, permanent=False)


YAML_DECIDES: Final = Plan()
"""The plan that leaves everything to the YAML."""


class TerminateError(Exception):
    """The replica is not verified gone. The caller must keep its row and call `terminate` again."""


class InstancesUnknown(Exception):
    """The provisioner cannot say what exists (its API does not answer). Not the same as "nothing exists"."""


Ended = Literal["run", "machine", "unreachable"]
"""run: its program. machine: taken from us, or stopped. unreachable: so it is said by one who may himself be
the one that is cut off, so that several at once prove nothing."""


@dataclass(frozen=True, slots=True)
class Instance:
    """What a provisioner really has under a replica's id."""

    id: str
    alive: bool                       # False: it ended by itself or was taken from us; terminate it
    url: str | None = None            # base URL without a trailing slash; None while there is none to dial
    phase: str | None = None          # cold-start phase (replicas/phases.py); None: not known, or over
    progress: float | None = None     # of the phase, 0..1
    hourly_cost: float | None = None  # dollars per hour for the whole replica, all its nodes
    generation: float | None = None   # tokens per second, as its output tells; None: it does not
    detail: str = ""                  # why it is dead: exit code and last words; "" when alive
    ended: Ended = "run"              # what of it has, when it is dead
    region: str = ""                  # where it was placed: "aws/us-east-1/us-east-1a"; "" = not known
    spot: bool | None = None          # whether on a spot machine; None = not known
    launched_at: float | None = None  # unix time of its launch; None = not known


@dataclass(frozen=True, slots=True)
class Other:
    """A machine that the provisioner lists and that is not ours. It is shown, and never touched."""

    name: str
    status: str                       # in the provisioner's own words
    hourly_cost: float | None = None  # dollars per hour of all its nodes; None = not known


class Provisioner(Protocol):
    """Three idempotent verbs. Each may be called again after a crash in the middle of the last call."""

    async def launch(
        self, replica_id: str, service: Service, env: Mapping[str, str], plan: Plan = YAML_DECIDES
    ) -> None:
        """Make the replica exist and submit its `run`; return then, long before it can serve.

        A second launch of a live id does nothing. `plan` says on which hardware; its variables are added to
        the YAML's envs and secrets and win over them, and `env` over all.
        Raises LaunchError (or NoCapacity); what a failed launch left behind is shown by `instances` and
        removed by `terminate`. Cancelling the call undoes nothing: `terminate` does.
        """

    async def terminate(self, replica_id: str) -> None:
        """End the replica, return when verified gone; an absent id is success. Raises TerminateError."""

    async def instances(self, fresh: Collection[str] = ()) -> dict[str, Instance]:
        """All of **our** owner that truly exists, and what ended without having been terminated.

        `fresh`: ids that do not answer any more: what is remembered of them, state and URL, is asked anew.
        Raises InstancesUnknown when that cannot be told; an empty answer means: nothing exists.
        """

    async def others(self, services: Collection[str]) -> list[Other]:
        """What is **not** ours but looks as if it were these services' (`concerns`), as the last `instances`
        found it: nothing is asked anew. Empty where a provisioner sees only its own."""

    async def close(self) -> None:
        """Release threads and files of this process. Ends no replica."""


def owned_by(replica_id: str, owner: str) -> bool:
    """Whether the name is `<service>-gw-<owner>-<n>` of this owner: nothing else is ever touched."""
    service, _, number = replica_id.rpartition(f"-gw-{owner}-")
    return bool(service) and number.isascii() and number.isdigit()


_REPLICA: Final = re.compile(r"(?s:(.+))-gw-([0-9a-f]{8})-([0-9]+)")


def service_and_owner(replica_id: str) -> tuple[str, str] | None:
    """Of a name that some gateway has given; None for any other."""
    match = _REPLICA.fullmatch(replica_id)
    return None if match is None else (match[1], match[2])


def concerns(name: str, services: Collection[str]) -> bool:
    """Whether a machine that is not ours is worth showing: another gateway's replica, or launched by hand for
    one of these services, which its name begins with: `r1`, `r1-A100` and `R1_test` for r1, not `r10`.

    On an API server that many people share all else is their business.
    """
    if service_and_owner(name) is not None:
        return True
    starts = (re.match(re.escape(service), name, re.IGNORECASE) for service in services)
    return any(start is not None and not name[start.end() : start.end() + 1].isalnum() for start in starts)
