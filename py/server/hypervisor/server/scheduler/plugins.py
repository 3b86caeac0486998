"""Filters (may this node run it? if not, why) and scores (how well does it suit, 0..100): small pure objects.

``FILTERS`` and ``SCORES`` are the explicit tables the default scheduler is made of; cheap filters come first.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from hypervisor.core.model import LabelConstraint
from hypervisor.core.resources import GIB, MIB, Resources, cores
from hypervisor.core.states import NodeStatus, PlacementPolicy
from hypervisor.server.scheduler.contract import NodeState, Request

__all__ = ["FILTERS", "SCORES", "Filter", "Score", "shortage"]


class Filter(Protocol):
    """One condition."""

    def reason_against(self, request: Request, state: NodeState) -> str | None:
        """None where the node passes, else one clause that says what is missing and by how much."""
        ...


class Score(Protocol):
    """One preference."""

    def score(self, request: Request, state: NodeState) -> float:
        """0 (worst) to 100 (best); only called for nodes that passed all filters."""
        ...


class PinnedNode:
    """A request for one node by id or host name goes there or nowhere."""

    def reason_against(self, request: Request, state: NodeState) -> str | None:
        if request.node in ("", state.node.id, state.node.hostname):
            return None
        return f"is not the node asked for ({request.node})"


class Ready:
    """The control plane hears from the node."""

    def reason_against(self, request: Request, state: NodeState) -> str | None:
        if state.node.status is NodeStatus.OFFLINE:
            return "is offline"
        return None


class Schedulable:
    """The node takes new instances."""

    def reason_against(self, request: Request, state: NodeState) -> str | None:
        node = state.node
        if node.schedulable and node.status is NodeStatus.READY:
            return None
        return f"is cordoned: {node.cordon_reason}" if node.cordon_reason else "is cordoned"


class DriverPresent:
    """The node has a driver for the type, it works, and can create."""

    def reason_against(self, request: Request, state: NodeState) -> str | None:
        driver = state.node.driver_for(request.type)
        if driver is None:
            return f"has no driver for {request.type.value} instances"
        if not driver.available:
            return f"cannot run {request.type.value} instances: {driver.reason or f'{driver.name} is not available'}"
        lacking = driver.lacks("create")
        return None if lacking is None else f"cannot create instances: {lacking.reason}"


class LabelsMatch:
    """All conditions on labels hold."""

    def reason_against(self, request: Request, state: NodeState) -> str | None:
        for constraint in request.constraints:
            if not _holds(constraint, state.label(constraint.key)):
                found = state.label(constraint.key)
                has = f"has no label {constraint.key}" if found is None else f"has {constraint.key}={found}"
                return f"{has}, wanted: {_wanted(constraint)}"
        return None


class ResourcesFit:
    """Capacity less what is reserved suffices."""

    def reason_against(self, request: Request, state: NodeState) -> str | None:
        wanted, reserved, capacity = request.resources, state.reserved, state.node.capacity
        if (
            wanted.cpu_millis <= capacity.cpu_millis - reserved.cpu_millis
            and wanted.memory_bytes <= capacity.memory_bytes - reserved.memory_bytes
            and wanted.disk_bytes <= capacity.disk_bytes - reserved.disk_bytes
        ):
            return None
        return shortage(wanted, state.free, capacity)


class Utilisation:
    """The policy: spread prefers the node least reserved after the placement, binpack the most reserved one.

    Reserved means the mean of the fractions of processors and memory; disk only ever counts as a limit.
    """

    def score(self, request: Request, state: NodeState) -> float:
        # Every placement scores every node that fits: plain arithmetic, no objects.
        node, wanted, reserved = state.node, request.resources, state.reserved
        total, counted = 0.0, 0
        if node.capacity.cpu_millis:
            total += (reserved.cpu_millis + wanted.cpu_millis) / node.capacity.cpu_millis
            counted += 1
        if node.capacity.memory_bytes:
            total += (reserved.memory_bytes + wanted.memory_bytes) / node.capacity.memory_bytes
            counted += 1
        share = 100.0 * total / counted if counted else 0.0
        return share if request.policy is PlacementPolicy.BINPACK else 100.0 - share


FILTERS: tuple[Filter, ...] = (
    PinnedNode(),
    Ready(),
    Schedulable(),
    DriverPresent(),
    LabelsMatch(),
    ResourcesFit(),
)

SCORES: Mapping[Score, float] = MappingProxyType({Utilisation(): 1.0})
"""Scores and their weights."""


def shortage(wanted: Resources, free: Resources, capacity: Resources) -> str:
    """By how much it does not fit: ``needs 8 cores, 2.5 free of 4``, for each resource that is short."""
    parts = []
    if wanted.cpu_millis > free.cpu_millis:
        parts.append(
            f"needs {_number(cores(wanted.cpu_millis))} cores, {_number(cores(max(0, free.cpu_millis)))} free "
            f"of {_number(cores(capacity.cpu_millis))}"
        )
    for noun, unit, unit_name, need, have, total in (
        ("memory", MIB, "MiB", wanted.memory_bytes, free.memory_bytes, capacity.memory_bytes),
        ("disk", GIB, "GiB", wanted.disk_bytes, free.disk_bytes, capacity.disk_bytes),
    ):
        if need > have:
            parts.append(
                f"needs {_number(need / unit)} {unit_name} of {noun}, {_number(max(0, have) / unit)} free "
                f"of {_number(total / unit)}"
            )
    return "; ".join(parts)


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _holds(constraint: LabelConstraint, found: str | None) -> bool:
    match constraint.operator:
        case "exists":
            return found is not None
        case "not_in":
            return found is None or found not in constraint.values
        case _:
            return found is not None and found in constraint.values


def _wanted(constraint: LabelConstraint) -> str:
    values = ", ".join(constraint.values)
    match constraint.operator:
        case "exists":
            return "any value"
        case "not_in":
            return f"none of {values}"
        case _:
            return f"one of {values}"
