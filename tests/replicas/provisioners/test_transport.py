"""What a replica is given at its launch decides how it is spoken to, for its life."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

from replicas.command import TLS_CERT, TLS_KEY
from replicas.plans import Plan
from replicas.provisioners import YAML_DECIDES, Instance, LaunchError
from replicas.provisioners.transport import TransportProvisioner
from replicas.spec import Service
from replicas.tls import Certificates, Mode

ID = "tiny-gw-0badcafe-1"
WITH_TLS = 'serve ${REPLICA_TLS_CERT:+--ssl-certfile "$CERT"}'
SECRETS = "secrets: {REPLICA_TLS_KEY: null, REPLICA_TLS_CERT: null}"

Services = Callable[..., Service]


class Cloud:
    """A provisioner that notes what it is given; its replicas are at `url`."""

    def __init__(self, url: str | None) -> None:
        self.url = url
        self.envs: dict[str, Mapping[str, str]] = {}

    async def launch(
        self, replica_id: str, service: Service, env: Mapping[str, str], plan: Plan = YAML_DECIDES
    ) -> None:
        self.plan = plan
        self.envs[replica_id] = env

    async def terminate(self, replica_id: str) -> None:
        self.envs.pop(replica_id, None)

    async def instances(self, fresh: Collection[str] = ()) -> dict[str, Instance]:
        return {id: Instance(id, alive=True, url=self.url) for id in self.envs}

    async def close(self) -> None: ...

    def logs(self, replica_id: str) -> str:
        return f"logs of {replica_id}"


def around(cloud: Cloud, folder: Path, mode: Mode) -> TransportProvisioner:
    return TransportProvisioner(cloud, Certificates(folder), mode)


async def test_a_yaml_that_uses_the_certificate_gets_one_and_is_dialled_by_tls(
    tmp_path: Path, service: Services
) -> None:
    cloud = Cloud("http://34.1.2.3:30000")
    secure = around(cloud, tmp_path, "auto")
    await secure.launch(ID, service(WITH_TLS), {"REPLICA_API_KEY": "k"})
    identity = Certificates(tmp_path).identity("tiny")
    assert cloud.envs[ID] == {"REPLICA_API_KEY": "k", TLS_KEY: identity.key, TLS_CERT: identity.cert}
    assert (await secure.instances())[ID].url == "https://34.1.2.3:30000"


@pytest.mark.parametrize("url", ["http://34.1.2.3:30000", "http://abc.elb.amazonaws.com:30000"])
async def test_a_yaml_without_tls_is_refused_at_a_public_address_with_the_way_out(
    tmp_path: Path, service: Services, url: str
) -> None:
    secure = around(Cloud(url), tmp_path, "auto")
    await secure.launch(ID, service(), {})
    instance = (await secure.instances())[ID]
    assert (instance.alive, instance.url) == (False, None)
    assert "is public and its YAML knows no TLS" in instance.detail
    assert "--replica-transport plain" in instance.detail


@pytest.mark.parametrize("url", ["http://10.0.0.5:30000", "http://127.0.0.1:30000", None])
async def test_a_yaml_without_tls_is_fine_where_the_world_cannot_reach(
    tmp_path: Path, service: Services, url: str | None
) -> None:
    secure = around(Cloud(url), tmp_path, "auto")
    await secure.launch(ID, service(), {})
    assert (await secure.instances())[ID] == Instance(ID, alive=True, url=url)


async def test_plain_when_asked_for_goes_anywhere_and_gives_no_key(tmp_path: Path, service: Services) -> None:
    cloud = Cloud("http://34.1.2.3:30000")
    secure = around(cloud, tmp_path, "plain")
    await secure.launch(ID, service(WITH_TLS, more=SECRETS), {})
    assert cloud.envs[ID] == {TLS_KEY: "", TLS_CERT: ""}  # SkyPilot wants a value for each listed secret
    assert (await secure.instances())[ID].url == "http://34.1.2.3:30000"


async def test_tls_when_asked_for_is_never_silently_plain(tmp_path: Path, service: Services) -> None:
    cloud = Cloud("http://127.0.0.1:30000")
    with pytest.raises(LaunchError, match=r"run: does not use \$REPLICA_TLS_CERT") as caught:
        await around(cloud, tmp_path, "tls").launch(ID, service(), {})
    assert caught.value.permanent
    assert cloud.envs == {}


async def test_a_broken_key_fails_the_launch_with_the_files_name(tmp_path: Path, service: Services) -> None:
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / "tiny.pem").write_text("broken")
    with pytest.raises(LaunchError, match=r"tiny\.pem holds no usable key") as caught:
        await around(Cloud(None), tmp_path, "auto").launch(ID, service(WITH_TLS), {})
    assert caught.value.permanent


async def test_a_running_replica_keeps_its_transport_when_flags_and_yaml_change(
    tmp_path: Path, service: Services
) -> None:
    cloud = Cloud("http://34.1.2.3:30000")
    await around(cloud, tmp_path, "auto").launch(ID, service(WITH_TLS), {})
    given = dict(cloud.envs[ID])
    later = around(cloud, tmp_path, "plain")
    await later.launch(ID, service(), {})  # adopted: the same launch once more
    assert cloud.envs[ID] == given
    assert (await later.instances())[ID].url == "https://34.1.2.3:30000"


async def test_a_replica_from_before_there_was_a_choice_stays_as_it_is(tmp_path: Path) -> None:
    cloud = Cloud("http://34.1.2.3:30000")
    cloud.envs[ID] = {}
    assert (await around(cloud, tmp_path, "auto").instances())[ID].url == "http://34.1.2.3:30000"


async def test_an_ingress_keeps_its_own_tls_and_is_refused_when_it_has_none(
    tmp_path: Path, service: Services
) -> None:
    cloud = Cloud("https://k8s.example/skypilot/tiny/30000")
    secure = around(cloud, tmp_path, "auto")
    await secure.launch(ID, service(WITH_TLS), {})
    assert (await secure.instances())[ID].url == cloud.url
    cloud.url = "http://k8s.example/skypilot/tiny/30000"
    instance = (await secure.instances())[ID]
    assert not instance.alive
    assert "ingress that speaks plain HTTP" in instance.detail


async def test_what_is_gone_is_forgotten_and_other_abilities_pass_through(
    tmp_path: Path, service: Services
) -> None:
    secure = around(Cloud(None), tmp_path, "auto")
    await secure.launch(ID, service(WITH_TLS), {})
    await secure.terminate(ID)
    assert Certificates(tmp_path).transport(ID) is None
    assert await secure.instances() == {}
    assert secure.logs(ID) == f"logs of {ID}"
    assert not hasattr(secure, "nothing_like_it")
