"""Restart policies, and what they have done, on the wire."""

from hypervisor.core.restarts import RestartCondition, RestartPolicy, Restarts
from hypervisor.v1 import instance_pb2
from hypervisor.wire.enums import RESTART_CONDITION
from hypervisor.wire.times import datetime_of, duration_of, seconds_of, timestamp_of

__all__ = ["restart_policy_from_wire", "restart_policy_to_wire", "restarts_from_wire", "restarts_to_wire"]

_DEFAULT = RestartPolicy()


def restart_policy_to_wire(policy: RestartPolicy | None) -> instance_pb2.RestartPolicy | None:
    """A policy, defaults filled in; None stays None."""
    if policy is None:
        return None
    message = instance_pb2.RestartPolicy(
        condition=RESTART_CONDITION.to_wire(policy.condition),
        initial_delay=duration_of(policy.initial_delay_s),
        max_delay=duration_of(policy.max_delay_s),
        reset_after=duration_of(policy.reset_after_s),
    )
    if policy.max_restarts is not None:
        message.max_restarts = policy.max_restarts
    return message


def restart_policy_from_wire(spec: instance_pb2.InstanceSpec) -> RestartPolicy | None:
    """That of a specification; None where it never starts anything. Limits are not checked here."""
    message = spec.restart
    condition = RESTART_CONDITION.from_wire(message.condition) or RestartCondition.NEVER
    if condition is RestartCondition.NEVER:
        return None
    initial_s = seconds_of(message.initial_delay) or _DEFAULT.initial_delay_s
    return RestartPolicy(
        condition=condition,
        max_restarts=message.max_restarts if message.HasField("max_restarts") else None,
        initial_delay_s=initial_s,
        max_delay_s=seconds_of(message.max_delay) or max(_DEFAULT.max_delay_s, initial_s),
        reset_after_s=seconds_of(message.reset_after) or _DEFAULT.reset_after_s,
    )


def restarts_to_wire(restarts: Restarts | None) -> instance_pb2.Restarts | None:
    """What a policy has done; None stays None."""
    if restarts is None:
        return None
    message = instance_pb2.Restarts(
        count=restarts.count,
        total=restarts.total,
        next_at=timestamp_of(restarts.next_at),
        exhausted=restarts.exhausted,
        last_at=timestamp_of(restarts.last_at),
        last_reason=restarts.last_reason,
    )
    if restarts.last_exit_code is not None:
        message.last_exit_code = restarts.last_exit_code
    return message


def restarts_from_wire(message: instance_pb2.Restarts) -> Restarts:
    """What a policy has done."""
    return Restarts(
        count=message.count,
        total=message.total,
        next_at=datetime_of(message.next_at),
        exhausted=message.exhausted,
        last_at=datetime_of(message.last_at),
        last_reason=message.last_reason,
        last_exit_code=message.last_exit_code if message.HasField("last_exit_code") else None,
    )
