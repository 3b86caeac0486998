"""The Scheduler contract: ``schedule(request, snapshot) -> Placement | Refusal``, pure.

Vocabulary
----------
*request*    what an instance needs: type, resources, conditions on labels, the policy, perhaps one node by name.
*snapshot*   the nodes as they are, with what is reserved on each; never changed by a scheduler.
*placement*  the node chosen. The caller reserves there and refuses a placement that does not fit.
*refusal*    why no node will do, one sentence per node; not an exception.

The same request and snapshot give the same answer, always (ties are broken by the request's seed). A scheduler is
called by one task at a time and must not block: it runs on the server's event loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from hypervisor.core.model import LabelConstraint, Node
from hypervisor.core.resources import ZERO, Resources
from hypervisor.core.states import InstanceType, PlacementPolicy

__all__ = ["BUILT_IN_LABELS", "NodeState", "Placement", "Refusal", "Request", "Scheduler", "Snapshot"]

BUILT_IN_LABELS = ("hypervisor/hostname", "hypervisor/region", "hypervisor/zone", "hypervisor/role")
"""Labels every node has."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be placed. ``node`` pins it (id or host name). ``seed`` breaks ties."""

    type: InstanceType
    resources: Resources
    policy: PlacementPolicy
    constraints: tuple[LabelConstraint, ...] = ()
    node: str = ""
    seed: str = ""


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node and what is reserved on it."""

    node: Node
    reserved: Resources = ZERO
    instances: int = 0

    @property
    def free(self) -> Resources:
        """What may still be reserved."""
        return self.node.capacity - self.reserved

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
class Snapshot:
    """All nodes by id."""

    nodes: Mapping[str, NodeState]


@dataclass(frozen=True, slots=True)
class Placement:
    """The node chosen and how well it suited (0..100)."""

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
