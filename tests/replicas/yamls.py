"""YAMLs for tests: one that is fine, and what is said of one that is not."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from replicas.spec import Service, SpecError, parse

RUN = 'python -m sglang.launch_server --model-path org/model --port 30000 --api-key "$REPLICA_API_KEY"'
POLICY = {"min_replicas": 1, "max_replicas": 1}


def document(service: Any = None, **task: Any) -> str:
    """A YAML that is fine and without warnings, but for what the test changes."""
    section = {"readiness_probe": "/health", "replica_policy": POLICY} if service is None else service
    base = {"name": "svc", "resources": {"ports": 30000}, "run": RUN, "service": section}
    return yaml.safe_dump({key: value for key, value in (base | task).items() if value is not ...})


def service(**keys: Any) -> Service:
    return parse(document({"readiness_probe": "/health"} | keys), "svc.yaml")


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse(text, "svc.yaml")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("svc.yaml: ")
    return line.removeprefix("svc.yaml: ")
