"""The rule that stops forwarding loops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.transport.trail import (
    HOPS_MAX,
    INNER,
    UPWARD,
    Hop,
    LoopRefused,
    Trail,
    arrived,
    extend,
    show,
    trail_of,
    well_formed,
)

CLUSTERS = st.sampled_from(["a", "b", "c"])
KINDS = st.sampled_from([INNER, UPWARD])
HOPS = st.lists(st.tuples(CLUSTERS, KINDS), max_size=20)


def test_the_longest_honest_way() -> None:
    trail = extend((), "eu", INNER)  # a standby of eu hands over to its active
    assert arrived(trail, "eu", INNER) == trail
    trail = extend(trail, "eu", UPWARD)  # which cannot write, and asks its primary
    assert arrived(trail, "us", UPWARD) == trail
    assert show(trail) == "eu:inner > eu:upward"


@pytest.mark.parametrize(
    ("trail", "cluster", "kind"),
    [
        pytest.param([("eu", INNER)], "eu", INNER, id="two standbys that think the other is active"),
        pytest.param([("eu", UPWARD)], "eu", UPWARD, id="a secondary that is its own primary"),
        pytest.param([("eu", UPWARD)], "eu", INNER, id="up and then sideways in the same cluster"),
        pytest.param([("eu", UPWARD), ("us", UPWARD)], "eu", UPWARD, id="two secondaries of each other"),
        pytest.param([("eu", INNER), ("eu", UPWARD), ("us", UPWARD)], "eu", INNER, id="back at the start"),
        pytest.param([], "eu", "sideways", id="an unknown kind"),
    ],
)
def test_hops_that_are_refused(trail: list[tuple[str, str]], cluster: str, kind: str) -> None:
    with pytest.raises(LoopRefused) as refused:
        extend(trail_of(trail), cluster, kind)
    assert refused.value.status == 503
    for cluster_id, _ in trail:
        assert cluster_id in str(refused.value)


@pytest.mark.parametrize(
    ("trail", "cluster", "kind"),
    [
        pytest.param([], "us", UPWARD, id="no hop at all"),
        pytest.param([("us", UPWARD)], "us", UPWARD, id="from ourselves"),
        pytest.param([("us", INNER), ("eu", UPWARD)], "us", UPWARD, id="we were passed already"),
        pytest.param([("eu", INNER)], "us", INNER, id="an inner hop of another cluster"),
        pytest.param([("eu", INNER)], "us", UPWARD, id="an inner hop shown as upward"),
        pytest.param([("eu", UPWARD), ("eu", UPWARD)], "us", UPWARD, id="a trail that could not have grown"),
    ],
)
def test_arrivals_that_are_refused(trail: list[tuple[str, str]], cluster: str, kind: str) -> None:
    with pytest.raises(LoopRefused):
        arrived(trail_of(trail), cluster, kind)


@given(HOPS)
def test_whatever_is_tried_each_cluster_is_left_once_each_way(tries: list[tuple[str, str]]) -> None:
    trail: Trail = ()
    for cluster, kind in tries:
        try:
            trail = extend(trail, cluster, kind)
        except LoopRefused:
            continue
    assert len(set(trail)) == len(trail) <= 2 * 3
    runs = [hop.cluster_id for n, hop in enumerate(trail) if n == 0 or trail[n - 1].cluster_id != hop.cluster_id]
    assert len(set(runs)) == len(runs), "a cluster that was left is never entered again"
    assert well_formed(trail)


@given(HOPS)
def test_well_formed_agrees_with_a_second_statement_of_the_rule(hops: list[tuple[str, str]]) -> None:
    trail = trail_of(hops)
    wanted = len(trail) <= HOPS_MAX
    left: list[str] = []
    for n, (cluster, kind) in enumerate(hops):
        after_own_inner = kind == UPWARD and n > 0 and hops[n - 1] == (cluster, INNER)
        wanted = wanted and (after_own_inner or cluster not in left)
        left.append(cluster)
    assert well_formed(trail) is wanted


def test_a_trail_is_bounded() -> None:
    trail = tuple(Hop(f"cluster-{n}", UPWARD) for n in range(HOPS_MAX))
    assert well_formed(trail)
    with pytest.raises(LoopRefused):
        extend(trail, "one more", UPWARD)
