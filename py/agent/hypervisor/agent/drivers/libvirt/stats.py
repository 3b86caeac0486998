"""What virtual machines use: libvirt's statistics of many domains by one call."""

from collections.abc import Mapping, Sequence
from typing import Any

import libvirt

from hypervisor.agent.drivers.libvirt.connection import Connection

__all__ = ["DomainStats", "figures_of"]

_GROUPS = (
    libvirt.VIR_DOMAIN_STATS_STATE
    | libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
    | libvirt.VIR_DOMAIN_STATS_BALLOON
    | libvirt.VIR_DOMAIN_STATS_BLOCK
    | libvirt.VIR_DOMAIN_STATS_INTERFACE
)
# A domain that is busy (starting, saving) is told of by what is known without asking its QEMU, not waited for.
_FLAGS = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_RUNNING | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
_PAUSED_TOO = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_PAUSED
_KIB = 1024


class DomainStats:
    """The ``StatsFeed`` of all virtual machines of a node; see :mod:`hypervisor.agent.stats.sources`.

    Memory is the guest's own where its balloon driver tells it (what is not free), else what QEMU holds of it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def read(self, instance_ids: Sequence[str]) -> Mapping[str, Mapping[str, int]]:
        """Figures by instance id; raises ``Unavailable`` when libvirt cannot be asked."""
        wanted = frozenset(instance_ids)
        rows = await self._connection.query(_read, what="read statistics")
        return {name: figures_of(row) for name, row in rows if name in wanted}


def _read(connection: Any) -> list[tuple[str, dict[str, Any]]]:
    rows = connection.getAllDomainStats(_GROUPS, _FLAGS | _PAUSED_TOO)
    return [(domain.name(), row) for domain, row in rows]


def figures_of(row: Mapping[str, Any]) -> dict[str, int]:
    """What libvirt tells of a domain, by the names of ``stats_sampler.COUNTERS``. Pure."""
    figures: dict[str, int] = {}
    if "cpu.time" in row:
        figures["cpu_usage_ns"] = row["cpu.time"]
    limit = row.get("balloon.current")
    if limit is not None:
        figures["memory_limit_bytes"] = limit * _KIB
        available, unused = row.get("balloon.available"), row.get("balloon.unused")
        if available and unused is not None:
            figures["memory_used_bytes"] = max(0, min(available - unused, limit)) * _KIB
            usable = row.get("balloon.usable", unused)
            figures["memory_working_set_bytes"] = max(0, min(available - usable, limit)) * _KIB
        elif "balloon.rss" in row:
            figures["memory_used_bytes"] = min(row["balloon.rss"], limit) * _KIB
    if "balloon.major_fault" in row:
        figures["major_faults"] = row["balloon.major_fault"]
    _add_sums(figures, row, "block", _BLOCK)
    _add_sums(figures, row, "net", _NET)
    return figures


_BLOCK = {
    "rd.bytes": "block_read_bytes",
    "wr.bytes": "block_write_bytes",
    "rd.reqs": "block_read_ops",
    "wr.reqs": "block_write_ops",
}
_NET = {
    "rx.bytes": "network_receive_bytes",
    "tx.bytes": "network_transmit_bytes",
    "rx.pkts": "network_receive_packets",
    "tx.pkts": "network_transmit_packets",
}


def _add_sums(figures: dict[str, int], row: Mapping[str, Any], group: str, names: Mapping[str, str]) -> None:
    for index in range(row.get(f"{group}.count", 0)):
        for key, name in names.items():
            value = row.get(f"{group}.{index}.{key}")
            if value is not None:
                figures[name] = figures.get(name, 0) + value
