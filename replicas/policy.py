"""Limits and speeds of one service, merged from where they may be said: the YAML, the flags, `gateway scale`.

PURE.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from replicas.autoscaler import CANCEL_AFTER, Policy
from replicas.health import GRACE
from replicas.plans import Options
from replicas.schema import ReplicaPolicy


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """What the controller is told by flags. Seconds; None = the YAML's figure, or as said."""

    min_replicas: int | None = None
    max_replicas: int | None = None
    target_in_flight: float | None = None  # None = the window
    upscale_delay: float | None = None
    downscale_delay: float | None = None
    idle_timeout: float | None = None  # None = the larger of the downscale delay and the last cold start
    window_max: int = 64
    provision_timeout: float = 1200.0
    drain_limit: float = 3600.0
    down_drain_limit: float = 30.0  # the same for `gateway down`
    probe_interval: float | None = None
    hold_max: float | None = None  # None = provision timeout + initial delay + 300
    replica_api_key: str | None = field(default=None, repr=False)  # None = one is made per service
    cancel_after: float = CANCEL_AFTER  # nobody has asked for so long: a start without a machine is given up
    grace: float = GRACE
    dead_man: float = 7200.0  # from the last sign of life of ours to the end of a machine that can end itself
    keep_failed: float = 0.0  # a FAILED replica's machine is held for so long before it is ended
    launch: Options = field(default_factory=Options)  # on which hardware, for how much money
    look_every: float = 1.0  # between two looks at what the provisioner has


@dataclass(frozen=True, slots=True)
class Override:
    """Limits that a person has set; None = not set by them."""

    min: int | None = None
    max: int | None = None

    def changed(self, min: int | None, max: int | None, now: int) -> Override:
        """With these instead, None as it is; `now`: the maximum in effect. :raises ValueError:"""
        if any(n is not None and n < 0 for n in (min, max)):
            raise ValueError("limits are 0 or more")
        highest = now if max is None else max
        if min is not None and min > highest:
            raise ValueError(f"min {min} is above max {highest}")
        return Override(self.min if min is None else min, self.max if max is None else max)


def merge(
    yaml: ReplicaPolicy, config: ControllerConfig, override: Override | None, *, last_start: float
) -> Policy:
    """What a person has set wins over a flag, a flag over the YAML. `last_start`: seconds the last cold start
    took.

    A maximum below the minimum lowers the minimum: `gateway scale --max 0` pauses whatever the YAML's minimum
    is.
    """
    said = override or Override()
    low = next(n for n in (said.min, config.min_replicas, yaml.min_replicas) if n is not None)
    high = next(n for n in (said.max, config.max_replicas, yaml.max_replicas) if n is not None)
    qps = yaml.target_qps_per_replica
    down = yaml.downscale_delay_seconds if config.downscale_delay is None else config.downscale_delay
    return Policy(
        min=min(low, high),
        max=high,
        overprovision=yaml.num_overprovision,
        target_in_flight=config.target_in_flight,
        # Per accelerator: which one a replica got is not known here, so the weakest figure holds for all.
        target_qps=min(qps.values()) if isinstance(qps, dict) else qps,
        upscale_delay=yaml.upscale_delay_seconds if config.upscale_delay is None else config.upscale_delay,
        downscale_delay=down,
        idle_timeout=max(down, last_start) if config.idle_timeout is None else config.idle_timeout,
        cancel_after=config.cancel_after,
    )
