"""The native node table decides as its readable twin does: the same calls, on both, with the same answers."""

import os
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.ext import scoring
from hypervisor.ext.scoring import _request_py, _table_c, _table_py, tie_key

BIG = scoring.MAX_AMOUNT


class Pair:
    """Both tables, led through the same random history; ids differ between them, slots do not."""

    def __init__(self, rng: random.Random, *, plain: bool = False) -> None:
        self.rng = rng
        self.native: Any = _table_c.NodeTable(plain=plain)  # type: ignore[call-arg]
        self.twin = _table_py.NodeTable()
        self.groups: list[tuple[int, int]] = []
        self.classes: list[tuple[int, int]] = []
        self.preferences: list[tuple[int, int]] = []
        self.counters: list[tuple[int, int]] = []

    def both(self, name: str, *arguments: Any) -> Any:
        """Call both; the answers, or the kinds of the errors, have to be the same."""
        answers = []
        for index, table in enumerate((self.native, self.twin)):
            mine = [one[index] if isinstance(one, tuple) else one for one in arguments]
            try:
                answer = getattr(table, name)(*mine)
                answers.append(_without_ids(answer) if name == "explain" else answer)
            except (ValueError, KeyError) as exc:
                answers.append(type(exc))
        assert answers[0] == answers[1], (name, arguments, answers)
        return answers[0]

    def make(self, name: str, *arguments: Any) -> tuple[int, int]:
        return (
            getattr(self.native, name)(*(one[0] for one in arguments)),
            getattr(self.twin, name)(*(one[1] for one in arguments)),
        )

    def prepare(self, nodes: int) -> None:
        self.groups = [self.make("add_group") for _ in range(2)]
        self.counters = [self.make("add_counter", self.rng.choice(self.groups)) for _ in range(4)]
        self.classes = [self.make("add_class") for _ in range(3)]
        self.preferences = [self.make("add_preference") for _ in range(2)]
        for _ in range(nodes):
            self.add_node()

    def add_node(self) -> None:
        slot = self.both("add_node", self.rng.getrandbits(64))
        self.set_node(slot)
        for group in self.groups:
            self.both("set_domain", group, slot, self.rng.choice([-1, 0, 1, 2, self.rng.randrange(100)]))
        for one in self.classes:
            self.both("set_class", one, slot, self.rng.random() < 0.8)
        for one in self.preferences:
            self.both("set_preference", one, slot, self.rng.choice([0, 1000, self.rng.randrange(1001)]))

    def set_node(self, slot: int) -> None:
        columns: list[int] = []
        for most in (16, 64, 400):
            total = self.rng.choice([0, most, most, most, BIG]) if self.rng.random() < 0.2 else most
            columns += [total, self.rng.randint(-total // 8, total)]
        load = self.rng.choice([-1, 0, 1000, self.rng.randrange(1001)])
        self.both(
            "set_node", slot, *columns, self.rng.choice([1, 3, 7]), load, self.rng.choice([0, 0, 500, 1000])
        )

    def request(self) -> tuple[Any, Any]:
        rng = self.rng
        some = lambda ids, most: rng.sample(ids, min(len(ids), rng.randint(0, most)))  # noqa: E731
        plain: dict[str, Any] = {
            "cpu": rng.choice([0, 1, 2, 5]),
            "memory": rng.choice([0, 1, 8, 20]),
            "disk": rng.choice([0, 10]),
            "bits": rng.choice([0, 1, 2, 5]),
            "policy": rng.choice([scoring.BINPACK, scoring.SPREAD]),
            "utilisation_weight": rng.choice([0, 1, 1000]),
            "load_weight": rng.choice([0, 0, 7]),
            "penalty_weight": rng.choice([0, 0, 11]),
            "slot": rng.choice([-1] * 9 + [rng.randrange(80)]),
        }
        ids = {"classes": some(self.classes, 2), "affinity": some(self.counters, 1)}
        ids |= {"anti_affinity": some(self.counters, 1), "adds": some(self.counters, 3)}
        if rng.random() < 0.5:
            ids["affinity"] = []
        weighted = {"preferences": [(one, rng.randrange(4)) for one in some(self.preferences, 2)]}
        for name in ("prefer", "avoid", "spread"):
            weighted[name] = [(one, rng.choice([1, 1000])) for one in some(self.counters, 1)]
        made = [
            kind(
                **plain,
                **{name: [one[index] for one in chosen] for name, chosen in ids.items()},
                **{name: [(one[index], weight) for one, weight in pairs] for name, pairs in weighted.items()},
            )
            for index, kind in enumerate((_table_c.Request, _request_py.Request))
        ]
        return made[0], made[1]

    def step(self, requests: list[tuple[Any, Any]]) -> None:
        """One random change or decision."""
        rng, slots = self.rng, self.twin.slots()
        request, seed = rng.choice(requests), rng.choice([0, rng.getrandbits(64)])
        match rng.randrange(12):
            case 0:
                self.set_node(rng.choice(slots))
            case 1:
                self.both("adjust", rng.choice(slots), *(rng.randint(-3, 3) for _ in range(3)))
            case 2:
                self.both("add_count", rng.choice(self.counters), rng.randrange(100), rng.randint(-1, 2))
            case 3:
                self.both("set_domain", rng.choice(self.groups), rng.choice(slots), rng.randrange(-1, 3))
                self.both("set_class", rng.choice(self.classes), rng.choice(slots), rng.random() < 0.7)
            case 4 if len(slots) > 1:
                self.both("remove_node", rng.choice(slots))
                self.both("node", 200)
            case 5:
                self.add_node()
            case 6:
                self.both("top", request, rng.randrange(300), seed)
            case 7:
                self.both("capacity", request, rng.choice([0, 5, 40]))
            case 8:
                placed = self.both("place", request, seed)
                if placed and rng.random() < 0.3:
                    self.both("unplace", request, placed[0])
            case 9:
                self.both("place_batch", request, rng.randrange(5), seed)
            case _:
                self.both("pick", request, seed)


def _without_ids(judgement: scoring.Judgement) -> scoring.Judgement:
    """Each implementation gives out its own ids."""
    failures = tuple(one._replace(id=0) for one in judgement.failures)
    return judgement._replace(failures=failures, parts=tuple(one._replace(id=0) for one in judgement.parts))


@pytest.mark.parametrize("plain", [False, True], ids=["vectors", "no-vectors"])
@pytest.mark.parametrize("seed", range(12))
def test_native_and_twin_decide_alike_through_random_histories(seed: int, plain: bool) -> None:
    rng = random.Random(seed)
    pair = Pair(rng, plain=plain)
    pair.prepare(rng.choice([1, 63, 64, 65, 130]))
    requests = [pair.request() for _ in range(6)]

    for _ in range(150):
        requests[rng.randrange(6)] = pair.request() if rng.random() < 0.2 else requests[0]
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
        found = table.pick(_table_c.Request(cpu=1), 77)
        assert found is not None
        chosen.append(table.node(found[0]).node_hash)

    assert chosen == [min(hashes, key=lambda one: tie_key(77, one))] * 2


def test_a_table_never_gives_more_than_there_is() -> None:
    table = _table_c.NodeTable()
    for one in range(1000):
        table.set_node(table.add_node(one), 7, 7, 100, 100, 100, 100, 0, -1, 0)

    placed = table.place_batch(_table_c.Request(cpu=2, memory=1), 10_000)

    assert len(placed) == 3000
    assert all(table.node(slot).cpu_free == 1 for slot in table.slots())


@pytest.mark.skipif(os.environ.get("HYPERVISOR_EXT_PURE") == "1", reason="the twin was asked for")
def test_the_native_table_is_the_one_in_use() -> None:
    assert scoring.implementation == "native"
    assert scoring.NodeTable is _table_c.NodeTable
