"""Programs die and come back; what users have running does not notice, and no call lies about it."""

import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from hvtest_containerd import eventually
from hvtest_programs import ProgramCluster, Result
from hypervisor.v1 import operation_pb2

SMALL = ("--cpu", "0.1", "--memory", "32MiB")


@pytest.fixture
def web(cluster: ProgramCluster, image: str) -> Iterator[str]:
    """A running container, removed afterwards, and nothing left of it."""
    if not cluster.agent.running:
        cluster.agent.start()
    cluster.wait_ready()
    cluster.must(
        "instance", "create", "web", "--image", image, *SMALL, "--", "sh", "-c", "echo $$ up; exec sleep 600"
    )
    yield "web"
    cluster.wait_ready()
    cluster.must("instance", "delete", "web", "--force")
    cluster.assert_nothing_left()


def task_pid(cluster: ProgramCluster) -> int:
    rows = cluster.containerd.ctr("tasks", "ls").stdout.splitlines()[1:]
    assert len(rows) == 1, rows
    return int(rows[0].split()[1])


def test_a_killed_agent_leaves_containers_running_and_adopts_them(cluster: ProgramCluster, web: str) -> None:
    pid = task_pid(cluster)

    cluster.agent.kill()
    assert Path(f"/proc/{pid}").exists()
    cluster.agent.start()
    cluster.wait_ready()

    assert task_pid(cluster) == pid
    assert cluster.instance(web)["status"] == "INSTANCE_STATUS_RUNNING"
    assert int(cluster.must("instance", "stats", web, "-o", "json").json()["pids"]) >= 1
    cluster.must("instance", "restart", web, "--grace-period", "0s")
    assert task_pid(cluster) != pid


@pytest.fixture
def talker(cluster: ProgramCluster, image: str) -> Iterator[str]:
    """A container that prints numbers without an end; yields its id."""
    script = "i=0; while true; do i=$((i+1)); echo n $i; usleep 1000; done"
    cluster.must("instance", "create", "talker", "--image", image, *SMALL, "--", "sh", "-c", script)
    yield str(cluster.instance("talker")["id"])
    cluster.wait_ready()
    cluster.must("instance", "delete", "talker", "--force")
    cluster.assert_nothing_left()


def _numbers(cluster: ProgramCluster) -> list[int]:
    # An agent that has just been started may not listen yet, and the server not have noticed.
    done = eventually(lambda: (r := cluster.ctl("instance", "logs", "talker")).code == 0 and r, what="a log")
    assert isinstance(done, Result)
    # What follows the last line's end is a number that is not whole yet.
    lines = done.out.split("\n")[:-1]
    return [int(line.removeprefix("n ")) for line in lines]


def _prints_on(cluster: ProgramCluster, talker: str) -> None:
    """Return once it has printed more, and the node has kept it."""
    wanted = cluster.console_log_end(talker) + 2000
    eventually(lambda: cluster.console_log_end(talker) >= wanted, what="output is read and kept")


def test_what_a_container_prints_while_its_agent_is_dead_is_not_lost(
    cluster: ProgramCluster, talker: str
) -> None:
    _prints_on(cluster, talker)
    (holder,) = cluster.console_holders()

    cluster.agent.kill()
    _prints_on(cluster, talker)
    cluster.agent.start()
    cluster.wait_ready()

    before = _numbers(cluster)
    assert before == list(range(1, len(before) + 1))
    assert cluster.console_holders() == [holder]
    assert _numbers(cluster)[: len(before)] == before


def test_a_killed_console_holder_is_replaced_and_the_container_prints_on(
    cluster: ProgramCluster, talker: str
) -> None:
    pid = task_pid(cluster)
    _prints_on(cluster, talker)
    (holder,) = cluster.console_holders()

    subprocess.run(["kill", "-9", str(holder)], check=True)
    eventually(lambda: cluster.console_holders() not in ([], [holder]), what="another holder is started")
    _prints_on(cluster, talker)

    numbers = _numbers(cluster)
    gaps = [(a, b) for a, b in pairwise(numbers) if b != a + 1]
    assert numbers[0] == 1
    assert len(gaps) <= 1, gaps
    assert all(b - a < 500 for a, b in gaps), "what was lost is what the holder had not written yet"
    assert task_pid(cluster) == pid


def test_an_exit_while_the_agent_was_away_is_found(cluster: ProgramCluster, image: str) -> None:
    cluster.must("instance", "create", "brief", "--image", image, *SMALL, "--", "sh", "-c", "sleep 600")
    pid = task_pid(cluster)
    cluster.agent.kill()
    subprocess.run(["kill", "-9", str(pid)], check=True)
    cluster.agent.start()
    cluster.wait_ready()

    seen = cluster.wait_status("brief", "FAILED")

    assert int(seen["exit_code"]) == 137
    cluster.must("instance", "delete", "brief", "--force")
    cluster.assert_nothing_left()


def test_a_node_whose_agent_is_down_goes_offline_and_comes_back(cluster: ProgramCluster, web: str) -> None:
    cluster.agent.kill()
    eventually(
        lambda: cluster.node()["status"] == "NODE_STATUS_OFFLINE", what="the node is OFFLINE", timeout_s=30
    )
    cluster.wait_status(web, "UNKNOWN")

    refused = cluster.ctl("instance", "stop", web, "--timeout", "3s")
    assert refused.code != 0
    assert "node" in refused.err
    assert "--node" in refused.err or "agent" in refused.err or cluster.hostname in refused.err

    cluster.agent.start()
    cluster.wait_ready()
    cluster.wait_status(web, "RUNNING")


def test_a_killed_server_forgets_nothing(cluster: ProgramCluster, web: str) -> None:
    before = cluster.instance(web)
    operations = len(cluster.must("operation", "list", "-o", "json").json())

    cluster.server.kill()
    down = cluster.ctl("instance", "list")
    assert down.code == 1
    assert cluster.address in down.err
    cluster.server.start()
    cluster.wait_ready()

    after = cluster.instance(web)
    assert (after["id"], after["status"], after["created_at"]) == (
        before["id"],
        before["status"],
        before["created_at"],
    )
    assert len(cluster.must("operation", "list", "-o", "json").json()) >= operations
    assert cluster.reserved()["instances"] == 1


def test_a_server_killed_in_the_middle_of_a_stop_finishes_it_after_its_restart(
    cluster: ProgramCluster, image: str
) -> None:
    stubborn = "trap '' TERM; while :; do sleep 1; done"
    cluster.must("instance", "create", "stubborn", "--image", image, *SMALL, "--", "sh", "-c", stubborn)
    asked = cluster.must(
        "instance", "stop", "stubborn", "--grace-period", "4s", "--no-wait", "-o", "json"
    ).json()
    operation = asked[0] if isinstance(asked, list) else asked

    cluster.server.kill()
    cluster.server.start()
    cluster.wait_ready()

    done = cluster.must("operation", "wait", operation["id"], "--timeout", "60s", "-o", "json").json()
    assert done["state"] == operation_pb2.OperationState.Name(operation_pb2.OPERATION_STATE_SUCCEEDED)
    assert cluster.instance("stubborn")["status"] == "INSTANCE_STATUS_STOPPED"
    cluster.must("instance", "delete", "stubborn", "--force")
    cluster.assert_nothing_left()


def test_without_containerd_creates_are_refused_and_running_containers_survive(
    cluster: ProgramCluster, web: str, image: str
) -> None:
    pid = task_pid(cluster)
    cluster.containerd.kill()
    try:
        refused = cluster.ctl("instance", "create", "early", "--image", image, *SMALL, "--timeout", "20s")
        assert refused.code != 0
        assert "containerd" in refused.err
        assert Path(f"/proc/{pid}").exists()
    finally:
        cluster.containerd.start()
    cluster.wait_ready()
    eventually(
        lambda: [i["name"] for i in cluster.must("instance", "list", "-o", "json").json()] == ["web"],
        what="nothing is left of the refused create",
    )
    assert task_pid(cluster) == pid
    assert cluster.reserved()["instances"] == 1
