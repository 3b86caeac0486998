"""Prometheus metrics: calls as they end, and the cluster as it is when somebody asks."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hypervisor.core.states import InstanceStatus, NodeStatus, OperationState
from hypervisor.server.services import ClusterView

__all__ = ["ClusterMetrics", "InProgress", "Metrics"]

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


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

    def observer(self, method: str) -> Callable[[str, float], None]:
        """See ``CallMetrics``."""
        known: dict[str, Callable[[float], None]] = {}

        def observe(code: str, seconds: float) -> None:
            found = known.get(code)
            if found is None:
                found = known[code] = self._calls.labels(method, code).observe
            found(seconds)

        return observe

    def watch_cluster(self, view: ClusterView, calls: InProgress) -> None:
        """Add the gauges of the cluster."""
        self.registry.register(ClusterMetrics(view, calls))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class ClusterMetrics(Collector):
    """The cluster as this server sees it; counted when scraped."""

    def __init__(self, view: ClusterView, calls: InProgress) -> None:
        self._view = view
        self._calls = calls

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
        yield GaugeMetricFamily(
            "hypervisor_store_revision", "Store revision this server has seen.", value=view.revision
        )
        yield GaugeMetricFamily(
            "hypervisor_store_available",
            "Whether the store answers this server.",
            value=float(not view.stale),
        )
        yield GaugeMetricFamily(
            "hypervisor_rpcs_in_progress", "Calls and streams being served.", value=self._calls.in_progress
        )


def _by_name(
    name: str, text: str, label: str, counts: Counter[str], all_names: tuple[str, ...]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for each in all_names:
        family.add_metric((each,), counts[each])
    return family
