"""The cluster as the native node table has it: what filters and scores say, computed for all nodes at once.

:class:`ClusterTable` follows snapshots (:meth:`ClusterTable.follow`), change by change where the snapshot tells its
changes, and compiles requests for the table (:meth:`ClusterTable.compile`). What the table cannot know by itself is
evaluated by the readable filters once for each node and kept as a column: conditions on labels and tolerated taints as
a class, images and mild taints as preferences. The least lately used columns are forgotten.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from hypervisor.core.model import AffinityTerm, LabelConstraint, ScorePart, SpreadTerm
from hypervisor.core.resources import GIB, MIB
from hypervisor.core.states import InstanceType, NodeStatus, PlacementPolicy
from hypervisor.ext import scoring
from hypervisor.server.scheduler.alike import Alike
from hypervisor.server.scheduler.case import self_match
from hypervisor.server.scheduler.columns import Columns, Static
from hypervisor.server.scheduler.contract import (
    Changes,
    NodeState,
    PlacedInstance,
    Request,
    Snapshot,
    matches,
)
from hypervisor.server.scheduler.judge import Judge, hash_of, share_of_weight
from hypervisor.server.scheduler.places import Matching, Places, Refusing
from hypervisor.server.scheduler.plugins import BEST, SCORES

__all__ = ["ClusterTable", "Compiled"]

_READY, _SCHEDULABLE = 1, 2
_TYPE_BITS = {kind: 4 << number for number, kind in enumerate(InstanceType)}
_POLICIES = {PlacementPolicy.BINPACK: scoring.BINPACK, PlacementPolicy.SPREAD: scoring.SPREAD}
_CLASSES_KEPT = 128
_PREFERENCES_KEPT = 128
_REQUESTS_KEPT = 256
_NO_SLOT = scoring.MAX_NODES - 1
"""The slot asked for by a request that is pinned to a node which is not there."""


_ORDER = {one.name: number for number, one in enumerate(SCORES)}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request as the table takes it. ``counting`` also counts the instance itself where its own terms mean it.

    ``waived`` is set where a term of affinity holds only because nothing matches it yet: the same without the waiver,
    for whatever is placed after the first.
    """

    plain: scoring.Request
    counting: scoring.Request
    waived: "scoring.Request | None" = None


class ClusterTable:
    """See the module's docstring."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.table = scoring.NodeTable()
        self._slots: dict[str, int] = {}
        self._ids: dict[int, str] = {}
        self._bits: dict[int, int] = {}
        self._states: dict[str, NodeState] = {}
        self._instances: dict[str, PlacedInstance] = {}
        self._instances_on: dict[str, dict[str, None]] = {}
        self._refusing: Counter[Refusing] = Counter()
        self._places = Places(self.table, forgot=self._forget_requests)
        self._classes: Columns[Static] = Columns(
            _CLASSES_KEPT, self.table.add_class, self.table.drop_class, forgot=self._forget_requests
        )
        self._images: Columns[str] = Columns(
            _PREFERENCES_KEPT,
            self.table.add_preference,
            self.table.drop_preference,
            forgot=self._forget_requests,
        )
        self._mild: Columns[Static] = Columns(
            _PREFERENCES_KEPT,
            self.table.add_preference,
            self.table.drop_preference,
            forgot=self._forget_requests,
        )
        self._alike = Alike(self._slots)
        self._compiled: OrderedDict[tuple[object, ...], Compiled] = OrderedDict()
        self._changes: Changes | None = None
        self._position = 0

    def slot(self, node_id: str) -> int | None:
        """The node's slot; None where there is no such node."""
        return self._slots.get(node_id)

    def node_at(self, slot: int) -> str:
        """The node of a slot that has one."""
        return self._ids[slot]

    def state_at(self, slot: int) -> NodeState:
        """Its state."""
        return self._states[self._ids[slot]]

    # --- following the snapshot

    def follow(self, snapshot: Snapshot) -> None:
        """Take in what has changed since the last call."""
        changes = snapshot.changes
        told = None
        if changes is not None and changes is self._changes:
            told = changes.since(self._position)
        if told is None:
            nodes = {
                node_id
                for node_id in {*snapshot.nodes, *self._states}
                if snapshot.nodes.get(node_id) is not self._states.get(node_id)
            }
            instances = {
                instance_id
                for instance_id in {*snapshot.instances, *self._instances}
                if snapshot.instances.get(instance_id) is not self._instances.get(instance_id)
            }
        else:
            nodes, instances = told
        # A snapshot that tells no changes may differ anywhere: the one after it is compared as a whole again.
        self._changes, self._position = changes, 0 if changes is None else changes.position
        for node_id in nodes:
            self._take_node(node_id, snapshot.nodes.get(node_id))
        for instance_id in instances:
            self._take_instance(instance_id, snapshot.instances.get(instance_id))

    def _take_node(self, node_id: str, new: NodeState | None) -> None:
        old = self._states.get(node_id)
        if new is None:
            if old is not None:
                slot = self._slots.pop(node_id)
                self._places.node(slot, old, None, lambda: self._on(node_id))
                self._alike.change(slot, old, None)
                del self._states[node_id], self._ids[slot], self._bits[slot]
                self.table.remove_node(slot)
                self._forget_requests()
            return
        if old is None:
            slot = self._slots[node_id] = self.table.add_node(hash_of(node_id))
            self._ids[slot] = node_id
            # A request that is pinned to it by its host name has to be compiled anew.
            self._forget_requests()
        slot = self._slots[node_id]
        self._states[node_id] = new
        if old is None or old.node is not new.node:
            self._bits[slot] = _bits(new)
        self.table.set_node(slot, *_amounts(new), self._bits[slot], new.load, new.penalty)
        if old is None or old.node is not new.node:
            self._places.node(slot, old, new, lambda: self._on(node_id))
            self._alike.change(slot, old, new)
            for look, column in self._classes.items():
                self.table.set_class(column, slot, look.eligible(new))
            for mild, column in self._mild.items():
                self.table.set_preference(column, slot, mild.mildness(new))
            if old is not None and old.node.hostname != new.node.hostname:
                self._forget_requests()
        if old is None or old.images is not new.images:
            for image, column in self._images.items():
                self.table.set_preference(column, slot, BEST if image in new.images else 0)

    def _take_instance(self, instance_id: str, new: PlacedInstance | None) -> None:
        old = self._instances.get(instance_id)
        for placed, delta in ((old, -1), (new, 1)):
            if placed is None:
                continue
            here = self._instances_on.setdefault(placed.node_id, {})
            if delta > 0:
                self._instances[instance_id] = placed
                here[instance_id] = None
            else:
                del self._instances[instance_id], here[instance_id]
                if not here:
                    del self._instances_on[placed.node_id]
            self._places.instance(placed, self._states.get(placed.node_id), delta)
            for term in placed.refuses:
                self._count_refusing(Refusing(placed.project, term), delta)

    def _count_refusing(self, refusing: Refusing, delta: int) -> None:
        self._refusing[refusing] += delta
        if self._refusing[refusing] == (1 if delta > 0 else 0):
            # There is one more term to heed, or one less.
            self._forget_requests()
        if not self._refusing[refusing]:
            del self._refusing[refusing]

    def _on(self, node_id: str) -> Iterable[PlacedInstance]:
        return (self._instances[instance_id] for instance_id in self._instances_on.get(node_id, ()))

    def _forget_requests(self) -> None:
        self._compiled.clear()

    # --- requests

    def compile(self, request: Request) -> Compiled | None:
        """The request for the table as it is now; None where it asks for more than the table can do."""
        # Whose it is and its labels matter to terms alone, its own and those of instances that are there.
        related = request.affinity or request.anti_affinity or request.spread or self._refusing
        key = (
            *(request.type, request.resources, request.policy, request.constraints, request.node),
            *(request.image, request.tolerations, request.affinity, request.anti_affinity, request.spread),
            *((request.project, frozenset(request.labels.items())) if related else ()),
        )
        known = self._compiled.get(key)
        if known is not None:
            self._compiled.move_to_end(key)
            return known
        try:
            compiled, lasting = self._compile(request)
        except (ValueError, OverflowError):
            return None
        if lasting:
            self._compiled[key] = compiled
            if len(self._compiled) > _REQUESTS_KEPT:
                self._compiled.popitem(last=False)
        return compiled

    def _compile(self, request: Request) -> tuple[Compiled, bool]:
        weights = self._judge.weights
        affinity, waived, lasting = self._affinity(request)
        own = [
            self._matching(request, t.selector, t.topology) for t in request.anti_affinity if not t.preferred
        ]
        others = [
            self._counter(refusing)
            for refusing in list(self._refusing)
            if refusing.project == request.project and matches(refusing.term.selector, request.labels)
        ]
        prefer = [
            (self._matching(request, t.selector, t.topology), share_of_weight(weights["affinity"], t.weight))
            for t in request.affinity
            if t.preferred
        ]
        avoid = [
            (self._matching(request, t.selector, t.topology), share_of_weight(weights["affinity"], t.weight))
            for t in request.anti_affinity
            if t.preferred
        ]
        spread = [
            (self._matching(request, t.selector, t.topology), share_of_weight(weights["spread"], t.weight))
            for t in request.spread
        ]
        terms: tuple[AffinityTerm | SpreadTerm, ...] = (
            *request.affinity,
            *request.anti_affinity,
            *request.spread,
        )
        adds = {
            self._matching(request, t.selector, t.topology)
            for t in terms
            if matches(t.selector, request.labels)
        }

        slot, named = self._pinned(request.node)
        class_id = self._class_of(request, named)
        preferences = self._preferences(request)

        def made(required: list[int], counted: Iterable[int]) -> scoring.Request:
            return scoring.Request(
                cpu=request.resources.cpu_millis,
                memory=_up(request.resources.memory_bytes, MIB),
                disk=_up(request.resources.disk_bytes, GIB),
                bits=_READY | _SCHEDULABLE | _TYPE_BITS[request.type],
                classes=(class_id,),
                slot=slot,
                affinity=required,
                anti_affinity=[*own, *others],
                adds=sorted(counted),
                policy=_POLICIES[request.policy],
                utilisation_weight=weights["utilisation"],
                load_weight=weights["load"],
                penalty_weight=weights["penalty"],
                preferences=preferences,
                prefer=prefer,
                avoid=avoid,
                spread=spread,
            )

        plain = made(affinity, ())
        counting = made(affinity, adds) if adds else plain
        return Compiled(plain, counting, made([*affinity, *waived], adds) if waived else None), lasting

    def _affinity(self, request: Request) -> tuple[list[int], list[int], bool]:
        """Counters of the required terms: those that count, those that are waived, and whether that will stay so."""
        counted: list[int] = []
        waived: list[int] = []
        lasting = True
        for term in request.affinity:
            if term.preferred:
                continue
            question = Matching(request.project, term.selector, term.topology)
            counter = self._counter(question)
            if self_match(request, term):
                lasting = False
                if self._places.total(question) == 0:
                    waived.append(counter)
                    continue
            counted.append(counter)
        return counted, waived, lasting

    def _matching(self, request: Request, selector: tuple[LabelConstraint, ...], topology: str) -> int:
        return self._counter(Matching(request.project, selector, topology))

    def _counter(self, question: Matching | Refusing) -> int:
        return self._places.counter(
            question, slots=self._slots, states=self._states, placed=self._instances.values()
        )

    def _pinned(self, node: str) -> tuple[int, str]:
        """The slot that a pinned request is for (-1: any), and the name that its class has to look at besides.

        A node that came back under another id may have the host name of its old self: then both are meant.
        """
        if not node:
            return -1, ""
        found = self._alike.named(node)
        if len(found) > 1:
            return -1, node
        return (found.pop() if found else _NO_SLOT), ""

    def _class_of(self, request: Request, node: str) -> int:
        look = Static(node, request.constraints, request.tolerations)

        def fill(column: int) -> None:
            for slot in self._alike.eligible(look):
                self.table.set_class(column, slot, True)

        return self._classes.of(look, fill)

    def _preferences(self, request: Request) -> list[tuple[int, int]]:
        found = []
        weights = self._judge.weights
        if weights["image"] and request.image:

            def fill_image(column: int) -> None:
                for node_id, slot in self._slots.items():
                    if request.image in self._states[node_id].images:
                        self.table.set_preference(column, slot, BEST)

            found.append((self._images.of(request.image, fill_image), weights["image"]))
        if weights["taints"]:
            look = Static("", (), request.tolerations)

            def fill_mild(column: int) -> None:
                for mildness, slots in self._alike.mildness(look):
                    for slot in slots:
                        self.table.set_preference(column, slot, mildness)

            found.append((self._mild.of(look, fill_mild), weights["taints"]))
        return found

    def refused_by_others(self, request: Request) -> bool:
        """Whether some placed instance has a required term of anti-affinity that means this one."""
        return any(
            one.project == request.project and matches(one.term.selector, request.labels)
            for one in self._refusing
        )

    def parts(self, compiled: Compiled, slot: int) -> tuple[ScorePart, ...]:
        """What each score says of the node of a slot, under the names of the scores."""
        images = set(self._images.columns())
        names = {"prefer": "affinity", "avoid": "affinity"}
        found = [
            ScorePart(
                ("image" if part.id in images else "taints")
                if part.kind == "preference"
                else names.get(part.kind, part.kind),
                part.value,
                part.weight,
            )
            for part in self.table.explain(compiled.plain, slot).parts
        ]
        # In the order in which explanations have them.
        return tuple(sorted(found, key=lambda part: _ORDER[part.name]))


def _amounts(state: NodeState) -> tuple[int, int, int, int, int, int]:
    """Total and free of each resource, as the table has them."""
    total, reserved = state.total, state.reserved
    cpu = min(total.cpu_millis, scoring.MAX_AMOUNT)
    memory = min(total.memory_bytes // MIB, scoring.MAX_AMOUNT)
    disk = min(total.disk_bytes // GIB, scoring.MAX_AMOUNT)
    return (
        *(cpu, max(cpu - reserved.cpu_millis, -scoring.MAX_AMOUNT)),
        *(memory, max(memory - _up(reserved.memory_bytes, MIB), -scoring.MAX_AMOUNT)),
        *(disk, max(disk - _up(reserved.disk_bytes, GIB), -scoring.MAX_AMOUNT)),
    )


def _bits(state: NodeState) -> int:
    """What the node's record alone says of whether it takes instances, and of which types."""
    bits = 0 if state.node.status is NodeStatus.OFFLINE else _READY
    if state.node.schedulable and state.node.status is not NodeStatus.MAINTENANCE:
        bits |= _SCHEDULABLE
    for kind, bit in _TYPE_BITS.items():
        driver = state.node.driver_for(kind)
        if driver is not None and driver.available and driver.lacks("create") is None:
            bits |= bit
    return bits


def _up(amount: int, unit: int) -> int:
    return -(-amount // unit)
