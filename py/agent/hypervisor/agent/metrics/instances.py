"""The series of each instance: its newest record, as counters and gauges. Rates are Prometheus' own business."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hypervisor.agent.metrics.text import Family, labels_text, rendered
from hypervisor.ext.stats_sampler import Record

__all__ = ["INSTANCE_FAMILIES", "instance_series"]

_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class _Series:
    """One field of a record: ``scale`` brings it to the metric's unit, ``resource`` is a label of its own."""

    field: str
    scale: float | None = None
    resource: str = ""


def _family(
    name: str, kind: Literal["counter", "gauge"], text: str, *series: _Series
) -> tuple[Family, tuple[_Series, ...]]:
    return Family(f"hypervisor_instance_{name}", kind, text), series


_TABLE: Sequence[tuple[Family, tuple[_Series, ...]]] = (
    _family(
        "cpu_seconds_total",
        "counter",
        "Processor time used since the start.",
        _Series("cpu_usage_ns", _SECONDS),
    ),
    _family(
        "cpu_throttled_seconds_total",
        "counter",
        "Time for which the processor limit held it back, over all threads.",
        _Series("cpu_throttled_ns", _SECONDS),
    ),
    _family(
        "cpu_throttled_periods_total",
        "counter",
        "Periods of the processor limit in which it was held back.",
        _Series("cpu_throttled_periods"),
    ),
    _family(
        "cpu_periods_total",
        "counter",
        "Periods of the processor limit that passed.",
        _Series("cpu_periods"),
    ),
    _family(
        "memory_used_bytes", "gauge", "Memory charged, page cache included.", _Series("memory_used_bytes")
    ),
    _family(
        "memory_working_set_bytes",
        "gauge",
        "Memory without page cache that can be dropped.",
        _Series("memory_working_set_bytes"),
    ),
    _family("memory_limit_bytes", "gauge", "Memory limit.", _Series("memory_limit_bytes")),
    _family("memory_anon_bytes", "gauge", "Memory that no file backs.", _Series("memory_anon_bytes")),
    _family("memory_file_bytes", "gauge", "Page cache.", _Series("memory_file_bytes")),
    _family("memory_swap_bytes", "gauge", "Memory put out to swap.", _Series("memory_swap_bytes")),
    _family(
        "major_faults_total", "counter", "Page faults that were read from a device.", _Series("major_faults")
    ),
    _family("oom_kills_total", "counter", "Processes killed for lack of memory.", _Series("oom_kills")),
    _family("pids", "gauge", "Processes and threads.", _Series("pids")),
    _family(
        "block_read_bytes_total", "counter", "Bytes read from block devices.", _Series("block_read_bytes")
    ),
    _family(
        "block_write_bytes_total", "counter", "Bytes written to block devices.", _Series("block_write_bytes")
    ),
    _family("block_read_operations_total", "counter", "Reads from block devices.", _Series("block_read_ops")),
    _family(
        "block_write_operations_total", "counter", "Writes to block devices.", _Series("block_write_ops")
    ),
    _family(
        "network_receive_bytes_total",
        "counter",
        "Bytes received, without loopback.",
        _Series("network_receive_bytes"),
    ),
    _family(
        "network_transmit_bytes_total",
        "counter",
        "Bytes sent, without loopback.",
        _Series("network_transmit_bytes"),
    ),
    _family(
        "network_receive_packets_total",
        "counter",
        "Packets received, without loopback.",
        _Series("network_receive_packets"),
    ),
    _family(
        "network_transmit_packets_total",
        "counter",
        "Packets sent, without loopback.",
        _Series("network_transmit_packets"),
    ),
    _family(
        "pressure_waiting_seconds_total",
        "counter",
        "Time in which some of its threads waited for the resource.",
        _Series("cpu_pressure_some_ns", _SECONDS, "cpu"),
        _Series("memory_pressure_some_ns", _SECONDS, "memory"),
        _Series("io_pressure_some_ns", _SECONDS, "io"),
    ),
    _family(
        "pressure_stalled_seconds_total",
        "counter",
        "Time in which all of its threads that had work waited for the resource.",
        _Series("memory_pressure_full_ns", _SECONDS, "memory"),
        _Series("io_pressure_full_ns", _SECONDS, "io"),
    ),
)

INSTANCE_FAMILIES: tuple[Family, ...] = tuple(family for family, _ in _TABLE)
"""Every metric an instance may have; those its driver cannot know are left out for it."""


def instance_series(instances: Sequence[tuple[Mapping[str, str], Record]]) -> str:
    """The text for these instances: their labels and their newest records."""
    written = [(labels_text(labels)[:-1], record) for labels, record in instances]
    parts = []
    for family, series in _TABLE:
        samples: list[tuple[str, int | float]] = []
        for one in series:
            end = f',resource="{one.resource}"}}' if one.resource else "}"
            for labels, record in written:
                value = getattr(record, one.field)
                if value is not None:
                    samples.append((labels + end, value if one.scale is None else value * one.scale))
        parts.append(rendered(family, samples))
    return "".join(parts)
