"""Placing instances: the decisions that reserve capacity on a node and give it back.

Capacity is reserved in the transaction that records the instance and freed in the one that removes it, so at every
revision of the store a node's allocation is the sum of the specs of the instances placed on it.
"""

from collections.abc import Iterable, Mapping
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
from hypervisor.core.images import image_reference
from hypervisor.core.model import Allocation, Instance, OperationRecord, PlacementRecord, ScorePart
from hypervisor.core.resources import Resources
from hypervisor.core.states import InstanceStatus, PlacementPolicy
from hypervisor.server import keys
from hypervisor.server.drafts import Draft
from hypervisor.server.images.naming import images_of_order
from hypervisor.server.ledger import Ledger
from hypervisor.server.placement_terms import enter_terms, guard_terms
from hypervisor.server.records import NameClaim
from hypervisor.server.scheduler.contract import (
    BUILT_IN_LABELS,
    Explains,
    Placement,
    Refusal,
    Request,
    Scheduler,
    Snapshot,
)
from hypervisor.server.scheduler.default import DefaultScheduler
from hypervisor.server.scheduler.plugins import shortage
from hypervisor.server.services import InstanceDraft

__all__ = ["Placer", "check_same_request", "give_back", "order_of", "release"]

_REASONS_SHOWN = 16
_LABELS_SHOWN = 20


class Placer:
    """Makes placements with a scheduler, on what the ledger shows of the cluster."""

    def __init__(
        self,
        scheduler: Scheduler,
        ledger: Ledger,
        *,
        default_policy: PlacementPolicy = PlacementPolicy.SPREAD,
        seed: int = 0,
    ) -> None:
        self._scheduler = scheduler
        self._explains = scheduler if isinstance(scheduler, Explains) else None
        self._ledger = ledger
        self._default_policy = default_policy
        self._seed = seed

    @property
    def scheduler(self) -> Scheduler:
        """Who chooses."""
        return self._scheduler

    def reserve(
        self, draft: Draft, order: InstanceDraft, *, operation: OperationRecord, deadline: datetime
    ) -> OperationRecord:
        """Choose a node, reserve on it and record instance, name and operation; returns the operation.

        A repeat of a request returns the operation it began. Raises ``InvalidArgument`` (``REQUEST_ID_REUSED``),
        ``AlreadyExists`` (``INSTANCE_NAME_TAKEN``), what :meth:`choose`, ``images_of_order`` and ``guard_terms`` raise.
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
        images = images_of_order(draft, order)
        placement, snapshot = self.choose(draft, order, seed=operation.object_id)
        node_id = placement.node_id
        self._take(draft, order, node_id)
        operation = structs.replace(operation, node_id=node_id)
        instance = _instance(order, node_id=node_id, now=draft.now)
        draft.create(
            keys.instance(operation.object_id),
            structs.replace(
                instance,
                id=operation.object_id,
                operation_id=operation.id,
                transition_deadline=deadline,
                images=images,
                placement=self._record(draft, order, placement, snapshot, seed=operation.object_id),
            ),
        )
        draft.put(claim, NameClaim(instance_id=operation.object_id))
        if operation.request_id:
            draft.put(keys.operation(operation.id), operation)
        else:
            draft.create(keys.operation(operation.id), operation)
        return operation

    def _take(self, draft: Draft, order: InstanceDraft, node_id: str) -> None:
        """Reserve on the node that was chosen."""
        held = draft.get(keys.allocation(node_id))
        node = draft.get(keys.node(node_id))
        if held is None or node is None:
            raise Internal(f"the scheduler chose {node_id}, which is not in the snapshot")
        guard_terms(draft, order, node_id=node_id)
        reserved = held.value.reserved + order.spec.resources
        total = self._ledger.rules.allocatable(node.value.capacity)
        if not reserved.fits_in(total):
            raise Internal(
                f"scheduler {self._scheduler.name} chose node {node.value.hostname}, where it does not fit: "
                + shortage(order.spec.resources, total - held.value.reserved, total),
                reason="SCHEDULER_OVERCOMMITS",
            )
        draft.put(
            keys.allocation(node_id),
            structs.replace(held.value, reserved=reserved, instances=held.value.instances + 1),
        )

    def reserve_elsewhere(
        self, draft: Draft, instance: Instance, *, node: str = "", epoch: int
    ) -> tuple[str, PlacementRecord]:
        """Choose another node for an instance that has one (``node``: this one) and reserve on it as well.

        Raises what :meth:`choose` and ``guard_terms`` raise.
        """
        placement = self.choose_elsewhere(draft, instance, node=node, seed=f"{instance.id}/{epoch}")
        self._take(draft, order_of(instance, node=node), placement.node_id)
        return placement.node_id, PlacementRecord(
            placed_at=draft.now, scheduler=self._scheduler.name, score=int(placement.score)
        )

    def choose_elsewhere(self, draft: Draft, instance: Instance, *, node: str = "", seed: str) -> Placement:
        """The node to move an instance to, judged as if it were nowhere; never the one it is on."""
        order = order_of(instance, node=node)
        self.look(draft, order)
        without = self.without(instance)
        nodes = {n: state for n, state in without.nodes.items() if n != instance.node_id}
        snapshot = Snapshot(nodes, without.instances)
        # A table that follows the cluster is not to follow this copy of it.
        scheduler = self._scheduler
        judge = scheduler.judge if isinstance(scheduler, DefaultScheduler) else scheduler
        answer = judge.schedule(self.request(order, seed=seed), snapshot)
        match answer:
            case Placement():
                return answer
            case Refusal(reasons=reasons):
                raise _nothing_fits(reasons)

    def without(self, instance: Instance) -> Snapshot:
        """What :meth:`look` showed last, as if the instance were not placed; a copy."""
        return self._ledger.without(instance.id, instance.holds)

    def enter_terms(self, draft: Draft, order: InstanceDraft) -> None:
        """Enter the instance's terms in the register, as has to be done before it is placed."""
        enter_terms(draft, order, self._ledger.sync(draft).instances)

    def preview(self, draft: Draft, order: InstanceDraft) -> Instance:
        """The instance as it would be placed, without an id; raises what :meth:`reserve` raises."""
        if draft.peek(keys.name(order.project, order.name)) is not None:
            raise AlreadyExists(
                f"project {order.project} has an instance named {order.name} already",
                reason="INSTANCE_NAME_TAKEN",
                metadata={"name": order.name, "project": order.project},
            )
        images_of_order(draft, order)
        placement, _ = self.choose(draft, order, seed=f"{order.project}/{order.name}")
        return _instance(order, node_id=placement.node_id, now=draft.now)

    def choose(self, draft: Draft, order: InstanceDraft, *, seed: str) -> tuple[Placement, Snapshot]:
        """The node to place on, and the snapshot (good until the next decision) on which it was chosen.

        Raises ``NotFound`` (``NODE_NOT_FOUND``) for a pinned node that does not exist, ``FailedPrecondition``
        (``UNKNOWN_NODE_LABEL``) and ``ResourceExhausted`` (``NO_NODE_FITS``) with the reason of each node.
        """
        snapshot = self.look(draft, order)
        answer = self._scheduler.schedule(self.request(order, seed=seed), snapshot)
        match answer:
            case Placement():
                return answer, snapshot
            case Refusal(reasons=reasons):
                raise _nothing_fits(reasons)

    def look(self, draft: Draft, order: InstanceDraft) -> Snapshot:
        """The cluster as the draft sees it. Raises what :meth:`choose` does for nodes and labels that are not there."""
        snapshot = self._ledger.sync(draft)
        wanted = order.spec.node
        if wanted and not self._ledger.knows_node(wanted):
            raise NotFound(
                f"spec.node: there is no node {wanted!r}: see `node list`",
                reason="NODE_NOT_FOUND",
                metadata={"node": wanted},
            )
        if snapshot.nodes:
            _check_labels(self._ledger.label_keys, order)
        return snapshot

    def request(self, order: InstanceDraft, *, seed: str) -> Request:
        """What the scheduler is asked."""
        spec = order.spec
        return Request(
            type=order.type,
            resources=spec.resources,
            policy=spec.placement_policy or self._default_policy,
            constraints=spec.node_selector,
            node=spec.node,
            seed=f"{self._seed}/{seed}",
            project=order.project,
            labels=order.labels,
            image=image_reference(order.type, spec.image),
            tolerations=spec.tolerations,
            affinity=spec.affinity,
            anti_affinity=spec.anti_affinity,
            spread=spec.spread,
        )

    def _record(
        self, draft: Draft, order: InstanceDraft, placement: Placement, snapshot: Snapshot, *, seed: str
    ) -> PlacementRecord:
        """Why it is placed there, for `instance explain`: the chosen node's parts only, so that it costs little."""
        parts: tuple[ScorePart, ...] = ()
        if self._explains is not None:
            parts = self._explains.parts(self.request(order, seed=seed), snapshot, placement.node_id)
        return PlacementRecord(
            placed_at=draft.now, scheduler=self._scheduler.name, score=int(placement.score), parts=parts
        )


def release(draft: Draft, instance: Instance) -> None:
    """Remove the instance's record and name and give its capacity back."""
    draft.delete(keys.instance(instance.id))
    claim = draft.get(keys.name(instance.project, instance.name))
    if claim is not None and claim.value.instance_id == instance.id:
        draft.delete(keys.name(instance.project, instance.name))
    if not instance.node_id:
        return
    give_back(draft, instance.node_id, instance.holds)
    if instance.holds_elsewhere is not None:
        give_back(draft, *instance.holds_elsewhere)


def give_back(draft: Draft, node_id: str, amount: Resources) -> None:
    """Free what one instance holds on the node."""
    held = draft.get(keys.allocation(node_id))
    if held is None:
        raise Internal(f"node {node_id} has instances and no allocation record")
    left = Allocation(
        node_id=node_id, reserved=held.value.reserved - amount, instances=held.value.instances - 1
    )
    if (
        min(left.instances, left.reserved.cpu_millis, left.reserved.memory_bytes, left.reserved.disk_bytes)
        < 0
    ):
        raise Internal(f"node {node_id} would have less than nothing reserved: {left.reserved}")
    draft.put(keys.allocation(node_id), left)


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


def order_of(instance: Instance, *, node: str = "") -> InstanceDraft:
    """The instance as one that asks for a place; with ``node`` it wants that one."""
    spec = structs.replace(instance.spec, node=node) if node else instance.spec
    return InstanceDraft(
        name=instance.name,
        project=instance.project,
        type=instance.type,
        spec=spec,
        labels=instance.labels,
        desired=instance.desired,
    )


def _check_labels(known: Iterable[str], order: InstanceDraft) -> None:
    wanted = {c.key for c in order.spec.node_selector if c.operator != "not_in"} - set(BUILT_IN_LABELS)
    unknown = sorted(wanted - set(known)) if wanted else []
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
