"""One gateway at a time, under one workload after another; a measurement is a dict, one line of JSON."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import processes
from bench.processes import Started
from bench.targets import HERE, KEY, UPSTREAM_PORTS, Target
from bench.workloads import Workload

BUILD = HERE / "build"
LOGS = HERE / "results" / "logs"
READY_SECONDS = 90.0  # SkyServe's balancer hears of its replicas after 20 s
LOADGEN_SLACK = 60.0  # beyond the workload's own times

Measurement = dict[str, Any]


class BenchError(Exception):
    """A measurement that could not be made; the text says why."""


@dataclass(frozen=True, slots=True)
class Rig:
    """The gateway on one CPU, upstream and load generator on another. `priority`: their niceness."""

    gateway_cpu: int | None
    load_cpu: int | None
    priority: int
    started: Started
    upstream: int  # pid

    def run(self, target: Target, workloads: list[Workload]) -> Iterator[Measurement]:
        """Start the target and measure it under each workload. Raises BenchError when it does not start."""
        for together in starts([w for w in workloads if fits(target, w)]):
            with self._running(target, together[0].cold) as (pid, start_s):
                for workload in together:
                    try:
                        measured = self._measure(target, workload, pid)
                        yield measured | {"start_s": start_s, "version": target.version}
                    except (BenchError, OSError, subprocess.SubprocessError, ValueError) as error:
                        print(f"FAILED {target.name} {workload.name}: {error}", flush=True)

    # --- the gateway

    @contextlib.contextmanager
    def _running(self, target: Target, cold: bool) -> Iterator[tuple[int | None, float | None]]:
        """The target's process id and its seconds from start to the first answer; None for no gateway."""
        simulator(f"set?n=1&interval=0&delay=0&health={503 if cold else 200}")
        if not target.command:
            yield None, None
            return
        LOGS.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="skygate-bench-"))
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            log = stack.enter_context(open(LOGS / f"{target.name}.log", "wb"))
            if target.helper:
                self._spawn(stack, shlex.split(target.helper), self.load_cpu, {}, scratch, log)
            began = time.monotonic()
            process = self._spawn(
                stack, target.argv(scratch), self.gateway_cpu, target.environment(scratch), scratch, log
            )
            self._await_ready(target, process, cold)
            start_s = round(time.monotonic() - began, 2)
            if not cold:
                self._await_all_replicas(target, process)
            self.started.add(processes.family(process.pid))
            yield process.pid, start_s

    def _spawn(
        self, stack: contextlib.ExitStack, command: list[str], cpu: int | None, env: dict[str, str],
        scratch: Path, log: Any,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        process = processes.spawn(command, cpu=cpu, env=env, cwd=scratch, log=log)
        stack.callback(process.wait)
        stack.callback(self.started.end, process.pid)
        self.started.add([process.pid])
        return process

    def _await_ready(self, target: Target, process: subprocess.Popen[bytes], cold: bool) -> None:
        deadline, last = time.monotonic() + READY_SECONDS, "no answer"
        while time.monotonic() < deadline:
            if process.poll() is not None:
                log = LOGS / f"{target.name}.log"
                raise BenchError(f"{target.name} exited with {process.returncode}: see {log}")
            try:
                if cold:
                    fetch(f"http://127.0.0.1:{target.port}/ready")
                else:
                    ask(target.port)
                return
            except (OSError, urllib.error.URLError) as error:
                last = str(error)
                time.sleep(0.02)
        raise BenchError(f"{target.name} is not ready after {READY_SECONDS:.0f} s: {last}")

    def _await_all_replicas(self, target: Target, process: subprocess.Popen[bytes]) -> None:
        """Until every upstream has answered through the target, plain and streaming."""
        simulator("set?n=1&interval=0&delay=0")
        simulator("reset")
        deadline = time.monotonic() + READY_SECONDS
        while not all(port["requests"] for port in json.loads(simulator("stats"))):
            if time.monotonic() > deadline or process.poll() is not None:
                raise BenchError(f"{target.name} does not use all of its replicas")
            with contextlib.suppress(OSError):
                ask(target.port)
                ask(target.port, stream=True)
                time.sleep(0.02)

    # --- one measurement

    def _measure(self, target: Target, workload: Workload, pid: int | None) -> Measurement:
        simulator(workload.upstream_query())
        simulator("reset")
        pids = processes.family(pid) if pid else []
        command = [str(BUILD / "loadgen"), "--port", str(target.port), *workload.loadgen_options()]
        if pids:
            command += ["--pids", ",".join(map(str, pids))]
        self.started.add(pids)
        processes.set_priority([*pids, self.upstream], self.priority)
        cpus = [cpu for cpu in (self.gateway_cpu, self.load_cpu) if cpu is not None]
        before, began = processes.memory_kib(pids), time.monotonic()
        busy = processes.busy_seconds(cpus)
        processes.forget_peak(pids)
        with tempfile.TemporaryFile() as out:
            generator = processes.spawn(command, cpu=self.load_cpu, log=out)
            self.started.add([generator.pid])
            try:
                processes.set_priority([generator.pid], self.priority)
                rss, shares = self._watch(workload, target, pids, generator, began)
            finally:
                if generator.poll() is None:
                    processes.end([generator.pid])
                generator.wait()
            out.seek(0)
            result = _last_line(out.read().decode(), generator.returncode)
        wall = time.monotonic() - began
        spent = {cpu: value - busy[cpu] for cpu, value in processes.busy_seconds(cpus).items()}
        result |= {
            "target": target.name,
            "workload": workload.name,
            "at": time.strftime("%Y-%m-%d %H:%M:%S"),
            "rss_before_kib": before,
            "rss_peak_kib": processes.memory_kib(pids, "VmHWM"),
            "rss_kib": rss,
            "processes": {pid: processes.command_line(pid) for pid in pids},
            "same_processes": pids == (processes.family(pid) if pid else []),
            "connections": shares,
            "busy": {str(cpu): round(value / wall, 3) for cpu, value in spent.items()},
            "wall": round(wall, 2),
            "replicas": json.loads(simulator("stats")),
        }
        left = result.pop("left")
        if left and not workload.cold:
            result["leave_us"] = leaving(left)
        if "beats" in result:
            result["beat_spread"] = spread(result["beats"])
        return result

    def _watch(
        self, workload: Workload, target: Target, pids: list[int], generator: subprocess.Popen[bytes],
        began: float,
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """Memory once a second, and in the middle of the window the connections that each process holds."""
        rss: list[int] = []
        shares: list[int] = []
        limit = workload.warm + workload.seconds + workload.grace + LOADGEN_SLACK
        middle = workload.warm + workload.seconds / 2
        while generator.poll() is None:
            elapsed = time.monotonic() - began
            if elapsed > limit:
                raise BenchError(f"the load generator did not end within {limit:.0f} s")
            if pids and elapsed >= len(rss) + 1:
                rss.append(processes.memory_kib(pids))
            if not shares and elapsed >= middle and target.name.endswith("w"):
                shares = sorted(processes.connections_by_process(pids, target.port).values())
            with contextlib.suppress(subprocess.TimeoutExpired):
                generator.wait(0.1)
        return rss, shares


@contextlib.contextmanager
def rig(gateway_cpu: int | None, load_cpu: int | None, priority: int) -> Iterator[Rig]:
    """A rig with its upstream running."""
    started, own = Started(BUILD / "started.json"), Started(BUILD / "upstream.json")
    with contextlib.ExitStack() as stack:
        command = [str(BUILD / "upstream"), *map(str, UPSTREAM_PORTS)]
        process = processes.spawn(command, cpu=load_cpu, log=stack.enter_context(open("/dev/null", "wb")))
        own.add([process.pid])
        stack.callback(process.wait)
        stack.callback(own.end, process.pid)
        deadline = time.monotonic() + 5
        while True:
            try:
                simulator("stats")
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BenchError(f"the upstream does not answer; are {UPSTREAM_PORTS} free?") from error
                time.sleep(0.02)
        if process.poll() is not None:
            raise BenchError(f"something else answers on {UPSTREAM_PORTS}")
        if not processes.set_priority([process.pid], priority):
            print(f"niceness {priority} was refused; measuring without it")
        yield Rig(gateway_cpu, load_cpu, priority, started, process.pid)


def starts(workloads: list[Workload]) -> list[list[Workload]]:
    """Which of them are measured in the same start of a gateway."""
    apart = [[w] for w in workloads if w.fresh]
    shared = [w for w in workloads if not w.fresh]
    return [shared, *apart] if shared else apart


def fits(target: Target, workload: Workload) -> bool:
    """Whether the target can be given the workload at all."""
    if workload.cold:
        return target.holds
    if workload.name == "soak" and target.kind != "ours":
        return False
    return workload.connections <= target.most_streams


def leaving(left: list[list[int]]) -> dict[str, float]:
    """How long after each client left its upstream was closed, microseconds; `never`: not within a second.

    A request whose client left before it was sent on has no upstream, and is in neither figure.
    """
    time.sleep(1.0)
    closed = dict(json.loads(simulator("closed")))
    delays = sorted((closed[tag] - at) / 1000 for tag, at in left if tag in closed)
    never = sum(port["active"] for port in json.loads(simulator("stats")))
    if not delays:
        return {"n": 0, "never": never}
    p50, p99 = delays[len(delays) // 2], delays[int((len(delays) - 1) * 0.99)]
    return {"n": len(delays), "never": never, "p50": p50, "p99": p99, "max": delays[-1]}


def spread(beats: list[int]) -> dict[str, float]:
    """How even the beats are: the fullest 100 ms against the mean, and the deviation against the mean."""
    mean = statistics.fmean(beats)
    if not mean:
        return {}
    deviation = statistics.pstdev(beats)
    return {"mean": mean, "max_to_mean": max(beats) / mean, "deviation_to_mean": deviation / mean}


def simulator(query: str) -> bytes:
    return fetch(f"http://127.0.0.1:{UPSTREAM_PORTS[0]}/sim/{query}")


def ask(port: int, *, stream: bool = False) -> bytes:
    """One chat request, as a client sends it. Raises URLError, or OSError when the connection breaks."""
    message = {"role": "user", "content": "hi"}
    body = json.dumps({"model": "sim", "messages": [message], "stream": stream}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    headers["X-Gateway-Hold"] = "reject"  # while no replica is ready, say so
    return fetch(urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, headers))


def fetch(request: urllib.request.Request | str) -> bytes:
    with urllib.request.urlopen(request, timeout=20) as answer:
        data: bytes = answer.read()
        return data


def _last_line(text: str, status: int) -> Measurement:
    """The generator's JSON is its last line; before it may stand what it wondered about."""
    *remarks, last = text.strip().splitlines() or [""]
    for remark in remarks:
        print("  " + remark)
    if status or not last.startswith("{"):
        raise BenchError(f"the load generator exited with {status}: {last}")
    result: Measurement = json.loads(last)
    return result
