"""Domain values: what the store keeps and the parts of the platform hand to one another.

They are frozen; change one with ``msgspec.structs.replace``. In the store each is JSON with a schema version
(field ``v``); see :func:`encode` and :func:`decode`. Times are aware datetimes in UTC, sizes bytes, processors
thousandths of a core (:mod:`hypervisor.core.resources`). The wire types (``*_pb2``) meet these only at the edges.
"""

from datetime import datetime
from typing import TypeVar

import msgspec

from hypervisor.core.availability import Availability, InstanceLoss, NodeFencing, NodeLoss
from hypervisor.core.errors import Internal
from hypervisor.core.machines import CloudInit, MicrovmOptions, NetworkInterface, SnapshotKind, VmOptions
from hypervisor.core.moves import MovePolicy, MoveRecord
from hypervisor.core.resources import GIB, MIB, ZERO, Resources
from hypervisor.core.restarts import RestartPolicy, Restarts
from hypervisor.core.states import (
    DesiredState,
    InstanceStatus,
    InstanceType,
    LabelOperator,
    NodeRole,
    NodeStatus,
    OperationState,
    PlacementPolicy,
    TaintEffect,
    TolerationOperator,
)

__all__ = [
    "HOSTNAME_LABEL",
    "SCHEMA_VERSION",
    "SEQUENCE_BITS",
    "ZONE_LABEL",
    "AffinityTerm",
    "Allocation",
    "Capability",
    "ConsoleSize",
    "DriverInfo",
    "ErrorRecord",
    "Instance",
    "InstanceSpec",
    "InstanceStats",
    "InstancesUsage",
    "LabelConstraint",
    "Node",
    "NodeResources",
    "Observation",
    "OperationRecord",
    "PlacementRecord",
    "Pressure",
    "ScorePart",
    "Sizes",
    "SpreadTerm",
    "Taint",
    "Toleration",
    "decode",
    "encode",
]

SCHEMA_VERSION = 1

HOSTNAME_LABEL = "hypervisor/hostname"
"""Label of nodes that tells each from all others."""
ZONE_LABEL = "hypervisor/zone"
"""Label of nodes that tells their zone."""


class LabelConstraint(msgspec.Struct, frozen=True, kw_only=True):
    """A condition on one label of a node; see LabelConstraint in instance.proto."""

    key: str
    operator: LabelOperator = LabelOperator.IN
    values: tuple[str, ...] = ()


class Taint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Keeps instances that do not tolerate it away from a node; see Taint in node.proto."""

    key: str
    effect: TaintEffect
    value: str = ""

    def __str__(self) -> str:
        """As users write it: ``gpu=yes:no_schedule``."""
        return f"{self.key}{f'={self.value}' if self.value else ''}:{self.effect.value}"


class Toleration(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Taints that an instance does not mind; see Toleration in instance.proto. ``effect`` None: both."""

    key: str = ""
    operator: TolerationOperator = TolerationOperator.EQUAL
    value: str = ""
    effect: TaintEffect | None = None

    def covers(self, taint: Taint) -> bool:
        """Whether the taint is one of those meant."""
        if self.effect is not None and self.effect is not taint.effect:
            return False
        if self.operator is TolerationOperator.EXISTS:
            return self.key in ("", taint.key)
        return (self.key, self.value) == (taint.key, taint.value)


class AffinityTerm(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Near or away from instances with these labels; see AffinityTerm in instance.proto."""

    selector: tuple[LabelConstraint, ...]
    topology: str = HOSTNAME_LABEL
    preferred: bool = False
    weight: int = 100


class SpreadTerm(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Prefer places that hold fewer instances with these labels; see SpreadTerm in instance.proto."""

    selector: tuple[LabelConstraint, ...]
    topology: str = ZONE_LABEL
    weight: int = 100


class ScorePart(msgspec.Struct, frozen=True, array_like=True):
    """What one score says of a node: 0 (worst) to 1000 (best), and what it is multiplied by.

    Stored as a list: there are several in the record of every instance.
    """

    name: str
    value: int
    weight: int


class PlacementRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why an instance was placed where it is, as recorded when that was decided."""

    placed_at: datetime
    scheduler: str
    score: int = 0
    parts: tuple[ScorePart, ...] = ()


class InstanceSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an instance shall be; see InstanceSpec in instance.proto for each field's meaning and limits."""

    image: str = ""
    cpu_millis: int = 1000
    memory_mb: int = 256
    disk_gb: int = 0
    kernel_path: str = ""
    initrd_path: str = ""
    kernel_args: str = ""
    command: tuple[str, ...] = ()
    env: dict[str, str] = {}
    working_dir: str = ""
    pids_limit: int = 4096
    node_selector: tuple[LabelConstraint, ...] = ()
    placement_policy: PlacementPolicy | None = None
    node: str = ""
    tolerations: tuple[Toleration, ...] = ()
    affinity: tuple[AffinityTerm, ...] = ()
    anti_affinity: tuple[AffinityTerm, ...] = ()
    spread: tuple[SpreadTerm, ...] = ()
    cloud_init: CloudInit | None = None
    networks: tuple[NetworkInterface, ...] = ()
    vm: VmOptions | None = None
    microvm: MicrovmOptions | None = None
    restart: RestartPolicy | None = None
    availability: Availability | None = None
    move: MovePolicy | None = None

    @property
    def resources(self) -> Resources:
        """What it holds on its node."""
        return Resources(
            cpu_millis=self.cpu_millis, memory_bytes=self.memory_mb * MIB, disk_bytes=self.disk_gb * GIB
        )


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a node an instance has that can be changed while it is there."""

    cpu_millis: int
    memory_mb: int

    def of(self, spec: InstanceSpec) -> InstanceSpec:
        """The specification with these sizes."""
        return msgspec.structs.replace(spec, cpu_millis=self.cpu_millis, memory_mb=self.memory_mb)


class Instance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The record of one instance. ``resource_version`` is not stored: it is the store's ``mod_revision``."""

    id: str
    name: str
    project: str
    type: InstanceType
    spec: InstanceSpec
    status: InstanceStatus
    desired: DesiredState
    created_at: datetime
    updated_at: datetime
    labels: dict[str, str] = {}
    node_id: str = ""
    status_reason: str = ""
    status_message: str = ""
    exit_code: int | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    generation: int = 1
    epoch: int = 1
    operation_id: str = ""
    runtime: str = ""
    runtime_reason: str = ""
    observed_sequence: int = 0
    transition_deadline: datetime | None = None
    """Past it the reconciler re-drives a transitional state."""
    placement: PlacementRecord | None = None
    resizing: Sizes | None = None
    """What it is being given in place of what ``spec`` says, or may have got when nobody could tell any more."""
    images: dict[str, str] = {}
    """The images that ``spec`` names: their ids by name, as they were when it was created."""
    restarts: Restarts | None = None
    lost: InstanceLoss | None = None
    """Its node was lost while it should run, and it does not run again yet."""
    move: MoveRecord | None = None
    """Its move to another node, or what is left of one; see ``server/moving.py``."""
    home: str = ""
    """The node that a drain took it from, to which it may be brought back."""
    last_epoch: int = 0
    """The highest epoch that was ever given to a copy of it, where that is more than ``epoch``."""
    v: int = SCHEMA_VERSION

    @property
    def next_epoch(self) -> int:
        """An epoch that no copy of it ever had."""
        return max(self.epoch, self.last_epoch) + 1

    @property
    def holds_elsewhere(self) -> tuple[str, Resources] | None:
        """What is reserved for it on a node besides its own (node id, amount), while it moves."""
        return None if self.move is None else (self.move.elsewhere[0], self.move.held)

    @property
    def holds(self) -> Resources:
        """What is reserved for it on its node: while its size changes, the larger of both."""
        held = self.spec.resources
        return held if self.resizing is None else held.at_least(self.resizing.of(self.spec).resources)


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """How much work waited for a resource: nanoseconds since the start, and shares (0.0 to 1.0) of the time between
    two looks. See Pressure in instance.proto."""

    some_total_ns: int
    full_total_ns: int | None = None
    some_share: float | None = None
    full_share: float | None = None


class InstanceStats(msgspec.Struct, frozen=True, kw_only=True):
    """One sample of an instance's use; None where its driver cannot know. See InstanceStats in instance.proto."""

    sampled_at: datetime
    cpu_usage_ns: int | None = None
    cpu_used_cores: float | None = None
    cpu_throttled_periods: int | None = None
    cpu_throttled_ns: int | None = None
    cpu_throttled_share: float | None = None
    memory_used_bytes: int | None = None
    memory_working_set_bytes: int | None = None
    memory_limit_bytes: int | None = None
    memory_anon_bytes: int | None = None
    memory_file_bytes: int | None = None
    memory_swap_bytes: int | None = None
    major_faults: int | None = None
    oom_kills: int | None = None
    pids: int | None = None
    block_read_bytes: int | None = None
    block_write_bytes: int | None = None
    block_read_operations: int | None = None
    block_write_operations: int | None = None
    block_read_bytes_per_second: float | None = None
    block_write_bytes_per_second: float | None = None
    block_read_operations_per_second: float | None = None
    block_write_operations_per_second: float | None = None
    network_receive_bytes: int | None = None
    network_transmit_bytes: int | None = None
    network_receive_packets: int | None = None
    network_transmit_packets: int | None = None
    network_receive_bytes_per_second: float | None = None
    network_transmit_bytes_per_second: float | None = None
    cpu_pressure: Pressure | None = None
    memory_pressure: Pressure | None = None
    io_pressure: Pressure | None = None


class InstancesUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What the instances of a node use together; see InstancesUsage in node.proto."""

    running: int = 0
    sampled: int = 0
    cpu_used_cores: float = 0.0
    memory_used_bytes: int = 0
    memory_working_set_bytes: int = 0
    block_read_bytes_per_second: float = 0.0
    block_write_bytes_per_second: float = 0.0
    network_receive_bytes_per_second: float = 0.0
    network_transmit_bytes_per_second: float = 0.0
    pids: int = 0


SEQUENCE_BITS = 36
"""Bits of an observation's sequence below the count of its agent's starts: 68 billion observations in each of 134
million starts fit in an int64."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as its agent sees it. ``sequence`` rises with every observation the agent makes of it."""

    instance_id: str
    generation: int
    epoch: int
    status: InstanceStatus
    observed_at: datetime
    sequence: int = 0
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    runtime: str = ""
    runtime_reason: str = ""
    """Why this runtime, where there was a choice."""
    restarts: Restarts | None = None
    """Of one with a restart policy that its node knows."""


class ConsoleSize(msgspec.Struct, frozen=True):
    """Size of a terminal in characters."""

    width: int
    height: int


class NodeResources(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has and what of it is in use, as measured on it."""

    cpu_millis: int = 0
    cpu_used_millis: int = 0
    memory_bytes: int = 0
    memory_used_bytes: int = 0
    disk_bytes: int = 0
    disk_used_bytes: int = 0

    @property
    def capacity(self) -> Resources:
        """What may be reserved."""
        return Resources(
            cpu_millis=self.cpu_millis, memory_bytes=self.memory_bytes, disk_bytes=self.disk_bytes
        )


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """One verb a driver has or lacks; ``reason`` says why it lacks it."""

    verb: str
    supported: bool
    reason: str = ""


class DriverInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A driver on a node; unavailable ones are listed with the reason."""

    name: str
    types: tuple[InstanceType, ...]
    available: bool
    reason: str = ""
    version: str = ""
    capabilities: tuple[Capability, ...] = ()

    def lacks(self, verb: str) -> Capability | None:
        """The capability record of a verb this driver does not have, else None."""
        for capability in self.capabilities:
            if capability.verb == verb:
                return None if capability.supported else capability
        return Capability(verb=verb, supported=False, reason=f"driver {self.name} does not know {verb}")


class Node(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The record of one node. Measured use is not part of it: heartbeats would change it all the time."""

    id: str
    hostname: str
    address: str
    port: int
    created_at: datetime
    updated_at: datetime
    region: str = "default"
    zone: str = "default"
    role: NodeRole = NodeRole.WORKER
    status: NodeStatus = NodeStatus.READY
    capacity: Resources = ZERO
    labels: dict[str, str] = {}
    drivers: tuple[DriverInfo, ...] = ()
    schedulable: bool = True
    cordon_reason: str = ""
    status_message: str = ""
    agent_version: str = ""
    incarnation: str = ""
    lease_id: str = ""
    simulated: bool = False
    own_taints: tuple[Taint, ...] = ()
    """Those of the agent's configuration; each registration replaces them."""
    set_taints: tuple[Taint, ...] = ()
    """Those that users have set."""
    fencing: NodeFencing | None = None
    """As its agent told it last; None for one that cannot fence."""
    disarmed: str = ""
    """Why a user has switched its fencing off; empty where nobody has."""
    loss: NodeLoss | None = None
    """While it is OFFLINE."""
    v: int = SCHEMA_VERSION

    @property
    def taints(self) -> tuple[Taint, ...]:
        """All its taints. What users have set wins over the agent's of the same key and effect."""
        if not self.own_taints:
            return self.set_taints
        chosen = {(t.key, t.effect): t for t in (*self.own_taints, *self.set_taints)}
        return tuple(chosen.values())

    def driver_for(self, kind: InstanceType) -> DriverInfo | None:
        """The driver that runs this type here, available or not; None when there is none."""
        found = [d for d in self.drivers if kind in d.types]
        return next((d for d in found if d.available), found[0] if found else None)


class Allocation(msgspec.Struct, frozen=True, kw_only=True):
    """What placed instances hold on a node: always the sum of their specs. Its key is changed by placements only."""

    node_id: str
    reserved: Resources = ZERO
    instances: int = 0
    v: int = SCHEMA_VERSION


class ErrorRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as an operation keeps it: class name in core.errors, reason, message, metadata."""

    kind: str
    reason: str
    message: str
    metadata: dict[str, str] = {}


class OperationRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The durable record of one mutating call."""

    id: str
    verb: str
    object_kind: str
    object_id: str
    object_name: str
    principal: str
    started_at: datetime
    state: OperationState = OperationState.RUNNING
    project: str = ""
    request_id: str = ""
    payload_digest: str = ""
    """SHA-256 of the request: the same request_id with another payload is refused."""
    server_id: str = ""
    node_id: str = ""
    """Of a create: where the instance was placed; kept when the instance is gone."""
    progress_percent: int = 0
    progress_message: str = ""
    error: ErrorRecord | None = None
    finished_at: datetime | None = None
    cancel_requested: bool = False
    grace_period_s: float | None = None
    """Of a stop, restart or delete: kept so that another server can finish it as it was asked for."""
    snapshot: str = ""
    """Of what is done with a snapshot: its name, likewise kept."""
    snapshot_kind: SnapshotKind = SnapshotKind.FULL
    sizes: Sizes | None = None
    """Of an update: what the instance is to have, likewise kept."""
    v: int = SCHEMA_VERSION

    @property
    def done(self) -> bool:
        """Whether it has ended, however."""
        return self.state is not OperationState.RUNNING


T = TypeVar("T", bound=msgspec.Struct)

_ENCODER = msgspec.json.Encoder()
_DECODERS: dict[type[msgspec.Struct], msgspec.json.Decoder[msgspec.Struct]] = {}


def encode(value: msgspec.Struct) -> bytes:
    """The stored form of a record: JSON."""
    return _ENCODER.encode(value)


def decode(kind: type[T], data: bytes, *, key: str) -> T:
    """The record stored under ``key``.

    Raises Internal (reason ``RECORD_UNREADABLE``) for damaged or newer data, naming the key: never guesses.
    """
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind)
    try:
        value = decoder.decode(data)
    except msgspec.MsgspecError as exc:
        raise Internal(
            f"the record {key} cannot be read: {exc}", reason="RECORD_UNREADABLE", metadata={"key": key}
        ) from exc
    assert isinstance(value, kind)
    if getattr(value, "v", SCHEMA_VERSION) > SCHEMA_VERSION:
        raise Internal(
            f"the record {key} was written by a newer version of Hypervisor: upgrade this server",
            reason="RECORD_UNREADABLE",
            metadata={"key": key},
        )
    return value
