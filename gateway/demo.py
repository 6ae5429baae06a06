"""`gateway demo`: a gateway on this machine, one request while no replica exists, its cold start, its answer.

The gateway runs as a process of its own, exactly as `gateway up` would start it; this process is its user. It
works without a terminal too (plain lines). Whatever happens, nothing of it is left running.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live
from rich.text import Text

from gateway import sockets
from gateway.client import AdminClient, ClientError
from gateway.display import bar, duration, status_view
from gateway.logs import known_replicas, select
from gateway.settings import find_config
from gateway.tethered import Tethered, TetherError
from replicas import spec
from replicas.phases import PHASES
from replicas.table import Table

QUESTION = 'How many times does the letter R occur in "strawberry"?'
MAX_TOKENS = 256  # the simulated answer has 229: it ends by itself
POLL_SECONDS = 0.2
# A cold start here takes 15 seconds, a token 30 ms; on a machine in trouble ten times as long.
ANSWER_SECONDS, SILENCE_SECONDS = 150.0, 30.0
# Seconds of one cold start of config/local.yaml, measured on 2 shared cores: what the first ETA is made from,
# as every later one is from the starts that state.db remembers.
MEASURED = {"provision": 0.1, "setup": 1.2, "download": 6.1, "load": 4.1, "warmup": 3.8, "total": 15.3}


def run(*, once: bool, state_dir: str | None, port: int, admin_port: int) -> int:
    """The exit code. Raises nothing that a person would have to read a traceback for."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    signal.signal(signal.SIGTERM, _as_interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup asks
        signal.signal(signal.SIGHUP, _as_interrupt)
    os.environ["NO_PROXY"] = os.environ.get("NO_PROXY", "") + ",127.0.0.1"  # the SDK heeds HTTP_PROXY
    try:
        with _folder(state_dir) as folder:
            code = _run(folder, once, port, admin_port, console)
    except KeyboardInterrupt:
        console.print("Stopped.")
        code = 130
    console.print("Everything has ended.")
    return code


def _run(folder: Path, once: bool, port: int, admin_port: int, console: Console) -> int:
    """In a folder that is still there when it fails: its logs say why."""
    try:
        with Gateway(folder, port, admin_port, console) as gateway:
            _show(gateway, console)
            if not once:
                _keep_serving(gateway, console)
        return 0
    except (TetherError, ClientError, OSError) as error:
        console.print(Text(f"The demo failed: {error}", style="red"))
        _print_end_of(getattr(error, "log", None), console)
        for replica in known_replicas(folder)[:1]:
            console.print(f"The output of {replica['id']} ends:")
            _print_end_of(select(folder, replica["id"]).path, console)
        return 1


def _as_interrupt(number: int, _: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _folder(given: str | None) -> Iterator[Path]:
    """The state dir: the one given, or a temporary one that goes away in the end."""
    if given is not None:
        yield Path(given).expanduser().absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="gateway-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Gateway(Tethered):
    """The demo's gateway: the embedded service on ports that are free. `model`: what it serves."""

    def __init__(self, folder: Path, port: int, admin_port: int, console: Console) -> None:
        super().__init__(folder, console.print)
        self._ports = port, admin_port

    def start(self) -> None:
        service = spec.load(find_config("local.yaml"))
        self.model = service.model
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remember_a_start(self.folder, service)
        port, admin_port = self._ports
        port, admin_port = self._free(port, "--port"), self._free(admin_port, "--admin-port")
        self.launch([f"--port={port}", f"--admin-port={admin_port}"])

    def _free(self, port: int, option: str) -> int:
        """The port wanted, or any free one when somebody has it."""
        try:
            for listener in sockets.listen("127.0.0.1", port, 1, option):
                listener.close()
        except sockets.PortError:
            self.say(f"Port {port} is in use: taking a free one instead.")
            return 0
        return port


def _remember_a_start(folder: Path, service: spec.Service) -> None:
    """Give a new state dir one past cold start, so that the first one shown has an ETA already."""
    if (folder / "state.db").exists():
        return
    with Table(folder / "state.db") as table:
        for phase, seconds in MEASURED.items():
            table.add_cold_start(service.name, service.hash, "", phase, seconds, time.time())


class Request(threading.Thread):
    """One streaming chat completion. `pieces`: texts as they come, then None; `error`: why it failed."""

    def __init__(self, url: str, model: str) -> None:
        super().__init__(daemon=True)
        self.pieces: queue.Queue[str | None] = queue.Queue()
        self.error = ""
        self.first = threading.Event()  # a first piece, or the end
        self._url, self._model = url, model

    def run(self) -> None:
        try:
            for piece in ask(self._url, self._model):
                if piece:  # not the empty chunks that keep a waiting client
                    self.pieces.put(piece)
                    self.first.set()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        self.pieces.put(None)
        self.first.set()


    def texts(self) -> Iterator[str]:
        """The answer as it comes; ends with it, or with `error` set."""
        try:
            while (piece := self.pieces.get(timeout=SILENCE_SECONDS)) is not None:
                yield piece
        except queue.Empty:
            self.error = f"the replica stopped in its answer for {SILENCE_SECONDS:.0f} s"


def ask(url: str, model: str) -> Iterator[str]:
    """The texts of the answer, through the openai SDK; through plain HTTP where that is not installed."""
    messages: Any = [{"role": "user", "content": QUESTION}]
    try:
        from openai import OpenAI
    except ImportError:
        body = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "stream": True}
        yield from _ask_by_http(url, body)
        return
    with OpenAI(base_url=f"{url}/v1", api_key="not-needed") as client:
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=MAX_TOKENS, stream=True
        )
        for chunk in stream:
            if chunk.choices:
                delta = chunk.choices[0].delta
                yield getattr(delta, "reasoning_content", None) or delta.content or ""


def _ask_by_http(url: str, body: dict[str, Any]) -> Iterator[str]:
    with (
        httpx.Client(trust_env=False, timeout=None) as http,
        http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise TetherError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("reasoning_content") or choice["delta"].get("content") or ""


def _show(gateway: Gateway, console: Console) -> None:
    via = "the openai SDK" if _has_openai() else "plain HTTP (the openai package is not installed)"
    console.print(f"A gateway runs at {gateway.url}, and no replica of {gateway.model} exists.")
    console.print(f"Asking it through {via}: {QUESTION}\n")
    request = Request(gateway.url, gateway.model)
    began = time.monotonic()
    request.start()
    with AdminClient(gateway.admin_url) as admin:
        _watch_cold_start(gateway, admin, request, console)
        waited = time.monotonic() - began
        if not request.error or request.pieces.qsize() > 1:
            console.print(f"The first token came after {waited:.1f} s:\n")
            for piece in request.texts():
                console.print(Text(piece), end="")
            console.print("\n")
        if request.error:
            raise TetherError(f"no answer ({request.error}); the gateway's log ends:", gateway.log)
        time.sleep(POLL_SECONDS)  # the end of the answer reaches the counts
        console.print("[dim]$ gateway status[/dim]")
        console.print(status_view(admin.status()))
        console.print()


def _has_openai() -> bool:
    try:
        import openai  # noqa: F401
    except ImportError:
        return False
    return True


def _watch_cold_start(gateway: Gateway, admin: AdminClient, request: Request, console: Console) -> None:
    """Show phases, progress and ETA until the first token, the end of the request, or of the gateway."""
    began, said = time.monotonic(), ""
    live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
    with live or contextlib.nullcontext():
        while not request.first.wait(POLL_SECONDS):
            if not gateway.alive:
                raise TetherError("the gateway has ended; the end of its log:", gateway.log)
            if time.monotonic() - began > ANSWER_SECONDS:
                limit = f"{ANSWER_SECONDS:.0f} s"
                raise TetherError(f"no token within {limit}; the gateway's log ends:", gateway.log)
            try:
                services = admin.status()["services"]
            except ClientError:
                continue  # a controller that is being started again
            phase, line = cold_start_line(services[0], time.monotonic() - began)
            if live is not None:
                live.update(Text(line), refresh=True)
            elif phase != said:
                console.print(line)
                said = phase
        if live is not None:
            live.update(Text(f"cold start done after {time.monotonic() - began:.1f} s"), refresh=True)


def cold_start_line(service: dict[str, Any], elapsed: float) -> tuple[str, str]:
    """(what changes seldom, one line of at most 79 columns) of a service whose first replica starts."""
    waiting = f"{service['demand']['waiting']} held"
    if not service["replicas"]:
        return "none", f"{elapsed:4.0f} s  {waiting}  no replica yet"
    replica = service["replicas"][-1]
    phase = replica.get("phase")
    done = PHASES[: PHASES.index(phase)] if phase in PHASES else ()
    steps = " ".join([*(f"{name}✓" for name in done), phase or replica["state"]])
    eta = replica.get("eta_seconds")
    left = f"{duration(eta)} left" if eta else "no ETA yet" if eta is None else "any moment"
    if replica["state"] not in ("pending", "provisioning", "starting"):
        left = ""
    parts = [f"{elapsed:4.0f} s", waiting, steps, bar(replica.get("progress"), 5), left]
    return f"{phase or replica['state']}", "  ".join(part for part in parts if part)


def _keep_serving(gateway: Gateway, console: Console) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    body = json.dumps({"model": gateway.model, "stream": True, "messages": messages})
    console.print(
        f"""It keeps serving until Ctrl-C. Try it:

  OpenAI API   {gateway.url}/v1
  status page  {gateway.admin_url}/      metrics  {gateway.admin_url}/metrics

  curl -N {gateway.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'

  from openai import OpenAI
  client = OpenAI(base_url="{gateway.url}/v1", api_key="not-needed")
  print(client.chat.completions.create(
      model="{gateway.model}", messages=[{{"role": "user", "content": "Hello"}}]).choices[0].message.content)

  GATEWAY_STATE_DIR={gateway.folder} gateway status --watch
""",
        markup=False,
        soft_wrap=True,  # the terminal may wrap, we must not: the lines are to be copied
    )
    try:
        while gateway.alive:
            time.sleep(0.2)
    except KeyboardInterrupt:
        console.print("\nEnding the replica and the gateway ...")
        return
    raise TetherError("the gateway has ended; the end of its log:", gateway.log)


def _print_end_of(log: Path | None, console: Console) -> None:
    if log is not None and log.exists():
        for line in log.read_text(errors="replace").splitlines()[-12:]:
            console.print(Text("  " + line, style="dim"))
