"""The YAML of a service as a sky.Task."""
from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from replicas import plans
from replicas.plans import Plan
from replicas.provisioners import YAML_DECIDES

if TYPE_CHECKING:
    from replicas.provisioners.sdk import Sky
    from replicas.spec import Service


NO_LABELS: Final[Mapping[str, str]] = {}


def build_task(
    sky: Sky,
    service: Service,
    env: Mapping[str, str],
    plan: Plan = YAML_DECIDES,
    *,
    ports: bool = True,
    labels: Mapping[str, str] = NO_LABELS,
) -> Any:
    """The task: without `service:` (0.14.1 rejects what the DeepSeek README shows), with `env`,
    on the plan's hardware.

    A variable that the YAML lists under `envs`, or `--env` sets, is one; any other is given as a secret.
    `ports=False` leaves out `resources.ports`, for a cloud that has none to open. `labels` come beside those
    of the YAML.
    """
    task = plans.apply(copy.deepcopy(service.task), plan)   # from_yaml_config empties it
    resources = task.get("resources") or {}
    choices = [*(resources.get("any_of") or ()), *(resources.get("ordered") or ())]
    if not ports:
        for one in (resources, *choices):
            one.pop("ports", None)
    if labels:   # in each choice its own: SkyPilot would mix those of one into the next
        shared = resources.pop("labels", None) or {}
        for one in choices or (resources,):
            one["labels"] = {**shared, **(one.get("labels") or {}), **labels}
        task["resources"] = resources
    env = {**plan.envs, **plan.secrets, **env}
    plain = {*(task.get("envs") or {}), *plan.envs} - {*(task.get("secrets") or {})}
    envs = {name: value for name, value in env.items() if name in plain}
    secrets = service.secrets | {name: value for name, value in env.items() if name not in plain}
    return sky.Task.from_yaml_config(
        task, env_overrides=list(envs.items()), secrets_overrides=list(secrets.items())
    )
