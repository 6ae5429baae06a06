"""Only names with our owner are ever ours."""
from __future__ import annotations

import pytest

from replicas.provisioners import LaunchError, NoCapacity, owned_by


@pytest.mark.parametrize(
    "name", ["r1-gw-0badcafe-1", "deepseek-r1-gw-0badcafe-120", "a-gw-deadbeef-1-gw-0badcafe-2"]
)
def test_a_name_with_our_owner_is_ours(name: str) -> None:
    assert owned_by(name, "0badcafe")


@pytest.mark.parametrize(
    "name",
    ["r1-A100", "r1-gw-deadbeef-1", "r1-gw-0badcafe-", "r1-gw-0badcafe-x", "-gw-0badcafe-1",
     "r1-gw-0badcafe-1-old", "r1-gw-0badcafe", "r1-gw-0badcafe-²", ""],
)
def test_any_other_name_is_not(name: str) -> None:
    assert not owned_by(name, "0badcafe")


def test_no_capacity_is_a_launch_error_worth_repeating() -> None:
    error = NoCapacity("no H200 in us-east-1")
    assert isinstance(error, LaunchError)
    assert not error.permanent
    assert error.reason == str(error) == "no H200 in us-east-1"
