"""Nodes of built programs are lost: what asks for it runs on another node, and never on two."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvtest_containerd import PrivateContainerd, eventually
from hvtest_programs import Program, ProgramCluster, free_port

SMALL = ("--cpu", "0.1", "--memory", "32MiB")
FOREVER = ("--", "sleep", "100000")
SECOND = "e2e-second"


class TwoNodes(ProgramCluster):
    """A cluster with a second node, which has a containerd of its own."""

    def __init__(self, root: Path) -> None:
        super().__init__(
            root,
            server_keys={
                "heartbeat.interval": "500ms",
                "heartbeat.timeout": "3s",
                "reconcile.fence_margin": "3s",
            },
        )
        self.second_containerd = PrivateContainerd(self.directory / "d", namespace=f"e2e-{self.port}-b")
        self.second = self._program(
            "agent",
            {
                "node.hostname": SECOND,
                "agent.bind": "127.0.0.1",
                "agent.port": str(free_port()),
                "agent.server_address": self.address,
                "agent.data_dir": str(self.directory / "second"),
                "containerd.address": str(self.second_containerd.address),
                "containerd.namespace": self.second_containerd.namespace,
                "containerd.console_root": str(self.directory / "consoles-2"),
                "images.archive_roots": str(self.images),
                "microvm.data_dir": str(self.directory / "microvms-2"),
                "drivers.enabled": "container",
                "drivers.health_interval": "1s",
                "metrics.address": "127.0.0.1:0",
            },
        )

    def __enter__(self) -> "TwoNodes":
        self.second_containerd.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *arguments: object) -> None:
        for program in (self.agent, self.second):
            if program.running:
                os.kill(program.pid, signal.SIGCONT)
                program.kill()
        self.second_containerd.end_everything()
        for pid in guards_of(self):
            os.kill(pid, signal.SIGKILL)
        super().__exit__(*arguments)

    def pids(self, containerd: PrivateContainerd) -> list[int]:
        """First processes of the containers that run."""
        rows = containerd.ctr("tasks", "ls").stdout.splitlines()[1:]
        return [int(row.split()[1]) for row in rows if row.split()[2] == "RUNNING"]

    def start_second(self) -> None:
        """Start the second node and wait until it can run containers."""
        self.second.start()

        def ready() -> bool:
            found = self.ctl("node", "get", SECOND, "-o", "json")
            drivers = found.json().get("drivers", []) if found.code == 0 else []
            return any(d.get("available") and d["name"] == "containerd" for d in drivers)

        eventually(ready, what="the second node is ready", timeout_s=30)

    def wait_where(self, name: str, node: str) -> None:
        """Return once the instance runs on this node."""
        try:
            eventually(
                lambda: self.where(name)[:2] == (node, "RUNNING"), what=f"{name} runs on {node}", timeout_s=60
            )
        except AssertionError as exc:
            raise AssertionError(
                f"{exc}\n{self.instance(name)}\n{self.logs()}\n--- second\n{self.second.text()[-4000:]}"
            ) from None

    def where(self, name: str) -> tuple[str, str, int]:
        """Node, status and epoch of an instance."""
        found = self.instance(name)
        node = self.must("node", "get", found["node_id"], "-o", "json").json()["hostname"]
        return node, found["status"].removeprefix("INSTANCE_STATUS_"), int(found["epoch"])


def guards_of(cluster: ProgramCluster) -> list[int]:
    """Guards of the cluster's agents."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                b"--data-dir" in words
                and str(cluster.directory).encode() in words[words.index(b"--data-dir") + 1]
            ):
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def two(release: Path) -> Iterator[TwoNodes]:
    with TwoNodes(release) as running:
        yield running


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def lose(two: TwoNodes, program: Program, number: int) -> None:
    os.kill(program.pid, number)


def test_the_guest_of_a_killed_agent_is_killed_before_it_runs_elsewhere(two: TwoNodes) -> None:
    image = f"oci-archive:{two.make_image()}"
    two.must("instance", "create", "web", "--image", image, *SMALL, "--on-node-loss", "reschedule", *FOREVER)
    two.must("instance", "create", "stays", "--image", image, *SMALL, *FOREVER)
    two.start_second()
    pids = two.pids(two.containerd)
    assert len(pids) == 2

    two.agent.kill()
    (web_pid,) = eventually_gone(pids)
    two.wait_where("web", SECOND)

    assert gone(web_pid)
    assert [gone(pid) for pid in pids].count(False) == 1, "what does not ask for it runs on"
    assert "guard_fenced" in (two.directory / "agent" / "fencing-guard.log").read_text()
    assert two.where("web")[2] == 2
    assert two.where("stays")[:2] == (two.hostname, "UNKNOWN")


def eventually_gone(pids: list[int]) -> list[int]:
    """Those that the guard has killed: exactly one."""
    return eventually(lambda: [pid for pid in pids if gone(pid)], what="the guard kills one", timeout_s=20)  # type: ignore[return-value]


def test_the_old_copy_is_deleted_when_its_node_comes_back(two: TwoNodes) -> None:
    two.agent.start()
    two.wait_ready()

    two.wait_status("stays", "RUNNING")
    eventually(
        lambda: len(two.containerd.ctr("containers", "ls", "-q").stdout.split()) == 1,
        what="only what belongs there is left",
        timeout_s=20,
    )
    assert two.where("web") == (SECOND, "RUNNING", 2)
    assert (
        two.must("node", "get", two.hostname, "-o", "json").json()["fencing"]["state"]
        == "FENCING_STATE_ARMED"
    )


def test_a_stopped_agent_is_fenced_by_its_guard_and_wakes_up_to_no_copy(two: TwoNodes) -> None:
    (web_pid,) = two.pids(two.second_containerd)
    lose(two, two.second, signal.SIGSTOP)
    two.wait_where("web", two.hostname)
    assert gone(web_pid)

    lose(two, two.second, signal.SIGCONT)

    eventually(
        lambda: not two.second_containerd.ctr("containers", "ls", "-q").stdout.split(),
        what="the old copy is deleted",
        timeout_s=30,
    )
    assert two.where("web") == (two.hostname, "RUNNING", 3)


def test_a_dead_node_is_evacuated_and_deregistered(two: TwoNodes) -> None:
    two.must(
        "instance",
        "create",
        "plain",
        "--image",
        f"oci-archive:{two.images / 'busybox.tar'}",
        *SMALL,
        "--selector",
        f"hypervisor/hostname={SECOND}",
        *FOREVER,
    )
    two.second.kill()
    refused = two.ctl("node", "evacuate", SECOND)
    assert refused.code == 2
    assert "--confirm-dead" in refused.err
    alive = two.ctl("node", "evacuate", two.hostname, "--confirm-dead")
    assert alive.code != 0
    assert "is not lost" in alive.err
    eventually(
        lambda: two.must("node", "get", SECOND, "-o", "json").json()["status"] == "NODE_STATUS_OFFLINE",
        what="it is offline",
        timeout_s=20,
    )

    plan = two.must("node", "evacuate", SECOND, "--dry-run").out
    assert "plain: no node fits" in plan
    two.must("node", "evacuate", SECOND, "--confirm-dead")
    eventually(
        lambda: "no node fits" in two.instance("plain")["status_message"], what="it says why", timeout_s=20
    )
    refused = two.ctl("node", "deregister", SECOND)
    assert "has 1 instances" in refused.err
