"""The model and the flags are read out of a `run` script without running it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.command import flag, has_flag, model, uses_certificate

LAUNCH = "python -m sglang.launch_server"


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (f"{LAUNCH} --model-path deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-R1"),
        (f"{LAUNCH} \\\n  --model deepseek-ai/DeepSeek-R1 \\\n  --tp-size $TP", "deepseek-ai/DeepSeek-R1"),
        (f"{LAUNCH} --model=a/b", "a/b"),
        (f"{LAUNCH} --model-path '/mnt/the weights'", "/mnt/the weights"),
        (f'{LAUNCH} --model-path "/mnt/the \\"weights\\""', '/mnt/the "weights"'),
        (f"{LAUNCH} --model-path /mnt/w --served-model-name a/b", "a/b"),
        ("sglang serve a/b --tp-size 8", "a/b"),
        ("/opt/bin/sglang serve 'a/b'", "a/b"),
        ("sglang serve --model-path a/b", "a/b"),
        (f'{LAUNCH} --model-path "$MODEL"', "env/model"),
        (f"{LAUNCH} --model-path ${{MODEL}}", "env/model"),
        (f"{LAUNCH} --model-path ${{MODEL:-x/y}}", "env/model"),
        (f"{LAUNCH} --model-path ${{NAME:-x/y}}-z", "x/y-z"),
        (f"NAME=a/b\n{LAUNCH} --model-path $NAME", "a/b"),
        (f"export NAME='a/b'; {LAUNCH} --model-path $NAME", "a/b"),
        (f"NAME=a/b OTHER=1 {LAUNCH} --model-path $NAME", "a/b"),
        (f"MODEL=$(cat name)\n{LAUNCH} --model-path $MODEL", None),
        (f"export MODEL=$(cat name)\n{LAUNCH} --model-path $MODEL", None),
        (f"{LAUNCH} --model-path $UNKNOWN", None),
        (f"{LAUNCH} --model-path `cat name`", None),
        (f"{LAUNCH} --tp-size 8  # --model-path a/b", None),
        (f"{LAUNCH} --model-path", None),
        ("sglang serve", None),
        ("sglang serve --tp-size 8", None),
        ("", None),
        (f"python convert.py --model-path raw\n{LAUNCH} --model-path final", "final"),
        (f'bash -c "{LAUNCH} --model-path a/b"', "a/b"),
        (f"if [ $RANK = 0 ]; then\n  {LAUNCH} --model-path a/b --host 0.0.0.0\nelse\n  sleep 1\nfi", "a/b"),
        (f"echo it's unbalanced\n{LAUNCH} --model-path a/b", "a/b"),
    ],
)
def test_the_name_of_the_model_that_the_script_serves(run: str, name: str | None) -> None:
    assert model(run, {"MODEL": "env/model"}) == name


def test_a_flag_with_a_default_that_the_gateway_will_override_reads_as_its_default() -> None:
    assert flag("serve --port ${REPLICA_PORT:-30000}", {}, "--port") == "30000"


def test_a_flag_is_seen_whatever_its_value() -> None:
    assert has_flag('serve --api-key "$REPLICA_API_KEY"', "--api-key")
    assert has_flag("serve --api-key=$KEY", "--api-key")
    assert not has_flag("serve --api-keys x", "--api-key")


@given(st.text(alphabet=st.sampled_from("ab$(){}'\"\\ \n=-#;|&`:"), max_size=60))
def test_no_script_is_too_strange(run: str) -> None:
    found = model(run, {"a": "b"})
    assert found is None or "$" not in found


@pytest.mark.parametrize(
    ("run", "uses"),
    [
        ('printf %s "$REPLICA_TLS_CERT" > cert', True),
        ("serve ${REPLICA_TLS_CERT:+--ssl-certfile cert}", True),
        ("  # $REPLICA_TLS_CERT\nserve", False),
        ("serve $REPLICA_TLS_CERTIFICATE", False),
    ],
)
def test_whether_a_script_uses_the_certificate(run: str, uses: bool) -> None:
    assert uses_certificate(run) is uses
