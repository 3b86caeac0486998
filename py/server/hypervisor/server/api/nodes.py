"""ClusterService: nodes, the agents' side of them, and the cluster as a whole. Parses, calls, converts."""

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.model import Allocation, Node, NodeResources, OperationRecord
from hypervisor.core.states import NodeRole, NodeStatus
from hypervisor.server.api.digest import payload_digest
from hypervisor.server.api.encoding import Encoder
from hypervisor.server.api.listing import Field, Listing, ListQuery, PageMemo, sortable_time
from hypervisor.server.api.node_requests import (
    checked_resources,
    checked_usage,
    drivers_of,
    observations_of,
    registration_of,
    samples_of,
)
from hypervisor.server.api.placement_requests import check_label_key, check_taint
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.api.violations import Violations
from hypervisor.server.services import ClusterView, Mutation, Nodes, Versioned
from hypervisor.v1 import cluster_pb2, node_pb2, operation_pb2
from hypervisor.wire.availability import fencing_from_wire
from hypervisor.wire.enums import TAINT_EFFECT
from hypervisor.wire.nodes import reservation_to_wire, resources_to_wire, taint_from_wire
from hypervisor.wire.times import duration_of, timestamp_of

__all__ = ["About", "ClusterIdentity", "NodeHandlers", "ServerFacts"]

_Found = Versioned[Node]
_NodeRequest = (
    cluster_pb2.DeregisterNodeRequest
    | cluster_pb2.CordonNodeRequest
    | cluster_pb2.UncordonNodeRequest
    | cluster_pb2.TaintNodeRequest
    | cluster_pb2.UntaintNodeRequest
    | cluster_pb2.EvacuateNodeRequest
    | cluster_pb2.SetNodeFencingRequest
)
_MAX_REASON_CHARACTERS = 256

LISTING: Listing[_Found] = Listing(
    fields={
        "id": Field(lambda n: n.value.id),
        "hostname": Field(lambda n: n.value.hostname, prefix=True),
        "status": Field(lambda n: n.value.status.value, choices=tuple(NodeStatus)),
        "role": Field(lambda n: n.value.role.value, choices=tuple(NodeRole)),
        "region": Field(lambda n: n.value.region),
        "zone": Field(lambda n: n.value.zone),
        "schedulable": Field(lambda n: "true" if n.value.schedulable else "false", choices=("true", "false")),
    },
    orders={
        "hostname": lambda n: n.value.hostname,
        "created_at": lambda n: sortable_time(n.value.created_at),
        "status": lambda n: n.value.status.value,
        "region": lambda n: n.value.region,
        "zone": lambda n: n.value.zone,
    },
    default_order="hostname",
    identity=lambda n: n.value.id,
    labels=lambda n: n.value.labels,
)


class ServerFacts(Protocol):
    """What is known of a server of the control plane."""

    @property
    def id(self) -> str: ...

    @property
    def address(self) -> str: ...

    @property
    def version(self) -> str: ...


class ClusterIdentity(Protocol):
    """The cluster as a whole, besides its records."""

    def cluster_id(self) -> str: ...

    def servers(self) -> tuple[ServerFacts, ...]: ...

    def leader_id(self) -> str: ...


@dataclass(frozen=True, slots=True)
class About:
    """What GetClusterInfo tells of the answering server."""

    version: str
    store_backend: str
    started_at: datetime


class NodeHandlers:
    """The handlers by method name: :attr:`handlers`."""

    def __init__(
        self,
        view: ClusterView,
        nodes: Nodes,
        encoder: Encoder,
        identity: ClusterIdentity,
        *,
        about: About,
    ) -> None:
        self._view = view
        self._memo: PageMemo[_Found] = PageMemo()
        self._nodes = nodes
        self._encoder = encoder
        self._identity = identity
        self._about = about

    @property
    def handlers(self) -> dict[str, Handler]:
        """What ClusterService offers, but for WatchEvents and DrainNode."""
        return {
            "RegisterNode": self.register,
            "DeregisterNode": self.deregister,
            "ListNodes": self.list,
            "GetNode": self.get,
            "UpdateNodeStatus": self.update_status,
            "Heartbeat": self.heartbeat,
            "Heartbeats": self.heartbeats,
            "GetClusterInfo": self.info,
            "CordonNode": self.cordon,
            "UncordonNode": self.uncordon,
            "TaintNode": self.taint,
            "UntaintNode": self.untaint,
            "EvacuateNode": self.evacuate,
            "SetNodeFencing": self.set_fencing,
        }

    async def register(
        self, request: cluster_pb2.RegisterNodeRequest, call: Call
    ) -> cluster_pb2.RegisterNodeResponse:
        node, times = await self._nodes.register(registration_of(request))
        return cluster_pb2.RegisterNodeResponse(
            node=self._encoder.node(node),
            heartbeat_interval=duration_of(times.interval_s),
            heartbeat_timeout=duration_of(times.timeout_s),
            cluster_id=self._identity.cluster_id(),
        )

    async def heartbeat(
        self, request: cluster_pb2.HeartbeatRequest, call: Call
    ) -> cluster_pb2.HeartbeatResponse:
        wrong = Violations()
        wrong.object_name("node_id", request.node_id, "node's id")
        resources = checked_resources(wrong, "resources", request.resources)
        samples = samples_of(wrong, request.stats)
        usage = checked_usage(wrong, "usage", request.usage)
        wrong.check()
        times = await self._nodes.heartbeat(
            request.node_id,
            request.incarnation,
            resources,
            samples,
            usage=usage,
            images=request.image_digests,
            fencing=fencing_from_wire(request.fencing),
        )
        return cluster_pb2.HeartbeatResponse(
            heartbeat_interval=duration_of(times.interval_s),
            heartbeat_timeout=duration_of(times.timeout_s),
            fencing_disarmed=times.disarmed,
        )

    async def heartbeats(
        self, requests: AsyncIterator[cluster_pb2.HeartbeatRequest], call: Call
    ) -> AsyncIterator[cluster_pb2.HeartbeatResponse]:
        async for request in requests:
            yield await self.heartbeat(request, call)

    async def update_status(
        self, request: cluster_pb2.UpdateNodeStatusRequest, call: Call
    ) -> cluster_pb2.UpdateNodeStatusResponse:
        wrong = Violations()
        wrong.object_name("node_id", request.node_id, "node's id")
        drivers = drivers_of(wrong, "drivers", request.drivers)
        observations = observations_of(wrong, request.instances)
        wrong.check()
        unexpected = await self._nodes.update_status(
            request.node_id, request.incarnation, drivers=drivers or None, observations=observations
        )
        return cluster_pb2.UpdateNodeStatusResponse(unexpected_instance_ids=unexpected)

    async def get(self, request: cluster_pb2.GetNodeRequest, call: Call) -> node_pb2.Node:
        wrong = Violations()
        node = wrong.object_name("node", request.node, "id or host name of a node")
        wrong.check()
        return self._encoder.node(self._nodes.resolve(node))

    async def list(self, request: cluster_pb2.ListNodesRequest, call: Call) -> cluster_pb2.ListNodesResponse:
        query = ListQuery(
            page_size=request.page_size,
            page_token=request.page_token,
            filter=request.filter,
            order_by=request.order_by,
        )
        page = LISTING.page(query, self._view.nodes(), memo=self._memo, version=self._encoder.list_version())
        return cluster_pb2.ListNodesResponse(
            nodes=map(self._encoder.node, page.items),
            next_page_token=page.next_page_token,
            revision=self._view.revision,
            stale=self._view.stale,
        )

    async def info(self, request: cluster_pb2.GetClusterInfoRequest, call: Call) -> cluster_pb2.ClusterInfo:
        leader = self._identity.leader_id()
        nodes = [found.value for found in self._view.nodes()]
        total, reserved = NodeResources(), Allocation(node_id="")
        for node in nodes:
            allocation = self._view.allocation(node.id)
            reserved = Allocation(
                node_id="",
                reserved=reserved.reserved + allocation.reserved,
                instances=reserved.instances + allocation.instances,
            )
            if node.status is NodeStatus.READY:
                total = _sum(total, self._use_of(node))
        return cluster_pb2.ClusterInfo(
            cluster_id=self._identity.cluster_id(),
            version=self._about.version,
            servers=[
                cluster_pb2.ServerInfo(
                    id=server.id, address=server.address, version=server.version, leader=server.id == leader
                )
                for server in self._identity.servers()
            ],
            store_backend=self._about.store_backend,
            store_available=not self._view.stale,
            revision=self._view.revision,
            nodes=Counter(node.status.value for node in nodes),
            instances=Counter(found.value.status.value for found in self._view.instances()),
            resources=resources_to_wire(total),
            reservation=reservation_to_wire(reserved),
            started_at=timestamp_of(self._about.started_at),
            moves_held=next((n.loss.held for n in nodes if n.loss is not None and n.loss.held), ""),
        )

    async def cordon(self, request: cluster_pb2.CordonNodeRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        node = _target(request, wrong)
        if len(request.reason) > _MAX_REASON_CHARACTERS:
            wrong.add(
                "reason", f"is {len(request.reason)} characters long: use at most {_MAX_REASON_CHARACTERS}"
            )
        wrong.check()
        return self._answer(
            await self._nodes.cordon(
                node,
                _mutation(request, call),
                reason=request.reason,
                resource_version=request.resource_version,
            )
        )

    async def uncordon(self, request: cluster_pb2.UncordonNodeRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        node = _target(request, wrong)
        wrong.check()
        return self._answer(
            await self._nodes.uncordon(
                node, _mutation(request, call), resource_version=request.resource_version
            )
        )

    async def taint(self, request: cluster_pb2.TaintNodeRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        node = _target(request, wrong)
        check_taint(wrong, "taint", request.taint)
        wrong.check()
        return self._answer(
            await self._nodes.taint(
                node,
                _mutation(request, call),
                taint=taint_from_wire(request.taint, "taint"),
                resource_version=request.resource_version,
            )
        )

    async def untaint(self, request: cluster_pb2.UntaintNodeRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        node = _target(request, wrong)
        check_label_key(wrong, "key", request.key, what="the key of the taint")
        if request.effect != 0 and TAINT_EFFECT.from_wire(request.effect) is None:
            wrong.add("effect", "is not known: use NO_SCHEDULE or PREFER_NO_SCHEDULE, or leave it out")
        wrong.check()
        return self._answer(
            await self._nodes.untaint(
                node,
                _mutation(request, call),
                key=request.key,
                effect=TAINT_EFFECT.from_wire(request.effect),
                resource_version=request.resource_version,
            )
        )

    async def deregister(
        self, request: cluster_pb2.DeregisterNodeRequest, call: Call
    ) -> operation_pb2.Operation:
        wrong = Violations()
        node = _target(request, wrong)
        wrong.check()
        return self._answer(
            await self._nodes.deregister(
                node, _mutation(request, call), resource_version=request.resource_version
            )
        )

    async def evacuate(
        self, request: cluster_pb2.EvacuateNodeRequest, call: Call
    ) -> cluster_pb2.EvacuateNodeResponse:
        wrong = Violations()
        node = _target(request, wrong)
        wrong.check()
        moves = [
            cluster_pb2.PlannedMove(
                instance_id=move.instance_id,
                instance_name=move.instance_name,
                node_id=move.node_id,
                reason=move.reason,
            )
            for move in self._nodes.plan_evacuation(node)
        ]
        if request.dry_run:
            return cluster_pb2.EvacuateNodeResponse(moves=moves)
        if not request.confirm_dead:
            raise FailedPrecondition(
                f"node {node}: what runs there would run twice if the node is not dead: make sure that it is switched "
                "off, then say so (confirm_dead)",
                reason="CONFIRM_DEAD_REQUIRED",
                metadata={"node": node},
            )
        operation = await self._nodes.evacuate(
            node, _mutation(request, call), resource_version=request.resource_version
        )
        return cluster_pb2.EvacuateNodeResponse(operation=self._answer(operation), moves=moves)

    async def set_fencing(
        self, request: cluster_pb2.SetNodeFencingRequest, call: Call
    ) -> operation_pb2.Operation:
        wrong = Violations()
        node = _target(request, wrong)
        if len(request.reason) > _MAX_REASON_CHARACTERS:
            wrong.add(
                "reason", f"is {len(request.reason)} characters long: use at most {_MAX_REASON_CHARACTERS}"
            )
        wrong.check()
        return self._answer(
            await self._nodes.set_fencing(
                node,
                _mutation(request, call),
                armed=request.armed,
                reason=request.reason,
                resource_version=request.resource_version,
            )
        )

    def _answer(self, operation: Versioned[OperationRecord]) -> operation_pb2.Operation:
        return self._encoder.operation(operation)

    def _use_of(self, node: Node) -> NodeResources:
        usage = self._nodes.usage(node.id)
        if usage is not None:
            return usage.resources
        return NodeResources(
            cpu_millis=node.capacity.cpu_millis,
            memory_bytes=node.capacity.memory_bytes,
            disk_bytes=node.capacity.disk_bytes,
        )


def _sum(one: NodeResources, other: NodeResources) -> NodeResources:
    return NodeResources(
        **{name: getattr(one, name) + getattr(other, name) for name in NodeResources.__struct_fields__}
    )


def _target(request: _NodeRequest, wrong: Violations) -> str:
    wrong.request_id(request.request_id)
    wrong.resource_version(request.resource_version)
    return wrong.object_name("node", request.node, "id or host name of a node")


def _mutation(request: _NodeRequest, call: Call) -> Mutation:
    return Mutation(caller=call.caller, request_id=request.request_id, payload_digest=payload_digest(request))
