"""The environment in which a local replica's `setup` and `run` find themselves."""
from __future__ import annotations

import math
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicas.command import TLS_CERT
from replicas.plans import Plan

if TYPE_CHECKING:
    from replicas.spec import Service

_SECRET_NAME = re.compile(r"(?:^|_)(?:API_KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD)$")

_HOME = str(Path(__file__).resolve().parents[2])
"""Where the package `replicas` is found."""


def environment(replica_id: str, service: Service, port: int, directory: Path) -> dict[str, str]:
    """The gateway's own environment (not its settings), the YAML's, and what SkyPilot sets on one node."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GATEWAY_", "PROMETHEUS_"))}
    variables = inherited | dict(service.envs) | dict(service.secrets) | {
        "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_NUM_NODES": "1",
        "SKYPILOT_NODE_IPS": "127.0.0.1",
        "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus_per_node(service.task)),
        "SKYPILOT_TASK_ID": f"local-{replica_id}",
        "SKYPILOT_SERVE_REPLICA_ID": replica_id.rpartition("-")[2],
        "REPLICA_PORT": str(port),
        "REPLICA_DIR": str(directory),   # also how the processes of a replica are recognised
        "PYTHON": sys.executable,        # the Python that has `replicas.simulator`
        "PYTHONUNBUFFERED": "1",         # so that phases are seen when they happen
    }
    if _HOME not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        # A checkout. (What is installed needs no help, and its site-packages would break any other Python.)
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (_HOME, variables.get("PYTHONPATH"))))
    return variables


def secret_values(service: Service, env: Mapping[str, str], plan: Plan) -> list[str]:
    """What must not be seen in the output of a replica that is launched with these variables."""
    given = [value for name, value in env.items() if name != TLS_CERT]
    return [*given, *plan.secrets.values(), *service.secrets.values()]


def inherited_secrets() -> list[str]:
    """Values of this process's environment that their names call secret: a local replica has them too."""
    return [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]


def gpus_per_node(task: Mapping[str, Any]) -> int:
    """Accelerators per node that the YAML asks for: `H200:8` and `{H200: 8, H100: 8}` are 8, none is 0."""
    resources = task.get("resources")
    asked = resources.get("accelerators") if isinstance(resources, Mapping) else None
    if isinstance(asked, Mapping):
        count = next(iter(asked.values()), None)
    elif asked:
        first = asked if isinstance(asked, str) else next(iter(asked))
        count = str(first).partition(":")[2]
    else:
        return 0
    try:
        return math.ceil(float(count or 1))
    except ValueError:
        return 0


def working_directory(service: Service, directory: Path) -> Path:
    """The YAML's `workdir` where that is a folder here, else the replica's own: never the gateway's."""
    workdir = service.task.get("workdir")
    path = Path(workdir).expanduser() if isinstance(workdir, str) else directory
    return path if path.is_dir() else directory
