"""Operations that the reconciler begins by itself: it has an instance made again, or its agent told of it. Pure."""

from datetime import datetime

from msgspec import structs

from hypervisor.core.model import Instance, OperationRecord
from hypervisor.core.states import DesiredState, InstanceStatus, can_move
from hypervisor.server import keys
from hypervisor.server.drafts import Draft
from hypervisor.server.store.storage import Compare

__all__ = ["ADOPT", "RECREATE", "SYSTEM", "begin_adopt", "begin_create_again", "unheld"]

RECREATE = "recreate"
"""Makes an instance again whose node has lost it."""
ADOPT = "adopt"
"""Tells an agent what an instance is that it has found."""
SYSTEM = "system:reconcile"
"""Who asks for what nobody asked for."""


def unheld(draft: Draft, instance_id: str, *, node_id: str, epoch: int, fence: Compare) -> Instance | None:
    """The instance, if it still is what was looked at and nobody is at it."""
    draft.guard(fence)
    found = draft.get(keys.instance(instance_id))
    if found is None:
        return None
    instance = found.value
    same = (instance.node_id, instance.epoch) == (node_id, epoch)
    free = not instance.operation_id and instance.desired is not DesiredState.DELETED
    return instance if same and free else None


def begin_create_again(
    draft: Draft,
    instance_id: str,
    *,
    node_id: str,
    epoch: int,
    fence: Compare,
    operation: OperationRecord,
    deadline: datetime,
) -> OperationRecord | None:
    """Place it anew where it was: a higher epoch, so that nothing said of the lost copy is about this one."""
    instance = unheld(draft, instance_id, node_id=node_id, epoch=epoch, fence=fence)
    if instance is None:
        return None
    # From where it cannot move to CREATING it is known to run: it was seen since.
    if (
        not can_move(instance.status, InstanceStatus.CREATING)
        and instance.status is not InstanceStatus.RUNNING
    ):
        return None
    again = structs.replace(
        instance,
        epoch=instance.next_epoch,
        last_epoch=0,
        status=InstanceStatus.CREATING,
        status_reason="RECREATED",
        status_message="its node lost it: it is made again",
        exit_code=None,
        restarts=None,
        observed_sequence=0,
    )
    return _begin(draft, again, operation, deadline)


def begin_adopt(
    draft: Draft,
    instance_id: str,
    *,
    node_id: str,
    epoch: int,
    fence: Compare,
    operation: OperationRecord,
    deadline: datetime,
) -> OperationRecord | None:
    """Tell its agent what it is."""
    instance = unheld(draft, instance_id, node_id=node_id, epoch=epoch, fence=fence)
    return None if instance is None else _begin(draft, instance, operation, deadline)


def _begin(
    draft: Draft, instance: Instance, operation: OperationRecord, deadline: datetime
) -> OperationRecord:
    recorded = structs.replace(
        operation,
        object_id=instance.id,
        object_name=instance.name,
        project=instance.project,
        node_id=instance.node_id,
    )
    draft.put(
        keys.instance(instance.id),
        structs.replace(
            instance, operation_id=recorded.id, transition_deadline=deadline, updated_at=draft.now
        ),
    )
    draft.create(keys.operation(recorded.id), recorded)
    return recorded
