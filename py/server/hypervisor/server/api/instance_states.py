"""ComputeService: changing sizes, freezing, putting on disk, and snapshots. Parses, calls, converts."""

from hypervisor.core.machines import SnapshotKind
from hypervisor.core.names import check_dns_label
from hypervisor.server.api.digest import payload_digest
from hypervisor.server.api.encoding import Encoder
from hypervisor.server.api.instance_requests import ref_of, versioned_ref_of
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.api.update_requests import update_of
from hypervisor.server.api.violations import Violations
from hypervisor.server.services import InstanceRef, Instances, Mutation
from hypervisor.v1 import compute_pb2, operation_pb2
from hypervisor.wire.enums import SNAPSHOT_KIND
from hypervisor.wire.machines import snapshot_to_wire

__all__ = ["InstanceStateHandlers"]

_Action = (
    compute_pb2.PauseInstanceRequest | compute_pb2.ResumeInstanceRequest | compute_pb2.SuspendInstanceRequest
)
_OfSnapshot = (
    compute_pb2.CreateSnapshotRequest | compute_pb2.RestoreSnapshotRequest | compute_pb2.DeleteSnapshotRequest
)


class InstanceStateHandlers:
    """The handlers by method name: :attr:`handlers`."""

    def __init__(self, instances: Instances, encoder: Encoder) -> None:
        self._instances = instances
        self._encoder = encoder

    @property
    def handlers(self) -> dict[str, Handler]:
        """This part of what ComputeService offers."""
        return {
            "UpdateInstance": self.update,
            "PauseInstance": self.pause,
            "ResumeInstance": self.resume,
            "SuspendInstance": self.suspend,
            "CreateSnapshot": self.create_snapshot,
            "ListSnapshots": self.list_snapshots,
            "RestoreSnapshot": self.restore_snapshot,
            "DeleteSnapshot": self.delete_snapshot,
        }

    async def update(self, request: compute_pb2.UpdateInstanceRequest, call: Call) -> operation_pb2.Operation:
        ref, cpu_millis, memory_mb = update_of(request)
        decided = await self._instances.update(
            ref, _mutation(request, call), cpu_millis=cpu_millis, memory_mb=memory_mb
        )
        return self._encoder.operation(decided)

    async def pause(self, request: compute_pb2.PauseInstanceRequest, call: Call) -> operation_pb2.Operation:
        decided = await self._instances.pause(_target(request), _mutation(request, call))
        return self._encoder.operation(decided)

    async def resume(self, request: compute_pb2.ResumeInstanceRequest, call: Call) -> operation_pb2.Operation:
        decided = await self._instances.resume(_target(request), _mutation(request, call))
        return self._encoder.operation(decided)

    async def suspend(
        self, request: compute_pb2.SuspendInstanceRequest, call: Call
    ) -> operation_pb2.Operation:
        decided = await self._instances.suspend(_target(request), _mutation(request, call))
        return self._encoder.operation(decided)

    async def create_snapshot(
        self, request: compute_pb2.CreateSnapshotRequest, call: Call
    ) -> operation_pb2.Operation:
        wrong = Violations()
        kind = SNAPSHOT_KIND.from_wire(request.kind)
        if kind is None and request.kind != 0:
            wrong.add("kind", "is not known: use FULL or DIFF, or leave it out")
        ref = _snapshot_target(request, wrong)
        decided = await self._instances.create_snapshot(
            ref, _mutation(request, call), name=request.snapshot, kind=kind or SnapshotKind.FULL
        )
        return self._encoder.operation(decided)

    async def list_snapshots(
        self, request: compute_pb2.ListSnapshotsRequest, call: Call
    ) -> compute_pb2.ListSnapshotsResponse:
        wrong = Violations()
        ref = ref_of(request, wrong=wrong)
        wrong.check()
        found = await self._instances.snapshots(ref, call.caller)
        return compute_pb2.ListSnapshotsResponse(snapshots=map(snapshot_to_wire, found))

    async def restore_snapshot(
        self, request: compute_pb2.RestoreSnapshotRequest, call: Call
    ) -> operation_pb2.Operation:
        ref = _snapshot_target(request, Violations())
        decided = await self._instances.restore_snapshot(ref, _mutation(request, call), name=request.snapshot)
        return self._encoder.operation(decided)

    async def delete_snapshot(
        self, request: compute_pb2.DeleteSnapshotRequest, call: Call
    ) -> operation_pb2.Operation:
        ref = _snapshot_target(request, Violations())
        decided = await self._instances.delete_snapshot(ref, _mutation(request, call), name=request.snapshot)
        return self._encoder.operation(decided)


def _snapshot_target(request: _OfSnapshot, wrong: Violations) -> InstanceRef:
    wrong.extend(check_dns_label("snapshot", request.snapshot))
    return _target(request, wrong)


def _target(request: _Action | _OfSnapshot, wrong: Violations | None = None) -> InstanceRef:
    wrong = wrong or Violations()
    wrong.request_id(request.request_id)
    ref = versioned_ref_of(request, wrong=wrong)
    wrong.check()
    return ref


def _mutation(request: _Action | _OfSnapshot | compute_pb2.UpdateInstanceRequest, call: Call) -> Mutation:
    return Mutation(
        caller=call.caller,
        request_id=request.request_id,
        payload_digest=payload_digest(request),
        wait=not request.no_wait,
    )
