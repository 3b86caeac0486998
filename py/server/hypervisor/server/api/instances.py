"""ComputeService: instances, but for the console. Parses, calls, converts."""

from collections.abc import AsyncIterator
from contextlib import aclosing

from hypervisor.core.model import Instance
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType
from hypervisor.server.api.digest import payload_digest
from hypervisor.server.api.encoding import Encoder, encoded_list
from hypervisor.server.api.instance_requests import (
    VersionedRequest,
    draft_of,
    read_ref_of,
    ref_of,
    stats_spans,
    stop_options,
    versioned_ref_of,
)
from hypervisor.server.api.listing import Field, Listing, ListQuery, PageMemo, sortable_time
from hypervisor.server.api.placements import explanation_to_wire
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.api.violations import Violations
from hypervisor.server.explaining import Explainer
from hypervisor.server.services import ClusterView, InstanceRef, Instances, Mutation, Versioned
from hypervisor.v1 import compute_pb2, instance_pb2, operation_pb2
from hypervisor.wire.stats import stats_to_wire

__all__ = ["InstanceHandlers"]

_Found = Versioned[Instance]

LISTING: Listing[_Found] = Listing(
    fields={
        "id": Field(lambda i: i.value.id),
        "name": Field(lambda i: i.value.name, prefix=True),
        "type": Field(lambda i: i.value.type.value, choices=tuple(InstanceType)),
        "status": Field(lambda i: i.value.status.value, choices=tuple(InstanceStatus)),
        "node_id": Field(lambda i: i.value.node_id),
        "desired_state": Field(lambda i: i.value.desired.value, choices=tuple(DesiredState)),
    },
    orders={
        "name": lambda i: i.value.name,
        "created_at": lambda i: sortable_time(i.value.created_at),
        "status": lambda i: i.value.status.value,
        "type": lambda i: i.value.type.value,
        "node_id": lambda i: i.value.node_id,
    },
    default_order="name",
    identity=lambda i: i.value.id,
    labels=lambda i: i.value.labels,
)


class InstanceHandlers:
    """The handlers by method name: :attr:`handlers`."""

    def __init__(
        self, view: ClusterView, instances: Instances, encoder: Encoder, explainer: Explainer
    ) -> None:
        self._view = view
        self._memo: PageMemo[_Found] = PageMemo()
        self._instances = instances
        self._encoder = encoder
        self._explainer = explainer

    @property
    def handlers(self) -> dict[str, Handler]:
        """What ComputeService offers, but for AttachConsole."""
        return {
            "CreateInstance": self.create,
            "GetInstance": self.get,
            "ListInstances": self.list,
            "StartInstance": self.start,
            "StopInstance": self.stop,
            "DeleteInstance": self.delete,
            "RestartInstance": self.restart,
            "GetInstanceStats": self.stats,
            "WatchInstanceStats": self.watch_stats,
        }

    async def create(self, request: compute_pb2.CreateInstanceRequest, call: Call) -> operation_pb2.Operation:
        draft = draft_of(request)
        if request.validate_only:
            planned = await self._instances.plan(draft)
            explained = explanation_to_wire(await self._explainer.would_be(draft))
            return self._encoder.planned(planned, request.request_id, call.principal, explained)
        return self._encoder.operation(await self._instances.create(draft, _mutation(request, call)))

    async def get(self, request: compute_pb2.GetInstanceRequest, call: Call) -> bytes:
        return self._encoder.instance_bytes(self._instances.resolve(read_ref_of(request)))

    async def list(self, request: compute_pb2.ListInstancesRequest, call: Call) -> bytes:
        wrong = Violations()
        if request.project:
            wrong.project("project", request.project)
        wrong.check()
        found = self._view.instances()
        if request.project:
            found = (i for i in found if i.value.project == request.project)
        page = LISTING.page(
            ListQuery(
                page_size=request.page_size,
                page_token=request.page_token,
                filter=request.filter,
                order_by=request.order_by,
                scope=request.project,
            ),
            found,
            memo=self._memo,
            version=self._encoder.list_version(),
        )
        rest = compute_pb2.ListInstancesResponse(
            next_page_token=page.next_page_token, revision=self._view.revision, stale=self._view.stale
        )
        return encoded_list(map(self._encoder.instance_bytes, page.items), rest)

    async def start(self, request: compute_pb2.StartInstanceRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        ref = self._target(request, wrong)
        wrong.check()
        return self._encoder.operation(await self._instances.start(ref, _mutation(request, call)))

    async def stop(self, request: compute_pb2.StopInstanceRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        ref = self._target(request, wrong)
        options = stop_options(wrong, request.stop)
        wrong.check()
        return self._encoder.operation(
            await self._instances.stop(ref, _mutation(request, call), options=options)
        )

    async def restart(
        self, request: compute_pb2.RestartInstanceRequest, call: Call
    ) -> operation_pb2.Operation:
        wrong = Violations()
        ref = self._target(request, wrong)
        options = stop_options(wrong, request.stop)
        wrong.check()
        return self._encoder.operation(
            await self._instances.restart(ref, _mutation(request, call), options=options)
        )

    async def delete(self, request: compute_pb2.DeleteInstanceRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        ref = self._target(request, wrong)
        options = stop_options(wrong, request.stop, default_s=0.0)
        wrong.check()
        return self._encoder.operation(
            await self._instances.delete(ref, _mutation(request, call), options=options, force=request.force)
        )

    async def stats(
        self, request: compute_pb2.GetInstanceStatsRequest, call: Call
    ) -> instance_pb2.InstanceStats:
        return stats_to_wire(await self._instances.stats(read_ref_of(request), call.caller))

    async def watch_stats(
        self, request: compute_pb2.WatchInstanceStatsRequest, call: Call
    ) -> AsyncIterator[instance_pb2.InstanceStats]:
        wrong = Violations()
        ref = ref_of(request, wrong=wrong)
        interval_s, history_s = stats_spans(request, wrong)
        wrong.check()
        samples = self._instances.watch_stats(ref, call.caller, interval_s=interval_s, history_s=history_s)
        async with aclosing(samples):
            async for sample in samples:
                yield stats_to_wire(sample)

    @staticmethod
    def _target(request: VersionedRequest, wrong: Violations) -> InstanceRef:
        wrong.request_id(request.request_id)
        return versioned_ref_of(request, wrong=wrong)


def _mutation(request: compute_pb2.CreateInstanceRequest | VersionedRequest, call: Call) -> Mutation:
    return Mutation(
        caller=call.caller,
        request_id=request.request_id,
        payload_digest=payload_digest(request),
        wait=not request.no_wait,
    )
