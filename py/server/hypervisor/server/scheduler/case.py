"""A request judged against one snapshot: what filters and scores need to know besides the node they look at.

Which instances a term of affinity or spread means is counted once for each term, over all placed instances; this is the
plain way, which the table of the default scheduler has to agree with.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property

from hypervisor.core.model import AffinityTerm, LabelConstraint
from hypervisor.server.scheduler.contract import NodeState, PlacedInstance, Request, Snapshot, matches

__all__ = ["Case", "place_of", "self_match"]

Selector = tuple[LabelConstraint, ...]


class Case:
    """The request and the snapshot, with the counts that its terms ask for."""

    def __init__(self, request: Request, snapshot: Snapshot) -> None:
        self.request = request
        self.snapshot = snapshot
        self._counts: dict[tuple[Selector, str], Mapping[str, int]] = {}

    def counts(self, selector: Selector, topology: str) -> Mapping[str, int]:
        """Instances of the request's project that match, by the value of their node's label ``topology``."""
        key = (selector, topology)
        found = self._counts.get(key)
        if found is None:
            found = self._counts[key] = self._by_place(self._matching(selector), topology)
        return found

    @cached_property
    def affinity(self) -> tuple[AffinityTerm, ...]:
        """The required terms of affinity that count: see AffinityTerm in instance.proto for those that are waived."""
        return tuple(term for term in self.request.affinity if not term.preferred and not self._waived(term))

    @cached_property
    def anti_affinity(self) -> tuple[AffinityTerm, ...]:
        """The required terms of anti-affinity."""
        return tuple(term for term in self.request.anti_affinity if not term.preferred)

    @cached_property
    def refused(self) -> Mapping[AffinityTerm, Mapping[str, int]]:
        """Terms of placed instances that mean this one: how many have each, by place."""
        holders: dict[AffinityTerm, list[PlacedInstance]] = {}
        for placed in self._of_project():
            for term in placed.refuses:
                if matches(term.selector, self.request.labels):
                    holders.setdefault(term, []).append(placed)
        return {term: self._by_place(found, term.topology) for term, found in holders.items()}

    def _waived(self, term: AffinityTerm) -> bool:
        return self_match(self.request, term) and not any(
            True for placed in self._matching(term.selector) if placed.node_id in self.snapshot.nodes
        )

    def _of_project(self) -> Iterable[PlacedInstance]:
        project = self.request.project
        return (placed for placed in self.snapshot.instances.values() if placed.project == project)

    def _matching(self, selector: Selector) -> Iterable[PlacedInstance]:
        return (placed for placed in self._of_project() if matches(selector, placed.labels))

    def _by_place(self, placed: Iterable[PlacedInstance], topology: str) -> Mapping[str, int]:
        counted: Counter[str] = Counter()
        for one in placed:
            state = self.snapshot.nodes.get(one.node_id)
            place = None if state is None else place_of(state, topology)
            if place is not None:
                counted[place] += 1
        return counted


def self_match(request: Request, term: AffinityTerm) -> bool:
    """Whether the instance is one of those that its own term means."""
    return matches(term.selector, request.labels)


def place_of(state: NodeState, topology: str) -> str | None:
    """The place that a node is in; None for a node without the label. With host names each node is its own."""
    return state.label(topology)
