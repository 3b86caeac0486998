"""The part of the double of the server that tells of placements: explanations, capacity, taints.

A node fits unless it is cordoned or has a taint ``no_schedule``; nodes are ranked by their host names.
"""

# ruff: noqa: N802  # methods are named as their RPCs
from collections.abc import Iterable
from typing import Any

from hvtest_fake_state import FakeState, refuse
from hypervisor.core import errors
from hypervisor.v1 import cluster_pb2, instance_pb2, node_pb2, operation_pb2, placement_pb2

__all__ = ["FakePlacement", "explained"]


def _judged(node: node_pb2.Node) -> placement_pb2.NodeJudgement:
    failed = []
    if not node.schedulable:
        failed.append(placement_pb2.FailedCheck(filter="schedulable", reason="is cordoned"))
    hard = [t for t in node.taints if t.effect == instance_pb2.TAINT_EFFECT_NO_SCHEDULE]
    if hard:
        failed.append(
            placement_pb2.FailedCheck(filter="taints", reason=f"has the taint {hard[0].key}:no_schedule")
        )
    parts = [
        instance_pb2.ScorePart(name="utilisation", value=900, weight=100),
        instance_pb2.ScorePart(name="penalty", value=1000 - node.placement_health.penalty, weight=200),
    ]
    return placement_pb2.NodeJudgement(
        node_id=node.id,
        hostname=node.hostname,
        fits=not failed,
        parts=[] if failed else parts,
        score=0 if failed else sum(p.value * p.weight for p in parts),
        failed=failed,
    )


def explained(nodes: Iterable[node_pb2.Node], node_id: str) -> placement_pb2.PlacementExplanation:
    """Why an instance is on, or would be placed on, ``node_id``."""
    judged = sorted((_judged(node) for node in nodes), key=lambda n: (not n.fits, n.hostname))
    fitting = [one for one in judged if one.fits]
    for rank, one in enumerate(fitting, start=1):
        one.rank = rank
    found = placement_pb2.PlacementExplanation(
        node_id=node_id,
        hostname=next((one.hostname for one in judged if one.node_id == node_id), ""),
        best_node_id=fitting[0].node_id if fitting else "",
        nodes_considered=len(judged),
        nodes_fit=len(fitting),
        nodes=fitting or judged,
        scheduler="default",
        revision=7,
    )
    by_filter: dict[str, list[placement_pb2.NodeJudgement]] = {}
    for one in judged:
        if one.failed:
            by_filter.setdefault(one.failed[0].filter, []).append(one)
    for name, failing in by_filter.items():
        found.refusals.add(
            filter=name,
            nodes=len(failing),
            example=failing[0].failed[0].reason,
            hostname=failing[0].hostname,
        )
    return found


class FakePlacement(FakeState):
    """See the module's docstring."""

    def ExplainPlacement(self, request: Any, context: Any) -> placement_pb2.PlacementExplanation:
        self._enter("ExplainPlacement", request, context)
        if request.WhichOneof("subject") == "instance":
            found = explained(self.nodes.values(), self._instance(request, context).node_id)
            found.recorded.placed_at.seconds = self.now_s
            found.recorded.scheduler, found.recorded.score = "default", 290_000
        else:
            found = explained(self.nodes.values(), "")
            found.node_id = found.best_node_id
            found.hostname = next((n.hostname for n in found.nodes if n.node_id == found.node_id), "")
        if request.node:
            found.asked_node.CopyFrom(_judged(self._node(request.node, context)))
        return found

    def GetClusterCapacity(self, request: Any, context: Any) -> placement_pb2.ClusterCapacity:
        """Three more on each node that fits."""
        self._enter("GetClusterCapacity", request, context)
        if not request.instance.spec.image:
            refuse(context, errors.InvalidArgument.of_field("instance.spec.image", "is required"))
        rooms = []
        for judged in explained(self.nodes.values(), "").nodes:
            limit = placement_pb2.FailedCheck(filter="resources", reason="needs 1 cores, 0 free of 3")
            rooms.append(
                placement_pb2.NodeCapacity(
                    node_id=judged.node_id,
                    hostname=judged.hostname,
                    count=3 if judged.fits else 0,
                    limit=limit if judged.fits else judged.failed[0],
                )
            )
        total = sum(room.count for room in rooms)
        limited = 0 < request.count_limit <= total
        return placement_pb2.ClusterCapacity(
            count=min(total, request.count_limit or total),
            limit_reached=limited,
            nodes=rooms[: request.max_nodes or 1000],
            nodes_considered=len(rooms),
            limits=[placement_pb2.RefusalCount(filter="resources", nodes=len(rooms))],
            revision=7,
        )

    def TaintNode(self, request: Any, context: Any) -> operation_pb2.Operation:
        node = self._node(request.node, context)

        def act(operation: operation_pb2.Operation) -> None:
            operation.object_id, operation.object_name = node.id, node.hostname
            node.taints.append(request.taint)
            self._record("node", node, cluster_pb2.Event.TYPE_UPDATED, "TAINT")

        return self._operate("TaintNode", "taint", "node", request, context, act)

    def UntaintNode(self, request: Any, context: Any) -> operation_pb2.Operation:
        node = self._node(request.node, context)

        def act(operation: operation_pb2.Operation) -> None:
            operation.object_id, operation.object_name = node.id, node.hostname
            kept = [t for t in node.taints if t.key != request.key or request.effect not in (0, t.effect)]
            if len(kept) == len(node.taints):
                raise errors.NotFound(f"no taint {request.key}", reason="TAINT_NOT_FOUND")
            del node.taints[:]
            node.taints.extend(kept)
            self._record("node", node, cluster_pb2.Event.TYPE_UPDATED, "UNTAINT")

        return self._operate("UntaintNode", "untaint", "node", request, context, act)
