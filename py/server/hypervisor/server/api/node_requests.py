"""Requests of ClusterService, checked and turned into domain values. Pure; every wrong field is reported at once."""

import math
from collections.abc import Iterable, Mapping

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.ids import is_id
from hypervisor.core.model import DriverInfo, InstanceStats, InstancesUsage, NodeResources, Observation
from hypervisor.core.names import check_hostname, check_labels
from hypervisor.core.states import NodeRole
from hypervisor.server.api.placement_requests import taints_of
from hypervisor.server.api.violations import Violations
from hypervisor.server.services import NodeRegistration
from hypervisor.v1 import cluster_pb2, instance_pb2, node_pb2
from hypervisor.wire.availability import fencing_from_wire
from hypervisor.wire.enums import NODE_ROLE
from hypervisor.wire.instances import observation_from_wire
from hypervisor.wire.nodes import driver_from_wire, resources_from_wire
from hypervisor.wire.stats import stats_from_wire, usage_from_wire

__all__ = [
    "checked_resources",
    "checked_usage",
    "drivers_of",
    "observations_of",
    "registration_of",
    "samples_of",
]

DEFAULT_PLACE = "default"
_RESERVED_LABELS = "hypervisor/"
MAX_SAMPLES = 2000
"""Of a heartbeat."""
_OUTPUT_ONLY = (
    "status",
    "created_at",
    "updated_at",
    "reservation",
    "schedulable",
    "status_message",
    "last_heartbeat_at",
    "usage",
    "resource_version",
    "allocatable",
    "placement_health",
    "drain",
)


def registration_of(request: cluster_pb2.RegisterNodeRequest) -> NodeRegistration:
    """What an agent says of its node. InvalidArgument with every wrong field."""
    wrong = Violations()
    node = request.node
    if not is_id(node.id, "n"):
        wrong.add(
            "node.id", "is not the id of a node: 'n-' and 26 characters, made by the agent at its first start"
        )
    wrong.extend(check_hostname("node.hostname", node.hostname))
    wrong.object_name("node.address", node.address, "address that servers reach the agent at")
    wrong.whole("node.port", node.port, low=1, high=65535)
    region = wrong.label_value("node.region", node.region or DEFAULT_PLACE)
    zone = wrong.label_value("node.zone", node.zone or DEFAULT_PLACE)
    if node.role != 0 and NODE_ROLE.from_wire(node.role) is None:
        wrong.add("node.role", "is not known: use MASTER or WORKER")
    wrong.extend(*check_labels("node.labels", node.labels))
    if any(key.startswith(_RESERVED_LABELS) for key in node.labels):
        wrong.add("node.labels", f"keys that begin with {_RESERVED_LABELS} are set by the server: use others")
    taints = taints_of(wrong, "node.taints", node.taints)
    wrong.output_only(node, _OUTPUT_ONLY, "node.")
    _check_incarnation(wrong, request.incarnation)
    wrong.text("node.agent_version", node.agent_version, max_bytes=128)
    resources = checked_resources(wrong, "node.resources", node.resources)
    if resources.cpu_millis == 0 or resources.memory_bytes == 0:
        wrong.add("node.resources", "must have cpu_cores and memory_bytes above 0")
    drivers = drivers_of(wrong, "node.drivers", node.drivers)
    observations = observations_of(wrong, request.instances)
    wrong.check()
    return NodeRegistration(
        id=node.id,
        hostname=node.hostname,
        address=node.address,
        port=node.port,
        region=region,
        zone=zone,
        role=NODE_ROLE.from_wire(node.role) or NodeRole.WORKER,
        resources=resources,
        labels=dict(node.labels),
        drivers=drivers,
        agent_version=node.agent_version,
        incarnation=request.incarnation,
        simulated=node.simulated,
        observations=observations,
        taints=taints,
        fencing=fencing_from_wire(node.fencing),
    )


def _check_incarnation(wrong: Violations, incarnation: str) -> None:
    if not 0 < len(incarnation) <= 128:
        wrong.add("incarnation", "must be 1 to 128 characters that are fresh for each start of the agent")


def checked_resources(wrong: Violations, field: str, resources: node_pb2.NodeResources) -> NodeResources:
    """Measured amounts: none negative, none absurd. Zero for those that are wrong."""
    for name in ("cpu_cores", "cpu_used_cores"):
        value: float = getattr(resources, name)
        if not (math.isfinite(value) and 0 <= value <= 1_000_000):
            wrong.add(f"{field}.{name}", f"is {value:g}: use 0 to 1000000")
            return NodeResources()
    for name in ("memory_bytes", "memory_used", "disk_bytes", "disk_used"):
        wrong.whole(f"{field}.{name}", getattr(resources, name), low=0, high=1 << 60)
    return resources_from_wire(resources)


def checked_usage(wrong: Violations, field: str, usage: node_pb2.InstancesUsage) -> InstancesUsage:
    """What a node's instances use: nothing negative, nothing absurd. Zero for what is wrong."""
    for descriptor, value in usage.ListFields():
        if not (math.isfinite(value) and 0 <= value <= 1 << 62):
            wrong.add(f"{field}.{descriptor.name}", f"is {value:g}: use 0 or more")
            return InstancesUsage()
    return usage_from_wire(usage)


def drivers_of(
    wrong: Violations, field: str, drivers: Iterable[node_pb2.DriverInfo]
) -> tuple[DriverInfo, ...]:
    """A node's drivers; each has a name of its own."""
    found = tuple(driver_from_wire(driver) for driver in drivers)
    names = [driver.name for driver in found]
    if not all(0 < len(name) <= 63 for name in names) or len(set(names)) < len(names):
        wrong.add(field, "each needs a name of its own, of 1 to 63 characters")
    return found


def observations_of(
    wrong: Violations, seen: Iterable[cluster_pb2.InstanceObservation]
) -> tuple[Observation, ...]:
    """What an agent saw of its instances."""
    found = []
    for index, message in enumerate(seen):
        try:
            found.append(observation_from_wire(message))
        except InvalidArgument as exc:
            wrong.extend(*exc.violations)
        except OverflowError:
            wrong.add(f"instances[{index}]", "has a time beyond the year 9999: check the node's clock")
    return tuple(found)


def samples_of(
    wrong: Violations, samples: Mapping[str, instance_pb2.InstanceStats]
) -> dict[str, InstanceStats]:
    """Newest samples by instance id, at most ``MAX_SAMPLES``."""
    if len(samples) > MAX_SAMPLES:
        wrong.add("stats", f"has {len(samples)} samples: send at most {MAX_SAMPLES}")
        return {}
    found = {}
    for instance_id, message in samples.items():
        try:
            found[instance_id] = stats_from_wire(message)
        except InvalidArgument as exc:
            wrong.extend(*exc.violations)
        except OverflowError:
            wrong.add("stats", "has a time beyond the year 9999: check the node's clock")
    return found
