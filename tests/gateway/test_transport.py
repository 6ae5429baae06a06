"""What `gateway up` makes of --replica-transport, --replica-ca and the YAML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway import transport
from gateway.settings import Settings, SettingsError, guess_provisioner, make
from replicas.provisioners.static import StaticProvisioner
from replicas.spec import Service, parse
from replicas.tls import TlsError
from replicas.tls import make as make_identity

TLS = '--ssl-certfile "${REPLICA_TLS_CERT}"'


def settings(folder: Path, **values: Any) -> Settings:
    made = make(state_dir=folder, **values)
    return replace(made, provisioner=guess_provisioner(made))


def service(flags: str = "") -> Service:
    text = f"""
        resources: {{ports: 30000}}
        run: python -m sglang.launch_server --model-path m --port 30000 {flags}
        service: {{readiness_probe: /health}}
        """
    return parse(text, "r1.yaml")


@pytest.mark.parametrize(
    ("provisioner", "asked", "mode"),
    [
        ("skypilot", None, "auto"),
        ("skypilot", "tls", "tls"),
        ("skypilot", "plain", "plain"),
        ("local", None, "plain"),
        ("local", "tls", "tls"),
    ],
)
def test_the_default_depends_on_where_replicas_come_from(
    tmp_path: Path, provisioner: str, asked: str | None, mode: str
) -> None:
    given = settings(tmp_path, provisioner=provisioner, replica_transport=asked)
    assert transport.mode(given) == mode


def test_static_replicas_are_spoken_to_as_their_urls_say(tmp_path: Path) -> None:
    given = settings(tmp_path, replica=["https://10.0.0.5:30000", "http://10.0.0.6:30000"])
    assert transport.mode(given) is None
    static = StaticProvisioner(given.replica, tmp_path, "0badcafe")
    assert transport.around(static, given, transport.certificates(given, service())) is static
    with pytest.raises(SettingsError, match="give https:// URLs instead"):
        transport.check(replace(given, replica_transport="tls"), service(TLS))


def test_tls_asked_for_and_not_in_the_yaml_is_refused_before_anything_is_launched(tmp_path: Path) -> None:
    given = settings(tmp_path, provisioner="skypilot", replica_transport="tls")
    with pytest.raises(SettingsError, match=r"run: does not use \$REPLICA_TLS_CERT"):
        transport.check(given, service())
    assert transport.check(given, service(TLS)) is None


def test_a_cloud_yaml_without_tls_is_warned_of_unless_plain_is_asked_for(tmp_path: Path) -> None:
    given = settings(tmp_path, provisioner="skypilot")
    assert "--replica-transport plain allows it" in (transport.check(given, service()) or "")
    assert transport.check(given, service(TLS)) is None
    assert transport.check(replace(given, replica_transport="plain"), service()) is None
    assert transport.check(settings(tmp_path, provisioner="local"), service()) is None


def test_an_authoritys_file_is_checked_at_once(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    with pytest.raises(SettingsError, match=r"--replica-ca .*ca\.pem is no file of PEM certificates"):
        transport.check(settings(tmp_path, replica_ca=str(file)), service())
    file.write_text(make_identity("ca").cert)
    given = settings(tmp_path, replica_ca=str(file))
    assert transport.check(given, service()) is None
    assert transport.certificates(given, service()).ca == file.read_text()


def test_a_broken_key_stops_the_start_with_its_files_name(tmp_path: Path) -> None:
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / "r1.pem").write_text("broken")
    with pytest.raises(TlsError, match=r"r1\.pem holds no usable key"):
        transport.certificates(settings(tmp_path, provisioner="skypilot"), service())
