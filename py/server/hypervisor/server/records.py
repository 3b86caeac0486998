"""Small records of the store that only the server knows; the large ones are in :mod:`hypervisor.core.model`."""

from datetime import datetime

import msgspec

from hypervisor.core.model import SCHEMA_VERSION

__all__ = ["ClusterConfig", "HostnameClaim", "NameClaim", "NodeLease", "ServerRecord"]


class NameClaim(msgspec.Struct, frozen=True, kw_only=True):
    """Which instance has a name in a project; its key makes the name unique."""

    instance_id: str
    v: int = SCHEMA_VERSION


class HostnameClaim(msgspec.Struct, frozen=True, kw_only=True):
    """Which node has a host name; its key makes the host name unique."""

    node_id: str
    v: int = SCHEMA_VERSION


class NodeLease(msgspec.Struct, frozen=True, kw_only=True):
    """Bound to the lease of a node's agent: while it exists, the agent is alive."""

    incarnation: str
    v: int = SCHEMA_VERSION


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Bound to the lease of a server of the control plane: while it exists, that server is alive."""

    id: str
    address: str
    version: str
    started_at: datetime
    v: int = SCHEMA_VERSION


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Written once, by the first server."""

    cluster_id: str
    created_at: datetime
    v: int = SCHEMA_VERSION
