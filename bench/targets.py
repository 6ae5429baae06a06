"""What is measured: how each gateway is started on port 8000 over the upstreams 127.0.0.1:9001..9004.

Every peer gets its nearest to least-in-flight, no access log, and limits out of the way; all else is its
default. The gateway runs as its users run it, with keys, metrics and board.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.install import debian_program, library_path, venv, version

HERE = Path(__file__).resolve().parent
PORT = 8000
ADMIN_PORT = 8081
UPSTREAM_PORTS = (9001, 9002, 9003, 9004)
UPSTREAM_URLS = tuple(f"http://127.0.0.1:{port}" for port in UPSTREAM_PORTS)
KEY = "sk-bench-0123456789"  # as loadgen.c sends it
_WORKERS = " ".join(UPSTREAM_URLS)
COMPILED = HERE.parent / "build" / "compiled" / "tree"  # as `make compiled` leaves it


@dataclass(frozen=True, slots=True)
class Target:
    """`command` is a shell-like line; {scratch} is a folder of this start's own. Empty: no gateway at all."""

    name: str
    command: str
    kind: str  # "ours", "peer", "rust" (a peer, too) or "direct"
    env: dict[str, str] = field(default_factory=dict)
    helper: str = ""  # a process that the gateway needs and whose CPU time is not its own
    most_streams: int = 100_000  # more would only measure its collapse
    port: int = PORT
    holds: bool = False  # can hold requests for a cold start
    version: str = ""

    def argv(self, scratch: Path) -> list[str]:
        return [word.replace("{scratch}", str(scratch)) for word in shlex.split(self.command)]

    def environment(self, scratch: Path) -> dict[str, str]:
        return {name: value.replace("{scratch}", str(scratch)) for name, value in self.env.items()}

    @property
    def installed(self) -> bool:
        return self.kind == "direct" or bool(self.version)

    @property
    def installed_by(self) -> str:
        return "make compiled" if self.kind == "ours" else "make bench-peers"


def gateway(name: str, *options: str, tree: Path = HERE.parent) -> Target:
    """The product, in a state dir of its own. `tree`: whose code it is."""
    words = [sys.executable, "-m", "gateway", "up", "--provisioner", "static"]
    for url in UPSTREAM_URLS:
        words += ["--replica", url]
    words += ["--port", str(PORT), "--admin-port", str(ADMIN_PORT), "--api-key", f"bench={KEY}"]
    words += ["--min-replicas", str(len(UPSTREAM_URLS)), "--max-replicas", str(len(UPSTREAM_URLS))]
    words += ["--window-max", "4096", "--max-waiting", "12000", "--log-level", "warning", *options]
    command = shlex.join(words) + " --state-dir {scratch}/state"
    env = {"PYTHONPATH": str(tree)}
    return Target(name, command, "ours", env, holds=True, version=_our_version() if _is_ours(tree) else "")


def nginx(name: str, workers: int) -> Target:
    command = f"{debian_program('nginx')} -e stderr -p {{scratch}} -c {HERE}/config/nginx.conf"
    return Target(name, f"{command} -g 'worker_processes {workers};'", "peer", version=version("nginx"))


def targets() -> dict[str, Target]:
    """All of them; `Target.installed` says which can be started here."""
    python = {name: venv(name) / "bin" for name in ("sglang-router", "smg", "vllm-router", "skyserve")}
    common = f"--host 127.0.0.1 --port {PORT}"
    found = (
        Target("direct", "", "direct", port=UPSTREAM_PORTS[0]),
        gateway("gateway"),
        gateway("gateway-2w", "--workers", "2"),
        gateway("gateway-compiled", tree=COMPILED),
        nginx("nginx", 1),
        nginx("nginx-2w", 2),
        Target(
            "haproxy",
            f"{debian_program('haproxy')} -db -f {HERE}/config/haproxy.cfg",
            "peer",
            env={"LD_LIBRARY_PATH": library_path()},
            version=version("haproxy"),
        ),
        Target(
            "sglang-router",
            f"{python['sglang-router']}/python -m sglang_router.launch_router {common} --policy power_of_two "
            f"--log-level warn --prometheus-port 29112 --max-concurrent-requests -1 --worker-urls {_WORKERS}",
            "rust",
            version=version("sglang-router"),
        ),
        Target(
            "smg",
            f"{python['smg']}/smg launch {common} --policy least_load --log-level warn "
            f"--prometheus-port 29111 --max-concurrent-requests -1 --worker-urls {_WORKERS}",
            "rust",
            version=version("smg"),
        ),
        Target(
            "vllm-router",
            f"{python['vllm-router']}/vllm-router {common} --policy power_of_two --log-level warning "
            f"--prometheus-port 29113 --max-concurrent-requests 20000 --worker-urls {_WORKERS}",
            "rust",
            version=version("vllm-router"),
        ),
        Target(
            "skyserve",
            f"{python['skyserve']}/python {HERE}/config/skyserve.py balancer {PORT}",
            "peer",
            helper=f"{python['skyserve']}/python {HERE}/config/skyserve.py controller {_WORKERS}",
            env={"HOME": "{scratch}", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
            most_streams=1000,
            version=version("skyserve"),
        ),
    )
    return {target.name: target for target in found}


def _is_ours(tree: Path) -> bool:
    """Whether it has the code of this checkout; the compiled one may be missing, or of an older day."""
    if tree == HERE.parent:
        return True
    sources = [p for package in ("gateway", "replicas") for p in (HERE.parent / package).rglob("*.py")]
    copies = [(path, tree / path.relative_to(HERE.parent)) for path in sources]
    same = all(copy.exists() and copy.read_bytes() == path.read_bytes() for path, copy in copies)
    return same and any(tree.glob("gateway/relay.*.so"))


def _our_version() -> str:
    import importlib.metadata

    try:
        return "skygate " + importlib.metadata.version("skygate")
    except importlib.metadata.PackageNotFoundError:
        return "skygate"
