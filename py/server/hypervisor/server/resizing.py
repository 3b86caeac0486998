"""Changing how much an instance has, while it is there: the reservation side of it. Pure.

While an update is under way its instance holds the larger of both sizes on its node (``Instance.holds``), so neither
can be taken by others whatever comes of it. Where nobody can tell whether its node did it, it goes on holding both
until an update tells.
"""

from dataclasses import dataclass
from datetime import datetime

from msgspec import structs

from hypervisor.core.errors import Internal, ResourceExhausted
from hypervisor.core.model import Instance, OperationRecord, Sizes
from hypervisor.core.resources import ZERO
from hypervisor.server import keys
from hypervisor.server.drafts import Draft
from hypervisor.server.ledger import AllocationRules
from hypervisor.server.scheduler.plugins import shortage
from hypervisor.server.services import InstanceRef
from hypervisor.server.verbs import VERBS, begin, find_instance

__all__ = ["SizeChange", "begin_update", "end_update"]


@dataclass(frozen=True, slots=True)
class SizeChange:
    """What is to be changed; None: as it is."""

    cpu_millis: int | None = None
    memory_mb: int | None = None

    def of(self, instance: Instance) -> Sizes:
        """What the instance is then to have."""
        spec = instance.spec
        return Sizes(
            cpu_millis=spec.cpu_millis if self.cpu_millis is None else self.cpu_millis,
            memory_mb=spec.memory_mb if self.memory_mb is None else self.memory_mb,
        )


def begin_update(
    draft: Draft,
    rules: AllocationRules,
    ref: InstanceRef,
    change: SizeChange,
    *,
    operation: OperationRecord,
    deadline: datetime,
) -> OperationRecord:
    """Record that the update begins, and reserve what it needs; see ``verbs.begin``.

    Raises also ResourceExhausted (``NODE_FULL``) where the instance's node has not so much left.
    """
    repeated = bool(operation.request_id) and draft.get(keys.operation(operation.id)) is not None
    if not repeated:
        sizes = change.of(find_instance(draft, ref).value)
        operation = structs.replace(operation, sizes=sizes)
    recorded = begin(draft, VERBS["update"], ref, operation=operation, deadline=deadline)
    if repeated:
        return recorded
    instance = find_instance(draft, ref).value
    _hold(draft, instance, structs.replace(instance, resizing=operation.sizes), rules=rules)
    return recorded


def end_update(draft: Draft, instance: Instance, operation: OperationRecord, *, done: bool) -> Instance:
    """The instance once its node has answered: with the sizes asked for, or as it was. The caller records it; what it
    no longer holds is given back here."""
    if operation.sizes is None:
        raise Internal(f"operation {operation.id} updates nothing")
    spec = operation.sizes.of(instance.spec) if done else instance.spec
    settled = structs.replace(instance, spec=spec, resizing=None)
    _hold(draft, instance, settled)
    return settled


def _hold(draft: Draft, before: Instance, after: Instance, *, rules: AllocationRules | None = None) -> None:
    """Record the instance, and what it holds; with ``rules`` what is more has to fit."""
    draft.put(keys.instance(after.id), after)
    if after.holds == before.holds:
        return
    held = draft.get(keys.allocation(after.node_id))
    node = draft.get(keys.node(after.node_id))
    if held is None or node is None:
        raise Internal(f"node {after.node_id} has instances and no allocation record")
    reserved = held.value.reserved + after.holds - before.holds
    if rules is not None:
        total = rules.allocatable(node.value.capacity)
        free = total - held.value.reserved
        # What does not grow needs nothing, even where more is reserved than the node has (any more).
        if not (after.holds - before.holds).fits_in(free.at_least(ZERO)):
            raise ResourceExhausted(
                f"node {node.value.hostname} has not so much left for instance {after.name}: "
                + shortage(after.holds, free + before.holds, total),
                reason="NODE_FULL",
                metadata={"node": node.value.hostname, "instance_id": after.id},
            )
    draft.put(keys.allocation(after.node_id), structs.replace(held.value, reserved=reserved))
