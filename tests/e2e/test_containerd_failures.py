"""The containerd driver when agents, shims and containerd itself die, and when calls are cut off half-way."""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from hvtest_agent_waiting import within
from hvtest_containerd import missing_programs
from hvtest_containers import BUSYBOX, ContainerdBench, assignment, started, until
from hvtest_driver_watching import events_of, read_until, the_end
from hypervisor.agent.drivers.containerd import ContainerdDriver
from hypervisor.agent.drivers.containerd.client import Client
from hypervisor.agent.drivers.containerd.events import EventFeed, EventHandlers
from hypervisor.agent.drivers.containerd.labels import Record
from hypervisor.agent.drivers.containerd.runtime import Runtime
from hypervisor.agent.drivers.driver import Assignment
from hypervisor.agent.drivers.fifo_console import ConsoleFifos
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition, NotFound, Unavailable
from hypervisor.core.ids import new_id
from hypervisor.core.model import InstanceSpec, Observation
from hypervisor.core.states import InstanceStatus
from hypervisor.ctl.oci_image import build_archive

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason=f"needs {', '.join(missing_programs())}")


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
