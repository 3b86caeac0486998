"""The agent's client of ClusterService: domain values in and out, several servers with fail-over.

One server is used at a time. When it cannot be reached the next one is tried with the next call; the caller retries.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc
import grpc.aio
import structlog

from hypervisor.agent.cluster_link_heartbeats import HeartbeatStream
from hypervisor.core.availability import NodeFencing
from hypervisor.core.clock import Clock
from hypervisor.core.errors import DeadlineExceeded, HypervisorError, Unavailable
from hypervisor.core.grpc_errors import from_rpc_error
from hypervisor.core.model import (
    DriverInfo,
    InstanceStats,
    InstancesUsage,
    NodeResources,
    Observation,
    Taint,
)
from hypervisor.core.states import NodeRole
from hypervisor.v1 import cluster_pb2, cluster_pb2_grpc, node_pb2
from hypervisor.wire.availability import fencing_to_wire
from hypervisor.wire.enums import NODE_ROLE
from hypervisor.wire.instances import observation_to_wire
from hypervisor.wire.nodes import driver_to_wire, resources_to_wire, taint_to_wire
from hypervisor.wire.stats import stats_to_wire, usage_to_wire
from hypervisor.wire.times import seconds_of, timestamp_of

__all__ = ["ClusterLink", "GrpcClusterLink", "HeartbeatTimes", "NodeDescription"]

_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Agents of one process (simulated ones) must not share a connection's fate by gRPC's global pool.
    ("grpc.use_local_subchannel_pool", 1),
)

R = TypeVar("R")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NodeDescription:
    """What the agent says of its node when it registers, apart from what changes."""

    id: str
    hostname: str
    address: str
    port: int
    region: str
    zone: str
    role: NodeRole
    labels: Mapping[str, str]
    agent_version: str
    incarnation: str
    simulated: bool
    taints: tuple[Taint, ...] = ()


@dataclass(frozen=True, slots=True)
class HeartbeatTimes:
    """What the server wants, in seconds; 0: it did not say."""

    interval_s: float
    timeout_s: float
    disarmed: bool = False
    """The node shall not fence itself."""


class ClusterLink(Protocol):
    """What the agent tells the control plane. Methods raise classes of core.errors."""

    async def register(
        self,
        node: NodeDescription,
        *,
        resources: NodeResources,
        drivers: Sequence[DriverInfo],
        observations: Sequence[Observation],
        fencing: NodeFencing | None = None,
    ) -> HeartbeatTimes: ...

    async def heartbeat(
        self,
        node: NodeDescription,
        *,
        resources: NodeResources,
        usage: InstancesUsage,
        stats: Mapping[str, InstanceStats],
        images: Sequence[str] = (),
        fencing: NodeFencing | None = None,
    ) -> HeartbeatTimes: ...

    async def update_status(
        self,
        node: NodeDescription,
        *,
        drivers: Sequence[DriverInfo],
        observations: Sequence[Observation],
    ) -> tuple[str, ...]:
        """Returns the ids of instances this node should not have."""
        ...


class GrpcClusterLink:
    """ClusterLink over gRPC. ``addresses`` are ``host:port`` of the servers, tried in turn."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        credentials: grpc.ChannelCredentials | None,
        token: str = "",
        clock: Clock,
        timeout_s: float = 5.0,
    ) -> None:
        if not addresses:
            raise ValueError("at least one server address is needed")
        self._addresses = tuple(addresses)
        self._credentials = credentials
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._clock = clock
        self._timeout_s = timeout_s
        self._current = 0
        self._channel: grpc.aio.Channel | None = None
        self._stub: cluster_pb2_grpc.ClusterServiceAsyncStub | None = None
        self._heartbeats: HeartbeatStream | None = None
        self._switching = asyncio.Lock()

    @property
    def server(self) -> str:
        """The server in use now."""
        return self._addresses[self._current]

    async def register(
        self,
        node: NodeDescription,
        *,
        resources: NodeResources,
        drivers: Sequence[DriverInfo],
        observations: Sequence[Observation],
        fencing: NodeFencing | None = None,
    ) -> HeartbeatTimes:
        request = cluster_pb2.RegisterNodeRequest(
            node=node_pb2.Node(
                id=node.id,
                hostname=node.hostname,
                address=node.address,
                port=node.port,
                region=node.region,
                zone=node.zone,
                role=NODE_ROLE.to_wire(node.role),
                resources=resources_to_wire(resources),
                labels=node.labels,
                drivers=[driver_to_wire(driver) for driver in drivers],
                agent_version=node.agent_version,
                simulated=node.simulated,
                taints=map(taint_to_wire, node.taints),
                fencing=fencing_to_wire(fencing),
            ),
            incarnation=node.incarnation,
            instances=[observation_to_wire(seen) for seen in observations],
        )
        answer = await self._call("RegisterNode", request, cluster_pb2.RegisterNodeResponse)
        return HeartbeatTimes(
            seconds_of(answer.heartbeat_interval),
            seconds_of(answer.heartbeat_timeout),
            answer.node.fencing.disarm_requested,
        )

    async def heartbeat(
        self,
        node: NodeDescription,
        *,
        resources: NodeResources,
        usage: InstancesUsage,
        stats: Mapping[str, InstanceStats],
        images: Sequence[str] = (),
        fencing: NodeFencing | None = None,
    ) -> HeartbeatTimes:
        request = cluster_pb2.HeartbeatRequest(
            node_id=node.id,
            incarnation=node.incarnation,
            resources=resources_to_wire(resources),
            sent_at=timestamp_of(self._clock.now()),
            stats={instance_id: stats_to_wire(sample) for instance_id, sample in stats.items()},
            usage=usage_to_wire(usage),
            image_digests=images,
            fencing=fencing_to_wire(fencing),
        )
        answer = await self._beat(request)
        return HeartbeatTimes(
            seconds_of(answer.heartbeat_interval),
            seconds_of(answer.heartbeat_timeout),
            answer.fencing_disarmed,
        )

    async def update_status(
        self,
        node: NodeDescription,
        *,
        drivers: Sequence[DriverInfo],
        observations: Sequence[Observation],
    ) -> tuple[str, ...]:
        request = cluster_pb2.UpdateNodeStatusRequest(
            node_id=node.id,
            incarnation=node.incarnation,
            drivers=[driver_to_wire(driver) for driver in drivers],
            instances=[observation_to_wire(seen) for seen in observations],
        )
        answer = await self._call("UpdateNodeStatus", request, cluster_pb2.UpdateNodeStatusResponse)
        return tuple(answer.unexpected_instance_ids)

    async def aclose(self) -> None:
        """Close the connection; idempotent."""
        channel, self._channel, self._stub = self._channel, None, None
        heartbeats, self._heartbeats = self._heartbeats, None
        if heartbeats is not None:
            heartbeats.close()
        if channel is not None:
            await channel.close(grace=None)

    async def _call(self, method: str, request: object, _answer: type[R]) -> R:
        server = self.server
        stub = self._connect()
        try:
            answer: R = await getattr(stub, method)(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as exc:
            raise await self._failed(exc, server) from exc
        return answer

    async def _beat(self, request: cluster_pb2.HeartbeatRequest) -> cluster_pb2.HeartbeatResponse:
        server = self.server
        stub = self._connect()
        if self._heartbeats is None:
            self._heartbeats = HeartbeatStream(stub, metadata=self._metadata)
        try:
            return await self._heartbeats.beat(request, timeout_s=self._timeout_s)
        except grpc.aio.AioRpcError as exc:
            raise await self._failed(exc, server) from exc

    async def _failed(self, exc: grpc.aio.AioRpcError, server: str) -> HypervisorError:
        """The error of a call to ``server``, after the next server was taken if that one failed."""
        error = from_rpc_error(exc, peer=f"server {server}")
        if isinstance(error, Unavailable | DeadlineExceeded):
            await self._fail_over(server, error.reason)
        return error

    def _connect(self) -> "cluster_pb2_grpc.ClusterServiceAsyncStub":
        if self._stub is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.server, options=_OPTIONS)
            else:
                self._channel = grpc.aio.secure_channel(self.server, self._credentials, options=_OPTIONS)
            self._stub = cluster_pb2_grpc.ClusterServiceStub(self._channel)
        return self._stub

    async def _fail_over(self, failed: str, reason: str) -> None:
        """Take the next server, unless another call has done so already."""
        async with self._switching:
            if self.server != failed or len(self._addresses) == 1:
                return
            await self.aclose()
            self._current = (self._current + 1) % len(self._addresses)
            _log.warning("server_switched", failed=failed, reason=reason, server=self.server)
