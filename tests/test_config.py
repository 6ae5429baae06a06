"""The YAMLs that are shipped parse, and say what they should."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import launching, metrics
from gateway.settings import make
from replicas import command
from replicas.deadman import Alarm
from replicas.lifecycle import State, new
from replicas.spec import Service, load

CONFIG = Path(__file__).parent.parent / "config"


@pytest.fixture(scope="module")
def recipe() -> Service:
    return load(CONFIG / "deepseek-r1-671b.yaml")


@pytest.fixture(scope="module")
def local() -> Service:
    return load(CONFIG / "local.yaml")


def test_the_recipe_parses_to_what_skypilots_readme_says(recipe: Service) -> None:
    assert recipe.probe.path == "/health"
    assert recipe.probe.initial_delay_seconds == 3600
    assert (recipe.policy.min_replicas, recipe.policy.max_replicas) == (0, 2)
    assert recipe.port == 30000
    assert recipe.model == "deepseek-ai/DeepSeek-R1"
    assert (recipe.name, recipe.num_nodes) == ("deepseek-r1", 2)


def test_the_recipe_pins_sglang_and_has_todays_flags(recipe: Service) -> None:
    assert '"sglang[all]==0.5.23"' in recipe.setup
    assert command.flag(recipe.run, {}, "--reasoning-parser") == "deepseek-r1"
    for flag in ("--enable-metrics", "--max-queued-requests", "--tp-size", "--api-key"):
        assert command.has_flag(recipe.run, flag), flag
    for gone in ("--tp", "--model", "--enable-dp-attention"):
        assert not command.has_flag(recipe.run, gone), gone


def test_models_are_pinned_to_a_commit(recipe: Service) -> None:
    commit = command.flag(recipe.run, {}, "--revision")
    assert commit == load(CONFIG / "deepseek-r1-671b-a100.yaml").envs["FP8_REVISION"]
    assert len(command.flag(load(CONFIG / "qwen3-8b.yaml").run, {}, "--revision") or "") == 40


def test_on_a100s_the_weights_are_bf16_on_four_nodes_and_take_longer() -> None:
    a100 = load(CONFIG / "deepseek-r1-671b-a100.yaml")
    assert (a100.num_nodes, a100.model) == (4, "deepseek-ai/DeepSeek-R1")
    assert a100.envs["MODEL"] == "unsloth/DeepSeek-R1-BF16"
    assert "fp8_cast_bf16.py" in a100.setup  # when MODEL is empty
    assert a100.probe.initial_delay_seconds > 3600


def test_the_cheap_one_needs_one_gpu() -> None:
    qwen = load(CONFIG / "qwen3-8b.yaml")
    assert (qwen.num_nodes, qwen.model) == (1, "Qwen/Qwen3-8B")
    assert set(qwen.task["resources"]["accelerators"].values()) == {1}


def test_the_recipe_warns_only_of_what_sky_serve_would_refuse(recipe: Service) -> None:
    assert [warning.partition(":")[0] for warning in recipe.warnings] == [
        "resources",
        "service.replica_policy",
    ]


CLOUD = [path for path in sorted(CONFIG.glob("*.yaml")) if path.name != "local.yaml"]


@pytest.mark.parametrize("path", CLOUD, ids=lambda path: path.name)
def test_every_yaml_for_a_cloud_speaks_tls_with_the_key_it_is_given(path: Path, tmp_path: Path) -> None:
    service = load(path)
    assert command.uses_certificate(service.run)
    assert command.has_flag(service.run, "--api-key")
    for name in (command.TLS_KEY, command.TLS_CERT):
        assert service.task["secrets"][name] is None
    # Bash says what the server gets: `python` is a command here that shows the files it is given.
    fake = tmp_path / "python"
    show = 'case "$1" in --ssl-*) ls -l "$2"; cat "$2";; esac'
    fake.write_text(f"#!/bin/sh\nwhile [ $# -gt 0 ]; do {show}; shift; done\n")
    fake.chmod(0o755)
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0"}
    given = {command.TLS_KEY: "a\nkey", command.TLS_CERT: "a\ncert", "REPLICA_API_KEY": "k"}
    env = {**nodes, "SKYPILOT_NUM_GPUS_PER_NODE": "8", "PATH": f"{tmp_path}:{os.environ['PATH']}", **given}

    def run(**more: str) -> str:
        bash = ["bash", "-euc", service.run]
        env_ = {**env, "TMPDIR": str(tmp_path), "HOME": str(tmp_path), **more}
        return subprocess.run(bash, env=env_, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    said = run()
    assert "a\nkey\n" in said
    assert "a\ncert\n" in said
    assert said.count("-rw-------") == 2
    assert run(REPLICA_TLS_KEY="", REPLICA_TLS_CERT="") == ""  # --replica-transport plain


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        *(("deepseek-r1-671b.yaml", rank) for rank in range(2)),
        *(("deepseek-r1-671b-a100.yaml", rank) for rank in range(4)),
    ],
)
def test_each_node_joins_the_first_one_with_its_rank_and_all_gpus_are_one_server(
    name: str, rank: int, tmp_path: Path
) -> None:
    service = load(CONFIG / name)
    given = {
        "SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{n}" for n in range(1, service.num_nodes + 1)),
        "SKYPILOT_NUM_NODES": str(service.num_nodes),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "REPLICA_API_KEY": "k",
        "REPLICA_TLS_KEY": "",
        "REPLICA_TLS_CERT": "",
        **service.envs,
    }
    said = started(service, given, tmp_path)
    for flag, value in (
        ("--dist-init-addr", "10.0.0.1:5000"),
        ("--nnodes", str(service.num_nodes)),
        ("--node-rank", str(rank)),
        ("--tp-size", str(8 * service.num_nodes)),
    ):
        assert said[said.index(flag) + 1] == value


def test_without_a_converted_repository_the_a100s_serve_what_setup_has_converted(tmp_path: Path) -> None:
    service = load(CONFIG / "deepseek-r1-671b-a100.yaml")
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
    given = {**service.envs, **node, "SKYPILOT_NUM_GPUS_PER_NODE": "8", "REPLICA_API_KEY": "k"}
    given |= {"REPLICA_TLS_KEY": "", "REPLICA_TLS_CERT": ""}
    theirs = started(service, given, tmp_path)
    assert theirs[theirs.index("--model-path") + 1] == "unsloth/DeepSeek-R1-BF16"
    assert theirs[theirs.index("--revision") + 1] == "main"
    ours = started(service, {**given, "MODEL": ""}, tmp_path)
    assert ours[ours.index("--model-path") + 1] == f"{tmp_path}/DeepSeek-R1-BF16"
    assert "--revision" not in ours


def started(service: Service, given: dict[str, str], folder: Path) -> list[str]:
    """The server's arguments, as `run` makes them: `python` is a command here that prints them."""
    fake = folder / "python"
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)
    env = {**given, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "TMPDIR": str(folder)}
    bash = ["bash", "-euc", service.run]
    done = subprocess.run(bash, env=env, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_replicas_key_has_no_value_in_any_yaml(recipe: Service, local: Service) -> None:
    for service in (recipe, local):
        assert service.secrets == {}
        assert service.task["secrets"]["REPLICA_API_KEY"] is None
        assert '--api-key "$REPLICA_API_KEY"' in service.run


def test_what_skypilot_gets_of_the_recipe_has_no_service_section(recipe: Service) -> None:
    assert set(recipe.task) == {"name", "resources", "num_nodes", "secrets", "setup", "run"}
    assert recipe.task["resources"]["any_of"] == [{"use_spot": True}, {"use_spot": False}]


def test_the_embedded_service_is_the_recipe_on_this_machine(local: Service) -> None:
    assert local.model == "deepseek-ai/DeepSeek-R1"
    assert (local.policy.min_replicas, local.policy.max_replicas) == (0, 2)
    assert local.probe.endpoint_probe_interval_seconds == 1
    assert "replicas.simulator" in local.run
    assert command.flag(local.run, {}, "--port") == "30000"
    assert command.flag(local.run, {"REPLICA_PORT": "41234"}, "--port") == "41234"


@pytest.mark.parametrize("path", sorted(CONFIG.rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_yaml_in_config_is_yaml(path: Path) -> None:
    assert yaml.safe_load(path.read_text())


def alerts_by_name() -> dict[str, dict[str, Any]]:
    rules = yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in rules for rule in group["rules"]}


def test_each_alert_is_about_a_metric_that_exists_and_prometheus_is_told_of_the_file() -> None:
    alerts = alerts_by_name().values()
    counted = {sample for family in metrics.FAMILIES for sample in (family._name, f"{family._name}_total")}
    known = {*metrics.LEVELS, *counted}
    assert alerts
    for alert in alerts:
        names = set(re.findall(r"gateway_\w+", alert["expr"]))
        assert names
        assert names <= known, alert["alert"]
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["description"]
    assert yaml.safe_load((CONFIG / "prometheus.yml").read_text())["rule_files"] == ["alerts.yml"]


def test_half_an_hour_of_ends_that_fail_wakes_somebody_and_says_what_to_do() -> None:
    (alert,) = (a for a in alerts_by_name().values() if "gateway_ends_failing" in a["expr"])
    assert (alert["expr"], alert["for"]) == ("gateway_ends_failing > 0", "30m")
    assert alert["labels"]["severity"] == "critical"
    assert "bill" in alert["annotations"]["summary"]
    for next_step in ("gateway status", "cloud's console"):
        assert next_step in alert["annotations"]["description"]


class Watched:
    """A fleet of one replica, and the provisioner that says when it ends itself: `left` s from 0."""

    def __init__(self) -> None:
        row = new("r1-1", "r1", 1, 0, spec_hash="x", spec_text="", now=0.0, reason="needed")
        self.rows = {row.id: replace(row, state=State.READY)}
        self.left = 0.0
        self.told: list[str] = []

    def dead_man(self, id: str) -> float:
        return self.left

    def tell(self, kind: str, reason: str, now: float, *, replica: str | None, **more: Any) -> None:
        self.told.append(more["code"])


@pytest.mark.parametrize(
    ("values", "initial_delay", "limit"),
    [
        ({}, 1200.0, 7200.0),
        ({"dead_man": "1h", "provision_timeout": "2400"}, 600.0, 3600.0),  # a cold start of 3000 s
        ({"dead_man": "1h", "provision_timeout": "3000"}, 3600.0, 6600.0),
        ({"dead_man": "1h", "keep_failed": "4h"}, 600.0, 14_400.0),
    ],
)
def test_the_dead_mans_alert_comes_with_the_event_at_half_time_whatever_the_limit_is(
    values: dict[str, Any], initial_delay: float, limit: float, local: Service
) -> None:
    probe = local.probe.model_copy(update={"initial_delay_seconds": initial_delay})
    found = launching.dead_man(make(**values), replace(local, probe=probe))
    assert found == limit
    rule = re.fullmatch(r"(\w+) < ([\d.]+) \* (\w+)", alerts_by_name()["ReplicaWillEndItself"]["expr"])
    assert rule is not None
    watched = Watched()
    alarm = Alarm(watched, found)
    for watched.left, fires in ((limit, False), (limit / 2 + 1, False), (limit / 2 - 1, True), (0.0, True)):
        alarm.look([watched], 0.0)
        replica = {"id": "r1-1", "state": "ready", "in_flight": 0, "queue_depth": 0, "hourly_cost": 1.0}
        one = {"name": "r1", "demand": {"waiting": 0}, "target": {"replicas": 1}, "cost": {"total": 1.0}}
        services = [one | {"replicas": [replica]}]
        alarm.status(services, 0.0)
        status = {"services": services}
        levels = {f.name: f.samples for f in metrics.Levels(lambda status=status: status).collect()}
        ((left,), (whole,)) = levels[rule[1]], levels[rule[3]]
        assert left.labels == whole.labels, "else Prometheus matches no pair"
        assert (left.value < float(rule[2]) * whole.value) is fires
        assert (watched.told == ["half"]) is fires
