"""What the workers, the probes and the load polls are told of a replica that speaks TLS."""

from __future__ import annotations

import json

from replicas.provisioners import Instance
from replicas.tls import Certificates

from .conftest import World


def secure(world: World) -> str:
    """The certificate of r1, whose first replica has it and is found at a public address."""
    certificates = world.controller.certificates
    cert = certificates.identity("r1").cert
    certificates.decide(world.id(1), "tls")
    world.provisioner.machines[world.id(1)] = Instance(world.id(1), True, "https://34.1.2.3:30000")
    return cert


async def test_a_replica_with_a_certificate_is_pinned_for_workers_and_asked_by_tls(world: World) -> None:
    cert = secure(world)
    await world.become_ready()
    (upstream,) = world.info.upstreams
    assert (upstream.url, upstream.pinned) == ("https://34.1.2.3:30000", True)
    assert world.info.replica_cert == cert
    context = Certificates(world.state_dir).context("r1", world.id(1), upstream.url)
    assert context is not None
    assert world.prober.targets[world.id(1)].context is context
    assert world.loads.targets[world.id(1)].context is context


async def test_after_a_restart_it_is_the_same(world: World) -> None:
    secure(world)
    await world.become_ready()
    before = world.info
    await world.controller.close()
    world.start()
    world.prober.every = True
    await world.step()
    assert (world.info.upstreams, world.info.replica_cert) == (before.upstreams, before.replica_cert)


async def test_a_lost_certificate_ends_in_another_one_never_in_none(world: World) -> None:
    cert = secure(world)
    await world.become_ready()
    await world.controller.close()
    (world.state_dir / "tls" / "r1.pem").unlink()
    world.start()
    world.prober.every = True
    await world.step()
    assert world.info.upstreams[0].pinned
    assert world.info.replica_cert not in (None, cert)


async def test_a_plain_replica_costs_nothing(world: World) -> None:
    await world.become_ready()
    (upstream,) = world.info.upstreams
    assert not upstream.pinned
    assert world.info.replica_cert is None
    assert world.prober.targets[upstream.id].context is None
    assert not (world.state_dir / "tls").exists()


async def test_no_key_is_in_status_or_events(world: World) -> None:
    secure(world)
    await world.become_ready()
    key = world.controller.certificates.identity("r1").key
    said = json.dumps([world.controller.status(), world.events()]) + repr(world.controller) + repr(world.info)
    assert key.splitlines()[1] not in said
    assert "CERTIFICATE" not in said
