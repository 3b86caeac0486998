"""The keys of the store, each with the type of the record under it. No other module spells a key.

::

    /hypervisor/nodes/{id}               Node
    /hypervisor/instances/{id}           Instance
    /hypervisor/operations/{id}          OperationRecord
    /hypervisor/allocations/{node id}    Allocation     written with the node, changed by placements only
    /hypervisor/names/{project}/{name}   NameClaim      makes names of instances unique
    /hypervisor/hostnames/{hostname}     HostnameClaim  makes host names unique
    /hypervisor/images/{id}              Image
    /hypervisor/image-names/{project}/{name}  ImageClaim  makes names of images unique
    /hypervisor/drains/{node id}         DrainRecord    written with the node's cordon, and by the leader
    /hypervisor/budgets/{project}/{name} Budget
    /hypervisor/leases/nodes/{id}        NodeLease      bound to a lease: the agent is alive
    /hypervisor/leases/servers/{id}      ServerRecord   bound to a lease: the server is alive
    /hypervisor/config/cluster           ClusterConfig
    /hypervisor/config/restoring         Restoring      there while a backup is being restored
    /hypervisor/config/placement-terms   PlacementTerms written by placements that such a term is about
    /hypervisor/elections/{name}/{...}   (the store's own: the candidates of an election)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import msgspec

from hypervisor.core.images import Image
from hypervisor.core.model import Allocation, Instance, Node, OperationRecord
from hypervisor.server.draining.records import Budget, DrainRecord
from hypervisor.server.records import (
    ClusterConfig,
    HostnameClaim,
    ImageClaim,
    NameClaim,
    NodeLease,
    PlacementTerms,
    Restoring,
    ServerRecord,
)

__all__ = [
    "CLUSTER_CONFIG",
    "LEADER_ELECTION",
    "LEADER_PREFIX",
    "PLACEMENT_TERMS",
    "PREFIX",
    "RESTORING",
    "SESSIONS",
    "RecordKey",
    "allocation",
    "budget",
    "drain",
    "hostname",
    "image",
    "image_name",
    "instance",
    "name",
    "node",
    "node_lease",
    "operation",
    "parse",
    "server_lease",
]

T = TypeVar("T", bound=msgspec.Struct)

PREFIX = "/hypervisor/"
LEADER_ELECTION = "reconciler"
"""Name of the election whose winner does the cluster's singleton work."""
LEADER_PREFIX = f"{PREFIX}elections/{LEADER_ELECTION}/"
SESSIONS = (f"{PREFIX}leases/servers/", LEADER_PREFIX)
"""Prefixes of what a server's process holds only while it lives."""


@dataclass(frozen=True, slots=True)
class RecordKey(Generic[T]):
    """A key and the type of its record."""

    path: str
    kind: type[T]


def node(node_id: str) -> RecordKey[Node]:
    """The node's record."""
    return RecordKey(f"{PREFIX}nodes/{node_id}", Node)


def instance(instance_id: str) -> RecordKey[Instance]:
    """The instance's record."""
    return RecordKey(f"{PREFIX}instances/{instance_id}", Instance)


def operation(operation_id: str) -> RecordKey[OperationRecord]:
    """The operation's record."""
    return RecordKey(f"{PREFIX}operations/{operation_id}", OperationRecord)


def allocation(node_id: str) -> RecordKey[Allocation]:
    """What is reserved on the node."""
    return RecordKey(f"{PREFIX}allocations/{node_id}", Allocation)


def name(project: str, instance_name: str) -> RecordKey[NameClaim]:
    """Who has the name in the project."""
    return RecordKey(f"{PREFIX}names/{project}/{instance_name}", NameClaim)


def hostname(host: str) -> RecordKey[HostnameClaim]:
    """Which node has the host name."""
    return RecordKey(f"{PREFIX}hostnames/{host}", HostnameClaim)


def image(image_id: str) -> RecordKey[Image]:
    """The image's record."""
    return RecordKey(f"{PREFIX}images/{image_id}", Image)


def image_name(project: str, name_of_image: str) -> RecordKey[ImageClaim]:
    """Which image has the name in the project."""
    return RecordKey(f"{PREFIX}image-names/{project}/{name_of_image}", ImageClaim)


def drain(node_id: str) -> RecordKey[DrainRecord]:
    """The last drain of the node, or return to it."""
    return RecordKey(f"{PREFIX}drains/{node_id}", DrainRecord)


def budget(project: str, budget_name: str) -> RecordKey[Budget]:
    """A disruption budget."""
    return RecordKey(f"{PREFIX}budgets/{project}/{budget_name}", Budget)


def node_lease(node_id: str) -> RecordKey[NodeLease]:
    """Exists while the node's agent is alive."""
    return RecordKey(f"{PREFIX}leases/nodes/{node_id}", NodeLease)


def server_lease(server_id: str) -> RecordKey[ServerRecord]:
    """Exists while the server is alive."""
    return RecordKey(f"{PREFIX}leases/servers/{server_id}", ServerRecord)


CLUSTER_CONFIG: RecordKey[ClusterConfig] = RecordKey(f"{PREFIX}config/cluster", ClusterConfig)
PLACEMENT_TERMS: RecordKey[PlacementTerms] = RecordKey(f"{PREFIX}config/placement-terms", PlacementTerms)
RESTORING: RecordKey[Restoring] = RecordKey(f"{PREFIX}config/restoring", Restoring)

_FAMILIES: Mapping[str, type[msgspec.Struct]] = MappingProxyType(
    {
        "nodes/": Node,
        "instances/": Instance,
        "operations/": OperationRecord,
        "allocations/": Allocation,
        "names/": NameClaim,
        "hostnames/": HostnameClaim,
        "images/": Image,
        "image-names/": ImageClaim,
        "drains/": DrainRecord,
        "budgets/": Budget,
        "leases/nodes/": NodeLease,
        "leases/servers/": ServerRecord,
        "config/cluster": ClusterConfig,
        "config/placement-terms": PlacementTerms,
        "config/restoring": Restoring,
    }
)


def parse(path: str) -> RecordKey[Any] | None:
    """The key with its record's type; None for keys that are not records of ours (elections, later versions')."""
    for family, kind in _FAMILIES.items():
        if path.startswith(family, len(PREFIX)):
            return RecordKey(path, kind)
    return None
