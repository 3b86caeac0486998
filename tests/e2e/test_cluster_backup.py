"""The store is lost and comes back from a backup, and what users have running does not notice."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvtest_programs import ProgramCluster

SMALL = ("--cpu", "0.1", "--memory", "32MiB")


@pytest.fixture
def web(cluster: ProgramCluster, image: str) -> Iterator[str]:
    """A running container, removed afterwards, and nothing left of it."""
    cluster.must("instance", "create", "web", "--image", image, *SMALL, "--", "sleep", "600")
    yield "web"
    cluster.must("instance", "delete", "web", "--force")
    cluster.assert_nothing_left()


def task_pid(cluster: ProgramCluster) -> int:
    rows = cluster.containerd.ctr("tasks", "ls").stdout.splitlines()[1:]
    assert len(rows) == 1, rows
    return int(rows[0].split()[1])


def lose_the_store(cluster: ProgramCluster) -> None:
    cluster.server.terminate()
    for path in cluster.directory.glob("store.db*"):
        path.unlink()
    cluster.server.start()


def test_a_lost_store_is_restored_under_a_running_container(
    cluster: ProgramCluster, web: str, tmp_path: Path
) -> None:
    pid, before, file = task_pid(cluster), cluster.instance(web), tmp_path / "cluster.backup"
    cluster_id = cluster.must("cluster", "info", "-o", "json").json()["cluster_id"]

    made = cluster.must("cluster", "backup", str(file))
    assert cluster_id in made.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    checked = cluster.must("cluster", "restore", str(file), "--check")
    assert "whole" in checked.err
    lose_the_store(cluster)
    cluster.wait_ready()
    assert cluster.must("instance", "list", "-o", "json").json() == []
    restored = cluster.must("cluster", "restore", str(file), "--yes", "-o", "json").json()

    assert (restored["cluster_id"], restored["instances"]) == (cluster_id, "1")
    assert cluster.must("cluster", "info", "-o", "json").json()["cluster_id"] == cluster_id
    cluster.wait_ready()
    after = cluster.wait_status(web, "RUNNING")
    assert (after["id"], after["node_id"]) == (before["id"], before["node_id"])
    assert task_pid(cluster) == pid
    cluster.must("instance", "restart", web, "--grace-period", "0s")
    assert task_pid(cluster) != pid


def test_what_cannot_be_restored_says_why(cluster: ProgramCluster, web: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.backup"
    cluster.must("cluster", "backup", str(file))

    again = cluster.ctl("cluster", "backup", str(file))
    assert (again.code, "--replace" in again.err) == (2, True), again
    cluster.must("cluster", "backup", str(file), "--replace")
    not_empty = cluster.ctl("cluster", "restore", str(file), "--yes")
    assert "CLUSTER_NOT_EMPTY" in not_empty.err, not_empty
    assert not_empty.code not in (0, 2)
    file.write_bytes(file.read_bytes()[:-20])
    damaged = cluster.ctl("cluster", "restore", str(file), "--yes")
    assert "no whole backup" in damaged.err, damaged
    assert cluster.ctl("cluster", "restore", str(tmp_path / "none"), "--yes").code == 2
    assert cluster.instance(web)["status"] == "INSTANCE_STATUS_RUNNING"
