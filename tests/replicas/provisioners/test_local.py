"""What holds for processes beyond the conformance suite: their environment, their end, their words."""
from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from replicas import tls
from replicas.plans import Plan
from replicas.provisioners import LaunchError, launcher
from replicas.provisioners.environment import gpus_per_node
from replicas.provisioners.launcher import _started_by_ps, started
from replicas.provisioners.local import LocalProvisioner
from replicas.spec import Service

ID = "tiny-gw-0badcafe-7"

Local = Callable[..., LocalProvisioner]
Build = Callable[..., Service]
Running = Callable[[], dict[int, str]]
Eventually = Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]


async def ended(provisioner: LocalProvisioner, replica_id: str = ID) -> bool:
    return not (await provisioner.instances())[replica_id].alive


async def test_run_sees_the_variables_of_a_skypilot_node_and_its_own_port(
    local: Local, service: Build, tmp_path: Path, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_ADMIN_KEY", "secret-of-the-gateway")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/metrics")
    monkeypatch.setenv("FROM_OUTSIDE", "kept")
    monkeypatch.setenv("MODEL", "lost")
    provisioner = local()
    tiny = service("env -0 > $REPLICA_DIR/env; pwd", more="envs: {MODEL: tiny}\nsecrets: {TOKEN: t}")
    await provisioner.launch(ID, tiny, {"REPLICA_API_KEY": "key"})
    url = (await provisioner.instances())[ID].url
    await eventually(lambda: ended(provisioner))

    directory = tmp_path / "replicas" / ID
    pairs = (directory / "env").read_text().rstrip("\0").split("\0")
    env = dict(pair.split("=", 1) for pair in pairs)
    assert env["SKYPILOT_NODE_RANK"] == "0"
    assert env["SKYPILOT_NUM_NODES"] == "1"
    assert env["SKYPILOT_NODE_IPS"] == "127.0.0.1"
    assert env["SKYPILOT_NUM_GPUS_PER_NODE"] == "0"
    assert env["SKYPILOT_SERVE_REPLICA_ID"] == "7"
    assert env["SKYPILOT_TASK_ID"]
    assert (env["MODEL"], env["TOKEN"], env["FROM_OUTSIDE"]) == ("tiny", "t", "kept")
    assert env["REPLICA_API_KEY"] == "key"
    assert env["PYTHON"] == sys.executable
    assert url == f"http://127.0.0.1:{env['REPLICA_PORT']}"
    assert not [name for name in env if name.startswith(("GATEWAY_", "PROMETHEUS_"))]
    assert str(directory) in (directory / "output.log").read_text()


async def test_the_simulators_package_is_found_from_an_empty_folder(
    local: Local, service: Build, eventually: Eventually
) -> None:
    provisioner = local()
    await provisioner.launch(ID, service('$PYTHON -c "import replicas.phases; print(6 * 7)"; exit 9'), {})
    await eventually(lambda: ended(provisioner))
    assert (await provisioner.instances())[ID].detail == "run exited with code 9: 42"


async def test_two_replicas_get_different_ports(local: Local, service: Build) -> None:
    provisioner = local()
    for n in range(1, 6):
        await provisioner.launch(f"tiny-gw-0badcafe-{n}", service(), {})
    assert len({instance.url for instance in (await provisioner.instances()).values()}) == 5


async def test_a_setup_that_fails_is_the_end_and_run_is_never_started(
    local: Local, service: Build, tmp_path: Path, eventually: Eventually
) -> None:
    provisioner = local()
    tiny = service("touch $REPLICA_DIR/ran", setup="echo fetching\nfalse\necho no such wheel >&2; exit 3")
    await provisioner.launch(ID, tiny, {})
    await eventually(lambda: ended(provisioner))
    instance = (await provisioner.instances())[ID]
    assert instance.detail == "setup exited with code 3: fetching | no such wheel"
    assert not (tmp_path / "replicas" / ID / "ran").exists()


async def test_setup_goes_on_after_a_failing_line_as_under_skypilot(
    local: Local, service: Build, eventually: Eventually
) -> None:
    provisioner = local()
    await provisioner.launch(ID, service("exit 1", setup="false\necho went on"), {})
    await eventually(lambda: ended(provisioner))
    assert (await provisioner.instances())[ID].detail == "run exited with code 1: went on"


async def test_a_killed_run_tells_the_signal(local: Local, service: Build, eventually: Eventually) -> None:
    provisioner = local()
    await provisioner.launch(ID, service("echo CUDA out of memory; kill -KILL $$"), {})
    await eventually(lambda: ended(provisioner))
    assert (await provisioner.instances())[ID].detail == "run was killed by SIGKILL: CUDA out of memory"


async def test_last_words_hold_no_api_key(local: Local, service: Build, eventually: Eventually) -> None:
    provisioner = local()
    await provisioner.launch(ID, service("""echo "server_args={'api_key': 'sk-12', 'x': 1}"; exit 1"""), {})
    await eventually(lambda: ended(provisioner))
    detail = (await provisioner.instances())[ID].detail
    assert "sk-12" not in detail
    assert "api_key" in detail


async def test_phases_follow_the_output(local: Local, service: Build, eventually: Eventually) -> None:
    provisioner = local()
    run = """
printf 'Fetching 4 files:  25%%|##   | 1/4\\rFetching 4 files:  50%%|##   | 2/4\\r'
until [ -e $REPLICA_DIR/go ]; do sleep 0.02; done
echo 'Loading safetensors checkpoint shards:  42% Completed | 68/163'
exec sleep 1000"""
    await provisioner.launch(ID, service(run, setup="until [ -e $REPLICA_DIR/go0 ]; do sleep 0.02; done"), {})

    async def reached(phase: str, progress: float | None) -> bool:
        instance = (await provisioner.instances())[ID]
        return (instance.phase, instance.progress) == (phase, progress)

    directory = Path(provisioner._root) / ID
    await eventually(lambda: reached("setup", None))
    (directory / "go0").touch()
    await eventually(lambda: reached("download", 0.5))
    (directory / "go").touch()
    await eventually(lambda: reached("load", 68 / 163))


async def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(
    local: Local, service: Build, running: Running, eventually: Eventually, tmp_path: Path
) -> None:
    provisioner = local(grace=0.2)
    run = "trap '' TERM; touch $REPLICA_DIR/up; while :; do sleep 1; done"
    await provisioner.launch(ID, service(run), {})

    async def up() -> bool:
        return (tmp_path / "replicas" / ID / "up").exists()

    await eventually(up)
    await provisioner.terminate(ID)
    assert running() == {}
    assert await provisioner.instances() == {}


async def test_a_process_that_needs_time_to_stop_gets_the_grace(
    local: Local, service: Build, eventually: Eventually, tmp_path: Path
) -> None:
    provisioner = local()
    run = "trap 'sleep 0.3; echo drained; exit 0' TERM; sleep 1000 & touch $REPLICA_DIR/up; wait"
    await provisioner.launch(ID, service(run), {})
    directory = tmp_path / "replicas" / ID

    async def up() -> bool:
        return (directory / "up").exists()

    await eventually(up)
    await provisioner.terminate(ID)
    assert "drained" in (directory / "output.log").read_text()


async def test_a_run_is_not_started_after_terminate_came_during_setup(
    local: Local, service: Build, running: Running, eventually: Eventually, tmp_path: Path
) -> None:
    provisioner = local()
    setup = "trap 'exit 0' TERM; sleep 1000 & touch $REPLICA_DIR/up; wait"
    await provisioner.launch(ID, service("touch $REPLICA_DIR/ran", setup=setup), {})
    directory = tmp_path / "replicas" / ID

    async def up() -> bool:
        return (directory / "up").exists()

    await eventually(up)
    await provisioner.terminate(ID)
    assert running() == {}
    assert not (directory / "ran").exists()


@pytest.mark.parametrize("leave", ["", "setsid", "env -i setsid"], ids=["group", "session", "bare"])
async def test_descendants_go_too_wherever_they_hid(
    local: Local, service: Build, running: Running, eventually: Eventually, leave: str, tmp_path: Path
) -> None:
    provisioner = local(grace=0.2)
    run = "bash -c 'trap \"\" TERM; sleep 1000 & echo $! > $REPLICA_DIR/child; wait' & exec sleep 1000"
    if leave == "setsid":
        run = f"{leave} {run}"
    elif leave:   # its parent leaves it behind in our session, without our environment
        run = "env -i sleep 1000 & echo $! > $REPLICA_DIR/child; exec sleep 1000"
    await provisioner.launch(ID, service(run), {})
    file = tmp_path / "replicas" / ID / "child"

    async def born() -> bool:
        return file.exists() and file.read_text().strip() != ""

    await eventually(born)
    child = int(file.read_text())
    await provisioner.terminate(ID)
    assert running() == {}
    assert started(child) is None


async def test_children_that_outlive_run_make_it_dead_and_are_ended(
    local: Local, service: Build, running: Running, eventually: Eventually
) -> None:
    provisioner = local()
    await provisioner.launch(ID, service("sleep 1000 & echo started; exit 0"), {})
    await eventually(lambda: ended(provisioner))
    assert (await provisioner.instances())[ID].detail == "run exited with code 0: started"
    assert [command for command in running().values() if command.startswith("sleep")]
    await provisioner.terminate(ID)
    assert running() == {}


async def test_a_replica_whose_launcher_was_killed_is_dead_and_its_processes_are_ended(
    local: Local, service: Build, running: Running, eventually: Eventually
) -> None:
    provisioner = local()
    await provisioner.launch(ID, service(), {})

    async def up() -> bool:
        return any(command.startswith("sleep") for command in running().values())

    await eventually(up)
    os.kill(record(provisioner)["pid"], 9)
    await eventually(lambda: ended(provisioner))
    assert "gone without an exit code" in (await provisioner.instances())[ID].detail
    await provisioner.terminate(ID)
    assert running() == {}


def record(provisioner: LocalProvisioner) -> dict[str, int]:
    value: dict[str, int] = json.loads((Path(provisioner._root) / ID / "process.json").read_text())
    return value


async def test_a_recycled_pid_is_not_ours_and_lives_on(
    local: Local, service: Build, running: Running, tmp_path: Path
) -> None:
    provisioner = local()
    await provisioner.launch(ID, service(), {})
    innocent = await asyncio.create_subprocess_exec("sleep", "1000", start_new_session=True)
    file = tmp_path / "replicas" / ID / "process.json"
    earlier = {"pid": innocent.pid, "started": "some time before"}
    file.write_text(json.dumps(record(provisioner) | earlier))
    try:
        assert await ended(provisioner)
        await provisioner.terminate(ID)
        assert innocent.returncode is None
        os.kill(innocent.pid, 0)
        assert running() == {}   # the true ones were found by their REPLICA_DIR
    finally:
        innocent.kill()
        await innocent.wait()


async def test_what_is_kept_is_for_our_eyes_and_only_the_output_outlives_the_replica(
    local: Local, service: Build, tmp_path: Path, eventually: Eventually
) -> None:
    provisioner = local()
    await provisioner.launch(ID, service("echo hello; exit 1"), {"REPLICA_API_KEY": "sk-secret"})
    await eventually(lambda: ended(provisioner))
    directory = tmp_path / "replicas" / ID
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for file in directory.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name
        assert "sk-secret" not in file.read_text(), file.name
    await provisioner.terminate(ID)
    assert sorted(file.name for file in directory.iterdir()) == ["lock", "output.log"]
    assert "hello" in (directory / "output.log").read_text()


async def test_an_environment_that_no_process_can_have_is_a_launch_error(
    local: Local, service: Build
) -> None:
    provisioner = local()
    with pytest.raises(LaunchError, match="cannot start a process"):
        await provisioner.launch(ID, service(), {"BAD": "null\0byte"})
    assert await provisioner.instances() == {}


@pytest.mark.parametrize(
    ("accelerators", "count"),
    [("H200:8", 8), ({"H200": 8, "H100": 8}, 8), (["A100:4", "L4:1"], 4), ("L4", 1), (None, 0), ("T4:.5", 1)],
)
def test_gpus_per_node_are_those_that_the_yaml_asks_for(accelerators: object, count: int) -> None:
    assert gpus_per_node({"resources": {"accelerators": accelerators}}) == count


async def test_terminate_right_after_launch_needs_no_sigkill(local: Local, service: Build) -> None:
    provisioner = local(grace=60.0)   # a SIGTERM that got lost between fork and exec would take this long
    for n in range(10):
        await provisioner.launch(f"tiny-gw-0badcafe-{n}", service(), {})
        await provisioner.terminate(f"tiny-gw-0badcafe-{n}")


def test_a_start_time_is_the_same_each_time_and_absent_processes_have_none() -> None:
    for look in (started, _started_by_ps):   # the second is for systems without /proc
        assert look(os.getpid())
        assert look(os.getpid()) == look(os.getpid())
        assert look(os.getpid()) != look(1)
        assert look(2**22 + 1) is None   # above Linux's highest pid


async def test_secrets_are_masked_on_their_way_to_the_disk(
    local: Local, service: Build, tmp_path: Path, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-outside-1234")
    key = tls.make("tiny").key
    run = r"""
      printf 'a %s' "${TOKEN:0:7}"; sleep 0.2; printf '%s b\n' "${TOKEN:7}"
      env
      echo "$REPLICA_TLS_KEY" | sed 's/^/key: /' >&2
      echo "server_args={'api_key': '$REPLICA_API_KEY'}"
      printf 'no end %s' "$PLAN"
      exit 3"""
    provisioner = local()
    plan = Plan(envs={"SHOWN": "in-clear"}, secrets={"PLAN": "plan-secret"})
    env = {"REPLICA_API_KEY": "key-5678", "REPLICA_TLS_KEY": key}
    await provisioner.launch(ID, service(run, more="secrets: {TOKEN: 'tok\"en with space'}"), env, plan)
    await eventually(lambda: ended(provisioner))
    folder = tmp_path / "replicas" / ID
    text = (folder / "output.log").read_text()
    secrets = ['tok"en with space', "from-outside-1234", "plan-secret", "key-5678", *key.splitlines()[1:-1]]
    assert not [secret for secret in secrets if secret in text]
    assert text.splitlines()[:2] == ["[replica] run started", "a *** b"]
    assert "SHOWN=in-clear" in text
    assert text.splitlines()[-1] == "no end ***[replica] run ended with code 3"
    await provisioner.terminate(ID)
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert not [secret for secret in secrets if secret.encode() in everything]


async def test_output_is_kept_and_masked_after_the_gateway_that_launched_it_is_gone(
    local: Local, service: Build, tmp_path: Path, eventually: Eventually, running: Running
) -> None:
    first = local()
    run = "while [ ! -e $REPLICA_DIR/go ]; do sleep 0.02; done; echo $REPLICA_API_KEY; exit 5"
    await first.launch(ID, service(run), {"REPLICA_API_KEY": "key-5678"})
    await first.close()
    second = local()
    (tmp_path / "replicas" / ID / "go").touch()
    await eventually(lambda: ended(second))
    assert (await second.instances())[ID].detail == "run exited with code 5: ***"


def test_what_cannot_be_written_is_lost_and_the_replica_goes_on() -> None:
    reading, writing = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    os.write(writing, b"line\n" * 1000)
    os.close(writing)
    launcher._pump(reading, full, [])
    assert os.read(reading, 1) == b""
    for descriptor in (reading, full):
        os.close(descriptor)
