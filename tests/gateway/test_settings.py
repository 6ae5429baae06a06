"""Options: one table, one value, and errors that say what to do next."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.assembly import controller_config
from gateway.settings import (
    SETTINGS,
    Settings,
    SettingsError,
    guess_provisioner,
    is_loopback,
    make,
    parse_api_keys,
)


def test_the_table_and_the_value_agree_on_names_and_defaults() -> None:
    fields = [field.name for field in dataclasses.fields(Settings)]
    assert fields == ["file", *(row.name for row in SETTINGS)]
    assert make() == Settings()


def test_every_row_has_a_sentence_an_option_and_a_variable_of_ours() -> None:
    for row in SETTINGS:
        assert row.sentence.endswith("."), row.name
        assert row.option == "--" + row.name.replace("_", "-")
        assert row.env.startswith("GATEWAY_")
    assert len({row.env for row in SETTINGS}) == len(SETTINGS)


def test_settings_survive_the_way_to_a_child_process(tmp_path: Path) -> None:
    yaml = tmp_path / "x.yaml"
    yaml.write_text("run: x\n")
    settings = make(yaml, api_key=["a=12345678", "b=abcdefgh"], replica=["http://h:1"], hold_max="12.5")
    given = json.loads(json.dumps(settings.to_json()))
    assert Settings.from_json(given) == settings
    of_another_version = {**given, "no_longer_there": 1}
    del of_another_version["model"]
    assert Settings.from_json(of_another_version) == settings


def test_texts_of_an_environment_become_typed_values() -> None:
    settings = make(port="0", beat_after="0", insecure_open="yes", replica="http://a:1,http://b:2", price="2")
    assert (settings.port, settings.beat_after, settings.insecure_open) == (0, 0.0, True)
    assert settings.price == ("2",)
    assert settings.replica == ("http://a:1", "http://b:2")


def test_launch_flags_come_from_an_environment_too() -> None:
    settings = make(
        plan="H200:8,H100:8x2", price="H200:8=27.5 2", env="A=x y\nB=1,2", secret="HF_TOKEN", use_spot="no"
    )
    assert settings.plan == ("H200:8", "H100:8x2")
    assert settings.price == ("H200:8=27.5", "2")
    assert settings.env == ("A=x y", "B=1,2")
    assert (settings.secret, settings.use_spot) == (("HF_TOKEN",), False)
    assert make().use_spot is None


def test_an_empty_variable_means_the_default() -> None:
    assert make(port="", admin_key="", workers="") == Settings()


def test_api_keys_split_by_commas_and_spaces() -> None:
    assert parse_api_keys(["a=12345678,b=abcdefgh  c=xyzxyzxyz="]) == (
        ("a", "12345678"),
        ("b", "abcdefgh"),
        ("c", "xyzxyzxyz="),
    )


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"host": "0.0.0.0"}, "--api-key NAME=KEY (or GATEWAY_API_KEYS, or --api-keys-file), or"),
        ({"admin_host": "0.0.0.0"}, "add --admin-key KEY"),
        ({"admin_host": "::"}, "add --admin-key KEY"),
        ({"admin_key": "short"}, "8 characters"),
        ({"api_key": ["12345678"]}, "NAME=KEY"),
        ({"api_key": ["=12345678"]}, "NAME=KEY"),
        ({"api_key": ["a=1234567"]}, "7 characters, at least 8"),
        ({"api_key": ["a=12345678", "a=87654321"]}, "give each key its own"),
        ({"port": "eight"}, "--port (GATEWAY_PORT) wants a whole number, not 'eight'"),
        ({"port": 65536}, "at most 65535"),
        ({"port": -1}, "at least 0"),
        ({"port": 8001}, "change one of them"),
        ({"workers": 0}, "at least 1"),
        ({"connect_timeout": 0}, "more than 0"),
        ({"hold_max": "nan"}, "wants a number"),
        ({"insecure_open": "maybe"}, "true or false"),
        ({"hold": "sometimes"}, "one of beats, silent, reject"),
        ({"provisioner": "aws"}, "one of local, static, skypilot"),
        ({"provisioner": "static"}, "--replica URL"),
        ({"replica": ["http://a:1"], "provisioner": "local"}, "--provisioner static"),
        ({"replica": ["ftp://a"]}, "http(s)://HOST:PORT"),
        ({"replica": ["http://a:1/v1"]}, "nothing after it"),
        ({"replica": ["http://a:1", "http://a:1"]}, "twice"),
        ({"min_replicas": 3, "max_replicas": 2}, "--min-replicas 3 is more than"),
        ({"state_dir": "/tmp/" + "x" * 120}, "choose a shorter path"),
        ({"file": "/nowhere/x.yaml"}, "no such file"),
        ({"plan": ["H200"]}, "--plan: 'H200' is not ACCELERATOR:COUNTxNODES, such as H100:8x2"),
        ({"plan": ["H200:8"], "num_nodes": "2"}, "leave out --gpus and --num-nodes"),
        ({"gpus": "8 x H200"}, "--gpus: '8 x H200' is not ACCELERATOR:COUNT"),
        ({"price": ["H200:8=cheap"]}, "--price: 'H200:8=cheap' is not DOLLARS or"),
        ({"use_spot": "maybe"}, "--use-spot (GATEWAY_USE_SPOT) wants true or false"),
        ({"max_hourly_cost": "0"}, "more than 0"),
        ({"colour": "red"}, "unknown setting"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_that_says_what_to_do(
    values: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        make(**values)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_never_shows_in_an_error_or_a_repr() -> None:
    with pytest.raises(SettingsError) as caught:
        make(api_key=["a=secret1"])
    assert "secret1" not in str(caught.value)
    assert "topsecret" not in repr(make(api_key=["a=topsecret"], admin_key="topsecret"))


def test_an_open_host_is_fine_with_keys_or_with_insecure_open() -> None:
    assert make(host="0.0.0.0", api_key=["a=12345678"]).host == "0.0.0.0"
    assert make(host="0.0.0.0", insecure_open=True).insecure_open
    assert make(admin_host="0.0.0.0", admin_key="12345678").admin_host == "0.0.0.0"


def test_only_addresses_of_this_machine_are_loopback() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", ""):
        assert not is_loopback(host), host


def test_the_provisioner_is_guessed_from_what_was_given(tmp_path: Path) -> None:
    yaml = tmp_path / "r1.yaml"
    yaml.write_text("run: x\n")
    assert guess_provisioner(make()) == "local"
    assert guess_provisioner(make(yaml)) == "skypilot"
    assert guess_provisioner(make(yaml, replica=["http://a:1"])) == "static"
    assert guess_provisioner(make(yaml, provisioner="local")) == "local"


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800.0), ("90", 90.0), ("2h", 7200.0), (None, 0.0)])
def test_a_failed_machine_is_kept_for_a_duration(text: str | None, seconds: float, tmp_path: Path) -> None:
    settings = make(keep_failed=text, state_dir=str(tmp_path))
    assert settings.keep_failed == seconds
    assert controller_config(Settings.from_json(settings.to_json())).keep_failed == seconds


def test_what_is_no_duration_is_refused_with_examples() -> None:
    with pytest.raises(SettingsError, match=r"--keep-failed .* wants a duration such as 30m or 2h, not '-5'"):
        make(keep_failed="-5")
