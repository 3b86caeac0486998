"""The tables: which columns each kind of object has, and which of them only ``-o wide`` shows."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hypervisor.ctl.display import cells
from hypervisor.ctl.display.table import Column
from hypervisor.ctl.quantities import readable_bytes

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from hypervisor.v1.cluster_pb2 import DrainInstance, Event
    from hypervisor.v1.image_pb2 import Image
    from hypervisor.v1.instance_pb2 import Instance, InstanceStats, Pressure, Snapshot
    from hypervisor.v1.maintenance_pb2 import DisruptionBudget
    from hypervisor.v1.node_pb2 import Node
    from hypervisor.v1.operation_pb2 import Operation

__all__ = [
    "budget_columns",
    "drain_columns",
    "event_columns",
    "image_columns",
    "instance_columns",
    "node_columns",
    "operation_columns",
    "snapshot_columns",
    "stats_columns",
]

_MIB = 1 << 20
_TIME: "Column[InstanceStats]" = Column("TIME", lambda s: _time_of_day(s.sampled_at))


def instance_columns(now_s: float, hostnames: Mapping[str, str]) -> "list[Column[Instance]]":
    """Instances. ``hostnames`` by node id; a node that is not in it is shown by its id."""
    from hypervisor.v1.instance_pb2 import InstanceType

    return [
        Column("NAME", lambda i: i.name),
        Column("TYPE", lambda i: cells.enum_name(InstanceType.Name(i.type), "INSTANCE_TYPE_")),
        Column("STATUS", cells.instance_status),
        Column("NODE", lambda i: hostnames.get(i.node_id, i.node_id), shrinks=True),
        Column("CPU", lambda i: cells.cores(i.spec.cpu_cores), right=True),
        Column("MEMORY", lambda i: readable_bytes(i.spec.memory_mb * _MIB), right=True),
        Column("IMAGE", lambda i: i.spec.image or i.spec.kernel_path, shrinks=True),
        Column("AGE", lambda i: cells.since(i.created_at, now_s), right=True),
        Column("ID", lambda i: i.id, wide=True),
        Column("PROJECT", lambda i: i.project, wide=True),
        Column("DISK", lambda i: f"{i.spec.disk_gb}GiB" if i.spec.disk_gb else "", wide=True, right=True),
        Column("EXIT", cells.exit_of, wide=True, right=True),
        Column("RUNTIME", lambda i: i.runtime, wide=True, shrinks=True),
        Column("LABELS", lambda i: cells.labels(i.labels), wide=True, shrinks=True),
        Column("MESSAGE", lambda i: i.status_message, wide=True, shrinks=True),
    ]


def image_columns(now_s: float) -> "list[Column[Image]]":
    """Images."""
    from hypervisor.v1.image_pb2 import ImageKind

    return [
        Column("NAME", lambda i: i.name),
        Column("KIND", lambda i: cells.enum_name(ImageKind.Name(i.kind), "IMAGE_KIND_")),
        Column("FORMAT", lambda i: i.format),
        Column("SIZE", lambda i: readable_bytes(i.size_bytes), right=True),
        Column("STATE", cells.image_state),
        Column("SHA256", lambda i: i.sha256[:12]),
        Column("AGE", lambda i: cells.since(i.created_at, now_s), right=True),
        Column("ID", lambda i: i.id, wide=True),
        Column("PROJECT", lambda i: i.project, wide=True),
        Column(
            "VIRTUAL SIZE",
            lambda i: readable_bytes(i.virtual_size_bytes) if i.virtual_size_bytes else "",
            wide=True,
            right=True,
        ),
        Column("BY", lambda i: i.created_by, wide=True),
        Column("SERVERS", lambda i: ",".join(i.servers), wide=True, shrinks=True),
    ]


def snapshot_columns(now_s: float) -> "list[Column[Snapshot]]":
    """Snapshots of one instance."""
    from hypervisor.v1.instance_pb2 import SnapshotKind

    return [
        Column("NAME", lambda s: s.name),
        Column("KIND", lambda s: cells.enum_name(SnapshotKind.Name(s.kind), "SNAPSHOT_KIND_")),
        Column("MEMORY", lambda s: "yes" if s.memory else "no"),
        Column("CURRENT", lambda s: "*" if s.current else ""),
        Column("BASED ON", lambda s: s.parent),
        Column(
            "SIZE", lambda s: readable_bytes(s.size_bytes) if s.HasField("size_bytes") else "", right=True
        ),
        Column("AGE", lambda s: cells.since(s.created_at, now_s), right=True),
    ]


def budget_columns(now_s: float) -> "list[Column[DisruptionBudget]]":
    """Disruption budgets."""
    return [
        Column("NAME", lambda b: b.name),
        Column("SELECTOR", lambda b: ", ".join(map(cells.constraint, b.selector)), shrinks=True),
        Column("LIMIT", cells.budget_limit),
        Column("RUNNING", lambda b: f"{b.available}/{b.members}", right=True),
        Column("MORE MAY GO", lambda b: str(b.allowed), right=True),
        Column("AGE", lambda b: cells.since(b.created_at, now_s), right=True),
        Column("PROJECT", lambda b: b.project, wide=True),
    ]


def drain_columns(hostnames: Mapping[str, str]) -> "list[Column[DrainInstance]]":
    """Instances of a drain; ``hostnames`` of nodes by id."""
    from hypervisor.v1.cluster_pb2 import DrainInstance
    from hypervisor.v1.instance_pb2 import MoveStrategy

    return [
        Column("NAME", lambda i: i.name),
        Column("STATE", lambda i: cells.enum_name(DrainInstance.State.Name(i.state), "STATE_")),
        Column("STRATEGY", lambda i: cells.enum_name(MoveStrategy.Name(i.strategy), "MOVE_STRATEGY_")),
        Column("TO NODE", lambda i: hostnames.get(i.target_node_id, i.target_node_id)),
        Column("MESSAGE", lambda i: i.message, shrinks=True),
        Column("ID", lambda i: i.instance_id, wide=True),
        Column("PROJECT", lambda i: i.project, wide=True),
    ]


def node_columns(now_s: float) -> "list[Column[Node]]":
    """Nodes."""
    from hypervisor.v1.node_pb2 import NodeRole

    return [
        Column("HOSTNAME", lambda n: n.hostname),
        Column("STATUS", cells.node_status),
        Column("ROLE", lambda n: cells.enum_name(NodeRole.Name(n.role), "NODE_ROLE_")),
        Column("REGION/ZONE", lambda n: f"{n.region}/{n.zone}"),
        Column("DRIVERS", cells.drivers, shrinks=True),
        Column("INSTANCES", lambda n: str(n.reservation.instances), right=True),
        Column(
            "CPU RESERVED",
            lambda n: cells.used_of(n.reservation.cpu_cores, n.resources.cpu_cores),
            right=True,
        ),
        Column(
            "MEMORY RESERVED",
            lambda n: cells.memory_of(n.reservation.memory_bytes, n.resources.memory_bytes),
            right=True,
        ),
        Column("AGE", lambda n: cells.since(n.created_at, now_s), right=True),
        Column("ID", lambda n: n.id, wide=True),
        Column("TAINTS", lambda n: ", ".join(map(cells.taint, n.taints)), wide=True, shrinks=True),
        Column("FENCING", cells.fencing, wide=True),
        Column("ADDRESS", lambda n: f"{n.address}:{n.port}", wide=True),
        Column(
            "CPU USED",
            lambda n: cells.used_of(n.resources.cpu_used_cores, n.resources.cpu_cores),
            wide=True,
            right=True,
        ),
        Column(
            "MEMORY USED",
            lambda n: cells.memory_of(n.resources.memory_used, n.resources.memory_bytes),
            wide=True,
            right=True,
        ),
        Column(
            "DISK USED",
            lambda n: cells.memory_of(n.resources.disk_used, n.resources.disk_bytes),
            wide=True,
            right=True,
        ),
        Column("HEARTBEAT", lambda n: cells.since(n.last_heartbeat_at, now_s), wide=True, right=True),
        Column("VERSION", lambda n: n.agent_version, wide=True),
        Column("LABELS", lambda n: cells.labels(n.labels), wide=True, shrinks=True),
        Column("MESSAGE", lambda n: n.status_message, wide=True, shrinks=True),
    ]


def operation_columns(now_s: float) -> "list[Column[Operation]]":
    """Operations."""
    return [
        Column("ID", lambda o: o.id),
        Column("VERB", lambda o: o.verb),
        Column("OBJECT", lambda o: f"{o.object_kind}/{o.object_name or o.object_id}", shrinks=True),
        Column("STATE", cells.operation_outcome),
        Column("STARTED", lambda o: cells.since(o.started_at, now_s), right=True),
        Column("TOOK", lambda o: cells.span(o.started_at, o.finished_at, now_s), right=True),
        Column("MESSAGE", lambda o: o.error.message if o.done else o.progress_message, shrinks=True),
        Column("BY", lambda o: o.principal, wide=True),
        Column("PROJECT", lambda o: o.project, wide=True),
        Column("SERVER", lambda o: o.server_id, wide=True),
        Column("REQUEST", lambda o: o.request_id, wide=True),
    ]


def event_columns() -> "list[Column[Event]]":
    """Events; one at a time is shown, so the widths of the first are kept."""
    from hypervisor.v1.cluster_pb2 import Event

    return [
        Column("REVISION", lambda e: str(e.revision), right=True),
        Column("TIME", lambda e: e.time.ToJsonString() if e.time.seconds else ""),
        Column("TYPE", lambda e: cells.enum_name(Event.Type.Name(e.type), "TYPE_")),
        Column("OBJECT", lambda e: f"{e.kind}/{e.object_name or e.object_id}" if e.kind else ""),
        Column("REASON", lambda e: e.reason),
        Column("MESSAGE", lambda e: e.message, shrinks=True),
        Column("ID", lambda e: e.object_id, wide=True),
    ]


def stats_columns(name: str, *, timed: bool = False) -> "list[Column[InstanceStats]]":
    """Samples of one instance; ``timed`` shows when each was made. What its driver cannot know is ``-``."""

    def given(field: str) -> "Callable[[InstanceStats], str]":
        return lambda s: str(getattr(s, field)) if s.HasField(field) else ""  # type: ignore[arg-type]

    def size(field: str) -> "Callable[[InstanceStats], str]":
        return lambda s: readable_bytes(round(getattr(s, field))) if s.HasField(field) else ""  # type: ignore[arg-type]

    def seconds(field: str) -> "Callable[[InstanceStats], str]":
        return lambda s: f"{getattr(s, field) / 1e9:.2f}s" if s.HasField(field) else ""  # type: ignore[arg-type]

    def waited(field: str) -> "Callable[[InstanceStats], str]":
        return lambda s: _percent(getattr(s, field))

    when = [_TIME] if timed else []
    return [
        Column("NAME", lambda s: name),
        *when,
        Column(
            "CPU", lambda s: f"{s.cpu_used_cores:.3f}" if s.HasField("cpu_used_cores") else "", right=True
        ),
        Column("CPU TIME", seconds("cpu_usage_ns"), right=True),
        Column("MEMORY", size("memory_used_bytes"), right=True),
        Column("WORKING SET", size("memory_working_set_bytes"), right=True),
        Column("LIMIT", size("memory_limit_bytes"), right=True),
        Column("PIDS", given("pids"), right=True),
        Column("READ/S", size("block_read_bytes_per_second"), right=True),
        Column("WRITTEN/S", size("block_write_bytes_per_second"), right=True),
        Column("RECEIVED/S", size("network_receive_bytes_per_second"), right=True),
        Column("SENT/S", size("network_transmit_bytes_per_second"), right=True),
        Column("OOM KILLS", given("oom_kills"), wide=True, right=True),
        Column("THROTTLED", seconds("cpu_throttled_ns"), wide=True, right=True),
        Column("SWAP", size("memory_swap_bytes"), wide=True, right=True),
        Column("READ", size("block_read_bytes"), wide=True, right=True),
        Column("WRITTEN", size("block_write_bytes"), wide=True, right=True),
        Column("RECEIVED", size("network_receive_bytes"), wide=True, right=True),
        Column("SENT", size("network_transmit_bytes"), wide=True, right=True),
        Column("CPU WAIT", waited("cpu_pressure"), wide=True, right=True),
        Column("MEMORY WAIT", waited("memory_pressure"), wide=True, right=True),
        Column("IO WAIT", waited("io_pressure"), wide=True, right=True),
        Column("SAMPLED", lambda s: s.sampled_at.ToJsonString(), wide=True),
    ]


def _time_of_day(moment: "Timestamp") -> str:
    """In UTC, to the tenth of a second."""
    return f"{moment.ToJsonString()[11:19]}.{moment.nanos // 100_000_000}"


def _percent(pressure: "Pressure") -> str:
    return f"{pressure.some_share * 100:.1f}%" if pressure.HasField("some_share") else ""
