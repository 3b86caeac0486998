"""Restarts and reconciling on a real node: killed processes, a reboot, containers removed by hand, a lost store."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvtest_containerd import eventually
from hvtest_programs import ProgramCluster

SMALL = ("--cpu", "0.1", "--memory", "32MiB")
RESTART = ("--restart", "on-failure", "--max-restarts", "3")


@pytest.fixture(scope="module")
def cluster(release: Path) -> Iterator[ProgramCluster]:
    keys = {"reconcile.interval": "2s", "reconcile.orphan_grace": "8s"}
    with ProgramCluster(release, server_keys=keys) as running:
        yield running


def create(cluster: ProgramCluster, image: str, name: str, *options: str) -> None:
    cluster.must(
        "instance", "create", name, "--image", image, *SMALL, *options, "--", "sh", "-c", "exec sleep 600"
    )


def pids(cluster: ProgramCluster) -> dict[str, int]:
    """Running tasks: process ids by container id."""
    rows = [row.split() for row in cluster.containerd.ctr("tasks", "ls").stdout.splitlines()[1:]]
    return {row[0]: int(row[1]) for row in rows if row[2] == "RUNNING"}


def becomes(cluster: ProgramCluster, name: str, *, total: int) -> dict[str, Any]:
    """The instance once it runs after so many restarts."""
    seen: dict[str, Any] = {}

    def there() -> bool:
        seen.clear()
        seen.update(cluster.instance(name))
        runs = seen["status"] == "INSTANCE_STATUS_RUNNING"
        return bool(runs and int(seen.get("restarts", {}).get("total", 0)) == total)

    eventually(there, what=f"{name} runs after {total} restarts", timeout_s=30.0)
    return seen


def remove(cluster: ProgramCluster, *names: str) -> None:
    cluster.must("instance", "delete", *names, "--force")
    cluster.assert_nothing_left()


def test_a_container_whose_process_is_killed_runs_again(cluster: ProgramCluster, image: str) -> None:
    create(cluster, image, "web", *RESTART)
    (before,) = pids(cluster).values()

    os.kill(before, signal.SIGKILL)
    again = becomes(cluster, "web", total=1)

    (after,) = pids(cluster).values()
    assert after != before
    assert again["restarts"]["count"] == 1
    assert (again["restarts"]["last_reason"], again["restarts"]["last_exit_code"]) == ("KILLED", 137)
    text = cluster.must("instance", "get", "web").out
    assert "on-failure: at most 3 in a row" in text
    assert "1 in a row, 1 in all" in text
    remove(cluster, "web")


def test_one_that_always_fails_is_given_up_and_told_so(cluster: ProgramCluster, image: str) -> None:
    options = ("--restart", "on-failure", "--max-restarts", "1")
    cluster.must("instance", "create", "sick", "--image", image, *SMALL, *options, "--", "sh", "-c", "exit 7")

    eventually(
        lambda: cluster.instance("sick")["status_reason"] == "RESTARTS_EXHAUSTED",
        what="it is given up",
        timeout_s=30.0,
    )

    sick = cluster.instance("sick")
    assert (sick["status"], sick["exit_code"]) == ("INSTANCE_STATUS_FAILED", 7)
    assert sick["restarts"]["count"] == 1
    remove(cluster, "sick")


def test_after_a_reboot_policies_start_what_ran(cluster: ProgramCluster, image: str) -> None:
    create(cluster, image, "lasting", *RESTART)
    create(cluster, image, "fleeting")
    create(cluster, image, "resting", *RESTART)
    cluster.must("instance", "stop", "resting", "--grace-period", "0s")

    cluster.agent.kill()
    for pid in pids(cluster).values():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not pids(cluster), what="everything ended")
    cluster.agent.start()
    cluster.wait_ready()

    lasting = becomes(cluster, "lasting", total=1)
    assert list(pids(cluster)) == [lasting["id"]]
    cluster.wait_status("fleeting", "FAILED")
    assert cluster.instance("resting")["status"] == "INSTANCE_STATUS_STOPPED"
    remove(cluster, "lasting", "fleeting", "resting")


def test_a_crash_while_no_server_runs_is_mended_and_told_later(cluster: ProgramCluster, image: str) -> None:
    create(cluster, image, "alone", *RESTART)
    (before,) = pids(cluster).values()

    cluster.server.kill()
    os.kill(before, signal.SIGKILL)
    eventually(
        lambda: pids(cluster) and before not in pids(cluster).values(), what="it runs again, with no server"
    )
    cluster.server.start()
    cluster.wait_ready()

    assert becomes(cluster, "alone", total=1)["epoch"] == "1"
    remove(cluster, "alone")


def test_a_container_that_is_removed_by_hand_is_made_again_as_its_policy_says(
    cluster: ProgramCluster, image: str
) -> None:
    # A restart that waits: else the node would be quicker than the hand.
    policy = "{condition: on-failure, initial_delay: 10m, max_delay: 10m}"
    spec = f"{{image: '{image}', cpu_cores: 0.1, memory_mb: 32, command: [sleep, '600'], restart: {policy}}}"
    cluster.must("instance", "create", "-f", "-", stdin=f"name: web\ntype: container\nspec: {spec}\n")
    create(cluster, image, "plain")
    before = {name: cluster.instance(name) for name in ("web", "plain")}

    for instance in before.values():
        cluster.containerd.ctr("tasks", "kill", "--signal", "SIGKILL", instance["id"])
        cluster.containerd.ctr("tasks", "rm", "--force", instance["id"], check=False)
        cluster.containerd.ctr("containers", "rm", instance["id"], check=False)
        cluster.containerd.ctr("snapshots", "rm", instance["id"], check=False)

    def made_again() -> bool:
        web = cluster.instance("web")
        return bool(web["status"] == "INSTANCE_STATUS_RUNNING" and web["epoch"] != before["web"]["epoch"])

    eventually(made_again, what="it is made again", timeout_s=60.0)
    cluster.wait_status("plain", "FAILED", timeout_s=30.0)
    assert list(pids(cluster)) == [before["web"]["id"]]
    remove(cluster, "web", "plain")


def test_what_the_store_has_forgotten_runs_on_until_it_is_said_to_be_of_no_use(
    cluster: ProgramCluster, image: str
) -> None:
    create(cluster, image, "forgotten")
    (pid,) = pids(cluster).values()

    cluster.server.kill()
    for file in cluster.directory.glob("store.db*"):
        file.unlink()
    cluster.server.start()
    cluster.wait_ready()

    eventually(lambda: "orphan_kept" in cluster.server.text(), what="the orphan is seen")
    time.sleep(12.0)  # its grace, and a look after that
    assert Path(f"/proc/{pid}").exists(), "it runs on"
    cluster.server.terminate()
    cluster.server.set("reconcile.keep_older", "false")
    cluster.server.start()
    eventually(lambda: not Path(f"/proc/{pid}").exists(), what="it is removed", timeout_s=60.0)
    cluster.assert_nothing_left()
