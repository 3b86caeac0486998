"""Records of the sampler as what the platform speaks of. Pure."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from hypervisor.core.model import InstanceStats, InstancesUsage, Pressure
from hypervisor.ext.stats_sampler import Record

__all__ = ["USAGE_FIELDS", "stats_of", "thinned", "usage_of"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

USAGE_FIELDS = (
    "cpu_used_cores",
    "memory_used_bytes",
    "memory_working_set_bytes",
    "block_read_bytes_per_s",
    "block_write_bytes_per_s",
    "network_receive_bytes_per_s",
    "network_transmit_bytes_per_s",
    "pids",
)
"""Fields of a record that are summed up for a node, in the order in which :func:`usage_of` takes the sums."""


def stats_of(record: Record) -> InstanceStats:
    """One sample."""
    return InstanceStats(
        sampled_at=_EPOCH + timedelta(microseconds=record.wall_ns // 1000),
        cpu_usage_ns=record.cpu_usage_ns,
        cpu_used_cores=record.cpu_used_cores,
        cpu_throttled_periods=record.cpu_throttled_periods,
        cpu_throttled_ns=record.cpu_throttled_ns,
        cpu_throttled_share=record.cpu_throttled_share,
        memory_used_bytes=record.memory_used_bytes,
        memory_working_set_bytes=record.memory_working_set_bytes,
        memory_limit_bytes=record.memory_limit_bytes,
        memory_anon_bytes=record.memory_anon_bytes,
        memory_file_bytes=record.memory_file_bytes,
        memory_swap_bytes=record.memory_swap_bytes,
        major_faults=record.major_faults,
        oom_kills=record.oom_kills,
        pids=record.pids,
        block_read_bytes=record.block_read_bytes,
        block_write_bytes=record.block_write_bytes,
        block_read_operations=record.block_read_ops,
        block_write_operations=record.block_write_ops,
        block_read_bytes_per_second=record.block_read_bytes_per_s,
        block_write_bytes_per_second=record.block_write_bytes_per_s,
        block_read_operations_per_second=record.block_read_ops_per_s,
        block_write_operations_per_second=record.block_write_ops_per_s,
        network_receive_bytes=record.network_receive_bytes,
        network_transmit_bytes=record.network_transmit_bytes,
        network_receive_packets=record.network_receive_packets,
        network_transmit_packets=record.network_transmit_packets,
        network_receive_bytes_per_second=record.network_receive_bytes_per_s,
        network_transmit_bytes_per_second=record.network_transmit_bytes_per_s,
        cpu_pressure=_pressure(record.cpu_pressure_some_ns, None, record.cpu_pressure_some, None),
        memory_pressure=_pressure(
            record.memory_pressure_some_ns,
            record.memory_pressure_full_ns,
            record.memory_pressure_some,
            record.memory_pressure_full,
        ),
        io_pressure=_pressure(
            record.io_pressure_some_ns,
            record.io_pressure_full_ns,
            record.io_pressure_some,
            record.io_pressure_full,
        ),
    )


def _pressure(
    some_ns: int | None, full_ns: int | None, some: float | None, full: float | None
) -> Pressure | None:
    if some_ns is None:
        return None
    return Pressure(some_total_ns=some_ns, full_total_ns=full_ns, some_share=some, full_share=full)


def thinned(records: Iterable[Record], *, apart_s: float) -> list[Record]:
    """Of records from the oldest to the newest those that are about ``apart_s`` or more apart, with the newest."""
    apart_ns = round(apart_s * 1e9)
    kept: list[Record] = []
    for record in sorted(records, key=lambda r: r.monotonic_ns, reverse=True):
        # A tenth less: the sampling that was to be a second ago was perhaps 0.99 s ago.
        if not kept or kept[-1].monotonic_ns - record.monotonic_ns >= apart_ns - apart_ns // 10:
            kept.append(record)
    kept.reverse()
    return kept


def usage_of(totals: Sequence[int | float | None], *, running: int, sampled: int) -> InstancesUsage:
    """What the instances of a node use together, from the sums of ``USAGE_FIELDS``; None where nobody knows one."""
    cpu, memory, working_set, read, write, receive, transmit, pids = (total or 0 for total in totals)
    return InstancesUsage(
        running=running,
        sampled=sampled,
        cpu_used_cores=cpu,
        memory_used_bytes=int(memory),
        memory_working_set_bytes=int(working_set),
        block_read_bytes_per_second=read,
        block_write_bytes_per_second=write,
        network_receive_bytes_per_second=receive,
        network_transmit_bytes_per_second=transmit,
        pids=int(pids),
    )
