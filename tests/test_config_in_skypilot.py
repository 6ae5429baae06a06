"""The shipped YAMLs as the real SkyPilot and a shell see them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from replicas.spec import load

ROOT = Path(__file__).parent.parent
YAMLS = [*sorted((ROOT / "config").glob("*.yaml")), ROOT / "tests/data/skypilot-deepseek-r1-671b.yaml"]
SHIPPED = YAMLS[:-1]
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))

ASK = """
import json, sys
from replicas import plans, spec
from replicas.provisioners import sdk
from replicas.provisioners.task import build_task

sky = sdk.import_sky()
found = {}
for path in sys.argv[1:]:
    service = spec.load(path)
    given = {name: "x" for name in service.task.get("secrets") or {}}
    def task(plan):
        made = build_task(sky, service, given, plan)
        kinds = [
            [*(r.accelerators or {}).items(), r.use_spot, r.network_tier is not None] for r in made.resources
        ]
        return [made.num_nodes, sorted(kinds)]
    wanted = plans.Plan(), plans.Plan("H200:8", 1, use_spot=True), plans.Plan("H100:8", 2)
    found[path] = [task(plan) for plan in wanted]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What SkyPilot makes of each YAML: as it is, on 1 x H200:8 spot, on 2 x H100:8."""
    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        [sys.executable, "-c", ASK, *map(str, YAMLS)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {Path(path).name: value for path, value in found.items()}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_each_yaml_is_a_task_for_skypilot_on_every_plan(path: Path, tasks: dict[str, Any]) -> None:
    own, h200, h100 = tasks[path.name]
    assert own[0] == load(path).num_nodes
    assert h200 == [1, [[["H200", 8], True, False]]]
    assert h100[0] == 2
    assert {kind[0][0] for kind in h100[1]} == {"H100"}


def test_several_nodes_have_a_fast_network_between_them(tasks: dict[str, Any]) -> None:
    for name in ("deepseek-r1-671b.yaml", "deepseek-r1-671b-a100.yaml"):
        own, _, h100 = tasks[name]
        assert all(kind[-1] for kind in own[1] + h100[1])
    assert tasks["deepseek-r1-671b-a100.yaml"][0][0] == 4


@pytest.mark.parametrize("script", ["setup", "run"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_scripts_are_sound(path: Path, script: str) -> None:
    command = [SHELLCHECK, "--shell=bash", "-"] if SHELLCHECK else ["bash", "-n"]
    text = getattr(load(path), script)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
