"""The specification of the node table, and the oracle of its tests. See :mod:`._table_c` for the one in use."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from hypervisor.ext.scoring._explain import explain
from hypervisor.ext.scoring._request_py import Request
from hypervisor.ext.scoring._rules import (
    MAX_AMOUNT,
    MAX_COUNT,
    MAX_DOMAINS,
    MAX_NODES,
    UNKNOWN_LOAD,
    Judgement,
    NodeRow,
    tie_key,
    within,
)

__all__ = ["NodeTable", "Request"]

_Value = TypeVar("_Value")
_EMPTY = NodeRow(0, 0, 0, 0, 0, 0, 0, 0, UNKNOWN_LOAD, 0)


class NodeTable:
    """Nodes and what is reserved on them; chooses the best node for a request, exactly.

    Not for several threads at once: a call that finds another thread inside raises RuntimeError. All ids it gives
    out (classes, preferences, groups, counters) are above 0 and never given out twice; using one that was dropped, or
    a slot without a node, raises KeyError. Numbers out of range raise ValueError, and change nothing.

    What a call costs in the native table, n nodes: changes of one node or counter O(1); ``pick`` and ``place`` of a
    request whose like was used lately O(n/64) and what changed since, of a new one O(n) (0.5 ns a node).
    """

    def __init__(self) -> None:
        self._rows: dict[int, NodeRow] = {}
        self._freed: list[int] = []
        self._last_id = 0
        self._classes: dict[int, set[int]] = {}
        self._preferences: dict[int, dict[int, int]] = {}
        self._groups: dict[int, dict[int, int]] = {}
        self._counters: dict[int, tuple[int, dict[int, int]]] = {}

    # Nodes

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self._rows)

    def slots(self) -> list[int]:
        """The slots that have a node, in ascending order."""
        return sorted(self._rows)

    def add_node(self, node_hash: int) -> int:
        """Add a node without any resources, in no class or domain, preferences 0; returns its slot.

        ``node_hash`` (0..2**64 - 1) is a stable hash of the node's id, of its own for each node: ties are broken by
        it. The slot is the one freed last, else the next after the highest. Raises OverflowError at MAX_NODES nodes.
        """
        within("node_hash", node_hash, 0, (1 << 64) - 1)
        if len(self._rows) == MAX_NODES:
            raise OverflowError(f"at most {MAX_NODES} nodes")
        slot = self._freed.pop() if self._freed else len(self._rows)
        self._rows[slot] = _EMPTY._replace(node_hash=node_hash)
        return slot

    def remove_node(self, slot: int) -> None:
        """Remove a node and all that was set for it; counters stay as they are. Its slot may be given out again."""
        _at("slot", self._rows, slot)
        del self._rows[slot]
        self._freed.append(slot)
        for members in self._classes.values():
            members.discard(slot)
        for column in (*self._preferences.values(), *self._groups.values()):
            column.pop(slot, None)

    def set_node(
        self,
        slot: int,
        cpu_total: int,
        cpu_free: int,
        memory_total: int,
        memory_free: int,
        disk_total: int,
        disk_free: int,
        bits: int,
        load: int,
        penalty: int,
    ) -> None:
        """Set all of a node's columns.

        Totals (0..MAX_AMOUNT; millicores, MiB, GiB) are what may be reserved, after overcommit and what is kept for
        the host; free (-MAX_AMOUNT..total) is what is left of it, below 0 where more is reserved. ``bits`` are
        0..2**31 - 1, ``load`` the measured load in permille (0..1000, -1 unknown), ``penalty`` 0..1000.
        """
        node_hash = self.node(slot).node_hash
        for name, total, free in (
            ("cpu", cpu_total, cpu_free),
            ("memory", memory_total, memory_free),
            ("disk", disk_total, disk_free),
        ):
            within(f"{name}_total", total, 0, MAX_AMOUNT)
            within(f"{name}_free", free, -MAX_AMOUNT, total)
        within("bits", bits, 0, (1 << 31) - 1)
        within("load", load, UNKNOWN_LOAD, 1000)
        within("penalty", penalty, 0, 1000)
        self._rows[slot] = NodeRow(
            node_hash,
            cpu_total,
            cpu_free,
            memory_total,
            memory_free,
            disk_total,
            disk_free,
            bits,
            load,
            penalty,
        )

    def adjust(self, slot: int, cpu: int, memory: int, disk: int) -> None:
        """Add to what is free on a node: below 0 reserves, above 0 releases. No check that a reservation fits."""
        row = self.node(slot)
        for name, amount in (("cpu", cpu), ("memory", memory), ("disk", disk)):
            within(name, amount, -2 * MAX_AMOUNT, 2 * MAX_AMOUNT)
        changed = row._replace(
            cpu_free=row.cpu_free + cpu,
            memory_free=row.memory_free + memory,
            disk_free=row.disk_free + disk,
        )
        within("cpu_free", changed.cpu_free, -MAX_AMOUNT, row.cpu_total)
        within("memory_free", changed.memory_free, -MAX_AMOUNT, row.memory_total)
        within("disk_free", changed.disk_free, -MAX_AMOUNT, row.disk_total)
        self._rows[slot] = changed

    def node(self, slot: int) -> NodeRow:
        """A node's columns."""
        return _at("slot", self._rows, slot)

    # Classes and preferences

    def add_class(self) -> int:
        """Add a class that no node is in; returns its id. At most 65,535 ids of all kinds live (OverflowError)."""
        self._classes[self._new_id()] = set()
        return self._last_id

    def drop_class(self, class_id: int) -> None:
        """Forget a class."""
        _at("id", self._classes, class_id)
        del self._classes[class_id]

    def set_class(self, class_id: int, slot: int, value: bool) -> None:
        """Say whether a node is in a class."""
        members = _at("id", self._classes, class_id)
        self.node(slot)
        if value:
            members.add(slot)
        else:
            members.discard(slot)

    def class_value(self, class_id: int, slot: int) -> bool:
        """Whether a node is in a class."""
        self.node(slot)
        return slot in _at("id", self._classes, class_id)

    def classes(self) -> list[int]:
        """Ids of the classes there are, in ascending order."""
        return sorted(self._classes)

    def add_preference(self) -> int:
        """Add a preference column of zeros; returns its id."""
        self._preferences[self._new_id()] = {}
        return self._last_id

    def drop_preference(self, preference: int) -> None:
        """Forget a preference column."""
        _at("id", self._preferences, preference)
        del self._preferences[preference]

    def set_preference(self, preference: int, slot: int, value: int) -> None:
        """Rate a node, 0 (worst) to 1000 (best)."""
        column = _at("id", self._preferences, preference)
        self.node(slot)
        column[slot] = within("value", value, 0, 1000)

    def preference_value(self, preference: int, slot: int) -> int:
        """A node's rating."""
        self.node(slot)
        return _at("id", self._preferences, preference).get(slot, 0)

    # Groups of domains, and counters

    def add_group(self) -> int:
        """Add a group in which no node has a domain; returns its id. At most 64 live (OverflowError)."""
        if len(self._groups) == 64:
            raise OverflowError("at most 64 groups")
        self._groups[self._new_id()] = {}
        return self._last_id

    def drop_group(self, group: int) -> None:
        """Forget a group and its counters."""
        _at("id", self._groups, group)
        del self._groups[group]
        self._counters = {one: counter for one, counter in self._counters.items() if counter[0] != group}

    def set_domain(self, group: int, slot: int, domain: int) -> None:
        """Say which domain of a group a node is in (0..MAX_DOMAINS - 1; -1 none). Counts stay with the domains."""
        domains = _at("id", self._groups, group)
        self.node(slot)
        domains[slot] = within("domain", domain, -1, MAX_DOMAINS - 1)

    def domain(self, group: int, slot: int) -> int:
        """The domain of a group that a node is in; -1 for none."""
        self.node(slot)
        return _at("id", self._groups, group).get(slot, -1)

    def add_counter(self, group: int) -> int:
        """Add a counter, 0 in every domain of a group; returns its id."""
        _at("id", self._groups, group)
        self._counters[self._new_id()] = (group, {})
        return self._last_id

    def drop_counter(self, counter: int) -> None:
        """Forget a counter."""
        _at("id", self._counters, counter)
        del self._counters[counter]

    def add_count(self, counter: int, domain: int, delta: int) -> None:
        """Add to the count of a domain (0..MAX_DOMAINS - 1). ValueError where it would leave 0..MAX_AMOUNT."""
        _, counts = _at("id", self._counters, counter)
        within("domain", domain, 0, MAX_DOMAINS - 1)
        counts[domain] = within("count", counts.get(domain, 0) + delta, 0, MAX_AMOUNT)

    def count(self, counter: int, domain: int) -> int:
        """The count of a domain; 0 where nothing was ever added."""
        return _at("id", self._counters, counter)[1].get(domain, 0)

    def count_near(self, counter: int, slot: int) -> int | None:
        """The count of the domain that a node is in; None where it has no domain in the counter's group."""
        group, counts = _at("id", self._counters, counter)
        domain = self.domain(group, slot)
        return None if domain == -1 else counts.get(domain, 0)

    # Choosing

    def explain(self, request: Request, slot: int) -> Judgement:
        """All checks that a node fails and all parts of its score; see :class:`._rules.Judgement`."""
        _check_type(request)
        return explain(self, request, slot)

    def pick(self, request: Request, seed: int = 0) -> tuple[int, int] | None:
        """The best node for a request, as (slot, score), or None where none passes all filters. Changes nothing.

        Best is the highest score, among equals the smallest ``tie_key(seed, node_hash)``; ``seed`` is 0..2**64 - 1.
        """
        found = self.top(request, 1, seed)
        return found[0] if found else None

    def top(self, request: Request, count: int, seed: int = 0) -> list[tuple[int, int]]:
        """The ``count`` best nodes (fewer where fewer pass; any number for all) as (slot, score), best first."""
        within("seed", seed, 0, (1 << 64) - 1)
        within("count", count, 0, MAX_COUNT)
        self._check_ids(request)
        passed: list[tuple[tuple[int, tuple[int, int], int], tuple[int, int]]] = []
        for slot, row in self._rows.items():
            judgement = self.explain(request, slot)
            if not judgement.failures:
                order = (-judgement.score, tie_key(seed, row.node_hash), slot)
                passed.append((order, (slot, judgement.score)))
        return [found for _, found in sorted(passed)[:count]]

    def pick_many(self, requests: Sequence[Request], seeds: Sequence[int]) -> list[tuple[int, int] | None]:
        """``pick`` of each request with the seed at its place, all against the same state.

        ValueError where there are not as many seeds as requests.
        """
        self._check_all(requests, seeds)
        return [self.pick(request, seed) for request, seed in zip(requests, seeds, strict=True)]

    # Placing

    def place(self, request: Request, seed: int = 0) -> tuple[int, int] | None:
        """``pick``, and reserve there: resources, and 1 more in each counter of ``adds``. See :meth:`unplace`.

        ValueError where a count would exceed MAX_AMOUNT: nothing is reserved then.
        """
        found = self.pick(request, seed)
        if found is not None:
            self._reserve(request, found[0], 1)
        return found

    def unplace(self, request: Request, slot: int) -> None:
        """Take back what ``place`` reserved for a request on a node. ValueError where it is not all there."""
        self._check_ids(request)
        self._reserve(request, slot, -1)

    def place_many(self, requests: Sequence[Request], seeds: Sequence[int]) -> list[tuple[int, int] | None]:
        """``place`` of each request in turn, each seeing those before it; None for each that does not fit.

        ValueError where there are not as many seeds as requests or a count would exceed MAX_AMOUNT, KeyError for a
        dropped id: nothing is placed then.
        """
        self._check_all(requests, seeds)
        placed: list[tuple[int, int] | None] = []
        try:
            for request, seed in zip(requests, seeds, strict=True):
                placed.append(self.place(request, seed))
        except ValueError:
            for request, found in zip(requests, placed, strict=False):
                if found is not None:
                    self._reserve(request, found[0], -1)
            raise
        return placed

    def place_batch(self, request: Request, count: int, seed: int = 0) -> list[tuple[int, int]]:
        """``place`` the same request ``count`` times with the same seed; ends early where no more fit.

        ValueError where a count would exceed MAX_AMOUNT: nothing is placed then.
        """
        within("seed", seed, 0, (1 << 64) - 1)
        within("count", count, 0, MAX_COUNT)
        self._check_ids(request)
        placed: list[tuple[int, int]] = []
        try:
            while len(placed) < count and (found := self.place(request, seed)):
                placed.append(found)
        except ValueError:
            for slot, _ in placed:
                self._reserve(request, slot, -1)
            raise
        return placed

    def capacity(self, request: Request, limit: int) -> list[tuple[int, int]]:
        """How many more instances of a request fit, as (slot, number), slots ascending, those of 0 left out.

        The numbers add up to at most ``limit`` (>= 0); where they do, more may fit. Nodes are independent of each
        other where placing an instance changes no count that its filters look at: then each takes what its resources
        allow, in the order of slots. Else the answer is what ``place_batch(request, limit)`` would do, with seed 0.
        Changes nothing.
        """
        within("limit", limit, 0, MAX_COUNT)
        self._check_ids(request)
        if set(request.adds) & {*request.affinity, *request.anti_affinity}:
            placed = self.place_batch(request, limit)
            for slot, _ in placed:
                self.unplace(request, slot)
            slots = [slot for slot, _ in placed]
            return [(slot, slots.count(slot)) for slot in sorted(set(slots))]
        found: list[tuple[int, int]] = []
        for slot in self.slots():
            if limit > 0 and not self.explain(request, slot).failures:
                number = min(limit, self._multiple(request, slot))
                found.append((slot, number))
                limit -= number
        return found

    def _multiple(self, request: Request, slot: int) -> int:
        """How often the resources of a request fit; MAX_AMOUNT where it asks for none."""
        row = self._rows[slot]
        wanted = (request.cpu, request.memory, request.disk)
        free = (row.cpu_free, row.memory_free, row.disk_free)
        return min(
            (have // want for want, have in zip(wanted, free, strict=True) if want), default=MAX_AMOUNT
        )

    def _reserve(self, request: Request, slot: int, times: int) -> None:
        counts: dict[tuple[int, int], int] = {}
        for one in request.adds:
            domain = self.domain(self._counters[one][0], slot)
            if domain != -1:
                counts[one, domain] = counts.get((one, domain), 0) + times
        for (one, domain), delta in counts.items():
            within("count", self.count(one, domain) + delta, 0, MAX_AMOUNT)
        self.adjust(slot, -times * request.cpu, -times * request.memory, -times * request.disk)
        for (one, domain), delta in counts.items():
            self.add_count(one, domain, delta)

    def _check_all(self, requests: Sequence[Request], seeds: Sequence[int]) -> None:
        if len(requests) != len(seeds):
            raise ValueError(f"{len(requests)} requests, {len(seeds)} seeds")
        for request, seed in zip(requests, seeds, strict=True):
            _check_type(request)
            within("seed", seed, 0, (1 << 64) - 1)
            self._check_ids(request)

    def _check_ids(self, request: Request) -> None:
        _check_type(request)
        for ids, known in (
            (request.classes, self._classes),
            ([one for one, _ in request.preferences], self._preferences),
            ((*request.affinity, *request.anti_affinity, *request.adds), self._counters),
            ([one for one, _ in (*request.prefer, *request.avoid, *request.spread)], self._counters),
        ):
            for one in ids:
                if one not in known:
                    raise KeyError(one)

    def _new_id(self) -> int:
        if len(self._classes) + len(self._preferences) + len(self._groups) + len(self._counters) >= 65_535:
            raise OverflowError("at most 65535 classes, preferences, groups and counters")
        self._last_id += 1
        return self._last_id


def _at(what: str, known: Mapping[int, _Value], key: int) -> _Value:
    """What is known under a slot or an id: TypeError where it is no integer, KeyError where there is none."""
    if not isinstance(key, int):
        raise TypeError(f"{what} must be an integer, not {type(key).__name__}")
    return known[key]


def _check_type(request: Request) -> None:
    if not isinstance(request, Request):
        raise TypeError(f"a request must be a Request, not {type(request).__name__}")
