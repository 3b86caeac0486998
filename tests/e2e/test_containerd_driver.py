"""The containerd driver over a real, private containerd: the Driver contract, and what is containerd's own."""

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvtest_containerd import PrivateContainerd, missing_programs
from hvtest_containers import BUSYBOX, ContainerdBench, assignment, started, until
from hvtest_control_groups import pressure_is_kept
from hvtest_driver_contract import DriverContract
from hvtest_driver_powers import PausingContract, UpdatingContract
from hvtest_driver_stats import sampled
from hvtest_driver_watching import events_of, read_until, the_end
from hvtest_hostile_archives import HOSTILE_ARCHIVES, docker_archive
from hypervisor.agent.drivers.containerd import ContainerdDriver
from hypervisor.agent.stats.service import StatsService
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition, InvalidArgument
from hypervisor.core.ids import new_id
from hypervisor.core.model import ConsoleSize, InstanceSpec, Sizes
from hypervisor.core.resources import MIB
from hypervisor.core.states import InstanceStatus
from hypervisor.ctl.oci_image import build_archive

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason=f"needs {', '.join(missing_programs())}")


def swap_limits_v2(containerd: PrivateContainerd) -> set[str]:
    """Of all its containers; empty with cgroup v1, or where the kernel does not account for swap."""
    files = [path for group in containerd.cgroups() for path in Path(group).glob("memory.swap.max")]
    return {path.read_text(encoding="ascii") for path in files}


def cpu_limits(containerd: PrivateContainerd) -> set[tuple[int, int]]:
    """Quota and period, in microseconds, of all its containers."""
    found = set()
    for group in containerd.cgroups():
        for path in Path(group).glob("cpu.max"):
            quota, period = path.read_text(encoding="ascii").split()
            found.add((int(quota), int(period)))
        for path in Path(group).glob("cpu.cfs_quota_us"):
            period = path.with_name("cpu.cfs_period_us").read_text(encoding="ascii")
            found.add((int(path.read_text(encoding="ascii")), int(period)))
    return found


class TestDriverContract(DriverContract, PausingContract, UpdatingContract):
    @pytest.fixture
    def bench(self, containerd: PrivateContainerd) -> Iterator[ContainerdBench]:
        yield ContainerdBench(containerd)  # noqa: PT022


class TestSizes:
    async def test_a_running_container_gets_and_keeps_other_limits(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(driver, bench.shell())
        sizes = Sizes(cpu_millis=250, memory_mb=96)

        updated = await driver.update(made.instance_id, sizes)

        assert updated.status is InstanceStatus.RUNNING
        for _ in range(2):
            sample = await sampled(driver, made.instance_id)
            assert sample.memory_limit_bytes == 96 * MIB
            assert cpu_limits(bench.containerd) == {(25_000, 100_000)}
            await driver.restart(made.instance_id, grace_s=0.0)

    async def test_less_memory_than_it_uses_is_refused_and_changes_nothing(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(
            driver,
            bench.spec("head -c 20000000 /dev/zero | tail | sleep 1000 & echo re''ady; wait", memory_mb=64),
        )
        console = await driver.attach(made.instance_id)
        await read_until(console, b"ready")
        await console.close()

        async def uses_much() -> bool:
            return ((await sampled(driver, made.instance_id)).memory_used_bytes or 0) > 15 * MIB

        await until(uses_much, what="it uses much memory")

        with pytest.raises(FailedPrecondition) as refused:
            await driver.update(made.instance_id, Sizes(cpu_millis=500, memory_mb=5))

        assert refused.value.reason == "UPDATE_REFUSED"
        sample = await sampled(driver, made.instance_id)
        assert sample.memory_limit_bytes == 64 * MIB
        assert (await driver.get(made.instance_id)).status is InstanceStatus.RUNNING


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

    async def test_one_that_somebody_froze_is_stopped(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(driver, bench.shell())
        bench.containerd.ctr("tasks", "pause", made.instance_id)

        seen = await driver.stop(made.instance_id, grace_s=0.0)

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

    async def test_the_statistics_service_follows_it_from_start_to_start(
        self, bench: ContainerdBench, driver: ContainerdDriver
    ) -> None:
        made = await started(driver, bench.spec("while :; do :; done", memory_mb=32))
        stats = StatsService(
            locate=driver.stats_source, clock=SystemClock(), interval_s=0.1, slow_interval_s=0.5, history=600
        )
        running = asyncio.ensure_future(stats.run())
        try:
            stats.observed(await driver.get(made.instance_id))
            before = await stats.fresh(made.instance_id)
            assert before.cpu_usage_ns is not None

            async def half_a_second_used() -> bool:
                usage = (await stats.fresh(made.instance_id)).cpu_usage_ns
                return usage is not None and usage - (before.cpu_usage_ns or 0) > 500_000_000

            await until(half_a_second_used, what="the load shows in cpu_usage_ns")
            after = await stats.fresh(made.instance_id)
            assert after.cpu_used_cores is not None
            assert 0.05 < after.cpu_used_cores <= 2.0
            assert after.memory_limit_bytes == 32 * MIB
            assert (after.pids, after.oom_kills) == (1, 0)
            assert after.memory_working_set_bytes is not None
            assert after.network_receive_bytes == 0
            assert (after.cpu_pressure is not None) == pressure_is_kept()

            # It ends and begins again before anybody says so: the new control group is found by itself.
            watch = stats.watch(made.instance_id, interval_s=0.1)
            assert (await anext(watch)).pids == 1
            await driver.restart(made.instance_id, grace_s=0.0)
            async for _ in watch:
                pass
            stats.observed(await driver.get(made.instance_id))
            past = stats.watch(made.instance_id, interval_s=0.1, history_s=3600.0)
            first = await anext(past)
            await past.aclose()
            # What runs there for a moment yet may be runc's set-up, of several threads.
            assert first.pids is not None
            assert first.pids >= 1
            assert first.cpu_used_cores is None, "a history of its own, from its first sample"

            await driver.stop(made.instance_id, grace_s=0.0)
            stats.observed(await driver.get(made.instance_id))
            assert stats.open_files == 0
            with pytest.raises(FailedPrecondition, match="does not run"):
                await stats.fresh(made.instance_id)
        finally:
            running.cancel()
            await asyncio.wait({running})

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
        assert (await sampled(driver, made.instance_id)).memory_limit_bytes == 48 * MIB
        await console.close()
        assert swap_limits_v2(bench.containerd) <= {"0\n"}

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
