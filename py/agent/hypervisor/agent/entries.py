"""What the journal keeps of one instance: who runs it, which copy it is, and the action that may be unfinished.

An :class:`Entry` is written before an action (``phase`` says which) and again after it (``READY``). After a crash the
phase is what recovery has to bring to an end; see drivers/recovery.py.
"""

from datetime import datetime
from enum import StrEnum

import msgspec

from hypervisor.agent.drivers.driver import Assignment
from hypervisor.core.model import Observation
from hypervisor.core.restarts import RestartPolicy, Restarts
from hypervisor.core.states import InstanceType

__all__ = ["Entry", "Phase"]


class Phase(StrEnum):
    """The action begun and not known to be finished; READY for none."""

    CREATING = "creating"
    READY = "ready"
    STARTING = "starting"
    STOPPING = "stopping"
    RESTARTING = "restarting"
    DELETING = "deleting"
    UNDOING = "undoing"
    """A create failed and what it left is being removed."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One instance of this node. ``since`` is when the phase began, by the node's clock."""

    instance_id: str
    driver: str
    generation: int
    epoch: int
    phase: Phase
    since: datetime
    handle: dict[str, str] = {}
    """What the driver's ``create`` returned; empty before, and for instances found without a journal."""
    assignment: Assignment | None = None
    """Kept while CREATING only: what is needed to finish the create."""
    name: str = ""
    """Its name, project and type, for metrics; empty for instances found without a journal."""
    project: str = ""
    type: InstanceType | None = None
    start: bool = False
    """While CREATING: whether it is to be started."""
    last: Observation | None = None
    """What was seen of it last, for the time between a restart and its adoption."""
    grace_s: float = 0.0
    """While STOPPING, RESTARTING or DELETING: what the caller allowed."""
    restart: RestartPolicy | None = None
    """What is done when it ends by itself; None for nothing, and for instances found without a journal."""
    runs: bool = False
    """Whether it is wanted to run: what ends is started again only then."""
    by_policy: bool = False
    """While STARTING: whether it is a restart by its policy, which goes on counting."""
    restarts: Restarts = Restarts()
    stops: bool = False
    """Whether it has to be stopped when no server hears from the node."""
    ended_by: str = ""
    """Why its last run ended, where the node knows better than the runtime: FENCED, NODE_RESTARTED."""
