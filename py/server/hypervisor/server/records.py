"""Small records of the store that only the server knows; the large ones are in :mod:`hypervisor.core.model`."""

from datetime import datetime

import msgspec

from hypervisor.core.model import SCHEMA_VERSION, AffinityTerm

__all__ = [
    "ClusterConfig",
    "HeldTerm",
    "HostnameClaim",
    "ImageClaim",
    "NameClaim",
    "NodeLease",
    "PlacementTerms",
    "Restoring",
    "ServerRecord",
]


class NameClaim(msgspec.Struct, frozen=True, kw_only=True):
    """Which instance has a name in a project; its key makes the name unique."""

    instance_id: str
    v: int = SCHEMA_VERSION


class HostnameClaim(msgspec.Struct, frozen=True, kw_only=True):
    """Which node has a host name; its key makes the host name unique."""

    node_id: str
    v: int = SCHEMA_VERSION


class ImageClaim(msgspec.Struct, frozen=True, kw_only=True):
    """Which image has a name in a project; its key makes the name unique."""

    image_id: str
    v: int = SCHEMA_VERSION


class NodeLease(msgspec.Struct, frozen=True, kw_only=True):
    """Bound to the lease of a node's agent: while it exists, the agent is alive."""

    incarnation: str
    v: int = SCHEMA_VERSION


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Bound to the lease of a server of the control plane: while it exists, that server is alive.

    ``http_url``: where others reach its gateway. ``image_store``: id of the store of images that it has; it stays the
    same over restarts, as the server's own id does not.
    """

    id: str
    address: str
    version: str
    started_at: datetime
    http_url: str = ""
    image_store: str = ""
    v: int = SCHEMA_VERSION


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Written once, by the first server, and by a restore. ``restored_at``: when the cluster was last restored."""

    cluster_id: str
    created_at: datetime
    restored_at: datetime | None = None
    v: int = SCHEMA_VERSION


class Restoring(msgspec.Struct, frozen=True, kw_only=True):
    """There while the records of a backup are put in: nothing else is committed then. ``sha256``: of the backup."""

    sha256: str
    started_at: datetime
    v: int = SCHEMA_VERSION


class HeldTerm(msgspec.Struct, frozen=True, kw_only=True):
    """A required term of instances of a project."""

    project: str
    term: AffinityTerm


class PlacementTerms(msgspec.Struct, frozen=True, kw_only=True):
    """Required terms that two placements on different nodes can break together; see ``placement_terms.py``.

    ``placements`` rises with every placement that one of them is about.
    """

    terms: tuple[HeldTerm, ...] = ()
    placements: int = 0
    v: int = SCHEMA_VERSION
