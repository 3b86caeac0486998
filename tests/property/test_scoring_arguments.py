"""Bad arguments: the native table and its twin refuse the same calls, with the same errors, and change nothing."""

import random
from typing import Any

import pytest

from hvtest_scoring_pair import Pair
from hypervisor.ext import scoring
from hypervisor.ext.scoring import _request_c, _request_py, _table_c, _table_py

MOST = scoring.MAX_AMOUNT
HUGE = 1 << 70


@pytest.fixture
def pair() -> Pair:
    one = Pair(random.Random(1))
    one.prepare(5)
    return one


def made(**arguments: Any) -> tuple[Any, Any]:
    """The same request for both; pairs in lists are taken apart."""
    return tuple(  # type: ignore[return-value]
        kind(**{k: [each[i] for each in v] if isinstance(v, list) else v for k, v in arguments.items()})
        for i, kind in enumerate((_request_c.Request, _request_py.Request))
    )


def refused(answer: Any, kind: type[Exception], message: str = "") -> None:
    """``Pair.both`` has compared the errors already; this is what they have to be."""
    assert answer is kind if kind is KeyError else answer[0] is kind and message in answer[1], answer


def state(pair: Pair) -> object:
    """All that a call could have changed."""
    nodes = [pair.both("node", slot) for slot in pair.twin.slots()]
    return nodes, [pair.both("count", one, domain) for one in pair.counters for domain in range(100)]


AMOUNTS = ("cpu", "memory", "disk")
BAD_FIELDS = (
    *[(name, bad) for name in AMOUNTS for bad in (-1, MOST + 1, HUGE, -HUGE)],
    *[("bits", bad) for bad in (-1, 1 << 31, HUGE)],
    *[("slot", bad) for bad in (-2, scoring.MAX_NODES, HUGE)],
    *[("policy", bad) for bad in (-1, 2)],
    *[(f"{name}_weight", bad) for name in ("utilisation", "load", "penalty") for bad in (-1, 1001)],
    *[
        (name, [bad])
        for name in ("classes", "affinity", "anti_affinity", "adds")
        for bad in (-1, 1 << 63, HUGE)
    ],
    *[
        (name, [(1, bad)])
        for name in ("preferences", "prefer", "avoid", "spread")
        for bad in (-1, 1001, HUGE)
    ],
    *[(name, [(-1, 1)]) for name in ("preferences", "prefer", "avoid", "spread")],
    ("classes", [1] * 5),
    ("affinity", [1] * 17),
    ("anti_affinity", [1] * 17),
    ("adds", [1] * 33),
    ("preferences", [(1, 1)] * 5),
    ("spread", [(1, 1)] * 9),
)
NO_NUMBERS = (
    *[
        (name, bad)
        for name in (*AMOUNTS, "bits", "slot", "policy", "load_weight")
        for bad in (1.0, "1", None)
    ],
    *[(name, [bad]) for name in ("classes", "adds") for bad in (1.0, "1")],
    ("prefer", [(1, 1.5)]),
    ("prefer", [1]),
    ("classes", 1),
    ("memory_mib", 1),
)


def error_of(kind: Any, field: str, value: Any) -> tuple[type[Exception], str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        kind(**{field: value})
    return caught.type, str(caught.value)


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda one: str(one)[:24])
def test_a_request_out_of_range_is_refused_in_the_same_words(field: str, value: Any) -> None:
    native, twin = (error_of(kind, field, value) for kind in (_request_c.Request, _request_py.Request))

    assert native == twin
    assert native[0] is ValueError


@pytest.mark.parametrize(("field", "value"), NO_NUMBERS, ids=lambda one: str(one)[:24])
def test_a_request_of_other_types_is_refused(field: str, value: Any) -> None:
    native, twin = (error_of(kind, field, value) for kind in (_request_c.Request, _request_py.Request))

    assert native[0] is twin[0] is TypeError


NODE = (8, 8, 8, 8, 8, 8, 0, -1, 0)
NAMES = (
    "cpu_total",
    "cpu_free",
    "memory_total",
    "memory_free",
    "disk_total",
    "disk_free",
    "bits",
    "load",
    "penalty",
)


@pytest.mark.parametrize("index", range(len(NODE)))
@pytest.mark.parametrize("bad", [-MOST - 1, MOST + 1, HUGE, -HUGE, 1.0, "1"])
def test_columns_out_of_range_are_refused_and_nothing_is_set(pair: Pair, index: int, bad: Any) -> None:
    before = state(pair)
    columns: list[Any] = [*NODE]
    columns[index] = bad
    if NAMES[index] == "bits" and bad == MOST + 1:
        bad = columns[index] = 1 << 31

    answer = pair.both("set_node", 1, *columns)

    refused(answer, ValueError if isinstance(bad, int) else TypeError, NAMES[index])
    assert state(pair) == before


@pytest.mark.parametrize("bad", [MOST, -2 * MOST, 2 * MOST + 1, HUGE, -HUGE, 1.0])
@pytest.mark.parametrize("index", range(3))
def test_an_adjustment_out_of_range_is_refused_and_nothing_is_set(pair: Pair, index: int, bad: Any) -> None:
    before = state(pair)
    amounts: list[Any] = [1, 1, 1]
    amounts[index] = bad

    refused(
        pair.both("adjust", 1, *amounts), ValueError if isinstance(bad, int) else TypeError, AMOUNTS[index]
    )
    assert state(pair) == before


@pytest.mark.parametrize("slot", [-1, 5, 1 << 40, HUGE, -HUGE, 1.0, "1", None])
def test_a_slot_without_a_node_is_refused_by_every_call(pair: Pair, slot: Any) -> None:
    counter, group = next(iter(pair.counters.items()))
    before = state(pair)
    answers = [
        pair.both("remove_node", slot),
        pair.both("set_node", slot, *NODE),
        pair.both("adjust", slot, 0, 0, 0),
        pair.both("node", slot),
        pair.both("set_class", pair.classes[0], slot, True),
        pair.both("class_value", pair.classes[0], slot),
        pair.both("set_preference", pair.preferences[0], slot, 1),
        pair.both("preference_value", pair.preferences[0], slot),
        pair.both("set_domain", group, slot, 1),
        pair.both("domain", group, slot),
        pair.both("count_near", counter, slot),
        pair.both("explain", made(), slot),
        pair.both("unplace", made(), slot),
    ]

    for answer in answers:
        if isinstance(slot, int):
            refused(answer, KeyError)
        else:
            refused(answer, TypeError, "slot must be an integer")
    assert state(pair) == before


@pytest.mark.parametrize("kind", ["class", "preference", "counter", "group"])
@pytest.mark.parametrize("how", ["dropped", "of another kind", "unknown", "no number"])
def test_an_id_that_is_not_there_is_refused_by_every_call(pair: Pair, kind: str, how: str) -> None:
    groups, counter = (
        [group for group, _ in zip(pair.groups, range(2), strict=True)],
        next(iter(pair.counters)),
    )
    there = {
        "class": pair.classes[0],
        "preference": pair.preferences[0],
        "counter": counter,
        "group": groups[0],
    }
    one: Any = {
        "dropped": there[kind],
        "of another kind": there["class" if kind == "group" else "group"],
        "unknown": HUGE,
        "no number": "1",
    }[how]
    if how == "dropped":
        pair.both(f"drop_{kind}", one)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "class": [("drop_class", one), ("set_class", one, 1, True), ("class_value", one, 1)],
        "preference": [("drop_preference", one), ("set_preference", one, 1, 1), ("preference_value", one, 1)],
        "group": [("drop_group", one), ("set_domain", one, 1, 1), ("domain", one, 1), ("add_counter", one)],
        "counter": [
            ("drop_counter", one),
            ("add_count", one, 1, 1),
            ("count", one, 1),
            ("count_near", one, 1),
        ],
    }

    for call in calls[kind]:
        refused(pair.both(*call), TypeError if how == "no number" else KeyError)


@pytest.mark.parametrize("field", ["classes", "affinity", "anti_affinity", "adds", "preferences", "spread"])
def test_a_request_that_names_what_was_dropped_is_refused_by_every_call(pair: Pair, field: str) -> None:
    name, ids = {"classes": ("class", pair.classes), "preferences": ("preference", pair.preferences)}.get(
        field, ("counter", list(pair.counters))
    )
    one = ids[0]
    weighted = field in {"preferences", "spread"}
    request = made(**{field: [((one[0], 1), (one[1], 1)) if weighted else one]})
    whole = made(cpu=1)
    pair.both(f"drop_{name}", one)
    before = state(pair) if name != "counter" else [pair.both("node", slot) for slot in range(5)]

    for call in ("pick", "place", "top", "place_batch", "capacity", "unplace"):
        extra = () if call in {"pick", "place"} else (1,)
        refused(pair.both(call, request, *extra), KeyError)
    refused(pair.both("place_batch", request, 0), KeyError)
    refused(pair.both("pick_many", [whole, request], [1, 2]), KeyError)
    refused(pair.both("place_many", [whole, request], [1, 2]), KeyError)
    assert before == (state(pair) if name != "counter" else [pair.both("node", slot) for slot in range(5)])


@pytest.mark.parametrize(
    ("seed", "kind"), [(-1, ValueError), (1 << 64, ValueError), (1.0, TypeError), ("1", TypeError)]
)
def test_a_seed_out_of_range_is_refused_and_nothing_is_placed(
    pair: Pair, seed: Any, kind: type[Exception]
) -> None:
    before = state(pair)
    request = made(cpu=1)

    refused(pair.both("add_node", seed), kind, "node_hash")
    refused(pair.both("pick", request, seed), kind, "seed")
    refused(pair.both("place", request, seed), kind, "seed")
    refused(pair.both("top", request, 1, seed), kind, "seed")
    refused(pair.both("place_batch", request, 1, seed), kind, "seed")
    refused(pair.both("pick_many", [request, request], [1, seed]), kind, "seed")
    refused(pair.both("place_many", [request, request], [1, seed]), kind, "seed")
    assert state(pair) == before


@pytest.mark.parametrize(
    ("count", "kind"), [(-1, ValueError), (HUGE, ValueError), (1.0, TypeError), (None, TypeError)]
)
def test_a_number_of_instances_out_of_range_is_refused(pair: Pair, count: Any, kind: type[Exception]) -> None:
    refused(pair.both("top", made(), count), kind, "count")
    refused(pair.both("place_batch", made(), count), kind, "count")
    refused(pair.both("capacity", made(), count), kind, "limit")


def test_as_many_seeds_as_requests_are_asked_for(pair: Pair) -> None:
    for call in ("pick_many", "place_many"):
        refused(pair.both(call, [made()], []), ValueError, "1 requests, 0 seeds")
        refused(pair.both(call, [], [1, 2]), ValueError, "0 requests, 2 seeds")
        assert pair.both(call, [], []) == []


@pytest.mark.parametrize("call", ["pick", "place", "top", "place_batch", "capacity", "unplace", "explain"])
def test_what_is_no_request_is_refused(call: str) -> None:
    for table in (_table_c.NodeTable(), _table_py.NodeTable()):
        table.add_node(1)
        for bad in (None, 1, object()):
            with pytest.raises(TypeError):
                getattr(table, call)(bad, *(() if call in {"pick", "place"} else (0,)))
            for many in ("pick_many", "place_many"):
                with pytest.raises(TypeError):
                    getattr(table, many)([bad], [0])


@pytest.mark.parametrize(
    ("value", "kind"), [(-2, ValueError), (scoring.MAX_DOMAINS, ValueError), (1.0, TypeError)]
)
def test_a_domain_out_of_range_is_refused(pair: Pair, value: Any, kind: type[Exception]) -> None:
    refused(pair.both("set_domain", pair.groups[0], 1, value), kind, "domain")
    refused(pair.both("add_count", next(iter(pair.counters)), value, 1), kind, "domain")
    refused(pair.both("add_count", next(iter(pair.counters)), -1, 1), ValueError, "domain")
    refused(pair.both("set_preference", pair.preferences[0], 1, 1001), ValueError, "value")


@pytest.fixture
def full() -> tuple[Pair, Any, Any]:
    """A table on whose second counter no instance can be counted any more; a request that counts, another one."""
    pair = Pair(random.Random(2))
    pair.prepare(0)
    group = pair.groups[0]
    first, last = pair.make("add_counter", group), pair.make("add_counter", group)
    slot = pair.both("add_node", 7)
    pair.both("set_node", slot, 8, 8, 8, 8, 8, 8, 0, -1, 0)
    pair.both("set_domain", group, slot, 3)
    pair.counters = {first: group, last: group}
    pair.both("add_count", last, 3, MOST - 1)
    return pair, made(cpu=1, adds=[first, last]), made(cpu=1, adds=[first])


@pytest.mark.parametrize("call", ["place", "place_batch", "place_many"])
def test_a_count_beyond_its_range_is_an_error_of_the_call_and_nothing_stays_placed(
    full: tuple[Pair, Any, Any], call: str
) -> None:
    pair, counting, other = full
    message = f"count must be 0..{MOST}, not {MOST + 1}"
    if call == "place":
        pair.both("place", counting)
    before = state(pair)

    if call == "place":
        answer = pair.both("place", counting)
    elif call == "place_batch":
        answer = pair.both("place_batch", counting, 5)
    else:
        answer = pair.both("place_many", [other, counting, other, counting], [1, 2, 3, 4])

    refused(answer, ValueError, message)
    assert state(pair) == before


def test_a_count_below_zero_or_more_free_than_there_is_cannot_be_taken_back(
    full: tuple[Pair, Any, Any],
) -> None:
    pair, counting, other = full
    before = state(pair)

    refused(pair.both("unplace", other, 0), ValueError, f"count must be 0..{MOST}, not -1")
    refused(pair.both("unplace", counting, 0), ValueError, f"count must be 0..{MOST}, not -1")
    refused(pair.both("unplace", made(cpu=1), 0), ValueError, "cpu_free must be")
    pair.both("add_count", next(iter(pair.counters)), 3, 1)
    refused(pair.both("unplace", other, 0), ValueError, "cpu_free must be")
    pair.both("add_count", next(iter(pair.counters)), 3, -1)
    assert state(pair) == before


def test_no_more_groups_than_there_is_room_for(pair: Pair) -> None:
    for _ in range(64 - len(pair.groups)):
        pair.make("add_group")

    refused(pair.both("add_group"), OverflowError, "at most 64 groups")
    pair.both("drop_group", pair.groups[0])
    pair.make("add_group")
