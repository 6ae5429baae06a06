"""The command line against an admin port on a real socket: what it sends, prints, and returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from gateway import cli, statedir
from gateway.settings import SETTINGS

if TYPE_CHECKING:
    from gateway.admin import Admin

    from .conftest import AdminPort, FakeController

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    """The command, in a state dir of its own where no gateway runs."""
    for row in SETTINGS:
        monkeypatch.delenv(row.env, raising=False)
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("GATEWAY_ADMIN_PORT", "1")  # nothing listens there
    monkeypatch.delenv("GATEWAY_ADMIN_URL", raising=False)

    def run(*words: str, **environment: str) -> Result:
        return CliRunner().invoke(cli.main, list(words), env=environment)

    return run


@pytest.fixture
def ask(invoke: Invoke, port: AdminPort) -> Invoke:
    """The command, told where the fake gateway is."""

    def run(*words: str) -> Result:
        return invoke(*words, GATEWAY_ADMIN_URL=port.url)

    return run


def test_status_shows_phase_eta_demand_price_and_reason(ask: Invoke) -> None:
    result = ask("status")
    assert result.exit_code == 0
    for words in ("svc-gw-0a1b2c3d-1", "starting", "load", "62%", "7 min", "3 waiting", "0..2", "2.50"):
        assert words in result.output, words


def test_status_shows_where_a_replica_is_and_machines_that_are_none(
    ask: Invoke, controller: FakeController
) -> None:
    controller.service["replicas"][0] |= {"region": "aws/us-east-1/us-east-1a"}
    before = controller.status
    more = {
        "strays": [{"id": "svc-gw-0a1b2c3d-7", "hourly_cost": 9.5, "reason": "no row knows it"}],
        "others": [{"name": "svc-A100", "hourly_cost": None, "status": "STOPPED"}],
    }
    controller.status = lambda: {**before(), **more}  # type: ignore[method-assign]
    output = ask("status").output
    for words in ("aws/us-east-1/us-east-1a", "svc-gw-0a1b2c3d-7", "$9.50 an hour", "no row knows it"):
        assert words in output, words
    for words in ("not ours, never touched", "svc-A100", "price unknown", "STOPPED"):
        assert words in output, words
    assert "--orphans" not in output
    more["others"] += [{"name": "svc-gw-deadbeef-1", "hourly_cost": 2.0, "status": "UP"}]
    assert "`gateway down --orphans OWNER` ends a dead gateway's" in ask("status").output


def test_status_as_json_is_the_answer_of_the_admin_port(ask: Invoke) -> None:
    status = json.loads(ask("status", "--json").output)
    assert status["services"][0]["name"] == "svc"


def test_a_blocked_service_says_the_cause_and_the_way_out(ask: Invoke, controller: FakeController) -> None:
    controller.service |= {"replicas": [], "blocked": {"message": "no quota for H200"}}
    output = ask("status").output
    assert "no quota for H200" in output
    assert "gateway retry svc" in output


@pytest.mark.parametrize(
    ("words", "call", "says"),
    [
        (("--min", "1", "--max", "4"), ("set_limits", "svc", 1, 4), "svc: 1..4 replicas"),
        (("svc", "--max", "0"), ("set_limits", "svc", None, 0), "(paused)"),
        (("--reset",), ("reset_limits", "svc"), "svc: 0..2 replicas"),
    ],
)
def test_scale_sets_limits_of_the_only_service(
    ask: Invoke, controller: FakeController, words: tuple[str, ...], call: tuple[Any, ...], says: str
) -> None:
    result = ask("scale", *words)
    assert result.exit_code == 0, result.output
    assert controller.calls == [call]
    assert says in result.output


@pytest.mark.parametrize("words", [(), ("--reset", "--max", "1")])
def test_scale_without_anything_to_do_is_wrong_use(ask: Invoke, words: tuple[str, ...]) -> None:
    result = ask("scale", *words)
    assert result.exit_code == 2
    assert "--min N, --max N or both; or --reset alone" in result.output


def test_what_the_gateway_refuses_is_told_in_its_words(ask: Invoke) -> None:
    result = ask("scale", "--min", "9")
    assert result.exit_code == 1
    assert "min 9 is more than max 2: give max too" in result.output
    assert "no service 'nope'" in ask("scale", "nope", "--max", "1").output


def test_retry_tells_the_controller(ask: Invoke, controller: FakeController) -> None:
    assert ask("retry").exit_code == 0
    assert controller.calls == [("retry", "svc")]


def write_log(home: Path, replica: str, text: str) -> None:
    folder = home / "replicas" / replica
    folder.mkdir(parents=True)
    (folder / "output.log").write_text(text)


def test_logs_are_of_the_newest_replica_or_the_one_named_by_its_number(ask: Invoke, tmp_path: Path) -> None:
    write_log(tmp_path, "svc-gw-0a1b2c3d-1", "first\n")
    write_log(tmp_path, "svc-gw-0a1b2c3d-2", "a\nb\n")
    assert ask("logs", "1").output == "first\n"
    assert ask("logs", "svc-gw-0a1b2c3d-2", "--tail", "1").output == "b\n"
    assert "no single replica '3'" in ask("logs", "3").output
    assert ask("logs").exit_code == 0


def test_logs_are_read_from_the_files_when_no_gateway_runs(invoke: Invoke, tmp_path: Path) -> None:
    write_log(tmp_path / "home", "svc-gw-0a1b2c3d-7", "last words\n")
    result = invoke("logs")
    assert (result.exit_code, result.output) == (0, "last words\n")


@pytest.mark.parametrize(("speed", "shown"), [(11.52, "11.5"), (2412.3, "2,412"), (0.0, " 0 "), (None, "")])
def test_status_shows_how_fast_a_replica_generates(
    ask: Invoke, controller: FakeController, speed: float | None, shown: str
) -> None:
    assert "tok/s" not in ask("status").output   # an empty column is left out
    controller.service["replicas"][0]["generation_tokens_per_second"] = speed
    output = ask("status").output
    assert ("tok/s" in output) == (speed is not None)
    assert shown in output


@pytest.mark.parametrize("running", [True, False])
def test_logs_of_a_rank_or_of_the_provisioning_with_and_without_a_gateway(
    ask: Invoke, invoke: Invoke, tmp_path: Path, running: bool
) -> None:
    home, run = (tmp_path, ask) if running else (tmp_path / "home", invoke)
    text = "(head, rank=0, pid=5) zero\n(worker1, rank=1, pid=6, ip=10.0.0.12) one\n"
    write_log(home, "svc-gw-0a1b2c3d-7", text)
    assert run("logs", "7", "--rank", "1", "--lines", "5").output == text.splitlines(keepends=True)[1]
    assert run("logs", "--lines", "1").output == text.splitlines(keepends=True)[1]
    refused = run("logs", "7", "--rank", "5")
    assert (refused.exit_code, "its ranks are 0, 1" in refused.output) == (1, True)
    refused = run("logs", "7", "--provision")
    assert (refused.exit_code, "has no provision.log" in refused.output) == (1, True)
    (home / "replicas" / "svc-gw-0a1b2c3d-7" / "provision.log").write_text("made\n")
    assert run("logs", "7", "--provision").output == "made\n"


@pytest.mark.parametrize("words", [("status",), ("scale", "--max", "1"), ("retry",)])
def test_no_gateway_is_one_line_that_says_how_to_start_one(invoke: Invoke, words: tuple[str, ...]) -> None:
    result = invoke(*words)
    assert result.exit_code == 1
    assert "no gateway answers at http://127.0.0.1:1: start one with `gateway up FILE.yaml`" in result.output


def test_without_an_address_no_default_port_is_tried_it_may_be_another_gateways(
    invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("status", GATEWAY_ADMIN_PORT="")
    assert result.exit_code == 1
    assert f"no gateway runs with the state dir {tmp_path / 'home'}: start one with" in result.output


def test_the_admin_port_is_found_through_the_state_dir(
    invoke: Invoke, port: AdminPort, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    statedir.write_address(home, {"pid": os.getpid(), "admin_url": port.url})
    assert invoke("status").exit_code == 0


def test_an_admin_key_is_asked_for_and_taken(admin: Admin, invoke: Invoke) -> None:
    from .conftest import AdminPort

    running = AdminPort(admin, "admin-secret")
    running.thread.start()
    try:
        refused = invoke("status", "--admin-url", running.url)
        assert refused.exit_code == 1
        assert "--admin-key or GATEWAY_ADMIN_KEY" in refused.output
        assert invoke("status", "--admin-url", running.url, GATEWAY_ADMIN_KEY="admin-secret").exit_code == 0
    finally:
        running.stop()


def test_something_else_on_the_port_is_told_from_a_gateway(invoke: Invoke) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        result = invoke("status", "--admin-url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
    assert result.exit_code == 1
    assert "is it the admin port of a gateway?" in result.output


def test_down_waits_until_the_gateway_is_gone_and_shows_what_it_ends(
    ask: Invoke, port: AdminPort, controller: FakeController
) -> None:
    ending = threading.Timer(1.0, port.stop)
    ending.start()
    result = ask("down")
    ending.join()
    assert result.exit_code == 0, result.output
    assert "ending svc-gw-0a1b2c3d-1" in result.output
    assert "every replica is gone" in result.output
    assert ("down",) in controller.calls


def test_a_down_that_fails_says_why(ask: Invoke, controller: FakeController) -> None:
    controller.down_error = RuntimeError("the cloud does not answer")
    controller.down_gate.set()
    result = ask("down")
    assert result.exit_code == 1
    assert "the cloud does not answer; run `gateway down` again" in result.output


def test_down_without_gateway_and_replicas_has_nothing_to_do(invoke: Invoke) -> None:
    result = invoke("down")
    assert (result.exit_code, result.output) == (0, "no gateway runs; nothing to end\n")


YAML = """
name: svc
run: python3 -m sglang.launch_server --model-path org/model --port 8080
resources: {ports: 8080}
service: {readiness_probe: /health, replicas: 1}
"""


def test_check_prints_the_service_or_the_one_line_that_is_wrong(invoke: Invoke, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(YAML)
    bad.write_text(YAML.replace("/health", "health"))
    result = invoke("check", str(good))
    assert result.exit_code == 0
    assert "org/model" in result.output
    assert json.loads(invoke("check", str(good), "--json").output)["port"] == 8080
    result = invoke("check", str(bad))
    assert result.exit_code == 1
    assert "bad.yaml: service.readiness_probe" in result.output
    assert invoke("check", str(tmp_path / "none.yaml")).exit_code == 1


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"GATEWAY_HOST": "0.0.0.0"}, "--api-key NAME=KEY"),
        ({"GATEWAY_API_KEYS": "a=short"}, "at least 8 are needed"),
        ({"GATEWAY_WORKERS": "many"}, "--workers (GATEWAY_WORKERS) wants a whole number"),
        ({"GATEWAY_FILE": "/nowhere.yaml"}, "no such file"),
    ],
)
def test_every_option_is_also_a_variable_and_wrong_ones_stop_the_start(
    invoke: Invoke, environment: dict[str, str], says: str
) -> None:
    result = invoke("up", **environment)
    assert result.exit_code == 2
    assert says in result.output


def test_every_setting_is_an_option_of_up_with_its_sentence_and_variable(invoke: Invoke) -> None:
    output = " ".join(invoke("up", "--help").output.split())
    for row in SETTINGS:
        assert row.option in output
        assert row.env in output


def test_keys_in_a_variable_are_split_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    split = cli.Texts(r"[,\s]+").split_envvar_value
    assert split("a=12345678,b=87654321 c=x") == ["a=12345678", "b=87654321", "c=x"]


def test_the_command_starts_without_loading_servers_or_clouds() -> None:
    code = (
        "import sys, gateway.cli; heavy = {'sky', 'uvicorn', 'starlette', 'httpx', 'openai', 'pydantic'}"
        "& set(sys.modules); sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


class _Quiet(BaseHTTPRequestHandler):
    """A web server that is no gateway."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_what_up_loads_before_it_starts_its_children_is_light() -> None:
    """Each import of `up` delays the first answer: it starts the children, which import what they need."""
    code = (
        "import sys, gateway.cli, gateway.supervisor\n"
        "with gateway.cli.friendly(): pass\n"
        "heavy = {'sky', 'uvicorn', 'starlette', 'httpx', 'prometheus_client', 'rich'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_what_the_controller_loads_before_the_workers_hear_of_it_is_no_http_client() -> None:
    heavy = "{'sky', 'httpx', 'rich'} & set(sys.modules)"
    code = f"import sys, gateway.assembly; sys.exit(' '.join({heavy}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
