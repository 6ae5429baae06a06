"""The cold start, read from what SkyPilot, huggingface_hub and SGLang print."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.phases import PHASES, READY, Phases, lines_of, read

SGLANG_GPU = """\
[2026-11-24 04:51:07] server_args=ServerArgs(model_path='/tmp/tiny', load_format='Loading weight begin')
[2026-11-24 04:51:28 TP0] Init torch distributed begin.
[2026-11-24 04:51:31 TP0] Load weight begin. avail mem=139.13 GB
Loading safetensors checkpoint shards:   0% Completed | 0/163 [00:00<?, ?it/s]
Loading safetensors checkpoint shards:  42% Completed | 68/163 [00:41<00:57,  1.65it/s]
Loading safetensors checkpoint shards: 100% Completed | 163/163 [01:38<00:00,  1.65it/s]
[2026-11-24 04:51:31 TP0] Load weight end. elapsed=0.08 s, type=LlamaForCausalLM, avail mem=139.12 GB.
[2026-11-24 04:51:31 TP0] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 60000, K size: 0.03 GB
[2026-11-24 04:51:31 TP0] Memory pool end. avail mem=139.03 GB
[2026-11-24 04:51:31 TP0] Capture target prefill CUDA graph begin. backend=breakable, num_tokens=[4, 8]
  0%|          | 0/2 [00:00<?, ?it/s]Capturing num tokens (num_tokens=8 avail_mem=138.93 GB):\
   0%|          | 0/2 [00:00<?, ?it/s]\rCapturing num tokens (num_tokens=4 avail_mem=138.93 GB):\
  50%|#####     | 1/2 [00:01<00:01,  1.00s/it]\rCapturing num tokens: 100%|##########| 2/2 [00:02<00:00]
[2026-11-24 04:51:33 TP0] Capture target prefill CUDA graph end. elapsed=2.00 s, mem usage=0.14 GB
[2026-11-24 04:51:34] INFO:     Application startup complete.
[2026-11-24 04:51:34] INFO:     Uvicorn running on http://127.0.0.1:31500 (Press CTRL+C to quit)
[2026-11-24 04:51:34] INFO:     127.0.0.1:42342 - "GET /health HTTP/1.1" 503 Service Unavailable
[2026-11-24 04:51:35] Prefill batch, #new-seq: 1, #new-token: 19, #cached-token: 0, token usage: 0.00
[2026-11-24 04:51:35] The server is fired up and ready to roll!
"""


def walk(text: str) -> list[tuple[str | None, float | None]]:
    """The points passed, each once."""
    phases, passed = Phases(), list[tuple[str | None, float | None]]()
    for line in lines_of(text):
        phases.take(line)
        if phases.phase and (phases.phase, phases.progress) not in passed[-1:]:
            passed.append((phases.phase, phases.progress))
    return passed


def test_a_start_of_sglang_on_gpus_is_followed_to_its_end() -> None:
    assert walk(SGLANG_GPU) == [
        ("load", None),
        ("load", 0.0),
        ("load", 68 / 163),
        ("load", 1.0),
        ("warmup", None),
        ("warmup", 0.0),
        ("warmup", 0.5),
        ("warmup", 0.95),   # the last capture is not the end: a warm-up request follows
        ("warmup", 1.0),
    ]


@pytest.mark.parametrize(
    ("line", "phase", "progress"),
    [
        ("⚙︎ Launching on AWS us-east-1 (us-east-1a).", "provision", None),
        ("\x1b[2K└── Launching - Waiting for SSH access", "provision", None),
        ("Considered resources (2 nodes):", "provision", None),
        ("✓ Cluster launched: r1-gw-0badcafe-1.  View logs: sky logs --provision", "provision", None),
        ("Preparing SkyPilot runtime (2/3 - dependencies)", "setup", None),
        ("⚙︎ Running setup on 2 VMs.", "setup", None),
        ("(setup pid=3121) Downloading sglang-0.5.23-py3-none-any.whl (2.1 MB)", "setup", None),
        ("[replica] setup started", "setup", None),
        ("(task, pid=2187) Fetching 163 files:  42%|████▏     | 68/163 [01:02<01:30]", "download", 68 / 163),
        ("(worker1, rank=1, pid=411, ip=10.0.0.3) Fetching 163 files:   0%|", "download", 0.0),
        ("model-00001-of-000163.safetensors:  99%|██▉| 4.2G/4.30G [00:05<00:37, 101MB/s]", "download", None),
        ("Downloading (incomplete total...): 12%|█▏  | 1.2G/10G", "download", None),
        ("[2026-11-24 04:32:57] Init parallel begin.", "load", None),
        ("(task, pid=2187) [2026-11-24 04:51:31 TP0] Load weight begin. avail mem=139.13 GB", "load", None),
        ("Multi-thread loading shards:  50% Completed | 2/4", "load", 0.5),
        ("[2026-11-24 05:09:58] SGLANG_RUST_SERVER enabled, Rust server listen on 0.0.0.0:1", "warmup", None),
        ("(task, pid=2187) [2026-11-24 04:51:35] " + READY, "warmup", 1.0),
    ],
)
def test_a_line_tells_its_phase(line: str, phase: str, progress: float | None) -> None:
    assert read(line) == (phase, progress)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "hello",
        "[2026-11-24 04:51:37] Decode batch, #running-req: 1, #token: 54, Load weight begin",
        "[2026-11-24 04:51:07] server_args={'chat_template': 'Fetching 163 files:  42%|'}",
        '[2026-11-24 04:51:34] INFO:     127.0.0.1:42342 - "GET /health HTTP/1.1" 503 Service Unavailable',
        "[replica] run started",
        "[2026",
    ],
)
def test_other_lines_tell_nothing(line: str) -> None:
    assert read(line) is None


def test_phases_never_go_back() -> None:
    phases = Phases()
    phases.take("Fetching 163 files:  42%|####| 68/163")
    phases.take("Fetching 163 files:   1%|    | 1/163")    # the other node
    assert (phases.phase, phases.progress) == ("download", 68 / 163)
    phases.take("⚙︎ Launching on AWS us-east-1.")
    assert (phases.phase, phases.progress) == ("download", 68 / 163)
    phases.take("[2026-11-24 04:51:31 TP3] Load weight begin.")
    assert (phases.phase, phases.progress) == ("load", None)
    assert repr(phases) == "<Phases load>"


def test_only_the_last_line_of_a_start_ends_it() -> None:
    phases = Phases()
    phases.feed("Capturing batches (bs=1): 100%|##########| 4/4 [00:00<00:00]\n")
    assert not phases.over
    phases.feed(f"[2026-11-24 04:51:35] {READY}\n")
    assert phases.over
    assert repr(phases) == "<Phases warmup 100%>"


def test_an_impossible_count_is_no_progress() -> None:
    assert read("Fetching 4 files: | 9/4") == ("download", None)
    assert read("Fetching 0 files: 100%|##| 0/0") == ("download", 1.0)


@given(st.lists(st.integers(min_value=0, max_value=len(SGLANG_GPU)), max_size=20))
def test_output_may_be_cut_anywhere(cuts: list[int]) -> None:
    phases, whole = Phases(), Phases()
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(SGLANG_GPU)], strict=True):
        phases.feed(SGLANG_GPU[start:stop])
    whole.feed(SGLANG_GPU)
    assert (phases.phase, phases.progress, phases.over) == (whole.phase, whole.progress, whole.over)


@given(st.lists(st.tuples(st.sampled_from(PHASES), st.none() | st.floats(min_value=0, max_value=1))))
def test_no_order_of_points_moves_backwards(points: list[tuple[str, float | None]]) -> None:
    phases = Phases()
    before = (-1, 0.0)
    for phase, progress in points:
        phases.reach(phase, progress)
        assert phases.phase
        now = (PHASES.index(phases.phase), phases.progress or 0.0)
        assert now >= before
        before = now


@given(st.text())
def test_any_text_is_taken(text: str) -> None:
    phases = Phases()
    phases.feed(text)
    phases.feed("\n")
    assert phases.progress is None or 0 <= phases.progress <= 1
