"""What a change means, for people: an UPPER_SNAKE reason and one sentence. Pure."""

from datetime import datetime

from hypervisor.core.model import Instance, Node, OperationRecord
from hypervisor.core.states import InstanceStatus, NodeStatus, OperationState

__all__ = ["describe_instance", "describe_node", "describe_operation", "recorded_at"]

Text = tuple[str, str]

_STATUS_PHRASES = {
    "pending": "waits for a node",
    "scheduled": "was placed",
    "creating": "is being created",
    "running": "is running",
    "stopping": "is being stopped",
    "stopped": "is stopped",
    "paused": "is paused",
    "deleting": "is being deleted",
    "migrating": "is on its way to another node",
    "failed": "failed",
    "unknown": "cannot be seen, as its node is lost",
}


def describe_instance(previous: Instance | None, current: Instance | None) -> Text:
    """What happened to an instance."""
    if current is None:
        name = previous.name if previous is not None else "?"
        return "DELETED", f"instance {name} was deleted"
    if previous is None:
        return "CREATED", f"instance {current.name} was created"
    if _started_again(previous, current):
        assert current.restarts is not None
        ended = current.restarts.last_reason or "it ended"
        return (
            "RESTARTED",
            f"instance {current.name} was started again by its policy ({ended}; {current.restarts.count} in a row)",
        )
    if previous.status is not current.status or previous.status_reason != current.status_reason:
        reason = current.status_reason or current.status.name
        if current.status_message:
            return reason, f"instance {current.name}: {current.status_message}"
        return reason, f"instance {current.name} {_STATUS_PHRASES[current.status.value]}"
    if previous.node_id != current.node_id:
        return "PLACED", f"instance {current.name} was placed on node {current.node_id}"
    if previous.desired is not current.desired:
        return "DESIRED_STATE_CHANGED", f"instance {current.name} shall be {current.desired.value}"
    if previous.spec != current.spec:
        return "SPEC_CHANGED", f"the specification of instance {current.name} was changed"
    return "UPDATED", f"instance {current.name} was updated"


def _started_again(previous: Instance, current: Instance) -> bool:
    before = 0 if previous.restarts is None else previous.restarts.total
    return (
        current.status is InstanceStatus.RUNNING
        and current.restarts is not None
        and current.restarts.total > before
    )


def describe_node(previous: Node | None, current: Node | None) -> Text:
    """What happened to a node."""
    if current is None:
        name = previous.hostname if previous is not None else "?"
        return "NODE_DEREGISTERED", f"node {name} was removed from the cluster"
    name = current.hostname
    if previous is None:
        return "NODE_REGISTERED", f"node {name} joined the cluster"
    if previous.schedulable is not current.schedulable:
        if current.schedulable:
            return "NODE_UNCORDONED", f"node {name} takes new instances again"
        why = f": {current.cordon_reason}" if current.cordon_reason else ""
        return "NODE_CORDONED", f"node {name} takes no new instances{why}"
    if previous.status is not current.status:
        if current.status is NodeStatus.OFFLINE:
            why = f": {current.status_message}" if current.status_message else ""
            return "NODE_OFFLINE", f"node {name} is not heard of any more{why}"
        return f"NODE_{current.status.name}", f"node {name} is {current.status.value}"
    told = _loss_text(previous, current)
    if told is not None:
        return told
    if previous.incarnation != current.incarnation:
        return "NODE_AGENT_RESTARTED", f"the agent of node {name} was started anew"
    if previous.drivers != current.drivers:
        working = sorted(driver.name for driver in current.drivers if driver.available)
        return "NODE_DRIVERS_CHANGED", f"drivers that work on node {name}: {', '.join(working) or 'none'}"
    if previous.taints != current.taints:
        taints = ", ".join(map(str, current.taints)) or "none"
        return "NODE_TAINTS_CHANGED", f"taints of node {name}: {taints}"
    if previous.capacity != current.capacity:
        return "NODE_CAPACITY_CHANGED", f"the capacity of node {name} changed"
    return "NODE_UPDATED", f"node {name} was updated"


def _loss_text(previous: Node, current: Node) -> Text | None:
    """What was decided about a lost node, or about fencing."""
    name = current.hostname
    before, loss = previous.loss, current.loss
    if loss is not None and loss.evacuated_by and not (before and before.evacuated_by):
        return "NODE_EVACUATED", f"node {name} is dead, says {loss.evacuated_by}: its instances are moved"
    if loss is not None and loss.held and not (before and before.held):
        return "NODE_MOVES_HELD", f"nothing is moved off node {name}: {loss.held}"
    if previous.disarmed != current.disarmed:
        if current.disarmed:
            return "NODE_FENCING_DISARMED", f"fencing of node {name}: {current.disarmed}"
        return "NODE_FENCING_ARMED", f"fencing of node {name} was switched on"
    if previous.fencing != current.fencing and current.fencing is not None:
        why = f": {current.fencing.reason}" if current.fencing.reason else ""
        return "NODE_FENCING_CHANGED", f"node {name} is {current.fencing.state.value}{why}"
    return None


def describe_operation(previous: OperationRecord | None, current: OperationRecord | None) -> Text:
    """What happened to an operation."""
    operation = current or previous
    if operation is None:
        return "OPERATION_FORGOTTEN", "an operation is not kept any longer"
    what = f"{operation.verb} of {operation.object_kind} {operation.object_name or operation.object_id}"
    if current is None:
        return "OPERATION_FORGOTTEN", f"{what}: not kept any longer"
    if current.state is OperationState.RUNNING:
        if previous is None:
            return "OPERATION_STARTED", f"{what}: asked for by {current.principal}"
        progress = current.progress_message or "goes on"
        return "OPERATION_PROGRESS", f"{what}: {progress} ({current.progress_percent} %)"
    if current.error is not None:
        return f"OPERATION_{current.state.name}", f"{what}: {current.error.message}"
    return f"OPERATION_{current.state.name}", f"{what}: {current.state.value}"


def recorded_at(value: Instance | Node | OperationRecord, *, created: bool, deleted: bool) -> datetime | None:
    """When the change was recorded, where the record tells."""
    if deleted:
        return None
    if not isinstance(value, OperationRecord):
        return value.updated_at
    return value.started_at if created else value.finished_at
