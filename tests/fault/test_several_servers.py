"""Three servers over three members of etcd, under a load of creates and deletes: parts are killed, ended, added.

Clients are the command line itself, which knows all servers: not one of its commands may fail, and what it was told is
what there is afterwards, in the store and on the nodes.
"""

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hvtest_programs import unpack_release
from hvtest_server_group import ServerGroup, eventually
from hvtest_simulated_cluster import running_on

_CLIENTS = 2
_SMALL = ("--cpu", "0.05", "--memory", "16MiB", "--image", "busybox")


class Load:
    """Clients that create instances and delete each second one, all the time."""

    def __init__(self, group: ServerGroup) -> None:
        self._group = group
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(_CLIENTS)]
        self.kept: set[str] = set()
        self.deleted: set[str] = set()
        self.failures: list[str] = []

    @property
    def done(self) -> int:
        """Commands that ended well."""
        return len(self.kept) + 2 * len(self.deleted)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def goes_on(self, *, commands: int = 4) -> None:
        """Return when that many further commands have ended well."""
        wanted = self.done + commands
        eventually(
            lambda: bool(self.failures) or self.done >= wanted, what="the load goes on", timeout_s=120.0
        )
        assert not self.failures, self.failures

    def _work(self, client: int) -> None:
        for turn in itertools.count():
            if self._stop.is_set():
                return
            name = f"i-{client}-{turn}"
            if not self._run("instance", "create", name, *_SMALL):
                return
            if turn % 2 and self._run("instance", "delete", name, "--force"):
                self.deleted.add(name)
            else:
                self.kept.add(name)

    def _run(self, *arguments: str) -> bool:
        done = self._group.ctl(*arguments, timeout_s=180)
        if done.returncode:
            self.failures.append(f"{' '.join(arguments)}: {done.stderr}\n{self._group.logs()}")
        return done.returncode == 0


@pytest.fixture
def group(tmp_path: Path) -> Iterator[ServerGroup]:
    release = unpack_release(tmp_path)
    with ServerGroup(release / "bin", servers=3, spare=1, agents=2) as running:
        eventually(lambda: len(ready_nodes(running)) == 2, what="both nodes are there")
        yield running


def ready_nodes(group: ServerGroup) -> list[dict[str, Any]]:
    done = group.ctl("node", "list", "-o", "json")
    nodes: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
    return [node for node in nodes if node["status"] == "NODE_STATUS_READY"]


def leader(group: ServerGroup) -> int:
    """Which server does the singleton work; -1: none."""
    done = group.ctl("cluster", "info", "-o", "json")
    if done.returncode:
        return -1
    leading = [s["address"] for s in json.loads(done.stdout)["servers"] if s.get("leader")]
    return group.addresses.index(leading[0]) if leading else -1


def test_nothing_is_lost_or_done_twice_while_servers_and_members_come_and_go(group: ServerGroup) -> None:
    with Load(group) as load:
        load.goes_on()
        eventually(lambda: leader(group) >= 0, what="a server leads")
        first = leader(group)

        group.servers[first].kill()
        load.goes_on()
        eventually(lambda: leader(group) not in (-1, first), what="another server leads")

        group.servers[3].start()
        eventually(lambda: group.serving(3), what="the added server answers")
        load.goes_on()

        second = leader(group)
        assert group.servers[second].terminate() == 0
        load.goes_on()
        eventually(lambda: leader(group) not in (-1, first, second), what="a third server leads")

        group.etcd.members[group.etcd.leader()].kill()
        load.goes_on()
        eventually(lambda: len(ready_nodes(group)) == 2, what="both nodes are with servers that live")

    assert not load.failures, load.failures
    listed = json.loads(group.ctl("instance", "list", "-o", "json").stdout)
    assert {i["name"] for i in listed} == load.kept
    assert {i["status"] for i in listed} == {"INSTANCE_STATUS_RUNNING"}
    on_nodes: list[str] = []
    for node in ready_nodes(group):
        with grpc.insecure_channel(f"{node['address']}:{node['port']}") as channel:
            on_nodes += running_on(channel)
    assert sorted(on_nodes) == sorted(i["id"] for i in listed)
