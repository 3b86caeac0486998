"""How the records of nodes, and of the instances on them, change by what agents and users say. Pure decisions."""

from datetime import datetime
from typing import Protocol

from msgspec import structs

from hypervisor.core.availability import FencingState, InstanceLoss, NodeFencing, NodeLoss
from hypervisor.core.errors import AlreadyExists, FailedPrecondition, NotFound
from hypervisor.core.model import Allocation, Instance, Node, Observation, Taint
from hypervisor.core.names import MAX_TAINTS
from hypervisor.core.states import ACTIVE, DesiredState, InstanceStatus, NodeStatus, TaintEffect, can_move
from hypervisor.server import keys
from hypervisor.server.adopting import adopt_placement
from hypervisor.server.drafts import Draft
from hypervisor.server.draining.records import DrainKind
from hypervisor.server.observations import fold, lost, missing
from hypervisor.server.records import HostnameClaim, NodeLease
from hypervisor.server.services import NodeRegistration
from hypervisor.server.store.storage import Compare

__all__ = [
    "NODE_LOST",
    "check_not_draining",
    "fencing_told",
    "fold_observation",
    "incarnation_mismatch",
    "loses_sight",
    "mark_lost",
    "mark_missing",
    "mark_offline",
    "mark_unknown",
    "node_not_found",
    "record_cordon",
    "record_deregistration",
    "record_disarming",
    "record_evacuation",
    "record_fencing",
    "record_registration",
    "record_taint",
    "record_untaint",
]


NODE_LOST = "NODE_LOST"
_RUNS = ACTIVE | {InstanceStatus.SCHEDULED, InstanceStatus.CREATING, InstanceStatus.UNKNOWN}
"""States in which something that was wanted to run did so, or was about to, when its node was lost."""


class _Change(Protocol):
    def __call__(self, instance: Instance, /, *, now: datetime) -> Instance | None: ...


def record_registration(draft: Draft, registration: NodeRegistration, *, lease_id: str) -> tuple[Node, bool]:
    """The node joins or comes back, bound to the lease. Returns it, and whether its agent was started anew.

    Raises ``AlreadyExists`` (``HOSTNAME_TAKEN``) and ``FailedPrecondition`` (``NODE_ID_IN_USE``).
    """
    found = draft.get(keys.node(registration.id))
    old = None if found is None else found.value
    if old is not None and old.incarnation != registration.incarnation:
        _check_id_is_free(draft, old, registration)
    _claim_hostname(draft, old, registration)
    schedulable = True if old is None else old.schedulable
    node = Node(
        id=registration.id,
        hostname=registration.hostname,
        address=registration.address,
        port=registration.port,
        created_at=draft.now if old is None else old.created_at,
        updated_at=draft.now,
        region=registration.region,
        zone=registration.zone,
        role=registration.role,
        status=NodeStatus.READY if schedulable else NodeStatus.MAINTENANCE,
        capacity=registration.resources.capacity,
        labels=dict(registration.labels),
        drivers=registration.drivers,
        schedulable=schedulable,
        cordon_reason="" if old is None else old.cordon_reason,
        status_message="" if old is None else old.cordon_reason,
        agent_version=registration.agent_version,
        incarnation=registration.incarnation,
        lease_id=lease_id,
        simulated=registration.simulated,
        own_taints=registration.taints,
        set_taints=() if old is None else old.set_taints,
        fencing=fencing_told(old, registration.fencing),
        disarmed="" if old is None else old.disarmed,
    )
    draft.put(keys.node(node.id), node)
    draft.put(keys.node_lease(node.id), NodeLease(incarnation=node.incarnation), lease_id=lease_id)
    if draft.get(keys.allocation(node.id)) is None:
        draft.put(keys.allocation(node.id), Allocation(node_id=node.id))
    return node, old is None or old.incarnation != registration.incarnation


def _check_id_is_free(draft: Draft, old: Node, registration: NodeRegistration) -> None:
    # An agent that was started again at the same address is the same node: two processes cannot listen there.
    moved = (old.address, old.port) != (registration.address, registration.port)
    if moved and draft.get(keys.node_lease(old.id)) is not None:
        raise FailedPrecondition(
            f"node id {old.id} is in use by a live agent at {old.address}:{old.port}: give this agent a data "
            "directory of its own, or stop the other one and wait for heartbeat.timeout",
            reason="NODE_ID_IN_USE",
            metadata={"node_id": old.id, "address": f"{old.address}:{old.port}"},
        )


def _claim_hostname(draft: Draft, old: Node | None, registration: NodeRegistration) -> None:
    claim_key = keys.hostname(registration.hostname)
    claim = draft.get(claim_key)
    if claim is not None and claim.value.node_id != registration.id:
        if draft.get(keys.node_lease(claim.value.node_id)) is not None:
            raise AlreadyExists(
                f"node {claim.value.node_id}, which is alive, has the host name {registration.hostname}: "
                "set node.hostname to another one",
                reason="HOSTNAME_TAKEN",
                metadata={"hostname": registration.hostname, "node_id": claim.value.node_id},
            )
        claim = None
    if claim is None:
        draft.put(claim_key, HostnameClaim(node_id=registration.id))
    if old is not None and old.hostname != registration.hostname:
        _free_hostname(draft, old)


def _free_hostname(draft: Draft, node: Node) -> None:
    claim = draft.get(keys.hostname(node.hostname))
    if claim is not None and claim.value.node_id == node.id:
        draft.delete(keys.hostname(node.hostname))


def record_deregistration(draft: Draft, node: Node, *, placed: int) -> None:
    """Remove the node. The allocation goes with it, so that a placement made meanwhile conflicts."""
    check_not_draining(draft, node)
    held = draft.get(keys.allocation(node.id))
    if placed or (held is not None and held.value.instances):
        raise FailedPrecondition(
            f"node {node.hostname} has {max(placed, held.value.instances if held else 0)} instances: delete them "
            "first",
            reason="NODE_HAS_INSTANCES",
            metadata={"node_id": node.id, "instances": str(placed)},
        )
    if draft.get(keys.node_lease(node.id)) is not None:
        raise FailedPrecondition(
            f"the agent of node {node.hostname} is alive: stop it and wait until the node is offline",
            reason="NODE_READY",
            metadata={"node_id": node.id},
        )
    draft.delete(keys.node(node.id))
    draft.delete(keys.allocation(node.id))
    draft.delete(keys.drain(node.id))
    _free_hostname(draft, node)


def record_cordon(draft: Draft, node: Node, *, schedulable: bool, reason: str) -> None:
    """Take the node out of placement, or back in; nothing changes where it is so already."""
    if (node.schedulable, node.cordon_reason) == (schedulable, reason):
        return
    status, message = node.status, node.status_message
    if status is not NodeStatus.OFFLINE:
        status = NodeStatus.READY if schedulable else NodeStatus.MAINTENANCE
        message = reason
    draft.put(
        keys.node(node.id),
        structs.replace(
            node,
            schedulable=schedulable,
            cordon_reason=reason,
            status=status,
            status_message=message,
            updated_at=draft.now,
        ),
    )


def check_not_draining(draft: Draft, node: Node) -> None:
    """Refuse what would cross a drain of the node that goes on: FailedPrecondition (``DRAINING``)."""
    found = draft.get(keys.drain(node.id))
    if found is not None and found.value.active:
        what = "drained" if found.value.kind is DrainKind.DRAIN else "given its instances back"
        raise FailedPrecondition(
            f"node {node.hostname} is being {what} (operation {found.value.operation_id}): watch that, or cancel it "
            f"with 'node drain {node.hostname} --cancel'",
            reason="DRAINING",
            metadata={"node_id": node.id, "operation_id": found.value.operation_id},
        )


def record_taint(draft: Draft, node: Node, taint: Taint) -> None:
    """Put the taint on the node, in the place of one of the same key and effect."""
    kept = tuple(t for t in node.set_taints if (t.key, t.effect) != (taint.key, taint.effect))
    changed = structs.replace(node, set_taints=(*kept, taint), updated_at=draft.now)
    if len(changed.taints) > MAX_TAINTS:
        raise FailedPrecondition(
            f"node {node.hostname} has {len(node.taints)} taints, which is the most: remove one first",
            reason="TOO_MANY_TAINTS",
            metadata={"node_id": node.id, "limit": str(MAX_TAINTS)},
        )
    if taint not in node.set_taints:
        draft.put(keys.node(node.id), changed)


def record_untaint(draft: Draft, node: Node, *, key: str, effect: TaintEffect | None) -> None:
    """Take the taints of this key (and effect) off the node, but not those of its agent's configuration."""

    def meant(taint: Taint) -> bool:
        return taint.key == key and effect in (None, taint.effect)

    kept = tuple(t for t in node.set_taints if not meant(t))
    if len(kept) < len(node.set_taints):
        draft.put(keys.node(node.id), structs.replace(node, set_taints=kept, updated_at=draft.now))
        return
    if any(map(meant, node.own_taints)):
        raise FailedPrecondition(
            f"the taint {key} of node {node.hostname} stands in its agent's configuration: remove it from "
            "node.taints there and restart the agent",
            reason="TAINT_CONFIGURED",
            metadata={"node_id": node.id, "key": key},
        )
    raise NotFound(
        f"node {node.hostname} has no taint {key}{f':{effect.value}' if effect else ''}; it has: "
        f"{', '.join(map(str, node.taints)) or 'none'}",
        reason="TAINT_NOT_FOUND",
        metadata={"node_id": node.id, "key": key},
    )


def fold_observation(draft: Draft, *, node_id: str, seen: Observation, authoritative: bool) -> bool:
    """Take in what a node's agent saw; returns whether the node should have the instance."""
    found = draft.get(keys.instance(seen.instance_id))
    if found is not None and found.value.move is not None:
        elsewhere = (node_id, seen.epoch) == found.value.move.elsewhere
        if elsewhere:
            return True  # a copy that a move has made, or is to remove
    if found is None or found.value.epoch > seen.epoch:
        return False
    adopted = adopt_placement(draft, found.value, node_id=node_id, seen=seen)
    instance = found.value if adopted is None else adopted
    if instance.node_id != node_id:
        return False
    changed = fold(instance, seen, now=draft.now, authoritative=authoritative or adopted is not None)
    if changed is not None:
        draft.put(keys.instance(seen.instance_id), changed)
    return True


def mark_missing(draft: Draft, *, node_id: str, instance_id: str) -> bool:
    """The node's registration did not name the instance; returns whether it should have."""
    return _change_instance(draft, missing, node_id=node_id, instance_id=instance_id)


def mark_lost(draft: Draft, *, node_id: str, instance_id: str) -> bool:
    """The node's agent, asked for it, does not have the instance; returns whether that is a loss."""
    return _change_instance(draft, lost, node_id=node_id, instance_id=instance_id)


def _change_instance(draft: Draft, change: _Change, *, node_id: str, instance_id: str) -> bool:
    found = draft.get(keys.instance(instance_id))
    if found is None or found.value.node_id != node_id:
        return False
    changed = change(found.value, now=draft.now)
    if changed is not None:
        draft.put(keys.instance(instance_id), changed)
    return changed is not None


def mark_offline(draft: Draft, node_id: str, *, fence: Compare) -> bool:
    """The node's lease is gone: it is OFFLINE. Nothing when it is back."""
    draft.guard(fence)
    found = draft.get(keys.node(node_id))
    gone = draft.get(keys.node_lease(node_id)) is None
    if found is None or not gone or found.value.status is NodeStatus.OFFLINE:
        return False
    draft.put(
        keys.node(node_id),
        structs.replace(
            found.value,
            status=NodeStatus.OFFLINE,
            status_message="nothing was heard from its agent for heartbeat.timeout",
            loss=NodeLoss(since=draft.now),
            updated_at=draft.now,
        ),
    )
    return True


def mark_unknown(draft: Draft, instance_id: str, *, fence: Compare) -> bool:
    """The instance's node is OFFLINE: what the instance is cannot be known. Nothing when the node is back."""
    draft.guard(fence)
    found = draft.get(keys.instance(instance_id))
    if found is None or found.value.operation_id:
        return False
    instance = found.value
    node = draft.get(keys.node(instance.node_id))
    if node is None or node.value.status is not NodeStatus.OFFLINE:
        return False
    if not loses_sight(instance):
        return False
    lost = instance.lost
    if lost is None and instance.desired is DesiredState.RUNNING and instance.status in _RUNS:
        lost = InstanceLoss(since=draft.now, node_id=instance.node_id)
    draft.put(
        keys.instance(instance_id),
        structs.replace(
            instance,
            status=InstanceStatus.UNKNOWN,
            status_reason=NODE_LOST,
            status_message=f"its node {node.value.hostname} is offline",
            lost=lost,
            updated_at=draft.now,
        ),
    )
    return True


def loses_sight(instance: Instance) -> bool:
    """Whether an instance, whose node is OFFLINE and which no operation holds, is still to be noted as UNKNOWN."""
    if instance.desired is DesiredState.DELETED:
        return False
    if instance.status is InstanceStatus.UNKNOWN:
        return instance.status_reason != NODE_LOST
    return can_move(instance.status, InstanceStatus.UNKNOWN)


def fencing_told(node: Node | None, told: NodeFencing | None) -> NodeFencing | None:
    """What is recorded of what an agent tells of its fencing. While it is switched off it counts as off, whatever the
    agent says: it may not have heard of it, and whether it has is not to be guessed once it is switched on again."""
    if node is None or not node.disarmed or told is None:
        return told
    return NodeFencing(state=FencingState.DISARMED, reason=told.reason)


def record_fencing(draft: Draft, node_id: str, incarnation: str, told: NodeFencing | None) -> None:
    """Take in what an agent tells of its fencing."""
    found = draft.get(keys.node(node_id))
    if found is None or found.value.incarnation != incarnation:
        return
    fencing = fencing_told(found.value, told)
    if fencing != found.value.fencing:
        draft.put(keys.node(node_id), structs.replace(found.value, fencing=fencing, updated_at=draft.now))


def record_disarming(draft: Draft, node: Node, *, why: str) -> None:
    """Switch its fencing off (``why``) or on (empty)."""
    if node.disarmed == why:
        return
    fencing = node.fencing
    if why and fencing is not None:
        fencing = NodeFencing(state=FencingState.DISARMED, reason=fencing.reason)
    draft.put(keys.node(node.id), structs.replace(node, disarmed=why, fencing=fencing, updated_at=draft.now))


def record_evacuation(draft: Draft, node: Node, *, principal: str) -> None:
    """The node is dead: ``principal`` knows. FailedPrecondition (``NODE_READY``) for one that is heard of."""
    if draft.get(keys.node_lease(node.id)) is not None or node.loss is None:
        raise FailedPrecondition(
            f"node {node.hostname} is not lost: drain it instead, or stop its agent and wait until the node is "
            "offline",
            reason="NODE_READY",
            metadata={"node_id": node.id},
        )
    if not node.loss.evacuated_by:
        loss = structs.replace(node.loss, held="", evacuated_by=principal)
        draft.put(keys.node(node.id), structs.replace(node, loss=loss, updated_at=draft.now))


def node_not_found(node: str) -> NotFound:
    """The error for a node that does not exist."""
    return NotFound(
        f"there is no node {node!r}: see `node list`", reason="NODE_NOT_FOUND", metadata={"node": node}
    )


def incarnation_mismatch(node: Node) -> FailedPrecondition:
    """The error for an agent that was replaced by another one."""
    return FailedPrecondition(
        f"another agent has registered as node {node.hostname} since: register again",
        reason="INCARNATION_MISMATCH",
        metadata={"node_id": node.id},
    )
