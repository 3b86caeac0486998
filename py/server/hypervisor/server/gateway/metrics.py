"""Prometheus metrics: calls as they end, and the cluster as it is when somebody asks."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hypervisor.core.states import InstanceStatus, NodeStatus, OperationState
from hypervisor.server.committer import CommitOutcome, Lane
from hypervisor.server.services import ClusterView, NodeUsage

__all__ = ["ClusterMetrics", "InProgress", "Metrics"]

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


_KINDS = ("capacity", "reserved", "used", "used_by_instances")
_OF_KINDS = (
    "Reserved: over all nodes; capacity and used: over those that are not offline, as this server heard last."
)


class InProgress(Protocol):
    """Who knows how many calls are being served."""

    @property
    def in_progress(self) -> int: ...


class Metrics:
    """All metrics of one server; also the ``CallMetrics`` of the dispatcher."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Histogram(
            "hypervisor_rpc_duration_seconds",
            "Time that calls took; of streams, their whole life.",
            ("method", "code"),
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self._commits = Histogram(
            "hypervisor_commit_duration_seconds",
            "Time the store took for transactions of this server.",
            ("lane", "outcome"),
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self._decisions = PrometheusCounter(
            "hypervisor_commit_decisions_total",
            "Decisions in transactions that were committed; several share one under load.",
            ("lane",),
            registry=self.registry,
        )
        for lane in Lane:  # Series that are there from the start, so that a rate of them is never missing.
            self._decisions.labels(lane.value)
            for outcome in CommitOutcome:
                self._commits.labels(lane.value, outcome.value)
        ProcessCollector(registry=self.registry)

    def committed(self, lane: Lane, outcome: CommitOutcome, seconds: float, decisions: int) -> None:
        """See ``CommitListener``."""
        self._commits.labels(lane.value, outcome.value).observe(seconds)
        if outcome is CommitOutcome.COMMITTED:
            self._decisions.labels(lane.value).inc(decisions)

    def about(self, *, server_id: str, version: str, store: str) -> None:
        """Say what runs here."""
        Gauge(
            "hypervisor_server_info",
            "Always 1; the labels say what runs here.",
            ("server_id", "store", "version"),
            registry=self.registry,
        ).labels(server_id, store, version).set(1)

    def observer(self, method: str) -> Callable[[str, float], None]:
        """See ``CallMetrics``."""
        known: dict[str, Callable[[float], None]] = {}

        def observe(code: str, seconds: float) -> None:
            found = known.get(code)
            if found is None:
                found = known[code] = self._calls.labels(method, code).observe
            found(seconds)

        return observe

    def watch_cluster(
        self,
        view: ClusterView,
        calls: InProgress,
        *,
        usage: Callable[[str], NodeUsage | None],
        leading: Callable[[], bool],
        orphans: Callable[[], int],
        repairs: Callable[[], int] = lambda: 0,
    ) -> None:
        """Add the gauges of the cluster. ``usage``: measured use by a node's id; ``leading``: whether it leads;
        ``repairs``: records that comparisons with the store mended."""
        self.registry.register(
            ClusterMetrics(view, calls, usage=usage, leading=leading, orphans=orphans, repairs=repairs)
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class ClusterMetrics(Collector):
    """The cluster as this server sees it; counted when scraped."""

    def __init__(
        self,
        view: ClusterView,
        calls: InProgress,
        *,
        usage: Callable[[str], NodeUsage | None],
        leading: Callable[[], bool],
        orphans: Callable[[], int],
        repairs: Callable[[], int],
    ) -> None:
        self._view = view
        self._repairs = repairs
        self._calls = calls
        self._usage = usage
        self._leading = leading
        self._orphans = orphans

    def collect(self) -> Iterable[Metric]:
        """See ``Collector``."""
        view = self._view
        yield _by_name(
            "hypervisor_nodes",
            "Nodes by status.",
            "status",
            Counter(node.value.status for node in view.nodes()),
            tuple(NodeStatus),
        )
        yield _by_name(
            "hypervisor_instances",
            "Instances by status.",
            "status",
            Counter(instance.value.status for instance in view.instances()),
            tuple(InstanceStatus),
        )
        yield _by_name(
            "hypervisor_operations",
            "Operations remembered, by state.",
            "state",
            Counter(operation.value.state for operation in view.operations()),
            tuple(OperationState),
        )
        yield from self._amounts()
        yield GaugeMetricFamily(
            "hypervisor_nodes_held",
            "Lost nodes off which nothing is moved, as too many were lost together.",
            value=sum(bool(n.value.loss and n.value.loss.held) for n in view.nodes()),
        )
        yield GaugeMetricFamily(
            "hypervisor_server_leader",
            "Whether this server does the cluster's singleton work.",
            value=float(self._leading()),
        )
        yield GaugeMetricFamily(
            "hypervisor_store_revision", "Store revision this server has seen.", value=view.revision
        )
        yield GaugeMetricFamily(
            "hypervisor_store_available",
            "Whether the store answers this server.",
            value=float(not view.stale),
        )
        yield CounterMetricFamily(
            "hypervisor_view_repairs",
            "Records that a comparison with the store had to mend, as the watch had not told their change.",
            value=self._repairs(),
        )
        yield GaugeMetricFamily(
            "hypervisor_orphans",
            "Instances that nodes have and that no record tells of, or one of another node; as the leader sees it.",
            value=self._orphans() if self._leading() else 0,
        )
        yield GaugeMetricFamily(
            "hypervisor_rpcs_in_progress", "Calls and streams being served.", value=self._calls.in_progress
        )

    def _amounts(self) -> Iterable[Metric]:
        """What the cluster has, what is reserved and what is used: sums, whatever the number of nodes."""
        view = self._view
        cpu, memory, disk = dict.fromkeys(_KINDS, 0.0), dict.fromkeys(_KINDS, 0.0), dict.fromkeys(_KINDS, 0.0)
        for node in view.nodes():
            reserved = view.allocation(node.value.id).reserved
            cpu["reserved"] += reserved.cpu_millis / 1000
            memory["reserved"] += reserved.memory_bytes
            disk["reserved"] += reserved.disk_bytes
            if node.value.status is NodeStatus.OFFLINE:
                continue
            cpu["capacity"] += node.value.capacity.cpu_millis / 1000
            memory["capacity"] += node.value.capacity.memory_bytes
            disk["capacity"] += node.value.capacity.disk_bytes
            usage = self._usage(node.value.id)
            if usage is not None:
                cpu["used"] += usage.resources.cpu_used_millis / 1000
                memory["used"] += usage.resources.memory_used_bytes
                disk["used"] += usage.resources.disk_used_bytes
                cpu["used_by_instances"] += usage.instances.cpu_used_cores
                memory["used_by_instances"] += usage.instances.memory_used_bytes
        del disk["used_by_instances"]
        yield _by_kind("hypervisor_cluster_cpu_cores", f"Processors. {_OF_KINDS}", cpu)
        yield _by_kind("hypervisor_cluster_memory_bytes", f"Memory. {_OF_KINDS}", memory)
        yield _by_kind("hypervisor_cluster_disk_bytes", f"Disk. {_OF_KINDS}", disk)


def _by_kind(name: str, text: str, amounts: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=("kind",))
    for kind, amount in amounts.items():
        family.add_metric((kind,), amount)
    return family


def _by_name(
    name: str, text: str, label: str, counts: Counter[str], all_names: tuple[str, ...]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for each in all_names:
        family.add_metric((each,), counts[each])
    return family
