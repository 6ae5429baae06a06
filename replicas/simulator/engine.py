"""One step loop with continuous batching, as SGLang's scheduler runs it. No clock and no I/O in here.

The caller turns the crank: `begin()` says how many seconds the next step takes (None: nothing to do),
`finish()` ends that step and returns the sequences that got a token. Between the two, requests may be
added and aborted.

Modelled after SGLang 0.5.23: one first-come-first-served queue; a request starts when a running slot *and*
KV room for its prompt and its expected output are free; prefill goes before decoding and stalls it, at
most `CHUNK` tokens a step; a prefill yields the first token; a full KV cache throws the newest request
back into the queue (retraction).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .profiles import Profile

CHUNK = 8192  # tokens of one prefill step (chunked_prefill_size on an H100 or H200)
MAX_RESERVED = 4096  # output tokens of a request for which room is reserved at most (schedule_policy.py)
RATIO_INITIAL = 0.7  # share of the possible output that is expected at first (environ.py)
RATIO_FINAL = 0.7 * 0.14  # ... and after RATIO_STEPS decode steps without a retraction
RATIO_STEPS = 600


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request. `want` tokens will come; `max_new` is what the client allows, for which
    room is kept.
    """

    rid: str
    prompt_tokens: int
    want: int
    max_new: int
    ending: str = "length"  # finish reason once `want` tokens are there
    ignore_eos: bool = False
    owner: Any = None
    prefilled: int = 0
    generated: int = 0
    kv: int = 0
    retractions: int = 0
    finish: str | None = None  # "stop", "length" or "abort"

    @property
    def to_prefill(self) -> int:
        """Tokens still to be computed before it can decode (after a retraction its own output counts,
        too).
        """
        return self.prompt_tokens + self.generated - self.prefilled


class Engine:
    """The state of the scheduler. Mutable: everything below; changed by `add`, `abort`, `begin` and
    `finish` only.
    """

    def __init__(
        self, profile: Profile, max_running: int, max_queued: int | None = None, kv_tokens: int | None = None
    ):
        self.profile = profile
        self.max_running = max_running
        self.max_queued = max_queued
        self.kv_tokens = kv_tokens or profile.kv_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.batch: list[
            tuple[Sequence, int]
        ] = []  # the prefill step under way: who, and how many tokens of it
        self.kv_used = 0
        self.kind = (
            "idle"  # of the step under way or, after finish(), of the last one: "prefill", "decode", "idle"
        )
        self.ratio = RATIO_INITIAL
        self.decode_steps = 0
        self.retracted = 0
        self._chunked: Sequence | None = None

    def __repr__(self) -> str:
        counts = f"running={self.running_count} waiting={len(self.waiting)} kv={self.kv_used}"
        return f"<Engine {self.profile.name} {counts}>"

    @property
    def running_count(self) -> int:
        """Requests that hold a running slot, those in prefill included."""
        return len(self.running) + len(self.batch) + (self._chunked is not None and not self.batch)

    @property
    def full(self) -> bool:
        """Whether the next arrival is refused: `--max-queued-requests` counts arrivals before they take
        running slots.
        """
        return self.max_queued is not None and len(self.waiting) >= self.max_queued

    def sequences(self) -> Iterator[Sequence]:
        """Everything unfinished."""
        yield from self.running
        yield from (sequence for sequence, _ in self.batch)
        if self._chunked is not None and not self.batch:
            yield self._chunked
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Put a request at the end of the queue."""
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End it now; slot and KV room are free for the next step."""
        if sequence.finish is not None:
            return
        sequence.finish = "abort"
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
        elif sequence is self._chunked:
            self._chunked = None
        self._release(sequence)

    def begin(self) -> float | None:
        """Choose the next step and return its length in seconds of the modelled engine, or None when there
        is nothing to do.
        """
        self.batch = self._admit()
        if self.batch:
            self.kind = "prefill"
            tokens = sum(tokens for _, tokens in self.batch)
            return self.profile.prefill_seconds(tokens, alone=not self.running)
        if self.running:
            self.kind = "decode"
            self._retract()
            return self.profile.decode_seconds(len(self.running))
        self.kind = "idle"
        self.ratio = RATIO_INITIAL
        return None

    def finish(self) -> list[Sequence]:
        """End the step under way; returns the sequences that got one more token, those that are finished
        by it included.
        """
        if self.kind == "prefill":
            stepped = self._finish_prefill()
        else:
            stepped = list(self.running)
            self.decode_steps += 1
            self.ratio = max(RATIO_FINAL, self.ratio - (RATIO_INITIAL - RATIO_FINAL) / RATIO_STEPS)
        ended = False
        for sequence in stepped:
            sequence.generated += 1
            sequence.kv += 1
            if sequence.generated >= sequence.want:
                sequence.finish = sequence.ending
                ended = True
        self.kv_used += len(stepped)
        if ended:
            for sequence in stepped:
                if sequence.finish is not None:
                    self._release(sequence)
            self.running = [sequence for sequence in self.running if sequence.finish is None]
        return stepped

    def _admit(self) -> list[tuple[Sequence, int]]:
        batch: list[tuple[Sequence, int]] = []
        budget = CHUNK
        if self._chunked is not None:
            sequence, self._chunked = self._chunked, None
            tokens = min(budget, sequence.to_prefill)
            batch.append((sequence, tokens))
            budget -= tokens
        if not self.waiting:
            return batch
        room = self.kv_tokens - self.kv_used - sum(self._still_expected(s) for s in self.running)
        room -= sum(self._still_expected(s) for s, _ in batch)
        while self.waiting and budget > 0 and len(self.running) + len(batch) < self.max_running:
            sequence = self.waiting[0]
            needed = sequence.to_prefill + self._still_expected(sequence)
            if needed > room and (self.running or batch):
                break
            self.waiting.popleft()
            room -= needed
            tokens = min(budget, sequence.to_prefill)
            sequence.kv = sequence.to_prefill
            self.kv_used += sequence.kv
            batch.append((sequence, tokens))
            budget -= tokens
        return batch

    def _still_expected(self, sequence: Sequence) -> float:
        ratio = 1.0 if sequence.ignore_eos else self.ratio
        return max(0, min(sequence.max_new, MAX_RESERVED) - sequence.generated) * ratio

    def _finish_prefill(self) -> list[Sequence]:
        stepped = []
        for sequence, tokens in self.batch:
            if sequence.finish is not None:  # aborted meanwhile
                continue
            sequence.prefilled += tokens
            if sequence.to_prefill > 0:
                self._chunked = sequence
            else:
                self.running.append(sequence)
                stepped.append(sequence)
        self.batch = []
        return stepped

    def _retract(self) -> None:
        while len(self.running) > 1 and self.kv_used + len(self.running) > self.kv_tokens:
            sequence = self.running.pop()
            self._release(sequence)
            sequence.prefilled = 0
            sequence.retractions += 1
            self.retracted += 1
            self.ratio = RATIO_INITIAL
            self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.kv_used -= sequence.kv
        sequence.kv = 0
