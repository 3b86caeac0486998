"""Operations on the wire, and errors as operations keep them."""

from google.rpc import status_pb2

from hypervisor.core import errors
from hypervisor.core.grpc_errors import to_status
from hypervisor.core.model import ErrorRecord, OperationRecord
from hypervisor.v1 import instance_pb2, node_pb2, operation_pb2
from hypervisor.wire.enums import OPERATION_STATE
from hypervisor.wire.times import timestamp_of

__all__ = ["operation_to_wire", "status_of_record"]


def status_of_record(record: ErrorRecord) -> status_pb2.Status:
    """The kept error as google.rpc.Status."""
    return to_status(
        errors.from_kind(record.kind, record.message, reason=record.reason, metadata=record.metadata)
    )


def operation_to_wire(
    operation: OperationRecord,
    *,
    resource_version: int,
    instance: instance_pb2.Instance | None = None,
    node: node_pb2.Node | None = None,
) -> operation_pb2.Operation:
    """The record as users see it, with the object it is about where that exists."""
    return operation_pb2.Operation(
        id=operation.id,
        verb=operation.verb,
        object_kind=operation.object_kind,
        object_id=operation.object_id,
        object_name=operation.object_name,
        project=operation.project,
        principal=operation.principal,
        request_id=operation.request_id,
        state=OPERATION_STATE.to_wire(operation.state),
        done=operation.done,
        progress_percent=operation.progress_percent,
        progress_message=operation.progress_message,
        error=None if operation.error is None else status_of_record(operation.error),
        started_at=timestamp_of(operation.started_at),
        finished_at=timestamp_of(operation.finished_at),
        server_id=operation.server_id,
        resource_version=resource_version,
        instance=instance,
        node=node,
    )
