"""Agents over gRPC: one channel per address, deadlines on every call, errors of the one tree. Implements ``Agents``."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import grpc
import structlog

from hypervisor.agent.v1 import agent_pb2, agent_pb2_grpc
from hypervisor.core.consoles import ConsoleOptions, LogOptions, LogPiece
from hypervisor.core.errors import HypervisorError, Internal, Unavailable
from hypervisor.core.grpc_errors import from_rpc_error
from hypervisor.core.images import ImageSource
from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.model import Instance, InstanceStats, Node, Observation, Sizes
from hypervisor.core.resources import cores
from hypervisor.server.agents import CallContext
from hypervisor.server.agents_console import AgentConsole, attach_method, open_console
from hypervisor.wire.consoles import log_options_to_wire, log_piece_from_wire
from hypervisor.wire.enums import INSTANCE_TYPE, SNAPSHOT_KIND
from hypervisor.wire.flow import STREAM_OPTIONS
from hypervisor.wire.images import source_to_wire
from hypervisor.wire.instances import observation_from_wire, spec_to_wire
from hypervisor.wire.machines import snapshot_from_wire
from hypervisor.wire.stats import stats_from_wire
from hypervisor.wire.times import duration_of

if TYPE_CHECKING:
    from hypervisor.agent.v1.agent_pb2_grpc import AgentServiceAsyncStub

__all__ = ["AgentPool", "GrpcAgent"]

R = TypeVar("R")

log = structlog.get_logger(__name__)

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
    *STREAM_OPTIONS,
)


class GrpcAgent:
    """One agent; see ``Agent``."""

    def __init__(self, channel: grpc.aio.Channel, *, hostname: str, address: str) -> None:
        self._stub: AgentServiceAsyncStub = agent_pb2_grpc.AgentServiceStub(channel)
        self._attach_console = attach_method(channel)
        self._peer = f"the agent of node {hostname} at {address}"
        self._hostname = hostname

    async def create(
        self, instance: Instance, context: CallContext, *, start: bool, images: tuple[ImageSource, ...] = ()
    ) -> Observation:
        reply = await self._call(
            self._stub.CreateInstance,
            agent_pb2.CreateInstanceRequest(
                ref=_ref(instance),
                name=instance.name,
                project=instance.project,
                type=INSTANCE_TYPE.to_wire(instance.type),
                spec=spec_to_wire(instance.spec),
                labels=instance.labels,
                start=start,
                images=map(source_to_wire, images),
            ),
            context,
        )
        return self._observation(reply)

    async def start(self, instance: Instance, context: CallContext) -> Observation:
        request = agent_pb2.StartInstanceRequest(ref=_ref(instance))
        return self._observation(await self._call(self._stub.StartInstance, request, context))

    async def stop(self, instance: Instance, context: CallContext, *, grace_s: float) -> Observation:
        request = agent_pb2.StopInstanceRequest(ref=_ref(instance), grace_period=duration_of(grace_s))
        return self._observation(await self._call(self._stub.StopInstance, request, context))

    async def restart(self, instance: Instance, context: CallContext, *, grace_s: float) -> Observation:
        request = agent_pb2.RestartInstanceRequest(ref=_ref(instance), grace_period=duration_of(grace_s))
        return self._observation(await self._call(self._stub.RestartInstance, request, context))

    async def delete(self, instance: Instance, context: CallContext, *, grace_s: float) -> bool:
        request = agent_pb2.DeleteInstanceRequest(ref=_ref(instance), grace_period=duration_of(grace_s))
        reply = await self._call(self._stub.DeleteInstance, request, context)
        return reply.existed

    async def delete_copy(self, seen: Observation, context: CallContext) -> bool:
        ref = agent_pb2.InstanceRef(id=seen.instance_id, generation=seen.generation, epoch=seen.epoch)
        request = agent_pb2.DeleteInstanceRequest(ref=ref)
        return (await self._call(self._stub.DeleteInstance, request, context)).existed

    async def update(self, instance: Instance, context: CallContext, *, sizes: Sizes) -> Observation:
        request = agent_pb2.UpdateInstanceRequest(
            ref=_ref(instance), cpu_cores=cores(sizes.cpu_millis), memory_mb=sizes.memory_mb
        )
        return self._observation(await self._call(self._stub.UpdateInstance, request, context))

    async def pause(self, instance: Instance, context: CallContext) -> Observation:
        return await self._act(self._stub.PauseInstance, instance, context)

    async def resume(self, instance: Instance, context: CallContext) -> Observation:
        return await self._act(self._stub.ResumeInstance, instance, context)

    async def suspend(self, instance: Instance, context: CallContext) -> Observation:
        return await self._act(self._stub.SuspendInstance, instance, context)

    async def create_snapshot(
        self, instance: Instance, context: CallContext, *, name: str, kind: SnapshotKind
    ) -> Observation:
        request = agent_pb2.SnapshotRequest(
            ref=_ref(instance), snapshot=name, kind=SNAPSHOT_KIND.to_wire(kind)
        )
        return self._observation(await self._call(self._stub.CreateSnapshot, request, context))

    async def list_snapshots(self, instance: Instance, context: CallContext) -> tuple[Snapshot, ...]:
        request = agent_pb2.InstanceActionRequest(ref=_ref(instance))
        reply = await self._call(self._stub.ListSnapshots, request, context)
        return tuple(snapshot_from_wire(snapshot) for snapshot in reply.snapshots)

    async def restore_snapshot(self, instance: Instance, context: CallContext, *, name: str) -> Observation:
        request = agent_pb2.SnapshotRequest(ref=_ref(instance), snapshot=name)
        return self._observation(await self._call(self._stub.RestoreSnapshot, request, context))

    async def delete_snapshot(self, instance: Instance, context: CallContext, *, name: str) -> Observation:
        request = agent_pb2.SnapshotRequest(ref=_ref(instance), snapshot=name)
        return self._observation(await self._call(self._stub.DeleteSnapshot, request, context))

    async def list(self, context: CallContext) -> tuple[Observation, ...]:
        request = agent_pb2.ListLocalInstancesRequest()
        reply = await self._call(self._stub.ListLocalInstances, request, context)
        return tuple(observation_from_wire(seen) for seen in reply.instances)

    async def stats(self, instance_id: str, context: CallContext) -> InstanceStats:
        request = agent_pb2.GetInstanceStatsRequest(instance_id=instance_id)
        return stats_from_wire(await self._call(self._stub.GetInstanceStats, request, context))

    async def watch_stats(
        self, instance_id: str, context: CallContext, *, interval_s: float, history_s: float
    ) -> AsyncGenerator[InstanceStats, None]:
        request = agent_pb2.WatchInstanceStatsRequest(
            instance_id=instance_id, interval=duration_of(interval_s), history=duration_of(history_s)
        )
        call = self._stub.WatchInstanceStats(request, metadata=_metadata(context))
        try:
            with self._translated():
                async for sample in call:
                    yield stats_from_wire(sample)
        finally:
            call.cancel()

    async def attach_console(
        self,
        instance_id: str,
        context: CallContext,
        options: ConsoleOptions,
    ) -> AgentConsole:
        call = self._attach_console(metadata=_metadata(context))
        return await open_console(
            call,
            instance_id,
            timeout_s=context.timeout_s,
            options=options,
            translated=self._translated,
        )

    async def logs(
        self, instance_id: str, context: CallContext, options: LogOptions
    ) -> AsyncGenerator[LogPiece, None]:
        request = log_options_to_wire(options, instance=instance_id)
        call = self._stub.GetInstanceLogs(request, metadata=_metadata(context))
        try:
            with self._translated():
                async for chunk in call:
                    yield log_piece_from_wire(chunk)
        finally:
            call.cancel()

    async def _act(
        self,
        method: Callable[..., Awaitable[agent_pb2.InstanceReply]],
        instance: Instance,
        context: CallContext,
    ) -> Observation:
        request = agent_pb2.InstanceActionRequest(ref=_ref(instance))
        return self._observation(await self._call(method, request, context))

    async def _call(self, method: Callable[..., Awaitable[R]], request: object, context: CallContext) -> R:
        with self._translated():
            return await method(request, timeout=context.timeout_s, metadata=_metadata(context))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """What gRPC raises inside, as errors of ours."""
        try:
            yield
        except grpc.aio.AioRpcError as exc:
            raise self._error(exc) from exc
        except grpc.aio.UsageError as exc:
            # The channel was closed before the call: the node left, or its address changed.
            raise self._unreachable(str(exc)) from exc
        except asyncio.CancelledError as exc:
            # A channel that is closed under a call ends it like this, in a task that nobody has cancelled.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self._unreachable(
                f"the connection to {self._peer} was closed: its node left or moved"
            ) from exc

    def _error(self, failure: grpc.aio.AioRpcError) -> HypervisorError:
        error = from_rpc_error(failure, peer=self._peer)
        if error.reason == "PEER_UNREACHABLE" or failure.code() is grpc.StatusCode.CANCELLED:
            return self._unreachable(error.message)
        if isinstance(error, Internal):
            # Its message is withheld on the wire; where to look is what helps.
            return Internal(
                f"{self._peer} failed: see its log", reason=error.reason, metadata={"node": self._hostname}
            )
        return error

    def _unreachable(self, why: str) -> Unavailable:
        return Unavailable(
            why, reason="NODE_UNREACHABLE", metadata={"node": self._hostname}, retry_after_s=1.0
        )

    def _observation(self, reply: agent_pb2.InstanceReply) -> Observation:
        return observation_from_wire(reply.instance)


class AgentPool:
    """Channels to agents, made when first used and closed when nodes vanish. Enter it with ``async with``."""

    def __init__(
        self, *, credentials: grpc.ChannelCredentials | None = None, connect_timeout_s: float = 5.0
    ) -> None:
        self._credentials = credentials
        # Its name says "backoff", yet it is how long gRPC lets one attempt to connect take.
        self._options = (*_OPTIONS, ("grpc.min_reconnect_backoff_ms", round(connect_timeout_s * 1000)))
        self._channels: dict[str, tuple[str, grpc.aio.Channel, GrpcAgent]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "AgentPool":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def agent(self, node: Node) -> GrpcAgent:
        """See ``Agents``. A node that moved gets a new channel; the old one ends its calls and closes."""
        host = f"[{node.address}]" if ":" in node.address else node.address
        address = f"{host}:{node.port}"
        known = self._channels.get(node.id)
        if known is not None:
            if known[0] == address:
                return known[2]
            self._close(node.id)
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(address, options=self._options)
        else:
            channel = grpc.aio.secure_channel(address, self._credentials, options=self._options)
        agent = GrpcAgent(channel, hostname=node.hostname, address=address)
        self._channels[node.id] = (address, channel, agent)
        return agent

    def forget_all_but(self, node_ids: Iterable[str]) -> None:
        """Close the channels of nodes that are gone."""
        for node_id in self._channels.keys() - set(node_ids):
            self._close(node_id)

    def _close(self, node_id: str) -> None:
        address, channel, _ = self._channels.pop(node_id)
        log.info("agent_channel_closed", node_id=node_id, address=address)
        # Owned by the pool: awaited in aclose, at the latest.
        task = asyncio.create_task(channel.close(grace=1.0), name=f"close-{address}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def aclose(self) -> None:
        """End all calls and close all channels. Idempotent."""
        channels = [channel for _, channel, _ in self._channels.values()]
        self._channels.clear()
        await asyncio.gather(*(channel.close(grace=None) for channel in channels), *self._closing)


def _ref(instance: Instance) -> agent_pb2.InstanceRef:
    return agent_pb2.InstanceRef(id=instance.id, generation=instance.generation, epoch=instance.epoch)


def _metadata(context: CallContext) -> tuple[tuple[str, str], ...]:
    return (("x-request-id", context.request_id),)
