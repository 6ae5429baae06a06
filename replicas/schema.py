"""The keys of a SkyPilot YAML as pydantic models, and their errors as one line each. PURE; spec.py is its
only user.

The `description` of a field says what is allowed, and is what a message quotes: `must be DESCRIPTION, not
VALUE`. `resources`, `file_mounts`, `workdir`, `volumes`, `config` are checked by SkyPilot itself when it
is given the task.
"""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from typing import Annotated, Any, Final

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from replicas.document import one_line, shown

BALANCING: Final = ("least_load", "round_robin", "instance_aware_least_load")
"""sky/serve/load_balancing_policies.py"""

_SECONDS = "a number of seconds, 0 or more"
_POSITIVE = "a number of seconds greater than 0"
_COUNT = "a whole number, 0 or more"
_ACCELERATOR = re.compile(r"[A-Za-z0-9][-.\w]*(:[0-9]+)?", re.ASCII)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ReadinessProbe(_Strict):
    """How to ask a replica whether it is ready. GET, or POST when `post_data` is given; 200 alone is yes."""

    path: str = Field(pattern=r"^/\S*$", description="a path that starts with '/'")
    initial_delay_seconds: float = Field(default=1200, ge=0, description=_SECONDS)
    """From STARTING on, a replica may fail its probe this long. SkyPilot: sky/serve/constants.py, as
    the others below."""
    timeout_seconds: float = Field(default=15, gt=0, description=_POSITIVE)
    """Of one probe. SGLang's /health answers in 1.0 s when well and in 20 s when frozen: better above 20."""
    endpoint_probe_interval_seconds: float = Field(default=10, gt=0, description=_POSITIVE)
    consecutive_failure_threshold_timeout: float = Field(default=180, ge=0, description=_SECONDS)
    """A READY replica that fails its probe this long has failed."""
    post_data: dict[str, Any] | None = Field(
        default=None, description="a JSON object or a string that holds one"
    )
    headers: dict[str, Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]*$")]] = Field(
        default={}, description="a mapping of header names to one-line strings"
    )

    @field_validator("post_data", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return json.loads(value)
            except ValueError:
                return value  # a string is not what the field allows, and the message says so
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:  # a date, as YAML reads one without quotes
            raise ValueError(f"cannot be sent as JSON ({error}); quote it") from None
        return value


class ReplicaPolicy(_Strict):
    """How many replicas. `max_replicas` left out means a fixed number, as in SkyPilot."""

    min_replicas: int = Field(ge=0, description=_COUNT)
    max_replicas: int = Field(ge=0, description=_COUNT)
    target_qps_per_replica: float | dict[str, float] | None = Field(
        default=None,
        description="a number greater than 0, or a mapping of accelerators such as H100:8 to such numbers",
    )
    num_overprovision: int = Field(default=0, ge=0, description=_COUNT)
    upscale_delay_seconds: float = Field(default=300, ge=0, description=_SECONDS)
    downscale_delay_seconds: float = Field(default=1200, ge=0, description=_SECONDS)
    base_ondemand_fallback_replicas: int = Field(default=0, ge=0, description=_COUNT)
    dynamic_ondemand_fallback: bool = Field(default=False, description="true or false")
    spot_placer: str | None = Field(default=None, description="dynamic_fallback")

    @model_validator(mode="before")
    @classmethod
    def _fixed_number(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("max_replicas") is None and "min_replicas" in value:
            if value.get("target_qps_per_replica") is not None:
                raise ValueError("target_qps_per_replica needs max_replicas as well")
            return {**value, "max_replicas": value["min_replicas"]}
        return value

    @field_validator("target_qps_per_replica", mode="plain")
    @classmethod
    def _qps(cls, value: Any) -> Any:
        # SkyPilot's schema lets 0 through and then divides by it in every autoscaler round.
        if value is None or _positive(value):
            return value
        if isinstance(value, dict) and value and all(_positive(qps) for qps in value.values()):
            for name in value:
                if not _ACCELERATOR.fullmatch(str(name)):
                    raise ValueError(f"must name accelerators as H100 or H100:8, not {shown(name)}")
            return {str(name): float(qps) for name, qps in value.items()}
        raise AssertionError  # the message is the field's description

    @field_validator("spot_placer", mode="plain")
    @classmethod
    def _placer(cls, value: Any) -> str | None:
        if value is None or str(value).lower() == "dynamic_fallback":
            return value and "dynamic_fallback"
        raise AssertionError

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaPolicy:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})"
            )
        return self


class LoadBalancer(_Strict):
    stream_timeout_seconds: float | None = Field(default=None, gt=0, description=_POSITIVE)


class Tls(_Strict):
    keyfile: str = Field(description="the path of a file")
    certfile: str = Field(description="the path of a file")


class Section(_Strict):
    """`service:` as written; the methods below say what it means and add to `warnings` what is odd
    about it."""

    readiness_probe: ReadinessProbe | None = Field(
        default=None, description="a path such as /health, or a mapping with `path`"
    )
    initial_delay_seconds: float | None = Field(default=None, ge=0, description=_SECONDS)
    load_balancer: LoadBalancer | None = Field(
        default=None, description="a mapping with `stream_timeout_seconds`"
    )
    replica_policy: ReplicaPolicy | None = Field(
        default=None, description="a mapping with `min_replicas` and `max_replicas`"
    )
    replicas: int | None = Field(default=None, ge=0, description=_COUNT)
    workers: int | None = Field(default=None, ge=0, description=_COUNT)
    ports: int | None = Field(default=None, ge=1, le=65535, description="a port from 1 to 65535")
    load_balancing_policy: str | None = Field(default=None, description=" or ".join(BALANCING))
    tls: Tls | None = Field(default=None, description="a mapping with `keyfile` and `certfile`")
    pool: Any = Field(default=None, exclude=True)

    @field_validator("readiness_probe", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("load_balancing_policy", mode="plain")
    @classmethod
    def _known_policy(cls, value: Any) -> str | None:
        if value is None or str(value).lower() in BALANCING:
            return value and str(value).lower()
        raise AssertionError

    @field_validator("pool")
    @classmethod
    def _no_pool(cls, value: Any) -> None:
        raise ValueError("job pools are not services; use `service:` with replica_policy instead")

    @model_validator(mode="after")
    def _one_of_each(self) -> Section:
        counts = [key for key in ("replica_policy", "replicas", "workers") if getattr(self, key) is not None]
        if len(counts) > 1:
            raise ValueError(f"has {' and '.join(counts)}; only one of them is allowed")
        nested = self.readiness_probe and "initial_delay_seconds" in self.readiness_probe.model_fields_set
        if nested and self.initial_delay_seconds is not None:
            raise ValueError(
                "has initial_delay_seconds here and in readiness_probe; only one of them is allowed"
            )
        qps = self.replica_policy and self.replica_policy.target_qps_per_replica
        if isinstance(qps, dict) != (self.load_balancing_policy == "instance_aware_least_load"):
            raise ValueError(
                "target_qps_per_replica by accelerator and load_balancing_policy: instance_aware_least_load "
                "need each other"
            )
        return self

    def probe(self, warnings: list[str]) -> ReadinessProbe:
        probe = self.readiness_probe
        if probe is None:
            warnings.append(
                "service.readiness_probe: is missing, so '/' is probed; SGLang answers on /health"
            )
            probe = ReadinessProbe(path="/")
        if self.initial_delay_seconds is not None:
            warnings.append(
                "service.initial_delay_seconds: sky serve wants it under readiness_probe; accepted here"
            )
            probe = probe.model_copy(update={"initial_delay_seconds": self.initial_delay_seconds})
        return probe

    def policy(self, warnings: list[str]) -> ReplicaPolicy:
        policy = self.replica_policy
        if policy is None:
            if self.workers is not None:
                warnings.append("service.workers: is meant for job pools; taken as `replicas`")
            fixed = next((count for count in (self.replicas, self.workers) if count is not None), 1)
            policy = ReplicaPolicy(min_replicas=fixed, max_replicas=fixed)
        elif policy.min_replicas != policy.max_replicas and policy.target_qps_per_replica is None:
            warnings.append(
                "service.replica_policy: sky serve wants target_qps_per_replica when min_replicas and "
                "max_replicas differ; accepted here, replicas follow the requests in flight"
            )
        if policy.spot_placer is not None:
            warnings.append(
                "service.replica_policy.spot_placer: has no effect; no launch of SkyPilot can be told which "
                "zones to avoid, so it takes the cheapest again; 3 losses in 2 hours go on-demand, if allowed"
            )
        if policy.max_replicas == 0:
            warnings.append(
                "service.replica_policy: max_replicas is 0, so the service is paused (gateway scale --max N)"
            )
        return policy

    def balancing(self, warnings: list[str]) -> str:
        if self.load_balancing_policy == "round_robin":
            warnings.append(
                "service.load_balancing_policy: round_robin gets the least queue depth all the same"
            )
        return self.load_balancing_policy or "least_load"

    def tls_files(self, warnings: list[str]) -> dict[str, str] | None:
        if self.tls is None:
            return None
        warnings.append(
            "service.tls: is not used, the gateway's public port speaks plain HTTP; put a TLS proxy before it"
        )
        return self.tls.model_dump()

    def needs_spot(self) -> str | None:
        """The first key that makes sense with spot machines only (sky/serve/serve_utils.py:
        validate_service_task)."""
        policy = self.replica_policy
        keys = ("dynamic_ondemand_fallback", "base_ondemand_fallback_replicas", "spot_placer")
        return next((key for key in keys if policy and getattr(policy, key)), None)


class Task(_Strict):
    """The top level. Keys that a gateway does not read are listed so that a misspelt one is refused."""

    name: str | None = Field(default=None, description="a string")
    workdir: Any = None
    event_callback: Any = None
    num_nodes: int | None = Field(default=None, ge=1, description="a whole number, 1 or more")
    resources: dict[str, Any] | None = Field(default=None, description="a mapping")
    file_mounts: Any = None
    service: Section = Field(description="a mapping with readiness_probe and replica_policy")
    pool: Any = Field(default=None, exclude=True)
    setup: str | None = Field(default=None, description="a string, the commands that prepare a machine")
    run: str | None = Field(default=None, description="a string, the command that starts the server")
    envs: (
        dict[Annotated[str, StringConstraints(pattern=r"^[a-zA-Z_]\w*$")], str | int | float | bool | None]
        | None
    ) = Field(default=None, description="a mapping of variable names to strings")
    secrets: dict[str, str | int | float | bool | None] | list[str] | None = Field(
        default=None, description="a mapping of names to strings, or a list of `secrets:NAME`"
    )
    managed_secrets: Any = None
    inputs: Any = None
    outputs: Any = None
    file_mounts_mapping: Any = None
    volumes: Any = None
    volume_mounts: Any = None
    api_server_access: Any = None
    config: Any = None
    metadata: Any = Field(default=None, alias="_metadata")

    @field_validator("pool")
    @classmethod
    def _no_pool(cls, value: Any) -> None:
        raise ValueError("job pools are not services; use `service:` with replica_policy instead")

    @field_validator("secrets", mode="plain")
    @classmethod
    def _named(cls, value: Any) -> Any:
        scalar = str | int | float | bool | None
        if isinstance(value, dict) and all(isinstance(v, scalar) for v in value.values()):
            return {str(name): item for name, item in value.items()}
        if value is None:
            return None
        if isinstance(value, list) and all(str(name).startswith("secrets:") for name in value):
            return value
        raise AssertionError

    def secret_names(self) -> list[str]:
        return [name.removeprefix("secrets:") for name in self.secrets or ()]


def explain(error: ValidationError) -> str:
    """The first thing wrong, as `PATH: what is allowed`, and how many more there are."""
    errors = error.errors(include_url=False)
    first = errors[0]
    owner, field, path = _locate(first["loc"])
    allowed = sorted(info.alias or name for name, info in owner.model_fields.items() if not info.exclude)
    match first["type"]:
        case "missing":
            text = f"is missing; it must be {field}" if field else "is missing"
        case "extra_forbidden":
            near = get_close_matches(str(first["loc"][-1]), allowed, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            text = f"is not a key here{meant}; allowed: {', '.join(allowed)}"
        case "value_error":
            text = one_line(first["ctx"]["error"])
        case _:
            text = f"must be {field}, not {shown(first['input'])}" if field else one_line(first["msg"])
    more = len({_locate(other["loc"])[2] for other in errors}) - 1
    return f"{path}: {text}{f' (and {more} more)' if more else ''}"


def _locate(loc: tuple[int | str, ...]) -> tuple[type[BaseModel], str, str]:
    """Of an error's place: the model whose key it is, the key's description, the YAML path. What
    pydantic appends below a key (members of a union, keys of a mapping) does not belong to the path
    of the YAML, except the keys of a mapping."""
    owner: type[BaseModel] = Task
    path: list[str] = []
    description = ""
    for part in loc:
        path.append(str(part))
        info = owner.model_fields.get(str(part))
        if info is None:
            break
        description = info.description or ""
        nested = _MODELS.get(str(part))
        if nested is None:
            break
        owner = nested
    if len(path) < len(loc) and path[-1] in ("headers", "envs"):
        path += [str(part) for part in loc[len(path) : len(path) + 1] if part != "[key]"]
    return owner, description, ".".join(path)


_MODELS: Final[dict[str, type[BaseModel]]] = {
    "service": Section,
    "readiness_probe": ReadinessProbe,
    "load_balancer": LoadBalancer,
    "replica_policy": ReplicaPolicy,
    "tls": Tls,
}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
