"""A container's whole life through the built programs, as a user sees it."""

import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hvtest_containerd import eventually
from hvtest_programs import ProgramCluster

SMALL = ("--cpu", "0.1", "--memory", "32MiB")


class Terminal:
    """`instance console` on a pseudo-terminal, typed at like a person does."""

    def __init__(self, cluster: ProgramCluster, name: str, *, rows: int, columns: int) -> None:
        self._master, slave = pty.openpty()
        self.resize(rows, columns)
        self.process = subprocess.Popen(
            [str(cluster.bin / "hypervisor-ctl"), "instance", "console", name],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=cluster.env,
            start_new_session=True,
            preexec_fn=lambda: os.close(
                os.open(os.ttyname(0), os.O_RDWR)
            ),  # becomes its controlling terminal
        )
        os.close(slave)
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        """Change the terminal's size, as a window manager does."""
        import fcntl
        import struct
        import termios

        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def expect(self, text: str, *, timeout_s: float = 15.0) -> None:
        """Read until ``text`` was printed after everything expected before."""
        deadline = time.monotonic() + timeout_s
        wanted = text.encode()
        while wanted not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not appear; the terminal shows {self.seen[-2000:]!r}"
            ready, _, _ = select.select([self._master], [], [], left)
            if ready:
                try:
                    data = os.read(self._master, 65536)
                except OSError:  # the other side is closed
                    data = b""
                assert data, f"the console closed; the terminal shows {self.seen[-2000:]!r}"
                self.seen += data
        self.seen = self.seen.split(wanted, 1)[1]

    def close(self) -> None:
        """Hang up."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextmanager
def terminal(cluster: ProgramCluster, name: str, *, rows: int = 24, columns: int = 80) -> Iterator[Terminal]:
    attached = Terminal(cluster, name, rows=rows, columns=columns)
    try:
        yield attached
    finally:
        attached.close()


def test_whole_life_of_a_container(cluster: ProgramCluster, image: str) -> None:
    cluster.must(
        "instance",
        "create",
        "life",
        "--image",
        image,
        *SMALL,
        "--",
        "sh",
        "-c",
        "echo born-$((40+2)); exec sh",
    )

    born = cluster.instance("life")
    assert born["status"] == "INSTANCE_STATUS_RUNNING"
    assert born["node_id"] == cluster.node()["id"]
    assert cluster.reserved() == {"cpu_cores": 0.1, "memory_bytes": 32 << 20, "instances": 1}

    with terminal(cluster, "life", rows=37, columns=101) as console:
        console.expect("born-42")
        console.type("stty size\n")
        console.expect("37 101")
        console.resize(40, 120)
        console.type("\n")
        eventually_size(console, "40 120")
        before = stats(cluster, "life")
        console.type("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo loop-$((1+1))nd\n")
        console.expect("loop-2nd", timeout_s=60)
        after = stats(cluster, "life")
        assert int(after["cpu_usage_ns"]) > int(before["cpu_usage_ns"]) + 10_000_000
        assert int(after["memory_limit_bytes"]) == 32 << 20
        assert int(after["pids"]) >= 1
        console.type("echo kept > /kept\n")
        console.type("\x1d")
        assert console.process.wait(timeout=10) == 0

    cluster.must("instance", "stop", "life", "--grace-period", "1s")
    stopped = cluster.instance("life")
    assert stopped["status"] == "INSTANCE_STATUS_STOPPED"
    assert cluster.reserved()["instances"] == 1

    cluster.must("instance", "start", "life")
    with terminal(cluster, "life") as console:
        console.expect("born-42")
        console.type("cat /kept\n")
        console.expect("kept\r\n")
        console.expect("kept\r\n")

    first_start = cluster.instance("life")["started_at"]
    cluster.must("instance", "restart", "life", "--grace-period", "0s")
    restarted = cluster.instance("life")
    assert restarted["status"] == "INSTANCE_STATUS_RUNNING"
    assert restarted["started_at"] > first_start

    cluster.must("instance", "delete", "life", "--force")
    gone = cluster.ctl("instance", "get", "life")
    assert gone.code == 3
    assert "life" in gone.err
    cluster.assert_nothing_left()

    verbs = [
        o["verb"]
        for o in cluster.must("operation", "list", "-o", "json").json()
        if o["object_name"] == "life"
    ]
    assert sorted(verbs) == ["create", "delete", "restart", "start", "stop"]


def eventually_size(console: Terminal, size: str) -> None:
    """The resize reaches the guest on its own connection: ask until it is there, a bounded number of times."""
    for _ in range(20):
        console.type("stty size\n")
        try:
            console.expect(size, timeout_s=1)
        except AssertionError:
            continue
        return
    raise AssertionError(f"the guest never saw the size {size}")


def stats(cluster: ProgramCluster, name: str) -> dict[str, str]:
    found: dict[str, str] = cluster.must("instance", "stats", name, "-o", "json").json()
    return found


def test_two_viewers_share_one_console(cluster: ProgramCluster, image: str) -> None:
    cluster.must("instance", "create", "shared", "--image", image, *SMALL, "--", "sh")
    with terminal(cluster, "shared") as first, terminal(cluster, "shared") as second:
        first.type("echo from-$((1+0))st\n")
        first.expect("from-1st")
        second.expect("from-1st")
        second.type("echo from-$((1+1))nd\n")
        first.expect("from-2nd")
        second.expect("from-2nd")

    cluster.must("instance", "delete", "shared", "--force")
    cluster.assert_nothing_left()


@pytest.mark.parametrize(
    ("command", "status", "reason", "code"),
    [
        ("exit 0", "STOPPED", "EXITED", 0),
        ("exit 7", "FAILED", "EXITED", 7),
    ],
)
def test_an_exit_is_seen_with_its_code_and_reason(
    cluster: ProgramCluster, image: str, command: str, status: str, reason: str, code: int
) -> None:
    script = f"sleep 0.3; {command}"
    cluster.must("instance", "create", "exits", "--image", image, *SMALL, "--", "sh", "-c", script)

    seen = cluster.wait_status("exits", status)

    try:
        assert seen["status_reason"] == reason
        assert int(seen.get("exit_code", 0)) == code
    finally:
        cluster.must("instance", "delete", "exits", "--force")
    cluster.assert_nothing_left()


def test_a_kill_from_outside_is_seen_as_one(cluster: ProgramCluster, image: str) -> None:
    cluster.must("instance", "create", "victim", "--image", image, *SMALL, "--", "sleep", "600")
    rows = cluster.containerd.ctr("tasks", "ls").stdout.splitlines()[1:]
    subprocess.run(["kill", "-9", rows[0].split()[1]], check=True)

    seen = cluster.wait_status("victim", "FAILED")

    assert seen["status_reason"] == "KILLED"
    assert int(seen["exit_code"]) == 137
    cluster.must("instance", "delete", "victim", "--force")
    cluster.assert_nothing_left()


def test_a_container_out_of_memory_fails_with_the_reason(cluster: ProgramCluster, image: str) -> None:
    hungry = "a=xxxxxxxxxxxxxxxx; while :; do a=$a$a; done"
    cluster.must(
        "instance", "create", "hungry", "--image", image, "--memory", "8MiB", "--", "sh", "-c", hungry
    )

    seen = cluster.wait_status("hungry", "FAILED")

    assert seen["status_reason"] == "OOM_KILLED"
    cluster.must("instance", "delete", "hungry", "--force")
    cluster.assert_nothing_left()


def test_a_container_made_stopped_runs_when_it_is_started(cluster: ProgramCluster, image: str) -> None:
    cluster.must("instance", "create", "later", "--image", image, *SMALL, "--stopped", "--", "sleep", "600")
    assert cluster.instance("later")["status"] == "INSTANCE_STATUS_STOPPED"
    assert cluster.containerd.ctr("tasks", "ls", "-q").stdout.split() == []

    cluster.must("instance", "start", "later")

    assert cluster.instance("later")["status"] == "INSTANCE_STATUS_RUNNING"
    cluster.must("instance", "delete", "later", "--force")
    cluster.assert_nothing_left()


def test_a_manifest_makes_several_instances(cluster: ProgramCluster, image: str) -> None:
    document = "\n---\n".join(
        f"name: m{n}\ntype: container\nlabels:\n  set: manifest\nspec:\n  image: {image}\n  memory_mb: 16\n"
        f"  cpu_cores: 0.05\n  command: [sleep, '600']"
        for n in range(3)
    )
    cluster.must("instance", "create", "-f", "-", stdin=document)

    listed = cluster.must("instance", "list", "-l", "set=manifest", "-o", "json").json()
    assert [i["name"] for i in listed] == ["m0", "m1", "m2"]
    assert {i["status"] for i in listed} == {"INSTANCE_STATUS_RUNNING"}

    cluster.must("instance", "delete", "m0", "m1", "m2", "--force")
    cluster.assert_nothing_left()


def test_events_of_a_life_arrive_in_order(cluster: ProgramCluster, image: str) -> None:
    revision = int(cluster.must("cluster", "info", "-o", "json").json()["revision"])
    cluster.must("instance", "create", "told", "--image", image, *SMALL, "--", "sleep", "600")
    cluster.must("instance", "delete", "told", "--force")

    with cluster.channel() as channel:
        from hypervisor.v1 import cluster_pb2

        stream = cluster.cluster_api(channel).WatchEvents(
            cluster_pb2.WatchEventsRequest(after_revision=revision, kinds=["instance"]), timeout=20
        )
        told = []
        for event in stream:
            if event.object_name == "told":
                told.append(event)
                if event.type == cluster_pb2.Event.TYPE_DELETED:
                    break
        stream.cancel()

    assert told[0].type == cluster_pb2.Event.TYPE_CREATED
    revisions = [event.revision for event in told]
    assert revisions == sorted(revisions)
    eventually(lambda: not cluster.containerd.leftovers(), what="containerd is clean")
