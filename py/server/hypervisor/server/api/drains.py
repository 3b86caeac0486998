"""ClusterService.DrainNode and MaintenanceService: drains, returns and budgets. Parses, calls, converts."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from hypervisor.core.clock import Clock
from hypervisor.server.api.digest import payload_digest
from hypervisor.server.api.drain_requests import budget_of, budget_to_wire, drain_order_of, progress_to_wire
from hypervisor.server.api.encoding import Encoder
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.api.violations import Violations
from hypervisor.server.draining.records import Budget, DrainKind
from hypervisor.server.services import Maintenance, Mutation
from hypervisor.v1 import cluster_pb2, maintenance_pb2, operation_pb2

__all__ = ["DrainHandlers"]

_MAX_REASON_CHARACTERS = 256


class DrainHandlers:
    """The handlers by method name: :attr:`cluster` and :attr:`maintenance`."""

    def __init__(self, maintenance: Maintenance, encoder: Encoder, clock: Clock) -> None:
        self._maintenance = maintenance
        self._encoder = encoder
        self._clock = clock

    @property
    def cluster(self) -> dict[str, Handler]:
        """This part of what ClusterService offers."""
        return {"DrainNode": self.drain}

    @property
    def maintenance(self) -> dict[str, Handler]:
        """What MaintenanceService offers."""
        return {
            "WatchDrain": self.watch,
            "CancelDrain": self.cancel,
            "RestoreNode": self.restore,
            "SetBudget": self.set_budget,
            "ListBudgets": self.list_budgets,
            "DeleteBudget": self.delete_budget,
        }

    async def drain(
        self, request: cluster_pb2.DrainNodeRequest, call: Call
    ) -> AsyncIterator[cluster_pb2.DrainNodeProgress]:
        wrong = Violations()
        wrong.request_id(request.request_id)
        wrong.resource_version(request.resource_version)
        node = _node(wrong, request.node)
        order = drain_order_of(wrong, request)
        if len(request.reason) > _MAX_REASON_CHARACTERS:
            wrong.add(
                "reason", f"is {len(request.reason)} characters long: use at most {_MAX_REASON_CHARACTERS}"
            )
        wrong.check()
        if request.dry_run:
            yield progress_to_wire(self._maintenance.plan(node, order=order))
            return
        operation_id = await self._maintenance.drain(
            node,
            _mutation(request, call),
            order=order,
            reason=request.reason,
            resource_version=request.resource_version,
        )
        async with aclosing(self._steps(node, operation_id)) as steps:
            async for step in steps:
                yield step

    async def restore(
        self, request: maintenance_pb2.RestoreNodeRequest, call: Call
    ) -> AsyncIterator[cluster_pb2.DrainNodeProgress]:
        wrong = Violations()
        wrong.request_id(request.request_id)
        node = _node(wrong, request.node)
        order = drain_order_of(wrong, request)
        wrong.check()
        if request.dry_run:
            yield progress_to_wire(self._maintenance.plan(node, order=order, kind=DrainKind.RESTORE))
            return
        operation_id = await self._maintenance.restore(node, _mutation(request, call), order=order)
        async with aclosing(self._steps(node, operation_id)) as steps:
            async for step in steps:
                yield step

    async def watch(
        self, request: maintenance_pb2.WatchDrainRequest, call: Call
    ) -> AsyncIterator[cluster_pb2.DrainNodeProgress]:
        wrong = Violations()
        node = _node(wrong, request.node)
        wrong.check()
        async with aclosing(self._steps(node, "")) as steps:
            async for step in steps:
                yield step

    async def _steps(
        self, node: str, operation_id: str
    ) -> AsyncGenerator[cluster_pb2.DrainNodeProgress, None]:
        async with aclosing(self._maintenance.watch(node, operation_id)) as steps:
            async for step in steps:
                yield progress_to_wire(step)

    async def cancel(
        self, request: maintenance_pb2.CancelDrainRequest, call: Call
    ) -> operation_pb2.Operation:
        wrong = Violations()
        node = _node(wrong, request.node)
        wrong.check()
        return self._encoder.operation(await self._maintenance.cancel(node, call.caller))

    async def set_budget(
        self, request: maintenance_pb2.SetBudgetRequest, call: Call
    ) -> maintenance_pb2.DisruptionBudget:
        budget = await self._maintenance.set_budget(budget_of(request, now=self._clock.now()))
        return self._shown(budget)

    async def list_budgets(
        self, request: maintenance_pb2.ListBudgetsRequest, call: Call
    ) -> maintenance_pb2.ListBudgetsResponse:
        wrong = Violations()
        if request.project:
            wrong.project("project", request.project)
        wrong.check()
        found = self._maintenance.budgets(request.project)
        return maintenance_pb2.ListBudgetsResponse(
            budgets=[budget_to_wire(budget, stands) for budget, stands in found]
        )

    async def delete_budget(
        self, request: maintenance_pb2.DeleteBudgetRequest, call: Call
    ) -> maintenance_pb2.DeleteBudgetResponse:
        wrong = Violations()
        name = wrong.object_name("name", request.name, "name of a budget")
        project = wrong.project("project", request.project)
        wrong.check()
        await self._maintenance.delete_budget(project, name)
        return maintenance_pb2.DeleteBudgetResponse()

    def _shown(self, budget: Budget) -> maintenance_pb2.DisruptionBudget:
        found = self._maintenance.budgets(budget.project)
        return next(budget_to_wire(b, stands) for b, stands in found if b.name == budget.name)


def _node(wrong: Violations, node: str) -> str:
    return wrong.object_name("node", node, "id or host name of a node")


def _mutation(
    request: cluster_pb2.DrainNodeRequest | maintenance_pb2.RestoreNodeRequest, call: Call
) -> Mutation:
    return Mutation(caller=call.caller, request_id=request.request_id, payload_digest=payload_digest(request))
