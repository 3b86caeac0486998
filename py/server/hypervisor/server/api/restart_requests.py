"""Restart policies of requests, checked. Pure; every wrong field is reported."""

from hypervisor.core.restarts import RestartPolicy
from hypervisor.server.api.violations import Violations
from hypervisor.v1 import instance_pb2
from hypervisor.wire.enums import RESTART_CONDITION

__all__ = ["check_restart"]

_MAX_RESTARTS = 1_000_000
_INITIAL_S = (0.1, 3600.0)
_LONGEST_S = 86_400.0
_RESET_S = (1.0, 7 * 86_400.0)


def check_restart(wrong: Violations, spec: instance_pb2.InstanceSpec, at: str) -> None:
    """Note every wrong field of ``restart``. ``at``: the path of ``spec``, with its dot."""
    if not spec.HasField("restart"):
        return
    policy = spec.restart
    at = f"{at}restart."
    if policy.condition != 0 and RESTART_CONDITION.from_wire(policy.condition) is None:
        wrong.add(f"{at}condition", "is not known: use NEVER, ON_FAILURE or ALWAYS, or leave it out")
    elif policy.condition in (0, instance_pb2.RESTART_CONDITION_NEVER):
        for name in sorted({field.name for field, _ in policy.ListFields()} - {"condition"}):
            wrong.add(f"{at}{name}", f"needs {at}condition ON_FAILURE or ALWAYS: give one, or remove {name}")
        return
    if policy.HasField("max_restarts"):
        wrong.whole(f"{at}max_restarts", policy.max_restarts, low=1, high=_MAX_RESTARTS)
    initial_s = RestartPolicy().initial_delay_s
    if policy.HasField("initial_delay"):
        low, high = _INITIAL_S
        initial_s = wrong.seconds(f"{at}initial_delay", policy.initial_delay, at_least=low, at_most=high)
    if policy.HasField("max_delay"):
        wrong.seconds(f"{at}max_delay", policy.max_delay, at_least=initial_s, at_most=_LONGEST_S)
    if policy.HasField("reset_after"):
        low, high = _RESET_S
        wrong.seconds(f"{at}reset_after", policy.reset_after, at_least=low, at_most=high)
