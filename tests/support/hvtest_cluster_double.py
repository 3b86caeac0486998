"""A strict ClusterService for tests of the agent: real gRPC on loopback, cluster.proto's rules for nodes, no store.

Knows nodes by id and incarnation, refuses what the contract refuses, keeps every request, and can be told to forget a
node, to fail, or to be away.
"""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from hypervisor.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    HypervisorError,
    InvalidArgument,
    NotFound,
)
from hypervisor.core.grpc_errors import code_of, to_status, trailing_metadata
from hypervisor.core.ids import is_id
from hypervisor.v1 import cluster_pb2, instance_pb2, node_pb2
from hypervisor.wire.times import duration_of

__all__ = ["ClusterDouble", "KnownNode"]

_OBSERVABLE = {
    instance_pb2.INSTANCE_STATUS_CREATING,
    instance_pb2.INSTANCE_STATUS_RUNNING,
    instance_pb2.INSTANCE_STATUS_STOPPING,
    instance_pb2.INSTANCE_STATUS_STOPPED,
    instance_pb2.INSTANCE_STATUS_PAUSED,
    instance_pb2.INSTANCE_STATUS_DELETING,
    instance_pb2.INSTANCE_STATUS_FAILED,
}


@dataclass
class KnownNode:
    """A registered node and what it told."""

    node: node_pb2.Node
    incarnation: str
    heartbeats: list[cluster_pb2.HeartbeatRequest] = field(default_factory=list)
    instances: dict[str, cluster_pb2.InstanceObservation] = field(default_factory=dict)
    """Newest observation of each instance."""


class ClusterDouble:
    """One server. ``async with`` serves; several doubles are several servers."""

    def __init__(self, *, interval_s: float = 0.05) -> None:
        self.interval_s = interval_s
        self.nodes: dict[str, KnownNode] = {}
        self.registrations: list[cluster_pb2.RegisterNodeRequest] = []
        self.updates: list[cluster_pb2.UpdateNodeStatusRequest] = []
        self.unexpected: list[str] = []
        self.disarmed = False
        """Nodes are told not to fence themselves."""
        self.refuse: list[HypervisorError] = []
        """Errors of the next calls, whatever they are."""
        self.streams_heartbeats = True
        """False, before the start: a server that is too old for Heartbeats."""
        self.heartbeat_streams = 0
        """How many were opened."""
        self._server: grpc.aio.Server | None = None
        self._port = 0

    @property
    def address(self) -> str:
        """``host:port``; the same after a stop and a start."""
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Serve, at the same address as before."""
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        server.add_generic_rpc_handlers((self._handlers(),))
        self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Be away; what is known stays."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    async def __aenter__(self) -> "ClusterDouble":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _handlers(self) -> "grpc.GenericRpcHandler":
        """The agents' side of ClusterService; whatever else is called answers UNIMPLEMENTED."""
        service = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"]
        serve: dict[str, tuple[Any, Any]] = {
            "RegisterNode": (self._register, cluster_pb2.RegisterNodeRequest),
            "Heartbeat": (self._heartbeat, cluster_pb2.HeartbeatRequest),
            "UpdateNodeStatus": (self._update, cluster_pb2.UpdateNodeStatusRequest),
        }
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(
                method,
                request_deserializer=request.FromString,
                response_serializer=lambda reply: reply.SerializeToString(),
            )
            for name, (method, request) in serve.items()
        }
        if self.streams_heartbeats:
            handlers["Heartbeats"] = grpc.stream_stream_rpc_method_handler(
                self._heartbeats,
                request_deserializer=cluster_pb2.HeartbeatRequest.FromString,
                response_serializer=lambda reply: reply.SerializeToString(),
            )
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    def forget(self) -> None:
        """Know no node any more, as after a lease that ended."""
        self.nodes.clear()

    async def _register(
        self, request: cluster_pb2.RegisterNodeRequest, context: Any
    ) -> cluster_pb2.RegisterNodeResponse:
        await self._refuse(context)
        node = request.node
        wrong = [
            name
            for name, good in {
                "node.id": is_id(node.id, "n"),
                "node.hostname": bool(node.hostname),
                "node.address": bool(node.address),
                "node.port": 0 < node.port < 65536,
                "node.resources": node.resources.cpu_cores > 0 and node.resources.memory_bytes > 0,
                "node.agent_version": bool(node.agent_version),
                "incarnation": bool(request.incarnation),
            }.items()
            if not good
        ]
        if wrong:
            await _abort(context, InvalidArgument(f"wrong: {wrong}"))
        if any(k.node.hostname == node.hostname and k.node.id != node.id for k in self.nodes.values()):
            await _abort(context, AlreadyExists("host name taken", reason="HOSTNAME_TAKEN"))
        await self._check(context, request.instances)
        known = KnownNode(node, request.incarnation)
        known.instances = {seen.instance_id: seen for seen in request.instances}
        self.nodes[node.id] = known
        self.registrations.append(request)
        answered = node_pb2.Node()
        answered.CopyFrom(node)
        answered.fencing.disarm_requested = self.disarmed
        return cluster_pb2.RegisterNodeResponse(
            node=answered,
            heartbeat_interval=duration_of(self.interval_s),
            heartbeat_timeout=duration_of(3 * self.interval_s),
            cluster_id="c-test",
        )

    async def _heartbeat(
        self, request: cluster_pb2.HeartbeatRequest, context: Any
    ) -> cluster_pb2.HeartbeatResponse:
        known = await self._known(request.node_id, request.incarnation, context)
        if request.resources.cpu_cores <= 0 or not request.HasField("sent_at"):
            await _abort(context, InvalidArgument("a heartbeat needs resources and sent_at"))
        known.heartbeats.append(request)
        return cluster_pb2.HeartbeatResponse(
            heartbeat_interval=duration_of(self.interval_s),
            heartbeat_timeout=duration_of(3 * self.interval_s),
            fencing_disarmed=self.disarmed,
        )

    async def _heartbeats(
        self, requests: AsyncIterator[cluster_pb2.HeartbeatRequest], context: Any
    ) -> AsyncIterator[cluster_pb2.HeartbeatResponse]:
        self.heartbeat_streams += 1
        async for request in requests:
            yield await self._heartbeat(request, context)

    async def _update(
        self, request: cluster_pb2.UpdateNodeStatusRequest, context: Any
    ) -> cluster_pb2.UpdateNodeStatusResponse:
        known = await self._known(request.node_id, request.incarnation, context)
        await self._check(context, request.instances)
        for seen in request.instances:
            before = known.instances.get(seen.instance_id)
            if before is None or (seen.epoch, seen.sequence) > (before.epoch, before.sequence):
                known.instances[seen.instance_id] = seen
        if request.drivers:
            del known.node.drivers[:]
            known.node.drivers.extend(request.drivers)
        self.updates.append(request)
        return cluster_pb2.UpdateNodeStatusResponse(unexpected_instance_ids=self.unexpected)

    async def _known(self, node_id: str, incarnation: str, context: Any) -> KnownNode:
        await self._refuse(context)
        known = self.nodes.get(node_id)
        if known is None:
            await _abort(context, NotFound("no such node", reason="NODE_NOT_FOUND"))
        assert known is not None
        if known.incarnation != incarnation:
            await _abort(context, FailedPrecondition("another agent", reason="INCARNATION_MISMATCH"))
        return known

    async def _refuse(self, context: Any) -> None:
        if self.refuse:
            await _abort(context, self.refuse.pop(0))

    async def _check(self, context: Any, instances: Iterable[cluster_pb2.InstanceObservation]) -> None:
        for seen in instances:
            legal = (
                is_id(seen.instance_id, "i")
                and seen.status in _OBSERVABLE
                and seen.sequence > 0
                and seen.HasField("observed_at")
                and seen.epoch > 0
                and seen.generation > 0
            )
            if not legal:
                await _abort(context, InvalidArgument(f"not a legal observation: {seen}"))


async def _abort(context: Any, error: HypervisorError) -> None:
    status = to_status(error)
    await context.abort(code_of(error), status.message, trailing_metadata(status))
