"""The default scheduler: all filters, then the weighted sum of the scores, ties broken by the request's seed."""

import zlib
from collections.abc import Mapping, Sequence

from hypervisor.server.scheduler.contract import NodeState, Placement, Refusal, Request, Snapshot
from hypervisor.server.scheduler.plugins import FILTERS, SCORES, Filter, Score

__all__ = ["DefaultScheduler"]

_TIE = 1e-9


class DefaultScheduler:
    """See the module's docstring; exact: it looks at every node."""

    def __init__(self, filters: Sequence[Filter] = FILTERS, scores: Mapping[Score, float] = SCORES) -> None:
        self._filters = tuple(filters)
        self._scores = tuple(scores.items())
        self._weight = sum(scores.values()) or 1.0

    @property
    def name(self) -> str:
        return "default"

    def schedule(self, request: Request, snapshot: Snapshot) -> Placement | Refusal:
        """See ``Scheduler``."""
        best: list[NodeState] = []
        best_score = -1.0
        reasons: dict[str, str] = {}
        for state in snapshot.nodes.values():
            reason = self._reason_against(request, state)
            if reason is not None:
                reasons[state.node.hostname] = reason
                continue
            score = self._score(request, state)
            if score > best_score + _TIE:
                best, best_score = [state], score
            elif score > best_score - _TIE:
                best.append(state)
        if not best:
            return Refusal(reasons)
        chosen = best[0] if len(best) == 1 else min(best, key=lambda s: _tie_break(request.seed, s.node.id))
        return Placement(chosen.node.id, best_score)

    def _reason_against(self, request: Request, state: NodeState) -> str | None:
        for one in self._filters:
            reason = one.reason_against(request, state)
            if reason is not None:
                return reason
        return None

    def _score(self, request: Request, state: NodeState) -> float:
        return sum(weight * one.score(request, state) for one, weight in self._scores) / self._weight


def _tie_break(seed: str, node_id: str) -> tuple[int, str]:
    return zlib.crc32(f"{seed}/{node_id}".encode()), node_id
