"""The real package `sky`, without a network and without a home: our calls fit it, and it takes the recipe."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

ASK = """
import inspect, json, sys
from replicas import spec
from replicas.provisioners import sdk, sky_errors
from replicas.provisioners.task import build_task

assert "sky" not in sys.modules   # 4 s and 160 MB, only when it is used
sky = sdk.import_sky()
service = spec.load("config/deepseek-r1-671b.yaml")
task = build_task(sky, service, {"REPLICA_API_KEY": "key"})
theirs = build_task(sky, spec.load("tests/data/skypilot-deepseek-r1-671b.yaml"), {})
calls = [name for name, value in vars(sdk.Sky).items() if inspect.isfunction(value) and name[0] != "_"]

def missing(name):
    ours = set(inspect.signature(getattr(sdk.Sky, name)).parameters) - {"self"}
    return sorted(ours - set(inspect.signature(getattr(sky, name)).parameters))

def error(value):
    launch_error = sky_errors.launch_error(sky.exceptions, value)
    return [type(launch_error).__name__, launch_error.permanent, launch_error.reason]

unavailable = sky.exceptions.ResourcesUnavailableError
print(json.dumps({
    "nodes": task.num_nodes,
    "service": task.service is not None,
    "candidates": [sorted(
        [*resources.accelerators.items(), resources.use_spot, resources.ports] for resources in one.resources
    ) for one in (task, theirs)],
    "secrets": {name: value.get_secret_value() for name, value in task.secrets.items()},
    "missing": {name: missing(name) for name in calls},
    "modes": [mode.name for mode in (sky.StatusRefreshMode.NONE, sky.StatusRefreshMode.AUTO)],
    "no capacity": error(unavailable("none", failover_history=[Exception("us-east-1a")])),
    "not feasible": error(unavailable("nothing fits")),
    "sockets": sys.modules["sky.server.rest"].adapter.poolmanager.connection_from_url("http://127.0.0.1:9")
        .conn_kw["socket_options"],
    "no cloud": error(sky.exceptions.NoCloudAccessError("Run: sky check")),
    "absent": issubclass(sky.exceptions.ClusterDoesNotExist, ValueError),
    "run ended": [int(getattr(sky.exceptions.JobExitCode, n)) for n in ("SUCCEEDED", "FAILED", "CANCELLED")],
}))
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the real package says; one process, some 6 s."""
    env = os.environ | {"HOME": str(tmp_path_factory.mktemp("home")), "PYTHONPATH": str(ROOT)}
    asked = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, env=env, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    return json.loads(asked.stdout.splitlines()[-1])


def test_it_takes_the_deepseek_recipe_without_its_service(answer: Any) -> None:
    assert answer["service"] is False
    assert answer["nodes"] == 2
    h100, h200 = ([[[kind, 8], spot, ["30000"]] for spot in (False, True)] for kind in ("H100", "H200"))
    assert answer["candidates"] == [h100, h100 + h200], "ours, and SkyPilot's own file"
    assert answer["secrets"]["REPLICA_API_KEY"] == "key"


def test_every_call_of_ours_exists_with_its_arguments(answer: Any) -> None:
    assert len(answer["missing"]) == 12
    assert not any(answer["missing"].values())
    assert answer["modes"] == ["NONE", "AUTO"]


def test_its_errors_are_understood(answer: Any) -> None:
    assert answer["no capacity"] == ["NoCapacity", False, "none (last: us-east-1a)"]
    assert answer["not feasible"] == ["Infeasible", True, "nothing fits"]
    assert answer["no cloud"] == ["LaunchError", True, "Run: sky check"]
    assert answer["absent"]
    assert answer["run ended"] == [0, 100, 103]


def test_a_connection_whose_other_end_is_gone_without_a_word_is_found_out(answer: Any) -> None:
    """SkyPilot's `get` has no limit: a look, a `down` or a dead-man's order would wait for ever."""
    assert [socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1] in answer["sockets"]
    assert [socket.IPPROTO_TCP, socket.TCP_NODELAY, 1] in answer["sockets"]   # urllib3's own
