"""The default scheduler: the node that passes all filters and has the highest weighted sum of scores; among equals the
request's seed decides.

The rules are those of ``plugins.py``, applied by ``judge.py``; the choice is made on the native table (``table.py``),
which says the same. Filters and scores of plug-ins are asked about the nodes that the table lets pass, and about those
only; without plug-ins nothing is asked. The table is not used for requests that ask for more than it can do (more than
16 required or 8 preferred terms): those are judged node by node.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hypervisor.core.model import ScorePart
from hypervisor.ext.scoring import tie_key
from hypervisor.server.scheduler.case import Case
from hypervisor.server.scheduler.contract import (
    NodeState,
    PlacedInstance,
    Placement,
    Refusal,
    Request,
    Snapshot,
)
from hypervisor.server.scheduler.judge import Judge, hash_of
from hypervisor.server.scheduler.options import DEFAULT_WEIGHTS
from hypervisor.server.scheduler.plugins import Filter, Score
from hypervisor.server.scheduler.table import ClusterTable, Compiled

__all__ = ["Capacity", "DefaultScheduler"]


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many more of a request fit: by node id, and the snapshot as it would be with all of them placed."""

    counts: Mapping[str, int]
    after: Snapshot


class DefaultScheduler:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        weights: Mapping[str, int] = DEFAULT_WEIGHTS,
        extra_filters: Iterable[Filter] = (),
        extra_scores: Iterable[Score] = (),
    ) -> None:
        self.judge = Judge(weights=weights, extra_filters=extra_filters, extra_scores=extra_scores)
        self._table = ClusterTable(self.judge)
        self._plugged = bool(self.judge.extra_filters or self.judge.extra_scores)
        self._refused_for: tuple[object, ...] = ()
        self._refused: dict[str, tuple[NodeState, str]] = {}

    @property
    def name(self) -> str:
        return "default"

    def schedule(self, request: Request, snapshot: Snapshot) -> Placement | Refusal:
        """See ``Scheduler``."""
        self._table.follow(snapshot)
        compiled = self._table.compile(request)
        if compiled is None:
            return self.judge.schedule(request, snapshot)
        seed = hash_of(request.seed)
        if self._plugged:
            placement = self._among_passing(Case(request, snapshot), compiled, seed)
            return self.judge.refuse(Case(request, snapshot)) if placement is None else placement
        found = self._table.table.pick(compiled.plain, seed)
        if found is None:
            return self._refuse(request, snapshot)
        return Placement(self._table.node_at(found[0]), found[1])

    def parts(self, request: Request, snapshot: Snapshot, node_id: str) -> tuple[ScorePart, ...]:
        """See ``Explains``."""
        self._table.follow(snapshot)
        compiled, slot = self._table.compile(request), self._table.slot(node_id)
        if compiled is None or slot is None or self._plugged:
            return self.judge.parts(Case(request, snapshot), snapshot.nodes[node_id])
        return self._table.parts(compiled, slot)

    def capacity(self, request: Request, snapshot: Snapshot, *, limit: int) -> Capacity:
        """How many more instances like this could be placed, one after another, and where; at most ``limit``."""
        self._table.follow(snapshot)
        compiled = self._table.compile(request)
        if compiled is None or self._plugged:
            counts = self._place_each(request, snapshot, limit)
        else:
            counts = {self._table.node_at(slot): count for slot, count in self._count(compiled, limit)}
        return Capacity(counts, _after(request, snapshot, counts))

    def _count(self, compiled: Compiled, limit: int) -> list[tuple[int, int]]:
        table = self._table.table
        if compiled.waived is None:
            return table.capacity(compiled.counting, limit)
        # Affinity to itself binds from the second on: the first one decides the place.
        first = table.place(compiled.counting) if limit > 0 else None
        if first is None:
            return []
        try:
            counts = dict(table.capacity(compiled.waived, limit - 1))
        finally:
            table.unplace(compiled.counting, first[0])
        counts[first[0]] = counts.get(first[0], 0) + 1
        return sorted(counts.items())

    def _place_each(self, request: Request, snapshot: Snapshot, limit: int) -> dict[str, int]:
        """One after another by the rules themselves: for what the table cannot do."""
        counts: dict[str, int] = {}
        while sum(counts.values()) < limit:
            answer = self.judge.schedule(request, _after(request, snapshot, counts))
            if isinstance(answer, Refusal):
                break
            counts[answer.node_id] = counts.get(answer.node_id, 0) + 1
        return counts

    def _among_passing(self, case: Case, compiled: Compiled, seed: int) -> Placement | None:
        """The best of the nodes that the table lets pass, with what plug-ins say of them."""
        best: tuple[int, tuple[int, int]] | None = None
        chosen = ""
        for slot, score in self._table.table.top(compiled.plain, len(self._table.table), seed):
            state = self._table.state_at(slot)
            if any(one.reason_against(case, state) is not None for one in self.judge.extra_filters):
                continue
            extra = sum(weight * one.score(case, state) for one, weight in self.judge.extra_scores)
            key = (-score - extra, tie_key(seed, hash_of(state.node.id)))
            if best is None or key < best:
                best, chosen = key, state.node.id
        return None if best is None else Placement(chosen, -best[0])

    def _refuse(self, request: Request, snapshot: Snapshot) -> Refusal:
        """Why no node will do. What was said of a node is kept for the next request that asks the same: filters are
        pure and states frozen, so that holds as long as the state is the same object."""
        case = Case(request, snapshot)
        if case.affinity or case.anti_affinity or self._table.refused_by_others(request):
            return self.judge.refuse(case)
        asked = (request.type, request.resources, request.constraints, request.node, request.tolerations)
        if asked != self._refused_for or len(self._refused) > 2 * len(snapshot.nodes):
            self._refused_for, self._refused = asked, {}
        reasons: dict[str, str] = {}
        for node_id, state in snapshot.nodes.items():
            known = self._refused.get(node_id)
            if known is None or known[0] is not state:
                check = self.judge.reason_against(case, state)
                known = self._refused[node_id] = (state, "" if check is None else check.reason)
            reasons[state.node.hostname] = known[1]
        return Refusal(reasons)


def _after(request: Request, snapshot: Snapshot, counts: Mapping[str, int]) -> Snapshot:
    """The snapshot with so many more instances of the request on each node."""
    nodes: dict[str, NodeState] = dict(snapshot.nodes)
    instances: dict[str, PlacedInstance] = dict(snapshot.instances)
    refuses = tuple(t for t in request.anti_affinity if not t.preferred)
    # Without terms of its own nothing about it depends on where its like are.
    related = bool(request.affinity or request.anti_affinity or request.spread)
    for node_id, count in counts.items():
        nodes[node_id] = nodes[node_id].with_more(request.resources, count)
        for number in range(count if related else 0):
            instances[f"{node_id}/{number}"] = PlacedInstance(
                node_id, request.project, request.labels, refuses
            )
    return Snapshot(nodes, instances)
