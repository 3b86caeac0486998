"""The native node table beside its twin on a million judgements, and its choices beside a model written from scratch.

A pair of a node and a request is judged by the twin check by check, and by the native table in each of the ways it has:
by blocks, by blocks that are skipped where they cannot hold the best, and from scores kept and brought up to date.
"""

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from hvtest_scoring_pair import Pair
from hypervisor.ext import scoring
from hypervisor.ext.scoring import _request_c, _table_c, tie_key

SEEDS, NODES, CHANGES, REQUESTS = 16, 250, 10, 28
FILTERS = {"slot", "bits", "cpu", "memory", "disk", "class", "affinity", "anti_affinity"}
SCORES = {"utilisation", "load", "penalty", "preference", "prefer", "avoid", "spread"}
assert SEEDS * NODES * CHANGES * REQUESTS >= 1_000_000


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_sixteenth_of_a_million_judgements_are_those_of_the_twin(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(rng, plain=seed % 4 == 3, most=[rng.randrange(1 << bits) for bits in (17, 24, 14)])
    pair.prepare(NODES)
    requests = [pair.request() for _ in range(REQUESTS)]
    judged = passed = 0
    kinds: Counter[str] = Counter()

    for _ in range(CHANGES):
        for index in range(REQUESTS):
            request = pair.request() if rng.random() < 0.5 else requests[index]
            requests[index] = request
            pair.change()
            tie = rng.getrandbits(64)
            # All that pass, with their scores; a node left out was found failing by both.
            passing = pair.both("top", request, NODES + CHANGES * REQUESTS, tie)
            judged += len(pair.twin)
            passed += len(passing)
            best = max((score for _, score in passing), default=-1)
            for other in (tie, tie ^ 1):
                equal = [slot for slot, score in passing if score == best]
                first = min(equal, key=lambda s: tie_key(other, pair.twin.node(s).node_hash), default=None)
                assert pair.native.pick(request[0], other) == (None if first is None else (first, best))
            for slot in rng.choices(pair.twin.slots(), k=5):
                explained = pair.both("explain", request, slot)
                kinds.update(one.kind for one in (*explained.failures, *explained.parts))

    assert judged >= 1_000_000 // SEEDS
    assert judged // 50 < passed < judged - judged // 50
    assert kinds.keys() >= FILTERS | SCORES


IDS = ("classes", "affinity", "anti_affinity", "adds")
WEIGHTED = ("preferences", "prefer", "avoid", "spread")
AMOUNTS = ("cpu", "memory", "disk", "bits", "policy", "utilisation_weight", "load_weight", "penalty_weight")


def rebuilt(pair: Pair) -> tuple[Any, dict[int, int], dict[int, int]]:
    """A new native table of what the pair's says of itself, its ids by the old ones, its slots by the old ones."""
    old, new = pair.native, _table_c.NodeTable()
    groups = {one: new.add_group() for one, _ in pair.groups}
    ids = dict(groups)
    ids |= {one: new.add_class() for one, _ in pair.classes}
    ids |= {one: new.add_preference() for one, _ in pair.preferences}
    ids |= {one[0]: new.add_counter(groups[group[0]]) for one, group in pair.counters.items()}
    slots = {}
    for slot in old.slots():
        node_hash, *columns = old.node(slot)
        slots[slot] = new.add_node(node_hash)
        new.set_node(slots[slot], *columns)
        for one, _ in pair.classes:
            new.set_class(ids[one], slots[slot], old.class_value(one, slot))
        for one, _ in pair.preferences:
            new.set_preference(ids[one], slots[slot], old.preference_value(one, slot))
        for one, _ in pair.groups:
            new.set_domain(ids[one], slots[slot], old.domain(one, slot))
    for one, _ in pair.counters:
        for domain in range(100):
            new.add_count(ids[one], domain, old.count(one, domain))
    return new, ids, slots


def translated(request: Any, ids: dict[int, int]) -> Any:
    """The request with other ids."""
    return _request_c.Request(
        **{name: getattr(request, name) for name in AMOUNTS},
        **{name: [ids[one] for one in getattr(request, name)] for name in IDS},
        **{name: [(ids[one], weight) for one, weight in getattr(request, name)] for name in WEIGHTED},
    )


@pytest.mark.parametrize("seed", range(10))
def test_a_table_kept_up_to_date_is_the_same_as_one_built_anew(seed: int) -> None:
    rng = random.Random(1000 + seed)
    pair = Pair(rng)
    pair.prepare(rng.choice([3, 64, 200]))
    compared = 0

    for _ in range(6):
        for _ in range(rng.randrange(3)):
            pair.drop_and_add()
        requests = [one for one in (pair.request() for _ in range(12)) if one[0].slot == -1]
        for _ in range(60):
            pair.step(requests)
        anew, ids, slots = rebuilt(pair)
        for request, _ in requests:
            alike = translated(request, ids)
            for tie in (0, rng.getrandbits(64)):
                mine = pair.native.pick(request, tie)
                assert (mine and (slots[mine[0]], mine[1])) == anew.pick(alike, tie)
                every = pair.native.top(request, 1000, tie)
                assert [(slots[slot], score) for slot, score in every] == anew.top(alike, 1000, tie)
                compared += 1

    assert compared >= 60


class Placements:
    """Nodes, and what was placed on them, counted from the placements alone: the rules once more, in a few lines."""

    def __init__(self, rng: random.Random, nodes: int) -> None:
        self.rng = rng
        self.table: Any = scoring.NodeTable()
        self.zone_group, self.host_group = self.table.add_group(), self.table.add_group()
        self.fast = self.table.add_class()
        self.counters = {
            (app, group): self.table.add_counter(group)
            for app in range(5)
            for group in (self.zone_group, self.host_group)
        }
        self.totals: dict[int, tuple[int, int, int]] = {}
        self.zone: dict[int, int] = {}
        self.is_fast: set[int] = set()
        self.there: list[tuple[dict[str, Any], Any, int]] = []
        for number in range(nodes):
            slot = self.table.add_node(rng.getrandbits(64))
            totals = rng.randrange(2, 20), rng.randrange(10, 80), rng.randrange(0, 100)
            self.totals[slot] = totals
            cpu, memory, disk = totals
            self.table.set_node(slot, cpu, cpu, memory, memory, disk, disk, 0, -1, 0)
            self.zone[slot] = rng.randrange(-1, 4)
            self.table.set_domain(self.zone_group, slot, self.zone[slot])
            self.table.set_domain(self.host_group, slot, number)
            if rng.random() < 0.5:
                self.is_fast.add(slot)
                self.table.set_class(self.fast, slot, True)

    def wanted(self) -> tuple[dict[str, Any], Any]:
        """What to place, as the model reads it, and as a request."""
        rng = self.rng
        model: dict[str, Any] = {
            "amounts": (rng.randrange(3), rng.randrange(8), rng.randrange(6)),
            "app": rng.randrange(5),
            "fast": rng.random() < 0.3,
            "near": rng.choice([None] * 4 + [(rng.randrange(5), self.zone_group)]),
            "far": rng.choice([None, (rng.randrange(5), rng.choice([self.zone_group, self.host_group]))]),
        }
        cpu, memory, disk = model["amounts"]
        request = scoring.Request(
            cpu=cpu,
            memory=memory,
            disk=disk,
            classes=[self.fast] if model["fast"] else [],
            affinity=[self.counters[model["near"]]] if model["near"] else [],
            anti_affinity=[self.counters[model["far"]]] if model["far"] else [],
            adds=[self.counters[model["app"], group] for group in (self.zone_group, self.host_group)],
            policy=rng.choice([scoring.BINPACK, scoring.SPREAD]),
        )
        return model, request

    def may_take(self, slot: int, model: dict[str, Any]) -> bool:
        """Whether a node may take one more."""
        used = [sum(column) for column in zip(*self._amounts(slot), (0, 0, 0), strict=True)]
        if any(
            have + want > total
            for have, want, total in zip(used, model["amounts"], self.totals[slot], strict=True)
        ):
            return False
        if model["fast"] and slot not in self.is_fast:
            return False
        if model["near"] and not self._count(slot, *model["near"]):
            return False
        return not (model["far"] and self._count(slot, *model["far"]))

    def _amounts(self, slot: int) -> Iterable[tuple[int, int, int]]:
        return (model["amounts"] for model, _, there in self.there if there == slot)

    def _count(self, slot: int, app: int, group: int) -> int:
        """How many of an application are in the node's domain."""
        if group == self.host_group:
            return sum(1 for model, _, there in self.there if there == slot and model["app"] == app)
        if self.zone[slot] == -1:
            return 0
        zone = self.zone[slot]
        return sum(1 for model, _, there in self.there if self.zone[there] == zone and model["app"] == app)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_placed_where_it_may_not_be_and_refused_only_where_nothing_may_take_it(seed: int) -> None:
    rng = random.Random(seed)
    world = Placements(rng, 40)
    placed = refused = 0

    for _ in range(150):
        wanted = [world.wanted() for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.2:
            wanted = [wanted[0]] * rng.randrange(1, 20)
            found = world.table.place_batch(wanted[0][1], len(wanted), rng.getrandbits(64))
            found += [None] * (len(found) < len(wanted))  # one refusal ends a batch
        else:
            found = world.table.place_many([one for _, one in wanted], [rng.getrandbits(64) for _ in wanted])
        for (model, request), one in zip(wanted, found, strict=False):
            if one is None:
                assert not any(world.may_take(slot, model) for slot in world.totals)
                refused += 1
            else:
                assert world.may_take(one[0], model)
                world.there.append((model, request, one[0]))
                placed += 1
        for _ in range(rng.randrange(3)):
            if world.there:
                _, request, slot = world.there.pop(rng.randrange(len(world.there)))
                world.table.unplace(request, slot)

    assert placed > 100
    assert refused > 10
    for slot, totals in world.totals.items():
        row = world.table.node(slot)
        used = [sum(column) for column in zip(*world._amounts(slot), (0, 0, 0), strict=True)]
        assert [row.cpu_free, row.memory_free, row.disk_free] == [
            total - have for total, have in zip(totals, used, strict=True)
        ]
