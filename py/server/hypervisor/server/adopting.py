"""What an agent runs of a placement that the records do not know of: the store lost it.

A placement is on record before any agent hears of it, so an epoch that is newer than the record's can only mean that
the store went back, as after a restored backup. The guest is there, and it is the newest copy: the record follows it.
"""

import structlog
from msgspec import structs

from hypervisor.core.model import Allocation, Instance, Observation
from hypervisor.server import keys
from hypervisor.server.drafts import Draft

__all__ = ["adopt_placement"]

log = structlog.get_logger(__name__)


def adopt_placement(draft: Draft, instance: Instance, *, node_id: str, seen: Observation) -> Instance | None:
    """Record that the instance is on the node, in the epoch seen there; None where the record is as new.

    What it holds goes from the one node to the other, also where that is then more than the node has: it is there.
    """
    if seen.epoch < instance.next_epoch:
        return None  # as new as the record, or of a move that came to nothing
    if instance.move is not None:
        return None  # whoever drives the move settles where it is
    adopted = structs.replace(
        instance,
        node_id=node_id,
        epoch=seen.epoch,
        generation=max(instance.generation, seen.generation),
        observed_sequence=0,
        updated_at=draft.now,
    )
    if instance.node_id != node_id:
        _hold(draft, instance.node_id, instance, sign=-1)
        _hold(draft, node_id, instance, sign=1)
    draft.put(keys.instance(instance.id), adopted)
    log.warning(
        "placement_adopted",
        instance_id=instance.id,
        node_id=node_id,
        epoch=seen.epoch,
        recorded_node_id=instance.node_id,
        recorded_epoch=instance.epoch,
    )
    return adopted


def _hold(draft: Draft, node_id: str, instance: Instance, *, sign: int) -> None:
    held = draft.get(keys.allocation(node_id))
    if held is None:
        return
    reserved = held.value.reserved
    draft.put(
        keys.allocation(node_id),
        Allocation(
            node_id=node_id,
            reserved=reserved + instance.holds if sign > 0 else reserved - instance.holds,
            instances=held.value.instances + sign,
        ),
    )
