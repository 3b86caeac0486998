"""The native node table and its readable twin, led through the same calls: every answer and every error is compared."""

import random
from collections.abc import Sequence
from typing import Any

from hypervisor.ext import scoring
from hypervisor.ext.scoring import _request_c, _request_py, _table_c, _table_py

__all__ = ["Pair"]

BIG = scoring.MAX_AMOUNT
Both = tuple[Any, Any]
"""The native one's and the twin's: of an id or a request."""


class Pair:
    """Both tables. Ids differ between them (see ``Both``), slots do not.

    ``most`` are the usual totals of a node's processors, memory and disk, of which requests ask for a part.
    """

    def __init__(
        self, rng: random.Random, *, plain: bool = False, most: Sequence[int] = (16, 64, 400)
    ) -> None:
        self.rng = rng
        self.most = most
        self.native: Any = _table_c.NodeTable(plain=plain)  # type: ignore[call-arg]
        self.twin = _table_py.NodeTable()
        self.groups: list[Both] = []
        self.classes: list[Both] = []
        self.preferences: list[Both] = []
        self.counters: dict[Both, Both] = {}
        """Each with its group."""

    def both(self, name: str, *arguments: Any) -> Any:
        """Call both; the answers, or the errors, have to be the same. Pairs among the arguments are taken apart."""
        answers: list[Any] = []
        for index, table in enumerate((self.native, self.twin)):
            mine = [
                [_of(index, each) for each in one] if isinstance(one, list) else _of(index, one)
                for one in arguments
            ]
            try:
                answer = getattr(table, name)(*mine)
                answers.append(_without_ids(answer) if name == "explain" else answer)
            except KeyError:
                answers.append(KeyError)
            except (ValueError, TypeError, OverflowError) as exc:
                answers.append((type(exc), str(exc)))
        assert answers[0] == answers[1], (name, arguments, answers)
        return answers[0]

    def make(self, name: str, *arguments: Both) -> Both:
        """Call what gives out an id."""
        return (
            getattr(self.native, name)(*(one[0] for one in arguments)),
            getattr(self.twin, name)(*(one[1] for one in arguments)),
        )

    def prepare(self, nodes: int) -> None:
        """Fill both with nodes, and with something of every kind."""
        self.groups = [self.make("add_group") for _ in range(2)]
        for _ in range(4):
            self.add_counter()
        self.classes = [self.make("add_class") for _ in range(3)]
        self.preferences = [self.make("add_preference") for _ in range(2)]
        for _ in range(nodes):
            self.add_node()

    def add_counter(self) -> None:
        """Add a counter of some group."""
        group = self.rng.choice(self.groups)
        self.counters[self.make("add_counter", group)] = group

    def add_node(self) -> None:
        """Add a node with all of its columns set."""
        slot = self.both("add_node", self.rng.getrandbits(64))
        self.set_node(slot)
        for group in self.groups:
            self.both("set_domain", group, slot, self.rng.choice([-1, 0, 1, 2, self.rng.randrange(100)]))
        for one in self.classes:
            self.both("set_class", one, slot, self.rng.random() < 0.8)
        for one in self.preferences:
            self.both("set_preference", one, slot, self.rng.choice([0, 1000, self.rng.randrange(1001)]))

    def set_node(self, slot: int) -> None:
        """Give a node other columns."""
        columns: list[int] = []
        for most in self.most:
            total = self.rng.choice([0, most, most, most, BIG]) if self.rng.random() < 0.2 else most
            columns += [total, self.rng.randint(-total // 8, total)]
        load = self.rng.choice([-1, 0, 1000, self.rng.randrange(1001)])
        self.both(
            "set_node", slot, *columns, self.rng.choice([1, 3, 7]), load, self.rng.choice([0, 0, 500, 1000])
        )

    def request(self) -> Both:
        """A request that names some of what there is."""
        rng = self.rng
        counters = list(self.counters)

        def some(ids: list[Both], most: int) -> list[Both]:
            return rng.sample(ids, min(len(ids), rng.randint(0, most)))

        cpu, memory, _ = self.most
        plain: dict[str, Any] = {
            "cpu": rng.choice([0, 1, 2, 5, rng.randint(0, cpu)]),
            "memory": rng.choice([0, 1, 8, 20, rng.randint(0, memory)]),
            "disk": rng.choice([0, 10]),
            "bits": rng.choice([0, 1, 2, 5]),
            "policy": rng.choice([scoring.BINPACK, scoring.SPREAD]),
            "utilisation_weight": rng.choice([0, 1, 1000]),
            "load_weight": rng.choice([0, 0, 7]),
            "penalty_weight": rng.choice([0, 0, 11]),
            "slot": rng.choice([-1] * 9 + [rng.randrange(80)]),
        }
        ids = {"classes": some(self.classes, 2), "affinity": some(counters, 1)}
        ids |= {"anti_affinity": some(counters, 1), "adds": some(counters, 3)}
        if rng.random() < 0.5:
            ids["affinity"] = []
        weighted = {"preferences": [(one, rng.randrange(4)) for one in some(self.preferences, 2)]}
        for name in ("prefer", "avoid", "spread"):
            weighted[name] = [(one, rng.choice([1, 1000])) for one in some(counters, 1)]
        kinds: tuple[Any, Any] = (_request_c.Request, _request_py.Request)
        made = [
            kind(
                **plain,
                **{name: [one[index] for one in chosen] for name, chosen in ids.items()},
                **{name: [(one[index], weight) for one, weight in pairs] for name, pairs in weighted.items()},
            )
            for index, kind in enumerate(kinds)
        ]
        return made[0], made[1]

    def drop_and_add(self) -> None:
        """Drop a class, preference, counter or group, and add another; requests that name it fail from then on."""
        match self.rng.choice(["class", "preference", "counter", "counter", "group"]):
            case "class":
                self._drop("drop_class", self.classes)
                self.classes.append(self.make("add_class"))
            case "preference":
                self._drop("drop_preference", self.preferences)
                self.preferences.append(self.make("add_preference"))
            case "counter" if self.counters:
                one = self.rng.choice(list(self.counters))
                del self.counters[one]
                self.both("drop_counter", one)
                self.both("drop_counter", one)
            case _:
                group = self._drop("drop_group", self.groups)
                self.groups.append(self.make("add_group"))
                for one in [one for one, its in self.counters.items() if its == group]:
                    del self.counters[one]
                    self.both("count", one, 0)
        while len(self.counters) < 4:
            self.add_counter()

    def _drop(self, name: str, among: list[Both]) -> Both:
        one = among.pop(self.rng.randrange(len(among)))
        self.both(name, one)
        self.both(name, one)  # KeyError by now
        return one

    def change(self) -> None:
        """One random change of a node or a count."""
        rng, slots = self.rng, self.twin.slots()
        match rng.randrange(6):
            case 0:
                self.set_node(rng.choice(slots))
            case 1:
                self.both("adjust", rng.choice(slots), *(rng.randint(-3, 3) for _ in range(3)))
            case 2:
                counter = rng.choice(list(self.counters))
                self.both("add_count", counter, rng.randrange(100), rng.randint(-1, 2))
            case 3:
                self.both("set_domain", rng.choice(self.groups), rng.choice(slots), rng.randrange(-1, 3))
                self.both("set_class", rng.choice(self.classes), rng.choice(slots), rng.random() < 0.7)
                self.both(
                    "set_preference", rng.choice(self.preferences), rng.choice(slots), rng.randrange(1001)
                )
            case 4 if len(slots) > 1:
                self.both("remove_node", rng.choice(slots))
                self.both("node", 200)
            case _:
                self.add_node()

    def step(self, requests: list[Both]) -> None:
        """One random change or decision."""
        rng = self.rng
        request, seed = rng.choice(requests), rng.choice([0, rng.getrandbits(64)])
        some = rng.choices(requests, k=rng.randrange(4))
        seeds = [rng.getrandbits(64) for _ in some]
        match rng.randrange(14):
            case 0 | 1 | 2 | 3 | 4 | 5:
                self.change()
            case 6:
                self.both("top", request, rng.randrange(300), seed)
            case 7:
                self.both("capacity", request, rng.choice([0, 5, 40]))
            case 8:
                placed = self.both("place", request, seed)
                if isinstance(placed, tuple) and isinstance(placed[0], int) and rng.random() < 0.3:
                    self.both("unplace", request, placed[0])
            case 9:
                self.both("place_batch", request, rng.randrange(5), seed)
            case 10:
                self.both("pick_many", some, seeds)
            case 11:
                self.both("place_many", some, seeds)
            case _:
                self.both("pick", request, seed)


def _of(index: int, one: Any) -> Any:
    return one[index] if isinstance(one, tuple) else one


def _without_ids(judgement: scoring.Judgement) -> scoring.Judgement:
    """Each implementation gives out its own ids."""
    failures = tuple(one._replace(id=0) for one in judgement.failures)
    return judgement._replace(failures=failures, parts=tuple(one._replace(id=0) for one in judgement.parts))
