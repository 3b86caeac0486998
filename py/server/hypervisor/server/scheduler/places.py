"""Counts of instances by place, kept in the node table by deltas: groups of domains, and the counters over them.

A *place* is one value of a node label (the topology of a term); in the table it is a domain of the label's group. A
*tally* is a counter over such a group for one question about placed instances: how many match a selector, or how many
refuse whatever matches one. Both are made when a request first asks for them, by counting once, and are then adjusted
with every instance and node that comes, goes or changes. What has not been asked for longest is forgotten.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from hypervisor.core.model import AffinityTerm, LabelConstraint
from hypervisor.ext.scoring import NodeTable
from hypervisor.server.scheduler.contract import NodeState, PlacedInstance, matches

__all__ = ["Matching", "Places", "Refusing"]

_GROUPS_KEPT = 48
_TALLIES_KEPT = 512


@dataclass(frozen=True, slots=True)
class Matching:
    """How many instances of the project match the selector."""

    project: str
    selector: tuple[LabelConstraint, ...]
    topology: str

    def counts(self, placed: PlacedInstance) -> bool:
        """Whether it counts this one."""
        return placed.project == self.project and matches(self.selector, placed.labels)


@dataclass(frozen=True, slots=True)
class Refusing:
    """How many instances of the project have this required term of anti-affinity."""

    project: str
    term: AffinityTerm

    @property
    def topology(self) -> str:
        """Label of nodes over whose values it counts."""
        return self.term.topology

    def counts(self, placed: PlacedInstance) -> bool:
        """Whether it counts this one."""
        return placed.project == self.project and self.term in placed.refuses


Question = Matching | Refusing


@dataclass(slots=True)
class _Group:
    """A label of nodes: the number of each of its values that some node has."""

    id: int
    domains: dict[str, int] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    freed: list[int] = field(default_factory=list)

    def enter(self, value: str) -> int:
        """A node has the value; returns its domain."""
        domain = self.domains.get(value)
        if domain is None:
            domain = self.freed.pop() if self.freed else len(self.domains)
            self.domains[value] = domain
        self.nodes[domain] = self.nodes.get(domain, 0) + 1
        return domain

    def leave(self, value: str) -> None:
        """A node has it no more. Its counts are 0 by then if it was the last."""
        domain = self.domains[value]
        self.nodes[domain] -= 1
        if not self.nodes[domain]:
            del self.nodes[domain], self.domains[value]
            self.freed.append(domain)


@dataclass(slots=True)
class _Tally:
    counter: int
    total: int = 0


class Places:
    """See the module's docstring. ``forgot`` is called when something was forgotten that requests may have named."""

    def __init__(self, table: NodeTable, *, forgot: Callable[[], None]) -> None:
        self._table = table
        self._forgot = forgot
        self._groups: OrderedDict[str, _Group] = OrderedDict()
        self._tallies: OrderedDict[Question, _Tally] = OrderedDict()

    def counter(
        self,
        question: Question,
        *,
        slots: Mapping[str, int],
        states: Mapping[str, NodeState],
        placed: Iterable[PlacedInstance],
    ) -> int:
        """The table's counter that answers the question; counts now if it is asked for the first time."""
        tally = self._tallies.get(question)
        if tally is not None:
            self._tallies.move_to_end(question)
            self._groups.move_to_end(question.topology)
            return tally.counter
        group = self._group(question.topology, slots, states)
        tally = self._tallies[question] = _Tally(self._table.add_counter(group.id))
        for one in placed:
            if question.counts(one):
                self._add(tally, question, states.get(one.node_id), 1)
        while len(self._tallies) > _TALLIES_KEPT:
            _, old = self._tallies.popitem(last=False)
            self._table.drop_counter(old.counter)
            self._forgot()
        return tally.counter

    def total(self, question: Question) -> int:
        """How many instances on known nodes the question counts, in a place or not; it was asked for before."""
        return self._tallies[question].total

    def instance(self, placed: PlacedInstance, state: NodeState | None, delta: int) -> None:
        """The instance is on the node (``delta`` 1), or is there no more (-1)."""
        for question, tally in self._tallies.items():
            if question.counts(placed):
                self._add(tally, question, state, delta)

    def node(
        self,
        slot: int,
        old: NodeState | None,
        new: NodeState | None,
        placed: Callable[[], Iterable[PlacedInstance]],
    ) -> None:
        """The node's labels may have changed (or it comes, or goes); ``placed`` are the instances on it."""
        for topology, group in self._groups.items():
            before = None if old is None else old.label(topology)
            after = None if new is None else new.label(topology)
            if before != after or new is None or old is None:
                questions = [(q, t) for q, t in self._tallies.items() if q.topology == topology]
                here = list(placed()) if questions else []
                if old is not None:
                    self._move(questions, here, old, -1)
                if before is not None:
                    group.leave(before)
                domain = -1 if after is None else group.enter(after)
                if new is not None:
                    self._table.set_domain(group.id, slot, domain)
                    self._move(questions, here, new, 1)

    def _move(
        self,
        questions: Iterable[tuple[Question, _Tally]],
        here: Iterable[PlacedInstance],
        state: NodeState,
        delta: int,
    ) -> None:
        for question, tally in questions:
            for one in here:
                if question.counts(one):
                    self._add(tally, question, state, delta)

    def _add(self, tally: _Tally, question: Question, state: NodeState | None, delta: int) -> None:
        if state is None:
            return
        tally.total += delta
        value = state.label(question.topology)
        if value is not None:
            self._table.add_count(tally.counter, self._groups[question.topology].domains[value], delta)

    def _group(self, topology: str, slots: Mapping[str, int], states: Mapping[str, NodeState]) -> _Group:
        group = self._groups.get(topology)
        if group is not None:
            self._groups.move_to_end(topology)
            return group
        while len(self._groups) >= _GROUPS_KEPT:
            old_topology, old = self._groups.popitem(last=False)
            self._table.drop_group(old.id)
            for question in [q for q in self._tallies if q.topology == old_topology]:
                del self._tallies[question]
            self._forgot()
        group = self._groups[topology] = _Group(self._table.add_group())
        for node_id, slot in slots.items():
            value = states[node_id].label(topology)
            if value is not None:
                self._table.set_domain(group.id, slot, group.enter(value))
        return group
