"""Everything that can be set, once parsed."""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "0.5.23"  # the SGLang whose bodies and events are copied


@dataclass(frozen=True, slots=True)
class SimConfig:
    """The settings of one simulated server. Times are seconds; those of the engine model are divided by
    `speedup`.
    """

    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    model_path: str = "deepseek-ai/DeepSeek-R1"
    served_model_name: str | None = None  # None: the model path
    api_key: str | None = None
    ssl_keyfile: str | None = None  # with ssl_certfile: PEM files, and https instead of http
    ssl_certfile: str | None = None
    max_running: int = 256
    max_queued: int | None = None  # None: unbounded, as SGLang's default
    kv_tokens: int | None = None  # None: the profile's
    context_length: int = 163_840  # tokens; DeepSeek-R1's
    profile: str = "fast"
    speedup: float = 1.0
    jitter: float = 0.0  # each step takes (1 - jitter .. 1 + jitter) times its length
    seed: int = 0
    reply: str | None = None
    reasoning_parser: str | None = None
    stream_interval: int = 1  # tokens an event
    enable_metrics: bool = False
    decode_log_interval: int = 40  # decode steps between two updates of /metrics (SGLang's default)
    publish_interval: int = 15  # decode steps between two updates of /v1/loads (SGLang's default)
    keep_alive: float = 5.0  # an idle connection is closed then (uvicorn's; measured 5.000 s)
    health_seconds: float = 1.0  # what /health takes when all is well
    health_timeout: float = 20.0  # ... and when the engine is frozen, then 503 (SGLANG_HEALTH_CHECK_TIMEOUT)
    disconnect_poll: float = (
        4.0  # how often a queued request looks for its client (SGLANG_REQUEST_STATE_WAIT_TIMEOUT)
    )
    crash_silence: float = 5.7  # between the death of the scheduler and the end of the process (measured)
    drain_tick: float = 5.0  # after SIGTERM the end is looked for this often
    faults: tuple[str, ...] = ()  # see faults.py
    journal: str | None = None  # a file: see stats.py
    exit_code: int | None = None  # of a crash or a death at load; None: SIGKILL, and 1

    @property
    def name(self) -> str:
        """The model name that /v1/models shows."""
        return self.served_model_name or self.model_path
