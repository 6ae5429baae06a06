"""A SkyPilot YAML becomes a Service, or one line that says what is allowed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from replicas.spec import SpecError, load, parse

from .yamls import document, service


def test_a_plain_yaml_has_skypilots_defaults_and_no_warnings() -> None:
    text = document()
    found = parse(text, "svc.yaml")
    assert (found.name, found.model, found.port, found.num_nodes) == ("svc", "org/model", 30000, 1)
    assert found.probe.path == "/health"
    assert found.probe.initial_delay_seconds == 1200
    assert found.probe.timeout_seconds == 15
    assert found.probe.endpoint_probe_interval_seconds == 10
    assert found.probe.consecutive_failure_threshold_timeout == 180
    assert (found.policy.upscale_delay_seconds, found.policy.downscale_delay_seconds) == (300, 1200)
    assert (found.stream_timeout_seconds, found.tls, found.load_balancing_policy) == (
        None,
        None,
        "least_load",
    )
    assert found.hash == hashlib.sha256(text.encode()).hexdigest()
    assert found.warnings == ()


def test_every_key_of_the_service_schema_is_read() -> None:
    found = parse(
        document(
            {
                "readiness_probe": {
                    "path": "/v1/chat/completions",
                    "initial_delay_seconds": 60.5,
                    "timeout_seconds": 25,
                    "endpoint_probe_interval_seconds": 2,
                    "consecutive_failure_threshold_timeout": 90,
                    "post_data": {
                        "model": "$MODEL",
                        "messages": [{"role": "user", "content": "${MODEL}, $OTHER"}],
                    },
                    "headers": {"Authorization": "Bearer x"},
                },
                "load_balancer": {"stream_timeout_seconds": 600},
                "replica_policy": {
                    "min_replicas": 1,
                    "max_replicas": 4,
                    "target_qps_per_replica": {"H100:8": 2, "H200": 3.5},
                    "num_overprovision": 1,
                    "upscale_delay_seconds": 10,
                    "downscale_delay_seconds": 20,
                    "base_ondemand_fallback_replicas": 1,
                    "dynamic_ondemand_fallback": True,
                    "spot_placer": "Dynamic_Fallback",
                },
                "ports": 8080,
                "load_balancing_policy": "Instance_Aware_Least_Load",
                "tls": {"keyfile": "k.pem", "certfile": "c.pem"},
            },
            envs={"MODEL": "org/model"},
            num_nodes=2,
            setup="pip install sglang",
            resources={"ports": [30000, "8080-8081"], "use_spot": True},
        ),
        "svc.yaml",
    )
    assert found.probe.initial_delay_seconds == 60.5
    assert found.probe.timeout_seconds == 25
    assert found.probe.endpoint_probe_interval_seconds == 2
    assert found.probe.consecutive_failure_threshold_timeout == 90
    assert found.probe.headers == {"Authorization": "Bearer x"}
    assert found.probe.post_data is not None
    assert found.probe.post_data["model"] == "org/model"
    assert found.probe.post_data["messages"][0]["content"] == "org/model, $OTHER"
    assert found.stream_timeout_seconds == 600
    assert found.policy.target_qps_per_replica == {"H100:8": 2.0, "H200": 3.5}
    assert (found.policy.min_replicas, found.policy.max_replicas, found.policy.num_overprovision) == (1, 4, 1)
    assert (found.policy.upscale_delay_seconds, found.policy.downscale_delay_seconds) == (10, 20)
    assert found.policy.base_ondemand_fallback_replicas == 1
    assert found.policy.dynamic_ondemand_fallback
    assert found.policy.spot_placer == "dynamic_fallback"
    assert any(warning.startswith("service.replica_policy.spot_placer: has no") for warning in found.warnings)
    assert found.port == 8080
    assert found.load_balancing_policy == "instance_aware_least_load"
    assert found.tls == {"keyfile": "k.pem", "certfile": "c.pem"}
    assert (found.num_nodes, found.setup) == (2, "pip install sglang")


def test_what_skypilots_own_readme_shows_is_accepted_with_a_warning_each() -> None:
    found = parse(
        document(
            {
                "readiness_probe": "/health",
                "initial_delay_seconds": 3600,
                "replica_policy": {"min_replicas": 0, "max_replicas": 2},
            },
            resources={"ports": 30000, "any_of": [{"use_spot": True}, {"use_spot": False}]},
        ),
        "svc.yaml",
    )
    assert found.probe.initial_delay_seconds == 3600
    assert (found.policy.min_replicas, found.policy.max_replicas) == (0, 2)
    said = [warning.partition(":")[0] for warning in found.warnings]
    assert said == ["resources", "service.initial_delay_seconds", "service.replica_policy"]


@pytest.mark.parametrize(
    ("keys", "limits"),
    [
        ({}, (1, 1)),
        ({"replicas": 3}, (3, 3)),
        ({"workers": 0}, (0, 0)),
        ({"replica_policy": {"min_replicas": 2}}, (2, 2)),
        ({"replica_policy": {"min_replicas": 2, "max_replicas": None}}, (2, 2)),
        ({"replica_policy": {"min_replicas": 0, "max_replicas": 5, "target_qps_per_replica": 0.5}}, (0, 5)),
    ],
)
def test_the_number_of_replicas_can_be_written_in_each_way_of_skypilot(
    keys: dict[str, Any], limits: tuple[int, int]
) -> None:
    policy = service(**keys).policy
    assert (policy.min_replicas, policy.max_replicas) == limits


@pytest.mark.parametrize(
    "resources",
    [
        {"ports": 30000},
        {"ports": "30000"},
        {"ports": ["30000-30000"]},
        {"any_of": [{"ports": 30000}, {"ports": [30000]}]},
        {"ports": 1, "ordered": [{"ports": 30000}]},
    ],
)
def test_the_only_port_of_the_resources_is_the_replicas_port(resources: dict[str, Any]) -> None:
    assert parse(document(resources=resources), "svc.yaml").port == 30000


def test_post_data_may_be_json_in_a_string() -> None:
    probe = service(readiness_probe={"path": "/x", "post_data": '{"max_tokens": 1}'}).probe
    assert probe.post_data == {"max_tokens": 1}


def test_variables_without_a_value_come_from_the_environment() -> None:
    text = document(envs={"REGION": None, "N": 4, "ON": True}, secrets={"HF_TOKEN": None, "KEY": "s"})
    found = parse(text, "svc.yaml", environ={"REGION": "eu", "HF_TOKEN": "hf_x", "N": "5"})
    assert found.envs == {"REGION": "eu", "N": "4", "ON": "True"}
    assert found.secrets == {"HF_TOKEN": "hf_x", "KEY": "s"}
    assert found.task["envs"] == found.envs
    assert found.task["secrets"] == {"HF_TOKEN": None, "KEY": "s"}


def test_the_task_is_the_yaml_without_the_service_section() -> None:
    text = document(file_mounts={"/data": "s3://bucket"}, workdir=".", config={"x": 1}, _metadata={})
    found = parse(text, "svc.yaml")
    whole = yaml.safe_load(text)
    del whole["service"]
    assert found.task == whole
    assert found.text == text


def test_name_and_model_given_by_the_user_win() -> None:
    found = parse(document(), "svc.yaml", name="Other", model="org/other")
    assert (found.name, found.model) == ("other", "org/other")
    assert found.warnings == ("name: 'Other' is not a legal cluster name; the service is called 'other'",)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/etc/skygate/DeepSeek_R1.v2.yaml", "deepseek-r1-v2"),
        ("671b.yaml", "s-671b"),
        ("---.yaml", "service"),
        ("x" * 39 + "-y.yaml", "x" * 39),
    ],
)
def test_without_a_name_the_file_names_the_service(source: str, name: str) -> None:
    assert parse(document(name=...), source).name == name


def test_secrets_are_not_in_the_repr() -> None:
    found = parse(document(secrets={"KEY": "hunter2"}), "svc.yaml")
    assert repr(found) == f"<Service svc model=org/model replicas=1..1 hash={found.hash[:8]}>"


def test_a_file_that_cannot_be_read_is_an_error_of_the_same_kind(tmp_path: Path) -> None:
    missing = tmp_path / "no.yaml"
    with pytest.raises(SpecError, match=re.escape(f"{missing}: cannot be read: No such file or directory")):
        load(missing)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(SpecError, match=re.escape(f"{latin}: is not UTF-8 text (byte 9)")):
        load(latin)


def test_a_loaded_file_is_its_own_source(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(document(name=...))
    found = load(path)
    assert (found.source, found.name) == (str(path), "good")
