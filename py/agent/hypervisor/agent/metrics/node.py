"""All that one agent tells Prometheus: the node, the agent itself, and its instances up to a bound."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from hypervisor.agent.cluster_link import NodeDescription
from hypervisor.agent.drivers.health import DriverHealth
from hypervisor.agent.drivers.manager import Manager
from hypervisor.agent.metrics.instances import instance_series
from hypervisor.agent.metrics.text import Family, labels_text, rendered
from hypervisor.agent.reporter import Reporter
from hypervisor.agent.resources import ResourceSource
from hypervisor.agent.stats.service import StatsService
from hypervisor.core.states import InstanceStatus
from hypervisor.ext import stats_sampler

__all__ = ["NODE_FAMILIES", "NodeMetrics"]

_INFO = Family("hypervisor_agent_info", "gauge", "Always 1; the labels say what runs here.")
_REGISTERED = Family(
    "hypervisor_agent_registered", "gauge", "Whether a server of the control plane knows this node."
)
_INSTANCES = Family("hypervisor_agent_instances", "gauge", "Instances on this node by status.")
_LEFT_OUT = Family(
    "hypervisor_agent_instances_without_series",
    "gauge",
    "Running instances that have no series of their own: more than metrics.max_instances.",
)
_DRIVER = Family("hypervisor_agent_driver_available", "gauge", "Whether the driver can run instances now.")
_SAMPLES = Family("hypervisor_agent_stats_samples_total", "counter", "Samples of instances made.")
_FAILURES = Family(
    "hypervisor_agent_stats_failures_total", "counter", "Times an instance's use could not be found or read."
)
_SAMPLING = Family("hypervisor_agent_stats_sampling_seconds_total", "counter", "Time that sampling took.")
_FILES = Family("hypervisor_agent_stats_open_files", "gauge", "Files kept open to sample instances.")
_WAITING = Family("hypervisor_agent_observations_waiting", "gauge", "Changes not told to a server yet.")
_DROPPED = Family(
    "hypervisor_agent_observations_dropped_total", "counter", "Changes dropped, as too many waited."
)
_CPU = Family("hypervisor_node_cpu_cores", "gauge", "Processors of the node.")
_CPU_USED = Family("hypervisor_node_cpu_used_cores", "gauge", "Processors busy since the scrape before.")
_MEMORY = Family("hypervisor_node_memory_bytes", "gauge", "Memory of the node.")
_MEMORY_USED = Family("hypervisor_node_memory_used_bytes", "gauge", "Memory in use: total less available.")
_DISK = Family("hypervisor_node_disk_bytes", "gauge", "Size of the file system that holds the instances.")
_DISK_USED = Family("hypervisor_node_disk_used_bytes", "gauge", "Bytes of it in use.")

NODE_FAMILIES: tuple[Family, ...] = (
    _INFO,
    _REGISTERED,
    _INSTANCES,
    _LEFT_OUT,
    _DRIVER,
    _SAMPLES,
    _FAILURES,
    _SAMPLING,
    _FILES,
    _WAITING,
    _DROPPED,
    _CPU,
    _CPU_USED,
    _MEMORY,
    _MEMORY_USED,
    _DISK,
    _DISK_USED,
)
"""What is told of the node and the agent; the ``process_*`` metrics of prometheus_client come on top."""


class NodeMetrics:
    """``resources`` must be a source of its own: reading one moves the span its processor use is averaged over.

    At most ``max_instances`` instances have series; those that have been sampled longest come first.
    """

    def __init__(
        self,
        node: NodeDescription,
        *,
        manager: Manager,
        drivers: DriverHealth,
        stats: StatsService,
        reporter: Reporter,
        resources: ResourceSource,
        registered: Callable[[], bool],
        max_instances: int,
    ) -> None:
        self._node = node
        self._manager = manager
        self._drivers = drivers
        self._stats = stats
        self._reporter = reporter
        self._resources = resources
        self._registered = registered
        self._max_instances = max_instances
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    async def text(self) -> bytes:
        """Everything, as it is now."""
        parts = [rendered(family, samples) for family, samples in await self._node_samples()]
        records = self._stats.records(limit=self._max_instances)
        labelled = [(self._labels(instance_id), record) for instance_id, record in records]
        left_out = max(self._stats.running - self._max_instances, 0)
        parts.append(rendered(_LEFT_OUT, [("", left_out)]))
        # A thousand instances are some megabytes of text: not on the event loop.
        parts.append(await asyncio.to_thread(instance_series, labelled))
        return "".join(parts).encode() + generate_latest(self._process)

    def _labels(self, instance_id: str) -> Mapping[str, str]:
        entry = self._manager.described(instance_id)
        return {
            "instance_id": instance_id,
            "name": "" if entry is None else entry.name,
            "project": "" if entry is None else entry.project,
            "type": "" if entry is None or entry.type is None else str(entry.type),
        }

    async def _node_samples(self) -> list[tuple[Family, Iterable[tuple[str, int | float]]]]:
        node, stats, reporter = self._node, self._stats, self._reporter
        info = {
            "hostname": node.hostname,
            "node_id": node.id,
            "stats_sampler": stats_sampler.implementation,
            "version": node.agent_version,
        }
        by_status = Counter(seen.status for seen in self._manager.last_seen())
        resources = await self._resources.read()
        return [
            (_INFO, [(labels_text(info), 1)]),
            (_REGISTERED, [("", int(self._registered()))]),
            (
                _INSTANCES,
                [(labels_text({"status": str(status)}), by_status[status]) for status in InstanceStatus],
            ),
            (
                _DRIVER,
                [(labels_text({"driver": i.name}), int(i.available)) for i in self._drivers.infos()],
            ),
            (_SAMPLES, [("", stats.samples)]),
            (_FAILURES, [("", stats.failures)]),
            (_SAMPLING, [("", stats.sampling_s)]),
            (_FILES, [("", stats.open_files)]),
            (_WAITING, [("", reporter.waiting)]),
            (_DROPPED, [("", reporter.dropped)]),
            (_CPU, [("", resources.cpu_millis / 1000)]),
            (_CPU_USED, [("", resources.cpu_used_millis / 1000)]),
            (_MEMORY, [("", resources.memory_bytes)]),
            (_MEMORY_USED, [("", resources.memory_used_bytes)]),
            (_DISK, [("", resources.disk_bytes)]),
            (_DISK_USED, [("", resources.disk_used_bytes)]),
        ]
