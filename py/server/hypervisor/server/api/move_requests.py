"""How instances are to be moved, checked. Pure."""

from hypervisor.core.moves import MoveStrategy
from hypervisor.server.api.violations import Violations
from hypervisor.v1 import instance_pb2
from hypervisor.wire.enums import MOVE_STRATEGY

__all__ = ["MAX_HEALTHY_S", "check_move_policy", "strategy_of"]

MAX_HEALTHY_S = 3600.0


def strategy_of(wrong: Violations, field: str, number: int) -> MoveStrategy:
    """The strategy; AUTO where none is given."""
    found = MOVE_STRATEGY.from_wire(number)
    if found is None and number != 0:
        wrong.add(field, "is not known: use AUTO, LIVE, REPLACE or STOP, or leave it out")
    return found or MoveStrategy.AUTO


def check_move_policy(wrong: Violations, spec: instance_pb2.InstanceSpec, at: str) -> None:
    """Note what is wrong with ``spec.move``."""
    if spec.HasField("move"):
        strategy_of(wrong, f"{at}move.strategy", spec.move.strategy)
        wrong.seconds(f"{at}move.healthy_after", spec.move.healthy_after, at_least=0.0, at_most=MAX_HEALTHY_S)
