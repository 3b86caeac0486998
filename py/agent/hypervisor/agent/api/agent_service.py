"""AgentService: parses requests, asks the manager, answers. The rules are in agent.proto and drivers/manager.py."""

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

from hypervisor.agent.api.console_stream import ConsoleStreams
from hypervisor.agent.drivers.driver import Assignment
from hypervisor.agent.drivers.health import DriverHealth
from hypervisor.agent.drivers.instances import InstanceRef
from hypervisor.agent.drivers.manager import Manager
from hypervisor.agent.resources import ResourceSource
from hypervisor.agent.stats.service import FRESH_S, StatsService
from hypervisor.agent.v1 import agent_pb2
from hypervisor.core.errors import FieldViolation, InvalidArgument, Unimplemented
from hypervisor.core.ids import is_id
from hypervisor.core.machines import SnapshotKind
from hypervisor.core.model import Observation, Sizes
from hypervisor.core.names import check_dns_label
from hypervisor.core.resources import millicores
from hypervisor.v1 import instance_pb2
from hypervisor.wire.enums import INSTANCE_TYPE, SNAPSHOT_KIND
from hypervisor.wire.images import source_from_wire
from hypervisor.wire.instances import observation_to_wire, spec_from_wire
from hypervisor.wire.machines import snapshot_to_wire
from hypervisor.wire.nodes import driver_to_wire, resources_to_wire
from hypervisor.wire.rpc import Call, Handler
from hypervisor.wire.stats import stats_to_wire
from hypervisor.wire.times import seconds_of

__all__ = ["AgentService"]

_MAX_GRACE_S = 3600.0
_MIN_INTERVAL_S = FRESH_S
_MAX_INTERVAL_S = 60.0
_DEFAULT_INTERVAL_S = 1.0
_MAX_HISTORY_S = 3600.0


class AgentService:
    """The handlers of AgentService, for ``Dispatcher.service``."""

    def __init__(
        self,
        *,
        manager: Manager,
        drivers: DriverHealth,
        resources: ResourceSource,
        consoles: ConsoleStreams,
        stats: StatsService,
    ) -> None:
        self._manager = manager
        self._drivers = drivers
        self._resources = resources
        self._consoles = consoles
        self._stats = stats

    def handlers(self) -> Mapping[str, Handler]:
        """Method name -> handler."""
        return {
            "CreateInstance": self.create_instance,
            "StartInstance": self.start_instance,
            "StopInstance": self.stop_instance,
            "DeleteInstance": self.delete_instance,
            "RestartInstance": self.restart_instance,
            "UpdateInstance": self.update_instance,
            "PauseInstance": self.pause_instance,
            "ResumeInstance": self.resume_instance,
            "SuspendInstance": self.suspend_instance,
            "CreateSnapshot": self.create_snapshot,
            "ListSnapshots": self.list_snapshots,
            "RestoreSnapshot": self.restore_snapshot,
            "DeleteSnapshot": self.delete_snapshot,
            "GetNodeResources": self.get_node_resources,
            "ListLocalInstances": self.list_local_instances,
            "GetInstanceStats": self.get_instance_stats,
            "WatchInstanceStats": self.watch_instance_stats,
            "AttachConsole": self._consoles.attach,
            "GetInstanceLogs": self._consoles.logs,
            "Reconcile": self.reconcile,
        }

    async def create_instance(
        self, request: agent_pb2.CreateInstanceRequest, _: Call
    ) -> agent_pb2.InstanceReply:
        ref = _ref(request.ref)
        wrong = []
        if not request.name:
            wrong.append(FieldViolation("name", "is required"))
        if not request.project:
            wrong.append(FieldViolation("project", "is required"))
        if wrong:
            raise InvalidArgument.of_fields(tuple(wrong))
        assignment = Assignment(
            instance_id=ref.instance_id,
            name=request.name,
            project=request.project,
            type=INSTANCE_TYPE.required(request.type, "type"),
            spec=spec_from_wire(request.spec),
            labels=dict(request.labels),
            generation=ref.generation,
            epoch=ref.epoch,
            sources=tuple(
                source_from_wire(source, f"images[{index}]") for index, source in enumerate(request.images)
            ),
        )
        return _reply(await self._manager.create(assignment, start=request.start))

    async def start_instance(
        self, request: agent_pb2.StartInstanceRequest, _: Call
    ) -> agent_pb2.InstanceReply:
        return _reply(await self._manager.start(_ref(request.ref)))

    async def stop_instance(self, request: agent_pb2.StopInstanceRequest, _: Call) -> agent_pb2.InstanceReply:
        return _reply(await self._manager.stop(_ref(request.ref), grace_s=_grace(request)))

    async def restart_instance(
        self, request: agent_pb2.RestartInstanceRequest, _: Call
    ) -> agent_pb2.InstanceReply:
        return _reply(await self._manager.restart(_ref(request.ref), grace_s=_grace(request)))

    async def delete_instance(
        self, request: agent_pb2.DeleteInstanceRequest, _: Call
    ) -> agent_pb2.DeleteInstanceReply:
        existed = await self._manager.delete(_ref(request.ref), grace_s=_grace(request))
        return agent_pb2.DeleteInstanceReply(existed=existed)

    async def update_instance(
        self, request: agent_pb2.UpdateInstanceRequest, _: Call
    ) -> agent_pb2.InstanceReply:
        wrong = [
            FieldViolation(field, "must be more than 0")
            for field, value in (("cpu_cores", request.cpu_cores), ("memory_mb", request.memory_mb))
            if not value > 0
        ]
        if wrong:
            raise InvalidArgument.of_fields(tuple(wrong))
        sizes = Sizes(cpu_millis=millicores(request.cpu_cores), memory_mb=request.memory_mb)
        return _reply(await self._manager.update(_ref(request.ref), sizes))

    async def pause_instance(
        self, request: agent_pb2.InstanceActionRequest, _: Call
    ) -> agent_pb2.InstanceReply:
        return _reply(await self._manager.pause(_ref(request.ref)))

    async def resume_instance(
        self, request: agent_pb2.InstanceActionRequest, _: Call
    ) -> agent_pb2.InstanceReply:
        return _reply(await self._manager.resume(_ref(request.ref)))

    async def suspend_instance(
        self, request: agent_pb2.InstanceActionRequest, _: Call
    ) -> agent_pb2.InstanceReply:
        return _reply(await self._manager.suspend(_ref(request.ref)))

    async def create_snapshot(self, request: agent_pb2.SnapshotRequest, _: Call) -> agent_pb2.InstanceReply:
        kind = SNAPSHOT_KIND.required(request.kind, "kind") if request.kind else SnapshotKind.FULL
        seen = await self._manager.create_snapshot(_ref(request.ref), _snapshot(request), kind=kind)
        return _reply(seen)

    async def list_snapshots(
        self, request: agent_pb2.InstanceActionRequest, _: Call
    ) -> agent_pb2.ListSnapshotsReply:
        found = await self._manager.list_snapshots(_ref(request.ref))
        return agent_pb2.ListSnapshotsReply(snapshots=map(snapshot_to_wire, found))

    async def restore_snapshot(self, request: agent_pb2.SnapshotRequest, _: Call) -> agent_pb2.InstanceReply:
        return _reply(await self._manager.restore_snapshot(_ref(request.ref), _snapshot(request)))

    async def delete_snapshot(self, request: agent_pb2.SnapshotRequest, _: Call) -> agent_pb2.InstanceReply:
        return _reply(await self._manager.delete_snapshot(_ref(request.ref), _snapshot(request)))

    async def get_node_resources(
        self, _request: agent_pb2.GetNodeResourcesRequest, _: Call
    ) -> agent_pb2.GetNodeResourcesReply:
        return agent_pb2.GetNodeResourcesReply(
            resources=resources_to_wire(await self._resources.read()),
            drivers=[driver_to_wire(info) for info in self._drivers.infos()],
        )

    async def list_local_instances(
        self, _request: agent_pb2.ListLocalInstancesRequest, _: Call
    ) -> agent_pb2.ListLocalInstancesReply:
        found = await self._manager.list()
        return agent_pb2.ListLocalInstancesReply(instances=[observation_to_wire(seen) for seen in found])

    async def get_instance_stats(
        self, request: agent_pb2.GetInstanceStatsRequest, _: Call
    ) -> instance_pb2.InstanceStats:
        return stats_to_wire(await self._stats.fresh(_instance_id(request.instance_id)))

    async def watch_instance_stats(
        self, request: agent_pb2.WatchInstanceStatsRequest, _: Call
    ) -> AsyncIterator[instance_pb2.InstanceStats]:
        """Samples until the caller cancels or the instance ends."""
        instance_id = _instance_id(request.instance_id)
        interval_s = seconds_of(request.interval) if request.HasField("interval") else _DEFAULT_INTERVAL_S
        history_s = seconds_of(request.history)
        wrong = []
        if not _MIN_INTERVAL_S <= interval_s <= _MAX_INTERVAL_S:
            wrong.append(FieldViolation("interval", "must be from 100 ms to 60 s"))
        if not 0 <= history_s <= _MAX_HISTORY_S:
            wrong.append(FieldViolation("history", "must be from 0 to 1 hour"))
        if wrong:
            raise InvalidArgument.of_fields(tuple(wrong))
        samples = self._stats.watch(instance_id, interval_s=interval_s, history_s=history_s)
        async with aclosing(samples):
            async for sample in samples:
                yield stats_to_wire(sample)

    async def reconcile(self, _request: agent_pb2.ReconcileRequest, _: Call) -> agent_pb2.ReconcileReply:
        raise Unimplemented(
            "Reconcile is not in this version: compare ListLocalInstances with what is wanted and re-drive each "
            "instance by its own calls",
            reason="CAPABILITY_MISSING",
            metadata={"verb": "reconcile"},
        )


def _reply(seen: Observation) -> agent_pb2.InstanceReply:
    return agent_pb2.InstanceReply(instance=observation_to_wire(seen))


def _instance_id(instance_id: str) -> str:
    if not instance_id or len(instance_id) > 128:
        raise InvalidArgument.of_field("instance_id", "is required: give an instance id")
    return instance_id


def _snapshot(request: agent_pb2.SnapshotRequest) -> str:
    wrong = check_dns_label("snapshot", request.snapshot)
    if wrong is not None:
        raise InvalidArgument.of_fields((wrong,))
    return request.snapshot


def _ref(ref: agent_pb2.InstanceRef) -> InstanceRef:
    wrong = []
    if not is_id(ref.id, "i"):
        wrong.append(FieldViolation("ref.id", "must be an instance id: i- and 26 characters"))
    if ref.generation < 1:
        wrong.append(FieldViolation("ref.generation", "must be at least 1"))
    if ref.epoch < 1:
        wrong.append(FieldViolation("ref.epoch", "must be at least 1"))
    if wrong:
        raise InvalidArgument.of_fields(tuple(wrong))
    return InstanceRef(ref.id, ref.generation, ref.epoch)


def _grace(
    request: agent_pb2.StopInstanceRequest
    | agent_pb2.RestartInstanceRequest
    | agent_pb2.DeleteInstanceRequest,
) -> float:
    grace_s = seconds_of(request.grace_period)
    if not 0 <= grace_s <= _MAX_GRACE_S:
        raise InvalidArgument.of_field("grace_period", "must be from 0 to 1 hour")
    return grace_s
