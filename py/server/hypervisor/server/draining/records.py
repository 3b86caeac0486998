"""What is stored of drains and of disruption budgets."""

from datetime import datetime
from enum import StrEnum

import msgspec

from hypervisor.core.model import SCHEMA_VERSION, LabelConstraint
from hypervisor.core.moves import MoveStrategy
from hypervisor.core.states import InstanceType, OperationState

__all__ = ["Budget", "DrainKind", "DrainOrder", "DrainRecord", "Trouble"]


class DrainKind(StrEnum):
    """Which way instances go."""

    DRAIN = "drain"
    """Off the node."""
    RESTORE = "restore"
    """Those that a drain took from the node, back to it."""


class DrainOrder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a node is to be drained; see DrainNodeRequest in cluster.proto. Spans in seconds."""

    timeout_s: float = 600.0
    parallel: int = 2
    force_after_s: float | None = None
    """After so long what is still there is stopped by force; None: never."""
    strategies: dict[InstanceType, MoveStrategy] = {}
    allow_disk_loss: bool = False
    healthy_s: float | None = None
    grace_s: float | None = None


class Trouble(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An instance whose move failed or was refused."""

    attempts: int
    message: str
    not_before: datetime
    """When it is tried again."""
    final: bool = False
    """Nothing will change by trying again."""


class DrainRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A drain of a node, or the return to it. One a node; another one takes its place once it has ended.

    What is left to do is not in it: that is read off the instances.
    """

    node_id: str
    kind: DrainKind
    operation_id: str
    principal: str
    order: DrainOrder
    started_at: datetime
    give_up_at: datetime
    force_at: datetime | None = None
    state: OperationState = OperationState.RUNNING
    message: str = ""
    total: int = 0
    """Instances that were to be moved when it began."""
    stopped: int = 0
    """How many of them were stopped by force."""
    moving: dict[str, str] = {}
    """Operations under way, by the instances they move (or stop)."""
    troubles: dict[str, Trouble] = {}
    finished_at: datetime | None = None
    v: int = SCHEMA_VERSION

    @property
    def active(self) -> bool:
        """Whether it goes on."""
        return self.state is OperationState.RUNNING


class Budget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How many of the instances with certain labels drains leave alone; exactly one of the numbers is given."""

    project: str
    name: str
    selector: tuple[LabelConstraint, ...]
    created_at: datetime
    max_unavailable: int | None = None
    min_available: int | None = None
    v: int = SCHEMA_VERSION
