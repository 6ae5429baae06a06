"""The cold start: phases that take their time and say what SkyPilot, Hugging Face and SGLang say, line for
line.

Port closed during `provision`, `setup`, `download` and `load`; open with /health 503 during `warmup`. The
lines are shaped as recorded from real servers (0.5.17 on a GPU) and, for 163 shards, from
sgl-project/sglang#7181 and #4801.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime

from .config import SimConfig
from .faults import Faults

PHASES = ("provision", "setup", "download", "load", "warmup")
DEFAULT_SECONDS = {"load": 1.0, "warmup": 0.5}
SHARDS = 163  # safetensors files of DeepSeek-R1
GIGABYTES = 688.6  # their size together
_STEPS = 20  # progress lines of a phase at most

Sleep = Callable[[float], Awaitable[None]]


class StartupError(ValueError):
    """A `--startup` that cannot be read; the message says what can."""


class DiedAtStart(Exception):
    """The fault `die-at-load` or `die-at-warmup`: the traceback is printed, the process should end with
    its exit code.
    """


def parse_phases(text: str) -> dict[str, float]:
    """`provision=2,download=3,load=2,warmup=1` -> seconds by phase; a phase left out takes none. Raises
    StartupError.
    """
    seconds: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in PHASES or not 0 <= number < float("inf"):
            raise StartupError(f"{part!r}: wanted PHASE=SECONDS with a phase of {', '.join(PHASES)}")
        seconds[name] = number
    return seconds


def stamp(line: str) -> str:
    """A log line with SGLang's time stamp."""
    return f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {line}"


class Startup:
    """Walks through the phases. `say` prints a line; `sleep` waits (a test gives its own)."""

    def __init__(
        self,
        config: SimConfig,
        phases: dict[str, float],
        faults: Faults,
        *,
        say: Callable[[str], None],
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._config = config
        self._seconds = dict(phases)
        self._seconds["load"] = self._seconds.get("load", 0.0) + faults.slow_start
        self._faults = faults
        self._say = say
        self._sleep = sleep

    async def before_port(self) -> None:
        """Everything up to the moment when the port opens. Raises DiedAtStart."""
        await self._provision()
        await self._setup()
        await self._download()
        await self._load()

    async def warmup(self, url: str, ready: Callable[[], None]) -> None:
        """From the open port to the call of `ready`, which comes before the last line. Raises DiedAtStart."""
        log = self._log
        log("INFO:     Started server process [4711]")
        log("INFO:     Waiting for application startup.")
        log("INFO:     Application startup complete.")
        log(f"INFO:     Uvicorn running on {url} (Press CTRL+C to quit)")
        await self._sleep(self._seconds.get("warmup", 0.0))
        if self._faults.die_at_warmup:
            self._die("Initialization failed. warmup error: ReadTimeout")
        log(
            "Prefill batch, #new-seq: 1, #new-token: 19, #cached-token: 0, token usage: 0.00, "
            "#running-req: 0, #queue-req: 0, "
            "#pending-token: 0, cuda graph: True, input throughput (token/s): 15.59"
        )
        ready()
        log("The server is fired up and ready to roll!")

    async def _provision(self) -> None:
        if seconds := self._seconds.get("provision", 0.0):
            self._say("⚙︎ Launching on Simulated cloud (this machine).")
            await self._sleep(seconds / 2)
            self._say("└── Instance is up.")
            await self._sleep(seconds / 2)
            self._say("✓ Cluster launched: simulated.")

    async def _setup(self) -> None:
        if seconds := self._seconds.get("setup", 0.0):
            self._say("⚙︎ Running setup on 1 VM.")
            await self._sleep(seconds)
            self._say("✓ Setup completed.")

    async def _download(self) -> None:
        seconds = self._seconds.get("download", 0.0)
        if not seconds:
            return
        for done, elapsed in self._progress(seconds, SHARDS):
            rate = GIGABYTES * 1000 / seconds
            left = seconds - elapsed
            self._say(
                f"Fetching {SHARDS} files: {done * 100 // SHARDS:3d}%|{_bar(done)}| {done}/{SHARDS} "
                f"[{_clock(elapsed)}<{_clock(left)}, {seconds / SHARDS:5.2f}s/it]"
            )
            if 0 < done < SHARDS:
                self._say(
                    f"model-{done:05d}-of-{SHARDS:06d}.safetensors: 100%|{_bar(SHARDS)}| 4.30G/4.30G "
                    f"[{_clock(elapsed)}<00:00, {rate:.0f}MB/s]"
                )
            if done < SHARDS:
                await self._sleep(seconds / self._steps(seconds))

    async def _load(self) -> None:
        seconds = self._seconds["load"]
        config, log = self._config, self._log
        log(
            f"server_args=ServerArgs(model_path='{config.model_path}', served_model_name='{config.name}', "
            f"port={config.port})"
        )
        log("Init torch distributed begin.")
        log("Init torch distributed ends. elapsed=0.04 s, mem usage=0.09 GB")
        log("Load weight begin. avail mem=139.13 GB")
        shards, graphs = seconds * 0.8, seconds * 0.2
        for done, elapsed in self._progress(shards, SHARDS):
            rate = SHARDS / shards if shards else 0.0
            self._say(
                f"Loading safetensors checkpoint shards: {done * 100 // SHARDS:3d}% Completed | "
                f"{done}/{SHARDS} "
                f"[{_clock(elapsed)}<{_clock(shards - elapsed)}, {rate:5.2f}it/s]"
            )
            if self._faults.die_at_load and done >= SHARDS // 2:
                self._die(
                    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has "
                    "a total capacity"
                )
            if done < SHARDS:
                await self._sleep(shards / self._steps(shards))
        if self._faults.die_at_load:
            self._die(
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has a "
                "total capacity"
            )
        log(
            f"Load weight end. elapsed={shards:.2f} s, type=DeepseekV3ForCausalLM, avail mem=52.02 GB, "
            f"mem usage=87.11 GB."
        )
        log("KV Cache is allocated. dtype: torch.bfloat16, #tokens: 500000, KV size: 32.72 GB")
        log("Memory pool end. avail mem=18.90 GB")
        log(
            "Capture target decode CUDA graph begin. backend=full, num_tokens_per_req=1, bs=[1, 2, 4, 8], "
            "avail mem=18.90 GB"
        )
        for place, batch in enumerate((8, 4, 2, 1)):
            self._say(
                f"Capturing batches (bs={batch} avail_mem=18.75 GB): "
                f"{place * 25:3d}%|{_bar(place * SHARDS // 4)}| {place}/4"
            )
            await self._sleep(graphs / 4)
        log(
            f"Capture target decode CUDA graph end. elapsed={graphs:.2f} s, mem usage=0.15 GB, avail "
            f"mem=18.75 GB."
        )
        log(
            "max_total_num_tokens=500000, chunked_prefill_size=8192, max_prefill_tokens=16384, "
            f"max_running_requests={config.max_running}, context_len={config.context_length}, "
            f"available_gpu_mem=18.75 GB"
        )

    @staticmethod
    def _steps(seconds: float) -> int:
        """How many progress lines: ten a second, at most `_STEPS`, at least one."""
        return max(1, min(_STEPS, int(seconds * 10)))

    def _progress(self, seconds: float, total: int) -> list[tuple[int, float]]:
        steps = self._steps(seconds)
        return [(total * step // steps, seconds * step / steps) for step in range(steps + 1)]

    def _log(self, line: str) -> None:
        self._say(stamp(line))

    def _die(self, reason: str) -> None:
        self._log(f"Scheduler hit an exception: Traceback (most recent call last):\n{reason}")
        raise DiedAtStart(reason)


def _bar(done: int) -> str:
    filled = done * 10 // SHARDS
    return "█" * filled + " " * (10 - filled)


def _clock(seconds: float) -> str:
    whole = max(0, int(seconds))
    return f"{whole // 60:02d}:{whole % 60:02d}"


def printer(line: str) -> None:
    """Print at once, whatever the terminal's encoding is."""
    try:
        print(line, flush=True)
    except UnicodeEncodeError:
        print(line.encode("ascii", "replace").decode(), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # nobody reads any more; serve on
