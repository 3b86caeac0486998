"""The nodes and the placed instances as the next placement has to see them, kept up to date change by change.

What a decision may see has three layers, the later over the earlier: what the watch has told (the view), what this
server has learned from its own commits and conflicts and the view has not seen yet, and what the decisions before it
in the same batch have written. :meth:`Ledger.sync` brings the snapshot to what a draft sees by reading, through that
draft, just the records that may have changed. So a batch that fails to commit gives its reservations back exactly:
what it had written is read again with the next batch, and is then what is known.

Between two calls of ``sync`` this holds for every record: what the snapshot shows of it is what would be read, or the
record is noted to be read again (``_stale``), or it was written by the batch now under way (``_provisional``).
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from hypervisor.core.errors import Internal
from hypervisor.core.images import image_reference
from hypervisor.core.model import Allocation, Instance, Node
from hypervisor.core.resources import GIB, MIB, ZERO, Resources
from hypervisor.core.states import InstanceStatus
from hypervisor.server import keys
from hypervisor.server.cluster_state import Update
from hypervisor.server.drafts import Batch, Draft
from hypervisor.server.scheduler.contract import NodeState, PlacedInstance, Snapshot

__all__ = ["AllocationRules", "Ledger", "NodeFacts"]

_NODES = keys.node("").path
_ALLOCATIONS = keys.allocation("").path
_INSTANCES = keys.instance("").path
_HAS_IMAGE = frozenset(
    {
        InstanceStatus.RUNNING,
        InstanceStatus.STOPPING,
        InstanceStatus.STOPPED,
        InstanceStatus.PAUSED,
        InstanceStatus.MIGRATING,
    }
)
"""An instance in one of these was made from its image, so its node has that."""
_CHANGES_KEPT = 65_536


@dataclass(frozen=True, slots=True)
class AllocationRules:
    """What of a node's capacity may be reserved: ``(capacity - reserve) * overcommit``, in whole MiB and GiB."""

    overcommit_cpu: float = 1.0
    overcommit_memory: float = 1.0
    overcommit_disk: float = 1.0
    reserve: Resources = ZERO

    def allocatable(self, capacity: Resources) -> Resources:
        """What may be reserved of the capacity."""
        left = capacity - self.reserve
        return Resources(
            cpu_millis=_times(left.cpu_millis, self.overcommit_cpu, 1),
            memory_bytes=_times(left.memory_bytes, self.overcommit_memory, MIB),
            disk_bytes=_times(left.disk_bytes, self.overcommit_disk, GIB),
        )


def _times(amount: int, ratio: float, unit: int) -> int:
    if amount <= 0:
        return 0
    return (amount if ratio == 1.0 else int(amount * ratio)) // unit * unit


class NodeFacts(Protocol):
    """What is known of nodes besides their records; changes are told to :meth:`Ledger.node_changed`."""

    def load(self, node_id: str) -> int:
        """Measured use in thousandths; -1 where it is not known."""
        ...

    def penalty(self, node_id: str) -> int:
        """0..1000: how much placements there have failed lately."""
        ...

    def images(self, node_id: str) -> frozenset[str]:
        """Images of the cluster (``image:NAME``) that the node has fetched."""
        ...

    def refresh(self) -> None:
        """Let time have its effect."""
        ...


class Ledger:
    """See the module's docstring. Used on the event loop alone; nothing here waits."""

    def __init__(self, rules: AllocationRules, facts: NodeFacts) -> None:
        self._rules = rules
        self._facts = facts
        self._nodes: dict[str, NodeState] = {}
        self._instances: dict[str, PlacedInstance] = {}
        self._images_of: dict[str, tuple[str, str]] = {}
        self._images_on: dict[str, Counter[str]] = {}
        self._hostnames: dict[str, dict[str, None]] = {}
        self._label_keys: Counter[str] = Counter()
        self._log = _ChangeLog()
        self._stale: set[str] = set()
        self._provisional: set[str] = set()
        self._batch: Batch | None = None
        self._snapshot = Snapshot(self._nodes, self._instances, self._log)

    @property
    def rules(self) -> AllocationRules:
        """What of a node's capacity may be reserved."""
        return self._rules

    @property
    def label_keys(self) -> Iterable[str]:
        """Keys of labels that some node has, as of the last ``sync``."""
        return self._label_keys.keys()

    def knows_node(self, name: str) -> bool:
        """Whether there is a node with this id or host name, as of the last ``sync``."""
        return name in self._nodes or name in self._hostnames

    # --- what may have changed

    def seen(self, updates: Iterable[Update]) -> None:
        """The view has taken these updates in. Those that change nothing here are let pass."""
        for update in updates:
            path = update.path
            if path.startswith(_INSTANCES):
                if not self._shows_instance(path.removeprefix(_INSTANCES), update):
                    self._stale.add(path)
            elif path.startswith((_NODES, _ALLOCATIONS)) and not self._shows_node(path, update):
                self._stale.add(path)

    def node_changed(self, node_id: str) -> None:
        """One of the facts of the node has changed."""
        self._stale.add(_NODES + node_id)

    def sync(self, draft: Draft) -> Snapshot:
        """The snapshot as the draft sees the cluster."""
        batch = draft.batch
        if batch is not self._batch:
            self._facts.refresh()
            self._begin(batch)
        if draft.writes:
            self._note_written(draft.writes)
        if self._stale:
            stale, self._stale = self._stale, set()
            self._read(draft, stale)
        return self._snapshot

    def _begin(self, batch: Batch) -> None:
        """Another batch: what the one before had written is read again, as it is now known."""
        self._stale |= self._provisional
        self._provisional = set()
        self._batch = batch
        self._stale.update(filter(_concerns, batch.known.unseen()))
        self._note_written(batch.written_paths())
        batch.shared(_Follower, lambda: _Follower(self, batch))

    def _note_written(self, paths: Iterable[str]) -> None:
        for path in paths:
            if _concerns(path):
                self._stale.add(path)
                self._provisional.add(path)

    def _admitted(self, batch: Batch, draft: Draft) -> None:
        if batch is self._batch:
            self._note_written(draft.writes)

    def without(self, instance_id: str, resources: Resources) -> Snapshot:
        """A copy of the last snapshot as if the instance, which holds ``resources``, were not placed."""
        nodes, instances = dict(self._nodes), dict(self._instances)
        placed = instances.pop(instance_id, None)
        state = None if placed is None else nodes.get(placed.node_id)
        if state is not None:
            image = self._images_of.get(instance_id, ("", ""))[1]
            alone = bool(image) and self._images_on[state.node.id][image] == 1
            alone = alone and image not in self._facts.images(state.node.id)
            nodes[state.node.id] = replace(
                state.with_more(resources, -1), images=state.images - {image} if alone else state.images
            )
        return Snapshot(nodes, instances)

    # --- taking it in

    def _read(self, draft: Draft, stale: set[str]) -> None:
        nodes: set[str] = set()
        for path in stale:
            if path.startswith(_INSTANCES):
                nodes |= self._read_instance(draft, path.removeprefix(_INSTANCES))
            elif path.startswith(_NODES):
                nodes.add(path.removeprefix(_NODES))
            else:
                nodes.add(path.removeprefix(_ALLOCATIONS))
        for node_id in nodes:
            self._read_node(draft, node_id)

    def _read_node(self, draft: Draft, node_id: str) -> None:
        old = self._nodes.get(node_id)
        new = self._state_of(draft, node_id)
        if new == old:
            return
        if old is not None and (new is None or new.node is not old.node):
            self._label_keys.subtract(old.node.labels.keys())
            self._label_keys += Counter()
            holders = self._hostnames[old.node.hostname]
            del holders[node_id]
            if not holders:
                del self._hostnames[old.node.hostname]
        if new is None:
            del self._nodes[node_id]
        else:
            if old is None or new.node is not old.node:
                self._label_keys.update(new.node.labels.keys())
                self._hostnames.setdefault(new.node.hostname, {})[node_id] = None
            self._nodes[node_id] = new
        self._log.add_node(node_id)

    def _state_of(self, draft: Draft, node_id: str) -> NodeState | None:
        """The node's state; None for one without an allocation record, which is not (or no more) of the cluster."""
        try:
            node = draft.peek(keys.node(node_id))
            allocation = draft.peek(keys.allocation(node_id))
        except Internal:
            # A record that cannot be read (the view has logged it): nothing can be reserved there.
            return None
        if node is None or allocation is None:
            return None
        held = allocation.value
        return NodeState(
            node=node.value,
            reserved=held.reserved,
            instances=held.instances,
            allocatable=self._allocatable(node.value),
            load=self._facts.load(node_id),
            penalty=self._facts.penalty(node_id),
            images=self._known_images(node_id),
        )

    def _allocatable(self, node: Node) -> Resources:
        """What may be reserved of the node; as it is shown where the record is the same one."""
        shown = self._nodes.get(node.id)
        if shown is not None and shown.node is node and shown.allocatable is not None:
            return shown.allocatable
        return self._rules.allocatable(node.capacity)

    def _known_images(self, node_id: str) -> frozenset[str]:
        counted, fetched = self._images_on.get(node_id), self._facts.images(node_id)
        if not counted:
            return fetched
        here = counted.keys() | fetched if fetched else counted.keys()
        known = self._nodes.get(node_id)
        if known is not None and known.images == here:
            return known.images
        return frozenset(here)

    def _read_instance(self, draft: Draft, instance_id: str) -> set[str]:
        """Take an instance in; returns the nodes whose images changed by it."""
        try:
            found = draft.peek(keys.instance(instance_id))
        except Internal:
            found = None
        instance = None if found is None else found.value
        new = None if instance is None or not instance.node_id else _placed(instance)
        old = self._instances.get(instance_id)
        image = "" if instance is None else _image(instance)
        changed = self._count_image(instance_id, "" if new is None else new.node_id, image)
        if new != old:
            if new is None:
                del self._instances[instance_id]
            else:
                self._instances[instance_id] = new
            self._log.add_instance(instance_id)
        return changed

    def _count_image(self, instance_id: str, node_id: str, image: str) -> set[str]:
        """The instance shows (now) that the node has the image; returns the nodes whose images changed."""
        before = self._images_of.get(instance_id)
        after = (node_id, image) if node_id and image else None
        if before == after:
            return set()
        changed = set()
        if before is not None:
            del self._images_of[instance_id]
            counted = self._images_on[before[0]]
            counted[before[1]] -= 1
            if not counted[before[1]]:
                del counted[before[1]]
                changed.add(before[0])
            if not counted:
                del self._images_on[before[0]]
        if after is not None:
            self._images_of[instance_id] = after
            counted = self._images_on.setdefault(node_id, Counter())
            counted[image] += 1
            if counted[image] == 1:
                changed.add(node_id)
        return changed

    # --- what is shown already

    def _shows_instance(self, instance_id: str, update: Update) -> bool:
        shown = self._instances.get(instance_id)
        if update.record is None:
            return shown is None
        instance = update.record.value
        if not isinstance(instance, Instance):
            return False
        if shown is None:
            return not instance.node_id
        image = self._images_of.get(instance_id, ("", ""))[1]
        return shown == _placed(instance) and image == _image(instance)

    def _shows_node(self, path: str, update: Update) -> bool:
        node_id = path.removeprefix(_NODES).removeprefix(_ALLOCATIONS)
        shown = self._nodes.get(node_id)
        if shown is None or update.record is None:
            return False
        value = update.record.value
        if isinstance(value, Node):
            return shown.node == value
        return (
            isinstance(value, Allocation)
            and shown.reserved == value.reserved
            and shown.instances == value.instances
        )


def _concerns(path: str) -> bool:
    return path.startswith((_NODES, _ALLOCATIONS, _INSTANCES))


def _placed(instance: Instance) -> PlacedInstance:
    return PlacedInstance(
        node_id=instance.node_id,
        project=instance.project,
        labels=instance.labels,
        refuses=tuple(t for t in instance.spec.anti_affinity if not t.preferred),
    )


def _image(instance: Instance) -> str:
    """The image that the instance shows its node to have; empty where it shows none."""
    return image_reference(instance.type, instance.spec.image) if instance.status in _HAS_IMAGE else ""


class _Follower:
    """Tells the ledger what the batch's decisions write."""

    def __init__(self, ledger: Ledger, batch: Batch) -> None:
        self._ledger = ledger
        self._batch = batch

    def admitted(self, draft: Draft) -> None:
        self._ledger._admitted(self._batch, draft)


class _ChangeLog:
    """The latest changes. Implements ``Changes``."""

    def __init__(self) -> None:
        self._end = 0
        self._kept: deque[tuple[bool, str]] = deque(maxlen=_CHANGES_KEPT)

    @property
    def position(self) -> int:
        return self._end

    def add_node(self, node_id: str) -> None:
        self._kept.append((True, node_id))
        self._end += 1

    def add_instance(self, instance_id: str) -> None:
        self._kept.append((False, instance_id))
        self._end += 1

    def since(self, position: int) -> tuple[set[str], set[str]] | None:
        count = self._end - position
        if count > len(self._kept) or count < 0:
            return None
        nodes: set[str] = set()
        instances: set[str] = set()
        # The deque is read from its end: what is asked for is mostly the last few.
        for index in range(1, count + 1):
            is_node, object_id = self._kept[-index]
            (nodes if is_node else instances).add(object_id)
        return nodes, instances
