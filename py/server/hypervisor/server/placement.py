"""Placing instances: the decisions that reserve capacity on a node and give it back.

Capacity is reserved in the transaction that records the instance and freed in the one that removes it, so at every
revision of the store a node's allocation is the sum of the specs of the instances placed on it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from msgspec import structs

from hypervisor.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    HypervisorError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from hypervisor.core.model import Allocation, Instance, Node, OperationRecord
from hypervisor.core.states import InstanceStatus, PlacementPolicy
from hypervisor.server import keys
from hypervisor.server.drafts import Batch, Draft
from hypervisor.server.records import NameClaim
from hypervisor.server.scheduler.contract import (
    BUILT_IN_LABELS,
    NodeState,
    Placement,
    Refusal,
    Request,
    Scheduler,
    Snapshot,
)
from hypervisor.server.scheduler.plugins import shortage
from hypervisor.server.services import InstanceDraft, Versioned

__all__ = ["Placer", "check_same_request", "release"]

_REASONS_SHOWN = 16
_LABELS_SHOWN = 20


@dataclass(slots=True)
class NodeTable:
    """The nodes as the decisions of one batch see them: made once, then changed as decisions are admitted."""

    nodes: dict[str, NodeState]

    @classmethod
    def of(cls, batch: Batch, node_ids: Iterable[str]) -> "NodeTable":
        """The table of these nodes; one without an allocation record is not (or no more) part of the cluster."""
        table = cls({})
        draft = batch.draft()
        for node_id in node_ids:
            table._read(draft, node_id)
        return table

    def admitted(self, draft: Draft) -> None:
        """Take in what an admitted decision changed."""
        prefixes = (keys.node("").path, keys.allocation("").path)
        for path in draft.writes:
            for prefix in prefixes:
                if path.startswith(prefix):
                    self._read(draft, path.removeprefix(prefix))

    def _read(self, draft: Draft, node_id: str) -> None:
        node = draft.peek(keys.node(node_id))
        allocation = draft.peek(keys.allocation(node_id))
        if node is None or allocation is None:
            self.nodes.pop(node_id, None)
        else:
            held = allocation.value
            self.nodes[node_id] = NodeState(node.value, held.reserved, held.instances)


class Placer:
    """Makes placements with a scheduler. ``nodes`` lists the nodes known; their state is read from the draft."""

    def __init__(
        self,
        scheduler: Scheduler,
        nodes: Callable[[], Iterable[Versioned[Node]]],
        *,
        default_policy: PlacementPolicy = PlacementPolicy.SPREAD,
        seed: int = 0,
    ) -> None:
        self._scheduler = scheduler
        self._nodes = nodes
        self._default_policy = default_policy
        self._seed = seed

    def reserve(
        self, draft: Draft, order: InstanceDraft, *, operation: OperationRecord, deadline: datetime
    ) -> OperationRecord:
        """Choose a node, reserve on it and record instance, name and operation; returns the operation.

        A repeat of a request returns the operation it began. Raises ``InvalidArgument`` (``REQUEST_ID_REUSED``),
        ``AlreadyExists`` (``INSTANCE_NAME_TAKEN``) and what :meth:`choose` raises.
        """
        known = draft.get(keys.operation(operation.id)) if operation.request_id else None
        if known is not None:
            check_same_request(known.value, operation)
            return known.value
        claim = keys.name(order.project, order.name)
        if draft.get(claim) is not None:
            raise AlreadyExists(
                f"project {order.project} has an instance named {order.name} already: choose another name or "
                "delete that one first",
                reason="INSTANCE_NAME_TAKEN",
                metadata={"name": order.name, "project": order.project},
            )
        node_id = self.choose(draft, order, seed=operation.object_id)
        held = draft.get(keys.allocation(node_id))
        node = draft.get(keys.node(node_id))
        if held is None or node is None:
            raise Internal(f"the scheduler chose {node_id}, which is not in the snapshot")
        reserved = held.value.reserved + order.spec.resources
        if not reserved.fits_in(node.value.capacity):
            free = node.value.capacity - held.value.reserved
            raise Internal(
                f"scheduler {self._scheduler.name} chose node {node.value.hostname}, where it does not fit: "
                + shortage(order.spec.resources, free, node.value.capacity),
                reason="SCHEDULER_OVERCOMMITS",
            )
        instance = _instance(order, node_id=node_id, now=draft.now)
        draft.create(
            keys.instance(operation.object_id),
            structs.replace(
                instance,
                id=operation.object_id,
                operation_id=operation.id,
                transition_deadline=deadline,
            ),
        )
        draft.put(claim, NameClaim(instance_id=operation.object_id))
        draft.put(
            keys.allocation(node_id),
            structs.replace(held.value, reserved=reserved, instances=held.value.instances + 1),
        )
        if operation.request_id:
            draft.put(keys.operation(operation.id), operation)
        else:
            draft.create(keys.operation(operation.id), operation)
        return operation

    def preview(self, draft: Draft, order: InstanceDraft) -> Instance:
        """The instance as it would be placed, without an id; raises what :meth:`reserve` raises."""
        if draft.peek(keys.name(order.project, order.name)) is not None:
            raise AlreadyExists(
                f"project {order.project} has an instance named {order.name} already",
                reason="INSTANCE_NAME_TAKEN",
                metadata={"name": order.name, "project": order.project},
            )
        node_id = self.choose(draft, order, seed=f"{order.project}/{order.name}")
        return _instance(order, node_id=node_id, now=draft.now)

    def choose(self, draft: Draft, order: InstanceDraft, *, seed: str) -> str:
        """The id of the node to place on.

        Raises ``NotFound`` (``NODE_NOT_FOUND``) for a pinned node that does not exist, ``FailedPrecondition``
        (``UNKNOWN_NODE_LABEL``) and ``ResourceExhausted`` (``NO_NODE_FITS``) with the reason of each node.
        """
        batch = draft.batch
        table = batch.shared(
            NodeTable, lambda: NodeTable.of(batch, [versioned.value.id for versioned in self._nodes()])
        )
        spec = order.spec
        _check_node(table.nodes, spec.node)
        _check_labels(table.nodes, order)
        request = Request(
            type=order.type,
            resources=spec.resources,
            policy=spec.placement_policy or self._default_policy,
            constraints=spec.node_selector,
            node=spec.node,
            seed=f"{self._seed}/{seed}",
        )
        answer = self._scheduler.schedule(request, Snapshot(table.nodes))
        match answer:
            case Placement(node_id=node_id):
                return node_id
            case Refusal(reasons=reasons):
                raise _nothing_fits(reasons)


def release(draft: Draft, instance: Instance) -> None:
    """Remove the instance's record and name and give its capacity back."""
    draft.delete(keys.instance(instance.id))
    claim = draft.get(keys.name(instance.project, instance.name))
    if claim is not None and claim.value.instance_id == instance.id:
        draft.delete(keys.name(instance.project, instance.name))
    if not instance.node_id:
        return
    held = draft.get(keys.allocation(instance.node_id))
    if held is None:
        raise Internal(f"node {instance.node_id} has instances and no allocation record")
    left = Allocation(
        node_id=instance.node_id,
        reserved=held.value.reserved - instance.spec.resources,
        instances=held.value.instances - 1,
    )
    if (
        min(left.instances, left.reserved.cpu_millis, left.reserved.memory_bytes, left.reserved.disk_bytes)
        < 0
    ):
        raise Internal(f"node {instance.node_id} would have less than nothing reserved: {left.reserved}")
    draft.put(keys.allocation(instance.node_id), left)


def check_same_request(known: OperationRecord, asked: OperationRecord) -> None:
    """Refuse a request_id that was used for another request."""
    if known.payload_digest != asked.payload_digest or known.verb != asked.verb:
        raise InvalidArgument.of_fields(
            (
                FieldViolation(
                    "request_id",
                    f"{asked.request_id} was used for another request ({known.verb} of {known.object_kind} "
                    f"{known.object_name}): use a fresh one for each request",
                ),
            ),
            reason="REQUEST_ID_REUSED",
        )


def _instance(order: InstanceDraft, *, node_id: str, now: datetime) -> Instance:
    return Instance(
        id="",
        name=order.name,
        project=order.project,
        type=order.type,
        spec=order.spec,
        status=InstanceStatus.SCHEDULED,
        desired=order.desired,
        created_at=now,
        updated_at=now,
        labels=dict(order.labels),
        node_id=node_id,
    )


def _check_node(nodes: Mapping[str, NodeState], wanted: str) -> None:
    if wanted and wanted not in nodes and all(s.node.hostname != wanted for s in nodes.values()):
        raise NotFound(
            f"spec.node: there is no node {wanted!r}: see `node list`",
            reason="NODE_NOT_FOUND",
            metadata={"node": wanted},
        )


def _check_labels(nodes: Mapping[str, NodeState], order: InstanceDraft) -> None:
    wanted = {c.key for c in order.spec.node_selector if c.operator != "not_in"} - set(BUILT_IN_LABELS)
    if not wanted or not nodes:
        return
    known = {label for state in nodes.values() for label in state.node.labels}
    unknown = sorted(wanted - known)
    if unknown:
        names = sorted({*known, *BUILT_IN_LABELS})
        more = f" and {len(names) - _LABELS_SHOWN} more" if len(names) > _LABELS_SHOWN else ""
        raise FailedPrecondition(
            f"spec.node_selector: no node has the label {', '.join(unknown)}; there are: "
            f"{', '.join(names[:_LABELS_SHOWN])}{more}",
            reason="UNKNOWN_NODE_LABEL",
            metadata={"labels": ",".join(unknown), "known": ",".join(names[:_LABELS_SHOWN])},
        )


def _nothing_fits(reasons: Mapping[str, str]) -> HypervisorError:
    if not reasons:
        return ResourceExhausted(
            "no node fits: the cluster has no nodes; start an agent first",
            reason="NO_NODE_FITS",
            metadata={"nodes": "0"},
        )
    by_reason: dict[str, list[str]] = {}
    for hostname, reason in sorted(reasons.items()):
        by_reason.setdefault(reason, []).append(hostname)
    parts = [
        f"{hosts[0] if len(hosts) == 1 else f'{hosts[0]} and {len(hosts) - 1} more'}: {reason}"
        for reason, hosts in by_reason.items()
    ]
    more = f"; and {len(parts) - _REASONS_SHOWN} more reasons" if len(parts) > _REASONS_SHOWN else ""
    shown = dict(sorted(reasons.items())[:_REASONS_SHOWN])
    return ResourceExhausted(
        f"no node fits: {'; '.join(parts[:_REASONS_SHOWN])}{more}",
        reason="NO_NODE_FITS",
        metadata={"nodes": str(len(reasons)), **{f"node.{host}": why for host, why in shown.items()}},
        violations=tuple(FieldViolation(host, why) for host, why in shown.items()),
    )
