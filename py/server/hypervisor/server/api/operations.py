"""OperationService. Parses, calls, converts."""

from hypervisor.core.model import OperationRecord
from hypervisor.core.states import OperationState
from hypervisor.server.api.encoding import Encoder
from hypervisor.server.api.listing import Field, Listing, ListQuery, PageMemo, sortable_time
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.api.violations import Violations
from hypervisor.server.images.contract import OBJECT_KIND
from hypervisor.server.services import ClusterView, Kind, Operations, Versioned
from hypervisor.v1 import operation_pb2

__all__ = ["OperationHandlers"]

_Found = Versioned[OperationRecord]
_MARGIN_S = 0.2
"""Left of a caller's deadline to answer in."""
_MAX_WAIT_S = 365 * 86_400.0

LISTING: Listing[_Found] = Listing(
    fields={
        "id": Field(lambda o: o.value.id),
        "verb": Field(lambda o: o.value.verb),
        "object_kind": Field(
            lambda o: o.value.object_kind, choices=(Kind.INSTANCE.value, Kind.NODE.value, OBJECT_KIND)
        ),
        "object_id": Field(lambda o: o.value.object_id),
        "object_name": Field(lambda o: o.value.object_name),
        "project": Field(lambda o: o.value.project),
        "principal": Field(lambda o: o.value.principal),
        "state": Field(lambda o: o.value.state.value, choices=tuple(OperationState)),
        "done": Field(lambda o: "true" if o.value.done else "false", choices=("true", "false")),
    },
    orders={
        "started_at": lambda o: sortable_time(o.value.started_at),
        "finished_at": lambda o: sortable_time(o.value.finished_at),
        "verb": lambda o: o.value.verb,
        "object_name": lambda o: o.value.object_name,
    },
    default_order="started_at desc",
    identity=lambda o: o.value.id,
)


class OperationHandlers:
    """The handlers by method name: :attr:`handlers`."""

    def __init__(self, view: ClusterView, operations: Operations, encoder: Encoder) -> None:
        self._view = view
        self._memo: PageMemo[_Found] = PageMemo()
        self._operations = operations
        self._encoder = encoder

    @property
    def handlers(self) -> dict[str, Handler]:
        """What OperationService offers."""
        return {
            "GetOperation": self.get,
            "ListOperations": self.list,
            "WaitOperation": self.wait,
            "CancelOperation": self.cancel,
        }

    async def get(self, request: operation_pb2.GetOperationRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        operation = _named(wrong, request.operation)
        wrong.check()
        return self._encoder.operation(self._operations.get(operation))

    async def list(
        self, request: operation_pb2.ListOperationsRequest, call: Call
    ) -> operation_pb2.ListOperationsResponse:
        query = ListQuery(
            page_size=request.page_size,
            page_token=request.page_token,
            filter=request.filter,
            order_by=request.order_by,
        )
        page = LISTING.page(
            query, self._view.operations(), memo=self._memo, version=self._encoder.list_version()
        )
        return operation_pb2.ListOperationsResponse(
            operations=(self._encoder.operation(found) for found in page.items),
            next_page_token=page.next_page_token,
            revision=self._view.revision,
        )

    async def wait(self, request: operation_pb2.WaitOperationRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        operation = _named(wrong, request.operation)
        timeout_s: float | None = None
        if request.HasField("timeout"):
            timeout_s = wrong.seconds("timeout", request.timeout, at_least=0.0, at_most=_MAX_WAIT_S)
        wrong.check()
        remaining_s = call.remaining_s
        if remaining_s is not None:
            # Answer with the operation as it is, rather than let the deadline cut the call off.
            bound = max(remaining_s - _MARGIN_S, 0.0)
            timeout_s = bound if timeout_s is None else min(timeout_s, bound)
        return self._encoder.operation(await self._operations.wait(operation, timeout_s=timeout_s))

    async def cancel(
        self, request: operation_pb2.CancelOperationRequest, call: Call
    ) -> operation_pb2.Operation:
        wrong = Violations()
        operation = _named(wrong, request.operation)
        wrong.check()
        return self._encoder.operation(await self._operations.cancel(operation, call.caller))


def _named(wrong: Violations, operation: str) -> str:
    return wrong.object_name("operation", operation, "id of an operation, or the request_id of its call")
