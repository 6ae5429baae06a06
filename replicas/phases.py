"""Where a cold start is, read from what the replica prints.

PURE. `read` knows one line, `Phases` keeps the furthest point reached. The lines were taken from real logs:
SGLang 0.5.17 (GPU) and 0.5.23 (CPU), tqdm bars of huggingface_hub and of SGLang's loader, SkyPilot 0.14.1.
Several processes print at once (tensor-parallel ranks, nodes) and a bar is drawn anew for each part of the
work, so nothing here ever moves backwards.
"""

from __future__ import annotations

import re

PHASES = ("provision", "setup", "download", "load", "warmup")
"""In the order in which a replica passes through them; any may be missing (weights already on the disk)."""

READY = "The server is fired up and ready to roll!"
"""SGLang's last line of a start, with --skip-server-warmup too."""

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

_JOB = re.compile(r"^\((?!setup)[^()]*(?:pid|rank)=[^()]*\) ?")
"""What SkyPilot puts before the lines of a job: `(task, pid=21) `, `(worker1, rank=1, pid=4, ip=...) `."""

_ENDS = re.compile(r"[\r\n]+|(?<=\])(?=Capturing |Loading |Fetching )")
_COUNTS = re.compile(r"\b(\d+) ?/ ?(\d+)\b")   # `| 68/163 [01:02<01:30]`
_PERCENT = re.compile(r"\b(\d{1,3})%\|")       # `42%|####      |`

_RULES: tuple[tuple[str, bool, re.Pattern[str]], ...] = tuple(
    (phase, counted, re.compile(pattern))
    for phase, counted, pattern in (
        # Warm-up: the weights are in. CUDA graphs (minutes with torch.compile), then one real request
        # (64-70 s on a cold kernel cache). Several captures follow each other: a full bar is not the end.
        ("warmup", True, r"^Capturing (?:num tokens|batches)\b"),
        ("warmup", False, r"\bCapture .*\bbegin\b|\bKV Cache is allocated\b|\bMemory pool end\b"),
        ("warmup", False, r"\bApplication startup complete\b|\bUvicorn running on\b|\bserver listen on\b"),
        # Load: weights from the disk (or the page cache) to the accelerator.
        ("load", True, r"^Loading (?:safetensors|pt) checkpoint shards:|^Multi-thread loading shards:"),
        ("load", False, r"^Load weight begin\b|^Init torch distributed begin\b|^Init parallel begin\b"),
        # Download: `Fetching` counts files; bars of single files come and go and say nothing of the whole.
        ("download", True, r"^Fetching \d+ files:"),
        ("download", False, r"^Download(?:ing)? ?(?:\(incomplete|shards|\S*\.safetensors|complete\b)"),
        ("download", False, r"\.(?:safetensors|bin|gguf)\b[^|]*: +\d{1,3}%\|"),
        # Setup: SkyPilot's own and the YAML's, on a machine that exists.
        ("setup", False, r"^\(setup\b|^\[replica\] setup started"),
        ("setup", False, r"\bRunning setup\b|Preparing SkyPilot runtime\b|\bSyncing files|\bSetup detached"),
        # Provision: looking for a machine and starting it.
        ("provision", False, r"^\W*Launching\b|\bCluster launched\b|\bConsidered resources\b"),
        ("provision", False, r"\bRunning on cluster\b|^\W*Provisioning\b"),
    )
)
"""(phase, whether a bar on the line measures the phase, the line's looks); the first that fits wins."""

_CAPTURED = 0.95   # a capture's full bar: only READY is 1


def lines_of(text: str) -> list[str]:
    """The lines of a piece of output.

    CR ends a line (a bar that is drawn again), and so does nothing at all: stored logs hold
    `0%|  | 0/4 [00:00<?, ?it/s]Capturing batches (bs=8):  0%|  | 0/4`.
    """
    return [line for line in _ENDS.split(text) if line.strip()]


def read(line: str) -> tuple[str, float | None] | None:
    """(phase, progress 0..1 or None when the line tells none); None for a line that tells nothing."""
    plain = _JOB.sub("", _ANSI.sub("", line).strip())
    if plain.startswith("[2"):   # SGLang: `[2026-11-24 04:51:31 TP0] Load weight begin. avail mem=139.13 GB`
        plain = plain.partition("] ")[2]
    if plain.startswith(READY):
        return "warmup", 1.0
    if plain.startswith(("server_args=", "Prefill batch", "Decode batch")):
        return None   # long, or frequent, and with any words in them
    for phase, counted, pattern in _RULES:
        if pattern.search(plain):
            progress = _progress(plain) if counted else None
            return phase, min(progress, _CAPTURED) if progress is not None and phase == "warmup" else progress
    return None


def _progress(line: str) -> float | None:
    """The counts of a bar where it has them (`42% Completed | 68/163`: they are finer), else its percent."""
    counts = _COUNTS.search(line, line.find("|") + 1)
    if counts and 0 < int(counts[2]) >= int(counts[1]):
        return int(counts[1]) / int(counts[2])
    percent = _PERCENT.search(line)
    return min(int(percent[1]), 100) / 100 if percent else None


class Phases:
    """The furthest point of one replica's cold start. Mutable; fed in order by whoever reads its output."""

    __slots__ = ("_rest", "over", "phase", "progress")

    def __init__(self) -> None:
        self.phase: str | None = None
        self.progress: float | None = None   # of `phase`; never falls within a phase
        self.over = False                    # the replica says that it is ready: nothing more to learn
        self._rest = ""

    def __repr__(self) -> str:
        share = "" if self.progress is None else f" {self.progress:.0%}"
        return f"<Phases {self.phase}{share}>"

    def feed(self, text: str) -> None:
        """Take the next piece of output, cut anywhere: an unfinished line waits for its end."""
        text = self._rest + text
        end = max(text.rfind("\n"), text.rfind("\r")) + 1
        self._rest = text[end:][-_LONGEST:]
        for line in lines_of(text[:end]):
            self.take(line)

    def take(self, line: str) -> None:
        """Take one whole line."""
        found = read(line)
        if found is not None:
            self.reach(*found)
            self.over = self.over or found == ("warmup", 1.0)

    def reach(self, phase: str, progress: float | None = None) -> None:
        """Move on to a point, unless it lies behind. Of two bars in one phase the further one counts."""
        here = -1 if self.phase is None else PHASES.index(self.phase)
        there = PHASES.index(phase)
        if there > here:
            self.phase, self.progress = phase, progress
        elif there == here and progress is not None:
            self.progress = max(progress, self.progress or 0.0)


_LONGEST = 65_536   # characters kept of a line that has no end yet
