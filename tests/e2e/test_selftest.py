"""`gateway selftest` end to end: real processes on this machine, with the simulator in place of the GPUs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import statedir
from tests.e2e.conftest import clean_env, eventually

YAML = """\
name: st
secrets:
  REPLICA_API_KEY: null
run: |
  {before}
  exec "$PYTHON" -m replicas.simulator --host 127.0.0.1 --port $REPLICA_PORT \\
    --model-path deepseek-ai/DeepSeek-R1 --api-key "$REPLICA_API_KEY" --enable-metrics \\
    --startup load=0.3 --drain-tick 0.2
service:
  ports: 30000
  readiness_probe:
    path: /health
    initial_delay_seconds: {delay}
    endpoint_probe_interval_seconds: 1
  replica_policy: {{min_replicas: 0, max_replicas: 2}}
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "gateway", "selftest", str(tmp_path / "st.yaml"), "--provisioner", "local"),
        *("--state-dir", str(tmp_path / "state"), "--idle-timeout", "0.5", "--price", "2"),
    ]


def write(folder: Path, before: str = ":", delay: float = 60) -> None:
    (folder / "st.yaml").write_text(YAML.format(before=before, delay=delay))


def run(command: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, "--max-cost", "2", *more],
        env=clean_env(), capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip


def steps(output: str) -> list[str]:
    return re.findall(r"^  ok  (.+?)  +[0-9.]+ s  \$ *[0-9.]+  ", output, re.MULTILINE)


def nothing_runs(folder: Path) -> bool:
    os.close(statedir.lock(folder / "state", wait_s=0))
    return not list((folder / "state").glob("replicas/*/process.json"))


def test_it_launches_asks_loses_recovers_goes_to_zero_and_verifies(
    command: list[str], tmp_path: Path
) -> None:
    write(tmp_path)
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(done.stdout) == [
        *("start", "launch", "answer", "kill", "recover", "answer again", "zero", "absent"),
    ]
    first, second = re.findall(r"first token, from (st-gw-\S+)", done.stdout)
    assert first != second
    dollars = [float(text) for text in re.findall(r" s  \$ *([0-9.]+)", done.stdout)]
    assert dollars[1] > 0  # the launch
    assert "PASSED in" in done.stdout
    assert nothing_runs(tmp_path)


def test_a_replica_that_never_gets_ready_fails_the_launch_with_its_reason(
    command: list[str], tmp_path: Path
) -> None:
    write(tmp_path, before="sleep 60", delay=2)
    done = run(command)
    assert done.returncode == 1
    assert "FAILED at launch: no answer: " in done.stdout
    assert "not ready within" in done.stdout
    assert f"Nothing runs. Logs: {tmp_path / 'state'}" in done.stdout
    assert steps(done.stdout) == ["start", "absent"]
    assert nothing_runs(tmp_path)


def test_a_loss_that_is_not_made_good_fails_the_recovery(command: list[str], tmp_path: Path) -> None:
    once = tmp_path / "launched"
    write(tmp_path, before=f"test ! -e {once} || {{ echo no weights; exit 4; }}; touch {once}")
    done = run(command)
    assert done.returncode == 1
    assert "FAILED at recover: no answer: " in done.stdout
    assert "run exited with code 4: no weights" in done.stdout
    assert steps(done.stdout)[-2:] == ["kill", "absent"]
    assert nothing_runs(tmp_path)


def test_ctrl_c_ends_what_runs_and_verifies_it(command: list[str], tmp_path: Path) -> None:
    write(tmp_path, before="sleep 60")
    test = subprocess.Popen(
        [*command, "--max-cost", "2"], env=clean_env(), stdout=subprocess.PIPE, text=True
    )
    try:
        eventually(lambda: list((tmp_path / "state").glob("replicas/*/process.json")))
        test.send_signal(signal.SIGINT)
        output, _ = test.communicate(timeout=60)
    finally:
        test.kill()
        test.wait()
    assert test.returncode == 130, output
    assert "FAILED at launch: interrupted" in output
    assert steps(output)[-1] == "absent"
    assert nothing_runs(tmp_path)


def test_killed_itself_it_leaves_nothing_running(command: list[str], tmp_path: Path) -> None:
    write(tmp_path, before="sleep 60")
    with subprocess.Popen(
        [*command, "--max-cost", "2"], env=clean_env(), stdout=subprocess.DEVNULL
    ) as test:
        eventually(lambda: list((tmp_path / "state").glob("replicas/*/process.json")))
        test.kill()
    eventually(lambda: statedir.read_address(tmp_path / "state") is None)
    assert not list((tmp_path / "state").glob("replicas/*/process.json"))


def test_it_does_not_begin_what_may_cost_more_or_an_unknown_sum(command: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    dear = run(command, "--price", "100")
    assert dear.returncode == 1
    assert "more than --max-cost 2: give --max-cost 20.02" in dear.stderr
    config = Path(__file__).parents[2] / "config" / "qwen3-8b.yaml"
    unknown = run([*command[:4], str(config), "--state-dir", str(tmp_path / "state")])
    assert unknown.returncode == 1
    assert "the price is not known" in unknown.stderr
    assert "--price" in unknown.stderr
    assert not (tmp_path / "state").exists()
