"""Lending out URLs that somebody else serves."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from replicas.provisioners import NoCapacity
from replicas.provisioners.static import StaticProvisioner, base_url
from replicas.spec import Service

Build = Callable[..., Service]

A, B, C = "http://10.0.0.5:30000", "http://10.0.0.6:30000", "http://10.0.0.7:30000"
OWNER = "0badcafe"


def replica(n: int) -> str:
    return f"tiny-gw-{OWNER}-{n}"


async def test_each_replica_gets_another_url(tmp_path: Path, service: Build) -> None:
    provisioner = StaticProvisioner([A, B], tmp_path, OWNER, price=2.5)
    await provisioner.launch(replica(1), service(), {})
    await provisioner.launch(replica(2), service(), {})
    found = await provisioner.instances()
    assert {instance.url for instance in found.values()} == {A, B}
    assert {instance.hourly_cost for instance in found.values()} == {2.5}
    assert repr(provisioner) == "<StaticProvisioner 2 of 2 URLs assigned>"


async def test_the_same_url_twice_is_one_server(tmp_path: Path, service: Build) -> None:
    provisioner = StaticProvisioner([A, A + "/", "10.0.0.5:30000"], tmp_path, OWNER)
    await provisioner.launch(replica(1), service(), {})
    with pytest.raises(NoCapacity, match="all 1 servers"):
        await provisioner.launch(replica(2), service(), {})


async def test_a_server_that_was_just_given_back_is_tried_last(tmp_path: Path, service: Build) -> None:
    provisioner = StaticProvisioner([A, B, C], tmp_path, OWNER)
    urls = []
    for n in range(1, 6):
        await provisioner.launch(replica(n), service(), {})
        urls.append((await provisioner.instances())[replica(n)].url)
        await provisioner.terminate(replica(n))
    assert urls == [A, B, C, A, B]


async def test_a_url_that_left_the_command_line_is_a_dead_replica(tmp_path: Path, service: Build) -> None:
    await StaticProvisioner([A, B], tmp_path, OWNER).launch(replica(1), service(), {})
    later = StaticProvisioner([B], tmp_path, OWNER)
    instance = (await later.instances())[replica(1)]
    assert not instance.alive
    assert instance.detail == f"{A} is no longer given with --replica"
    await later.launch(replica(2), service(), {})
    assert (await later.instances())[replica(2)].url == B


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("10.0.0.5:30000", A),
        ("http://10.0.0.5:30000/", A),
        ("https://sglang.example.com/r1/", "https://sglang.example.com/r1"),
        ("localhost:30000", "http://localhost:30000"),
        ("http://[::1]:30000", "http://[::1]:30000"),
    ],
)
def test_a_url_is_taken_with_or_without_scheme_and_path(text: str, url: str) -> None:
    assert base_url(text) == url


@pytest.mark.parametrize(
    "text",
    ["", "http://", "ftp://a", "http://a:port", "http://a:0", "http://a?x=1", "http://u:k@a", "http://a:99999"],
)
def test_what_is_no_url_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not the URL of a server, such as http"):
        base_url(text)
