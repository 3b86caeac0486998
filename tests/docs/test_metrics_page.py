"""The page of metrics names all that the programs expose, with the same types and labels, and nothing else."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hypervisor.agent.metrics.instances import INSTANCE_FAMILIES, instance_series
from hypervisor.agent.metrics.node import NODE_FAMILIES
from hypervisor.ext.stats_sampler import FIELDS, Record
from hypervisor.server.gateway.metrics import Metrics
from hypervisor.server.services import ClusterView

PAGE = Path(os.environ.get("METRICS_PAGE", "docs/guide/metrics.md"))
_ROW = re.compile(r"\| `(?P<name>[a-z_]+)` \| (?P<kind>\w+) \| (?P<labels>[^|]*)\|")
_TYPE = re.compile(r"# TYPE (?P<name>\S+) (?P<kind>\S+)")


class EmptyCluster:
    """As much of a view as metrics look at."""

    revision = 0
    stale = False
    in_progress = 0

    def nodes(self) -> Iterable[object]:
        return ()

    instances = operations = nodes


def documented() -> dict[str, str]:
    """Types by name."""
    return {m["name"]: m["kind"] for m in _ROW.finditer(PAGE.read_text(encoding="utf-8"))}


def exposed(text: str) -> dict[str, str]:
    """Types by name; those of the moment a counter began are the library's own."""
    found = {m["name"]: m["kind"] for m in _TYPE.finditer(text)}
    return {name: kind for name, kind in found.items() if not name.endswith("_created")}


def of_server() -> dict[str, str]:
    metrics = Metrics()
    metrics.about(server_id="s-1", version="1", store="sqlite")
    cluster = EmptyCluster()
    view: ClusterView = cluster  # type: ignore[assignment]
    metrics.watch_cluster(view, cluster, usage=lambda _: None, leading=lambda: True, orphans=lambda: 0)
    metrics.observer("GetNode")("OK", 0.1)
    return exposed(metrics.text().decode())


def test_the_page_names_exactly_what_is_exposed() -> None:
    ours = {family.name: family.kind for family in (*INSTANCE_FAMILIES, *NODE_FAMILIES)} | of_server()

    assert documented() == ours


def test_every_series_of_an_instance_has_its_labels_and_those_of_the_page() -> None:
    everything = Record._make([1, 2, 3, (1 << len(FIELDS)) - 1, *range(len(FIELDS))])
    labels = {"instance_id": "i-1", "name": "web", "project": "default", "type": "container"}

    lines = [s for s in instance_series([(labels, everything)]).splitlines() if not s.startswith("#")]

    resources: dict[str, list[str]] = {}
    for line in lines:
        match = re.fullmatch(
            r'(\w+)\{instance_id="i-1",name="web",project="default",type="container"(?:,resource="(\w+)")?\} \S+',
            line,
        )
        assert match, line
        resources.setdefault(match[1], []).append(match[2])
    assert set(resources) == {family.name for family in INSTANCE_FAMILIES}
    for row in _ROW.finditer(PAGE.read_text(encoding="utf-8")):
        if row["name"] in resources and row["labels"].strip():
            assert row["labels"].strip() == "resource: " + ", ".join(resources[row["name"]])
