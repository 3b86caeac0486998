"""Disruption budgets: how many more instances may be taken away. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from hypervisor.core.model import Instance
from hypervisor.core.moves import MovePhase, MoveStrategy
from hypervisor.core.states import DesiredState, InstanceStatus
from hypervisor.server.draining.records import Budget
from hypervisor.server.scheduler.contract import matches

__all__ = ["Allowances", "Standing", "available", "disrupts", "standing"]

_GOES_ON = frozenset({MovePhase.STARTING, MovePhase.MIGRATING})
"""Phases of a move in which the instance runs where it was."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a budget stands: of the instances it is about how many there are, how many run, how many more may go."""

    members: int
    available: int
    allowed: int


def available(instance: Instance) -> bool:
    """Whether it serves: it runs, or it goes on running where it was while a move makes its copy."""
    if instance.status is InstanceStatus.RUNNING:
        return True
    move = instance.move
    moving = instance.status is InstanceStatus.MIGRATING and move is not None
    return moving and move is not None and move.runs and move.phase in _GOES_ON


def disrupts(instance: Instance, strategy: MoveStrategy) -> bool:
    """Whether a move by this strategy takes it away for a while."""
    return strategy is MoveStrategy.STOP and available(instance)


def covers(budget: Budget, instance: Instance) -> bool:
    """Whether the budget is about the instance. One that shall not run is nobody's to count on."""
    return (
        instance.project == budget.project
        and instance.desired is DesiredState.RUNNING
        and matches(budget.selector, instance.labels)
    )


def standing(budget: Budget, instances: Iterable[Instance]) -> Standing:
    """How the budget stands, given all instances."""
    members = [instance for instance in instances if covers(budget, instance)]
    up = sum(map(available, members))
    if budget.min_available is not None:
        allowed = up - budget.min_available
    else:
        allowed = (budget.max_unavailable or 0) - (len(members) - up)
    return Standing(len(members), up, max(0, allowed))


class Allowances:
    """What may be taken away now, less what was taken by :meth:`take`."""

    def __init__(self, budgets: Iterable[Budget], instances: Iterable[Instance]) -> None:
        everything = tuple(instances)
        self._left = [(budget, standing(budget, everything)) for budget in budgets]
        self._taken: dict[int, int] = {}

    def refuses(self, instance: Instance) -> str:
        """Why the instance may not be taken away now, in half a sentence; empty where it may."""
        for index, (budget, stands) in enumerate(self._left):
            taken = self._taken.get(index, 0)
            if not covers(budget, instance) or stands.allowed > taken:
                continue
            limit = (
                f"at most {budget.max_unavailable} may be away"
                if budget.min_available is None
                else f"at least {budget.min_available} have to"
            )
            up = stands.available - taken
            return f"budget {budget.name} lets no more go: {up} of {stands.members} run, {limit}"
        return ""

    def take(self, instance: Instance) -> None:
        """The instance is about to be taken away."""
        for index, (budget, _) in enumerate(self._left):
            if covers(budget, instance):
                self._taken[index] = self._taken.get(index, 0) + 1
