"""Values about moving instances between nodes, and about emptying nodes; see maintenance.proto for what they mean."""

from datetime import datetime
from enum import StrEnum

import msgspec

from hypervisor.core.resources import ZERO, Resources

__all__ = ["MovePhase", "MovePolicy", "MoveRecord", "MoveState", "MoveStrategy"]


class MoveStrategy(StrEnum):
    """How an instance gets to another node."""

    AUTO = "auto"
    LIVE = "live"
    REPLACE = "replace"
    STOP = "stop"


class MovePhase(StrEnum):
    """How far a move is."""

    STARTING = "starting"
    """REPLACE: the copy on the target is made, while the instance goes on where it is."""
    STOPPING = "stopping"
    """STOP: the instance is stopped where it is."""
    MAKING = "making"
    """STOP: it is at rest where it was, and its copy on the target is made."""
    MIGRATING = "migrating"
    """LIVE: its memory is on the way."""
    UNDOING = "undoing"
    """It came to nothing: the copy on the target is removed, and the instance goes on where it was."""
    CLEANING = "cleaning"
    """The instance is on the target; what is left where it was is removed."""


class MoveState(StrEnum):
    """How far one instance of a drain is."""

    PLANNED = "planned"
    """Of a dry run: it would go."""
    WAITING = "waiting"
    MOVING = "moving"
    CLEANING = "cleaning"
    """It is where it is to be; its old copy is being removed."""
    MOVED = "moved"
    STOPPED = "stopped"
    """By force; it is still there."""
    GONE = "gone"
    """Deleted meanwhile."""
    STUCK = "stuck"
    """It cannot go, and trying again changes nothing."""


class MovePolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an instance is to be moved, as its specification says; see MovePolicy in instance.proto."""

    strategy: MoveStrategy = MoveStrategy.AUTO
    healthy_s: float = 0.0
    """REPLACE and STOP: how long the copy has to have run before it takes over."""
    allow_disk_loss: bool = False


class MoveRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A move under way, in the record of its instance.

    Which copy is the instance is told by the instance's own ``node_id`` and ``epoch`` alone: those of the source until
    the switch, those of the target from then on.
    """

    strategy: MoveStrategy
    phase: MovePhase
    source: str
    source_epoch: int
    target: str
    target_epoch: int
    started_at: datetime
    runs: bool = False
    """Whether it ran when the move began, so that the copy is to run too."""
    held: Resources = ZERO
    """What is reserved for it on the node where it is not, target or source."""
    policy: MovePolicy = MovePolicy()
    """What counts for this move: the specification's, with what the call said in its place."""
    reason: str = ""
    """Why it is moved, in a few words."""
    drain: str = ""
    """The node whose drain (or return) moves it; empty where a user does."""
    home: str = ""
    """What the instance's home is to be once it has moved."""
    loses: str = ""
    """What does not come along, for people; empty where nothing is lost."""
    asked_target: bool = False
    """Whether the target may have been asked for a copy, so that something may be there."""

    @property
    def elsewhere(self) -> tuple[str, int]:
        """Node and epoch of the copy that is not the instance: what ``held`` is held for."""
        if self.phase is MovePhase.CLEANING:
            return self.source, self.source_epoch
        return self.target, self.target_epoch
