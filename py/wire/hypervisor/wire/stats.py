"""Statistics on the wire: samples of instances, and what the instances of a node use together."""

from typing import Any

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.model import InstanceStats, InstancesUsage, Pressure
from hypervisor.v1 import instance_pb2, node_pb2
from hypervisor.wire.times import datetime_of, timestamp_of

__all__ = ["stats_from_wire", "stats_to_wire", "usage_from_wire", "usage_to_wire"]

_PRESSURES = ("cpu_pressure", "memory_pressure", "io_pressure")
_PLAIN = tuple(f for f in InstanceStats.__struct_fields__ if f not in ("sampled_at", *_PRESSURES))
_PRESSURE_FIELDS = Pressure.__struct_fields__
_USAGE_FIELDS = InstancesUsage.__struct_fields__


def stats_to_wire(stats: InstanceStats) -> instance_pb2.InstanceStats:
    """A sample; what is None stays absent."""
    message = instance_pb2.InstanceStats(sampled_at=timestamp_of(stats.sampled_at))
    for name in _PLAIN:
        value = getattr(stats, name)
        if value is not None:
            setattr(message, name, value)
    for name in _PRESSURES:
        pressure: Pressure | None = getattr(stats, name)
        if pressure is not None:
            parts = {part: getattr(pressure, part) for part in _PRESSURE_FIELDS}
            getattr(message, name).CopyFrom(instance_pb2.Pressure(**parts))
    return message


def stats_from_wire(stats: instance_pb2.InstanceStats) -> InstanceStats:
    """A sample. InvalidArgument when it has no time."""
    sampled_at = datetime_of(stats.sampled_at)
    if sampled_at is None:
        raise InvalidArgument.of_field("stats.sampled_at", "is required")
    present: dict[str, Any] = {field.name: value for field, value in stats.ListFields()}
    found: dict[str, Any] = {name: present.get(name) for name in _PLAIN}
    for name in _PRESSURES:
        if name in present:
            found[name] = _pressure_from_wire(present[name])
    return InstanceStats(sampled_at=sampled_at, **found)


def _pressure_from_wire(message: instance_pb2.Pressure) -> Pressure:
    present: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    return Pressure(**{"some_total_ns": 0, **present})


def usage_to_wire(usage: InstancesUsage) -> node_pb2.InstancesUsage:
    """What a node's instances use together."""
    return node_pb2.InstancesUsage(**{name: getattr(usage, name) for name in _USAGE_FIELDS})


def usage_from_wire(usage: node_pb2.InstancesUsage) -> InstancesUsage:
    """What a node's instances use together. What it says is not checked here."""
    return InstancesUsage(**{name: getattr(usage, name) for name in _USAGE_FIELDS})
