"""What SkyPilot's SDK takes and returns, as far as we look."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from types import SimpleNamespace


class Mode(enum.Enum):
    NONE = "none"
    AUTO = "auto"
    FORCE = "force"


class WaitFor(enum.Enum):
    """sky.skylet.autostop_lib.AutostopWaitFor"""

    NONE = "none"


@dataclass
class Resources:
    price: float = 30.0
    place: str = "aws/us-east-1/us-east-1a"
    use_spot: bool = False

    @property
    def infra(self) -> SimpleNamespace:
        return SimpleNamespace(to_str=lambda: self.place)

    def get_cost(self, seconds: float) -> float:
        return self.price * seconds / 3600


def handle(host: str = "10.0.0.11") -> SimpleNamespace:
    """sky.backends.CloudVmRayResourceHandle of two nodes, as far as we look."""
    return SimpleNamespace(
        launched_resources=Resources(),
        launched_nodes=2,
        head_ip="10.0.0.1",   # on Slurm the login host's
        stable_internal_external_ips=[(host, "10.0.0.1"), ("10.0.0.12", "10.0.0.1")],
    )


@dataclass
class Cluster:
    """What sky.status returns for one (sky/schemas/api/responses.py: StatusResponse), as far as we look."""

    name: str
    status: SimpleNamespace
    init_kind: str | None = None
    init_status_reason: str | None = None
    last_event: str | None = None
    cluster_ever_up: bool = False
    launched_at: int = 1_800_000_000
    handle: SimpleNamespace = field(default_factory=handle)

    def become(self, status: str, kind: str | None = None, why: str | None = None) -> None:
        self.status, self.init_kind, self.init_status_reason = SimpleNamespace(value=status), kind, why
        self.cluster_ever_up = self.cluster_ever_up or status == "UP"


@dataclass
class Request:
    """A launch in the API server (sky.server.requests.payloads.RequestPayload, as far as we look)."""

    request_id: str
    cluster_name: str
    name: str = "sky.launch"
    status: str = "RUNNING"
    job: bool = False   # it got as far as submitting `run`
    error: Exception | None = None
