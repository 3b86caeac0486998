"""The native node table decides as its readable twin does: the same calls, on both, with the same answers."""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvtest_scoring_pair import Pair
from hypervisor.ext import scoring
from hypervisor.ext.scoring import _request_c, _table_c, tie_key


@pytest.mark.parametrize("plain", [False, True], ids=["vectors", "no-vectors"])
@pytest.mark.parametrize("seed", range(12))
def test_native_and_twin_decide_alike_through_random_histories(seed: int, plain: bool) -> None:
    rng = random.Random(seed)
    pair = Pair(rng, plain=plain)
    pair.prepare(rng.choice([1, 63, 64, 65, 130]))
    requests = [pair.request() for _ in range(6)]

    for _ in range(200):
        requests[rng.randrange(6)] = pair.request() if rng.random() < 0.2 else requests[0]
        if rng.random() < 0.04:
            pair.drop_and_add()
        pair.step(requests)

    for slot in pair.twin.slots():
        pair.both("node", slot)
        for request in requests:
            pair.both("explain", request, slot)
    for counter in pair.counters:
        for domain in range(100):
            pair.both("count", counter, domain)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 70), st.integers(0, 40))
def test_a_batch_is_the_same_as_one_after_another(seed: int, nodes: int, count: int) -> None:
    first, second = (Pair(random.Random(seed)) for _ in range(2))
    first.prepare(nodes)
    second.prepare(nodes)
    request, alike = first.request()[0], second.request()[0]

    batch = first.native.place_batch(request, count, seed)

    one_by_one = [second.native.place(alike, seed) for _ in range(count)]
    assert batch == [found for found in one_by_one if found is not None]


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_ties_are_broken_whatever_the_order_of_slots(rng: random.Random) -> None:
    hashes = [rng.getrandbits(64) for _ in range(150)]
    chosen = []
    for _ in range(2):
        rng.shuffle(hashes)
        table = _table_c.NodeTable()
        for one in hashes:
            table.set_node(table.add_node(one), 8, 8, 8, 8, 8, 8, 0, -1, 0)
        found = table.pick(_request_c.Request(cpu=1), 77)
        assert found is not None
        chosen.append(table.node(found[0]).node_hash)

    assert chosen == [min(hashes, key=lambda one: tie_key(77, one))] * 2


def test_a_table_never_gives_more_than_there_is() -> None:
    table = _table_c.NodeTable()
    for one in range(1000):
        table.set_node(table.add_node(one), 7, 7, 100, 100, 100, 100, 0, -1, 0)

    placed = table.place_batch(_request_c.Request(cpu=2, memory=1), 10_000)

    assert len(placed) == 3000
    assert all(table.node(slot).cpu_free == 1 for slot in table.slots())


@pytest.mark.skipif(os.environ.get("HYPERVISOR_EXT_PURE") == "1", reason="the twin was asked for")
def test_the_native_table_is_the_one_in_use() -> None:
    assert scoring.implementation == "native"
    assert scoring.NodeTable is _table_c.NodeTable
