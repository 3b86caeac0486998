"""The Driver contract as tests: every promise of drivers/driver.py, for any driver.

A driver's test module subclasses :class:`DriverContract` and gives a ``bench`` fixture: a :class:`DriverBench` that
knows how to make drivers over one runtime and how to write specs that the runtime runs. The image of ``shell`` must
have a line interpreter that echoes typed lines and knows ``echo``, ``stty size`` and ``exit N``.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Protocol

import pytest

from hvtest_agent_waiting import within
from hvtest_driver_stats import sampled
from hvtest_driver_watching import events_of, read_until, the_end
from hypervisor.agent.drivers.driver import VERBS, Assignment, Driver
from hypervisor.core.errors import FailedPrecondition, HypervisorError, InvalidArgument, NotFound
from hypervisor.core.ids import new_id
from hypervisor.core.model import ConsoleSize, InstanceSpec
from hypervisor.core.states import InstanceStatus, InstanceType

__all__ = ["DriverBench", "DriverContract"]


class DriverBench(Protocol):
    """One runtime, and what a test has to know of it."""

    kind: InstanceType

    async def open(self) -> Driver:
        """A driver over the runtime, as an agent that starts makes one."""
        ...

    def shell(self) -> InstanceSpec:
        """An instance that waits for lines on its terminal."""
        ...

    def exits(self, code: int) -> InstanceSpec:
        """An instance that ends by itself with the code, at once."""
        ...

    def prints(self, text: str) -> InstanceSpec:
        """An instance that prints the text and ends."""
        ...

    def missing_image(self) -> InstanceSpec: ...

    def invalid_image(self) -> InstanceSpec: ...

    def leftovers(self) -> dict[str, list[str]]:
        """What is left in the runtime of instances, by kind; empty after everything was deleted."""
        ...


class DriverContract:
    """Subclass it and define the fixture ``bench``."""

    @pytest.fixture
    def bench(self) -> Iterator[DriverBench]:
        raise NotImplementedError("define the fixture bench")

    @pytest.fixture
    async def driver(self, bench: DriverBench) -> AsyncIterator[Driver]:
        driver = await bench.open()
        yield driver
        await driver.aclose()

    @pytest.fixture
    async def made(self, bench: DriverBench, driver: Driver) -> AsyncIterator[list[str]]:
        """Ids of instances to delete at the end."""
        ids: list[str] = []
        yield ids
        for instance_id in ids:
            await driver.delete(instance_id)

    async def _create(
        self, bench: DriverBench, driver: Driver, made: list[str], spec: InstanceSpec
    ) -> Assignment:
        assignment = self._assignment(bench, spec)
        made.append(assignment.instance_id)
        await driver.create(assignment)
        return assignment

    @staticmethod
    def _assignment(bench: DriverBench, spec: InstanceSpec) -> Assignment:
        return Assignment(
            instance_id=new_id("i"),
            name="contract",
            project="default",
            type=bench.kind,
            spec=spec,
            labels={"tests/suite": "contract"},
            generation=3,
            epoch=2,
        )

    # -- info ----------------------------------------------------------------------------------------------------

    async def test_info_names_every_verb_and_says_why_one_is_lacking(self, driver: Driver) -> None:
        info = await driver.info()

        assert info.name == driver.name
        assert info.available
        assert info.version
        assert {c.verb for c in info.capabilities} == set(VERBS)
        assert all(c.supported or c.reason for c in info.capabilities)

    # -- create, start, stop -------------------------------------------------------------------------------------

    async def test_a_created_instance_does_not_run_yet(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())

        seen = await driver.get(assignment.instance_id)

        assert seen.status is InstanceStatus.STOPPED
        assert seen.started_at is None
        assert seen.exit_code is None

    async def test_observations_carry_the_generation_and_epoch_of_the_assignment(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())

        seen = await driver.get(assignment.instance_id)

        assert (seen.instance_id, seen.generation, seen.epoch) == (assignment.instance_id, 3, 2)

    async def test_create_again_finds_its_work_done(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = self._assignment(bench, bench.shell())
        made.append(assignment.instance_id)

        first = await driver.create(assignment)
        again = await driver.create(assignment)

        assert dict(first) == dict(again)
        assert [o.instance_id for o in await driver.list()].count(assignment.instance_id) == 1

    async def test_create_again_leaves_a_running_instance_alone(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        started = await driver.start(assignment.instance_id)

        await driver.create(assignment)

        seen = await driver.get(assignment.instance_id)
        assert (seen.status, seen.started_at) == (InstanceStatus.RUNNING, started.started_at)

    async def test_start_runs_it_and_start_again_leaves_it_alone(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())

        first = await driver.start(assignment.instance_id)
        again = await driver.start(assignment.instance_id)

        assert first.status is InstanceStatus.RUNNING
        assert first.started_at is not None
        assert (again.status, again.started_at) == (InstanceStatus.RUNNING, first.started_at)

    async def test_stop_ends_it_and_stop_again_leaves_it_alone(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.start(assignment.instance_id)

        first = await driver.stop(assignment.instance_id, grace_s=0.0)
        again = await driver.stop(assignment.instance_id, grace_s=0.0)

        assert first.status is InstanceStatus.STOPPED
        assert first.finished_at is not None
        assert first.exit_code is not None
        assert (again.status, again.exit_code, again.finished_at) == (
            first.status,
            first.exit_code,
            first.finished_at,
        )

    async def test_stop_of_an_instance_that_never_ran_leaves_it_alone(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())

        seen = await driver.stop(assignment.instance_id, grace_s=0.0)

        assert seen.status is InstanceStatus.STOPPED
        assert seen.exit_code is None

    async def test_a_stopped_instance_starts_again_as_a_new_run(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        first = await driver.start(assignment.instance_id)
        await driver.stop(assignment.instance_id, grace_s=0.0)

        second = await driver.start(assignment.instance_id)

        assert second.status is InstanceStatus.RUNNING
        assert second.exit_code is None
        assert second.finished_at is None
        assert first.started_at is not None
        assert second.started_at is not None
        assert second.started_at > first.started_at

    async def test_restart_makes_a_new_run(self, bench: DriverBench, driver: Driver, made: list[str]) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        first = await driver.start(assignment.instance_id)

        second = await driver.restart(assignment.instance_id, grace_s=0.0)

        assert second.status is InstanceStatus.RUNNING
        assert first.started_at is not None
        assert second.started_at is not None
        assert second.started_at > first.started_at

    async def test_instances_do_not_wait_for_one_another(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignments = [self._assignment(bench, bench.shell()) for _ in range(4)]
        made.extend(a.instance_id for a in assignments)

        await asyncio.gather(*(driver.create(a) for a in assignments))
        seen = await asyncio.gather(*(driver.start(a.instance_id) for a in assignments))

        assert {o.status for o in seen} == {InstanceStatus.RUNNING}

    # -- refusals ------------------------------------------------------------------------------------------------

    async def test_a_missing_image_is_named_and_leaves_nothing(
        self, bench: DriverBench, driver: Driver
    ) -> None:
        assignment = self._assignment(bench, bench.missing_image())

        with pytest.raises(NotFound) as caught:
            await driver.create(assignment)

        assert caught.value.reason == "IMAGE_NOT_FOUND"
        assert [o for o in await driver.list() if o.instance_id == assignment.instance_id] == []
        assert bench.leftovers() == {}

    async def test_an_invalid_image_is_refused_and_leaves_nothing(
        self, bench: DriverBench, driver: Driver
    ) -> None:
        assignment = self._assignment(bench, bench.invalid_image())

        with pytest.raises(InvalidArgument) as caught:
            await driver.create(assignment)

        assert caught.value.reason == "IMAGE_INVALID"
        assert bench.leftovers() == {}

    @pytest.mark.parametrize("verb", ["get", "start", "stop", "restart", "stats", "attach"])
    async def test_an_unknown_instance_is_not_found(self, driver: Driver, verb: str) -> None:
        unknown = new_id("i")
        call: dict[str, Callable[[], Awaitable[object]]] = {
            "get": lambda: driver.get(unknown),
            "start": lambda: driver.start(unknown),
            "stop": lambda: driver.stop(unknown, grace_s=0.0),
            "restart": lambda: driver.restart(unknown, grace_s=0.0),
            "stats": lambda: driver.stats_source(unknown),
            "attach": lambda: driver.attach(unknown),
        }

        with pytest.raises(NotFound) as caught:
            await call[verb]()

        assert caught.value.reason == "INSTANCE_NOT_FOUND"

    # -- delete --------------------------------------------------------------------------------------------------

    async def test_delete_removes_everything_running_or_not(self, bench: DriverBench, driver: Driver) -> None:
        stopped, running = (self._assignment(bench, bench.shell()) for _ in range(2))
        for assignment in (stopped, running):
            await driver.create(assignment)
        await driver.start(running.instance_id)

        existed = [await driver.delete(a.instance_id) for a in (stopped, running)]

        assert existed == [True, True]
        assert bench.leftovers() == {}
        with pytest.raises(NotFound):
            await driver.get(running.instance_id)

    async def test_delete_of_nothing_says_so(self, driver: Driver) -> None:
        assert await driver.delete(new_id("i")) is False

    async def test_a_deleted_id_can_be_created_anew(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.delete(assignment.instance_id)

        await driver.create(assignment)

        seen = await driver.get(assignment.instance_id)
        assert (seen.status, seen.started_at) == (InstanceStatus.STOPPED, None)

    # -- what happens by itself ----------------------------------------------------------------------------------

    async def test_an_exit_with_zero_is_told_as_stopped(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.exits(0))

        async with events_of(driver) as events:
            await driver.start(assignment.instance_id)
            seen = await the_end(events, assignment.instance_id)

        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.STOPPED, "EXITED", 0)

    async def test_an_exit_with_an_error_is_told_as_failed_with_its_code(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.exits(7))

        async with events_of(driver) as events:
            await driver.start(assignment.instance_id)
            seen = await the_end(events, assignment.instance_id)

        assert (seen.status, seen.reason, seen.exit_code) == (InstanceStatus.FAILED, "EXITED", 7)
        assert seen.message
        again = await driver.get(assignment.instance_id)
        assert (again.status, again.exit_code) == (InstanceStatus.FAILED, 7)

    async def test_an_instance_that_exited_starts_again(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        async with events_of(driver) as events:
            await driver.start(assignment.instance_id)
            console = await driver.attach(assignment.instance_id)
            await console.write(b"exit 3\n")
            await the_end(events, assignment.instance_id)
            await console.close()

            seen = await driver.start(assignment.instance_id)

        assert (seen.status, seen.exit_code) == (InstanceStatus.RUNNING, None)

    # -- stats ---------------------------------------------------------------------------------------------------

    async def test_stats_of_a_running_instance_move_with_time(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        spec = bench.shell()
        assignment = await self._create(bench, driver, made, spec)
        await driver.start(assignment.instance_id)

        first = await sampled(driver, assignment.instance_id)
        second = await sampled(driver, assignment.instance_id)

        assert first.memory_limit_bytes == spec.memory_mb << 20
        assert first.memory_used_bytes is not None
        assert 0 < first.memory_used_bytes <= spec.memory_mb << 20
        assert first.cpu_usage_ns is not None
        assert second.cpu_usage_ns is not None
        assert second.cpu_usage_ns >= first.cpu_usage_ns >= 0
        assert second.sampled_at >= first.sampled_at

    async def test_stats_need_a_running_instance(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())

        with pytest.raises(FailedPrecondition) as caught:
            await sampled(driver, assignment.instance_id)

        assert caught.value.reason == "NOT_RUNNING"

    # -- console -------------------------------------------------------------------------------------------------

    async def test_the_console_shows_what_is_typed_and_answered(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.start(assignment.instance_id)
        console = await driver.attach(assignment.instance_id)

        await console.write(b"echo contract\n")

        # Once as the terminal's echo of the line, once as its output.
        await read_until(console, b"contract\r\n", times=2)
        await console.close()

    async def test_a_resize_is_seen_inside(self, bench: DriverBench, driver: Driver, made: list[str]) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.start(assignment.instance_id)
        console = await driver.attach(assignment.instance_id)
        assert console.resizable

        await console.resize(ConsoleSize(101, 37))
        await console.write(b"stty size\n")

        await read_until(console, b"37 101")
        await console.close()

    async def test_output_printed_before_the_attachment_is_not_lost(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.prints("early words"))

        async with events_of(driver) as events:
            await driver.start(assignment.instance_id)
            await the_end(events, assignment.instance_id)
        console = await driver.attach(assignment.instance_id)

        await read_until(console, b"early words")
        await console.close()

    async def test_a_console_ends_with_its_instance(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.start(assignment.instance_id)
        console = await driver.attach(assignment.instance_id)

        await driver.stop(assignment.instance_id, grace_s=0.0)

        async def drain() -> None:
            while await console.read():
                pass

        await within(drain(), what="the console ends", timeout_s=20.0)
        with pytest.raises(FailedPrecondition):
            await console.write(b"x")
        await console.close()
        await console.close()

    async def test_a_closed_console_leaves_the_instance_running_and_can_be_attached_again(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.start(assignment.instance_id)
        first = await driver.attach(assignment.instance_id)

        await first.close()
        second = await driver.attach(assignment.instance_id)
        await second.write(b"echo second\n")

        await read_until(second, b"second\r\n", times=2)
        assert (await driver.get(assignment.instance_id)).status is InstanceStatus.RUNNING
        await second.close()

    async def test_closing_a_console_ends_a_read_that_waits(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.start(assignment.instance_id)
        console = await driver.attach(assignment.instance_id)

        async def drain() -> None:
            while await console.read():
                pass

        reading = asyncio.ensure_future(drain())
        await asyncio.sleep(0)
        await console.close()

        await within(reading, what="the read ends")

    async def test_a_console_needs_an_instance_that_has_run(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())

        with pytest.raises(FailedPrecondition) as caught:
            await driver.attach(assignment.instance_id)

        assert caught.value.reason == "NOT_RUNNING"

    # -- the agent's restart -------------------------------------------------------------------------------------

    async def test_another_driver_over_the_runtime_adopts_a_running_instance_undisturbed(
        self, bench: DriverBench, driver: Driver
    ) -> None:
        assignment = self._assignment(bench, bench.shell())
        handle = await driver.create(assignment)
        before = await driver.start(assignment.instance_id)
        await driver.aclose()

        after_restart = await bench.open()
        try:
            adopted = await after_restart.recover(assignment.instance_id, handle)

            assert adopted is not None
            assert (adopted.status, adopted.started_at) == (InstanceStatus.RUNNING, before.started_at)
            assert (adopted.generation, adopted.epoch) == (3, 2)
            listed = {o.instance_id: o for o in await after_restart.list()}
            assert listed[assignment.instance_id].status is InstanceStatus.RUNNING
            stopped = await after_restart.stop(assignment.instance_id, grace_s=0.0)
            assert stopped.status is InstanceStatus.STOPPED
        finally:
            await after_restart.delete(assignment.instance_id)
            await after_restart.aclose()
        assert bench.leftovers() == {}

    async def test_an_exit_between_two_agents_is_found_with_its_code(
        self, bench: DriverBench, driver: Driver
    ) -> None:
        assignment = self._assignment(bench, bench.exits(5))
        handle = await driver.create(assignment)
        async with events_of(driver) as events:
            await driver.start(assignment.instance_id)
            await the_end(events, assignment.instance_id)
        await driver.aclose()

        after_restart = await bench.open()
        try:
            adopted = await after_restart.recover(assignment.instance_id, handle)

            assert adopted is not None
            assert (adopted.status, adopted.exit_code) == (InstanceStatus.FAILED, 5)
        finally:
            await after_restart.delete(assignment.instance_id)
            await after_restart.aclose()

    async def test_recover_of_nothing_is_none(self, driver: Driver) -> None:
        assert await driver.recover(new_id("i"), {}) is None

    async def test_recover_works_without_the_handle(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.start(assignment.instance_id)

        seen = await driver.recover(assignment.instance_id, {})

        assert seen is not None
        assert seen.status is InstanceStatus.RUNNING

    async def test_handles_are_plain_strings(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = self._assignment(bench, bench.shell())
        made.append(assignment.instance_id)

        handle = await driver.create(assignment)

        assert all(isinstance(k, str) and isinstance(v, str) for k, v in handle.items())

    async def test_aclose_is_idempotent_and_instances_run_on(
        self, bench: DriverBench, driver: Driver, made: list[str]
    ) -> None:
        assignment = await self._create(bench, driver, made, bench.shell())
        await driver.start(assignment.instance_id)
        other = await bench.open()

        await other.aclose()
        await other.aclose()

        assert (await driver.get(assignment.instance_id)).status is InstanceStatus.RUNNING

    async def test_only_errors_of_the_tree_are_raised(self, bench: DriverBench, driver: Driver) -> None:
        spec = InstanceSpec(image="", command=("\0",), memory_mb=4)

        with pytest.raises(HypervisorError):
            await driver.create(self._assignment(bench, spec))
