"""The part of the double of the server that is about moves, drains and budgets."""

# ruff: noqa: N802  # methods are named as their RPCs
from collections.abc import Iterator
from typing import Any

from hvtest_fake_state import refuse
from hypervisor.core import errors
from hypervisor.v1 import cluster_pb2, instance_pb2, maintenance_pb2, maintenance_pb2_grpc, operation_pb2

__all__ = ["FakeMaintenance"]


class FakeMaintenance(maintenance_pb2_grpc.MaintenanceServiceServicer):
    """Drains move the instances of a node one a step to the node that comes next by name.

    ``drains``      requests of DrainNode and RestoreNode, as they came
    ``cut_drains``  so many streams break off after their first step, as those of a server that is killed
    """

    def __init__(self) -> None:
        self.drains: list[Any] = []
        self.cut_drains = 0
        self.cancelled_drains: list[str] = []
        self.budgets: dict[str, maintenance_pb2.DisruptionBudget] = {}

    def MoveInstance(self: Any, request: Any, context: Any) -> operation_pb2.Operation:
        def change(instance: instance_pb2.Instance) -> None:
            instance.node_id = request.node or "n-2"
            instance.epoch += 1
            self.change_instance(instance, instance.status, "MOVED")

        moved: operation_pb2.Operation = self._instance_verb("MoveInstance", "move", request, context, change)
        return moved

    def DrainNode(self: Any, request: Any, context: Any) -> Iterator[cluster_pb2.DrainNodeProgress]:
        self._enter("DrainNode", request, context)
        self.drains.append(request)
        node = self._node(request.node, context)
        state = cluster_pb2.DrainInstance.STATE_PLANNED
        names = sorted(i.name for i in self.instances.values())
        if request.dry_run:
            planned = [
                cluster_pb2.DrainInstance(
                    name=name,
                    state=state,
                    strategy=instance_pb2.MOVE_STRATEGY_REPLACE,
                    target_node_id=node.id,
                )
                for name in names
            ]
            yield cluster_pb2.DrainNodeProgress(
                instances=planned, message=f"{len(names)} would go, 0 could not go now", done=True
            )
            return
        yield from self._steps(names, context)

    def _steps(self, names: list[str], context: Any) -> Iterator[cluster_pb2.DrainNodeProgress]:
        for moved in range(len(names) + 1):
            done = moved == len(names)
            gone = [
                cluster_pb2.DrainInstance(
                    instance_id=f"i-{name}", name=name, state=cluster_pb2.DrainInstance.STATE_MOVED
                )
                for name in names[max(0, moved - 1) : moved]
            ]
            yield cluster_pb2.DrainNodeProgress(
                instances_total=len(names),
                instances_moved=moved,
                instances=gone,
                operation_id="op-1",
                message="nothing runs on it any more" if done else f"{len(names) - moved} wait",
                done=done,
            )
            if moved == 0 and self.cut_drains:
                self.cut_drains -= 1
                refuse(context, errors.Unavailable("this server is stopping", reason="SERVER_STOPPING"))

    def RestoreNode(self: Any, request: Any, context: Any) -> Iterator[cluster_pb2.DrainNodeProgress]:
        self._enter("RestoreNode", request, context)
        self.drains.append(request)
        yield from self._steps(["web"], context)

    def WatchDrain(self: Any, request: Any, context: Any) -> Iterator[cluster_pb2.DrainNodeProgress]:
        self._enter("WatchDrain", request, context)
        yield cluster_pb2.DrainNodeProgress(instances_total=2, instances_moved=1, done=True)
        refuse(
            context,
            errors.FailedPrecondition("1 instances (db) could not be moved", reason="DRAIN_INCOMPLETE"),
        )

    def CancelDrain(self: Any, request: Any, context: Any) -> operation_pb2.Operation:
        self._enter("CancelDrain", request, context)
        self.cancelled_drains.append(request.node)
        return operation_pb2.Operation(id="op-1", verb="drain")

    def SetBudget(self: Any, request: Any, context: Any) -> maintenance_pb2.DisruptionBudget:
        self._enter("SetBudget", request, context)
        made = maintenance_pb2.DisruptionBudget()
        made.CopyFrom(request.budget)
        made.members, made.available, made.allowed = 3, 3, 1
        self.budgets[made.name] = made
        return made

    def ListBudgets(self: Any, request: Any, context: Any) -> maintenance_pb2.ListBudgetsResponse:
        self._enter("ListBudgets", request, context)
        return maintenance_pb2.ListBudgetsResponse(budgets=self.budgets.values())

    def DeleteBudget(self: Any, request: Any, context: Any) -> maintenance_pb2.DeleteBudgetResponse:
        self._enter("DeleteBudget", request, context)
        if self.budgets.pop(request.name, None) is None:
            refuse(context, errors.NotFound(f"there is no budget {request.name}", reason="BUDGET_NOT_FOUND"))
        return maintenance_pb2.DeleteBudgetResponse()
