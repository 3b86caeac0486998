"""The containerd driver over a real, private containerd: the Driver contract, and what is containerd's own."""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from msgspec.structs import replace

from hvtest_agent_waiting import within
from hvtest_containerd import PrivateContainerd, missing_programs
from hvtest_containers import BUSYBOX, ContainerdBench, assignment
from hvtest_driver_contract import DriverContract
from hvtest_driver_watching import events_of, read_until, the_end
from hvtest_hostile_archives import HOSTILE_ARCHIVES, docker_archive
from hypervisor.agent.drivers.containerd import ContainerdDriver
from hypervisor.agent.drivers.containerd.client import Client
from hypervisor.agent.drivers.containerd.console import ConsoleFifos
from hypervisor.agent.drivers.containerd.events import EventFeed, EventHandlers
from hypervisor.agent.drivers.containerd.labels import Record
from hypervisor.agent.drivers.containerd.runtime import Runtime
from hypervisor.agent.drivers.driver import Assignment
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from hypervisor.core.ids import new_id
from hypervisor.core.model import ConsoleSize, InstanceSpec, Observation
from hypervisor.core.resources import MIB
from hypervisor.core.states import InstanceStatus
from hypervisor.ctl.oci_image import build_archive

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason=f"needs {', '.join(missing_programs())}")


@pytest.fixture(scope="module")
def containerd() -> Iterator[PrivateContainerd]:
    # Short: shims have sockets below it, whose paths have at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    with PrivateContainerd(directory, namespace=f"test-{directory.name}") as private:
        yield private


@pytest.fixture(scope="module")
def bench(containerd: PrivateContainerd) -> ContainerdBench:
    return ContainerdBench(containerd)


@pytest.fixture
async def driver(bench: ContainerdBench) -> AsyncIterator[ContainerdDriver]:
    driver = await bench.open()
    yield driver
    await driver.aclose()
    cleaner = await bench.open()
    for observation in await cleaner.list():
        await cleaner.delete(observation.instance_id)
    await cleaner.aclose()
    assert bench.leftovers() == {}


async def started(driver: ContainerdDriver, spec: InstanceSpec) -> Assignment:
    made = assignment(spec)
    await driver.create(made)
    await driver.start(made.instance_id)
    return made


async def until(probe: Callable[[], Awaitable[bool]], *, what: str, timeout_s: float = 20.0) -> None:
    async def poll() -> None:
        while not await probe():  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    await within(poll(), what=what, timeout_s=timeout_s)


class TestDriverContract(DriverContract):
    @pytest.fixture
    def bench(self, containerd: PrivateContainerd) -> Iterator[ContainerdBench]:
        yield ContainerdBench(containerd)  # noqa: PT022


class TestLifecycle:
    async def test_a_disk_outlives_stop_start_and_restart(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(driver, bench.shell())
        console = await driver.attach(made.instance_id)
        await console.write(b"echo kept > /note && echo don''e\n")
        await read_until(console, b"done")
        await console.close()

        await driver.stop(made.instance_id, grace_s=0.0)
        await driver.start(made.instance_id)
        await driver.restart(made.instance_id, grace_s=0.0)

        console = await driver.attach(made.instance_id)
        await console.write(b"cat /note\n")
        await read_until(console, b"kept")
        await console.close()

    async def test_a_program_that_handles_sigterm_ends_within_the_grace_period(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(
            driver, bench.spec("trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done")
        )
        console = await driver.attach(made.instance_id)
        await read_until(console, b"ready")
        await console.close()

        seen = await driver.stop(made.instance_id, grace_s=20.0)

        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.STOPPED, "EXITED", 3)

    async def test_a_program_that_ignores_sigterm_is_killed_after_the_grace_period(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(driver, bench.spec("trap '' TERM; while :; do sleep 0.05; done"))

        seen = await driver.stop(made.instance_id, grace_s=0.2)

        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.STOPPED, "KILLED", 137)

    async def test_an_oom_kill_is_seen_with_its_reason(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = assignment(bench.spec("exec tail /dev/zero", memory_mb=16))
        await driver.create(made)

        async with events_of(driver) as queue:
            await driver.start(made.instance_id)
            seen = await the_end(queue, made.instance_id)

        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.FAILED, "OOM_KILLED", 137)
        assert "memory_mb" in seen.message
        assert (await driver.get(made.instance_id)).reason == "OOM_KILLED"

    async def test_stats_rise_under_load(self, bench: ContainerdBench, driver: ContainerdDriver) -> None:
        made = await started(driver, bench.spec("while :; do :; done", memory_mb=32))
        before = await driver.stats(made.instance_id)
        assert before.cpu_usage_ns is not None
        start = before.cpu_usage_ns

        async def half_a_second_used() -> bool:
            usage = (await driver.stats(made.instance_id)).cpu_usage_ns
            return usage is not None and usage - start > 500_000_000

        await until(half_a_second_used, what="the load shows in cpu_usage_ns")
        await asyncio.sleep(1.0)  # rates are means over a second or more
        after = await driver.stats(made.instance_id)

        assert after.cpu_used_cores is not None
        assert 0.05 < after.cpu_used_cores <= 1.3
        assert after.memory_limit_bytes == 32 * MIB
        assert after.pids == 1
        assert after.oom_kills == 0

    async def test_limits_are_those_of_the_spec(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        spec = InstanceSpec(image=f"oci-archive:{bench.archive}", cpu_millis=250, memory_mb=48, pids_limit=20)
        made = await started(driver, spec)
        console = await driver.attach(made.instance_id)

        # cgroup v1 has the first file, v2 the second.
        await console.write(b"cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max\n")
        await read_until(console, b"\n25000")
        await console.write(b"for i in $(seq 40); do sleep 100 & done\n")
        # The shell says so when it cannot fork any more.
        await read_until(console, b"can't fork")
        assert (await driver.stats(made.instance_id)).memory_limit_bytes == 48 * MIB
        await console.close()

    async def test_the_image_says_who_runs_and_the_spec_says_where_and_with_what(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        path = bench.images / "nobody.tar"
        build_archive(BUSYBOX, path, name="nobody:1", env={"FROM_IMAGE": "1", "BOTH": "image"}, user="nobody")
        spec = InstanceSpec(
            image=f"oci-archive:{path}#nobody:1",
            command=("sh", "-c", "id; pwd; env; hostname; grep CapEff /proc/self/status; echo en''d"),
            env={"BOTH": "spec"},
            working_dir="/tmp",
        )
        made = await started(driver, spec)
        console = await driver.attach(made.instance_id)

        output = (await read_until(console, b"end")).decode()

        assert "uid=65534(nobody) gid=65534(nogroup)" in output
        assert "\n/tmp\r" in output
        assert "FROM_IMAGE=1\r" in output
        assert "BOTH=spec\r" in output
        assert "\nbox\r" in output
        assert "CapEff:\t0000000000000000" in output
        await console.close()

    async def test_a_container_cannot_mount_nor_load_modules_nor_see_the_node(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        script = (
            "mount -t tmpfs none /tmp && echo mounted; mknod /dev/sda b 8 0 && cat /dev/sda && echo read-disk; "
            "echo 1 > /proc/sys/kernel/panic && echo wrote-sysctl; grep Seccomp: /proc/self/status; "
            "grep NoNewPrivs /proc/self/status; ls /sys/class/net; ps | wc -l; echo en''d; sleep 100"
        )
        made = await started(driver, bench.spec(script))
        console = await driver.attach(made.instance_id)

        output = (await read_until(console, b"end")).decode()
        await console.close()

        assert "mounted" not in output
        assert "read-disk" not in output
        assert "wrote-sysctl" not in output
        assert "Seccomp:\t2" in output
        assert "NoNewPrivs:\t1" in output
        assert "\nlo\r" in output
        assert "eth" not in output


class TestConsole:
    async def test_output_nobody_reads_does_not_hold_up_the_container(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = assignment(bench.spec("dd if=/dev/zero bs=1k count=600 | tr '\\0' x; echo; echo last words"))
        await driver.create(made)

        async with events_of(driver) as queue:
            await driver.start(made.instance_id)
            seen = await the_end(queue, made.instance_id)

        assert seen.exit_code == 0
        console = await driver.attach(made.instance_id)
        output = await read_until(console, b"last words")
        assert output.count(b"x") == 600 * 1024
        await console.close()

    async def test_what_is_printed_while_no_agent_runs_is_there_afterwards(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(driver, bench.spec("read line; echo before; sleep 0.5; echo meanwhile; exec sh"))
        console = await driver.attach(made.instance_id)
        await console.write(b"go\n")
        await read_until(console, b"before")
        await driver.aclose()

        second = await bench.open()
        try:
            await second.recover(made.instance_id, {})
            console = await second.attach(made.instance_id)
            await read_until(console, b"meanwhile")
            await console.resize(ConsoleSize(77, 33))
            await console.write(b"stty size\n")
            await read_until(console, b"33 77")
        finally:
            await second.delete(made.instance_id)
            await second.aclose()

    async def test_a_pasted_megabyte_arrives_whole(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(
            driver, bench.spec("stty -echo -icanon; echo ready; head -c 1000000 | md5sum; sleep 100")
        )
        console = await driver.attach(made.instance_id)
        await read_until(console, b"ready")

        writing = asyncio.ensure_future(console.write(b"y" * 1_000_000))

        output = await read_until(console, b"  -")
        await writing
        assert hashlib.md5(b"y" * 1_000_000).hexdigest().encode() in output
        await console.close()


_CREATOR = """
import asyncio, json, os, random, signal, sys
from pathlib import Path
from hypervisor.agent.drivers.containerd import ContainerdConfig, ContainerdDriver
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.model import InstanceSpec
from hvtest_containers import assignment
told = json.loads(sys.argv[1])
async def main():
    config = ContainerdConfig(
        address=Path(told["address"]),
        namespace=told["namespace"],
        console_root=Path(told["consoles"]),
        archive_roots=(Path(told["images"]),),
    )
    driver = ContainerdDriver(config, clock=SystemClock(), new_id=new_id, rng=random.Random(1))
    made = assignment(InstanceSpec(image=told["image"], memory_mb=64))
    await driver.create(made)
    await driver.start(made.instance_id)
    await driver.attach(made.instance_id)
    print(made.instance_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


class TestFailure:
    async def test_kill_9_of_the_agent_leaves_a_container_running_that_the_next_one_adopts(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        told = {
            "address": str(bench.config.address),
            "namespace": bench.config.namespace,
            "consoles": str(bench.config.console_root),
            "images": str(bench.images),
            "image": bench.shell().image,
        }
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        killed = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", _CREATOR, json.dumps(told)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert killed.returncode == -9, killed.stderr
        instance_id = killed.stdout.split()[-1]

        adopted = await driver.recover(instance_id, {})

        assert adopted is not None
        assert adopted.status is InstanceStatus.RUNNING
        assert adopted.started_at is not None
        console = await driver.attach(instance_id)
        await console.write(b"echo still-$((40+2))\n")
        await read_until(console, b"still-42")
        await console.close()

    async def test_containers_outlive_kill_9_of_containerd_and_their_exits_meanwhile_are_found(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        stays = await started(driver, bench.shell())
        ends = await started(driver, bench.spec("read line; exit 4"))
        console = await driver.attach(ends.instance_id)

        async with events_of(driver) as queue:
            await within(queue.get(), what="the feed has begun")
            bench.containerd.kill()
            with pytest.raises(Unavailable) as caught:
                await driver.get(stays.instance_id)
            assert caught.value.reason == "DRIVER_UNAVAILABLE"
            info = await driver.info()
            assert not info.available
            assert "cannot be reached" in info.reason
            await console.write(b"go\n")
            await asyncio.to_thread(bench.containerd.start)
            seen = await the_end(queue, ends.instance_id)

        assert (seen.status, seen.exit_code) == (InstanceStatus.FAILED, 4)
        assert (await driver.get(stays.instance_id)).status is InstanceStatus.RUNNING
        await console.close()
        console = await driver.attach(stays.instance_id)
        await console.write(b"echo still-$((40+2))\n")
        await read_until(console, b"still-42")
        await console.close()

    async def test_a_killed_shim_is_seen_as_the_end_of_its_container(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(driver, bench.shell())

        async with events_of(driver) as queue:
            await within(queue.get(), what="the feed has begun")
            for pid in bench.containerd.shims():
                os.kill(pid, 9)
            seen = await the_end(queue, made.instance_id)

        assert seen.status is InstanceStatus.FAILED
        assert (await driver.start(made.instance_id)).status is InstanceStatus.RUNNING

    async def test_a_container_made_but_not_started_by_a_dead_agent_can_be_started(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = assignment(bench.shell())
        await driver.create(made)
        client = Client(bench.config.address, namespace=bench.config.namespace, timeout_s=10.0)
        runtime = Runtime(client, bench.config)
        stdin, stdout = (bench.images / name for name in ("half-in", "half-out"))
        for path in (stdin, stdout):
            os.mkfifo(path)
        reader = os.open(stdout, os.O_RDONLY | os.O_NONBLOCK)
        try:
            mounts = await runtime.mounts(made.instance_id)
            await runtime.create_task(made.instance_id, mounts=mounts, stdin=str(stdin), stdout=str(stdout))
        finally:
            os.close(reader)
            stdin.unlink()
            stdout.unlink()
            await client.aclose()

        second = await bench.open()
        try:
            adopted = await second.recover(made.instance_id, {})
            assert adopted is not None
            assert adopted.status is InstanceStatus.STOPPED
            assert (await second.start(made.instance_id)).status is InstanceStatus.RUNNING
        finally:
            await second.aclose()

    async def test_a_start_that_was_recorded_but_never_began_is_no_lost_run(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = assignment(bench.shell())
        await driver.create(made)
        client = Client(bench.config.address, namespace=bench.config.namespace, timeout_s=10.0)
        runtime = Runtime(client, bench.config)
        container = await runtime.get_container(made.instance_id)
        assert container is not None
        record = Record.from_labels(container.labels)
        stdin, stdout = ConsoleFifos(bench.config.console_root, buffer_bytes=1 << 16).make(made.instance_id)
        try:
            mounts = await runtime.mounts(made.instance_id)
            await runtime.create_task(made.instance_id, mounts=mounts, stdin=str(stdin), stdout=str(stdout))
            await runtime.update_container(replace(record, started_at=datetime.now(UTC)))
        finally:
            await client.aclose()

        second = await bench.open()
        try:
            adopted = await second.recover(made.instance_id, {})
            assert adopted is not None
            assert (adopted.status, adopted.reason, adopted.started_at) == (InstanceStatus.STOPPED, "", None)
            assert (await second.get(made.instance_id)).status is InstanceStatus.STOPPED
        finally:
            await second.aclose()

    async def test_a_failed_start_leaves_the_record_of_the_run_before(
        self, bench: ContainerdBench, driver: ContainerdDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = await started(driver, bench.exits(0))

        async def ended() -> bool:
            return (await driver.get(made.instance_id)).finished_at is not None

        await until(ended, what="the run ends")
        before = await driver.stop(made.instance_id, grace_s=0.0)

        async def refuse(_: Runtime, instance_id: str) -> None:
            await asyncio.sleep(0.2)  # The record is written meanwhile.
            raise FailedPrecondition(f"start {instance_id}: no", reason="RUNTIME_REFUSED")

        with monkeypatch.context() as patch:
            patch.setattr(Runtime, "start_task", refuse)
            with pytest.raises(FailedPrecondition):
                await driver.start(made.instance_id)

        after = await driver.get(made.instance_id)
        assert (after.status, after.started_at, after.finished_at) == (
            before.status,
            before.started_at,
            before.finished_at,
        )

    async def test_a_stop_cut_off_by_the_agents_death_is_still_known_as_asked_for(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(
            driver,
            bench.spec(
                "trap 'echo asked; read line; exit 143' TERM; echo ready; while :; do sleep 0.05; done"
            ),
        )
        console = await driver.attach(made.instance_id)
        await read_until(console, b"ready")
        stopping = asyncio.ensure_future(driver.stop(made.instance_id, grace_s=30.0))
        await read_until(console, b"asked")
        await driver.aclose()
        await within(asyncio.wait({stopping}), what="the stop breaks off with its agent")
        assert stopping.cancelled() or stopping.exception() is not None

        second = await bench.open()
        try:
            assert (await second.get(made.instance_id)).status is InstanceStatus.RUNNING
            console = await second.attach(made.instance_id)
            await console.write(b"go\n")

            async def ended() -> bool:
                return (await second.get(made.instance_id)).finished_at is not None

            await until(ended, what="the program ends")
            await console.close()
            seen = await second.recover(made.instance_id, {})
            assert seen is not None
            assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.STOPPED, "KILLED", 143)
            await second.start(made.instance_id)
            await second.stop(made.instance_id, grace_s=0.0)
        finally:
            await second.aclose()

    async def test_a_defect_in_an_events_handling_ends_the_feed_only_until_it_is_asked_again(
        self, bench: ContainerdBench
    ) -> None:
        listings: list[int] = []

        async def resync() -> tuple[Observation, ...]:
            listings.append(1)
            if len(listings) == 1:
                raise ZeroDivisionError("a defect")
            return (
                Observation(
                    instance_id="i-1",
                    generation=1,
                    epoch=1,
                    status=InstanceStatus.RUNNING,
                    observed_at=datetime.now(UTC),
                ),
            )

        async def nothing(_: object) -> None:
            return None

        client = Client(bench.config.address, namespace=bench.config.namespace, timeout_s=10.0)
        feed = EventFeed(
            client,
            EventHandlers(on_exit=nothing, on_oom=nothing, resync=resync),
            namespace=bench.config.namespace,
            clock=SystemClock(),
            rng=random.Random(1),
        )
        try:
            with pytest.raises(ExceptionGroup):
                await within(anext(feed), what="the defect is told")
            seen = await within(anext(feed), what="the feed goes on")
            assert seen.instance_id == "i-1"
        finally:
            await feed.aclose()
            await client.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(feed)

    async def test_what_an_interrupted_create_or_delete_left_is_removed(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        no_snapshot = assignment(bench.shell())
        await driver.create(no_snapshot)
        bench.containerd.ctr("snapshots", "rm", no_snapshot.instance_id)

        assert await driver.delete(no_snapshot.instance_id) is True
        assert await driver.delete(no_snapshot.instance_id) is False
        assert bench.leftovers() == {}

    async def test_containers_of_others_in_the_namespace_are_none_of_ours(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = assignment(bench.shell())
        image = (await driver.create(made))["image"]
        bench.containerd.ctr("containers", "create", image, "foreign")
        try:
            listed = [seen.instance_id for seen in await driver.list()]
            with pytest.raises(NotFound):
                await driver.get("foreign")
        finally:
            bench.containerd.ctr("containers", "rm", "foreign")

        assert listed == [made.instance_id]

    async def test_fifty_creates_ten_at_once_all_run_and_all_go(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        many = [assignment(bench.spec(memory_mb=16, cpu_millis=50)) for _ in range(50)]
        slots = asyncio.Semaphore(10)

        async def run(one: Assignment) -> Observation:
            async with slots:
                await driver.create(one)
                return await driver.start(one.instance_id)

        seen = await asyncio.gather(*(run(one) for one in many))

        assert {observation.status for observation in seen} == {InstanceStatus.RUNNING}
        assert {o.instance_id for o in await driver.list()} == {one.instance_id for one in many}
        assert all(await asyncio.gather(*(driver.delete(one.instance_id) for one in many)))
        assert bench.leftovers() == {}

    @pytest.mark.parametrize("after_s", [0.0, 0.002, 0.004, 0.008, 0.03, 0.06, 0.09])
    async def test_a_cancelled_create_or_start_leaves_all_or_nothing(
        self, bench: ContainerdBench, driver: ContainerdDriver, after_s: float
    ) -> None:
        made = assignment(bench.shell())

        async def run() -> None:
            await driver.create(made)
            await driver.start(made.instance_id)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after_s):
                await run()

        present = {seen.instance_id: seen.status for seen in await driver.list()}
        assert present.get(made.instance_id) in (None, InstanceStatus.STOPPED, InstanceStatus.RUNNING)
        if not present:
            assert bench.leftovers() == {}
        await run()
        assert (await driver.get(made.instance_id)).status is InstanceStatus.RUNNING

    async def test_a_cancelled_import_leaves_nothing_and_can_be_repeated(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        path = bench.images / "cancelled.tar"
        build_archive(BUSYBOX, path, name="cancelled:1", env={"UNIQUE": new_id("t")})
        made = assignment(InstanceSpec(image=f"oci-archive:{path}"))

        for after_s in (0.0, 0.003, 0.01, 0.02, 0.04):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(after_s):
                    await driver.create(made)
                await driver.delete(made.instance_id)
            assert bench.leftovers() == {}

        await driver.create(made)


class TestImages:
    async def test_concurrent_creates_of_a_new_image_import_it_once(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        path = bench.images / "fresh.tar"
        digest = build_archive(BUSYBOX, path, name="fresh:1", env={"FRESH": new_id("t")})
        many = [assignment(InstanceSpec(image=f"oci-archive:{path}", memory_mb=16)) for _ in range(8)]

        handles = await asyncio.gather(*(driver.create(one) for one in many))

        assert {handle["image"].rpartition("@")[2] for handle in handles} == {digest}
        listed = bench.containerd.ctr("images", "ls", "-q").stdout.split()
        assert len([name for name in listed if name.endswith(digest)]) == 1

    async def test_an_archive_that_changed_is_imported_anew(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        path = bench.images / "changing.tar"
        images = []
        for value in ("one", "two"):
            build_archive(BUSYBOX, path, name="changing:1", env={"VALUE": value})
            images.append(
                (await driver.create(assignment(InstanceSpec(image=f"oci-archive:{path}"))))["image"]
            )

        assert images[0] != images[1]

    async def test_an_image_removed_from_containerd_is_imported_again(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        first = assignment(bench.shell())
        image = (await driver.create(first))["image"]
        await driver.delete(first.instance_id)
        bench.containerd.ctr("images", "rm", "--sync", image)

        made = await started(driver, bench.shell())

        assert (await driver.get(made.instance_id)).status is InstanceStatus.RUNNING

    async def test_an_image_of_the_namespace_is_used_by_its_name(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        name = "local/box:1"
        bench.containerd.ctr("images", "import", "--no-unpack", "--index-name", name, str(bench.archive))

        made = await started(driver, InstanceSpec(image=name, command=("sleep", "100")))

        assert (await driver.get(made.instance_id)).status is InstanceStatus.RUNNING

    async def test_a_docker_archive_is_imported(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        path = bench.images / "docker.tar"
        docker_archive(bench.archive, path, tag="box:docker")

        made = await started(driver, InstanceSpec(image=f"oci-archive:{path}#box:docker"))

        assert (await driver.get(made.instance_id)).status is InstanceStatus.RUNNING

    @pytest.mark.parametrize("name", sorted(HOSTILE_ARCHIVES))
    async def test_a_hostile_archive_is_refused_and_leaves_nothing(
        self, bench: ContainerdBench, driver: ContainerdDriver, name: str
    ) -> None:
        content = bench.containerd.ctr("content", "ls", "-q").stdout.split()
        snapshots = bench.containerd.ctr("snapshots", "ls").stdout
        images = bench.containerd.ctr("images", "ls", "-q").stdout
        path = bench.images / "hostile.tar"
        path.unlink(missing_ok=True)
        HOSTILE_ARCHIVES[name](bench.archive, path)

        with pytest.raises(InvalidArgument) as caught:
            await driver.create(assignment(InstanceSpec(image=f"oci-archive:{path}")))

        assert caught.value.reason == "IMAGE_INVALID"
        assert "hostile.tar" in caught.value.message
        assert sorted(bench.containerd.ctr("content", "ls", "-q").stdout.split()) == sorted(content)
        assert bench.containerd.ctr("snapshots", "ls").stdout == snapshots
        assert bench.containerd.ctr("images", "ls", "-q").stdout == images

    async def test_an_archive_outside_of_the_roots_is_refused(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        outside = bench.containerd.directory / "outside.tar"
        build_archive(BUSYBOX, outside, name="outside:1")

        for path in (outside, bench.images / ".." / "outside.tar"):
            with pytest.raises(InvalidArgument):
                await driver.create(assignment(InstanceSpec(image=f"oci-archive:{path}")))

    async def test_a_program_that_the_image_lacks_is_named_and_nothing_of_the_start_is_left(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = assignment(InstanceSpec(image=f"oci-archive:{bench.archive}", command=("no-such-program",)))
        await driver.create(made)

        with pytest.raises(InvalidArgument) as caught:
            await driver.start(made.instance_id)

        assert caught.value.reason == "COMMAND_NOT_FOUND"
        assert "no-such-program" in caught.value.message
        assert bench.containerd.shims() == []
        assert (await driver.get(made.instance_id)).status is InstanceStatus.STOPPED
