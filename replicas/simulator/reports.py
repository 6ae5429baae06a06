"""What the engine says about itself: /v1/loads, /metrics and the log lines, each by its own tick, hence late.

/v1/loads is a snapshot that the scheduler writes at each prefill, every 15 decode steps and all the time
when idle; the gauges of /metrics change at each prefill, every 40 decode steps and on going idle, and
count as running what ran *before* the prefill, so between two waves they read 0 for one report. A hung
scheduler writes neither: `loads[].timestamp` stands still.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from .config import VERSION, SimConfig
from .engine import Engine
from .shapes import Json

_GAUGES = {
    "max_total_num_tokens": "Maximum total number of tokens in the KV cache pool.",
    "num_running_reqs": "The number of running requests.",
    "num_queue_reqs": "The number of requests in the waiting queue.",
    "gen_throughput": "The generation throughput (token/s).",
    "cache_hit_rate": "The prefix cache hit rate.",
    "token_usage": "The token usage.",
    "num_used_tokens": "The number of used tokens.",
    "kv_used_tokens": "The number of used KV tokens.",
    "num_retracted_reqs": "The number of retracted requests.",
    "utilization": "The utilization.",
    "new_token_ratio": "The new token ratio.",
}
_BY_PID = ("num_retracted_reqs",)  # has that label, too
_COUNTERS = {
    "prompt_tokens": "Number of prefill tokens processed.",
    "generation_tokens": "Number of generation tokens processed.",
    "num_requests": "Number of requests processed.",
    "num_aborted_requests": "Number of requests aborted.",
}


@dataclass(slots=True)
class Tally:
    """How many, and how long together (seconds)."""

    count: int = 0
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self.total += seconds


class Reports:
    """The last thing said by each channel. Mutable; changed by `began`, `stepped` and the counters' owner."""

    def __init__(self, config: SimConfig, engine: Engine, log: Callable[[str], None]) -> None:
        self._config = config
        self._engine = engine
        self._log = log
        self._loads: Json = {}
        self._gauges: dict[str, float] = {}
        self._tokens = 0  # generated since the last Decode batch line
        self._since = time.monotonic()
        self._throughput = 0.0
        self._prefill_tokens = 0
        self._prefill_us = 0
        self._counters: dict[str, dict[bool, int]] = {name: {} for name in _COUNTERS}
        # By family and, as SGLang's labels have it, whether the answer was streamed.
        self._seconds: dict[str, dict[bool, Tally]] = {"time_to_first_token": {}, "e2e_request_latency": {}}
        self._publish_loads()
        self._publish_gauges(0)

    def ended(
        self, *, streaming: bool, aborted: bool, prompt_tokens: int, tokens: int, seconds: float
    ) -> None:
        """A request is over. Counters appear in /metrics after their first event only, as in SGLang."""
        raised = {"num_requests": 1, "prompt_tokens": prompt_tokens, "generation_tokens": tokens}
        if aborted:
            raised["num_aborted_requests"] = 1
        for name, amount in raised.items():
            values = self._counters[name]
            values[streaming] = values.get(streaming, 0) + amount
        self._took("e2e_request_latency", streaming, seconds)

    def first_token(self, *, streaming: bool, seconds: float) -> None:
        """A request has its first token."""
        self._took("time_to_first_token", streaming, seconds)

    def _took(self, family: str, streaming: bool, seconds: float) -> None:
        self._seconds[family].setdefault(streaming, Tally()).add(seconds)

    def began(self) -> None:
        """The engine chose its next step, or found nothing to do."""
        engine = self._engine
        if engine.kind == "prefill":
            tokens = sum(tokens for _, tokens in engine.batch)
            self._prefill_tokens += tokens
            self._prefill_us += int(engine.profile.prefill_seconds(tokens, alone=False) * 1e6)
            self._publish_loads()
            self._publish_gauges(len(engine.running))
            self._log(
                f"Prefill batch, #new-seq: {len(engine.batch)}, #new-token: {tokens}, #cached-token: 0, "
                f"token usage: {self._usage():.2f}, #running-req: {len(engine.running)}, #queue-req: "
                f"{len(engine.waiting)}, "
                f"#pending-token: 0, cuda graph: True, input throughput (token/s): {self._rate(tokens):.2f}"
            )
        elif engine.kind == "idle":
            self._throughput = 0.0
            self._publish_loads()
            self._publish_gauges(0)

    def stepped(self, tokens: int) -> None:
        """A step ended, with that many tokens."""
        engine = self._engine
        self._tokens += tokens
        if engine.kind != "decode":
            return
        if engine.decode_steps % self._config.publish_interval == 0:
            self._publish_loads()
        if engine.decode_steps % self._config.decode_log_interval == 0:
            self._throughput = self._rate(self._tokens)
            self._tokens = 0
            self._publish_gauges(len(engine.running))
            self._log(
                f"Decode batch, #running-req: {len(engine.running)}, #token: {engine.kv_used}, token "
                f"usage: {self._usage():.2f}, "
                f"cuda graph: True, gen throughput (token/s): {self._throughput:.2f}, #queue-req: "
                f"{len(engine.waiting)}"
            )

    def loads(self, *, core: bool, hung: bool) -> Json:
        """The body of /v1/loads."""
        if self._engine.kind == "idle" and not hung:
            self._publish_loads()
        entry = dict(self._loads)
        if not core:
            entry |= {
                "memory": {
                    "weight_gb": 0.0,
                    "kv_cache_gb": 0.0,
                    "graph_gb": 0.0,
                    "token_capacity": self._engine.kv_tokens,
                },
                "disaggregation": {
                    "mode": "null",
                    "prefill_bootstrap_queue_reqs": 0,
                    "prefill_inflight_queue_reqs": 0,
                    "decode_prealloc_queue_reqs": 0,
                    "decode_transfer_queue_reqs": 0,
                    "decode_retracted_queue_reqs": 0,
                    "kv_transfer_speed_gb_s": 0.0,
                    "kv_transfer_latency_ms": 0.0,
                },
                "queues": {
                    "waiting": entry["num_waiting_reqs"],
                    "grammar": 0,
                    "paused": 0,
                    "retracted": 0,
                    "prealloc_ready": 0,
                },
            }
        return {
            "timestamp": datetime.now(UTC).isoformat(),
            "version": VERSION,
            "accelerator": None,
            "num_accelerators": 1,
            "loads": [entry],
        }

    def metrics(self) -> bytes:
        """The body of /metrics: the families that anybody watches, named and labelled as SGLang's."""
        name = self._config.name.replace("\\", "\\\\").replace('"', '\\"')
        labels = f'engine_type="unified",model_name="{name}"'
        ranks = f'{labels},moe_ep_rank="0",pp_rank="0",tp_rank="0"'
        lines = []
        for gauge, help_text in _GAUGES.items():
            lines += [f"# HELP sglang:{gauge} {help_text}", f"# TYPE sglang:{gauge} gauge"]
            where = f'{labels},moe_ep_rank="0",pid="1",pp_rank="0",tp_rank="0"' if gauge in _BY_PID else ranks
            lines.append(f"sglang:{gauge}{{{where}}} {float(self._gauges[gauge])}")
        for counter, help_text in _COUNTERS.items():
            if values := self._counters[counter]:
                lines += [
                    f"# HELP sglang:{counter}_total {help_text}",
                    f"# TYPE sglang:{counter}_total counter",
                ]
                lines += [
                    f'sglang:{counter}_total{{engine_type="unified",is_streaming="{str(streaming).lower()}",'
                    f'model_name="{name}"}} {float(value)}'
                    for streaming, value in sorted(values.items())
                ]
        for family, tallies in self._seconds.items():
            if tallies:
                lines.append(f"# TYPE sglang:{family}_seconds histogram")
            for streaming, tally in sorted(tallies.items()):
                of = f'engine_type="unified",is_streaming="{str(streaming).lower()}",model_name="{name}"'
                lines.append(f'sglang:{family}_seconds_sum{{{of}}} {tally.total}')
                lines.append(f'sglang:{family}_seconds_bucket{{{of},le="+Inf"}} {float(tally.count)}')
                lines.append(f"sglang:{family}_seconds_count{{{of}}} {float(tally.count)}")
        return "\n".join(lines).encode() + b"\n"

    def _usage(self) -> float:
        return self._engine.kv_used / self._engine.kv_tokens

    def _rate(self, tokens: int) -> float:
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        return tokens / seconds if seconds > 0 else 0.0

    def _publish_loads(self) -> None:
        engine = self._engine
        used, steps = engine.kv_used, float(engine.decode_steps)
        self._loads = {
            "timestamp": time.time(),
            "dp_rank": 0,
            "num_running_reqs": engine.running_count,
            "num_waiting_reqs": len(engine.waiting),
            "num_waiting_uncached_tokens": sum(sequence.to_prefill for sequence in engine.waiting),
            "num_used_tokens": used,
            "num_total_tokens": used,
            "num_active_tokens": used,
            "num_prealloc_ready_tokens": 0,
            "max_total_num_tokens": engine.kv_tokens,
            "max_running_requests": engine.max_running,
            "token_usage": round(self._usage(), 4),
            "gen_throughput": round(self._throughput, 2),
            "cache_hit_rate": 0.0,
            "utilization": 0.0,
            "total_prefill_uncached_tokens": self._prefill_tokens,
            "total_prefill_busy_us": self._prefill_us,
            "decode_moments": [steps, steps, 0.0, steps, 0.0, steps],
        }

    def _publish_gauges(self, running: int) -> None:
        engine = self._engine
        self._gauges = {
            "max_total_num_tokens": engine.kv_tokens,
            "num_running_reqs": running,
            "num_queue_reqs": len(engine.waiting),
            "gen_throughput": self._throughput,
            "cache_hit_rate": 0.0,
            "token_usage": round(self._usage(), 4),
            "num_used_tokens": engine.kv_used,
            "kv_used_tokens": engine.kv_used,
            "num_retracted_reqs": engine.retracted,
            "utilization": 0.0,
            "new_token_ratio": engine.ratio,
        }
