"""Values as the text of a table cell. An empty text is shown as ``-``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hypervisor.ctl.quantities import age, readable_bytes

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from hypervisor.v1.image_pb2 import Image
    from hypervisor.v1.instance_pb2 import Instance, InstanceSpec, LabelConstraint, Toleration
    from hypervisor.v1.maintenance_pb2 import DisruptionBudget
    from hypervisor.v1.node_pb2 import DriverInfo, Node, Taint
    from hypervisor.v1.operation_pb2 import Operation

__all__ = [
    "budget_limit",
    "constraint",
    "cores",
    "drivers",
    "enum_name",
    "exit_of",
    "image_state",
    "instance_status",
    "labels",
    "memory_of",
    "move",
    "move_policy",
    "node_status",
    "operation_outcome",
    "placements",
    "restart_policy",
    "restarts",
    "since",
    "span",
    "taint",
    "toleration",
    "used_of",
]

_FAILURES_SHOWN = 2
"""One failure may be anything; from the second on a node's status says that placements fail there."""


def enum_name(descriptor_name: str, prefix: str) -> str:
    """``RUNNING`` of ``INSTANCE_STATUS_RUNNING`` in lower case; an unset value is empty."""
    name = descriptor_name.removeprefix(prefix).lower()
    return "" if name == "unspecified" else name


def since(moment: "Timestamp", now_s: float) -> str:
    """How long ago a moment was; empty when it is not set."""
    return age(now_s - moment.seconds) if moment.seconds else ""


def span(start: "Timestamp", end: "Timestamp", now_s: float) -> str:
    """Time from start to end, or to now."""
    if not start.seconds:
        return ""
    if not end.seconds:
        return age(now_s - start.seconds)
    seconds = end.seconds - start.seconds + (end.nanos - start.nanos) / 1e9
    return f"{seconds:.2f}s" if seconds < 60 else age(seconds)


def cores(amount: float) -> str:
    """Processors, with at most three decimals."""
    return f"{amount:.3f}".rstrip("0").rstrip(".")


def used_of(used: float, total: float) -> str:
    """``1.5/8`` processors."""
    return f"{cores(round(used, 1))}/{cores(total)}" if total else ""


def memory_of(used: int, total: int) -> str:
    """``1.2GiB/8GiB``."""
    return f"{readable_bytes(used)}/{readable_bytes(total)}" if total else ""


def labels(values: Mapping[str, str]) -> str:
    """``a=1,b=2`` in the order of the keys."""
    return ",".join(f"{key}={values[key]}" for key in sorted(values))


def instance_status(instance: "Instance") -> str:
    """The status, with the reason where it is not the ordinary one."""
    from hypervisor.v1.instance_pb2 import InstanceStatus

    status = enum_name(InstanceStatus.Name(instance.status), "INSTANCE_STATUS_")
    told = (InstanceStatus.INSTANCE_STATUS_FAILED, InstanceStatus.INSTANCE_STATUS_UNKNOWN)
    if instance.status in told or instance.restarts.HasField("next_at"):
        return f"{status} ({instance.status_reason})" if instance.status_reason else status
    return status


def image_state(image: "Image") -> str:
    """The state, or that no server alive has the content."""
    from hypervisor.v1.image_pb2 import ImageState

    state = enum_name(ImageState.Name(image.state), "IMAGE_STATE_")
    return state if image.servers or state != "ready" else "unavailable"


def move(instance: "Instance") -> str:
    """Its move, or what is left of one."""
    if not instance.HasField("move"):
        return ""
    from hypervisor.v1.instance_pb2 import InstanceMove, MoveStrategy

    moved = instance.move
    how = enum_name(MoveStrategy.Name(moved.strategy), "MOVE_STRATEGY_")
    phase = enum_name(InstanceMove.Phase.Name(moved.phase), "PHASE_")
    lost = f"; lost is {moved.loses}" if moved.loses else ""
    return f"from node {moved.source_node_id} to {moved.target_node_id} by {how}, {phase}{lost}"


def move_policy(spec: "InstanceSpec") -> str:
    """How it is to be moved."""
    if not spec.HasField("move"):
        return ""
    from hypervisor.v1.instance_pb2 import MoveStrategy

    parts = [enum_name(MoveStrategy.Name(spec.move.strategy), "MOVE_STRATEGY_")]
    if spec.move.healthy_after.ToNanoseconds():
        parts.append(f"after running {spec.move.healthy_after.ToNanoseconds() / 1e9:g}s")
    if spec.move.allow_disk_loss:
        parts.append("its disk may be lost")
    return ", ".join(filter(None, parts))


def constraint(condition: "LabelConstraint") -> str:
    """A condition on a label."""
    from hypervisor.v1.instance_pb2 import LabelConstraint

    if condition.operator == LabelConstraint.OPERATOR_EXISTS:
        return condition.key
    word = "not in" if condition.operator == LabelConstraint.OPERATOR_NOT_IN else "in"
    return f"{condition.key} {word} ({', '.join(condition.values)})"


def budget_limit(budget: "DisruptionBudget") -> str:
    """What a budget allows."""
    if budget.WhichOneof("limit") == "min_available":
        return f"at least {budget.min_available} there"
    return f"at most {budget.max_unavailable} away"


def exit_of(instance: "Instance") -> str:
    """The exit code of the last run."""
    return str(instance.exit_code) if instance.HasField("exit_code") else ""


def restart_policy(spec: "InstanceSpec") -> str:
    """After which ends it is started again, and how."""
    from hypervisor.v1.instance_pb2 import RestartCondition

    policy = spec.restart
    if not policy.condition:
        return ""
    condition = enum_name(RestartCondition.Name(policy.condition), "RESTART_CONDITION_").replace("_", "-")
    most = f"at most {policy.max_restarts} in a row, " if policy.HasField("max_restarts") else ""
    first, last = policy.initial_delay.ToNanoseconds() / 1e9, policy.max_delay.ToNanoseconds() / 1e9
    return f"{condition}: {most}after {first:g}s to {last:g}s"


def restarts(instance: "Instance", now_s: float) -> str:
    """What the policy has done, and what comes next."""
    done = instance.restarts
    if not instance.HasField("restarts"):
        return ""
    parts = [f"{done.count} in a row, {done.total} in all"]
    if done.total:
        parts.append(f"the last {since(done.last_at, now_s)} ago")
    if done.last_reason:
        code = f" with exit code {done.last_exit_code}" if done.HasField("last_exit_code") else ""
        parts.append(f"last end: {done.last_reason}{code}")
    if done.HasField("next_at"):
        parts.append(f"the next is due at {done.next_at.ToJsonString()}")
    if done.exhausted:
        parts.append("no more are allowed")
    return "; ".join(parts)


def node_status(node: "Node") -> str:
    """The status, with what is not usual about it."""
    from hypervisor.v1.node_pb2 import NodeStatus

    status = enum_name(NodeStatus.Name(node.status), "NODE_STATUS_")
    if not node.schedulable and status == "ready":
        status = f"{status},cordoned"
    if status == "ready" and fencing(node).startswith("disarmed"):
        status = f"{status},disarmed"
    failing = node.placement_health.failures
    return f"{status},placements fail" if failing >= _FAILURES_SHOWN else status


def fencing(node: "Node") -> str:
    """Whether the node fences itself; what is not in effect yet stands beside it."""
    from hypervisor.v1.node_pb2 import FencingState

    state = enum_name(FencingState.Name(node.fencing.state), "FENCING_STATE_")
    if node.fencing.disarm_requested and state != "disarmed":
        return f"{state or 'none'},to be disarmed"
    return state


def placements(node: "Node") -> str:
    """How placements on the node have gone lately."""
    failures = node.placement_health.failures
    if not failures:
        return "have failed, and work again"
    return "the last one failed" if failures == 1 else f"the last {failures} failed"


def taint(item: "Taint") -> str:
    """``key=value:effect``."""
    from hypervisor.v1.instance_pb2 import TaintEffect

    effect = enum_name(TaintEffect.Name(item.effect), "TAINT_EFFECT_")
    return f"{item.key}{f'={item.value}' if item.value else ''}:{effect}"


def toleration(item: "Toleration") -> str:
    """``key=value``, ``key`` of any value, ``*`` for all taints; with the effect where it is of one only."""
    from hypervisor.v1.instance_pb2 import TaintEffect, Toleration

    any_value = item.operator == Toleration.OPERATOR_EXISTS
    text = (item.key or "*") if any_value else f"{item.key}={item.value}"
    effect = enum_name(TaintEffect.Name(item.effect), "TAINT_EFFECT_") if item.effect else ""
    return f"{text}:{effect}" if effect else text


def drivers(node: "Node") -> str:
    """Drivers that work; those that do not are marked with ``!``."""
    return ",".join(f"{'' if driver.available else '!'}{driver.name}" for driver in node.drivers)


def driver_types(driver: "DriverInfo") -> str:
    """Instance types of a driver."""
    from hypervisor.v1.instance_pb2 import InstanceType

    return ",".join(enum_name(InstanceType.Name(kind), "INSTANCE_TYPE_") for kind in driver.types)


def operation_outcome(operation: "Operation") -> str:
    """The state, or how far it is."""
    from hypervisor.v1.operation_pb2 import OperationState

    state = enum_name(OperationState.Name(operation.state), "OPERATION_STATE_")
    return (
        state
        if operation.done or not operation.progress_percent
        else f"{state} {operation.progress_percent}%"
    )
