"""The statistics service over the kernel's own control groups, as they come and go."""

import asyncio
import os
import resource
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hvtest_agent_waiting import until, within
from hvtest_control_groups import pressure_is_kept
from hypervisor.agent.stats.cgroups import CgroupPaths, expected_paths, sampler_sources, uses_v2
from hypervisor.agent.stats.service import StatsService
from hypervisor.agent.stats.sources import StatsSource
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

ROOT = Path("/sys/fs/cgroup")
MANY = 300


class Groups:
    """Control groups of a test, beneath one of its own."""

    def __init__(self) -> None:
        self.name = f"hvtest-{uuid.uuid4().hex[:12]}"
        self._made: list[Path] = []

    def directories(self, name: str) -> set[Path]:
        paths = self.paths(name)
        if paths.unified is not None:
            return {paths.unified}
        found = set(paths.controllers.values())
        if paths.pressure is not None and (ROOT / "unified").is_dir():
            found.add(paths.pressure)
        return found

    def make(self, instance_id: str) -> None:
        for directory in self.directories(""):
            directory.mkdir(exist_ok=True)
            if uses_v2(ROOT):
                for parent in (ROOT, directory):
                    (parent / "cgroup.subtree_control").write_text("+cpu +memory +io +pids")
        for directory in self.directories(instance_id):
            directory.mkdir()
            self._made.append(directory)

    def paths(self, instance_id: str) -> CgroupPaths:
        return expected_paths(f"{self.name}/{instance_id}", root=ROOT)

    def remove(self, instance_id: str) -> None:
        for directory in self.directories(instance_id):
            directory.rmdir()
            self._made.remove(directory)

    def close(self) -> None:
        for directory in (*reversed(self._made), *self.directories("")):
            with suppress(FileNotFoundError):
                directory.rmdir()


@pytest.fixture
def groups() -> Iterator[Groups]:
    made = Groups()
    try:
        made.make("i-probe")
        made.remove("i-probe")
    except OSError as exc:
        made.close()
        pytest.skip(f"control groups cannot be made here: {exc}")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """As the agent does at its start: as many open files as the system lets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Node:
    """The service over these groups."""

    def __init__(self, groups: Groups, *, max_open_files: int = 100_000) -> None:
        self.groups = groups
        self.pids: dict[str, int] = {}
        self.stats = StatsService(
            locate=self._locate,
            clock=SystemClock(),
            interval_s=0.1,
            slow_interval_s=1.0,
            history=20,
            max_open_files=max_open_files,
        )

    async def _locate(self, instance_id: str) -> StatsSource:
        pid = self.pids.get(instance_id, os.getpid())
        return sampler_sources(self.groups.paths(instance_id), pid=pid, proc_root=Path("/proc"))

    def tell(self, instance_id: str, status: InstanceStatus) -> None:
        now = datetime.now(UTC)
        self.stats.observed(
            Observation(
                instance_id=instance_id,
                generation=1,
                epoch=1,
                status=status,
                observed_at=now,
                started_at=now,
            )
        )


@asynccontextmanager
async def running(groups: Groups, *, max_open_files: int = 100_000) -> AsyncIterator[Node]:
    node = Node(groups, max_open_files=max_open_files)
    task = asyncio.ensure_future(node.stats.run())
    try:
        yield node
    finally:
        task.cancel()
        await asyncio.wait({task})


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_hundreds_come_and_go_without_a_leak(groups: Groups) -> None:
    await asyncio.to_thread(lambda: None)  # The loop's own threads and files are there.
    before = descriptors()
    async with running(groups) as node:
        for generation in range(3):
            ids = [f"i-{generation}-{n}" for n in range(MANY)]
            for instance_id in ids:
                groups.make(instance_id)
                node.tell(instance_id, InstanceStatus.RUNNING)
            await until(lambda: node.stats.usage().sampled == MANY, what="all are sampled", timeout_s=60.0)
            assert descriptors() - before >= MANY * 4

            # A third ends as it should, a third is gone before anybody says so, a third is deleted at once.
            for number, instance_id in enumerate(ids):
                if number % 3 == 0:
                    node.tell(instance_id, InstanceStatus.STOPPED)
                groups.remove(instance_id)
            await until(
                lambda: node.stats.open_files == 0, what="the removed ones are noticed", timeout_s=60.0
            )
            for number, instance_id in enumerate(ids):
                if number % 3 == 1:
                    node.tell(instance_id, InstanceStatus.STOPPED)
                elif number % 3 == 2:
                    node.stats.deleted(instance_id)
            assert descriptors() - before <= 4, "the service's thread, and nothing of the instances"
        assert (node.stats.running, node.stats.usage().sampled) == (0, 0)
    assert descriptors() <= before + 2


async def test_no_more_files_are_opened_than_the_agent_can_spare(groups: Groups) -> None:
    async with running(groups, max_open_files=60) as node:
        for number in range(20):
            groups.make(f"i-{number}")
            node.tell(f"i-{number}", InstanceStatus.RUNNING)
        await until(lambda: node.stats.failures > 0, what="some are left out")
        with pytest.raises(FailedPrecondition, match="LimitNOFILE"):
            await node.stats.fresh("i-19")

        usage = node.stats.usage()
        assert 0 < node.stats.open_files <= 60
        assert (usage.running, 2 <= usage.sampled <= 12) == (20, True)


async def test_a_stop_closes_the_files_at_once(groups: Groups) -> None:
    async with running(groups) as node:
        groups.make("i-1")
        node.tell("i-1", InstanceStatus.RUNNING)
        await until(lambda: node.stats.usage().sampled == 1, what="it is sampled")
        assert node.stats.open_files >= 4

        node.tell("i-1", InstanceStatus.STOPPED)

        assert node.stats.open_files == 0


@pytest.fixture
def busy() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that keeps a processor busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process
    process.kill()
    process.wait()


async def test_a_busy_process_shows_in_its_group(groups: Groups, busy: "subprocess.Popen[bytes]") -> None:
    groups.make("i-1")
    for directory in groups.directories("i-1"):
        (directory / "cgroup.procs").write_text(str(busy.pid))
    async with running(groups) as node:
        node.pids["i-1"] = busy.pid
        node.tell("i-1", InstanceStatus.RUNNING)

        async def used() -> float:
            watch = node.stats.watch("i-1", interval_s=0.1)
            async with aclosing(watch):
                async for sample in watch:
                    assert sample.pids in (1, None)
                    for pressure in (sample.cpu_pressure, sample.memory_pressure, sample.io_pressure):
                        assert (pressure is not None) == pressure_is_kept()
                    if sample.cpu_used_cores and sample.cpu_used_cores > 0.2:
                        return sample.cpu_used_cores
            return 0.0

        assert 0.2 < await within(used(), what="it is seen to be busy") < 4.0
        usage = node.stats.usage()
        assert (usage.running, usage.sampled) == (1, 1)

        busy.kill()
        await asyncio.to_thread(busy.wait)
        groups.remove("i-1")
        await until(lambda: node.stats.usage().sampled == 0, what="its end is noticed")
