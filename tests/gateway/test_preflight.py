"""`gateway check`: plans, prices, the ceiling, and what is missing with its fix; without any cloud."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway import launching, preflight
from gateway.cli import main
from gateway.launching import NO_VARIABLES
from gateway.preflight import Machine
from gateway.settings import make
from replicas.provisioners.catalogue import Price, Prices
from replicas.spec import load, parse

RECIPE = Path(__file__).parents[1] / "data" / "skypilot-deepseek-r1-671b.yaml"
CONFIG = Path(__file__).parents[2] / "config"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PINNED = """
resources: {ports: 30000, accelerators: H200:8, image_id: 'docker:lmsysorg/sglang:v0.5.23'%s}
setup: uv pip install "sglang[all]==0.5.23"
run: python -m sglang.launch_server --model-path a/b --revision 0123456789abcdef0123456789abcdef01234567
  --port 30000 --api-key $REPLICA_API_KEY
  --ssl-keyfile $REPLICA_TLS_KEY --ssl-certfile $REPLICA_TLS_CERT
service: {readiness_probe: /health, replica_policy: {min_replicas: 0, max_replicas: 3}}
"""


def no_prices(kinds: Sequence[str], home: Path) -> Prices:
    return {}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Everything SkyPilot needs is here, for AWS."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").touch()
    return Machine(tmp_path, {}, str, lambda name: preflight.SKYPILOT, lambda name: True, no_prices)


def report(machine: Machine, yaml: str = PINNED % "", **flags: Any) -> dict[str, Any]:
    flags = {"provisioner": "skypilot", "port": 0, "admin_port": 0, **flags}
    settings = make(**flags)
    options = launching.options(settings, NO_VARIABLES)
    return preflight.report(parse(yaml, "r1.yaml"), settings, options, machine)


def kinds(found: dict[str, Any]) -> list[str]:
    return [one["kind"] for one in found["findings"]]


def fixes(found: dict[str, Any], kind: str) -> str:
    return " ".join(f"{one['what']} -> {one['fix']}" for one in found["findings"] if one["kind"] == kind)


# ------------------------------------------------------------ plans and prices


def test_plans_are_shown_with_price_and_ceiling(machine: Machine) -> None:
    flags = {"plan": ["H200:8", "H100:8x2"], "price": ["H200:8=30", "H100:8=20"]}
    found = report(machine, **flags)
    assert [(one["plan"], one["nodes"], one["price"]) for one in found["plans"]] == [
        ("H200:8x1", 1, 30.0),
        ("H100:8x2", 2, 40.0),
    ]
    assert found["ceiling"] == 120.0  # three replicas on the dearest
    assert report(machine, **flags, max_replicas=1)["ceiling"] == 40.0
    assert report(machine, **flags, max_replicas=0)["ceiling"] == 0.0
    assert report(machine, **flags, max_hourly_cost=100)["ceiling"] == 100.0


def test_a_catalogue_prices_what_no_flag_does(machine: Machine) -> None:
    asked: list[Sequence[str]] = []

    def prices(kinds: Sequence[str], home: Path) -> Prices:
        asked.append(kinds)
        return {"H100:8": {"on-demand": Price(24.0, "AWS"), "spot": Price(9.0, "AWS")}}

    known = replace(machine, prices=prices)
    found = report(known, plan=["H200:8", "H100:8x2"], price=["H200:8=30"], use_spot=True)
    assert asked == [["H100:8"]]
    assert [(one["price"], one["price_source"]) for one in found["plans"]] == [
        (30.0, "--price"),
        (18.0, "SkyPilot's catalogue (AWS)"),
    ]
    assert report(known, plan=["H100:8x2"])["plans"][0]["price"] == 48.0


def test_a_price_that_nobody_knows_is_unknown_and_so_is_the_ceiling(machine: Machine) -> None:
    found = report(machine)
    assert (found["plans"][0]["price"], found["ceiling"]) == (None, None)
    fix = "--price H200:8=DOLLARS (an hour, of one node), or --price DOLLARS (of any replica)"
    assert fixes(found, "price").endswith(f"-> {fix}")
    assert report(machine, max_hourly_cost=50)["ceiling"] == 50.0


def test_every_kind_that_has_no_price_yet_is_named_and_with_all_of_them_the_plan_has_one(
    machine: Machine,
) -> None:
    yaml = (PINNED % "").replace("H200:8", "{L4: 1, A10G: 1, A100: 1}")
    given: list[str] = []
    for said in (
        "--price A100:1=DOLLARS --price A10G:1=DOLLARS --price L4:1=DOLLARS (an hour",
        "--price A10G:1=DOLLARS --price L4:1=DOLLARS (an hour",
        "--price A10G:1=DOLLARS (an hour",
    ):
        found = report(machine, yaml, price=given)
        assert found["plans"][0]["price"] is None
        assert f"-> {said}" in fixes(found, "price")
        given.append({0: "a100:1=3", 1: "L4=0.5"}.get(len(given), "A10G:1=1"))
    found = report(machine, yaml, price=given)
    assert (found["plans"][0]["price"], found["ceiling"], kinds(found)) == (3.0, 9.0, ["quota"])
    assert report(machine, yaml, price=["2"])["plans"][0]["price"] == 2.0


def test_a_plan_over_the_limit_is_shown_as_refused(machine: Machine) -> None:
    flags = {"plan": ["H200:8", "H100:8"], "price": ["H200:8=30", "H100:8=20"], "max_hourly_cost": 25}
    found = report(machine, **flags)
    assert [one["plan"] for one in found["plans"]] == ["H100:8x1"]
    flags["max_hourly_cost"] = 10
    found = report(machine, **flags)
    assert all(one["refused"] for one in found["plans"])
    assert "over --max-hourly-cost, never launched" in fixes(found, "price")


# ------------------------------------------------------------ what is missing


def test_nothing_is_missing_where_everything_is_there(machine: Machine) -> None:
    assert kinds(report(machine, price=["H200:8=30"])) == ["quota"]  # only the cloud knows that


def test_each_missing_thing_has_a_fix(machine: Machine) -> None:
    bare = replace(
        machine,
        which=lambda name: None,
        version=lambda name: None,
        importable=lambda name: False,
    )
    found = report(bare, price=["H200:8=30"])
    assert "skypilot is missing -> pip install skypilot==0.14.1" in fixes(found, "package")
    assert "boto3 -> pip install 'skygate[aws]'" in fixes(found, "package")
    assert "ssh is not on the PATH" in fixes(found, "binary")
    assert "rsync is not on the PATH" in fixes(found, "binary")
    other = replace(machine, version=lambda name: "0.10.0")
    assert "skypilot 0.10.0 is installed" in fixes(report(other), "package")


def test_without_any_credentials_the_clouds_are_named(tmp_path: Path, machine: Machine) -> None:
    nowhere = replace(machine, home=tmp_path / "nowhere")
    assert "none for any of aws, gcp, azure" in fixes(report(nowhere), "credential")
    by_variable = replace(nowhere, environ={"AWS_ACCESS_KEY_ID": "x"})
    assert "credential" not in kinds(report(by_variable))


@pytest.mark.parametrize("yaml", [PINNED % ", infra: k8s/ours", PINNED % ", cloud: Kubernetes"])
def test_a_pinned_cloud_needs_its_own_credentials_and_tools(machine: Machine, yaml: str) -> None:
    found = report(replace(machine, which=lambda name: None if name == "kubectl" else name), yaml)
    assert fixes(found, "credential") == "none for kubernetes -> " + (
        "a kubeconfig in ~/.kube/config; then `sky check kubernetes`"
    )
    assert "kubectl is not on the PATH (kubernetes)" in fixes(found, "binary")
    assert "credential" not in kinds(report(machine, yaml, infra="aws/us-east-1"))


def test_with_a_remote_api_server_its_machine_has_the_credentials(machine: Machine) -> None:
    remote = {"SKYPILOT_API_SERVER_ENDPOINT": "https://me:topsecret@sky.example.org"}
    found = report(replace(machine, home=Path("/nowhere"), environ=remote, which=lambda name: None))
    assert fixes(found, "credential") == "not checked: sky.example.org has them -> sky check"
    assert "binary" not in kinds(found)


def test_a_port_that_is_taken_is_told(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = report(machine, admin_port=port)
    assert f"127.0.0.1:{port} is taken" in fixes(found, "port")
    assert "--admin-port" in fixes(found, "port")


def test_what_may_change_tomorrow_is_to_be_pinned(machine: Machine) -> None:
    yaml = (PINNED % "").replace("==0.5.23", ">=0.5").replace("sglang:v0.5.23", "sglang:latest")
    said = fixes(report(machine, yaml.replace(f"--revision {COMMIT}", "")), "pin")
    for what in ("any version of SGLang", "the weights of a/b", "the image docker:lmsysorg/sglang:latest"):
        assert what in said
    assert "pin" not in kinds(report(machine))
    local = (PINNED % "").replace("a/b", "/data/model").replace(f"--revision {COMMIT}", "")
    assert "pin" not in kinds(report(machine, local))
    bare = (PINNED % "").replace(", image_id: 'docker:lmsysorg/sglang:v0.5.23'", "")
    assert "`image_id` in resources" in fixes(report(machine, bare), "pin")


def test_a_branch_is_no_pin_and_a_revision_in_a_variable_is_pinned_by_its_flag(machine: Machine) -> None:
    branch = (PINNED % "").replace(COMMIT, "main")
    assert "`--revision COMMIT` in run" in fixes(report(machine, branch), "pin")
    variable = "envs: {REV: main}" + (PINNED % "").replace(f"--revision {COMMIT}", '${M:+--revision "$REV"}')
    assert "--env REV=COMMIT" in fixes(report(machine, variable), "pin")
    settings = make(provisioner="skypilot", port=0, admin_port=0, env=[f"REV={COMMIT}"])
    options = launching.options(settings, launching.variables(settings, {}, NO_VARIABLES))
    found = preflight.report(parse(variable, "r1.yaml"), settings, options, machine)
    assert "pin" not in kinds(found)


def test_prompts_that_would_cross_the_network_in_clear_are_told(machine: Machine) -> None:
    clear = (PINNED % "").replace("--ssl-keyfile $REPLICA_TLS_KEY --ssl-certfile $REPLICA_TLS_CERT", "")
    assert "would cross the network in clear" in fixes(report(machine, clear), "transport")
    assert "--replica-transport tls" in fixes(report(machine, clear, replica_transport="tls"), "transport")
    assert "transport" not in kinds(report(machine, clear, replica_transport="plain"))
    assert "transport" not in kinds(report(machine))


def test_a_replica_on_this_machine_needs_bash_alone(machine: Machine) -> None:
    found = report(replace(machine, which=lambda name: None), provisioner="local")
    assert (found["plans"], found["ceiling"], kinds(found)) == ([], None, ["binary"])
    assert kinds(report(machine, provisioner="static", replica=["http://a:1"])) == []


# ------------------------------------------------------------ the command


def check(*arguments: str, home: Path) -> Result:
    flags = ["--port", "0", "--admin-port", "0", "--state-dir", str(home / "state")]
    return CliRunner().invoke(main, ["check", *arguments, *flags], env={"HOME": str(home)})


def test_the_recipe_of_skypilots_readme_passes_byte_for_byte(tmp_path: Path) -> None:
    done = check(str(RECIPE), home=tmp_path)
    assert done.exit_code == 0, done.output
    assert "deepseek-ai/DeepSeek-R1" in done.output
    assert "H200:8 or H100:8" in done.output
    assert "sky check" in done.output  # no cloud here, which is no reason to fail
    assert not (tmp_path / "state").exists()


def test_json_has_all_of_it(tmp_path: Path) -> None:
    done = check(str(RECIPE), "--json", "--plan", "H200:8", "--price", "H200:8=30", home=tmp_path)
    found = json.loads(done.output)
    assert (found["name"], found["max_replicas"], found["ceiling"]) == ("deepseek-r1", 2, 60.0)
    assert [plan["plan"] for plan in found["plans"]] == ["H200:8x1 spot", "H200:8x1 on-demand"]
    assert {one["kind"] for one in found["findings"]} >= {"pin", "credential"}


def test_the_readmes_launch_plans_can_be_checked_first(tmp_path: Path) -> None:
    flags = "--plan H200:8x1 --plan H100:8x2 --max-hourly-cost 120 --max-daily-cost 500 --price H200:8=27.5"
    more = "--model r1 --dead-man 7200 --keep-failed 30m --provision-timeout 900 --json"
    done = check(str(CONFIG / "deepseek-r1-671b.yaml"), *flags.split(), *more.split(), home=tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["model"], found["ceiling"]) == ("r1", 120.0)
    plans = [(plan["plan"], plan["price"]) for plan in found["plans"]]
    assert plans == [
        ("H200:8x1 spot", 27.5), ("H100:8x2 spot", None),
        ("H200:8x1 on-demand", 27.5), ("H100:8x2 on-demand", None),
    ]  # fmt: skip


def test_the_recipe_without_a_plan_never_rents_twice_what_it_needs(machine: Machine) -> None:
    settings = make(provisioner="skypilot", port=0, admin_port=0)
    service = load(CONFIG / "deepseek-r1-671b.yaml")
    found = preflight.report(service, settings, launching.options(settings, NO_VARIABLES), machine)
    assert [(plan["nodes"], plan["accelerators"]) for plan in found["plans"]] == 2 * [(2, ["H100:8"])]


def test_wrong_flags_are_one_line(tmp_path: Path) -> None:
    done = check(str(RECIPE), "--plan", "H200", home=tmp_path)
    assert done.exit_code == 2
    assert "such as H100:8x2" in done.output
    missing = check(str(RECIPE), "--secret", "NO_SUCH_TOKEN", home=tmp_path)
    assert "export NO_SUCH_TOKEN" in missing.output


def test_the_shipped_yamls_are_pinned_but_for_what_nobody_here_has_tried(machine: Machine) -> None:
    """The machine's image, and weights that somebody else converted: each with how to pin it."""
    settings = make(provisioner="skypilot", port=0, admin_port=0)
    options = launching.options(settings, NO_VARIABLES)
    names = ("deepseek-r1-671b.yaml", "qwen3-8b.yaml", "deepseek-r1-671b-a100.yaml")
    found = [preflight.report(load(CONFIG / name), settings, options, machine) for name in names]
    pins = [[one["fix"] for one in each["findings"] if one["kind"] == "pin"] for each in found]
    image = "`image_id` in resources, once one is known to work"
    assert pins[:2] == [[image], [image]]
    assert pins[2][0].startswith("--env MODEL_REVISION=COMMIT")
    assert pins[2][1:] == [image]
    assert "transport" not in [one["kind"] for each in found for one in each["findings"]]
