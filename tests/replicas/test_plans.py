"""On which hardware a replica may run, and in which order that is tried."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas import plans
from replicas.plans import Market, Menu, Options, Plan, PlanError, Spending
from replicas.spec import Service, parse

NOW = 1_800_000_000.0
HOUR = 3600.0

H200, H100, A100 = Plan("H200:8", 1), Plan("H100:8", 2), Plan("A100-80GB:8", 4)

YAML = """
name: r1
num_nodes: 2
resources: {{ports: 30000, {resources}}}
run: python -m sglang.launch_server --model-path m --port 30000 --api-key $REPLICA_API_KEY
service:
  readiness_probe: /health
  replica_policy: {{min_replicas: 0, max_replicas: 2, {policy}}}
"""

names = st.from_regex(r"[A-Za-z0-9][-A-Za-z0-9.]{0,8}", fullmatch=True)
kinds = st.builds(lambda name, count: f"{name}:{count}", names, st.integers(1, 16))
any_plan = st.one_of(
    st.builds(
        Plan,
        st.none() | kinds,
        st.none() | st.integers(1, 64),
        st.none() | st.booleans(),
        st.none() | st.from_regex(r"[a-z0-9]+(/[-a-z0-9]+)?", fullmatch=True),
    )
)


def service(resources: str = "accelerators: H200:8", policy: str = "") -> Service:
    return parse(YAML.format(resources=resources, policy=policy), "r1.yaml")


def named(found: tuple[Plan, ...]) -> list[str]:
    return [plan.name for plan in found]


# ------------------------------------------------------------ how they are written


def test_a_plan_is_accelerators_by_nodes() -> None:
    assert plans.parse("H100:8x2") == H100
    assert plans.parse(" A100-80GB:8x4 ") == A100
    assert plans.parse("H200:8") == H200


@pytest.mark.parametrize(
    "text", ["", "H200", "H200:8x0", "H200:0x1", "H200:x2", ":8x1", "H200:8x2x3", "H 2:8"]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PlanError, match="such as H100:8x2"):
        plans.parse(text)


def test_accelerators_without_a_count_are_one() -> None:
    assert plans.accelerators("L4") == "L4:1"
    assert plans.accelerators("H200:8") == "H200:8"
    assert plans.accelerators("L4:0.5") == "L4:0.5"
    for wrong in ("", "H200:0", "a b"):
        with pytest.raises(PlanError, match="such as H200:8"):
            plans.accelerators(wrong)


def test_a_name_says_only_what_the_plan_decides() -> None:
    assert Plan().name == ""
    assert replace(H100, use_spot=True).name == "H100:8x2 spot"
    assert Plan(num_nodes=4, use_spot=False, infra="aws/us-east-1").name == "x4 on-demand infra=aws/us-east-1"


@given(any_plan)
def test_a_plan_can_be_read_from_its_name(plan: Plan) -> None:
    assert plans.read(plan.name) == plan


@given(st.text())
def test_any_text_in_a_row_is_read_as_some_plan(text: str) -> None:
    plans.read(text)


def test_variables_and_limits_make_no_other_plan_and_secrets_are_not_shown() -> None:
    with_more = replace(H100, envs={"A": "1"}, secrets={"HF_TOKEN": "hf_secret"}, max_hourly_cost=3.0)
    assert with_more == H100
    assert "hf_secret" not in repr(with_more) + repr(Options(secrets={"HF_TOKEN": "hf_secret"}))


def test_prices_are_of_a_kind_of_node_or_of_any_replica() -> None:
    assert plans.parse_prices(["H200:8=27.5", "L4=0.5", "2"]) == {"H200:8": 27.5, "L4:1": 0.5, "": 2.0}


@pytest.mark.parametrize("text", ["free", "H200:8=", "H200:8=nan", "H200:8=-1", "H200:8=inf", "="])
def test_a_price_that_is_no_number_of_dollars_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"such as H200:8=27\.5"):
        plans.parse_prices([text])


# ------------------------------------------------------------ what the YAML and the flags allow


@pytest.mark.parametrize(
    ("resources", "policy", "said", "market"),
    [
        ("accelerators: H200:8", "", None, Market.YAML),
        ("accelerators: H200:8", "", True, Market.SPOT),
        ("accelerators: H200:8", "", False, Market.ON_DEMAND),
        ("use_spot: true", "", None, Market.SPOT),
        ("use_spot: true", "dynamic_ondemand_fallback: true", None, Market.SPOT_FIRST),
        ("use_spot: true", "dynamic_ondemand_fallback: true", False, Market.ON_DEMAND),
        ("any_of: [{use_spot: true}, {use_spot: false}]", "", None, Market.SPOT_FIRST),
        ("any_of: [{infra: aws, use_spot: true}, {infra: gcp}]", "", None, Market.MIXED),
        ("ordered: [{infra: aws, use_spot: true}, {infra: gcp, use_spot: true}]", "", None, Market.SPOT),
    ],
)
def test_spot_is_what_the_yaml_or_the_flag_says(
    resources: str, policy: str, said: bool | None, market: Market
) -> None:
    assert plans.menu(service(resources, policy), Options(use_spot=said)).market is market


def test_without_flags_the_yaml_decides_everything() -> None:
    assert named(plans.choices(plans.menu(service(), Options()), NOW)) == [""]


def test_gpus_and_num_nodes_make_one_plan() -> None:
    menu = plans.menu(service(), Options(gpus="H100:8", num_nodes=4, infra="k8s"))
    assert named(plans.choices(menu, NOW)) == ["H100:8x4 infra=k8s"]


def test_every_plan_carries_the_variables() -> None:
    options = Options(plans=(H200, H100), envs={"A": "1"}, secrets={"B": "2"})
    assert options.variables == {"A": "1", "B": "2"}
    for plan in plans.menu(service(), options).plans:
        assert (plan.envs, plan.secrets) == ({"A": "1"}, {"B": "2"})


@pytest.mark.parametrize(
    ("resources", "own"),
    [
        ("accelerators: H200:8", ("H200:8",)),
        ("accelerators: {H200:8, H100:8}", ("H200:8", "H100:8")),  # YAML: keys without values
        ("accelerators: {H200: 8, L4: 1}", ("H200:8", "L4:1")),
        ("accelerators: [H200:8, 'H100:8']", ("H200:8", "H100:8")),
        ("any_of: [{accelerators: H200:8}, {accelerators: L4}]", ("H200:8", "L4:1")),
        ("cpus: 4", ()),
        ("accelerators: 'tpu v5'", ()),
    ],
)
def test_the_yamls_own_accelerators_are_known(resources: str, own: tuple[str, ...]) -> None:
    assert plans.menu(service(resources), Options()).own == own


# ------------------------------------------------------------ what is tried, in which order


def three(market: Market = Market.YAML, **more: Any) -> Menu:
    return Menu(plans=(H200, H100, A100), market=market, **more)


def test_plans_are_tried_in_the_order_in_which_they_were_given() -> None:
    assert named(plans.choices(three(), NOW)) == ["H200:8x1", "H100:8x2", "A100-80GB:8x4"]


def test_spot_of_every_plan_comes_before_on_demand_of_any() -> None:
    assert named(plans.choices(three(Market.SPOT_FIRST), NOW)) == [
        *("H200:8x1 spot", "H100:8x2 spot", "A100-80GB:8x4 spot"),
        *("H200:8x1 on-demand", "H100:8x2 on-demand", "A100-80GB:8x4 on-demand"),
    ]
    assert named(plans.choices(three(Market.ON_DEMAND), NOW))[0] == "H200:8x1 on-demand"


def test_the_base_replicas_are_on_demand_and_the_others_spot() -> None:
    menu = Menu(market=Market.SPOT, base_ondemand=1)
    assert named(plans.choices(menu, NOW, on_demand=0)) == ["on-demand"]
    assert named(plans.choices(menu, NOW, on_demand=1)) == ["spot"]
    assert named(plans.choices(Menu(base_ondemand=1), NOW)) == [""]  # nothing here is spot


def test_after_three_spot_losses_in_two_hours_six_hours_are_on_demand() -> None:
    menu = Menu(market=Market.SPOT_FIRST)
    losses = [NOW, NOW + HOUR, NOW + 2 * HOUR]
    third = losses[-1]
    assert named(plans.choices(menu, third, losses=losses)) == ["on-demand"]
    assert named(plans.choices(menu, third + 6 * HOUR - 1, losses=losses)) == ["on-demand"]
    assert named(plans.choices(menu, third + 6 * HOUR, losses=losses)) == ["spot", "on-demand"]
    assert named(plans.choices(menu, third, losses=losses[:2])) == ["spot", "on-demand"]
    slow = [NOW, NOW + HOUR, NOW + 2 * HOUR + 1]
    assert named(plans.choices(menu, slow[-1], losses=slow)) == ["spot", "on-demand"]


def test_spot_losses_bring_no_on_demand_where_nobody_allowed_it() -> None:
    menu = Menu(market=Market.SPOT)
    assert named(plans.choices(menu, NOW, losses=[NOW, NOW, NOW])) == ["spot"]


@given(st.lists(st.integers(0, 100_000), max_size=8))
def test_the_order_in_which_losses_are_told_does_not_matter(losses: list[int]) -> None:
    until = plans.on_demand_until(losses)
    assert until == plans.on_demand_until(losses[::-1])
    assert (until == 0) or (until - plans.ON_DEMAND_FOR in losses)


@given(st.permutations([H200, H100, A100]), st.integers(1, 3))
def test_following_goes_through_all_and_around(order: list[Plan], n: int) -> None:
    options = order[:n]
    plan, seen = options[0], []
    for _ in range(2 * n):
        seen.append(plan)
        plan = plans.following(options, plan)
    assert seen == options * 2


def test_a_plan_that_is_no_choice_any_more_is_followed_by_the_first() -> None:
    assert plans.following((H200, H100), A100) == H200


# ------------------------------------------------------------ money


def priced(**more: Any) -> Options:
    return Options(prices={"H200:8": 40.0, "h100:8": 25.0}, **more)


def test_a_price_is_that_of_all_nodes() -> None:
    menu = three(options=priced())
    assert [menu.price(plan) for plan in menu.plans] == [40.0, 50.0, None]


def test_what_the_yaml_leaves_open_costs_the_dearest_of_it() -> None:
    both = plans.menu(service("accelerators: {H200:8, H100:8}"), priced())
    assert both.price(Plan()) == 80.0  # two nodes, by the YAML
    assert both.price(Plan(num_nodes=1)) == 40.0
    assert plans.menu(service("accelerators: {H200:8, L4:1}"), priced()).price(Plan()) is None
    assert Menu(options=Options(prices={"": 2.0})).price(H200) == 2.0


def test_a_plan_that_would_pass_the_hourly_limit_is_not_tried() -> None:
    menu = three(options=priced(max_hourly_cost=45.0))
    assert named(plans.choices(menu, NOW)) == ["H200:8x1", "A100-80GB:8x4"]
    assert plans.refusal(menu, Spending()) is None


def test_skypilot_looks_after_the_limit_where_the_price_is_not_known() -> None:
    found = plans.choices(three(options=priced(max_hourly_cost=48.0)), NOW, spending=Spending(hourly=8.0))
    assert [plan.max_hourly_cost for plan in found] == [None, 10.0]  # of each of four nodes


def test_what_runs_already_counts() -> None:
    menu = three(options=priced(max_hourly_cost=60.0))
    spending = Spending(hourly=60.0)
    assert plans.choices(menu, NOW, spending=spending) == ()
    why = plans.refusal(menu, spending)
    assert why == "replicas cost $60.00 an hour now, and --max-hourly-cost is $60.00"
    nothing = three(options=priced(max_hourly_cost=0.0))
    assert plans.refusal(nothing, Spending()) == "nothing may cost anything, and --max-hourly-cost is $0.00"


def test_when_every_plan_is_too_dear_the_cheapest_is_named() -> None:
    menu = Menu(plans=(H200, H100), options=priced(max_hourly_cost=30.0))
    assert plans.choices(menu, NOW) == ()
    why = "the cheapest plan costs $40.00 an hour, and --max-hourly-cost is $30.00"
    assert plans.refusal(menu, Spending()) == why
    busy = plans.refusal(menu, Spending(hourly=20.0))
    assert busy == f"replicas cost $20.00 an hour now, {why}"


def test_the_daily_limit_stops_launches_when_it_is_reached() -> None:
    menu = Menu(options=Options(max_daily_cost=100.0))
    assert plans.refusal(menu, Spending(day=99.99)) is None
    why = "$100.00 were spent within 24 hours, and --max-daily-cost is $100.00"
    assert plans.refusal(menu, Spending(day=100.0)) == why


@given(
    st.lists(st.tuples(st.sampled_from([H200, H100, A100]), st.floats(0, 200)), min_size=1, max_size=4),
    st.floats(0, 300),
    st.floats(0, 300),
    st.sampled_from(list(Market)),
    st.integers(0, 2),
)
def test_no_choice_passes_the_limit_and_a_refusal_means_none(
    offers: list[tuple[Plan, float]], limit: float, hourly: float, market: Market, base: int
) -> None:
    options = Options(prices={str(p.accelerators): d for p, d in offers}, max_hourly_cost=limit)
    menu = Menu(tuple(p for p, _ in offers), market, base, options=options)
    found = plans.choices(menu, NOW, spending=Spending(hourly))
    for plan in found:
        assert hourly + (menu.price(plan) or 0.0) <= limit + 1e-9
    assert (plans.refusal(menu, Spending(hourly)) is not None) == (found == ())


# ------------------------------------------------------------ what SkyPilot gets


RECIPE: dict[str, Any] = {
    "num_nodes": 2,
    "resources": {
        "accelerators": {"H200:8": None, "H100:8": None},
        "disk_size": 1024,
        "any_of": [{"use_spot": True}, {"use_spot": False}],
    },
}


def test_a_plan_takes_the_place_of_the_yamls_hardware() -> None:
    task = plans.apply(copy.deepcopy(RECIPE), replace(A100, use_spot=True))
    assert task["num_nodes"] == 4
    assert task["resources"] == {"disk_size": 1024, "accelerators": "A100-80GB:8", "use_spot": True}


def test_alternatives_keep_what_the_plan_leaves_open() -> None:
    task = plans.apply(copy.deepcopy(RECIPE), Plan("H100:8", 1))
    assert task["resources"]["any_of"] == [{"use_spot": True}, {"use_spot": False}]
    ordered = {"resources": {"ordered": [{"cloud": "aws", "disk_tier": "best"}, {"region": "eu"}]}}
    assert plans.apply(ordered, Plan(infra="gcp"))["resources"] == {
        "ordered": [{"disk_tier": "best"}, {}],
        "infra": "gcp",
    }


def test_one_node_needs_no_fast_network_between_nodes() -> None:
    task = {"resources": {"network_tier": "best", "disk_tier": "best"}}
    assert plans.apply(copy.deepcopy(task), H100)["resources"]["network_tier"] == "best"
    assert plans.apply(copy.deepcopy(task), Plan(num_nodes=1))["resources"] == {"disk_tier": "best"}


def test_a_plan_that_decides_nothing_changes_nothing() -> None:
    assert plans.apply(copy.deepcopy(RECIPE), Plan()) == RECIPE
    assert plans.apply({}, Plan(num_nodes=3)) == {"num_nodes": 3}
    assert plans.apply({}, Plan("L4:1", max_hourly_cost=2.0)) == {
        "resources": {"accelerators": "L4:1", "max_hourly_cost": 2.0}
    }


MIXED: dict[str, Any] = {
    "resources": {
        "disk_size": 1024,
        "any_of": [
            {"accelerators": "H200:8", "use_spot": True},
            {"accelerators": "H100:8"},
            {"accelerators": "A100:8", "use_spot": False},
        ],
    }
}
MIXED_TEXT = (
    "any_of: [{accelerators: H200:8, use_spot: true}, {accelerators: H100:8}, "
    "{accelerators: A100:8, use_spot: false}]"
)


def test_spot_losses_of_a_mixed_yaml_leave_its_on_demand_alternatives_and_no_others() -> None:
    menu = plans.menu(service(MIXED_TEXT), Options())
    assert menu.market is Market.MIXED
    assert named(plans.choices(menu, NOW)) == [""]
    hour = 3600.0
    lost = [NOW - 2 * hour, NOW - hour, NOW]
    assert named(plans.choices(menu, NOW + hour, losses=lost[:2])) == [""]
    (plan,) = plans.choices(menu, NOW + hour, losses=lost)
    assert plan.name == "on-demand"
    assert plans.apply(copy.deepcopy(MIXED), plan)["resources"] == {
        "disk_size": 1024,
        "any_of": [{"accelerators": "H100:8"}, {"accelerators": "A100:8"}],
        "use_spot": False,
    }
    assert named(plans.choices(menu, NOW + 6 * hour + 1, losses=lost)) == [""], "6 hours are over"


def test_replicas_that_are_never_spot_take_a_mixed_yamls_on_demand_alternatives() -> None:
    menu = replace(plans.menu(service(MIXED_TEXT), Options()), base_ondemand=1)
    assert named(plans.choices(menu, NOW, on_demand=0)) == ["on-demand"]
    assert named(plans.choices(menu, NOW, on_demand=1)) == [""]


def test_a_flag_puts_every_alternative_of_a_mixed_yaml_on_its_market() -> None:
    (plan,) = plans.choices(plans.menu(service(MIXED_TEXT), Options(use_spot=False)), NOW)
    kinds = [one["accelerators"] for one in plans.apply(copy.deepcopy(MIXED), plan)["resources"]["any_of"]]
    assert kinds == ["H200:8", "H100:8", "A100:8"]


@given(any_plan)
def test_applying_a_plan_twice_is_applying_it_once(plan: Plan) -> None:
    once = plans.apply(copy.deepcopy(RECIPE), plan)
    assert plans.apply(copy.deepcopy(once), plan) == once
