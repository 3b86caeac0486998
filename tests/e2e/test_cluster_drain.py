"""Maintenance of a node as an operator does it, with the built programs and simulated nodes."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvtest_containerd import eventually
from hvtest_simulated_cluster import SimulatedCluster, running_on

SMALL = ("--cpu", "0.1", "--memory", "32MiB", "--image", "busybox")


@pytest.fixture(scope="module")
def nodes(release: Path) -> Iterator[SimulatedCluster]:
    with SimulatedCluster(release, "left", "right") as running:
        yield running


@pytest.fixture
def farm(nodes: SimulatedCluster) -> Iterator[SimulatedCluster]:
    """Nothing on it, both nodes open."""
    if not nodes.server.running:
        nodes.server.start()
    nodes.wait_ready()
    yield nodes
    for hostname in nodes.nodes:
        if nodes.node(hostname).get("drain", {}).get("active"):
            nodes.must("node", "drain", hostname, "--cancel")
            eventually(
                lambda name=hostname: not nodes.node(name)["drain"].get("active"), what="the drain has ended"
            )
    eventually(
        lambda: not any(i.get("operation_id") for i in nodes.instances().values()), what="nothing moves"
    )
    for name in nodes.instances():
        nodes.must("instance", "delete", name, "--force")
    for name in [b["name"] for b in nodes.must("budget", "list", "-o", "json").json()]:
        nodes.must("budget", "delete", name)
    nodes.must("node", "uncordon", *nodes.nodes)


def create(farm: SimulatedCluster, *names: str, move: str = "") -> None:
    """Instances labelled app=web on the left node."""
    farm.must("node", "cordon", "right-0001")
    for name in names:
        farm.must("instance", "create", name, *SMALL, "--label", "app=web")
    farm.must("node", "uncordon", "right-0001")


class Poller:
    """Looks all the time on which nodes one instance runs, and counts the moments in which it runs on none.

    The old node is asked first: where it is gone by then, it ran on the new one before.
    """

    def __init__(self, farm: SimulatedCluster, instance_id: str) -> None:
        self._channels = [farm.agent_channel(hostname) for hostname in farm.nodes]
        self._instance_id = instance_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.looks = self.nowhere = self.twice = 0

    def __enter__(self) -> "Poller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        for channel in self._channels:
            channel.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            places = [self._instance_id in running_on(channel) for channel in self._channels]
            self.looks += 1
            self.nowhere += not any(places)
            self.twice += all(places)


def test_a_service_of_one_copy_runs_at_every_moment_of_a_drain(farm: SimulatedCluster) -> None:
    create(farm, "web")
    web = farm.instances()["web"]["id"]
    farm.must("budget", "set", "web", "--selector", "app=web", "--min-available", "1")
    with Poller(farm, web) as poller:
        drained = farm.must("node", "drain", "left-0001", "--healthy-after", "2s")

    assert "node left-0001 drained: 1 of 1 moved" in drained.out
    assert poller.looks > 10
    assert poller.nowhere == 0
    assert poller.twice > 0, "both copies ran for the two seconds that the new one had to prove itself"
    moved = farm.instances()["web"]
    assert (moved["node_id"], moved["epoch"]) == (farm.node("right-0001")["id"], "2")
    assert farm.node("left-0001")["status"] == "NODE_STATUS_MAINTENANCE"
    assert farm.node("left-0001")["reservation"]["instances"] == "0"

    home = farm.must("node", "uncordon", "left-0001", "--restore")
    assert "its instances are home" in home.out
    assert farm.instances()["web"]["node_id"] == farm.node("left-0001")["id"]


def test_a_drain_goes_on_when_its_server_is_killed(farm: SimulatedCluster) -> None:
    create(farm, "a", "b", "c")
    begun = farm.must("node", "drain", "left-0001", "--parallel", "1", "--healthy-after", "4s", "--no-wait")
    assert "goes on as operation" in begun.out
    eventually(
        lambda: any(i["status"] == "INSTANCE_STATUS_MIGRATING" for i in farm.instances().values()),
        what="the first one moves",
    )
    farm.server.kill()
    farm.server.start()
    farm.wait_ready()

    watched = farm.must("node", "drain", "left-0001", "--watch")

    assert "3 of 3 moved" in watched.out
    right = farm.node("right-0001")["id"]
    assert {i["node_id"] for i in farm.instances().values()} == {right}
    assert {i["status"] for i in farm.instances().values()} == {"INSTANCE_STATUS_RUNNING"}
    with farm.agent_channel("left-0001") as old, farm.agent_channel("right-0001") as new:
        assert running_on(old) == set()
        assert running_on(new) == {i["id"] for i in farm.instances().values()}


def test_a_plan_changes_nothing_and_a_budget_holds(farm: SimulatedCluster) -> None:
    create(farm, "a", "b")
    farm.must("budget", "set", "web", "--selector", "app=web", "--max-unavailable", "0")
    plan = farm.must("node", "drain", "left-0001", "--dry-run")
    assert [line.split()[:4] for line in plan.out.splitlines()[1:]] == [
        ["a", "planned", "replace", "right-0001"],
        ["b", "planned", "replace", "right-0001"],
    ]
    assert farm.node("left-0001")["status"] == "NODE_STATUS_READY"

    refused = farm.ctl("node", "drain", "left-0001", "--strategy", "container=stop", "--give-up-after", "2s")
    assert refused.code == 4
    assert "could not be moved" in refused.err
    assert {i["status"] for i in farm.instances().values()} == {"INSTANCE_STATUS_RUNNING"}
    assert {i["epoch"] for i in farm.instances().values()} == {"1"}


def test_a_drain_is_cancelled(farm: SimulatedCluster) -> None:
    create(farm, "a", "b", "c")
    farm.must("node", "drain", "left-0001", "--parallel", "1", "--healthy-after", "10m", "--no-wait")
    eventually(
        lambda: any(i["status"] == "INSTANCE_STATUS_MIGRATING" for i in farm.instances().values()),
        what="the first one moves",
    )
    cancelled = farm.must("node", "drain", "left-0001", "--cancel")
    assert "no more is moved" in cancelled.out
    watched = farm.ctl("node", "drain", "left-0001", "--watch")
    assert watched.code != 0
    assert "cancelled with 3 instances left; 1 moves under way go on" in watched.err

    (moving,) = [i for i in farm.instances().values() if i.get("operation_id")]
    farm.must("operation", "cancel", moving["operation_id"])
    eventually(
        lambda: not any(i.get("operation_id") for i in farm.instances().values()), what="nothing moves"
    )
    left = farm.node("left-0001")["id"]
    assert {i["node_id"] for i in farm.instances().values()} == {left}
    assert {i["status"] for i in farm.instances().values()} == {"INSTANCE_STATUS_RUNNING"}


def test_an_instance_is_moved_by_hand(farm: SimulatedCluster) -> None:
    create(farm, "web")
    moved = farm.must("instance", "move", "web", "--node", "right-0001", "--strategy", "stop")
    assert "instance web moved to node" in moved.out
    refused = farm.ctl("instance", "move", "web", "--node", "right-0001")
    assert refused.code == 4
    assert "is on node right-0001 already" in refused.err
