"""One object in full, for a person: labelled lines, empty ones left out."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hypervisor.ctl.display import cells
from hypervisor.ctl.display.table import cell_width, harmless
from hypervisor.ctl.quantities import readable_bytes

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from hypervisor.v1.cluster_pb2 import ClusterInfo
    from hypervisor.v1.image_pb2 import Image
    from hypervisor.v1.instance_pb2 import AffinityTerm, Instance, SpreadTerm
    from hypervisor.v1.node_pb2 import DriverInfo, Node
    from hypervisor.v1.operation_pb2 import Operation

__all__ = [
    "cluster_details",
    "image_details",
    "instance_details",
    "labelled",
    "node_details",
    "operation_details",
]

Pairs = Iterable[tuple[str, str]]
_MIB = 1 << 20
_DEFAULT_WEIGHT = 100


def labelled(pairs: Pairs) -> str:
    """``Label:  value`` lines, values aligned; pairs without a value are left out."""
    kept = [(label, harmless(value)) for label, value in pairs if value]
    width = max((cell_width(label) for label, _ in kept), default=0) + 1
    return "\n".join(f"{label + ':':<{width}}  {value}" for label, value in kept)


def _moment(moment: "Timestamp", now_s: float) -> str:
    return f"{moment.ToJsonString()} ({cells.since(moment, now_s)} ago)" if moment.seconds else ""


def _quoted(words: Iterable[str]) -> str:
    import shlex

    return shlex.join(words)


def _term(term: "AffinityTerm | SpreadTerm") -> str:
    from hypervisor.v1.instance_pb2 import SpreadTerm

    soft = isinstance(term, SpreadTerm) or term.preferred
    prefix = "preferred " if soft and not isinstance(term, SpreadTerm) else ""
    weight = f" (weight {term.weight})" if soft and term.weight != _DEFAULT_WEIGHT else ""
    return f"{prefix}{', '.join(map(cells.constraint, term.selector))} by {term.topology}{weight}"


def image_details(image: "Image", *, now_s: float) -> str:
    """An image."""
    from hypervisor.v1.image_pb2 import ImageKind

    virtual = image.virtual_size_bytes
    return labelled(
        [
            ("Name", image.name),
            ("ID", image.id),
            ("Project", image.project),
            ("Kind", cells.enum_name(ImageKind.Name(image.kind), "IMAGE_KIND_")),
            ("Format", image.format),
            ("State", cells.image_state(image)),
            ("Size", f"{readable_bytes(image.size_bytes)} ({image.size_bytes} bytes)"),
            ("Virtual size", f"{readable_bytes(virtual)} ({virtual} bytes)" if virtual else ""),
            ("SHA-256", image.sha256),
            ("Created", _moment(image.created_at, now_s)),
            ("By", image.created_by),
            ("Servers", ", ".join(image.servers)),
            ("Use it as", f"image:{image.name}"),
            ("Version", str(image.resource_version)),
        ]
    )


def instance_details(instance: "Instance", *, node: "Node | None", now_s: float) -> str:
    """An instance, its spec, and the verbs that its driver on that node does not offer."""
    from hypervisor.v1.instance_pb2 import DesiredState, InstanceType, PlacementPolicy

    spec = instance.spec
    lines = labelled(
        [
            ("Name", instance.name),
            ("Id", instance.id),
            ("Project", instance.project),
            ("Type", cells.enum_name(InstanceType.Name(instance.type), "INSTANCE_TYPE_")),
            ("Status", cells.instance_status(instance)),
            ("Reason", instance.status_reason),
            ("Message", instance.status_message),
            ("Wanted", cells.enum_name(DesiredState.Name(instance.desired_state), "DESIRED_STATE_")),
            ("Exit code", cells.exit_of(instance)),
            ("Restart policy", cells.restart_policy(spec)),
            ("Restarts", cells.restarts(instance, now_s)),
            ("Node", f"{node.hostname} ({instance.node_id})" if node is not None else instance.node_id),
            ("Runtime", instance.runtime),
            ("Chosen because", instance.runtime_reason),
            ("Image", spec.image),
            ("Command", _quoted(spec.command)),
            ("Working directory", spec.working_dir),
            ("Kernel", spec.kernel_path),
            ("Kernel arguments", spec.kernel_args),
            ("Initial RAM disk", spec.initrd_path),
            ("Networks", ", ".join(f"{n.bridge} {n.mac}".rstrip() for n in spec.networks)),
            ("Host devices", ", ".join(spec.vm.host_devices)),
            ("Cloud-init", "yes" if spec.HasField("cloud_init") else ""),
            ("CPU", cells.cores(spec.cpu_cores)),
            ("Memory", readable_bytes(spec.memory_mb * _MIB)),
            ("Disk", f"{spec.disk_gb}GiB" if spec.disk_gb else ""),
            ("Processes", f"at most {spec.pids_limit}" if spec.pids_limit else ""),
            ("Environment", ",".join(f"{key}={spec.env[key]}" for key in sorted(spec.env))),
            ("Labels", cells.labels(instance.labels)),
            ("Selector", ", ".join(cells.constraint(c) for c in spec.node_selector)),
            ("Pinned to", spec.node),
            ("Tolerates", ", ".join(map(cells.toleration, spec.tolerations))),
            ("Affinity", "; ".join(map(_term, spec.affinity))),
            ("Anti-affinity", "; ".join(map(_term, spec.anti_affinity))),
            ("Spread over", "; ".join(map(_term, spec.spread))),
            (
                "Placement",
                cells.enum_name(PlacementPolicy.Name(spec.placement_policy), "PLACEMENT_POLICY_"),
            ),
            ("Moves", cells.move(instance)),
            ("Home", instance.home_node_id),
            ("To be moved", cells.move_policy(instance.spec)),
            ("On node loss", _on_node_loss(instance)),
            ("On partition", _on_partition(instance)),
            ("Node lost", _moment(instance.lost.since, now_s)),
            ("Waits because", instance.lost.waiting),
            ("Created", _moment(instance.created_at, now_s)),
            ("Started", _moment(instance.started_at, now_s)),
            ("Finished", _moment(instance.finished_at, now_s)),
            ("Operation", instance.operation_id),
            ("Version", str(instance.resource_version)),
        ]
    )
    return "\n".join([lines, *_lacking(instance, node)])


def _on_node_loss(instance: "Instance") -> str:
    from hypervisor.v1.instance_pb2 import OnNodeLoss

    return cells.enum_name(OnNodeLoss.Name(instance.spec.availability.on_node_loss), "ON_NODE_LOSS_")


def _on_partition(instance: "Instance") -> str:
    from hypervisor.v1.instance_pb2 import OnPartition

    return cells.enum_name(OnPartition.Name(instance.spec.availability.on_partition), "ON_PARTITION_")


def _driver_of(instance: "Instance", node: "Node") -> "DriverInfo | None":
    """The driver that runs it: the one its runtime names, else the first available one of its type."""
    suitable = [driver for driver in node.drivers if instance.type in driver.types]
    name = instance.runtime.partition(" ")[0]
    named = [driver for driver in suitable if driver.name == name]
    available = [driver for driver in suitable if driver.available]
    return next(iter(named or available or suitable), None)


def _lacking(instance: "Instance", node: "Node | None") -> list[str]:
    driver = _driver_of(instance, node) if node is not None else None
    if driver is None:
        return []
    lines = [] if driver.available else [f"Driver {driver.name} does not work now: {harmless(driver.reason)}"]
    missing = [c for c in driver.capabilities if not c.supported]
    if missing:
        lines.append(f"Not offered by the driver {harmless(driver.name)} on this node:")
        lines += [f"  {harmless(c.verb)}: {harmless(c.reason) or 'no reason given'}" for c in missing]
    return lines


def node_details(node: "Node", *, now_s: float) -> str:
    """A node and its drivers, with what each of them lacks."""
    from hypervisor.v1.node_pb2 import NodeRole

    has, held = node.resources, node.reservation
    text = labelled(
        [
            ("Hostname", node.hostname),
            ("Id", node.id),
            ("Status", cells.node_status(node)),
            ("Message", node.status_message),
            ("Fencing", cells.fencing(node)),
            ("Fencing message", node.fencing.reason),
            ("Offline", _moment(node.fencing.offline_since, now_s)),
            ("Moves held", node.fencing.moves_held),
            ("Evacuated by", node.fencing.evacuated_by),
            ("Schedulable", "yes" if node.schedulable else "no"),
            ("Simulated", "yes: its instances are not real" if node.simulated else ""),
            ("Role", cells.enum_name(NodeRole.Name(node.role), "NODE_ROLE_")),
            ("Address", f"{node.address}:{node.port}"),
            ("Region", node.region),
            ("Zone", node.zone),
            ("Labels", cells.labels(node.labels)),
            (
                "Taints",
                ", ".join(f"{cells.taint(t)}{' (configured)' if t.configured else ''}" for t in node.taints),
            ),
            ("Instances", str(held.instances)),
            ("Placements", _placements(node, now_s)),
            ("May be reserved", _allocatable(node)),
            (
                "CPU",
                f"{cells.used_of(held.cpu_cores, has.cpu_cores)} reserved, {cells.cores(has.cpu_used_cores)} used",
            ),
            (
                "Memory",
                f"{cells.memory_of(held.memory_bytes, has.memory_bytes)} reserved, "
                f"{readable_bytes(has.memory_used)} used",
            ),
            (
                "Disk",
                f"{cells.memory_of(held.disk_bytes, has.disk_bytes)} reserved, {readable_bytes(has.disk_used)} used",
            ),
            ("Instances use", _instances_use(node)),
            ("Agent", node.agent_version),
            ("Heartbeat", _moment(node.last_heartbeat_at, now_s)),
            ("Registered", _moment(node.created_at, now_s)),
            ("Version", str(node.resource_version)),
        ]
    )
    lines = [text, "Drivers:"] if node.drivers else [text]
    for driver in node.drivers:
        state = (
            harmless(driver.version) or "works"
            if driver.available
            else f"does not work: {harmless(driver.reason)}"
        )
        lines.append(f"  {harmless(driver.name)} ({cells.driver_types(driver)}): {state}")
        lines += [
            f"    no {harmless(c.verb)}: {harmless(c.reason) or 'no reason given'}"
            for c in driver.capabilities
            if not c.supported
        ]
    return "\n".join(lines)


def _instances_use(node: "Node") -> str:
    """What the node's instances use together; empty where the server has not heard it."""
    if not node.HasField("usage") or not node.usage.sampled:
        return ""
    use = node.usage
    return (
        f"{use.cpu_used_cores:.2f} cores, {readable_bytes(use.memory_used_bytes)} memory "
        f"({readable_bytes(use.memory_working_set_bytes)} working set), "
        f"disk {readable_bytes(round(use.block_read_bytes_per_second))}/s read and "
        f"{readable_bytes(round(use.block_write_bytes_per_second))}/s written, "
        f"network {readable_bytes(round(use.network_receive_bytes_per_second))}/s in and "
        f"{readable_bytes(round(use.network_transmit_bytes_per_second))}/s out, {use.pids} processes "
        f"({use.sampled} of {use.running} running instances sampled)"
    )


def _placements(node: "Node", now_s: float) -> str:
    if not node.HasField("placement_health"):
        return ""
    health = node.placement_health
    return (
        f"{cells.placements(node)}: ranked down by {health.penalty} of 1000; the last failed "
        f"{cells.since(health.last_failure_at, now_s)} ago: {health.last_failure}"
    )


def _allocatable(node: "Node") -> str:
    """What may be reserved, where that is not what the node has."""
    has, may = node.resources, node.allocatable
    same = (
        may.cpu_cores == has.cpu_cores
        and may.memory_bytes // _MIB == has.memory_bytes // _MIB
        and may.disk_bytes >> 30 == has.disk_bytes >> 30
    )
    if same or not node.HasField("allocatable"):
        return ""
    return (
        f"{cells.cores(may.cpu_cores)} cores, {readable_bytes(may.memory_bytes)} of memory, "
        f"{readable_bytes(may.disk_bytes)} of disk"
    )


def operation_details(operation: "Operation", *, now_s: float) -> str:
    """An operation, and the cause where it failed."""
    info = _error_reason(operation)
    return labelled(
        [
            ("Id", operation.id),
            ("Verb", operation.verb),
            ("Object", f"{operation.object_kind} {operation.object_name} ({operation.object_id})"),
            ("Project", operation.project),
            ("State", cells.operation_outcome(operation)),
            ("Progress", "" if operation.done else operation.progress_message),
            ("Error", f"{operation.error.message} ({info})" if operation.error.code else ""),
            ("Asked by", operation.principal),
            ("Request id", operation.request_id),
            ("Started", _moment(operation.started_at, now_s)),
            ("Finished", _moment(operation.finished_at, now_s)),
            ("Took", cells.span(operation.started_at, operation.finished_at, now_s)),
            ("Server", operation.server_id),
        ]
    )


def _error_reason(operation: "Operation") -> str:
    if not operation.error.code:
        return ""
    from hypervisor.core.grpc_errors import error_of_status

    return error_of_status(operation.error).reason


def cluster_details(info: "ClusterInfo", *, now_s: float) -> str:
    """The cluster at a glance."""
    has, held = info.resources, info.reservation
    count = ", ".join
    return labelled(
        [
            ("Cluster", info.cluster_id),
            ("Version", info.version),
            ("Store", f"{info.store_backend}{'' if info.store_available else ' (cannot be reached)'}"),
            ("Revision", str(info.revision)),
            ("Server started", _moment(info.started_at, now_s)),
            *(
                (f"Server {s.id}", f"{s.address} {s.version}{' leader' if s.leader else ''}")
                for s in info.servers
            ),
            ("Nodes", count(f"{info.nodes[k]} {k}" for k in sorted(info.nodes) if info.nodes[k]) or "none"),
            (
                "Instances",
                count(f"{info.instances[k]} {k}" for k in sorted(info.instances) if info.instances[k])
                or "none",
            ),
            ("Moves held", info.moves_held),
            ("CPU reserved", cells.used_of(held.cpu_cores, has.cpu_cores)),
            ("Memory reserved", cells.memory_of(held.memory_bytes, has.memory_bytes)),
            ("Disk reserved", cells.memory_of(held.disk_bytes, has.disk_bytes)),
        ]
    )
