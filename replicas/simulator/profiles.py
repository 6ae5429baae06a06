"""How long one step of an engine takes, for engines that somebody has measured.

    f(B)         = 1 - (1 - 8/256)^B              share of R1's 256 routed experts that B tokens touch
    decode step  = base + experts * f(B)          the gap between two tokens of every running request
    prefill step = tokens / rate                  new requests go first; decoding waits meanwhile
                 + prefill_base                   if nothing runs: tokenizing, scheduling, launching; else
                                                  it overlaps with decoding (the H200 figures were fitted so)

At a small B, decoding is bound by streaming the weights of the *touched* experts, so it saturates once all
are touched. All times are seconds of the modelled engine; `--speedup` divides them later.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUTED_EXPERTS = 256  # DeepSeek-R1: routed experts of a layer
TOP_K = 8  # of which each token uses 8


def experts_touched(batch: int) -> float:
    """The share (0..1) of the routed experts that `batch` tokens touch, were they chosen at random."""
    return float(1.0 - (1.0 - TOP_K / ROUTED_EXPERTS) ** batch)


@dataclass(frozen=True, slots=True)
class Profile:
    """One engine on one kind of machine."""

    name: str
    base: float  # seconds of a decode step whatever the batch: attention, dense weights, all-reduce
    experts: float  # seconds to stream all the routed experts
    prefill_base: float  # seconds from an arrival at an idle engine to its prefill
    prefill_rate: float  # uncached prompt tokens a second
    kv_tokens: int  # room in the KV cache, tokens
    floor: float = 0.0  # shortest decode step, seconds (where the formula is extrapolated below its anchors)

    def decode_seconds(self, batch: int) -> float:
        """The length of one decode step over `batch` running requests."""
        return max(self.floor, self.base + self.experts * experts_touched(batch))

    def prefill_seconds(self, tokens: int, *, alone: bool) -> float:
        """The length of one prefill step over `tokens` uncached prompt tokens; `alone`: nothing decodes."""
        return tokens / self.prefill_rate + (self.prefill_base if alone else 0.0)


PROFILES = {
    profile.name: profile
    for profile in (
        # The DeepSeek-R1 recipe of SkyPilot (2025-02, sglang 0.4.2): 11.45 tokens/s at B=1; the other
        # figures are assumed.
        Profile("r1-2x8h100-2025-02", 0.0868, 0.017, 0.5, 4_000, 287_000),
        # Two 8xH100 over InfiniBand, TP16 (tenstorrent/tt-inference-server#356): 23.1 ms at B=1, 32.5 ms
        # at B=32.
        Profile("r1-2x8h100-2025-07", 0.0226, 0.0155, 0.18, 24_000, 287_000),
        # 8xH200, SGLang 0.5.7, FP8, TP8 (SemiAnalysisAI/InferenceX#870): 12.8/17.2/25.6/34.6 ms at
        # 8/16/32/64.
        # Below B=8 the formula is extrapolated (6.3 ms at B=1), hence the floor.
        Profile("r1-8xh200-2026", 0.00535, 0.0288, 0.15, 16_000, 500_000, floor=0.009),
        # No engine at all: for tests that want tokens soon. 1 ms a token.
        Profile("fast", 0.001, 0.0, 0.002, 1_000_000, 500_000),
    )
}
