"""The default scheduler's rules, applied node by node: which checks a node fails, what each score says, which is best.

This is what the table must agree with, what explanations are made of, and what decides where the table cannot
(``default.py`` says when).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from hypervisor.core.model import ScorePart
from hypervisor.ext.scoring import tie_key
from hypervisor.server.scheduler.case import Case
from hypervisor.server.scheduler.contract import NodeState, Placement, Refusal, Request, Snapshot
from hypervisor.server.scheduler.options import DEFAULT_WEIGHTS
from hypervisor.server.scheduler.plugins import (
    FILTERS,
    SCORES,
    Filter,
    Score,
    TermsScore,
)

__all__ = ["Check", "Judge", "Judgement", "hash_of", "share_of_weight"]

_WHOLE = 100


@dataclass(frozen=True, slots=True)
class Check:
    """A filter that a node fails, and why."""

    filter: str
    reason: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """All that is to be said of one node. ``score`` and ``parts`` are empty where it does not fit."""

    state: NodeState
    failed: tuple[Check, ...]
    parts: tuple[ScorePart, ...] = ()
    score: int = 0

    @property
    def fits(self) -> bool:
        """Whether the node passes all filters."""
        return not self.failed


def hash_of(text: str) -> int:
    """64 bits that stand for a node's id or a request's seed, the same everywhere and always."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def share_of_weight(weight: int, hundredths: int) -> int:
    """What a term with ``hundredths`` of a score's weight is multiplied by."""
    return weight * hundredths // _WHOLE


class Judge:
    """Filters and weighted scores. Plug-ins come after the built-in ones; their weight is 100 unless one is given."""

    def __init__(
        self,
        *,
        weights: Mapping[str, int] = DEFAULT_WEIGHTS,
        extra_filters: Iterable[Filter] = (),
        extra_scores: Iterable[Score] = (),
    ) -> None:
        self.weights = {**DEFAULT_WEIGHTS, **weights}
        self.extra_filters = tuple(extra_filters)
        self.extra_scores = tuple((one, self.weights.get(one.name, _WHOLE)) for one in extra_scores)
        self._filters: tuple[Filter, ...] = (*FILTERS, *self.extra_filters)
        built_in = tuple((one, self.weights[one.name]) for one in SCORES)
        self._scores: tuple[tuple[Score | TermsScore, int], ...] = tuple(
            (one, weight) for one, weight in (*built_in, *self.extra_scores) if weight
        )

    def reason_against(self, case: Case, state: NodeState) -> Check | None:
        """The first check that the node fails."""
        for one in self._filters:
            reason = one.reason_against(case, state)
            if reason is not None:
                return Check(one.name, reason)
        return None

    def parts(self, case: Case, state: NodeState) -> tuple[ScorePart, ...]:
        """What each score that has a weight says of the node, which fits."""
        found = []
        for one, weight in self._scores:
            if hasattr(one, "values"):
                for value, hundredths in one.values(case, state):
                    found.append(ScorePart(one.name, value, share_of_weight(weight, hundredths)))
            else:
                found.append(ScorePart(one.name, one.score(case, state), weight))
        return tuple(found)

    def score(self, case: Case, state: NodeState) -> int:
        """How well the node, which fits, suits."""
        return sum(part.value * part.weight for part in self.parts(case, state))

    def judge(self, case: Case, state: NodeState) -> Judgement:
        """Everything there is to say of the node."""
        reasons = ((one.name, one.reason_against(case, state)) for one in self._filters)
        failed = tuple(Check(name, reason) for name, reason in reasons if reason is not None)
        if failed:
            return Judgement(state, failed)
        parts = self.parts(case, state)
        return Judgement(state, (), parts, sum(part.value * part.weight for part in parts))

    def schedule(self, request: Request, snapshot: Snapshot) -> Placement | Refusal:
        """The answer, found by looking at every node."""
        case = Case(request, snapshot)
        seed = hash_of(request.seed)
        best: tuple[int, tuple[int, int]] | None = None
        chosen = ""
        for node_id, state in snapshot.nodes.items():
            if self.reason_against(case, state) is None:
                score, tie = self.score(case, state), tie_key(seed, hash_of(node_id))
                if best is None or (-score, tie) < best:
                    best, chosen = (-score, tie), node_id
        return self.refuse(case) if best is None else Placement(chosen, -best[0])

    def refuse(self, case: Case) -> Refusal:
        """Why no node will do: the first check that each fails."""
        found = ((s.node.hostname, self.reason_against(case, s)) for s in case.snapshot.nodes.values())
        return Refusal({hostname: check.reason for hostname, check in found if check is not None})
