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
        self._judged_for: tuple[object, ...] = ()
        self._judged: dict[str, tuple[NodeState, str | None, float]] = {}

    @property
    def name(self) -> str:
        return "default"

    def schedule(self, request: Request, snapshot: Snapshot) -> Placement | Refusal:
        """See ``Scheduler``."""
        best: list[NodeState] = []
        best_score = -1.0
        reasons: dict[str, str] = {}
        judged = self._judgements(request, len(snapshot.nodes))
        for node_id, state in snapshot.nodes.items():
            known = judged.get(node_id)
            if known is None or known[0] is not state:
                known = judged[node_id] = self._judge(request, state)
            _, reason, score = known
            if reason is not None:
                reasons[state.node.hostname] = reason
            elif score > best_score + _TIE:
                best, best_score = [state], score
            elif score > best_score - _TIE:
                best.append(state)
        if not best:
            return Refusal(reasons)
        chosen = best[0] if len(best) == 1 else min(best, key=lambda s: _tie_break(request.seed, s.node.id))
        return Placement(chosen.node.id, best_score)

    def _judgements(self, request: Request, nodes: int) -> dict[str, tuple[NodeState, str | None, float]]:
        """What is known of nodes from the requests before this one, if they asked for the same.

        Filters and scores are pure and states frozen, so a judgement holds as long as the state is the same object:
        of many equal requests in a row each changes one node, and only that is looked at again.
        """
        asked = (request.type, request.resources, request.policy, request.constraints, request.node)
        if asked != self._judged_for or len(self._judged) > 2 * nodes:
            self._judged_for, self._judged = asked, {}
        return self._judged

    def _judge(self, request: Request, state: NodeState) -> tuple[NodeState, str | None, float]:
        reason = self._reason_against(request, state)
        return state, reason, 0.0 if reason is not None else self._score(request, state)

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
