"""A gateway whose replicas are clusters of a real SkyPilot, on the Slurm bed (README.md)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[3]
BED = Path(__file__).with_name("bed.sh")

# As config/qwen3-8b.yaml, with the simulator in SGLang's place.
YAML = """\
name: {name}
num_nodes: {nodes}
resources:
  cpus: 1
  memory: 1
  ports: 30000
secrets:
  REPLICA_API_KEY: null
  REPLICA_TLS_KEY: null
  REPLICA_TLS_CERT: null
  HF_TOKEN: null
file_mounts:
  ~/skygate/replicas: {root}/replicas
  ~/skygate/rendezvous.py: {here}/rendezvous.py
setup: |
  # The nodes reach no index; the bed has a wheelhouse for uv.
  ~/.local/bin/uv venv --quiet --python /usr/bin/python3 ~/skygate/venv
  VIRTUAL_ENV=~/skygate/venv ~/.local/bin/uv pip install --quiet httptools
run: |
  TLS=$(mktemp -d)
  (umask 077 && echo "$REPLICA_TLS_KEY" >"$TLS/key.pem" && echo "$REPLICA_TLS_CERT" >"$TLS/cert.pem")
  echo "rank $SKYPILOT_NODE_RANK of $SKYPILOT_NUM_NODES on $(hostname)"
  {before}
  cd ~/skygate
  HEAD=$(echo "$SKYPILOT_NODE_IPS" | head -n1)
  venv/bin/python rendezvous.py $SKYPILOT_NODE_RANK $SKYPILOT_NUM_NODES $HEAD
  [ "$SKYPILOT_NODE_RANK" = 0 ] || exit 1
  exec venv/bin/python -m replicas.simulator --model-path deepseek-ai/DeepSeek-R1 \\
    --enable-metrics --startup load=1 --api-key "$REPLICA_API_KEY" \\
    ${{REPLICA_TLS_CERT:+--ssl-keyfile "$TLS/key.pem" --ssl-certfile "$TLS/cert.pem"}} \\
    --host 0.0.0.0 --port 30000
service:
  readiness_probe:
    path: /health
    initial_delay_seconds: 300
    endpoint_probe_interval_seconds: 1
  replica_policy:
    min_replicas: 0
    max_replicas: 2
"""
HF_TOKEN = "hf_ThisIsASecretOfTheUser0123456789"


def eventually(condition: Callable[[], T], seconds: float = 60.0) -> T:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s; the last value was {value!r}")
        time.sleep(0.5)  # between two looks at another machine


class Site:
    """The Slurm cluster and its SkyPilot, asked around the gateway."""

    def jobs(self, service: str) -> dict[str, str]:
        """Cluster of each running allocation of a service -> its nodes ("n1", "n[1-2]").

        Fails if two allocations have one cluster's name.
        """
        lines = self._run("squeue", "-h", "-t", "R", "-o", "%j %N").splitlines()
        # SkyPilot adds a hash of the user to the name.
        jobs = [(name.rpartition("-")[0], nodes) for name, nodes in map(str.split, lines)]
        ours = [(name, nodes) for name, nodes in jobs if name.startswith(f"{service}-gw-")]
        assert len(dict(ours)) == len(ours), f"launched twice: {ours}"
        return dict(ours)

    def nodes(self, service: str) -> list[str]:
        """The nodes of its one allocation, rank 0's first."""
        (nodes,) = self.jobs(service).values()
        return self._run("scontrol", "show", "hostnames", nodes).split()

    def clusters(self, service: str) -> list[str]:
        """The clusters of a service that SkyPilot lists. (Its own command takes seconds to start.)"""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # SkyPilot's
            import sky

            listed = [c.name for c in sky.get(sky.status(None, refresh=sky.StatusRefreshMode.NONE))]
        return [name for name in listed if name.startswith(f"{service}-gw-")]

    def table(self, name: str) -> str:
        """What there is of a service, for people: SkyPilot's clusters and Slurm's allocations."""
        return f"clusters {self.clusters(name)}, allocations {self.jobs(name)}"

    def preempt(self, cluster: str) -> None:
        """Take the machines away, as a spot market would: SkyPilot is not told."""
        lines = self._run("squeue", "-h", "-o", "%i %j").splitlines()
        (job,) = [job for job, name in map(str.split, lines) if name.rpartition("-")[0] == cluster]
        self._run("scancel", job)

    @contextlib.contextmanager
    def somebody_else(self) -> Iterator[None]:
        """A job of another user of the cluster, which has one of its nodes to itself."""
        as_user = ("runuser", "-u", "skybed", "--")
        sleeps = ("-N1", "-J", "other", "-D", "/", "-o", "/dev/null", "--wrap", "sleep 900")
        job = self._run(*as_user, "sbatch", "--parsable", *sleeps).strip()
        try:
            eventually(lambda: self._run("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING")
            yield
        finally:
            self._run("scancel", job)
            eventually(lambda: job not in self._run("squeue", "-h", "-o", "%i").split())

    def do(self, *command: str) -> None:
        """A command of bed.sh: kill, up, cut, join a host."""
        self._run(str(BED), *command)

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}{done.stdout[-500:]}"
        return done.stdout


class Gateway:
    """`gateway up FILE --provisioner skypilot` on one state dir."""

    def __init__(self, folder: Path, name: str, options: tuple[str, ...], yaml: str) -> None:
        self.folder, self.name, self.state, self.options = folder, name, folder / "state", options
        self.file = folder / "bed.yaml"
        self.file.write_text(yaml)
        self.process: subprocess.Popen[bytes] | None = None
        self.url = self.admin_url = ""

    def start(self) -> None:
        (self.state / "gateway.json").unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "gateway", "up", str(self.file), "--provisioner", "skypilot",
            "--state-dir", str(self.state), "--port", "0", "--admin-port", "0",
            "--secret", "HF_TOKEN", *self.options,
        ]  # fmt: skip
        with open(self.folder / "gateway.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                env={**os.environ, "HF_TOKEN": HF_TOKEN},
            )  # fmt: skip
        eventually(self._serves)

    def _serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            where = json.loads((self.state / "gateway.json").read_text())
            self.url, self.admin_url = where["url"], where["admin_url"]
            return httpx.get(self.url + "/ready", timeout=2).status_code == 200 and bool(self.service())
        except (OSError, KeyError, ValueError, httpx.HTTPError):
            return False

    def log(self) -> str:
        return (self.folder / "gateway.log").read_text(errors="replace")

    def service(self) -> dict[str, Any]:
        status = httpx.get(self.admin_url + "/admin/status", timeout=20).raise_for_status().json()
        return dict(status["services"][0])

    def events(self) -> list[dict[str, Any]]:
        """The last of them, oldest first."""
        found: list[dict[str, Any]] = []
        url = self.admin_url + "/admin/events?last=100"
        with httpx.stream("GET", url, timeout=3) as answer, contextlib.suppress(httpx.ReadTimeout):
            for line in answer.iter_lines():
                if line == ": ping":
                    break
                found += [json.loads(line.removeprefix("data: "))] if line.startswith("data: ") else []
        return found

    def certificate(self) -> str:
        """What a replica shows, in PEM."""
        pem = (self.state / "tls" / f"{self.name}.pem").read_text()
        return pem[pem.index("-----BEGIN CERTIFICATE") :]

    def replicas(self) -> list[dict[str, Any]]:
        return list(self.service()["replicas"])

    def ready(self) -> list[dict[str, Any]]:
        return [r for r in self.replicas() if r["state"] == "ready"]

    def output(self, replica: str) -> str:
        """What is kept of the replica's own output."""
        return (self.state / "replicas" / replica / "output.log").read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL its first process; the others end with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def logs(self, replica: str, *options: str) -> str:
        """What `gateway logs` tells of it. Fails if a secret is in it, or in any log kept of any replica."""
        told = self.cli("logs", replica, "-n", "100000", *options)
        assert told.returncode == 0, told.stderr
        kept = {p: p.read_text(errors="replace") for p in self.state.glob("replicas/**/*.log")}
        for what, secret in self.secrets().items():
            assert secret not in told.stdout, f"{what} is in what `gateway logs` tells"
            assert [p for p, text in kept.items() if secret in text] == [], f"{what} is in a file"
        return told.stdout

    def secrets(self) -> dict[str, str]:
        """What no log may have."""
        with sqlite3.connect(f"file:{self.state / 'state.db'}?mode=ro", uri=True) as db:
            ((key,),) = db.execute("SELECT replica_key FROM services").fetchall()
        pem = (self.state / "tls" / f"{self.name}.pem").read_text()   # the key comes first
        return {"HF_TOKEN": HF_TOKEN, "the replica's key": key, "the TLS key": pem.splitlines()[1]}

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "GATEWAY_STATE_DIR": str(self.state), "GATEWAY_ADMIN_URL": self.admin_url}
        return subprocess.run(
            [sys.executable, "-m", "gateway", *arguments],
            env=env, capture_output=True, text=True, timeout=180, cwd=self.folder,
        )  # fmt: skip

    def clean_up(self) -> None:
        """Down with its replicas, whatever state it is in; then an end to its processes."""
        if self.process is None:
            return
        print(self.log()[-8000:])  # shown when the test has failed
        if self.process.poll() is None:
            with contextlib.suppress(Exception):
                self.cli("down")
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(40)
        if self.process.poll() is None:
            self.kill()


def ask(
    gateway: Gateway, *, tokens: int = 12, seconds: float = 300, beats: list[str] | None = None
) -> tuple[str, list[str]]:
    """One streamed chat completion: its text, and the phases that its comments told. `beats` gets these."""
    body = {
        "model": "deepseek-ai/DeepSeek-R1",
        "messages": [{"role": "user", "content": "how many rs are in strawberry"}],
        "stream": True,
        "max_tokens": tokens,
        "ignore_eos": True,
    }
    text, phases, done = "", [], False
    with httpx.stream("POST", gateway.url + "/v1/chat/completions", json=body, timeout=seconds) as answer:
        if answer.status_code != 200:
            raise AssertionError(f"{answer.status_code}: {answer.read().decode()}")
        for line in answer.iter_lines():
            if line.startswith(": ") and beats is not None:
                beats.append(line)
            if line.startswith(": cold-start"):
                phases.append(line.split("phase=")[1].split()[0])
            elif line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise AssertionError(chunk["error"]["message"])
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
    assert done
    return text, phases


@pytest.fixture(scope="session")
def site() -> Site:
    if "SKYGATE_BED" not in os.environ or shutil.which("squeue") is None:
        pytest.fail("these tests need the bed: `make test-sky` (tests/e2e/sky/README.md)")
    return Site()


@pytest.fixture
def gateways(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[Callable[..., Gateway]]:
    """Makes and starts gateways: `gateway = gateways("name", "--idle-timeout", "3", nodes=2)`.

    No two tests may use one name: they run side by side on one SkyPilot.
    """
    made: list[Gateway] = []

    def make(
        name: str, *options: str, nodes: int = 1, before: str = ":", yaml: str | None = None
    ) -> Gateway:
        yaml = yaml or YAML.format(
            name=name, root=ROOT, here=BED.parent, nodes=nodes, before=before.replace("\n", "\n  ")
        )
        gateway = Gateway(tmp_path_factory.mktemp("gw"), name, options, yaml)
        made.append(gateway)
        gateway.start()
        return gateway

    yield make
    for gateway in made:
        gateway.clean_up()
        assert site.clusters(gateway.name) == []
        assert site.jobs(gateway.name) == {}


class Laps:
    """Prints how long things took: the times that the README quotes."""

    def __init__(self, test: str) -> None:
        self._test = test
        self._last = time.monotonic()
        self._lines: list[str] = []

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        self._lines.append(f"{now - self._last:7.1f} s  {what}")
        print(self._lines[-1], flush=True)
        self._last = now

    def keep(self) -> None:
        """In a file that bed.sh prints at the end: under pytest-xdist nothing is shown as it comes."""
        with open(Path(os.environ["SKYGATE_BED"]) / "run" / "laps", "a") as file:
            file.write("\n".join([self._test, *self._lines]) + "\n")


@pytest.fixture
def lap(request: pytest.FixtureRequest) -> Iterator[Laps]:
    laps = Laps(request.node.name)
    yield laps
    laps.keep()


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[..., Any]:
    return eventually


@pytest.fixture(name="ask")
def ask_fixture() -> Callable[..., tuple[str, list[str]]]:
    return ask
