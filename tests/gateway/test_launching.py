"""Variables of replicas: where their values come from, and that a reboot loses none and nobody reads them."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from gateway import launching
from gateway.assembly import controller_config
from gateway.launching import NO_VARIABLES, Variables
from gateway.settings import Settings, SettingsError, make
from replicas.plans import Market, Plan, menu
from replicas.spec import parse

YAML = """
resources: {ports: 30000, accelerators: H200:8, use_spot: true}
run: python -m sglang.launch_server --model-path m --port 30000 --api-key $REPLICA_API_KEY
service: {readiness_probe: /health, replicas: 1}
"""


def found(
    values: dict[str, Any], environ: dict[str, str] | None = None, last: Variables = NO_VARIABLES
) -> Variables:
    return launching.variables(make(**values), environ or {}, last)


def test_a_variable_has_the_value_given_or_that_of_the_environment() -> None:
    got = found({"env": ["A=1=2", "B", "C="], "secret": ["HF_TOKEN"]}, {"B": "2", "HF_TOKEN": "hf_x"})
    assert got.envs == {"A": "1=2", "B": "2", "C": ""}
    assert got.secrets == {"HF_TOKEN": "hf_x"}


def test_a_file_has_one_variable_a_line(tmp_path: Path) -> None:
    file = tmp_path / "r1.env"
    file.write_text("# keys\nHF_TOKEN=hf_x\n\nexport A = 'two words'\nB=\"2\"\nC='\n")
    got = found({"env_file": str(file)})
    assert got.file == {"HF_TOKEN": "hf_x", "A": "two words", "B": "2", "C": "'"}
    assert got.all() == got.file


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"secret": ["HF_TOKEN"]}, "--secret HF_TOKEN: has no value; export HF_TOKEN"),
        ({"env": ["B"]}, "--env B: has no value"),
        ({"env": ["a-b=1"]}, "is not a variable's name"),
        ({"secret": ["HF_TOKEN=hf_topsecret"]}, "everybody on this machine can read a command line"),
        ({"env_file": "/nowhere/r1.env"}, "--env-file /nowhere/r1.env: cannot be read"),
    ],
)
def test_what_cannot_work_is_one_line_without_any_value(values: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        found(values)
    assert says in str(caught.value)
    assert "topsecret" not in str(caught.value)


def test_a_bad_line_of_a_file_is_told_by_its_number_and_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "r1.env"
    file.write_text("A=1\ntopsecret\n")
    with pytest.raises(SettingsError, match="line 2 is not NAME=VALUE") as caught:
        found({"env_file": str(file)})
    assert "topsecret" not in str(caught.value)


def test_after_a_reboot_the_values_are_those_of_the_last_start(tmp_path: Path) -> None:
    file = tmp_path / "r1.env"
    file.write_text("C=3\n")
    flags = {"env": ["B"], "secret": ["HF_TOKEN"], "env_file": str(file)}
    first = found(flags, {"B": "2", "HF_TOKEN": "hf_x"})
    launching.keep(tmp_path, first)
    file.unlink()
    assert found(flags, {}, launching.kept(tmp_path)) == first
    newer = found(flags, {"HF_TOKEN": "hf_y"}, launching.kept(tmp_path))
    assert newer.secrets == {"HF_TOKEN": "hf_y"}
    assert found({"secret": ["HF_TOKEN"]}, {}, launching.kept(tmp_path)).all() == {"HF_TOKEN": "hf_x"}


def test_only_we_may_read_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / launching.FILE).write_text("old")
    (tmp_path / launching.FILE).chmod(0o644)
    launching.keep(tmp_path, Variables(secrets={"A": "1"}))
    assert stat.S_IMODE((tmp_path / launching.FILE).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [launching.FILE]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"envs": 1}', '{"envs": {}, "secrets": {}}'])
def test_nothing_readable_kept_is_nothing_kept(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / launching.FILE).write_text(text)
    assert launching.kept(tmp_path) == NO_VARIABLES


def test_no_value_shows_in_a_repr() -> None:
    known = Variables({"A": "topsecret"}, {"B": "topsecret"}, {"C": "topsecret"})
    settings = make(env=["A=topsecret"])
    shown = f"{known!r} {settings!r} {controller_config(settings, known)!r}"
    assert "topsecret" not in shown


def test_the_flags_become_the_controllers_options() -> None:
    settings = make(
        provisioner="skypilot",
        plan=["H200:8", "H100:8x2"],
        price=["H200:8=30", "2"],
        max_hourly_cost="50",
        infra="aws",
    )
    options = controller_config(settings, Variables({"A": "1"}, {"B": "2"}, {"C": "3"})).launch
    assert options.plans == (Plan("H200:8", 1), Plan("H100:8", 2))
    assert (options.prices, options.max_hourly_cost) == ({"H200:8": 30.0, "": 2.0}, 50.0)
    assert (options.envs, options.secrets) == ({"A": "1"}, {"C": "3", "B": "2"})
    assert menu(parse(YAML, "r1.yaml"), options).market is Market.SPOT
    assert launching.replica_price(settings) == 2.0


def test_servers_of_this_machine_or_of_somebody_else_have_no_plans() -> None:
    settings = make(provisioner="local", plan=["H200:8"], env=["A=1"])
    options = controller_config(settings, Variables({"A": "1"})).launch
    (plan,) = menu(parse(YAML, "r1.yaml"), options).plans
    assert (plan.name, plan.envs) == ("", {"A": "1"})


def test_settings_with_launch_flags_survive_the_way_to_a_child() -> None:
    settings = make(plan=["H200:8"], env=["A=1"], secret=["B"], price=["2"], use_spot=False)
    assert Settings.from_json(settings.to_json()) == settings


def test_the_command_line_takes_them() -> None:
    from gateway.cli import setting_options

    seen: dict[str, Any] = {}

    @click.command()
    @setting_options()
    def up(**values: Any) -> None:
        seen["settings"] = make(**values)

    flags = "--plan H200:8x1 --plan H100:8x2 --no-use-spot --env A=1,2 --env B=3 --price L4=1 --price 2"
    environ = {"GATEWAY_ENV": "", "GATEWAY_SECRETS": "HF_TOKEN,OTHER"}
    done = CliRunner().invoke(up, flags.split(), env=environ, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    settings = seen["settings"]
    assert settings.plan == ("H200:8x1", "H100:8x2")
    assert settings.use_spot is False
    assert settings.env == ("A=1,2", "B=3")
    assert settings.secret == ("HF_TOKEN", "OTHER")
    assert settings.price == ("L4=1", "2")


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({}, 7200.0),
        ({"dead_man": "3h"}, 10_800.0),
        ({"dead_man": "10m"}, 1200.0 + 1200.0),  # a cold start: provision timeout and initial delay
        ({"dead_man": "10m", "provision_timeout": "3000"}, 3000.0 + 1200.0),
        ({"keep_failed": "4h"}, 14_400.0),
    ],
)
def test_a_dead_mans_timer_is_never_shorter_than_a_cold_start_or_than_a_failed_machine_is_kept(
    values: dict[str, Any], seconds: float
) -> None:
    assert launching.dead_man(make(**values), parse(YAML, "r1.yaml")) == seconds
