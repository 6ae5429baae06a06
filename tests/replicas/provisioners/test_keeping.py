"""What a SkyPilot replica printed is kept, without secrets and by rank; no down waits long for it."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from replicas import tls
from replicas.phases import PHASES
from replicas.plans import Plan
from replicas.provisioners import LaunchError, folder, keeping
from replicas.provisioners.skypilot import SkyPilotProvisioner
from replicas.spec import Service

ID = "tiny-gw-0badcafe-1"
KEY = tls.make("tiny").key
SECRETS = ["key-5678", "plan-secret", "yaml-secret", *KEY.splitlines()[1:-1]]
JOB = (
    "\x1b[36m(head, rank=0, pid=9)\x1b[0m server_args=ServerArgs(api_key='key-5678', tp_size=16)\n"
    "\x1b[36m(worker1, rank=1, pid=8, ip=10.0.0.12)\x1b[0m plan-secret yaml-secret\n"
)

SkyPilot = Callable[..., SkyPilotProvisioner]
Build = Callable[..., Service]
Eventually = Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]


def kept(tmp_path: Path, file: str = "output.log") -> str:
    path = tmp_path / "replicas" / ID / file
    return path.read_text() if path.exists() else ""


async def launch(provisioner: SkyPilotProvisioner, service: Build) -> None:
    tiny = service(more="secrets: {TOKEN: yaml-secret}")
    env = {"REPLICA_API_KEY": "key-5678", "REPLICA_TLS_KEY": KEY, "REPLICA_TLS_CERT": "public-certificate"}
    await provisioner.launch(ID, tiny, env, Plan(secrets={"PLAN": "plan-secret"}))


async def prints(
    provisioner: SkyPilotProvisioner, tmp_path: Path, words: str, eventually: Eventually
) -> None:
    """Until that is in output.log."""

    async def there() -> bool:
        await provisioner.instances()
        return words in kept(tmp_path)

    await eventually(there)


async def test_no_secret_reaches_the_disk_or_a_reason(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path, eventually: Eventually
) -> None:
    fake_sky.printed = f"{JOB}(head, rank=0, pid=9) public-certificate\n{KEY}(head, rank=0, pid=9) key-5678"
    fake_sky.provisioned = {None: f"D 11-24 provisioner.py: PLAN=plan-secret {KEY!r}\n", 1: "yaml-secret\n"}
    provisioner = skypilot()
    await launch(provisioner, service)
    folder = tmp_path / "replicas" / ID
    assert stat.S_IMODE((folder / "secrets.json").stat().st_mode) == 0o600
    await prints(provisioner, tmp_path, "public-certificate", eventually)
    fake_sky.run_ended[ID] = 100

    async def dead() -> bool:
        return not (await provisioner.instances())[ID].alive

    await eventually(dead)
    detail = (await provisioner.instances())[ID].detail
    assert detail.startswith("run ended: ")
    await provisioner.terminate(ID)
    everything = detail + "".join(path.read_text() for path in folder.iterdir())
    assert not [secret for secret in SECRETS if secret in everything]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("output.log", "provision-1.log", "provision.log", "rank-0.log", "rank-1.log")
    ]
    assert "api_key='***'" in kept(tmp_path)


async def test_the_secrets_of_a_launch_are_known_to_the_gateway_that_adopts_it(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path, eventually: Eventually
) -> None:
    await launch(skypilot(), service)
    fake_sky.printed = f"{JOB}(head, rank=0, pid=9) on\n"
    adopter = skypilot()
    await prints(adopter, tmp_path, "pid=9) on", eventually)
    assert not [secret for secret in SECRETS if secret in kept(tmp_path)]


async def test_phases_and_the_end_are_told_though_no_endpoint_is_exposed_yet(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path, eventually: Eventually
) -> None:
    fake_sky.exposed = {}
    fake_sky.printed = "(setup pid=3) pip install\n(head, rank=0, pid=9) Load weight begin. avail mem=9 GB\n"
    provisioner = skypilot()
    await launch(provisioner, service)

    async def instance() -> Any:
        return (await provisioner.instances())[ID]

    async def loads() -> bool:
        return bool((await instance()).phase == "load")

    await eventually(loads)
    assert (await instance()).url is None
    fake_sky.run_ended[ID] = 100

    async def dead() -> bool:
        return not (await instance()).alive

    await eventually(dead)


async def test_all_phases_of_a_cold_start_are_told_in_what_skypilot_and_a_real_sglang_say(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path, eventually: Eventually
) -> None:
    fake_sky.printed = ""
    fake_sky.may_finish.clear()
    provisioner = skypilot()
    launching = asyncio.create_task(launch(provisioner, service))
    seen = list[str | None]()

    async def phase_is(phase: str) -> bool:
        found = (await provisioner.instances()).get(ID)
        if found is not None and (not seen or seen[-1] != found.phase):
            seen.append(found.phase)
        return found is not None and found.phase == phase

    await eventually(lambda: phase_is("provision"))
    fake_sky.may_finish.set()
    await launching
    head = "\x1b[36m(head, rank=0, pid=9)\x1b[0m [2026-11-24 04:51:31 TP0] "
    for phase, line in {
        "setup": "\x1b[36m(setup pid=3)\x1b[0m Resolved 153 packages\n",
        "download": "(worker1, rank=1, pid=9, ip=10.0.0.12) Fetching 163 files:  50%|#  | 81/163\n",
        "load": f"{head}Load weight begin. avail mem=139.13 GB\n",
        "warmup": f"{head}Capture cuda graph begin. This can take up to several minutes.\n",
    }.items():
        with keeping.appending(tmp_path / "replicas" / ID) as out:
            out.write(line)
        await eventually(partial(phase_is, phase))
    assert seen == list(PHASES)


async def test_a_secret_in_what_skypilot_raises_is_for_the_controller_to_mask_and_the_log_has_none(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path
) -> None:
    fake_sky.launch_fails = [fake_sky.command_error("echo key-5678")]
    with pytest.raises(LaunchError):
        await launch(skypilot(), service)
    assert "key-5678" not in kept(tmp_path) + kept(tmp_path, "provision.log")


async def test_a_log_that_is_told_again_after_a_restart_is_kept_once(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path, eventually: Eventually
) -> None:
    first = "".join(f"(tiny, pid=9) [05:07:{n:02}] line {n}\n" for n in range(30))
    fake_sky.printed = "├── Waiting for task resources\n" + first
    provisioner = skypilot()
    await launch(provisioner, service)
    await prints(provisioner, tmp_path, "line 29\n", eventually)
    fake_sky.printed = "├── Job started, tailing\n" + first + "(tiny, pid=9) line 30\n"
    await prints(skypilot(), tmp_path, "line 30\n", eventually)
    lines = [line for line in kept(tmp_path).splitlines() if "(tiny, pid=9)" in line]
    assert [line.rpartition(" ")[2] for line in lines] == [str(n) for n in range(31)]


def test_a_log_that_never_gets_to_the_known_lines_is_kept_as_it_comes() -> None:
    now, out = [0.0], list[str]()
    resumed = keeping.Resumed(["known\n"], out.append, clock=lambda: now[0])
    resumed("a\nb\n")
    assert out == []
    now[0] = 11.0
    resumed("c\n")
    resumed("d\n")
    assert out == ["a\nb\nc\n", "d\n"]


async def test_the_provision_log_can_be_read_while_the_launch_goes_on(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path, eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(keeping, "RETRY_SECONDS", 0.01)
    fake_sky.may_finish.clear()
    provisioner = skypilot()
    launching = asyncio.create_task(launch(provisioner, service))

    async def submitted() -> bool:
        return bool(fake_sky.launched)

    await eventually(submitted)
    fake_sky.provisioned = {None: "D 11-24 05:07:46 provisioner.py:88] Waiting for head node\n"}

    async def told() -> bool:
        return "Waiting for head node" in kept(tmp_path, "provision.log")

    await eventually(told)
    assert not launching.done()
    fake_sky.may_finish.set()
    await launching


async def test_a_replica_whose_output_was_not_followed_is_asked_for_it_before_its_down(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path
) -> None:
    fake_sky.printed = JOB
    provisioner = skypilot()
    await launch(provisioner, service)
    await provisioner.terminate(ID)   # nobody has looked, so nothing follows it
    assert "tp_size=16" in kept(tmp_path, "rank-0.log")
    assert kept(tmp_path, "rank-1.log").endswith("*** ***\n")
    assert fake_sky.machines == set()


@pytest.mark.parametrize("trouble", ["hangs", "raises"])
async def test_a_machine_that_does_not_answer_delays_its_down_by_a_bounded_time(
    skypilot: SkyPilot, fake_sky: Any, service: Build, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(keeping, "SAVE_SECONDS", 0.05)
    if trouble == "hangs":
        fake_sky.logs_hang = True
    else:
        monkeypatch.setattr(fake_sky, "tail_logs", lambda *_: 1 / 0)
    provisioner = skypilot()
    await launch(provisioner, service)
    await asyncio.wait_for(provisioner.terminate(ID), 5)
    assert fake_sky.machines == set()


@pytest.mark.parametrize("what", ["split", "appending"])
async def test_a_full_disk_keeps_no_machine(
    skypilot: SkyPilot, fake_sky: Any, service: Build, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    provisioner = skypilot()
    await launch(provisioner, service)
    monkeypatch.setattr(keeping, what, full)
    await provisioner.terminate(ID)
    assert fake_sky.machines == set()


def test_lines_are_told_apart_by_rank_and_the_last_of_each_are_kept(tmp_path: Path) -> None:
    (tmp_path / "output.log").write_text(
        "⚙︎ Launching on AWS us-east-1.\n"
        "\x1b[36m(setup pid=3)\x1b[0m head sets up\n"
        "(setup pid=4, ip=10.0.0.12) worker sets up\n"
        "(head, rank=0, pid=5) zero\n"
        "(worker1, rank=1, pid=6, ip=10.0.0.12) one\n" + "(head, rank=0, pid=5) chatter\n" * 50
    )
    found = keeping.by_rank(tmp_path / "output.log", most=10)
    assert [line.split(") ")[1] for line in found[1]] == ["worker sets up\n", "one\n"]
    assert list(found[0]) == ["(head, rank=0, pid=5) chatter\n"] * 10


def test_a_single_nodes_lines_need_no_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "output.log").write_text("Launching\n(tiny, pid=5) x\n")
    keeping.split(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["output.log"]


def test_secrets_that_are_not_known_any_more_are_still_found_by_their_looks(tmp_path: Path) -> None:
    assert keeping.mask(tmp_path)("api_key='a' b") == "api_key='***' b"
    keeping.keep_secrets(tmp_path, ["bbbb", "", "bbbb"])
    assert json.loads((tmp_path / "secrets.json").read_text()) == {"values": ["bbbb"]}
    assert keeping.mask(tmp_path)("bbbb") == "***"


def test_a_log_has_a_bounded_size_and_loses_no_line_of_its_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "LOG_BYTES", 10_000)
    output, phases = folder.Output(tmp_path), []
    with keeping.appending(tmp_path) as one, keeping.appending(tmp_path) as other:
        for n in range(5000):
            (one if n % 2 else other).write(f"(head, rank={n % 2}, pid=9) line {n}\n")
            phases.append(output.read())
    sizes = [path.stat().st_size for path in tmp_path.glob("output*.log")]
    assert len(sizes) == 2
    assert all(size < 10_100 for size in sizes)
    assert keeping.has_words(tmp_path)
    found = keeping.by_rank(tmp_path / "output.log", 100)
    assert {rank: len(lines) for rank, lines in found.items()} == {0: 100, 1: 100}
    assert found[1][-1] == "(head, rank=1, pid=9) line 4999\n"
