"""How nodes are to be drained, and budgets: requests checked and turned into domain values, and answers. Pure."""

from collections.abc import Mapping
from datetime import datetime

from google.protobuf.duration_pb2 import Duration

from hypervisor.core.moves import MoveStrategy
from hypervisor.core.names import check_dns_label
from hypervisor.core.states import InstanceType, OperationState
from hypervisor.server.api.move_requests import MAX_HEALTHY_S, strategy_of
from hypervisor.server.api.placement_requests import check_constraints
from hypervisor.server.api.violations import Violations
from hypervisor.server.draining.budgets import Standing
from hypervisor.server.draining.progress import DrainProgress, InstanceProgress
from hypervisor.server.draining.records import Budget, DrainOrder
from hypervisor.v1 import cluster_pb2, maintenance_pb2
from hypervisor.wire.constraints import constraints_from_wire, constraints_to_wire
from hypervisor.wire.enums import DRAIN_INSTANCE_STATE, MOVE_STRATEGY
from hypervisor.wire.times import timestamp_of

__all__ = ["budget_of", "budget_to_wire", "drain_order_of", "progress_to_wire"]

_DEFAULT_TIMEOUT_S = 600.0
_DEFAULT_PARALLEL = 2
_MAX_PARALLEL = 64
_MAX_TIMEOUT_S = 30 * 86_400.0
_MAX_GRACE_S = 3600.0
_MAX_CONDITIONS = 8
_MOST = 1_000_000


def drain_order_of(
    wrong: Violations, request: cluster_pb2.DrainNodeRequest | maintenance_pb2.RestoreNodeRequest
) -> DrainOrder:
    """How the node is to be drained, or given back its instances."""
    timeout_s = _DEFAULT_TIMEOUT_S
    if request.HasField("timeout"):
        timeout_s = wrong.seconds("timeout", request.timeout, at_least=1.0, at_most=_MAX_TIMEOUT_S)
    force_after_s = None
    if isinstance(request, cluster_pb2.DrainNodeRequest):
        force_after_s = _force_after(wrong, request, timeout_s)
    if request.parallel:
        wrong.whole("parallel", request.parallel, low=1, high=_MAX_PARALLEL)
    healthy_s = grace_s = None
    if request.HasField("healthy_after"):
        healthy_s = _span(wrong, "healthy_after", request.healthy_after, MAX_HEALTHY_S)
    if request.HasField("grace_period"):
        grace_s = _span(wrong, "grace_period", request.grace_period, _MAX_GRACE_S)
    return DrainOrder(
        timeout_s=timeout_s,
        parallel=request.parallel or _DEFAULT_PARALLEL,
        force_after_s=force_after_s,
        strategies=_strategies(wrong, request.strategies),
        allow_disk_loss=request.allow_disk_loss,
        healthy_s=healthy_s,
        grace_s=grace_s,
    )


def _span(wrong: Violations, field: str, value: Duration, most_s: float) -> float:
    return wrong.seconds(field, value, at_least=0.0, at_most=most_s)


def _force_after(wrong: Violations, request: cluster_pb2.DrainNodeRequest, timeout_s: float) -> float | None:
    deadline_s = timeout_s
    if request.HasField("deadline"):
        deadline_s = wrong.seconds("deadline", request.deadline, at_least=0.0, at_most=_MAX_TIMEOUT_S)
        if not request.force:
            wrong.add(
                "deadline", "says from when on instances are stopped by force: set force, or use timeout"
            )
    return deadline_s if request.force else None


def _strategies(wrong: Violations, given: Mapping[str, int]) -> dict[InstanceType, MoveStrategy]:
    found = {}
    for name, number in given.items():
        strategy = strategy_of(wrong, f"strategies[{name}]", number)
        try:
            found[InstanceType(name)] = strategy
        except ValueError:
            known = ", ".join(kind.value for kind in InstanceType)
            wrong.add("strategies", f"{name[:40]} is not a type of instances: use {known}")
    return found


def progress_to_wire(progress: DrainProgress) -> cluster_pb2.DrainNodeProgress:
    """A step of a drain."""
    return cluster_pb2.DrainNodeProgress(
        instances_total=progress.total,
        instances_moved=progress.moved,
        instances_stopped=progress.stopped,
        message=progress.message,
        instances=map(_instance_to_wire, progress.instances),
        node_id=progress.node_id,
        operation_id=progress.operation_id,
        done=progress.state is not OperationState.RUNNING,
    )


def _instance_to_wire(one: InstanceProgress) -> cluster_pb2.DrainInstance:
    return cluster_pb2.DrainInstance(
        instance_id=one.instance_id,
        name=one.name,
        project=one.project,
        state=DRAIN_INSTANCE_STATE.to_wire(one.state),
        message=one.message,
        strategy=MOVE_STRATEGY.to_wire(one.strategy),
        target_node_id=one.target,
        operation_id=one.operation_id,
    )


def budget_of(request: maintenance_pb2.SetBudgetRequest, *, now: datetime) -> Budget:
    """The budget to set. InvalidArgument with every wrong field."""
    wrong = Violations()
    budget = request.budget
    wrong.extend(check_dns_label("budget.name", budget.name))
    project = wrong.project("budget.project", budget.project)
    if not budget.selector:
        wrong.add("budget.selector", "is required: say which instances it is about")
    check_constraints(wrong, "budget.selector", budget.selector, most=_MAX_CONDITIONS, whose="instances")
    limit = budget.WhichOneof("limit")
    if limit is None:
        wrong.add("budget", "needs a limit: give max_unavailable or min_available")
    else:
        wrong.whole(f"budget.{limit}", getattr(budget, limit), low=0, high=_MOST)
    wrong.output_only(budget, ("created_at", "members", "available", "allowed"), "budget.")
    wrong.check()
    return Budget(
        project=project,
        name=budget.name,
        selector=constraints_from_wire(budget.selector),
        created_at=now,
        max_unavailable=budget.max_unavailable if limit == "max_unavailable" else None,
        min_available=budget.min_available if limit == "min_available" else None,
    )


def budget_to_wire(budget: Budget, stands: Standing) -> maintenance_pb2.DisruptionBudget:
    """A budget, and how it stands."""
    message = maintenance_pb2.DisruptionBudget(
        name=budget.name,
        project=budget.project,
        selector=constraints_to_wire(budget.selector),
        created_at=timestamp_of(budget.created_at),
        members=stands.members,
        available=stands.available,
        allowed=stands.allowed,
    )
    if budget.max_unavailable is not None:
        message.max_unavailable = budget.max_unavailable
    if budget.min_available is not None:
        message.min_available = budget.min_available
    return message
