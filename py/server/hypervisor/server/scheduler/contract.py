"""The Scheduler contract: ``schedule(request, snapshot) -> Placement | Refusal``, pure.

Vocabulary
----------
*request*    what an instance needs: type, resources, conditions on labels, the policy, perhaps one node by name; what
             it tolerates, and which instances it is to be near to or away from.
*snapshot*   the nodes as they are, with what is reserved on each, and the instances placed on them; never changed by a
             scheduler.
*placement*  the node chosen. The caller reserves there and refuses a placement that does not fit.
*refusal*    why no node will do, one sentence per node; not an exception.

The same request and snapshot give the same answer, always (ties are broken by the request's seed). A scheduler is
called by one task at a time and must not block: it runs on the server's event loop.

A snapshot is good for the one call: the next call may get the same object with other content. A scheduler that keeps
something of its own from call to call (a table, an index) takes in what has changed from ``Snapshot.changes`` and so
need not look at every node; that must not change its answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from hypervisor.core.model import AffinityTerm, LabelConstraint, Node, ScorePart, SpreadTerm, Toleration
from hypervisor.core.resources import ZERO, Resources
from hypervisor.core.states import InstanceType, LabelOperator, PlacementPolicy

__all__ = [
    "BUILT_IN_LABELS",
    "Changes",
    "Explains",
    "NodeState",
    "PlacedInstance",
    "Placement",
    "Refusal",
    "Request",
    "Scheduler",
    "Snapshot",
    "holds",
    "matches",
]

BUILT_IN_LABELS = ("hypervisor/hostname", "hypervisor/region", "hypervisor/zone", "hypervisor/role")
"""Labels every node has."""

_NO_LABELS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be placed. ``node`` pins it (id or host name). ``seed`` breaks ties.

    ``labels`` and ``project`` are its own: affinity of others is judged by them.
    """

    type: InstanceType
    resources: Resources
    policy: PlacementPolicy
    constraints: tuple[LabelConstraint, ...] = ()
    node: str = ""
    seed: str = ""
    project: str = "default"
    labels: Mapping[str, str] = field(default_factory=lambda: _NO_LABELS)
    image: str = ""
    tolerations: tuple[Toleration, ...] = ()
    affinity: tuple[AffinityTerm, ...] = ()
    anti_affinity: tuple[AffinityTerm, ...] = ()
    spread: tuple[SpreadTerm, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node, what is reserved on it, and what else is known of it.

    ``allocatable`` is what may be reserved in all (None: the node's capacity), ``load`` its measured use in thousandths
    (-1: not known), ``penalty`` 0..1000: how much placements there have failed lately, ``images`` those it certainly
    has (it may have others).
    """

    node: Node
    reserved: Resources = ZERO
    instances: int = 0
    allocatable: Resources | None = None
    load: int = -1
    penalty: int = 0
    images: frozenset[str] = frozenset()

    @property
    def total(self) -> Resources:
        """What may be reserved in all."""
        return self.node.capacity if self.allocatable is None else self.allocatable

    @property
    def free(self) -> Resources:
        """What may still be reserved; negative where more is reserved than may be."""
        return self.total - self.reserved

    def with_more(self, resources: Resources, count: int) -> "NodeState":
        """The state with so much more reserved for ``count`` more instances."""
        more = Resources(
            cpu_millis=resources.cpu_millis * count,
            memory_bytes=resources.memory_bytes * count,
            disk_bytes=resources.disk_bytes * count,
        )
        return replace(self, reserved=self.reserved + more, instances=self.instances + count)

    def label(self, key: str) -> str | None:
        """Value of a label, built in or the node's own; None where it has none."""
        match key:
            case "hypervisor/hostname":
                return self.node.hostname
            case "hypervisor/region":
                return self.node.region
            case "hypervisor/zone":
                return self.node.zone
            case "hypervisor/role":
                return self.node.role.value
            case _:
                return self.node.labels.get(key)


@dataclass(frozen=True, slots=True)
class PlacedInstance:
    """What placements of others need to know of an instance. ``refuses`` are its required terms of anti-affinity."""

    node_id: str
    project: str
    labels: Mapping[str, str]
    refuses: tuple[AffinityTerm, ...] = ()


class Changes(Protocol):
    """What has happened to the content of snapshots, in the order in which it has."""

    @property
    def position(self) -> int:
        """Number of changes so far."""
        ...

    def since(self, position: int) -> tuple[set[str], set[str]] | None:
        """Ids of nodes and of instances that changed, came or went after ``position``.

        None when that is too long ago: look at everything.
        """
        ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All nodes by id, all placed instances by id."""

    nodes: Mapping[str, NodeState]
    instances: Mapping[str, PlacedInstance] = field(default_factory=dict)
    changes: Changes | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """The node chosen and how well it suited (larger is better; the scale is the scheduler's own)."""

    node_id: str
    score: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no node will do: a sentence per node, by host name."""

    reasons: Mapping[str, str]


class Scheduler(Protocol):
    """See the module's docstring."""

    @property
    def name(self) -> str:
        """Stable name, as in the configuration (``scheduler.name``)."""
        ...

    def schedule(self, request: Request, snapshot: Snapshot) -> Placement | Refusal:
        """Choose a node."""
        ...


@runtime_checkable
class Explains(Protocol):
    """A scheduler that can say why; optional."""

    def parts(self, request: Request, snapshot: Snapshot, node_id: str) -> tuple[ScorePart, ...]:
        """What each score says of a node that fits."""
        ...


def holds(constraint: LabelConstraint, found: str | None) -> bool:
    """Whether a label with the value ``found`` (None: no such label) meets the condition."""
    match constraint.operator:
        case LabelOperator.EXISTS:
            return found is not None
        case LabelOperator.NOT_IN:
            return found is None or found not in constraint.values
        case _:
            return found is not None and found in constraint.values


def matches(selector: tuple[LabelConstraint, ...], labels: Mapping[str, str]) -> bool:
    """Whether these labels of an instance meet all conditions."""
    return all(holds(constraint, labels.get(constraint.key)) for constraint in selector)
