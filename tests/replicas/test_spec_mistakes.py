"""A mistake in a YAML is one line that says where and what is allowed; for what is odd there is a warning."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.spec import Service, SpecError, parse

from .yamls import POLICY, RUN, document, refusal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must be a mapping such as `name: ...`, not an empty file"),
        ("just words", "must be a mapping such as `name: ...`, not 'just words'"),
        ("- a\n- b", "must be a mapping such as `name: ...`, not ['a', 'b']"),
        ("name: [1,\nrun: x", "line 2: is not YAML: "),
        ("name: \x00", "is not YAML: "),
        ("name: 2026-99-99", "is not YAML: month must be in 1..12"),
        ("[" * 5000, "is nested too deeply"),
        ("a: 1\n---\nb: 2", "has 2 YAML documents; one task with its `service:` is allowed"),
        ("service:\n  replicas: 1\n  replicas: 2", "service.replicas: is written twice, on lines 2 and 3;"),
        ("a: [{b: 1, b: 2}]", "a[0].b: is written twice, on lines 1 and 1;"),
        ("service: &x\n  replicas: *x", "service.replicas: is an alias of what it stands in"),
        ("? [a, b]\n: 1", "line 1: has a key that is not a plain word"),
        ("name: x", "service: is missing; add for example `service: {readiness_probe: /health, "),
        (document(pool={"workers": 1}), "pool: job pools are not services;"),
        (document(...), "service: is missing;"),
        (
            document(..., pool={"workers": 1}),
            "service: must be a mapping with readiness_probe and replica_policy, not null",
        ),
        (document({"pool": {"workers": 1}}), "service.pool: job pools are not services;"),
        (document([1]), "service: must be a mapping with readiness_probe and replica_policy, not [1]"),
        (
            document(sevice={}),
            "sevice: is not a key here (did you mean service?); allowed: _metadata, api_server_access,",
        ),
        (
            document({"readines_probe": "/"}),
            "service.readines_probe: is not a key here (did you mean readiness_probe?);",
        ),
        (
            document({"auto_restart": True}),
            "service.auto_restart: is not a key here; allowed: initial_delay_seconds, load",
        ),
        (
            document({"readiness_probe": "health"}),
            "service.readiness_probe.path: must be a path that starts with '/',",
        ),
        (
            document({"readiness_probe": 5}),
            "service.readiness_probe: must be a path such as /health, or a mapping with",
        ),
        (
            document({"readiness_probe": {}}),
            "service.readiness_probe.path: is missing; it must be a path that starts with",
        ),
        (
            document({"readiness_probe": {"path": "/", "timeout": 3}}),
            "service.readiness_probe.timeout: is not a key here (did you mean timeout_seconds?); allowed: co",
        ),
        (
            document({"readiness_probe": {"path": "/", "initial_delay_seconds": "1h"}}),
            "service.readiness_probe.initial_delay_seconds: must be a number of seconds, 0 or more, not '1h'",
        ),
        (
            document({"readiness_probe": {"path": "/", "timeout_seconds": 0}}),
            "service.readiness_probe.timeout_seconds: must be a number of seconds greater than 0, not 0",
        ),
        (
            document({"readiness_probe": {"path": "/", "initial_delay_seconds": float("inf")}}),
            "service.readiness_probe.initial_delay_seconds: must be a number of seconds, 0 or more, not inf",
        ),
        (
            document({"readiness_probe": {"path": "/", "post_data": "{broken"}}),
            "service.readiness_probe.post_data: must be a JSON object or a string that holds one, not '{brok",
        ),
        (
            document({"readiness_probe": {"path": "/", "post_data": "[1]"}}),
            "service.readiness_probe.post_data: must be a JSON object or a string that holds one, not [1]",
        ),
        (
            document({"readiness_probe": {"path": "/", "post_data": {"since": date(2026, 1, 2)}}}),
            "service.readiness_probe.post_data: cannot be sent as JSON (Object of type date is not JSON"
            " serializable); quote it",
        ),
        (
            document({"readiness_probe": {"path": "/", "headers": {"X": 5}}}),
            "service.readiness_probe.headers.X: must be a mapping of header names to one-line strings, not 5",
        ),
        (
            document({"readiness_probe": {"path": "/", "headers": {5: "x"}}}),
            "service.readiness_probe.headers.5: must be a mapping of header names to one-line strings, not 5",
        ),
        (
            document(
                {"initial_delay_seconds": 1, "readiness_probe": {"path": "/", "initial_delay_seconds": 2}}
            ),
            "service: has initial_delay_seconds here and in readiness_probe; only one of them is allowed",
        ),
        (
            document({"load_balancer": {"timeout": 1}}),
            "service.load_balancer.timeout: is not a key here; allowed: stream_",
        ),
        (
            document({"replica_policy": {}}),
            "service.replica_policy.min_replicas: is missing; it must be a whole number,",
        ),
        (
            document({"replica_policy": {"min_replicas": -1, "max_replicas": True}}),
            "service.replica_policy.min_replicas: must be a whole number, 0 or more, not -1 (and 1 more)",
        ),
        (
            document({"replica_policy": {"min_replicas": 3, "max_replicas": 2}}),
            "service.replica_policy: max_replicas (2) must be at least min_replicas (3)",
        ),
        (
            document({"replica_policy": {"min_replicas": 1, "target_qps_per_replica": 1}}),
            "service.replica_policy: target_qps_per_replica needs max_replicas as well",
        ),
        (
            document({"replica_policy": POLICY | {"target_qps_per_replica": 0}}),
            "service.replica_policy.target_qps_per_replica: must be a number greater than 0, or a mapping of",
        ),
        (
            document({"replica_policy": POLICY | {"target_qps_per_replica": {"H100 x8": 1}}}),
            "service.replica_policy.target_qps_per_replica: must name accelerators as H100 or H100:8, not 'H",
        ),
        (
            document({"replica_policy": POLICY | {"target_qps_per_replica": {"H100": 1}}}),
            "service: target_qps_per_replica by accelerator and load_balancing_policy: instance_aware_least_",
        ),
        (
            document({"load_balancing_policy": "random"}),
            "service.load_balancing_policy: must be least_load or round_robin or instance_aware_least_load, ",
        ),
        (
            document({"replica_policy": POLICY | {"spot_placer": "cheapest"}}),
            "service.replica_policy.spot_placer: must be dynamic_fallback, not 'cheapest'",
        ),
        (
            document({"replica_policy": POLICY | {"dynamic_ondemand_fallback": True}}),
            "service.replica_policy.dynamic_ondemand_fallback: needs `use_spot: true` in resources",
        ),
        (
            document({"replicas": 1, "workers": 1}),
            "service: has replicas and workers; only one of them is allowed",
        ),
        (document({"replicas": 1.5}), "service.replicas: must be a whole number, 0 or more, not 1.5"),
        (document({"ports": 70000}), "service.ports: must be a port from 1 to 65535, not 70000"),
        (
            document({"tls": {"keyfile": "k"}}),
            "service.tls.certfile: is missing; it must be the path of a file",
        ),
        (document(run=...), "run: is missing; it must start the server,"),
        (document(run=["x"]), "run: must be a string, the command that starts the server, not ['x']"),
        (document(num_nodes=0), "num_nodes: must be a whole number, 1 or more, not 0"),
        (document(resources=[1]), "resources: must be a mapping, not [1]"),
        (
            document(resources=...),
            "resources.ports: is missing; name the one port that the server listens on,",
        ),
        (
            document(resources={"ports": "8000-8001"}),
            "resources.ports: opens 2 ports; service.ports must name the",
        ),
        (
            document(resources={"ports": "web"}),
            "resources.ports: must be a port from 1 to 65535 or a range such as",
        ),
        (
            document(resources={"ports": ["9-8"]}),
            "resources.ports[0]: must be a port from 1 to 65535 or a range such as",
        ),
        (
            document(resources={"any_of": [{"ports": 1}, {"ports": 2}]}),
            "resources.ports: must be the same in every alternative, not 1 and 2",
        ),
        (document(resources={"any_of": [{"ports": 1}, {}]}), "resources.any_of[1].ports: is missing;"),
        (document(resources={"any_of": {}}), "resources.any_of: must be a list of resources, not {}"),
        (document(resources={"ordered": [5]}), "resources.ordered[0]: must be a mapping of resources, not 5"),
        (document(resources={"ordered": [{}], "any_of": [{}]}), "resources: has both any_of and ordered;"),
        (
            document(envs={"A": None}),
            "envs.A: has no value; write one here or export A before starting the gateway",
        ),
        (document(envs={"1A": "x"}), "envs.1A: must be a mapping of variable names to strings, not '1A'"),
        (document(envs=["A"]), "envs: must be a mapping of variable names to strings, not ['A']"),
        (
            document(secrets="x"),
            "secrets: must be a mapping of names to strings, or a list of `secrets:NAME`, not 'x'",
        ),
    ],
)
def test_what_is_wrong_is_one_line_with_file_path_and_what_is_allowed(text: str, expected: str) -> None:
    line = refusal(text)
    assert line[: len(expected)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (document({}), "service.readiness_probe: is missing, so '/' is probed"),
        (
            document({"readiness_probe": "/", "replica_policy": {"min_replicas": 0}}),
            "service.replica_policy: max_replicas is",
        ),
        (
            document({"readiness_probe": "/", "workers": 2}),
            "service.workers: is meant for job pools; taken as `replicas`",
        ),
        (
            document({"readiness_probe": "/", "load_balancing_policy": "round_robin"}),
            "service.load_balancing_policy: round",
        ),
        (
            document({"readiness_probe": "/", "tls": {"keyfile": "k", "certfile": "c"}}),
            "service.tls: is not used,",
        ),
        (
            document({"readiness_probe": "/", "ports": 8000}, run=RUN.replace("30000", "8000")),
            "resources.ports: does not op",
        ),
        (
            document(
                {"readiness_probe": "/", "replica_policy": POLICY | {"base_ondemand_fallback_replicas": 1}},
                resources={"ports": 30000, "ordered": [{"use_spot": True}, {}]},
            ),
            "service.replica_policy.base_ondemand_fallback_replicas: sky serve wants use_spot on all of any_",
        ),
        (
            document(name="My Service!"),
            "name: 'My Service!' is not a legal cluster name; the service is called 'my-service'",
        ),
        (
            document(run="python serve.py --api-key x"),
            "run: names no model (--model-path NAME); /v1/models calls it 'svc'",
        ),
        (
            document(run=RUN.replace("30000", "8000")),
            "run: starts the server on --port 8000, but the service's port is 30000",
        ),
        (
            document(run=RUN.replace("--api-key", "--key")),
            'run: has no --api-key "$REPLICA_API_KEY"; anybody who finds',
        ),
        (
            document(run=RUN + " --enable-dp-attention"),
            "run: --enable-dp-attention is deprecated since SGLang 0.5",
        ),
        (
            document(secrets={"HF_TOKEN": None, "REPLICA_API_KEY": None}),
            "secrets.HF_TOKEN: has no value here or in the env",
        ),
        (
            document(secrets=["secrets:HF_TOKEN"]),
            "secrets.HF_TOKEN: has no value here or in the environment; SkyPilot must",
        ),
    ],
)
def test_what_is_odd_is_accepted_with_one_warning(text: str, expected: str) -> None:
    (warning,) = parse(text, "svc.yaml").warnings
    assert warning[: len(expected)] == expected


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SERVICE_KEYS = st.sampled_from(
    [
        *("readiness_probe", "initial_delay_seconds", "load_balancer", "replica_policy", "replicas"),
        *("ports", "workers", "pool", "tls", "load_balancing_policy"),
    ]
)
TASK_KEYS = st.sampled_from(["name", "resources", "setup", "run", "envs", "secrets", "num_nodes", "workdir"])


def one_line_or_service(text: str) -> None:
    found: Service | SpecError
    try:
        found = parse(text, "svc.yaml")
    except SpecError as error:
        found = error
    if isinstance(found, SpecError):
        assert len(str(found).splitlines()) == 1
    else:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found.name)
        assert 1 <= found.port <= 65535
        assert found.policy.min_replicas <= found.policy.max_replicas
        assert all(len(warning.splitlines()) == 1 for warning in found.warnings)


@given(
    st.dictionaries(SERVICE_KEYS, YAML_VALUES, max_size=3),
    st.dictionaries(TASK_KEYS, YAML_VALUES, max_size=2),
)
def test_any_mapping_gives_a_service_or_one_line(section: dict[str, Any], task: dict[str, Any]) -> None:
    one_line_or_service(document(section, **task))


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!#|>'\"\n ,?%@0."), max_size=40) | st.text(max_size=20))
def test_any_text_gives_a_service_or_one_line(text: str) -> None:
    one_line_or_service(text)
