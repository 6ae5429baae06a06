"""SkyPilot's API server: found or started, of our version, and what follows when it is not."""
from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from replicas.provisioners import InstancesUnknown, LaunchError, TerminateError
from replicas.provisioners.api_server import ApiServer, ServerTrouble
from replicas.provisioners.skypilot import SkyPilotProvisioner
from replicas.spec import Service

ROOT = Path(__file__).parents[3]
ID = "tiny-gw-0badcafe-1"

Build = Callable[..., Service]
SkyPilot = Callable[..., SkyPilotProvisioner]


async def test_nothing_is_launched_on_a_server_of_another_version_and_both_versions_are_told(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    fake_sky.server.common.version = "0.15.0"
    with pytest.raises(LaunchError, match=r"is 0\.15\.0 and the gateway has skypilot 0\.14\.1") as raised:
        await provisioner.launch(ID, service(), {})
    assert not raised.value.permanent   # nobody is told "never": it ends when the server is upgraded
    with pytest.raises(InstancesUnknown, match="replicas go on serving"):
        await provisioner.instances()
    assert fake_sky.launched == []
    assert (provisioner.trouble, "0.15.0" in provisioner.says) == (True, True)


async def test_a_server_that_is_upgraded_is_used_again_without_anybodys_help(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    fake_sky.server.common.status, fake_sky.server.common.error = "version_mismatch", "too old"
    fake_sky.server.common.headers = {"X-SkyPilot-Version": "0.9.0"}
    with pytest.raises(LaunchError, match=r"is 0\.9\.0 and the gateway has skypilot 0\.14\.1"):
        await provisioner.launch(ID, service(), {})
    fake_sky.server.common.status = "healthy"
    await provisioner.launch(ID, service(), {})
    assert ID in await provisioner.instances()
    assert provisioner.says == "SkyPilot API server http://sky.example:46580, version 0.14.1"
    assert not provisioner.trouble


async def test_what_bills_is_ended_although_the_versions_differ_as_long_as_the_server_takes_our_calls(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    await provisioner.launch(ID, service(), {})
    fake_sky.server.common.version = "0.14.2"
    await provisioner.terminate(ID)
    assert fake_sky.machines == set()
    fake_sky.server.common.status = "version_mismatch"
    with pytest.raises(TerminateError, match=r"skypilot 0\.14\.1"):
        await provisioner.terminate("tiny-gw-0badcafe-2")


async def test_a_server_that_wants_a_login_says_how(skypilot: SkyPilot, fake_sky: Any) -> None:
    fake_sky.server.common.status = "needs_auth"
    with pytest.raises(InstancesUnknown, match="sky api login -e http://sky"):
        await skypilot().instances()


def checked(fake_sky: Any, clock: Any, start: Callable[[], None], may_start: bool = True) -> ApiServer:
    return ApiServer(start=start, may_start=lambda: may_start, clock=clock)


def test_a_local_server_is_started_when_there_is_none_and_that_is_told(
    fake_sky: Any, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fake_sky.server.common.local, fake_sky.api_down = True, True

    def start() -> None:
        fake_sky.api_down = False

    server = checked(fake_sky, clock, start)
    server.check(fake_sky)
    server.check(fake_sky)
    assert caplog.messages == [
        "no SkyPilot API server at http://sky.example:46580: starting one (usually 7 to 15 s)",
        "SkyPilot API server http://sky.example:46580, version 0.14.1",
    ]
    assert fake_sky.server.common.get_api_server_status_response.cleared == 1   # or the old answer stands


@pytest.mark.parametrize(("local", "may_start"), [(False, True), (True, False)])
def test_a_server_that_a_person_has_named_is_never_started_here(
    fake_sky: Any, clock: Any, local: bool, may_start: bool
) -> None:
    fake_sky.server.common.local, fake_sky.api_down = local, True
    server = checked(fake_sky, clock, lambda: pytest.fail("started"), may_start)
    with pytest.raises(ServerTrouble, match="does not answer"):
        server.check(fake_sky)


def test_a_server_that_does_not_start_is_tried_again_a_minute_later(fake_sky: Any, clock: Any) -> None:
    fake_sky.server.common.local, fake_sky.api_down = True, True
    starts = 0

    def start() -> None:
        nonlocal starts
        starts += 1
        raise RuntimeError("port 46580\nis in use")

    server = checked(fake_sky, clock, start)
    with pytest.raises(ServerTrouble, match="port 46580 is in use"):
        server.check(fake_sky)
    for _ in range(3):
        with pytest.raises(ServerTrouble):
            server.check(fake_sky)
        clock.now += 15.0
    assert starts == 1
    clock.now += 30.0
    with pytest.raises(ServerTrouble, match="could not be started"):
        server.check(fake_sky)
    assert starts == 2


def test_each_trouble_is_logged_once(fake_sky: Any, clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    fake_sky.api_down = True
    server = checked(fake_sky, clock, lambda: None)
    for _ in range(3):
        with pytest.raises(ServerTrouble):
            server.check(fake_sky)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


class Old(BaseHTTPRequestHandler):
    """An API server of another version, as far as /api/health."""

    answers: dict[str, Any]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(f"GET {self.path}")
        body = json.dumps(self.answers["body"]).encode()
        self.send_response(self.answers["status"])
        for name, value in {**self.answers["headers"], "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.asked.append(f"POST {self.path}")
        self.send_error(500)

    def log_message(self, *_: Any) -> None: ...


ASK = """
import asyncio, json, os, sys
from pathlib import Path
from replicas.provisioners import InstancesUnknown, LaunchError, sdk
from replicas.provisioners.skypilot import SkyPilotProvisioner
from replicas import spec

sky = sdk.import_sky()
service = spec.load("config/qwen3-8b.yaml")

async def ask(url):
    os.environ["SKYPILOT_API_SERVER_ENDPOINT"] = url
    sky.server.common.get_server_url.cache_clear()
    sky.server.common.is_api_server_local.cache_clear()
    provisioner = SkyPilotProvisioner(Path(sys.argv[1]), "0badcafe", sky=lambda: sky)
    said = {}
    try:
        await provisioner.launch(service.name + "-gw-0badcafe-1", service, {"REPLICA_API_KEY": "key"})
    except LaunchError as error:
        said["launch"] = [error.permanent, error.reason]
    try:
        await provisioner.instances()
    except InstancesUnknown as error:
        said["instances"] = str(error)
    return said

print(json.dumps({url: asyncio.run(ask(url)) for url in sys.argv[2:]}))
"""

ANSWERS = {
    "it speaks our language": (   # and its pickles may not be ours
        200,
        {"X-SkyPilot-API-Version": "90", "X-SkyPilot-Version": "0.15.0"},
        {"status": "healthy", "api_version": "90", "version": "0.15.0", "commit": "c"},
    ),
    "it refuses us": (
        400,
        {"X-SkyPilot-API-Version": "990", "X-SkyPilot-Version": "0.15.0"},
        {"error": "version_mismatch", "message": "Your SkyPilot client version is too old: 0.14.1"},
    ),
    "it is too old": (
        200,
        {"X-SkyPilot-API-Version": "2", "X-SkyPilot-Version": "0.15.0"},
        {"status": "healthy", "api_version": "2", "version": "0.15.0", "commit": "c"},
    ),
}
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real `sky`, in a home of its own, makes of each server: {"launch", "instances", "asked"}."""
    home = tmp_path_factory.mktemp("home")
    servers: dict[str, ThreadingHTTPServer] = {}
    for name, (status, headers, body) in ANSWERS.items():
        answers = {"status": status, "headers": headers, "body": body}
        kind = type("Answering", (Old,), {"answers": answers, "asked": []})
        servers[name] = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        threading.Thread(target=servers[name].serve_forever, args=(0.05,), daemon=True).start()
    urls = {name: f"http://127.0.0.1:{server.server_address[1]}" for name, server in servers.items()}
    env = {name: value for name, value in os.environ.items() if not name.startswith("SKYPILOT")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(home), *urls.values(), NOBODY],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
        env=env | {"HOME": str(home), "PYTHONPATH": str(ROOT)},
    )   # fmt: skip
    for server in servers.values():
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    found = {
        name: {**said[url], "url": url, "asked": servers[name].RequestHandlerClass.asked}  # type: ignore[attr-defined]
        for name, url in urls.items()
    }
    return {**found, "nobody": said[NOBODY], "home": home}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_real_sdk_launches_nothing_on_a_server_of_another_version(real: Any, name: str) -> None:
    said = real[name]
    permanent, why = said["launch"]
    assert not permanent
    for words in (why, said["instances"]):
        assert f"{said['url']} is 0.15.0 and the gateway has skypilot 0.14.1" in words
    assert set(said["asked"]) == {"GET /api/health"}


def test_the_real_sdk_starts_no_server_in_place_of_one_that_a_person_has_named(real: Any) -> None:
    permanent, why = real["nobody"]["launch"]
    assert not permanent
    assert f"{NOBODY} does not answer (SKYPILOT_API_SERVER_ENDPOINT" in why
    assert not (real["home"] / ".sky" / "api_server" / "server.log").exists()
