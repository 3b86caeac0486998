"""The boundary between the API (``api/``, wire types in, wire types out) and the work (domain values only).

The handlers in ``api/`` authenticate, parse and validate, then call one of the services below; the services decide,
commit and talk to agents. Neither side knows the other's types: no ``*_pb2`` on this side, no store key on that one.
Implementations: ``instances.py``, ``nodes.py``, ``operations.py``, ``view.py``; ``app.py`` wires them.
All methods raise classes of :mod:`hypervisor.core.errors` only.
"""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import msgspec

from hypervisor.core.availability import NodeFencing
from hypervisor.core.consoles import ConsoleOptions, LogOptions, LogPiece
from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.model import (
    Allocation,
    ConsoleSize,
    DriverInfo,
    Instance,
    InstanceSpec,
    InstanceStats,
    InstancesUsage,
    Node,
    NodeResources,
    Observation,
    OperationRecord,
    Taint,
)
from hypervisor.core.moves import MovePolicy, MoveStrategy
from hypervisor.core.resources import Resources
from hypervisor.core.states import DesiredState, InstanceType, NodeRole, TaintEffect

if TYPE_CHECKING:  # these build on the values below
    from hypervisor.server.draining.budgets import Standing
    from hypervisor.server.draining.progress import DrainProgress
    from hypervisor.server.draining.records import Budget, DrainKind, DrainOrder, DrainRecord

__all__ = [
    "Caller",
    "ClusterChange",
    "ClusterView",
    "ConsoleEvent",
    "ConsoleSession",
    "HeartbeatTimes",
    "InstanceDraft",
    "InstanceRef",
    "Instances",
    "Kind",
    "Maintenance",
    "MoveOrder",
    "Moves",
    "Mutation",
    "NodePlacements",
    "NodeRegistration",
    "NodeUsage",
    "Nodes",
    "Operations",
    "PlannedMove",
    "StopOptions",
    "Versioned",
]

T = TypeVar("T", bound=msgspec.Struct)


class Kind(StrEnum):
    """Kinds of objects that have events."""

    NODE = "node"
    INSTANCE = "instance"
    OPERATION = "operation"


@dataclass(frozen=True, slots=True)
class Versioned(Generic[T]):
    """A record and the store revision of its last change (what users see as ``resource_version``).

    ``unknown``: members of it that only a later version knows; see ``core.unknown_members``.
    """

    value: T
    revision: int
    unknown: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class ClusterChange:
    """One change of one object. ``current`` is None for a deletion, ``previous`` for a creation."""

    kind: Kind
    object_id: str
    revision: int
    current: Versioned[Node] | Versioned[Instance] | Versioned[OperationRecord] | None
    previous: Versioned[Node] | Versioned[Instance] | Versioned[OperationRecord] | None
    last_of_revision: bool


class ClusterView(Protocol):
    """The whole cluster in memory, fed by the store's watch. Reads never wait and never fail.

    Everything read between two awaits is one consistent state, true at ``revision``.
    """

    @property
    def revision(self) -> int:
        """Store revision this view is true at."""
        ...

    @property
    def stale(self) -> bool:
        """Whether the store cannot be reached, so that newer changes may exist."""
        ...

    def instance(self, instance_id: str) -> Versioned[Instance] | None: ...

    def instance_named(self, project: str, name: str) -> Versioned[Instance] | None: ...

    def instances(self) -> Iterable[Versioned[Instance]]: ...

    def instances_on(self, node_id: str) -> Iterable[Versioned[Instance]]: ...

    def node(self, node_id: str) -> Versioned[Node] | None: ...

    def node_named(self, hostname: str) -> Versioned[Node] | None: ...

    def nodes(self) -> Iterable[Versioned[Node]]: ...

    def drain(self, node_id: str) -> "Versioned[DrainRecord] | None": ...

    def allocation(self, node_id: str) -> Allocation:
        """What is reserved on the node (zero when nothing is)."""
        ...

    def operation(self, operation_id: str) -> Versioned[OperationRecord] | None: ...

    def operation_of_request(self, request_id: str) -> Versioned[OperationRecord] | None: ...

    def operations(self) -> Iterable[Versioned[OperationRecord]]: ...

    async def catch_up(self) -> bool:
        """Reach what the store holds now; whether something was missing. ``Unavailable`` where that cannot be had."""
        ...

    async def wait_revision(self, revision: int) -> None:
        """Return once this view has seen ``revision``: read your own writes."""
        ...

    def changes(self, *, after_revision: int | None) -> AsyncGenerator[tuple[ClusterChange, ...], None]:
        """Changes after the revision (None: from now on), all of one revision together, in order, none left out.

        An empty tuple is a progress mark (look at ``revision``). Raises ``Compacted`` (from the storage contract) when
        the history is gone. Any number of consumers; a slow one is served from the store's history and holds up
        nobody.
        """
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and under which request id (for the log and the agents)."""

    principal: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Mutation:
    """What all mutating calls carry. ``request_id`` is the user's (may be empty), apart from ``Caller.request_id``.

    ``payload_digest`` identifies the request without its request_id. With ``wait`` the call returns when the operation
    is done, and raises its error if it failed (metadata ``operation_id``).
    """

    caller: Caller
    request_id: str
    payload_digest: str
    wait: bool = True


@dataclass(frozen=True, slots=True)
class InstanceRef:
    """An instance by id or name, and the version the caller has seen (0: any)."""

    instance: str
    project: str = "default"
    resource_version: int = 0


@dataclass(frozen=True, slots=True)
class StopOptions:
    """How to stop: seconds between the polite request and the forced end (0: force at once)."""

    grace_s: float = 10.0


@dataclass(frozen=True, slots=True)
class InstanceDraft:
    """A validated create request."""

    name: str
    project: str
    type: InstanceType
    spec: InstanceSpec
    labels: Mapping[str, str]
    desired: DesiredState = DesiredState.RUNNING


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """What is asked for. ``node``: id of the target, empty: the scheduler's choice."""

    node: str = ""
    strategy: MoveStrategy = MoveStrategy.AUTO
    allow_disk_loss: bool = False
    healthy_s: float | None = None
    reason: str = ""
    drain: str = ""
    keep_home: bool = False
    """Remember where it was, to be brought back there (drains do)."""
    forced: bool = False
    """Stop it where nothing gentler will do, and let its local disk go (a drain past its deadline)."""

    def policy(self, instance: Instance) -> MovePolicy:
        """What counts for this move."""
        own = instance.spec.move or MovePolicy()
        return MovePolicy(
            strategy=own.strategy if self.strategy is MoveStrategy.AUTO else self.strategy,
            healthy_s=own.healthy_s if self.healthy_s is None else self.healthy_s,
            allow_disk_loss=own.allow_disk_loss or self.allow_disk_loss or self.forced,
        )


class ConsoleEvent(Protocol):
    """Marker for what a console session yields: see ``agents.py`` (ConsoleOpened, ConsoleData, ConsoleSkipped,
    ConsoleNotice, ConsoleClosed)."""


class ConsoleSession(Protocol):
    """A console of an instance, through its agent."""

    def output(self) -> AsyncGenerator[ConsoleEvent, None]: ...

    async def send(self, data: bytes) -> None: ...

    async def resize(self, size: ConsoleSize) -> None: ...

    async def grant(self, count: int) -> None:
        """The viewer takes so many more bytes."""
        ...

    async def aclose(self) -> None: ...


class Instances(Protocol):
    """Instances and what is done with them; the rules are those of ComputeService in compute.proto."""

    async def create(self, draft: InstanceDraft, mutation: Mutation) -> Versioned[OperationRecord]: ...

    async def plan(self, draft: InstanceDraft) -> Instance:
        """Validate and schedule only: the instance as it would be (empty id)."""
        ...

    async def start(self, ref: InstanceRef, mutation: Mutation) -> Versioned[OperationRecord]: ...

    async def stop(
        self, ref: InstanceRef, mutation: Mutation, *, options: StopOptions
    ) -> Versioned[OperationRecord]: ...

    async def restart(
        self, ref: InstanceRef, mutation: Mutation, *, options: StopOptions
    ) -> Versioned[OperationRecord]: ...

    async def delete(
        self, ref: InstanceRef, mutation: Mutation, *, options: StopOptions, force: bool
    ) -> Versioned[OperationRecord]: ...

    async def update(
        self, ref: InstanceRef, mutation: Mutation, *, cpu_millis: int | None, memory_mb: int | None
    ) -> Versioned[OperationRecord]:
        """Give it more or less of its node; None: as much as it has."""
        ...

    async def pause(self, ref: InstanceRef, mutation: Mutation) -> Versioned[OperationRecord]: ...

    async def resume(self, ref: InstanceRef, mutation: Mutation) -> Versioned[OperationRecord]: ...

    async def suspend(self, ref: InstanceRef, mutation: Mutation) -> Versioned[OperationRecord]: ...

    async def create_snapshot(
        self, ref: InstanceRef, mutation: Mutation, *, name: str, kind: SnapshotKind
    ) -> Versioned[OperationRecord]: ...

    async def restore_snapshot(
        self, ref: InstanceRef, mutation: Mutation, *, name: str
    ) -> Versioned[OperationRecord]: ...

    async def delete_snapshot(
        self, ref: InstanceRef, mutation: Mutation, *, name: str
    ) -> Versioned[OperationRecord]: ...

    async def snapshots(self, ref: InstanceRef, caller: Caller) -> tuple[Snapshot, ...]:
        """What is kept of it on its node, oldest first."""
        ...

    def resolve(self, ref: InstanceRef) -> Versioned[Instance]:
        """The instance meant, from memory. NotFound (INSTANCE_NOT_FOUND), Conflict (RESOURCE_VERSION_MISMATCH)."""
        ...

    async def stats(self, ref: InstanceRef, caller: Caller) -> InstanceStats: ...

    def watch_stats(
        self, ref: InstanceRef, caller: Caller, *, interval_s: float, history_s: float
    ) -> AsyncGenerator[InstanceStats, None]: ...

    def last_stats(self, instance_id: str) -> InstanceStats | None:
        """The newest sample that came with a heartbeat to this server."""
        ...

    async def attach_console(
        self,
        ref: InstanceRef,
        caller: Caller,
        options: ConsoleOptions,
    ) -> ConsoleSession: ...

    def logs(self, ref: InstanceRef, caller: Caller, options: LogOptions) -> AsyncGenerator[LogPiece, None]:
        """What it printed on its console, in whatever state it is."""
        ...


class Moves(Protocol):
    """Moving instances to other nodes; the rules are those of MoveInstance in compute.proto."""

    async def move(
        self, ref: InstanceRef, mutation: Mutation, *, order: MoveOrder, grace_s: float | None
    ) -> Versioned[OperationRecord]:
        """Move it. ``order.node``: id or host name of the target; empty: the scheduler's choice. ``grace_s``: for the
        copy that is stopped; None: the default."""
        ...


class Maintenance(Protocol):
    """Draining nodes, and what drains keep to; the rules are those of cluster.proto and maintenance.proto."""

    async def drain(
        self, node: str, mutation: Mutation, *, order: "DrainOrder", reason: str, resource_version: int
    ) -> str:
        """Cordon the node and begin to empty it; returns the operation's id. FailedPrecondition (``DRAINING``)."""
        ...

    async def restore(self, node: str, mutation: Mutation, *, order: "DrainOrder") -> str:
        """Uncordon the node and begin to bring home what drains took from it; returns the operation's id."""
        ...

    async def cancel(self, node: str, caller: Caller) -> Versioned[OperationRecord]:
        """Begin nothing more. FailedPrecondition (``NOT_DRAINING``)."""
        ...

    def plan(self, node: str, *, order: "DrainOrder", kind: "DrainKind" = ...) -> "DrainProgress":
        """What it would do now; nothing is recorded."""
        ...

    def state(self, node: str) -> "DrainProgress | None":
        """The node's last drain, or the one that goes on; None where there was none."""
        ...

    def watch(self, node: str, operation_id: str = "") -> "AsyncGenerator[DrainProgress, None]":
        """Its steps until it ends, the present state first; raises what it ended with where that is not well."""
        ...

    async def set_budget(self, budget: "Budget") -> "Budget":
        """Make it, or put it in the place of the one with its name."""
        ...

    async def delete_budget(self, project: str, name: str) -> None:
        """NotFound (``BUDGET_NOT_FOUND``)."""
        ...

    def budgets(self, project: str) -> "list[tuple[Budget, Standing]]":
        """Those of the project (empty: of all), and how they stand."""
        ...


class Operations(Protocol):
    """The history of mutating calls. ``operation`` is an operation id or a user's request_id."""

    def get(self, operation: str) -> Versioned[OperationRecord]: ...

    async def wait(self, operation: str, *, timeout_s: float | None) -> Versioned[OperationRecord]:
        """Return when it is done or the time is over, as it is then."""
        ...

    async def cancel(self, operation: str, caller: Caller) -> Versioned[OperationRecord]: ...


@dataclass(frozen=True, slots=True)
class NodeRegistration:
    """What an agent says of its node."""

    id: str
    hostname: str
    address: str
    port: int
    region: str
    zone: str
    role: NodeRole
    resources: NodeResources
    labels: Mapping[str, str]
    drivers: tuple[DriverInfo, ...]
    agent_version: str
    incarnation: str
    simulated: bool
    observations: tuple[Observation, ...]
    taints: tuple[Taint, ...] = ()
    fencing: NodeFencing | None = None


@dataclass(frozen=True, slots=True)
class HeartbeatTimes:
    """How often to send heartbeats and after how long without one a node is lost, in seconds."""

    interval_s: float
    timeout_s: float
    disarmed: bool = False
    """Of one node: it shall not fence itself."""


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """Where an instance of a dead node would go; ``node_id`` empty: nowhere, and ``reason`` says why."""

    instance_id: str
    instance_name: str
    node_id: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class NodeUsage:
    """Measured use of a node, as its newest heartbeat to this server told it."""

    resources: NodeResources
    """What the node has and what of it is in use, by whomever."""
    instances: InstancesUsage
    """What its instances use together."""
    age_s: float
    """Seconds since the heartbeat."""


@dataclass(frozen=True, slots=True)
class NodePlacements:
    """How placements on a node have gone lately; see PlacementHealth in node.proto."""

    penalty: int
    failures: int
    last_failure_at: datetime
    last_failure: str


class Nodes(Protocol):
    """Nodes; the rules are those of ClusterService in cluster.proto."""

    async def register(self, registration: NodeRegistration) -> tuple[Versioned[Node], HeartbeatTimes]: ...

    async def heartbeat(
        self,
        node_id: str,
        incarnation: str,
        resources: NodeResources,
        stats: Mapping[str, InstanceStats],
        *,
        usage: InstancesUsage,
        images: Sequence[str] = (),
        fencing: NodeFencing | None = None,
    ) -> HeartbeatTimes:
        """A sign of life. ``stats`` may lack some of the node's instances: what was known of those stays.
        ``images``: digests of those the node has."""
        ...

    async def update_status(
        self,
        node_id: str,
        incarnation: str,
        *,
        drivers: tuple[DriverInfo, ...] | None,
        observations: tuple[Observation, ...],
    ) -> tuple[str, ...]:
        """Record what changed on a node; returns the ids of instances it should not have."""
        ...

    async def deregister(
        self, node: str, mutation: Mutation, *, resource_version: int
    ) -> Versioned[OperationRecord]: ...

    async def cordon(
        self, node: str, mutation: Mutation, *, reason: str, resource_version: int
    ) -> Versioned[OperationRecord]: ...

    async def uncordon(
        self, node: str, mutation: Mutation, *, resource_version: int
    ) -> Versioned[OperationRecord]: ...

    async def taint(
        self, node: str, mutation: Mutation, *, taint: Taint, resource_version: int
    ) -> Versioned[OperationRecord]: ...

    async def untaint(
        self, node: str, mutation: Mutation, *, key: str, effect: TaintEffect | None, resource_version: int
    ) -> Versioned[OperationRecord]: ...

    async def evacuate(
        self, node: str, mutation: Mutation, *, resource_version: int
    ) -> Versioned[OperationRecord]:
        """The caller knows that the lost node is dead: everything on it is placed elsewhere."""
        ...

    def plan_evacuation(self, node: str) -> tuple[PlannedMove, ...]:
        """Where its instances would go, each as if it were the only one."""
        ...

    async def set_fencing(
        self, node: str, mutation: Mutation, *, armed: bool, reason: str, resource_version: int
    ) -> Versioned[OperationRecord]:
        """Whether the node shall fence itself."""
        ...

    def resolve(self, node: str, *, resource_version: int = 0) -> Versioned[Node]:
        """The node meant by an id or host name, from memory. NotFound (NODE_NOT_FOUND)."""
        ...

    def allocatable(self, node: Node) -> Resources:
        """What may be reserved on the node."""
        ...

    def placements(self, node_id: str) -> NodePlacements | None:
        """How placements on the node have gone lately; None where there is nothing to tell."""
        ...

    def usage(self, node_id: str) -> NodeUsage | None:
        """Newest measured use known to this server; None before it heard a heartbeat of the node."""
        ...
