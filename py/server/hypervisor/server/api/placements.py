"""ExplainPlacement and GetClusterCapacity. Parses, calls, converts."""

from hypervisor.server.api.instance_requests import draft_of_instance, read_ref_of
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.api.violations import Violations
from hypervisor.server.explaining import CapacityAnswer, Explainer, Explanation, JudgedNode, RefusalCount
from hypervisor.server.services import Instances
from hypervisor.v1 import cluster_pb2, compute_pb2, placement_pb2
from hypervisor.wire.constraints import parts_to_wire, record_to_wire

__all__ = ["PlacementHandlers", "explanation_to_wire"]

_DEFAULT_NODES = 5
_MOST_NODES = 1000
_MOST_COUNT = 100_000
_DEFAULT_ROOMS = 1000
_MOST_ROOMS = 10_000
_UNNAMED = "instance"
"""Name of an instance that is only asked about."""


class PlacementHandlers:
    """The handlers by method name: ``compute`` and ``cluster``."""

    def __init__(self, instances: Instances, explainer: Explainer) -> None:
        self._instances = instances
        self._explainer = explainer

    @property
    def compute(self) -> dict[str, Handler]:
        """Those of ComputeService."""
        return {"ExplainPlacement": self.explain}

    @property
    def cluster(self) -> dict[str, Handler]:
        """Those of ClusterService."""
        return {"GetClusterCapacity": self.capacity}

    async def explain(
        self, request: compute_pb2.ExplainPlacementRequest, call: Call
    ) -> placement_pb2.PlacementExplanation:
        wrong = Violations()
        most = wrong.whole("max_nodes", request.max_nodes, low=0, high=_MOST_NODES) or _DEFAULT_NODES
        if request.node:
            wrong.object_name("node", request.node, "id or host name of a node")
        if request.WhichOneof("subject") is None:
            wrong.add("instance", "is required: give an instance, or would_be")
        if request.HasField("would_be"):
            draft = draft_of_instance(request.would_be, "would_be", unnamed=_UNNAMED, wrong=wrong)
            return explanation_to_wire(
                await self._explainer.would_be(draft, node=request.node, max_nodes=most)
            )
        wrong.check()
        found = self._instances.resolve(read_ref_of(request))
        return explanation_to_wire(
            await self._explainer.instance(found.value, node=request.node, max_nodes=most)
        )

    async def capacity(
        self, request: cluster_pb2.GetClusterCapacityRequest, call: Call
    ) -> placement_pb2.ClusterCapacity:
        wrong = Violations()
        limit = wrong.whole("count_limit", request.count_limit, low=0, high=_MOST_COUNT) or _MOST_COUNT
        most = wrong.whole("max_nodes", request.max_nodes, low=0, high=_MOST_ROOMS) or _DEFAULT_ROOMS
        if not request.HasField("instance"):
            wrong.add("instance", "is required: give type and spec")
            wrong.check()
        draft = draft_of_instance(request.instance, "instance", unnamed=_UNNAMED, wrong=wrong)
        return _capacity_to_wire(await self._explainer.capacity(draft, limit=limit, max_nodes=most))


def explanation_to_wire(found: Explanation) -> placement_pb2.PlacementExplanation:
    """An explanation."""
    return placement_pb2.PlacementExplanation(
        node_id=found.node_id,
        hostname=found.hostname,
        best_node_id=found.best_node_id,
        recorded=None if found.recorded is None else record_to_wire(found.recorded),
        nodes_considered=found.nodes_considered,
        nodes_fit=found.nodes_fit,
        nodes=map(_judged_to_wire, found.nodes),
        asked_node=None if found.asked_node is None else _judged_to_wire(found.asked_node),
        refusals=map(_refusal_to_wire, found.refusals),
        scheduler=found.scheduler,
        revision=found.revision,
    )


def _refusal_to_wire(one: RefusalCount) -> placement_pb2.RefusalCount:
    return placement_pb2.RefusalCount(
        filter=one.filter, nodes=one.nodes, example=one.example, hostname=one.hostname
    )


def _judged_to_wire(node: JudgedNode) -> placement_pb2.NodeJudgement:
    return placement_pb2.NodeJudgement(
        node_id=node.node_id,
        hostname=node.hostname,
        fits=node.fits,
        rank=node.rank,
        score=node.score,
        parts=parts_to_wire(node.parts),
        failed=[placement_pb2.FailedCheck(filter=c.filter, reason=c.reason) for c in node.failed],
    )


def _capacity_to_wire(found: CapacityAnswer) -> placement_pb2.ClusterCapacity:
    return placement_pb2.ClusterCapacity(
        count=found.count,
        limit_reached=found.limit_reached,
        nodes=[
            placement_pb2.NodeCapacity(
                node_id=node.node_id,
                hostname=node.hostname,
                count=node.count,
                limit=None
                if node.limit is None
                else placement_pb2.FailedCheck(filter=node.limit.filter, reason=node.limit.reason),
            )
            for node in found.nodes
        ],
        revision=found.revision,
        nodes_considered=found.nodes_considered,
        limits=map(_refusal_to_wire, found.limits),
    )
