"""The record of one sample: its fields, their units, where each comes from. Shared by native sampler and twin."""

from typing import Final, NamedTuple

__all__ = ["COUNTERS", "FIELDS", "FIELD_INDEX", "RATES", "UNLIMITED", "RateOf", "Record"]

UNLIMITED: Final = (1 << 63) - 1
"""What the word ``max`` counts as, and the largest value of a field: larger numbers count as this."""


class Record(NamedTuple):
    """One sample of one instance. Fields that are not known are None; bit ``i`` of ``known`` says so of ``FIELDS[i]``.

    Counters rise from the start of the instance; rates are of the time since the sample before. A rate is None with the
    first sample, and with the first after a counter went backwards (the instance began again). Directions of network
    and block transfers are the instance's: what it received, what it read.
    """

    sequence: int
    """Number of the record in its slot, from 1, without gaps; what was overwritten in the ring counts too."""
    monotonic_ns: int
    """The caller's monotonic clock at the sample."""
    wall_ns: int
    """The caller's wall clock at the sample, since 1970."""
    known: int
    """Bit mask over ``FIELDS``."""
    cpu_usage_ns: int | None
    """Processor time used. v2 cpu.stat usage_usec, v1 cpuacct.usage."""
    cpu_periods: int | None
    """Periods of the processor limit that passed. cpu.stat nr_periods."""
    cpu_throttled_periods: int | None
    """Of those, the ones in which the instance was held back. cpu.stat nr_throttled."""
    cpu_throttled_ns: int | None
    """How long it was held back, over all its threads. v2 cpu.stat throttled_usec, v1 throttled_time."""
    memory_used_bytes: int | None
    """All that is charged to the instance, page cache included. v2 memory.current, v1 memory.usage_in_bytes."""
    memory_working_set_bytes: int | None
    """``memory_used_bytes`` less the cache that can be dropped (memory.stat inactive_file, up to a slow period old)."""
    memory_limit_bytes: int | None
    """The limit; None also where there is none. v2 memory.max, v1 memory.limit_in_bytes. Slow."""
    memory_anon_bytes: int | None
    """Memory that no file backs. v2 memory.stat anon, v1 total_rss. Slow."""
    memory_file_bytes: int | None
    """Page cache. v2 memory.stat file, v1 total_cache. Slow."""
    memory_swap_bytes: int | None
    """Memory that was put out to swap. v2 memory.swap.current, v1 memory.stat total_swap. Slow."""
    major_faults: int | None
    """Faults that had to be read from a device. v2 memory.stat pgmajfault, v1 total_pgmajfault. Slow."""
    oom_kills: int | None
    """Processes killed for lack of memory. v2 memory.events oom_kill, v1 memory.oom_control oom_kill. Slow."""
    pids: int | None
    """Processes and threads. pids.current."""
    block_read_bytes: int | None
    """Over all devices; 0 before the first access. v2 io.stat rbytes, v1 blkio.throttle.io_service_bytes Read."""
    block_write_bytes: int | None
    """As above. v2 io.stat wbytes, v1 Write."""
    block_read_ops: int | None
    """Over all devices. v2 io.stat rios; v1: not read."""
    block_write_ops: int | None
    """Over all devices. v2 io.stat wios; v1: not read."""
    network_receive_bytes: int | None
    """Over all interfaces of the network namespace but lo; of a tap, what the host sent into it."""
    network_transmit_bytes: int | None
    """As above, the other direction."""
    network_receive_packets: int | None
    """As network_receive_bytes."""
    network_transmit_packets: int | None
    """As network_transmit_bytes."""
    cpu_pressure_some_ns: int | None
    """Time in which some thread waited for a processor. cpu.pressure some total. Slow, like all pressure."""
    memory_pressure_some_ns: int | None
    """Time in which some thread waited for memory. memory.pressure some total."""
    memory_pressure_full_ns: int | None
    """Time in which all threads that were not idle did."""
    io_pressure_some_ns: int | None
    """Time in which some thread waited for a block device. io.pressure some total."""
    io_pressure_full_ns: int | None
    """Time in which all threads that were not idle did."""
    cpu_used_cores: float | None
    """Processors kept busy: 1.0 is one of them, all the time."""
    cpu_throttled_share: float | None
    """Of the periods that passed, the share in which the instance was held back: 0.0 to 1.0; 0.0 where none passed."""
    block_read_bytes_per_s: float | None
    block_write_bytes_per_s: float | None
    block_read_ops_per_s: float | None
    block_write_ops_per_s: float | None
    network_receive_bytes_per_s: float | None
    network_transmit_bytes_per_s: float | None
    cpu_pressure_some: float | None
    """Share of the time, 0.0 to 1.0, between two readings of the file (a slow period); so are those below."""
    memory_pressure_some: float | None
    memory_pressure_full: float | None
    io_pressure_some: float | None
    io_pressure_full: float | None


_HEADER: Final = 4

FIELDS: Final[tuple[str, ...]] = Record._fields[_HEADER:]
"""Names of the fields that ``known`` speaks of, in the order of its bits."""

FIELD_INDEX: Final = {name: index for index, name in enumerate(FIELDS)}


class RateOf(NamedTuple):
    """How a rate follows from a counter: what the counter rose by, times ``scale``, over what ``over`` rose by."""

    field: str
    counter: str
    over: str | None
    """A counter, or None for the time in nanoseconds."""
    scale: float


_PER_SECOND = 1e9

RATES: Final = (
    RateOf("cpu_used_cores", "cpu_usage_ns", None, 1.0),
    RateOf("cpu_throttled_share", "cpu_throttled_periods", "cpu_periods", 1.0),
    RateOf("block_read_bytes_per_s", "block_read_bytes", None, _PER_SECOND),
    RateOf("block_write_bytes_per_s", "block_write_bytes", None, _PER_SECOND),
    RateOf("block_read_ops_per_s", "block_read_ops", None, _PER_SECOND),
    RateOf("block_write_ops_per_s", "block_write_ops", None, _PER_SECOND),
    RateOf("network_receive_bytes_per_s", "network_receive_bytes", None, _PER_SECOND),
    RateOf("network_transmit_bytes_per_s", "network_transmit_bytes", None, _PER_SECOND),
    RateOf("cpu_pressure_some", "cpu_pressure_some_ns", None, 1.0),
    RateOf("memory_pressure_some", "memory_pressure_some_ns", None, 1.0),
    RateOf("memory_pressure_full", "memory_pressure_full_ns", None, 1.0),
    RateOf("io_pressure_some", "io_pressure_some_ns", None, 1.0),
    RateOf("io_pressure_full", "io_pressure_full_ns", None, 1.0),
)

COUNTERS: Final = FIELDS[: FIELD_INDEX[RATES[0].field]]
"""The fields that are read or handed in (whole numbers); those after them are rates."""
