"""What can go wrong on demand: `--fault KIND[=NUMBER]` at start, POST /sim/fault {"kind": KIND, "count":
NUMBER} later.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {
    "crash-after": "the process dies after that many tokens of one answer: silence, then EOF without an end",
    "crash-after-requests": "the same, once that many requests have been answered",
    "hang-after": "the scheduler hangs after that many tokens of one answer",
    "hang-after-requests": "the same, at the arrival of the request after that many",
    "slow-start": "loading takes that many seconds longer",
    "slow": "every step takes that many times as long",
    "die-at-load": "the process dies with a traceback while it loads the weights",
    "die-at-warmup": "the process dies with a traceback while it warms up",
    "crash": "the process dies now (only at run time)",
    "exit": "the process ends now, without a silence (only at run time)",
    "hang": "the scheduler hangs now (only at run time)",
    "resume": "a hung scheduler goes on (only at run time)",
    "reset": "every connection is reset now (only at run time)",
    "drop": "that many requests are read and their connection closed without a byte",
    "tear": "that many streams are broken off within a chunk",
    "queue-full": "that many requests are refused as if the queue were full",
    "unhealthy": "/health says 503 at once, all else goes on",
    "healthy": "the end of that (only at run time)",
}
AT_RUN_TIME = ("crash", "exit", "hang", "resume", "reset", "healthy")
NEEDS_NUMBER = (
    "crash-after",
    "crash-after-requests",
    "hang-after",
    "hang-after-requests",
    "slow-start",
    "slow",
)


class FaultError(ValueError):
    """No such fault; the message says what there is."""


@dataclass(slots=True)
class Faults:
    """What is set. Mutable: the counters of `drop`, `tear` and `queue_full` go down as they are used up."""

    crash_after: int | None = None
    crash_after_requests: int | None = None
    hang_after: int | None = None
    hang_after_requests: int | None = None
    slow_start: float = 0.0
    slow: float = 1.0
    die_at_load: bool = False
    die_at_warmup: bool = False
    drop: int = 0
    tear: int = 0
    queue_full: int = 0
    unhealthy: bool = False

    @classmethod
    def parse(cls, texts: tuple[str, ...]) -> Faults:
        """From the values of `--fault`. Raises FaultError."""
        faults = cls()
        for text in texts:
            kind, _, number = text.partition("=")
            try:
                value = float(number) if number else None
            except ValueError:
                raise FaultError(f"{text!r}: not a number after '='") from None
            if kind in AT_RUN_TIME:
                raise FaultError(f"{kind} is for POST /sim/fault only")
            faults.set(kind, value)
        return faults

    def set(self, kind: str, number: float | None = None) -> None:
        """Set one fault. Raises FaultError for an unknown kind or a missing number; the immediate ones do
        nothing here.
        """
        if kind not in KINDS:
            raise FaultError(f"no fault {kind!r}; there are: {', '.join(KINDS)}")
        if number is None and kind in NEEDS_NUMBER:
            raise FaultError(f"{kind} needs a number: {kind}=N ({KINDS[kind]})")
        match kind:
            case "crash-after" | "crash-after-requests" | "hang-after" | "hang-after-requests":
                setattr(self, kind.replace("-", "_"), int(number or 0))
            case "drop" | "tear" | "queue-full":
                setattr(self, kind.replace("-", "_"), int(1 if number is None else number))
            case "slow-start" | "slow":
                setattr(self, kind.replace("-", "_"), float(number or 0))
            case "die-at-load" | "die-at-warmup":
                setattr(self, kind.replace("-", "_"), True)
            case "unhealthy" | "healthy":
                self.unhealthy = kind == "unhealthy"

    def take(self, name: str) -> bool:
        """Use up one `drop`, `tear` or `queue_full`."""
        left: int = getattr(self, name)
        if left <= 0:
            return False
        setattr(self, name, left - 1)
        return True
